"""Sections, arms over seeds, and what a published page must not hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedsim.config import load_config, to_flat
from fedsim.record.summary import facts_from
from fedsim.report.arms import arm_figure, headlines, pretrained_figure, table_1
from fedsim.report.build import PATH, report
from fedsim.report.runs import Run, Sample


def made(seed: int = 0, harmless: float = 80.0, *words: str, **rows: Any) -> Run:
    facts = facts_from(to_flat(load_config(None, [f"seed={seed}", *words])), num_ranks=1, total_s=9.0, places={})
    found = [
        {"round": 0, "stage": "eval", "point": "pretrained", "eval/advbench_harmless": 90.0 + seed},
        {"round": 50, "stage": "eval", "point": "global", "eval/advbench_harmless": harmless, **rows},
    ]
    return Run(facts, found, {"seed": seed})


def test_several_seeds_of_an_arm_are_one_line_with_their_number() -> None:
    runs = [made(seed, value) for seed, value in ((0, 70.0), (1, 80.0), (2, 75.0))]
    figure = arm_figure(runs, "eval/advbench_harmless")
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
    twice = arm_figure([made(0, 70.0, **own), made(0, 70.0, **own)], "eval/advbench_harmless")
    assert twice == arm_figure([made(0, 70.0, **own)], "eval/advbench_harmless")
    assert twice is not None and (twice.low, twice.high, twice.num_seeds) == (65.0, 74.0, 1)
    apart = arm_figure([made(0, 70.0, **own), made(0, 80.0, **own)], "eval/advbench_harmless")
    assert apart is not None and (apart.value, apart.low, apart.num_seeds) == (75.0, None, 1)
    mixed = arm_figure([made(0, 60.0), made(0, 80.0), made(1, 90.0)], "eval/advbench_harmless")
    assert mixed is not None and (mixed.value, mixed.num_seeds) == (80.0, 2)


def test_the_pretrained_model_counts_once_a_seed() -> None:
    runs = [made(0), made(0, 85.0, "cai.iterations=2"), made(1)]
    figure = pretrained_figure(runs, "eval/advbench_harmless")
    assert figure is not None and (figure.value, figure.num_seeds) == (90.5, 2)


def test_headlines_set_methods_beside_plain_training() -> None:
    runs = [made(0, 70.0), made(0, 95.0, "cai.iterations=2"), made(0, 60.0, "federation.algorithm=scaffold")]
    assert headlines(runs) == [
        "AdvBench harmless %, FedAvg: FL 70.0 (pretrained 90.0); FL + CAI 95.0.",
        "AdvBench harmless %, SCAFFOLD: FL 60.0 (pretrained 90.0).",
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
