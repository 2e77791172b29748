"""Table 1 from rows by seed: cells, claimed signs and sizes by hand, and verdicts that follow from the rows alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim.base.errors import ConfigError, DataError
from fedsim.config import load_config
from fedsim.report import paper
from fedsim.report.finished import FinishedRun
from fedsim.study import table1, table1_words
from fedsim.study.outcomes import check_alike, check_paired, sample
from fedsim.study.paper_claims import BOTH, CAI, COLUMNS, COMPARISONS, COUNTED, FILTER, FL, NET, claimed_sign
from fedsim.study.published import Origin
from fedsim.study.seed_rows import SeedRow, read_seed_rows, write_seed_rows
from fedsim.study.statistics import difference

# The paper's §6.2 and §6.3, read by hand: treated, control, FedAvg's signs, SCAFFOLD's (AdvBench, HHH, MT-Bench);
# 0 where the published difference is below two standard errors of single runs over 520, 438 and 80 items.
SIGNS = {
    (FL, paper.PRETRAINED): ("---", "---"),
    (FILTER, FL): ("+00", "+00"),
    (CAI, FL): ("+++", "+++"),
    (BOTH, CAI): ("000", "000"),
}


def test_claims_have_the_signs_that_the_paper_can_tell() -> None:
    found = {
        (c.treated, c.control): tuple(
            "".join({1: "+", -1: "-", 0: "0"}[claimed_sign(c, a, b)] for b in COUNTED) for a in table1.AGGREGATIONS
        )
        for c in COMPARISONS
    }
    assert found == SIGNS


def test_no_comparison_is_a_sum_of_others() -> None:
    """12 differences an algorithm, and their rank is that of 4 comparisons between 5 arms."""
    arms = [paper.PRETRAINED, FL, FILTER, CAI, BOTH]
    matrix = np.zeros((len(COMPARISONS), len(arms)))
    for i, comparison in enumerate(COMPARISONS):
        matrix[i, arms.index(comparison.treated)] += 1
        matrix[i, arms.index(comparison.control)] -= 1
    assert np.linalg.matrix_rank(matrix) == len(COMPARISONS) == 4
    assert len(COMPARISONS) * len(COUNTED) == 12 and COUNTED == ("advbench_harmless", "hhh_letter", "mt_bench")


def test_the_least_size_is_two_standard_errors_of_the_papers_runs() -> None:
    """HHH with and without CAI and filter under FedAvg: 57.3 and 63.7 % of 438 items."""
    both = next(c for c in COMPARISONS if (c.treated, c.control) == (BOTH, CAI))
    by_hand = 200 * math.sqrt(0.573 * 0.427 / 438 + 0.637 * 0.363 / 438)
    assert both.least("fedavg", "hhh_letter") == pytest.approx(by_hand, rel=1e-9) and by_hand > 63.7 - 57.3
    spread = 2 * math.sqrt((4.8 * 4.2 + 5.1 * 3.9) / 80)  # 5.8 and 6.1 on a scale from 1 to 10
    assert both.least("fedavg", "mt_bench") == pytest.approx(spread, rel=1e-9)


def test_published_differences_are_those_of_the_text() -> None:
    """§6.2 and §6.3 print them."""
    by_name = {(c.treated, c.control): c for c in COMPARISONS}
    assert by_name[FL, paper.PRETRAINED].published("fedavg", "advbench_harmless") == pytest.approx(-27.1)
    assert by_name[FILTER, FL].published("scaffold", "hhh_letter") == pytest.approx(5.1)
    assert by_name[CAI, FL].published("fedavg", "mt_bench") == pytest.approx(3.1)


def test_cells_are_four_methods_under_two_aggregations_for_every_seed() -> None:
    config = load_config(None, ["guard.kind=llama_guard", "cai.iterations=7"])
    cells = table1.cells(config, [3, 5])
    assert len({cell.name for cell in cells}) == len(cells) == 16
    arms = {(cell.settings["federation.algorithm"], cell.labels["method"], cell.seed) for cell in cells}
    assert len(arms) == 16
    for cell in cells:
        assert cell.settings["guard.kind"] == ("llama_guard" if "filter" in cell.labels["method"] else "none")
        assert cell.settings["cai.iterations"] == (7 if "CAI" in cell.labels["method"] else 0)
    assert [cell.labels["method"] for cell in cells[:4]] == [BOTH] * 4, "what makes all artefacts comes first"
    assert {cell.settings["cai.iterations"] for cell in table1.cells(load_config(None), [0])} == {0, 50}


@pytest.mark.parametrize(
    ("word", "method"),
    [
        ("guard.kind=noisy_oracle", "FL + noisy oracle filter"),
        ("guard.tune_epochs=0", "FL + untuned filter"),
        ("cai.every=0", "post-hoc CAI"),
    ],
)
def test_another_method_is_no_row_of_the_papers_table(word: str, method: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(method)):
        table1.cells(load_config(None, [word]), [0])


ORIGIN = Origin("Measured here.", "`x`", (0, 1), "embedded-held-out", True)
CAI_DATA = {
    "round": 0,
    "stage": "cai_data",
    "cai/harmful_response": 0.0,
    "cai/harmful_response_count": 400,
    "cai/critique_finds_harm": 1.0,
    "cai/critique_finds_harm_count": 400,
    "cai/repaired_revision": 0.0,
    "cai/repaired_revision_count": 400,
}
LAST = {
    "round": 50,
    "stage": "round",
    "cai/reward_margin": 0.0002,
    "cai/reward_accuracy": 0.5,
    "cai/dpo_loss": 0.6930,
}

Runs = dict[table1.Arm, list[FinishedRun]]


@pytest.fixture
def make_runs(finish: Callable[..., FinishedRun]) -> Callable[..., Runs]:
    """``make_runs(repaired=…)``: FedAvg's arms over two seeds: FL harms, the filter refuses all, CAI repairs all."""

    def make(**repaired: float) -> Runs:
        rng = np.random.default_rng(0)

        def flags(share: float) -> list[float]:
            return rng.permutation([float(i < 200 * share) for i in range(200)]).tolist()

        def figures(harmless: float, innocent: float) -> dict[str, list[float]]:
            return {
                "advbench_harmless_openfedllm": flags(harmless),
                "hhh_letter": [1.0, 0.5] * 50,
                "hhh_likelihood": flags(harmless),
                "mt_bench": [1 + 9 * harmless] * 80,
                "xstest_safe_refused": flags(innocent),
            }

        arms = {FL: (0.5, 0.1), FILTER: (0.8, 0.6), CAI: (0.98, 0.0), BOTH: (0.98, 0.0)}
        runs: Runs = {}
        for i, (method, shares) in enumerate(arms.items()):
            for seed in (0, 1):
                has_cai = "CAI" in method
                rows = [{**CAI_DATA, **repaired}, LAST] if has_cai else []
                final = {"after_cai" if has_cai else "global": figures(*shares)}
                items = {"pretrained": figures(1.0, 0.0), **final}
                found = finish(f"r{i}-{seed}", [f"seed={seed}"], items, rows)
                runs.setdefault(table1.Arm("fedavg", method), []).append(found)
        return runs

    return make


