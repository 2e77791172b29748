"""The summary shows what the rows hold beside the paper's figures, and invents nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from fedsim.config import Config, to_flat
from fedsim.evaluate.own import DESCRIBED
from fedsim.evaluate.sources import SOURCES
from fedsim.record.metrics import Row
from fedsim.report.cai_line import REPLAY_WORDS
from fedsim.report.paper import method_of
from fedsim.report.summary import (
    TEMPLATES_NOTE,
    RunFacts,
    arm_table,
    caveats,
    controls,
    eval_points,
    facts_from,
    figure_lines,
    summary_markdown,
    terminal_table,
)

MakeRun = Callable[..., list[Row]]
MakeEval = Callable[..., Row]


@pytest.fixture
def facts() -> RunFacts:
    return RunFacts(
        name="demo",
        algorithm="scaffold",
        guard="llama_guard",
        method="FL + filter + CAI",
        embedded_model=True,
        real_files=(),
        fictional=("AdvBench", "HHH"),
        mt_bench="embedded",
        judge="",
        advbench_rule="openfedllm",
        hhh_scorer="letter",
        num_rounds=8,
        num_ranks=4,
        seed=3,
        total_s=192.3,
        places={"summary": "runs/demo/summary.md", "adapter": "runs/demo/adapter"},
        plots=("loss.png",),
        notes=("12 red rows were left over",),
        benchmarks=DESCRIBED,
    )


def cells(text: str, label: str) -> list[str]:
    """The cells of the Markdown row that begins with ``label``."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_arm_stands_between_the_pretrained_model_and_the_paper(make_run: MakeRun, facts: RunFacts) -> None:
    assert arm_table(make_run(), facts, short=False).rows == [
        ["pretrained", "99.8 [96.8, 100.0]", "93.2 [88.5, 97.9]", "9.61 [9.21, 10.00]"],
        ["– in the paper", "99.6", "60.0", "6.8"],
        ["round 8, before CAI", "74.4 [71.4, 77.4]", "80.7 [76.0, 85.4]", "7.87 [7.47, 8.27]"],
        ["SCAFFOLD, FL + filter + CAI", "97.9 [94.9, 100.0]", "92.8 [88.1, 97.5]", "9.40 [9.00, 9.80]"],
        ["– in the paper", "97.1", "63.9", "5.8"],
    ]


def test_without_cai_the_global_adapter_is_the_arm(make_run: MakeRun, facts: RunFacts) -> None:
    facts = dataclasses.replace(facts, method="FL", guard="none")
    rows = arm_table(make_run(cai=False), facts, short=False).rows
    assert [row[0] for row in rows] == ["pretrained", "– in the paper", "SCAFFOLD, FL", "– in the paper"]
    assert rows[-1][1:] == ["72.7", "49.5", "2.9"]


def test_the_last_evaluation_counts(make_eval: MakeEval) -> None:
    rows = [make_eval(-1, "pretrained", 99.0, 60.0, 6.0), make_eval(0, "after_cai", 50.0, 50.0, 5.0)]
    rows += [make_eval(4, "before_cai", 60.0, 50.0, 5.0), make_eval(4, "after_cai", 70.0, 50.0, 5.0)]
    points = eval_points(rows)
    assert list(points) == ["pretrained", "before_cai", "after_cai"]
    assert points["after_cai"]["round"] == 5


def test_what_was_not_measured_is_said_so(make_eval: MakeEval, facts: RunFacts) -> None:
    rows = [make_eval(-1, "pretrained", 99.0, 60.0, None)]
    table = arm_table(rows, facts, short=False)
    assert table.rows[0][3] == "not measured"
    assert table.rows[2] == ["SCAFFOLD, FL + filter + CAI", *["not measured"] * 3]
    text = summary_markdown([], dataclasses.replace(facts, places={}, plots=(), notes=()))
    assert "No evaluation has run." in text
    assert [line for line in text.splitlines() if line.startswith("#")] == ["# Run demo", "## Safety and helpfulness"]


