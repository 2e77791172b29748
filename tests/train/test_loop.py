"""The training loop: AdamW on PEFT's own parameters is the oracle; batches may be cut and shared out in any way."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.attention.forward import IMPLEMENTATIONS
from fedsim.base.errors import RunError
from fedsim.data.chat import ChatFormat, TokenRow
from fedsim.federation.algorithms import Correction
from fedsim.federation.proximal import ProximalTerm
from fedsim.federation.scaffold import GradientCorrection, ValueCorrection
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.model.load import LoadedModel
from fedsim.train.loop import StepSettings, Trainer, TrainingPlan, TrainingStats, deal_rows
from fedsim.train.objectives import DpoObjective, Preference, SftObjective

Make = Callable[..., tuple[LoadedModel, FlatAdapter]]
Rows = Callable[..., list[TokenRow]]
PAD = 260


def batches_of(rows: Sequence[TokenRow], size: int) -> list[list[TokenRow]]:
    return [list(rows[i : i + size]) for i in range(0, len(rows), size)]


def train(
    made: tuple[LoadedModel, FlatAdapter],
    batches: Sequence[Sequence[TokenRow]],
    lane: Any,
    *,
    micro: int = 4,
    lr: float = 1e-3,
    clip: float = 1.0,
    decay: float = 0.0,
    seed: int = 0,
    correction: Correction | None = None,
    longest: int = 0,
) -> TrainingStats:
    loaded, flat = made
    plan = TrainingPlan(
        batches, lambda step: lr * (step + 1), ("local", 0, 1), correction or Correction(), longest=longest
    )
    return Trainer(loaded.base, flat, StepSettings(micro, clip, decay, seed)).run(plan, SftObjective(), lane)


def reference(
    made: tuple[LoadedModel, FlatAdapter],
    batches: Sequence[Sequence[TokenRow]],
    *,
    lr: float,
    clip: float,
    decay: float,
    correction: torch.Tensor | None = None,
    where: str = "",
    mu: float = 0.0,
) -> tuple[FlatAdapter, list[float]]:
    """torch.optim.AdamW on PEFT's parameters, one unpadded row at a time, with torch's own clipping.

    With ``mu`` the loss has FedProx's term, differentiated by autograd; the losses that are returned leave it out.
    """
    loaded, flat = made
    parameters = [p for p in loaded.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=decay, foreach=False)
    starts = [p.detach().clone() for p in parameters]
    losses = []
    for step, batch in enumerate(batches):
        flat.grad.zero_()
        count = sum(int(row.loss_mask[1:].sum()) for row in batch)
        total = 0.0
        for row in batch:
            ids = torch.from_numpy(row.input_ids).long()
            scores = loaded.base(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
            picked = scores.gather(1, ids[1:, None])[torch.from_numpy(row.loss_mask[1:])]
            (-picked.sum() / count).backward()
            total -= float(picked.detach().double().sum()) / count
        losses.append(total)
        if mu > 0:
            (mu / 2 * sum((p - x).square().sum() for p, x in zip(parameters, starts, strict=True))).backward()
        if clip > 0:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        if where == "gradient":
            assert correction is not None
            flat.grad.add_(correction)
        optimizer.param_groups[0]["lr"] = lr * (step + 1)
        optimizer.step()
        if where == "values":
            assert correction is not None
            flat.values.sub_(lr * (step + 1) * correction)
    return flat, losses


def distance(one: torch.Tensor, two: torch.Tensor, start: torch.Tensor) -> float:
    """‖one − two‖ over how far ``two`` moved from ``start``."""
    return float((one - two).norm() / (two - start).norm())


@pytest.mark.parametrize(("clip", "decay"), [(0.05, 0.0), (1e9, 0.0), (0.0, 0.0), (0.5, 0.1)])
def test_three_steps_equal_torchs_adamw(
    make_adapted: Make, make_rows: Rows, one_lane: type, clip: float, decay: float
) -> None:
    made, twin = make_adapted(std=0.1), make_adapted(std=0.1)
    start = made[1].copy()
    batches = batches_of(make_rows(24), 8)
    stats = train(made, batches, one_lane(), clip=clip, decay=decay)
    flat, losses = reference(twin, batches, lr=1e-3, clip=clip, decay=decay)
    assert stats.losses == pytest.approx(losses, rel=1e-5)
    assert distance(made[1].values, flat.values, start) < 1e-4
    assert stats.num_tokens == sum(len(r) for batch in batches for r in batch)
    assert stats.mean_loss == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_clipping_acts_on_the_whole_batchs_gradient(make_adapted: Make, make_rows: Rows, one_lane: type) -> None:
    made = make_adapted(std=0.1)
    train(made, [make_rows(8)], one_lane(), clip=0.01, lr=1e-9)
    assert float(made[1].grad.norm()) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("where", ["gradient", "values"])
def test_scaffold_corrections_in_the_step(make_adapted: Make, make_rows: Rows, one_lane: type, where: str) -> None:
    """openfedllm: y ← y − lr (c − c_i) after the AdamW step; gradient: g + (c − c_i) after clipping, before it."""
    made, twin = make_adapted(std=0.1), make_adapted(std=0.1)
    start = made[1].copy()
    correction = torch.randn(start.numel(), generator=torch.Generator().manual_seed(3))
    batches = batches_of(make_rows(24), 8)
    kind = GradientCorrection if where == "gradient" else ValueCorrection
    train(made, batches, one_lane(), clip=0.05, correction=kind(correction))
    flat, _ = reference(twin, batches, lr=1e-3, clip=0.05, decay=0.0, correction=correction, where=where)
    assert distance(made[1].values, flat.values, start) < 1e-4
    plain = make_adapted(std=0.1)
    train(plain, batches, one_lane(), clip=0.05)
    assert distance(plain[1].values, flat.values, start) > 0.1, "the correction matters"


def test_the_proximal_term_is_part_of_the_loss_that_is_clipped(
    make_adapted: Make, make_rows: Rows, one_lane: type
) -> None:
    """FedProx: autograd of data loss + μ/2 ‖y − x‖², then clipping, then AdamW; the reported loss is the data's."""
    made, twin, plain = (make_adapted(std=0.1) for _ in range(3))
    start, mu = made[1].copy(), 300.0
    batches = batches_of(make_rows(32), 8)
    stats = train(made, batches, one_lane(), clip=0.05, correction=ProximalTerm(start, mu))
    flat, losses = reference(twin, batches, lr=1e-3, clip=0.05, decay=0.0, mu=mu)
    assert distance(made[1].values, flat.values, start) < 1e-4
    assert stats.losses == pytest.approx(losses, rel=1e-5)
    assert float(made[1].grad.norm()) == pytest.approx(0.05, rel=1e-3), "the term is inside the clipped norm"
    train(plain, batches, one_lane(), clip=0.05)
    assert distance(plain[1].values, flat.values, start) > 0.1, "the term matters"


