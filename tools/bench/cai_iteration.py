"""A CAI iteration (one SFT and one DPO step on 16 rows) beside TRL's trainers and a plain Hugging Face loop."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from fedsim.config import CaiConfig, LocalConfig
from fedsim.data.chat import ChatFormat
from fedsim.model.cost import Effort, ModelCost, rows_work
from fedsim.parallel.sums import Summer
from fedsim.parallel.world import Lane
from fedsim.safety.alignment import Aligner
from fedsim.study.bench_rows import FAST, Correctness, Row, Target
from fedsim.train.loop import StepSettings, Trainer
from fedsim.train.objectives import DpoObjective, Preference
from tools.bench import plain_loop, trl_peer
from tools.bench.gradients import against_fp32, of_trainer
from tools.bench.lengths import END, draw, random_ids
from tools.bench.local_step import CHECKPOINTED, EXACT
from tools.bench.plain_loop import PeerModel
from tools.bench.stage import PAPER_LORA, Bench, give_memory_back, installed
from tools.bench.stepwise import NO_ROOM, StepTimes, no_mark, runs_in_turns, step_row

PROMPT, RESPONSE, REVISION = 110, 60, 90  # mean tokens
ITERATIONS = 4  # of one run: competitors take turns
LIMIT = 1e-4
GOAL_S = 0.6  # of an iteration of Llama-3.1-8B on a GPU
BATCH = 16
NUM_PAIRS = 30 * BATCH

Mark = Callable[[], None]


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


class TokenAligner(Aligner):
    """CAI's two stages on pairs that are tokens already."""

    def __init__(self, trainer: Trainer, pairs: Sequence[Preference], cai: CaiConfig) -> None:
        self.trainer = trainer
        self.cai = cai
        self.seed = 0
        self.pass_tokens = 0
        self.pairs = list(pairs)


class Ours:
    """CAI as a run of fedsim does it, on a resident model."""

    def __init__(self, bench: Bench, iterations: int = ITERATIONS) -> None:
        self.model, self.adapter = bench.adapted()
        self.start = self.adapter.copy()
        self.cai = CaiConfig(iterations=iterations, batch_size=BATCH)
        self.micro = LocalConfig().micro_batch_size
        self.lanes = {e: Lane(0, 1, Summer(None, exact=e, device=bench.device)) for e in (False, True)}
        base = self.model.get_base_model()
        assert isinstance(base, PreTrainedModel)
        self.trainer = Trainer(base, self.adapter, StepSettings(self.micro, 1.0, 0.0, 0))
        self.aligner = TokenAligner(self.trainer, preferences(NUM_PAIRS, bench.size.vocab_size), self.cai)

    def batches(self, turn: int) -> list[list[Preference]]:
        """The pairs of each iteration, which peers get too."""
        return self.aligner.batches(turn)

    def run(self, turn: int, mark: Mark, exact: bool = False) -> dict[str, float]:
        """A round's iterations; the means of their losses among other figures."""
        return self.aligner.align(self.start, turn, self.lanes[exact], lambda done, whole: mark()).metrics


class Theirs:
    """The same two stages by a peer: ``module`` is :mod:`plain_loop` or :mod:`trl_peer`.

    Args:
        checkpointed: gradient checkpointing; None leaves it to the module.
        options: given to the module's functions.
    """

    def __init__(
        self, ours: Ours, peer: PeerModel, module: Any, checkpointed: bool | None = None, **options: object
    ) -> None:
        self.peer = peer
        self.checkpointed = checkpointed
        self.ours = ours
        self.module = module
        self.options = options
        self.losses: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])

    def run(self, turn: int, mark: Mark) -> None:
        """SFT on the revisions, then DPO."""
        self.peer.load(self.ours.start)
        if self.checkpointed is not None:
            self.peer.checkpointing(self.checkpointed)
        cai, batches = self.ours.cai, self.ours.batches(turn)
        rows = [[pair.chosen for pair in batch] for batch in batches]
        sft = self.module.sft(self.peer, rows, cai.sft_lr, mark=mark, **self.options)
        dpo = self.module.dpo(self.peer, batches, cai.dpo_lr, cai.beta, mark=mark, **self.options)
        self.losses = (sft, dpo)