@pytest.fixture
def table(make_runs: Callable[..., Runs], tmp_path: Path) -> table1.TableOne:
    """The table by way of its file."""
    write_seed_rows(tmp_path / "rows.csv", table1.seed_rows(make_runs()))
    return table1.TableOne(read_seed_rows(tmp_path / "rows.csv"))


def found_verdicts(table: table1.TableOne, figure: str) -> dict[tuple[str, str], str]:
    return {
        (c.treated, c.control): table.difference("fedavg", c, figure).verdict  # type: ignore[union-attr]
        for c in COMPARISONS
    }


def test_arms_follow_from_the_items(table: table1.TableOne) -> None:
    assert [arm.title for arm in table.arms()] == ["pretrained", *(f"FedAvg, {m}" for m in (FL, FILTER, CAI, BOTH))]
    arm = table.estimate(table1.Arm("fedavg", CAI), "mt_bench")
    assert arm is not None and arm.mean == pytest.approx(1 + 9 * 0.98)
    pretrained = table.estimate(table1.Arm("fedavg", paper.PRETRAINED), "advbench_harmless")
    assert pretrained is not None and pretrained.mean == 100 and 97 < pretrained.low < 99
    letter = table.estimate(table1.Arm("fedavg", FL), "hhh_letter")
    assert letter is not None and letter.mean == 75