def test_the_optimizer_starts_anew_in_every_run(make_adapted: Make, make_rows: Rows, one_lane: type) -> None:
    loaded, flat = make_adapted(std=0.1)
    start, batches = flat.copy(), batches_of(make_rows(16), 8)
    trainer = Trainer(loaded.base, flat, StepSettings(4, 1.0, 0.0, 0))
    plan = TrainingPlan(batches, lambda step: 1e-3, ("x",))
    trainer.run(plan, SftObjective(), one_lane())
    first = flat.copy()
    flat.load(start)
    trainer.run(plan, SftObjective(), one_lane())
    assert torch.equal(flat.values, first) and not torch.equal(first, start)


def test_the_base_model_is_never_changed(make_adapted: Make, make_rows: Rows, one_lane: type) -> None:
    made = make_adapted(std=0.1, dropout=0.2)
    frozen = {n: p.clone() for n, p in made[0].model.named_parameters() if not p.requires_grad}
    assert not made[0].base.training
    train(made, batches_of(make_rows(16), 8), one_lane(), lr=0.05)
    assert not made[0].base.training, "the mode is put back"
    assert all(torch.equal(p, frozen[n]) for n, p in made[0].model.named_parameters() if n in frozen)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("micro", [1, 3, 4, 16])
def test_a_batch_gives_one_gradient_however_it_is_cut(
    make_adapted: Make, make_rows: Rows, one_lane: type, micro: int, exact: bool
) -> None:
    whole, made = make_adapted(std=0.1), make_adapted(std=0.1)
    rows = make_rows(16)
    want = train(whole, [rows], one_lane(), micro=1000, clip=0, lr=1e-9)
    got = train(made, [rows[::-1]], one_lane(exact), micro=micro, clip=0, lr=1e-9)
    assert got.losses == pytest.approx(want.losses, rel=1e-6)
    assert float((made[1].grad - whole[1].grad).norm() / whole[1].grad.norm()) < 1e-6