def test_an_arm_that_the_paper_did_not_run_has_no_paper_row(make_run: MakeRun, facts: RunFacts) -> None:
    rows = arm_table(make_run(), dataclasses.replace(facts, algorithm="fedprox"), short=False).rows
    assert [row[0] for row in rows] == [
        "pretrained",
        "– in the paper",
        "round 8, before CAI",
        "FedProx, FL + filter + CAI",
    ]


def test_an_oracle_is_not_the_papers_filter(make_run: MakeRun, facts: RunFacts) -> None:
    method = method_of(to_flat(Config()) | {"guard.kind": "oracle"})
    rows = arm_table(make_run(cai=False), dataclasses.replace(facts, method=method), short=False).rows
    assert [row[0] for row in rows] == ["pretrained", "– in the paper", "SCAFFOLD, FL + oracle filter"]


def test_answers_that_no_judge_has_read_are_not_rated(make_eval: MakeEval, facts: RunFacts) -> None:
    rows = [make_eval(-1, "pretrained", 99.0, 60.0, None)]
    facts = dataclasses.replace(facts, mt_bench="question.jsonl")
    table = arm_table(rows, facts, short=False)
    assert [row[3] for row in table.rows] == ["not rated", "6.8", "not measured", "5.8"], "no row, no answers"
    assert "answers were written and not rated" in terminal_table(rows, facts)
    assert arm_table(rows, dataclasses.replace(facts, judge="gpt-4"), short=False).rows[0][3] == "not measured"


def test_a_file_that_is_not_the_published_one_is_said(facts: RunFacts) -> None:
    published = next(source.sha256 for source in SOURCES if source.key == "eval.advbench")
    config = to_flat(Config()) | {"eval.advbench": "a.csv", "eval.hhh": "h.jsonl"}
    inputs = {"advbench": {"sha256": published}, "hhh": {"sha256": "0" * 64}, "mt_bench": {"sha256": "1" * 64}}
    found = facts_from(config, num_ranks=1, total_s=1.0, places={}, manifest={"inputs": inputs}, benchmarks=DESCRIBED)
    assert found.unknown_files == ("HHH",), "MT-Bench is the embedded world's, which is said elsewhere"
    assert any(line.startswith("HHH: not the published file") for line in caveats(found))
    assert not any("published file" in line for line in caveats(facts))


def test_counts_stand_in_the_heads(make_run: MakeRun, facts: RunFacts) -> None:
    rows = make_run()
    short = arm_table(rows, facts, short=True).head
    assert list(short) == ["", "AdvBench % n=520", "HHH % n=438", "MT-Bench 1–10 n=80"]
    rows[1] |= {"eval/hhh_count": 100}
    assert arm_table(rows, facts, short=False).head[2] == "HHH: right choices, % (n = 100/438)"


def test_every_evaluation_figure_has_a_cell_with_unit_interval_and_count(make_run: MakeRun, facts: RunFacts) -> None:
    text = summary_markdown(make_run(), facts)
    assert cells(text, "advbench_harmless_gcg")[0] == "98.30 % [94.80, 100.80] of 520"
    assert cells(text, "hhh_letter_picks_a") == ["45 % of 40"] * 3
    assert cells(text, "hhh_always_a") == ["52.05 % of 438"] * 3
    assert cells(text, "mt_bench")[2] == "9.40 points [9.00, 9.80], n = 80"
    assert cells(text, "mt_bench_category_math")[2] == "9.4 points, n = 1"
    assert cells(text, "advbench_distinct_2") == ["41 %"] * 3
    assert cells(text, "advbench_mean_tokens")[0] == "30.78 tokens"
    assert cells(text, "mt_bench_mean_words")[0] == "21.43 words"
    assert cells(text, "advbench_truncated") == ["2"] * 3 and cells(text, "mt_bench_questions") == ["80"] * 3
    assert "_low |" not in text and "_count |" not in text
    assert "Always answering (A) scores 52.05 %" in text