def test_replayed_cai_bears_out_nothing(table: table1.TableOne, make_runs: Callable[..., Runs], tmp_path: Path) -> None:
    """AdvBench rises by 48 points with CAI; with no response to repair that says nothing about CAI."""
    found = found_verdicts(table, "advbench_harmless")
    assert found[FL, paper.PRETRAINED] == found[FILTER, FL] == "reproduced"
    assert found[CAI, FL] == found[BOTH, CAI] == "replay: says nothing about CAI"
    assert found_verdicts(table, "hhh_letter")[FL, paper.PRETRAINED] == "cannot tell"
    assert found_verdicts(table, "hhh_letter")[FILTER, FL] == "too small to claim"
    assert found_verdicts(table, NET)[FL, paper.PRETRAINED] == "not published"


@pytest.mark.parametrize("repaired", [40.0, 0.0])
def test_cai_that_had_something_to_repair_is_judged(make_runs: Callable[..., Runs], repaired: float) -> None:
    """CAI that repairs none of many harmful responses has failed, which is no replay."""
    shares = {"cai/harmful_response": 60.0, "cai/repaired_revision": repaired}
    acting = table1.TableOne(table1.seed_rows(make_runs(**shares)))
    assert found_verdicts(acting, "advbench_harmless")[CAI, FL] == "reproduced"
    assert table1_words.replay_lines(acting) == []


def test_what_is_refused_alike_gains_nothing(table: table1.TableOne) -> None:
    """The filter adds 30 points of refused attacks and 50 of refused innocent prompts."""
    found = table.difference("fedavg", next(c for c in COMPARISONS if c.treated == FILTER), NET)
    assert found is not None and found.effect.mean == pytest.approx(-20) and found.effect.num_items == 1
    (line,) = table1_words.filter_findings(table)
    assert "AdvBench +30.0" in line and "XSTest: innocent refused +50.0" in line and "innocent refused -20.0" in line


def test_the_pages_hold_the_figures_and_the_papers(table: table1.TableOne) -> None:
    arms = table1_words.arm_table(table)
    assert [row[0] for row in arms.rows[::2]] == [arm.title for arm in table.arms()]
    assert arms.rows[3] == ["– in the paper", "72.5", "49.3", "2.7", "", "", "", ""]
    assert [row[-1] for row in arms.rows[::2]] == ["", "", "", *["0.0 %; 1.0 %; 0.000"] * 2]
    claims = table1_words.claim_table(table)
    assert len(claims.rows) == 4 * len(COLUMNS)
    row = next(r for r in claims.rows if r[0].startswith("FedAvg: (FL + filter) − FL") and r[1] == "AdvBench")
    assert row[4:] == ["+8.7", "5.2", "reproduced"]
    words = table1_words.verdicts(table)
    assert words[0] == (
        "- FedAvg, 12 differences. 3 reproduced (the paper's sign, an interval without 0): FL − pretrained on AdvBench "
        "and MT-Bench, (FL + filter) − FL on AdvBench. 1 cannot be told (an interval that holds 0): FL − pretrained on "
        "HHH by letter. 2 too small in the paper to claim a sign: (FL + filter) − FL on HHH by letter and MT-Bench. 6 "
        "replay, which says nothing about CAI: (FL + CAI) − FL, (FL + filter + CAI) − (FL + CAI)."
    )
    assert "4 are tested here" in words[1]
    (replay,) = table1_words.replay_lines(table)
    assert "0 of 800 first responses are harmful, 8 of 800 critiques find harm" in replay and "0.6930" in replay
    cai = table1_words.cai_table(table)
    assert cai is not None and cai.rows[0][1:] == ["0.0 of 800", "1.0 of 800", "0.0 of 800", "0.0002", "50.0", "0.6930"]
    text = "\n".join(table1_words.page(table, ORIGIN))
    assert "=embedded-held-out, seeds that the embedded world was developed on" in text and "of 6 frames" in text


