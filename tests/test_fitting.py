"""Values that fit: every stage does with them, they are not lowered without need, and the 8B table is computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.attention.choice import Choice
from fedsim.config import Config, from_flat, load_config, to_flat
from fedsim.fitting import GPUS, LEVERS, USABLE, Fit, fits_by_gpu, fitting
from fedsim.needs import memory_needs
from tests.model.test_memory import BIG

GIB = 2**30
PAPER = Path(__file__).parents[1] / "configs" / "paper" / "fedavg-filter-cai.yaml"
SHAPES = {"model": BIG, "guard": BIG}


def paper(*words: str) -> Config:
    return load_config(PAPER, words)


def changed(config: Config, fit: Fit) -> Config:
    return from_flat(to_flat(config) | fit.changes)


def largest(config: Config) -> int:
    return max(need.num_bytes for need in memory_needs(config, SHAPES, 4))


@settings(max_examples=25, deadline=None)
@given(st.integers(18, 100), st.booleans(), st.sampled_from(["none", "untuned", "tuned"]))
def test_with_the_values_every_stage_fits(size: int, exact: bool, judge: str) -> None:
    config = paper(f"parallel.exact={str(exact).lower()}", f"eval.guard_judge={judge}")
    fit = fitting(config, SHAPES, 4, size * GIB)
    new = changed(config, fit)
    if fit.unfit is None:
        assert largest(new) <= size * GIB
    else:
        assert fit.unfit.num_bytes > size * GIB and fit.unfit in memory_needs(new, SHAPES, 4)
        assert "does not fit" in fit.words()
    assert (fit == Fit()) == (largest(config) <= size * GIB), "nothing is lowered without need"
    old = to_flat(config)
    assert all(0 < value < old[key] for key, value in fit.changes.items())


def test_more_memory_never_asks_for_lower_values() -> None:
    config, before = paper(), None
    for size in range(90, 16, -2):
        fit = fitting(config, SHAPES, 4, size * GIB)
        values = to_flat(changed(config, fit))
        if before is not None:
            assert all(values[key] <= before[key] for levers in LEVERS.values() for key, _ in levers)
        before = values


def test_every_stage_has_levers() -> None:
    judge = paper("judge.kind=local", "judge.path=embedded", "eval.guard_judge=tuned")
    stages = {need.stage for need in memory_needs(judge, {**SHAPES, "judge": BIG}, 4)}
    assert stages == LEVERS.keys()


@pytest.mark.parametrize("attention", ["varlen", "sdpa"])
def test_the_8b_model_on_80_40_and_24_gb(attention: str) -> None:
    """The paper's run fits 80 GB as it is; 40 GB want smaller passes, 24 GB shorter rows of CAI too."""
    shape = replace(BIG, attention=Choice(attention, "asked for"))
    found = fits_by_gpu(paper(), {"model": shape, "guard": shape}, 4)
    assert list(found) == [f"{size} GB" for size in GPUS]
    assert found["80 GB"].words() == "fits as it is"
    assert found["40 GB"].changes.keys() == {"local.micro_batch_size", "eval.batch_size"}
    assert {"local.micro_batch_size", "cai.max_length", "eval.batch_size"} <= found["24 GB"].changes.keys()
    for size, fit in found.items():
        new = from_flat(to_flat(paper()) | fit.changes)
        needs = memory_needs(new, {"model": shape, "guard": shape}, 4)
        assert max(need.num_bytes for need in needs) <= USABLE * int(size.split()[0]) * GIB
        words = fit.words().split() if fit.changes else []
        assert to_flat(paper(*words)) == to_flat(new), "the words are those of a command line"