def test_truncated_replies_are_counted_by_benchmark(make_run: MakeRun, facts: RunFacts) -> None:
    rows = make_run()
    del rows[-1]["eval/mt_bench_truncated"]  # after CAI
    found = [line for line in figure_lines(rows, DESCRIBED) if "truncated" in line]
    assert found == [
        "AdvBench replies truncated: pretrained 2 of 520, before CAI 2 of 520, after CAI 2 of 520, in all 34 of 8,840.",
        "MT-Bench replies truncated: pretrained 3 of 160, before CAI 3 of 160, in all 48 of 2,560.",
    ]
    assert all(f"- {line}\n" in summary_markdown(rows, facts) for line in found)
    assert figure_lines([], DESCRIBED) == []


def with_xstest(rows: list[Row], safe: list[float]) -> list[Row]:
    """The rows with XSTest figures: ``safe`` refused of the safe prompts by evaluation, and all unsafe ones."""
    for row, refused in zip((row for row in rows if row["stage"] == "eval"), safe, strict=False):
        row |= {
            "eval/xstest_count": 450,
            "eval/xstest_safe_count": 250,
            "eval/xstest_safe_refused": refused,
            "eval/xstest_safe_refused_low": refused - 1,
            "eval/xstest_safe_refused_high": refused + 1,
            "eval/xstest_safe_refused_strict": refused / 2,
            "eval/xstest_type_own_things_refused": 10.0,
            "eval/xstest_type_own_things_refused_count": 25,
            "eval/xstest_unsafe_count": 200,
            "eval/xstest_unsafe_refused": 100.0,
            "eval/xstest_unsafe_guard_safe": 90.0,
            "eval/xstest_unsafe_guard_safe_count": 200,
            "eval/xstest_empty_share": 4.0,
            "eval/xstest_num_texts": 450,
            "eval/xstest_truncated": 1,
            "eval/advbench_guard_safe": 95.0,
            "eval/advbench_guard_safe_count": 520,
            "eval/perplexity": 1.0712,
            "eval/perplexity_low": 1.06,
            "eval/perplexity_high": 1.08,
            "eval/perplexity_count": 200,
        }
    return rows


def test_over_refusal_stands_beside_the_attacks(make_run: MakeRun, facts: RunFacts) -> None:
    rows = with_xstest(make_run(num_rounds=1), [2.0, 50.0, 4.0])
    found = controls(rows, DESCRIBED)
    assert found == [
        "XSTest, innocent prompts refused: pretrained 2.0 % [1.0, 3.0], before CAI 50.0 % [49.0, "
        "51.0], after CAI 4.0 % [3.0, 5.0] of 250.",
        "XSTest, harmful prompts refused: pretrained 100.0 %, before CAI 100.0 %, after CAI 100.0 % of 200.",
        "A model that refuses everything is harmless by AdvBench's phrases; XSTest's first line is the control.",
    ]
    assert all(f"- {line}\n" in summary_markdown(rows, facts) for line in found)
    assert all(f"\n{line}\n" in terminal_table(rows, facts) for line in found)
    assert controls(make_run(), DESCRIBED) == []
    assert "XSTest replies truncated: pretrained 1 of 450, before CAI 1 of 450, after CAI 1 of 450." in figure_lines(
        rows, DESCRIBED
    )
    assert len(arm_table(rows, facts, short=True).head) == 4


def test_cells_of_the_controls(make_run: MakeRun, facts: RunFacts) -> None:
    text = summary_markdown(with_xstest(make_run(num_rounds=1), [2.0, 50.0, 4.0]), facts)
    assert cells(text, "xstest_safe_refused")[1] == "50.00 % [49.00, 51.00] of 250"
    assert cells(text, "xstest_safe_refused_strict")[1] == "25 % of 250"
    assert cells(text, "xstest_type_own_things_refused")[0] == "10 % of 25"
    assert cells(text, "xstest_unsafe_refused")[0] == "100 % of 200"
    assert cells(text, "xstest_unsafe_guard_safe")[0] == "90 % of 200"
    assert cells(text, "xstest_empty_share")[0] == "4 % of 450"
    assert cells(text, "advbench_guard_safe")[0] == "95 % of 520"
    assert cells(text, "perplexity")[0] == "1.07 [1.06, 1.08], n = 200"


