"""Sections, arms over seeds, and what a published page must not hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedsim.config import load_config
from fedsim.evaluate.own import DESCRIBED
from fedsim.report.arms import arm_figure, differences, grouped, headlines, pretrained_figure, table_1, warnings
from fedsim.report.build import PATH, report
from fedsim.report.runs import Run, Sample

HARMLESS = DESCRIBED.headlines[0]


def made(seed: int = 0, harmless: float = 80.0, *words: str, title: str = "", manifest: Any = None, **rows: Any) -> Run:
    config = load_config(None, [f"seed={seed}", *words])
    manifest = {"seed": seed, "started": {"num_ranks": 1}, "inputs": {}, "models": {}, **(manifest or {})}
    found = [
        {"round": 0, "stage": "eval", "point": "pretrained", "eval/advbench_harmless": 90.0 + seed},
        {"round": 50, "stage": "eval", "point": "global", "eval/advbench_harmless": harmless, **rows},
    ]
    title = title or f"run-{seed}"
    return Run(Path(title), config, found, manifest, DESCRIBED, title=title)


def test_several_seeds_of_an_arm_are_one_line_with_their_number() -> None:
    runs = [made(seed, value) for seed, value in ((0, 70.0), (1, 80.0), (2, 75.0))]
    figure = arm_figure(runs, HARMLESS)
    assert figure is not None and (figure.value, figure.num_seeds) == (75.0, 3)
    assert figure.high == pytest.approx(75 + 4.302653 * 5 / 3**0.5, rel=1e-4)
    table = table_1(runs)
    assert table is not None and len(table.rows) == 2
    assert (
        table.rows[1][:2] == ["FedAvg, FL", "0, 1, 2"]
        and table.rows[1][2].startswith("75.0 [")
        and "n = 3" in table.rows[1][2]
    )


def test_runs_of_one_seed_are_no_sample() -> None:
    """A run and its repetition: no interval of width zero over "two"."""
    own = {"eval/advbench_harmless_low": 65.0, "eval/advbench_harmless_high": 74.0}
    twice = arm_figure([made(0, 70.0, **own), made(0, 70.0, **own)], HARMLESS)
    assert twice == arm_figure([made(0, 70.0, **own)], HARMLESS)
    assert twice is not None and (twice.low, twice.high, twice.num_seeds) == (65.0, 74.0, 1)
    apart = arm_figure([made(0, 70.0, **own), made(0, 80.0, **own)], HARMLESS)
    assert apart is not None and (apart.value, apart.low, apart.num_seeds) == (75.0, None, 1)
    mixed = arm_figure([made(0, 60.0), made(0, 80.0), made(1, 90.0)], HARMLESS)
    assert mixed is not None and (mixed.value, mixed.num_seeds) == (80.0, 2)


def test_the_pretrained_model_counts_once_a_seed() -> None:
    runs = [made(0), made(0, 85.0, "cai.iterations=2"), made(1)]
    figure = pretrained_figure(runs, HARMLESS)
    assert figure is not None and (figure.value, figure.num_seeds) == (90.5, 2)


def test_runs_of_other_settings_are_lines_of_their_own() -> None:
    """Seed 0 three times with other learning rates and partitions is no sample of three."""
    runs = [
        made(0, 70.0),
        made(0, 80.0, "local.lr=0.001"),
        made(0, 75.0, "federation.partition=iid", "local.lr=0.001"),
        made(1, 72.0, "name=elsewhere", "record.dir=x", "wandb.tags=[a]", "parallel.exact=false"),
    ]
    table = table_1(runs)
    assert table is not None
    assert [row[:2] for row in table.rows[1:]] == [
        ["FedAvg, FL (local.lr=5e-05, federation.partition=fixed_red_share)", "0, 1"],
        ["FedAvg, FL (local.lr=0.001, federation.partition=fixed_red_share)", "0"],
        ["FedAvg, FL (local.lr=0.001, federation.partition=iid)", "0"],
    ]
    assert "n = 2" in table.rows[1][2] and "n =" not in table.rows[2][2] + table.rows[3][2]
    assert grouped(runs[::-1])[0].runs == [runs[0], runs[3]], "whatever order they are named in"
    unlike = differences(grouped(runs))
    assert unlike is not None and [row[0] for row in unlike.rows] == ["local.lr", "federation.partition"]
    page, _ = report(runs)
    assert "FedAvg, FL (local.lr=0.001, federation.partition=iid)" in page and "differ in these keys" in page


def test_files_count_by_their_content() -> None:
    def read(digest: str) -> dict[str, Any]:
        return {"inputs": {"square": {"sha256": digest}}, "models": {"model": "m"}}

    one = made(0, 70.0, "data.square=a/rows.json", manifest=read("1" * 64))
    moved = made(1, 80.0, "data.square=b/rows.json", manifest=read("1" * 64))
    other = made(1, 90.0, "data.square=a/rows.json", manifest=read("2" * 64))
    assert [group.runs for group in grouped([one, moved, other])] == [[one, moved], [other]]
    assert [group.name for group in grouped([one, other])] == [
        "FedAvg, FL (data.square=rows.json#11111111)",
        "FedAvg, FL (data.square=rows.json#22222222)",
    ]
    unread = [made(seed, 70.0, f"guard.path=models/{seed}", manifest=read("1" * 64)) for seed in (0, 1)]
    assert len(grouped(unread)) == 1, "a guard that no run has read"


def test_one_seed_twice_is_said_with_both_names() -> None:
    runs = [made(0, 70.0, title="a/run"), made(0, 70.0, title="b/run"), made(1, 80.0, title="c/run")]
    (line,) = warnings(grouped(runs))
    assert line == "a/run and b/run are FedAvg, FL with seed 0 and have the same results: they count as one run."
    (line,) = warnings(grouped([*runs[:1], made(0, 71.0, title="b/run")]))
    assert line.startswith("a/run and b/run are FedAvg, FL with seed 0, but their results differ")
    assert line in report([*runs[:1], made(0, 71.0, title="b/run")])[0]
    assert warnings(grouped(runs[1:])) == []


def test_commits_that_differ_in_a_group_are_said() -> None:
    commits = [{"git": {"commit": letter * 40, "modified": False}} for letter in "ab"]
    runs = [made(seed, 70.0, manifest=commit) for seed, commit in enumerate(commits)]
    (line,) = warnings(grouped(runs))
    assert "different commits of fedsim (aaaaaaaaaa: run-0; bbbbbbbbbb: run-1)" in line
    assert len(grouped(runs)) == 1


@pytest.mark.parametrize(
    ("words", "name", "published"),
    [
        (("guard.kind=llama_guard",), "FL + filter", "81.2"),
        (("guard.kind=oracle",), "FL + oracle filter", "–"),
        (("guard.kind=noisy_oracle", "cai.iterations=2"), "FL + noisy oracle filter + CAI", "–"),
        (("guard.kind=llama_guard", "guard.tune_epochs=0"), "FL + untuned filter", "–"),
        (("guard.kind=llama_guard", "guard.action=refuse"), "FL + filter that refuses", "–"),
        (("cai.iterations=2", "cai.every=0"), "FL + post-hoc CAI", "–"),
        (("cai.iterations=2",), "FL + CAI", "96.2"),
    ],
)
def test_the_papers_row_stands_beside_its_own_method_alone(words: tuple[str, ...], name: str, published: str) -> None:
    table = table_1([made(0, 80.0, *words)])
    assert table is not None and (table.rows[1][0], table.rows[1][3]) == (f"FedAvg, {name}", published)


def test_pretrained_models_that_differ_are_not_pooled() -> None:
    manifests = [{"models": {"model": digest}} for digest in "12"]
    runs = [made(i, 80.0, f"model.path=models/{i}", manifest=m) for i, m in enumerate(manifests)]
    table = table_1(runs)
    assert table is not None
    assert [row[0] for row in table.rows[:2]] == ["pretrained (model.path=0)", "pretrained (model.path=1)"]
    assert [row[2] for row in table.rows[:2]] == ["90.0", "91.0"]
    assert headlines(runs)[1] == "AdvBench: harmless replies, %, FedAvg: FL (model.path=1) 80.0 (pretrained 91.0)."


def test_answers_that_nothing_rates_are_said_so() -> None:
    table = table_1([made(0, 80.0, "eval.mt_bench=question.jsonl")])
    assert table is not None and [row[6] for row in table.rows] == ["not rated"] * 2


def test_headlines_leave_out_what_differs_in_more_than_the_method() -> None:
    runs = [made(0, 70.0), made(0, 95.0, "cai.iterations=2"), made(0, 96.0, "cai.iterations=2", "local.lr=0.001")]
    assert headlines(runs) == [
        "AdvBench: harmless replies, %, FedAvg: FL 70.0 (pretrained 90.0); FL + CAI (local.lr=5e-05) 95.0."
    ]


def test_headlines_set_methods_beside_plain_training() -> None:
    runs = [made(0, 70.0), made(0, 95.0, "cai.iterations=2"), made(0, 60.0, "federation.algorithm=scaffold")]
    assert headlines(runs) == [
        "AdvBench: harmless replies, %, FedAvg: FL 70.0 (pretrained 90.0); FL + CAI 95.0.",
        "AdvBench: harmless replies, %, SCAFFOLD: FL 60.0 (pretrained 90.0).",
    ]
    assert headlines([made(0, 95.0, "cai.iterations=2")]) == []


def test_sections_are_there_with_their_data_alone() -> None:
    bare, _ = report([made()])
    for heading in ("Guard", "Loss by client", "Time by phase", "Idle share", "Sample answers"):
        assert f"<h2>{heading}</h2>" not in bare
    sample = Sample("math", ("one & two?", "and?"), {"pretrained": ("<i>three</i>", "four")})
    full, _ = report([replace(made(), samples=[sample])])
    assert "<h2>Sample answers</h2>" in full and "&lt;i&gt;three&lt;/i&gt;" in full and "one &amp; two?" in full


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("python /home/me/launch/run.py record.dir=/tmp/x a=b", "python run.py record.dir=x a=b"),
        ("tools/gpu/report.py --out a/b/c", "tools/gpu/report.py --out a/b/c"),
        ("https://host/x/y", "https://host/x/y"),
        ("/data/runs/", "runs"),
        ("/tmp", "tmp"),
        ("2 / 3", "2 / 3"),
        ("['/a/b', \"/c/d\"]", "['b', \"d\"]"),
    ],
)
def test_places_of_a_machine_are_cut_to_their_last_part(text: str, shown: str) -> None:
    assert PATH.sub(lambda match: match[1], text) == shown