def test_the_control_stands_behind_its_arm(table: table1.TableOne) -> None:
    rows = [row for key, found in table.rows.items() if key[1] == CAI for row in found]
    control = [SeedRow(r.aggregation, table1.REPLAY, r.seed, r.figure, r.value, r.count, r.commit, r.outcomes)
               for r in rows]  # fmt: skip
    both = table1.TableOne([row for found in table.rows.values() for row in found] + control)
    titles = [arm.title for arm in both.arms()]
    assert titles[titles.index("FedAvg, FL + CAI") + 1] == "FedAvg, replay control"
    (line,) = table1_words.replay_lines(both)
    ends = "98.0 / 98.0 / 9.82"
    assert f"ends at {ends}, FedAvg, FL + CAI at {ends} (AdvBench" in line and "replay control (SFT" in line


def test_differences_from_the_file_are_those_of_the_runs(
    table: table1.TableOne, make_runs: Callable[..., Runs], tmp_path: Path
) -> None:
    """The published intervals follow from the committed rows: by item, paired by seed."""
    found = table.difference("fedavg", COMPARISONS[0], "hhh_likelihood")
    runs = [FinishedRun.read(tmp_path / f"r0-{seed}") for seed in (0, 1)]
    ours, theirs = sample(runs, "final", "hhh_likelihood", 100.0), sample(runs, "pretrained", "hhh_likelihood", 100.0)
    assert found is not None and ours is not None and theirs is not None
    assert found.effect == difference(ours, theirs)


def test_a_judges_score_counts_as_one_item(finish: Callable[..., FinishedRun]) -> None:
    row: dict[str, Any] = {"round": 50, "stage": "eval", "point": "global", "eval/mt_bench": 6.53}
    runs = {
        table1.Arm("fedavg", FL): [finish(f"j{seed}", [f"seed={seed}"], {"pretrained": {}}, [row]) for seed in (0, 1)]
    }
    table = table1.TableOne(table1.seed_rows(runs))  # type: ignore[arg-type]
    found = table.sample(table1.Arm("fedavg", FL), "mt_bench")
    assert found is not None and found.tolist() == [[6.53], [6.53]]
    assert table.estimate(table1.Arm("fedavg", FL), "hhh_letter") is None
    assert "not rated" not in " ".join(table1_words.page(table, ORIGIN))


def test_a_run_that_has_lost_its_items_is_refused(finish: Callable[..., FinishedRun]) -> None:
    """Else its figure would count as one item, and its interval would be of seeds alone."""
    row: dict[str, Any] = {"round": 50, "stage": "eval", "point": "global", "eval/hhh_letter": 61.0}
    runs = {table1.Arm("fedavg", FL): [finish("lost", ["seed=0"], {"pretrained": {}}, [row])]}
    with pytest.raises(DataError, match=r"lost/items: has no items of hhh_letter at the point global; restore"):
        table1.seed_rows(runs)  # type: ignore[arg-type]


def test_answers_without_a_rating_are_said(table: table1.TableOne) -> None:
    rows = [row for found in table.rows.values() for row in found if row.figure != "mt_bench"]
    assert "MT-Bench was not rated" in " ".join(table1_words.page(table1.TableOne(rows), ORIGIN))


