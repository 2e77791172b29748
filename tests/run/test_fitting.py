"""Values that fit: every stage does with them, they are not lowered without need, and the 8B table is computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.attention.choice import Choice
from fedsim.config import Config, from_flat, load_config, to_flat
from fedsim.model.shape import ModelShape
from fedsim.run.fitting import GPUS, LEVERS, USABLE, Fit, fits_by_gpu, fitting, with_effective_keys
from fedsim.run.needs import memory_needs
from tests.run.test_memory import BIG

GIB = 2**30
PAPER = Path(__file__).parents[2] / "configs" / "paper" / "fedavg-filter-cai.yaml"
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


@pytest.mark.deep
def test_more_memory_never_asks_for_lower_values() -> None:
    config, before = paper(), None
    for size in range(90, 16, -2):
        fit = fitting(config, SHAPES, 4, size * GIB)
        values = to_flat(changed(config, fit))
        if before is not None:
            assert all(values[key] <= before[key] for levers in LEVERS.values() for key, _ in levers)
        before = values


LARGE = replace(BIG, adapter_size=2**29)  # 2 GiB a vector, and exact mode keeps one of each micro-batch


def test_micro_batches_are_halved_only_while_that_lowers_the_need() -> None:
    """DPO's 16 pairs in exact mode: from 2 pairs to 1 saves 12 GB of activations and adds 8 gradients of 2 GiB."""
    config, shapes = paper("parallel.exact=true", "guard.kind=none"), {"model": LARGE}
    needs = {}
    for rows in (4, 2, 1):
        changed_config = from_flat(to_flat(config) | {"local.micro_batch_size": rows})
        needs[rows] = {need.stage: need.num_bytes for need in memory_needs(changed_config, shapes, 4)}
    assert needs[4]["CAI (DPO)"] > needs[2]["CAI (DPO)"] < needs[1]["CAI (DPO)"]
    fit = fitting(config, shapes, 4, needs[2]["CAI (DPO)"] - 1)
    assert fit.unfit is None and fit.changes["local.micro_batch_size"] == 2 and "cai.max_length" in fit.changes
    fast = fitting(from_flat(to_flat(config) | {"parallel.exact": False}), shapes, 4, 40 * GIB)
    assert fast.changes["local.micro_batch_size"] == 1


@settings(max_examples=8, deadline=None)
@given(st.integers(18, 28).map(lambda i: 2**i), st.booleans(), st.sampled_from([1, 2, 4, 16]), st.integers(20, 60))
def test_no_key_is_advised_that_lowers_nothing(size: int, exact: bool, rows: int, gib: int) -> None:
    """Taken back, any of the changes makes the stages for which it may be lowered need more."""
    shape = replace(BIG, adapter_size=size)
    shapes = {"model": shape, "guard": shape}
    config = paper(f"parallel.exact={str(exact).lower()}", f"local.micro_batch_size={rows}")
    for need in with_effective_keys(config, shapes, 4, memory_needs(config, shapes, 4)):
        if need.key:
            old = to_flat(config)
            new = from_flat(old | {need.key: old[need.key] // 2})
            assert stage_need(new, shapes, need.stage) < need.num_bytes
        else:
            assert need.stage in ("CAI (DPO)", "guard fine-tuning", "local training", "guard scoring")
    old = to_flat(config)
    for key, value in fitting(config, shapes, 4, gib * GIB).changes.items():
        stages = [stage for stage, levers in LEVERS.items() if key in dict(levers)]
        twice = from_flat(old | {key: min(2 * value, old[key])})
        once = from_flat(old | {key: value})
        assert any(stage_need(once, shapes, stage) < stage_need(twice, shapes, stage) for stage in stages)


def stage_need(config: Config, shapes: dict[str, ModelShape], stage: str) -> int:
    return next(need.num_bytes for need in memory_needs(config, shapes, 4) if need.stage == stage)


def test_by_gpu_counts_in_the_type_that_a_gpu_would_take() -> None:
    """A check on the CPU, where dtype=auto is float32, names the same values as one on a GPU, where it is bfloat16."""
    on_cpu = {role: replace(shape, dtype=torch.float32) for role, shape in SHAPES.items()}
    assert fits_by_gpu(paper("model.dtype=auto"), on_cpu, 4) == fits_by_gpu(paper(), SHAPES, 4)
    full = fits_by_gpu(paper("model.dtype=float32"), on_cpu, 4)
    assert full["24 GB"].unfit is not None, "8 G weights of 4 bytes"
    assert fits_by_gpu(paper("model.dtype=float32"), SHAPES, 4) == full


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
