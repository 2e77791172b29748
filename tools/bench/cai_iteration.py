"""A CAI iteration (one SFT and one DPO step on 16 rows) beside TRL's trainers and a plain Hugging Face loop."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import numpy as np
import torch
from transformers import PreTrainedModel

from fedsim.config import CaiConfig, LocalConfig
from fedsim.data.chat import ChatFormat
from fedsim.model.cost import Effort, ModelCost, rows_work
from fedsim.parallel.sums import Summer
from fedsim.parallel.world import Lane
from fedsim.train.loop import StepSettings, Trainer, TrainingPlan
from fedsim.train.objectives import DpoObjective, Preference, SftObjective
from tools.bench import plain_loop, trl_peer
from tools.bench.gradients import against_fp32, of_trainer
from tools.bench.lengths import END, draw, random_ids
from tools.bench.measure import percentiles
from tools.bench.plain_loop import PeerModel
from tools.bench.rows import Correctness, Row, Target
from tools.bench.stage import PAPER_LORA, Bench, installed
from tools.bench.stepwise import StepTimes, time_steps

PROMPT, RESPONSE, REVISION = 110, 60, 90  # mean tokens
ITERATIONS = 4  # of one run: competitors take turns
LIMIT = 1e-4
BATCH = 16


@dataclass(frozen=True)
class IterationTimes:
    """Seconds of iterations (an SFT and a DPO step each), and of what a run takes beside them."""

    steps: list[float]
    setups: list[float]

    def __add__(self, other: IterationTimes) -> IterationTimes:
        return IterationTimes(self.steps + other.steps, self.setups + other.setups)


Stages = Callable[[Sequence[Sequence[Preference]]], list[Callable[[Callable[[], None]], object]]]
"""What turns the batches of a round into its SFT and its DPO run; each is given the mark."""


def preferences(count: int, vocab_size: int, seed: int = 0) -> list[Preference]:
    """Pairs with lengths as SQuARe's, scaled to the means above; ``seed`` chooses other ones."""
    prompts = draw("prompt", count, PROMPT, seed)
    responses, revisions = draw("reply", count, RESPONSE, seed), draw("reply", count, REVISION, seed + 1000)
    found = []
    for i, sizes in enumerate(zip(prompts, responses, revisions, strict=True)):
        prompt, response, revision = (
            random_ids(size, vocab_size, "cai", seed, i, part) for part, size in enumerate(sizes)
        )
        chosen, rejected = (ChatFormat.join(prompt, [*reply[:-1], END], sum(sizes)) for reply in (revision, response))
        found.append(Preference(chosen, rejected))
    return found


class Ours:
    """CAI's two stages as fedsim's aligner runs them, on rows that are tokens already."""

    def __init__(self, bench: Bench) -> None:
        self.model, self.adapter = bench.adapted()
        self.start = self.adapter.copy()
        self.cai = CaiConfig()
        self.lane = Lane(0, 1, Summer(None, exact=False, device=bench.device))
        self.losses: list[float] = []

    def trainer(self, micro: int) -> Trainer:
        """A trainer whose passes hold ``micro`` rows or pairs."""
        base = self.model.get_base_model()
        assert isinstance(base, PreTrainedModel)
        return Trainer(base, self.adapter, StepSettings(micro, 1.0, 0.0, 0))

    def stages(self, micro: int, batches: Sequence[Sequence[Preference]]) -> list[Callable[..., object]]:
        """The SFT and the DPO run."""
        self.adapter.load(self.start)
        self.losses = []
        trainer = self.trainer(micro)

        def sft(mark: Callable[[], None]) -> None:
            rows = [[pair.chosen for pair in batch] for batch in batches]
            plan = TrainingPlan(rows, lambda step: self.cai.sft_lr, ("cai_sft", 0))
            self.losses += trainer.run(plan, SftObjective(), self.lane, lambda done, whole: mark()).losses

        def dpo(mark: Callable[[], None]) -> None:
            objective = DpoObjective(self.adapter, self.adapter.copy(), self.cai.beta)
            plan = TrainingPlan(batches, lambda step: self.cai.dpo_lr, ("cai_dpo", 0))
            self.losses += trainer.run(plan, objective, self.lane, lambda done, whole: mark()).losses

        return [sft, dpo]


