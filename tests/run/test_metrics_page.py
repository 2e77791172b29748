"""docs/metrics.md is current, and a function that writes an undeclared metric is found out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedsim.base.metric import Metric, declared, writes
from fedsim.evaluate.own import DESCRIBED
from fedsim.run.metrics_page import STAGES, documented, page

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "metrics.md"


def test_the_committed_page_is_that_of_the_declarations() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tools/metrics_page.py"


def test_every_metric_has_one_row_a_stage() -> None:
    sections = re.split(r"^##+ ", page(), flags=re.MULTILINE)[1:]
    for text in sections:
        names = re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE)
        assert names and len(names) == len(set(names))
    by_name = {text.partition("\n")[0]: text for text in sections}
    for name, stage in STAGES.items():
        assert all(f"| `{metric.name}` | {metric.meaning} |" in by_name[name] for metric in stage.metrics)
    for figure in DESCRIBED.figures:
        assert f"| `{figure.metric}` | {figure.title}" in page()


@writes(Metric("a/b", "b"), Metric("a/{c}_s", "c", "s"), Metric("a/d", "d", interval=True, count=True))
def written(*names: str) -> dict[str, int]:
    """Any names."""
    return dict.fromkeys(names, 0)


def test_a_function_writes_what_it_declares() -> None:
    assert written("a/b", "a/x/y_s", "a/d", "a/d_low", "a/d_high", "a/d_count").keys() >= {"a/b"}
    for name in ("a/e", "a/b_low", "a/_s", "b", "a/b2"):
        with pytest.raises(AssertionError, match=f"written writes '{name}'; declare it"):
            written("a/b", name)
    assert [metric.name for metric in declared(written)] == ["a/b", "a/{c}_s", "a/d"]


def test_names_of_rows() -> None:
    evaluated = ("eval/hhh_accuracy_low", "eval/mt_bench_category_stem_count", "point", "artefact")
    there = [("round", "client/loss_003"), ("resume", "time/data_s"), ("round", "round"), ("filter", "point")]
    for stage, name in [*there, *(("eval", name) for name in evaluated)]:
        assert documented(stage, name)
    for stage, name in (("round", "client/lose"), ("eval", "eval/kites"), ("prepare", "point"), ("round", "eval/hhh")):
        assert not documented(stage, name)