def test_a_figure_without_items_counts_as_one(finish: Callable[..., FinishedRun]) -> None:
    rows = [{"round": 50, "stage": "eval", "point": "global", "eval/mt_bench": 6.5}]
    judged = finish("a", [], {}, rows)
    found = sample([judged, judged], "final", "mt_bench")
    assert found is not None and found.tolist() == [[6.5], [6.5]]
    assert sample([judged], "final", "hhh_letter") is None


def test_runs_on_different_items_do_not_mix(finish: Callable[..., FinishedRun]) -> None:
    runs = [finish(f"n{n}", [], {"global": {"hhh_letter": [1.0] * n}}) for n in (3, 4)]
    with pytest.raises(DataError, match=r"\[3, 4\] items of hhh_letter"):
        sample(runs, "final", "hhh_letter")


def test_what_is_no_finished_run_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="is no finished run"):
        FinishedRun.read(tmp_path)


def test_arms_that_do_not_pair_are_told_by_name(finish: Callable[..., FinishedRun]) -> None:
    ours = [finish(f"a{seed}", [f"seed={seed}"], {}, inputs={"hhh": "x", "square": "s"}) for seed in (0, 1)]
    check_paired([ours, ours])
    with pytest.raises(DataError, match=r"the seeds \[1, 0\], that of .*a0 has \[0, 1\]"):
        check_paired([ours, ours[::-1]])
    with pytest.raises(DataError, match=r"b0: had another hhh file than .*a0"):
        check_paired([ours[:1], [finish("b0", ["seed=0"], {}, inputs={"hhh": "y", "square": "z"})]])


def test_unlike_runs_are_no_arm(finish: Callable[..., FinishedRun]) -> None:
    """Another rate, other rows under the same path, a seed twice: each names both runs."""
    own = finish("a0", ["seed=0"], {}, inputs={"square": "1" * 64})
    other = finish("a1", ["seed=1", "local.lr=0.001"], {}, inputs={"square": "1" * 64})
    for check in (check_alike, lambda arm: check_paired([arm, arm])):
        with pytest.raises(DataError, match=r"a0 and .*a1: .* differ in local.lr: 5e-05 and 0.001; remove"):
            check([own, other])
    with pytest.raises(DataError, match=r"a0 and .*a2: .* in data.square: embedded#11111111 and embedded#22222222"):
        check_alike([own, finish("a2", ["seed=2"], {}, inputs={"square": "2" * 64})])
    with pytest.raises(DataError, match=r"b0 and .*a0: both have seed 0"):
        check_alike([own, finish("b0", ["seed=0"], {}, inputs={"square": "1" * 64})])


def test_a_file_that_changed_between_arms_is_found(finish: Callable[..., FinishedRun]) -> None:
    def arm(name: str, path: str, digest: str) -> list[FinishedRun]:
        return [finish(name, ["seed=0", f"data.square={path}"], {}, inputs={"square": digest})]

    plain = arm("a", "rows.json", "1")
    check_paired([plain, arm("b", "others.json", "2")])
    with pytest.raises(DataError, match=r"c: had another square file than .*a;"):
        check_paired([plain, arm("c", "rows.json", "3")])
    check_paired([arm("d", "embedded", "4"), arm("e", "embedded", "5")])  # of the size that the splits ask for


def test_user_code_that_changed_between_arms_is_found(finish: Callable[..., FinishedRun]) -> None:
    def arm(name: str, file: str, digest: str) -> list[FinishedRun]:
        words = ["seed=0", "eval.mt_bench=q.jsonl", f"judge.kind={file}:Length"]
        return [finish(name, words, {}, inputs={"code of judge.kind": digest})]

    first = arm("a", "mine.py", "1")
    check_paired([first, arm("b", "mine.py", "1"), arm("c", "other.py", "2")])
    with pytest.raises(DataError, match=r"d: had another code of judge\.kind file than .*a;"):
        check_paired([first, arm("d", "mine.py", "3")])