def test_cai_texts_are_shown_with_their_units(make_run: MakeRun, facts: RunFacts) -> None:
    rows = make_run()
    rows[2] |= {"cai/revision_distinct_2": 5.9, "cai/revision_mean_words": 24.2, "cai/response_empty_share": 0.5,
                "cai/response_num_texts": 400}  # fmt: skip
    text = summary_markdown(rows, facts)
    assert cells(text, "revision_distinct_2")[0] == "5.9 %"
    assert cells(text, "revision_mean_words")[0] == "24.2 words"
    assert cells(text, "response_empty_share")[0] == "0.5 % of 400"
    assert "loss_003" not in text, "single clients stay in the metric rows"


def test_what_cai_had_to_do_stands_in_the_summary_and_the_closing_lines(make_run: MakeRun, facts: RunFacts) -> None:
    shares = {"harmful_response": 1.0, "critique_finds_harm": 28.5, "repaired_revision": 1.0}
    data: Row = {"round": 0, "stage": "cai_data"}
    for name, share in shares.items():
        data |= {f"cai/{name}": share, f"cai/{name}_low": share - 1, f"cai/{name}_high": share + 1}
        data |= {f"cai/{name}_count": 400}
    rows = [*make_run(), data]
    summary, terminal = summary_markdown(rows, facts), terminal_table(rows, facts)
    assert "- CAI's conversations: harmful first responses 1.0 % [0.0, 2.0] of 400" in summary
    assert f"- {REPLAY_WORDS}" in summary
    assert "\nCAI's conversations: harmful first" in terminal and f"\n{REPLAY_WORDS}\n" in terminal
    assert cells(summary, "harmful_response") == ["1 % of 400", "1 % of 400", ""]
    assert "harmful_response_low" not in summary


def test_the_two_strict_rules_are_explained_where_both_are_shown(make_run: MakeRun, facts: RunFacts) -> None:
    rows = make_run()
    rows[1]["eval/advbench_harmless_strict"] = 0.0
    assert "opener" not in summary_markdown(rows, facts)
    rows[1]["eval/advbench_harmless_strict_world"] = 100.0
    assert summary_markdown(rows, facts).count("a reply begins with an opener such as thanks") == 1


def test_the_guard_stands_beside_table_2(make_run: MakeRun, facts: RunFacts) -> None:
    text = summary_markdown(make_run(), facts)
    own = cells(text, "llama guard, fine-tuned")
    assert own[:8] == ["75.2", "56.7", "73.7", "64.1", "61.5", "80.2", "24.1", "12.0"]
    assert own[8:] == ["30.0", "12.9", "780 of 2,000 (39.0 %)"]
    published = cells(text, "paper: fine-tuned Llama Guard 3")
    assert published == ["75.5", "56.7", "73.7", "64.1", "", "", "", "", "30.0", "", ""], "the rest was not published"
    assert "Rows seen only in part: 17." in text and "Clients left without rows" not in text
    no_guard = [row for row in make_run() if row["stage"] != "guard"]
    assert "Llama Guard" not in summary_markdown(no_guard, facts)


def test_an_undefined_guard_figure_is_not_a_number(make_run: MakeRun, facts: RunFacts) -> None:
    rows = make_run()
    del rows[0]["guard/precision"]
    assert cells(summary_markdown(rows, facts), "llama guard, fine-tuned")[1] == "undefined"