class Theirs:
    """The same two stages by a peer: ``module`` is :mod:`plain_loop` or :mod:`trl_peer`.

    Args:
        checkpointed: gradient checkpointing; None leaves it to the module.
        options: given to the module's functions.
    """

    def __init__(
        self, ours: Ours, peer: PeerModel, module: object, checkpointed: bool | None = None, **options: object
    ) -> None:
        self.peer = peer
        self.checkpointed = checkpointed
        self.ours = ours
        self.module = module
        self.options = options
        self.losses: list[torch.Tensor] = []

    def stages(self, batches: Sequence[Sequence[Preference]]) -> list[Callable[..., object]]:
        """The SFT and the DPO run."""
        self.peer.load(self.ours.start)
        if self.checkpointed is not None:
            self.peer.checkpointing(self.checkpointed)
        self.losses = []
        cai, module = self.ours.cai, self.module

        def sft(mark: Callable[[], None]) -> None:
            rows = [[pair.chosen for pair in batch] for batch in batches]
            self.losses += module.sft(self.peer, rows, cai.sft_lr, mark=mark, **self.options)  # type: ignore[attr-defined]

        def dpo(mark: Callable[[], None]) -> None:
            self.losses += module.dpo(  # type: ignore[attr-defined]
                self.peer, batches, cai.dpo_lr, cai.beta, mark=mark, **self.options
            )

        return [sft, dpo]


class CaiIteration:
    """The stage."""

    name = "cai_iteration"
    needs_cuda = False

    def check(self, bench: Bench) -> list[Correctness]:
        """Same pairs, same start: the losses of both stages, and how the adapter moved; in bf16 DPO's gradient."""
        if bench.dtype != torch.float32:
            return [_gradient_check(bench)]
        batches = _batches(bench, 0)[:2]
        ours = Ours(bench)
        for run in ours.stages(LocalConfig().micro_batch_size, batches):
            run(_nothing)
        mine = torch.tensor(ours.losses, dtype=torch.float64)
        moved = ours.adapter.copy() - ours.start
        found = []
        with tempfile.TemporaryDirectory() as folder:
            for what, theirs in rivals(bench, ours, folder).items():
                for run in theirs.stages(batches):
                    run(_nothing)
                other = torch.stack(theirs.losses).double().cpu()
                change = theirs.peer.vector() - ours.start
                found += [
                    Correctness(
                        f"losses of 2 SFT and 2 DPO steps, largest difference relative to {what}",
                        float(((mine - other).abs() / other.abs()).max()),
                        LIMIT,
                    ),
                    Correctness(
                        f"change of the adapter, ‖ours − theirs‖ / ‖theirs‖ of {what}",
                        float((moved - change).norm() / change.norm()),
                        LIMIT,
                    ),
                ]
        return found

    def time(self, bench: Bench) -> list[Row]:
        """All competitors in turns, a few iterations each time."""
        ours = Ours(bench)
        default = LocalConfig().micro_batch_size
        with tempfile.TemporaryDirectory() as folder:
            mine = f"fedsim, micro-batches of {default} (default)"
            peers: dict[str, Stages] = {name: theirs.stages for name, theirs in rivals(bench, ours, folder).items()}
            times, turns = _in_turns(bench, {mine: partial(ours.stages, default), **peers})
        pairs = [batch for turn in range(turns) for batch in _batches(bench, turn)]
        floor_s, words = floor(bench, ours, pairs)
        flat = [pair for batch in pairs for pair in batch]
        shapes = {
            "rows": BATCH,
            "prompt_mean": float(np.mean([len(p.chosen) - p.chosen.num_targets for p in flat])),
            "response_mean": float(np.mean([p.rejected.num_targets for p in flat])),
            "revision_mean": float(np.mean([p.chosen.num_targets for p in flat])),
            "lora_r": PAPER_LORA.r,
            "model": bench.size.name,
        }
        names = [*peers] if installed("trl") else [*peers, f"TRL SFTTrainer and DPOTrainer, {trl_peer.EQUAL}"]
        rows = [_row(bench, mine, times[mine], name, times.get(name), shapes) for name in names]
        return [replace(row, floor_s=floor_s, floor=words) for row in rows]


def _gradient_check(bench: Bench) -> Correctness:
    """DPO's gradient of eight pairs, the policy a little away from the reference."""
    ours = Ours(bench)
    pairs, beta = _batches(bench, 0)[0][:8], ours.cai.beta
    policy = ours.start + 0.01 * torch.randn(ours.adapter.size, generator=torch.Generator().manual_seed(0)).to(
        ours.start.device
    )
    ours.adapter.load(policy)
    trainer = ours.trainer(LocalConfig().micro_batch_size)
    mine = of_trainer(trainer, pairs, DpoObjective(ours.adapter, ours.start, beta), ours.lane)

    def loss(peer: PeerModel) -> torch.Tensor:
        reference = [ours.start[slot.start : slot.stop].view(slot.shape) for slot in peer.slots]
        return plain_loop.dpo_loss(peer, pairs, reference, beta)

    make = partial(PeerModel, bench, ours.adapter)
    return against_fp32(bench, make, policy, mine, loss, f"a DPO batch of {len(pairs)} pairs")