@pytest.mark.parametrize("exact", [True, False])
def test_a_member_hands_over_no_more_gradients_than_the_sum_needs(
    make_adapted: Make, make_rows: Rows, one_lane: type, monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    """Exact sums need each micro-batch's own; fast ones get what autograd added up, in place."""
    made, lane = make_adapted(std=0.1), one_lane(exact)
    seen = []
    summed = lane.summer.sum

    def record(segments: Any, sizes: Any, count: int) -> Any:
        seen.append(([term.vector is made[1].grad for term in segments[0]], len(segments[1]), count))
        return summed(segments, sizes, count)

    monkeypatch.setattr(lane.summer, "sum", record)
    train(made, [make_rows(7)], lane, micro=2)
    assert seen == [([False, False, False, True] if exact else [True], 4, 4)]


@pytest.mark.parametrize(("size", "num_rows", "mu"), [(2, 16, 0.0), (3, 16, 9.0), (4, 13, 0.0), (4, 5, 9.0)])
def test_exact_lanes_give_the_same_bits(
    make_adapted: Make, make_rows: Rows, one_lane: type, on_members: Callable[..., Any],
    size: int, num_rows: int, mu: float,
) -> None:  # fmt: skip
    """With dropout on: a micro-batch's draws belong to it, and sums do not depend on who added first."""
    batches = batches_of(make_rows(2 * num_rows), num_rows)
    alone = make_adapted(std=0.1, dropout=0.2)
    correction = ProximalTerm(alone[1].copy(), mu) if mu > 0 else None
    want = train(alone, batches, one_lane(), micro=4, correction=correction)
    models = [make_adapted(std=0.1, dropout=0.2) for _ in range(size)]
    for seed in range(2):
        for _, flat in models:
            flat.load(make_adapted(std=0.1)[1].values)
        stats = on_members(
            size,
            lambda lane: train(models[lane.index], batches, lane, micro=4, correction=correction),
            seed=seed,
        )
        assert all(s == want for s in stats)
        assert all(torch.equal(flat.values, alone[1].values) for _, flat in models)


def test_row_weights_are_shared_over_a_lane_and_over_micro_batches(
    make_adapted: Make, make_rows: Rows, one_lane: type, on_members: Callable[..., Any]
) -> None:
    """The normaliser is the whole batch's; a batch that weighs nothing leaves the adapter where it is."""
    rows = [replace(row, weight=(1.0, 0.3, 0.0)[i % 3]) for i, row in enumerate(make_rows(26))]
    batches = [rows[:13], [replace(row, weight=0.0) for row in rows[:5]], rows[13:]]
    alone, cut = make_adapted(std=0.1), make_adapted(std=0.1)
    start = alone[1].copy()
    want = train(alone, batches, one_lane(), micro=4)
    models = [make_adapted(std=0.1) for _ in range(3)]
    stats = on_members(3, lambda lane: train(models[lane.index], batches, lane, micro=4))
    assert all(s == want for s in stats) and want.losses[1] == 0.0
    assert all(torch.equal(flat.values, alone[1].values) for _, flat in models)
    assert train(cut, batches, one_lane(), micro=1000).losses == pytest.approx(want.losses, rel=1e-5)
    kept, dropped = make_adapted(std=0.1), make_adapted(std=0.1)
    train(kept, batches[1:2], one_lane(), micro=4)
    assert torch.equal(kept[1].values, start)
    train(dropped, [[row for row in batch if row.weight > 0] for batch in batches[::2]], one_lane(), micro=4)
    train(kept, batches[::2], one_lane(), micro=4)
    assert distance(kept[1].values, dropped[1].values, start) < 1e-4, "a weight of 0 is as good as being left out"


def test_exact_dpo_lanes_give_the_same_bits(
    make_adapted: Make, make_rows: Rows, one_lane: type, on_members: Callable[..., Any]
) -> None:
    pairs = [Preference(a, b) for a, b in zip(make_rows(10, seed=1), make_rows(10, seed=2), strict=True)]

    def run(made: tuple[LoadedModel, FlatAdapter], lane: Any) -> TrainingStats:
        objective = DpoObjective(made[1], torch.zeros(made[1].size), 0.5)
        plan = TrainingPlan([pairs[:6], pairs[4:]], lambda step: 1e-3, ("dpo",))
        return Trainer(made[0].base, made[1], StepSettings(2, 1.0, 0.0, 0)).run(plan, objective, lane)

    alone = make_adapted(std=0.1, dropout=0.5)
    want = run(alone, one_lane())
    models = [make_adapted(std=0.1, dropout=0.5) for _ in range(3)]
    stats = on_members(3, lambda lane: run(models[lane.index], lane))
    assert all(s == want for s in stats)
    assert all(torch.equal(flat.values, alone[1].values) for _, flat in models)
    assert set(want.stats) == set(DpoObjective.stat_names) and len(want.stats["reward_margin"]) == 2
    assert want.mean("reward_margin") == pytest.approx(sum(want.stats["reward_margin"]) / 2)


def test_fast_lanes_agree_within_rounding(
    make_adapted: Make, make_rows: Rows, one_lane: type, on_members: Callable[..., Any]
) -> None:
    batches = batches_of(make_rows(26), 13)
    alone = make_adapted(std=0.1, dropout=0.3)
    start = alone[1].copy()
    want = train(alone, batches, one_lane(False), longest=1000)
    models = [make_adapted(std=0.1, dropout=0.3) for _ in range(3)]
    stats = on_members(3, lambda lane: train(models[lane.index], batches, lane, longest=1000), exact=False)
    for (_, flat), found in zip(models, stats, strict=True):
        assert found.losses == pytest.approx(want.losses, rel=1e-5)
        assert distance(flat.values, alone[1].values, start) < 1e-3


@pytest.mark.parametrize(("exact", "longest", "passes"), [(True, 1000, 8), (False, 1000, 2), (False, 0, 8)])
def test_micro_batches_share_a_pass_outside_exact_mode(
    make_adapted: Make, make_rows: Rows, one_lane: type, exact: bool, longest: int, passes: int
) -> None:
    """One pass a step, or one a micro-batch; dropout draws the same, so that all agree to rounding."""
    batches = batches_of(make_rows(26), 13)
    alone, made = (make_adapted(std=0.1, dropout=0.3) for _ in range(2))
    start = alone[1].copy()
    want = train(alone, batches, one_lane(True))
    calls: list[int] = []
    made[0].base.model.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    got = train(made, batches, one_lane(exact), longest=longest)
    assert len(calls) == passes and got.losses == pytest.approx(want.losses, rel=1e-6)
    assert distance(made[1].values, alone[1].values, start) < 1e-4
    assert exact is False or torch.equal(made[1].values, alone[1].values)


@pytest.mark.parametrize("derived", [False, True])
def test_a_pass_is_never_larger_than_what_its_memory_is_reckoned_for(
    make_adapted: Make, make_rows: Rows, one_lane: type, derived: bool
) -> None:
    """No pass has more than micro_batch_size · longest tokens, or pass_tokens, and two neighbours would have."""
    rows = make_rows(32)
    longest = 2 * max(len(row) for row in rows)
    made = make_adapted(std=0.1)
    sizes: list[list[int]] = []

    class Spy(SftObjective):
        def sums(self, model: torch.nn.Module, items: Sequence[TokenRow]) -> Any:
            sizes.append([len(item) for item in items])
            return super().sums(model, items)

    most = 5 * longest if derived else 4 * longest
    plan = TrainingPlan([rows], lambda step: 1e-9, ("x",), longest=longest, pass_tokens=most if derived else 0)
    Trainer(made[0].base, made[1], StepSettings(4, 0.0, 0.0, 0)).run(plan, Spy(), one_lane(False))
    assert sorted(n for part in sizes for n in part) == sorted(map(len, rows))
    assert 1 < len(sizes) < 8 and all(sum(part) <= most for part in sizes)
    assert all(sum(one) + sum(two[:4]) > most for one, two in pairwise(sizes))


@given(st.lists(st.integers(1, 400), max_size=40), st.integers(1, 9))
def test_rows_are_dealt_once_each_and_evenly(sizes: list[int], most: int) -> None:
    """As few parts as can be; the heaviest row of the batch is the most by which two parts with room differ."""
    parts = deal_rows(sizes, most)
    assert sorted(i for part in parts for i in part) == list(range(len(sizes)))
    assert len(parts) == -(-len(sizes) // most) and all(1 <= len(part) <= most for part in parts)
    assert parts == deal_rows(list(sizes), most)
    loads = [sum(sizes[i] for i in part) for part in parts]
    for part, load in zip(parts, loads, strict=True):
        for other, theirs in zip(parts, loads, strict=True):
            assert len(other) == most or load - theirs <= sizes[part[-1]], "its last row would have gone to the other"


def test_micro_batches_of_the_papers_batch_are_nearly_equal() -> None:
    """16 rows of a skewed mixture in four parts: the heaviest part is near a quarter, far below the four longest."""
    draw, dealt, by_length = np.random.default_rng(0), [], []
    for _ in range(50):
        sizes = np.minimum(draw.lognormal(5.0, 0.5, 16), 512).astype(int).tolist()
        parts = deal_rows(sizes, 4)
        dealt.append(max(sum(sizes[i] for i in part) for part in parts) / sum(sizes))
        by_length.append(sum(sorted(sizes)[-4:]) / sum(sizes))
    assert max(dealt) < 0.33 and sum(dealt) / 50 < 0.28 < 0.40 < sum(by_length) / 50


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_nothing_in_a_step_waits_for_the_device(
    make_adapted: Make, make_rows: Rows, one_lane: type, monkeypatch: pytest.MonkeyPatch,
    kind: str, exact: bool, attention: str,
) -> None:  # fmt: skip
    """No call of fedsim's own copies to or from a device in a way that waits, or reads a number of it."""
    loaded, flat = make_adapted(std=0.1, dropout=0.1)
    loaded.base.set_attn_implementation(IMPLEMENTATIONS[attention])
    trainer = Trainer(loaded.base, flat, StepSettings(2, 1.0, 0.0, 0))
    found: list[str] = []
    places = inside = 0

    def watch(owner: Any, name: str, waits: Callable[..., bool]) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal places
            caller = sys._getframe(1)
            if inside and str(caller.f_globals.get("__name__")).startswith("fedsim."):
                places += 1
                if waits(*args, **kwargs):
                    found.append(f"{caller.f_code.co_filename}:{caller.f_lineno}: {name}")
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    def moves(*args: Any, **kwargs: Any) -> bool:
        to_device = "device" in kwargs or any(isinstance(a, torch.device | str) for a in args[1:])
        return to_device and not kwargs.get("non_blocking", False)

    watch(torch.Tensor, "to", moves)
    for name in ("cpu", "cuda", "item", "tolist", "numpy", "nonzero", "__bool__", "__float__", "__int__"):
        watch(torch.Tensor, name, lambda *args, **kwargs: True)
    for name in ("tensor", "as_tensor"):
        watch(torch, name, lambda *args, device=None, **kwargs: device is not None)

    real_step = trainer._step

    def step(*args: Any) -> torch.Tensor:
        nonlocal inside
        inside += 1
        try:
            return real_step(*args)
        finally:
            inside -= 1

    monkeypatch.setattr(trainer, "_step", step)
    rows = [replace(row, weight=1.0 + i % 2) for i, row in enumerate(make_rows(8))]
    if kind == "sft":
        trainer.run(TrainingPlan([rows, rows], lambda t: 1e-3, ("x",), longest=40), SftObjective(), one_lane(exact))
    else:
        pairs = [Preference(a, b) for a, b in zip(rows[:4], rows[4:], strict=True)]
        objective = DpoObjective(flat, flat.copy(), 0.1)
        trainer.run(TrainingPlan([pairs], lambda t: 1e-3, ("x",), longest=160), objective, one_lane(exact))
    assert places > 4 and not found, found


def test_memory_does_not_grow_with_steps(make_adapted: Make, make_rows: Rows, one_lane: type) -> None:
    """As many tensors are alive after 12 steps as after 3, during a run, but for the steps' own statistics."""
    loaded, flat = make_adapted(std=0.1, dropout=0.1)
    trainer = Trainer(loaded.base, flat, StepSettings(2, 1.0, 0.0, 0))
    alive: list[int] = []

    def count(done: int, total: int) -> None:
        if done not in (3, total):
            return
        gc.collect()
        alive.append(sum(o.numel() for o in gc.get_objects() if type(o) is torch.Tensor))

    for exact in (True, False):
        alive.clear()
        plan = TrainingPlan(batches_of(make_rows(48), 4), lambda step: 1e-3, ("x",), longest=40)
        trainer.run(plan, SftObjective(), one_lane(exact), count)
        assert alive[1] - alive[0] <= 9 * 2, "a norm and a loss a step"


def test_dropout_belongs_to_the_key(make_adapted: Make, make_rows: Rows, one_lane: type) -> None:
    rows = [make_rows(8)]

    def losses(seed: int, dropout: float = 0.5) -> list[float]:
        torch.manual_seed(99)
        return train(make_adapted(std=0.3, dropout=dropout), rows, one_lane(), seed=seed).losses

    assert losses(0) == losses(0) != losses(1)
    assert losses(0, dropout=0.0) == losses(1, dropout=0.0) != losses(0)


def test_progress_is_reported_after_each_step(make_adapted: Make, make_rows: Rows, one_lane: type) -> None:
    loaded, flat = make_adapted()
    seen: list[tuple[int, int]] = []
    plan = TrainingPlan(batches_of(make_rows(9), 3), lambda step: 1e-3, ("x",))
    trainer = Trainer(loaded.base, flat, StepSettings(4, 1.0, 0.0, 0))
    trainer.run(plan, SftObjective(), one_lane(), lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("exact", [True, False])
def test_a_loss_that_is_not_finite_ends_the_run(
    make_adapted: Make, make_rows: Rows, one_lane: type, exact: bool
) -> None:
    made = make_adapted(std=0.1)
    poison = torch.zeros(made[1].size)

    class Poison(Correction):
        num_calls = 0

        def on_values(self, values: torch.Tensor, lr: float) -> None:
            self.num_calls += 1
            if self.num_calls == 2:
                values.copy_(poison + torch.inf)

    with pytest.raises(RunError, match=r"became NaN or infinite in step 3 of 4; lower the learning rate"):
        train(made, batches_of(make_rows(16), 4), one_lane(exact), correction=Poison())


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_rows_whose_reply_was_cut_off_teach_nothing(make_adapted: Make, one_lane: type, objective: str) -> None:
    """A micro-batch without any target has a zero gradient: one row with a target beside it alone decides."""
    long = [ChatFormat.join([5] * 50, [7], 20) for _ in range(4)]
    good = ChatFormat.join([1, 2, 3], [4, 5], 20)
    loaded, flat = make_adapted(std=0.1)
    start = flat.copy()
    trainer = Trainer(loaded.base, flat, StepSettings(2, 0.0, 0.0, 0))

    def gradient(rows: list[TokenRow]) -> torch.Tensor:
        flat.load(start)
        if objective == "sft":
            trainer.run(TrainingPlan([rows], lambda step: 1e-9, ("x",)), SftObjective(), one_lane())
        else:
            pairs = [Preference(row, row if row.num_targets == 0 else long[0]) for row in rows]
            plan = TrainingPlan([pairs], lambda step: 1e-9, ("x",))
            trainer.run(plan, DpoObjective(flat, torch.zeros(flat.size), 0.1), one_lane())
        return flat.grad.clone()

    assert not gradient(long).any()
    scale = 5 if objective == "dpo" else 1  # DPO counts pairs, SFT target tokens
    alone = gradient([good])
    assert float((scale * gradient([*long, good]) - alone).norm() / alone.norm()) < 1e-5