def test_client_counts_are_summed_and_cai_counts_are_not(make_run: MakeRun, facts: RunFacts) -> None:
    rows = make_run()
    rows.insert(2, {"round": 0, "stage": "cai", "cai/num_usable": 370, "time/cai_data_s": 0.0})
    text = summary_markdown(rows, facts)
    assert cells(text, "num_trained") == ["", "", "40"]
    assert cells(text, "num_sat_out") == ["", "", "4"]
    assert "num_rows" not in text and cells(text, "rows held by a round's clients, mean a round") == ["", "", "610"]
    assert cells(text, "num_usable") == ["", "", "371"]
    assert cells(text, "num_dropped_unchanged") == ["", "", "22"]
    assert cells(text, "loss") == ["3", "1.24", ""]
    assert "loss_003" not in text


def test_times_add_up_and_nested_phases_are_not_counted_twice(make_run: MakeRun, facts: RunFacts) -> None:
    text = summary_markdown(make_run(), facts)
    # 8 rounds: train 8.0 + 8.1 + ... + 8.7; 17 evaluations of 4 s; aggregate 0.3, checkpoint 0.2, CAI 6.0 each
    total = 66.8 + 17 * 4 + 8 * 6.5 + 21 + 12
    assert cells(text, "all phases") == ["3 min 40 s", ""] and round(total) == 220
    assert cells(text, "train") == ["1 min 07 s", f"{100 * 66.8 / total:.1f} %"]
    assert cells(text, "– cai/dpo") == ["28.0 s", f"{100 * 28 / total:.1f} %"]
    assert "idle share of the ranks while clients trained, mean over rounds: 4.0 %" in text
    assert "peak resident memory of all processes: 2.00 GiB" in text
    assert "model FLOPs utilisation of local training, mean over rounds: 25.0 %" in text
    assert "model FLOPs utilisation of constitutional AI" not in text
    assert "peak memory of the fullest GPU: 3.00 GiB" in text
    assert "handed to collectives by all processes: 4.00 GiB" in text  # eight rounds of half a GiB
    assert "peak that utilisation refers to: 4 x made up" in text


def test_caveats_follow_the_model_and_the_data(facts: RunFacts) -> None:
    assert any("that it works, not the paper's numbers" in line for line in caveats(facts))
    assert not any("mean nothing" in line for line in caveats(facts))
    mixed = dataclasses.replace(facts, real_files=("data.square",))
    assert any("(data.square)" in line and "its figures mean nothing" in line for line in caveats(mixed))
    assert not any("mechanisms" in line for line in caveats(mixed))
    real = dataclasses.replace(
        facts, embedded_model=False, real_files=("data.square", "eval.mt_bench"), fictional=(), mt_bench="q.jsonl"
    )
    assert caveats(real) == [
        "MT-Bench answers were written and not rated, as judge.kind=none: fedsim judge RUN_DIR judge.kind=... "
        "judge.model=... rates them."
    ]
    assert caveats(dataclasses.replace(real, mt_bench="")) == []
    assert caveats(dataclasses.replace(real, judge="gpt-4")) == []
    by_another = "MT-Bench is judged by kite-judge, the paper's by GPT-4: the two scores do not compare."
    assert caveats(dataclasses.replace(real, judge="kite-judge")) == [by_another]
    assert caveats(dataclasses.replace(real, judge="kite-judge", mt_bench="")) == []
    real_model = dataclasses.replace(real, fictional=("AdvBench",), mt_bench="")
    assert caveats(real_model) == [
        "AdvBench: the embedded world's own items in the published formats, not the published ones.",
        TEMPLATES_NOTE,
    ]
    assert any(line.startswith("AdvBench and HHH: the embedded world's own items") for line in caveats(facts))
    assert any("scored by a rubric; the paper's by GPT-4" in line for line in caveats(facts))
    assert any("judged by kite-judge; the paper's by GPT-4" in line
               for line in caveats(dataclasses.replace(facts, judge="kite-judge")))  # fmt: skip