def rivals(bench: Bench, ours: Ours, folder: str) -> dict[str, Theirs]:
    """The peers that can be had here."""
    plain = PeerModel(bench, ours.adapter)
    found = {"plain Hugging Face loop": Theirs(ours, plain, plain_loop, checkpointed=False)}
    if not installed("trl"):
        found["plain Hugging Face loop, gradient checkpointing"] = Theirs(ours, plain, plain_loop, checkpointed=True)
        return found
    for equal, how in ((True, trl_peer.EQUAL), (False, "their defaults")):
        peer = PeerModel(bench, ours.adapter)
        found[f"TRL SFTTrainer and DPOTrainer, {how}"] = Theirs(ours, peer, trl_peer, folder=folder, equal=equal)
    return found


def floor(bench: Bench, ours: Ours, batches: Sequence[Sequence[Preference]]) -> tuple[float, str]:
    """Seconds that the device's peak allows for a mean iteration, and the formula."""
    base = ours.model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    cost = ModelCost.of(base)
    effort = Effort()
    for batch in batches:
        both = rows_work([row for pair in batch for row in (pair.chosen, pair.rejected)], 1)
        effort += cost.train(rows_work([pair.chosen for pair in batch], 1)) + cost.train(both) + cost.forward(both)
    peak = bench.peak()
    by = max(effort.flops / peak.flops, effort.num_bytes / peak.bytes_per_s) / len(batches)
    return by, (
        f"SFT step on revisions + DPO step on both replies + the reference's forward pass: (4, 4 and 2) x "
        f"{cost.body:,} x tokens + (6, 6 and 2) x {cost.lora:,} x tokens + (4, 4 and 2) x {cost.head:,} x targets + "
        f"(12, 12 and 4) x {cost.attention:,} x tokens of a row squared, prompts counted with each reply, at "
        f"{peak.flops:.3g} FLOP/s ({peak.source})"
    )


def _in_turns(bench: Bench, runs: Mapping[str, Stages]) -> tuple[dict[str, IterationTimes], int]:
    """Each competitor's round once, then again; an iteration is the i-th SFT and the i-th DPO step together."""
    found = {name: IterationTimes([], []) for name in runs}
    spent, turns = 0.0, 0
    while turns < -(-bench.repeats // (ITERATIONS - 1)) and (turns == 0 or spent < bench.budget_s):
        batches = _batches(bench, turns)
        names = list(found)
        start = turns % len(names)
        for name in names[start:] + names[:start]:
            try:
                sft, dpo = (time_steps(run, bench.device) for run in runs[name](batches))
            except torch.cuda.OutOfMemoryError:
                bench.say(f"  {name}: out of GPU memory")
                found.pop(name, None)
                continue
            found[name] += _joined(sft, dpo)
            spent += sum(sum(part.steps) + sum(part.setups) for part in (sft, dpo)) * ITERATIONS / (ITERATIONS - 1)
        turns += 1
    return found, turns


def _joined(sft: StepTimes, dpo: StepTimes) -> IterationTimes:
    return IterationTimes(
        [a + b for a, b in zip(sft.steps, dpo.steps, strict=True)],
        [a + b for a, b in zip(sft.setups, dpo.setups, strict=True)],
    )


def _batches(bench: Bench, turn: int) -> list[list[Preference]]:
    pairs = preferences(BATCH * ITERATIONS, bench.size.vocab_size, turn)
    return [pairs[i : i + BATCH] for i in range(0, len(pairs), BATCH)]


def _row(
    bench: Bench,
    own: str,
    ours: IterationTimes,
    rival: str,
    theirs: IterationTimes | None,
    shapes: Mapping[str, object],
) -> Row:
    target = Target("ratio", 1.2 if trl_peer.EQUAL in rival else 1.8) if "TRL" in rival else None
    return Row(
        stage=CaiIteration.name,
        name=own,
        dtype=bench.dtype_name,
        shapes=dict(shapes),
        seconds=percentiles(ours.steps),
        repeats=len(ours.steps),
        setup_s=median(ours.setups),
        peer=rival,
        peer_seconds=None if theirs is None else percentiles(theirs.steps),
        peer_setup_s=None if theirs is None else median(theirs.setups),
        target=target,
        note="set-up of the SFT and DPO trainers is apart",
    )


def _nothing() -> None:
    """No mark."""


STAGE = CaiIteration()