class CaiIteration:
    """The stage."""

    name = "cai_iteration"

    def check(self, bench: Bench) -> list[Correctness]:
        """Same pairs, same start: the losses of both stages, and how the adapter moved; in bf16 DPO's gradient."""
        if bench.dtype != torch.float32:
            return [_gradient_check(bench)]
        ours = Ours(bench, iterations=2)
        metrics = ours.run(0, no_mark)
        moved = ours.adapter.copy() - ours.start
        found = []
        with tempfile.TemporaryDirectory() as folder:
            for what, theirs in rivals(bench, ours, folder).items():
                theirs.run(0, no_mark)
                for kind, losses in zip(("sft", "dpo"), theirs.losses, strict=True):
                    mean = float(torch.stack(losses).double().mean())
                    error = abs(metrics[f"cai/{kind}_loss"] - mean) / mean
                    found.append(Correctness(f"mean loss of 2 {kind.upper()} steps, relative to {what}", error, LIMIT))
                change = theirs.peer.vector() - ours.start
                error = float((moved - change).norm() / change.norm())
                found.append(Correctness(f"change of the adapter, ‖ours − theirs‖ / ‖theirs‖ of {what}", error, LIMIT))
        return found

    def time(self, bench: Bench) -> list[Row]:
        """All competitors in turns, a few iterations each time."""
        ours = Ours(bench)
        turns = -(-bench.repeats // (ITERATIONS - 1))
        with tempfile.TemporaryDirectory() as folder:
            peers = {name: theirs.run for name, theirs in rivals(bench, ours, folder).items()}
            runs: dict[str, Callable[[int, Mark], object]] = {
                FAST: ours.run,
                EXACT: partial(ours.run, exact=True),
                **peers,
            }
            times = runs_in_turns(runs, bench.device, turns, bench.budget_s, phases=2)
        pairs = [batch for turn in range(len(times[FAST].setups)) for batch in ours.batches(turn)]
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
        absent = {name: NO_ROOM if name in runs else "not installed" for name in names if name not in times}
        return [
            replace(
                _row(bench, own, times[own], name, times.get(name), shapes),
                floor_s=floor_s,
                floor=words,
                peer_absent=absent.get(name, ""),
            )
            for own in (FAST, EXACT)
            for name in names
        ]


def _gradient_check(bench: Bench) -> Correctness:
    """DPO's gradient of a few pairs, the policy a little away from the reference.

    Ours is given back before the peer turns into fp32, which takes 32 GB at 8B.
    """
    ours = Ours(bench)
    pairs, beta, start = ours.batches(0)[0][: 4 if bench.cuda else 8], ours.cai.beta, ours.start
    policy = ours.start + 0.01 * torch.randn(ours.adapter.size, generator=torch.Generator().manual_seed(0)).to(
        ours.start.device
    )
    ours.adapter.load(policy)
    mine = of_trainer(ours.trainer, pairs, DpoObjective(ours.adapter, ours.start, beta), ours.lanes[False])

    def loss(peer: PeerModel) -> torch.Tensor:
        reference = [start[slot.start : slot.stop].view(slot.shape) for slot in peer.slots]
        return plain_loop.dpo_loss(peer, pairs, reference, beta)

    make = partial(PeerModel, bench, ours.adapter.slots)
    del ours
    give_memory_back(bench.device)
    return against_fp32(bench, make, policy, mine, loss, f"a DPO batch of {len(pairs)} pairs")


def rivals(bench: Bench, ours: Ours, folder: str) -> dict[str, Theirs]:
    """The peers that can be had here."""
    plain = PeerModel(bench, ours.adapter.slots)
    found = {"plain Hugging Face loop": Theirs(ours, plain, plain_loop, checkpointed=False)}
    if bench.cuda or not installed("trl"):
        found[CHECKPOINTED] = Theirs(ours, plain, plain_loop, checkpointed=True)
    if not installed("trl"):
        return found
    for equal, how in ((True, trl_peer.EQUAL), (False, "their defaults (gradient checkpointing)")):
        peer = PeerModel(bench, ours.adapter.slots)
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


def _row(
    bench: Bench,
    own: str,
    ours: StepTimes,
    rival: str,
    theirs: StepTimes | None,
    shapes: Mapping[str, object],
) -> Row:
    target = Target("ratio", 1.2 if trl_peer.EQUAL in rival else 1.8) if "TRL" in rival else None
    if bench.cuda and rival == CHECKPOINTED:
        target = Target("p50_s", GOAL_S, at_most=True)
    return replace(
        step_row(CaiIteration.name, bench.dtype_name, own, ours, rival, theirs, shapes),
        target=target,
        note="set-up of the SFT and DPO trainers is apart",
    )


STAGE = CaiIteration()