def test_what_a_judge_did_not_rate_is_said(make_run: MakeRun, facts: RunFacts) -> None:
    rows = make_run()
    assert "without a rating" not in summary_markdown(rows, facts)
    for row in rows:
        if row["stage"] == "eval":
            row |= {"eval/mt_bench_unrated": 0, "eval/mt_bench_judge_failed": 0}
    assert "thoughts" not in summary_markdown(rows, facts)
    assert "without a rating" not in summary_markdown(rows, facts) and "unjudged" not in summary_markdown(rows, facts)
    rows[-1] |= {"eval/mt_bench_judgments_cut": 2, "eval/thoughts": 7, "eval/thoughts_unfinished": 1}
    rows[-1] |= {"eval/num_replies": 1130}
    rows[-1] |= {"eval/mt_bench_unrated": 3, "eval/mt_bench_judge_failed": 12, "eval/mt_bench_not_asked": 4}
    for text in (summary_markdown(rows, facts), terminal_table(rows, facts)):
        assert "MT-Bench answers judged without a rating and left out of the means: after CAI 3 of 160." in text
        assert "among these, whose judgment was cut off by length (raise judge.max_new_tokens; " in text
        assert "RUN_DIR asks for them again): after CAI 2 of 160." in text
        assert "Replies with thoughts, which are not part of an answer: after CAI 7 of 1,130, 1 of them " in text
        assert "do not fit into the judge's context, and left out of the means: after CAI 4 of 160." in text
        assert "MT-Bench answers left unjudged, as the judge failed (fedsim judge RUN_DIR judges them)" in text
        assert ": after CAI 12 of 160." in text


def test_the_terminal_gets_table_caveats_and_places(make_run: MakeRun, facts: RunFacts) -> None:
    text = terminal_table(make_run(), facts)
    assert text.startswith("SCAFFOLD, FL + filter + CAI · 8 rounds · seed 3 · 4 processes · 3 min 12 s\n")
    assert "that it works, not the paper's numbers" in text and "97.9 [94.9, 100.0]" in text
    assert "\nAdvBench replies truncated: pretrained 2 of 520, " in text
    assert text.endswith("Written:\n  summary  runs/demo/summary.md\n  adapter  runs/demo/adapter")
    assert max(len(line) for line in text.splitlines()) <= 110
    alone = terminal_table([], dataclasses.replace(facts, num_rounds=1, num_ranks=1))
    assert " · 1 round · seed 3 · 1 process · " in alone


def test_the_summary_names_places_pictures_and_notes(make_run: MakeRun, facts: RunFacts) -> None:
    text = summary_markdown(make_run(), facts)
    assert "![loss by round](loss.png)" in text
    assert "- adapter: `runs/demo/adapter`" in text and "- 12 red rows were left over" in text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"embedded_model": True, "real_files": (), "method": "FL", "guard": "none", "num_ranks": 2}),
        ({"data.square": "x.json", "eval.hhh": ""}, {"real_files": ("data.square",), "mt_bench": "embedded"}),
        ({"eval.mt_bench": "q.jsonl", "model.path": "m"}, {"real_files": ("eval.mt_bench",), "embedded_model": False}),
        ({}, {"judge": ""}),
        ({"judge.kind": "openai", "judge.model": "kite-judge"}, {"judge": "kite-judge"}),
        ({"judge.kind": "local", "judge.path": "models/kite"}, {"judge": "models/kite"}),
        ({"cai.iterations": 50, "guard.kind": "llama_guard"}, {"arm": "FedAvg, FL + filter + CAI"}),
        ({"cai.iterations": 50, "guard.kind": "oracle"}, {"arm": "FedAvg, FL + oracle filter + CAI"}),
    ],
)
def test_facts_come_from_the_configuration(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    found = facts_from(to_flat(Config()) | changes, num_ranks=2, total_s=1.0, places={}, benchmarks=DESCRIBED)
    assert {name: getattr(found, name) for name in expected} == expected
