"""A client's local steps (16 rows, LoRA r 32 on q and v) beside TRL's SFTTrainer and a plain Hugging Face loop."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from fedsim.config import LocalConfig
from fedsim.data.chat import TokenRow
from fedsim.federation.algorithms import FedAvg
from fedsim.model.cost import Effort, ModelCost, rows_work
from fedsim.parallel.sums import Summer
from fedsim.parallel.world import Lane
from fedsim.study.bench_rows import FAST, Correctness, Row, Target
from fedsim.train.client import ClientTrainer
from fedsim.train.loop import StepSettings, Trainer
from fedsim.train.objectives import SftObjective
from tools.bench import plain_loop, trl_peer
from tools.bench.gradients import against_fp32, of_trainer
from tools.bench.lengths import training_rows
from tools.bench.plain_loop import PeerModel
from tools.bench.stage import PAPER_LORA, Bench, give_memory_back, installed
from tools.bench.stepwise import NO_ROOM, StepTimes, no_mark, runs_in_turns, step_row

Mark = Callable[[], None]
CLIENT_STEPS = 25
STEPS = 6  # of one run: competitors take turns every few steps
DROPOUT = 0.05  # OpenFedLLM's and the paper's
LIMIT = 1e-4
GOAL_S = 0.108  # of a step of Llama-3.1-8B on a GPU
EXACT = "fedsim, exact sums (default)"
CHECKPOINTED = "plain Hugging Face loop, gradient checkpointing"


class Client:
    """A client of fedsim as a run makes it, on a resident model.

    Attributes:
        exact: order-independent sums, which the next run takes: then a pass has ``local.micro_batch_size`` rows, else
            as many as have its tokens at their full length, which are all rows here.
    """

    def __init__(self, bench: Bench, *, dropout: float = 0.0) -> None:
        self.local = LocalConfig(steps=STEPS)
        self.model, self.adapter = bench.adapted(replace(PAPER_LORA, dropout=dropout))
        self.start = self.adapter.copy()
        self.algorithm = FedAvg()
        self.device = bench.device
        self.set(exact=False)

    def set(self, *, exact: bool) -> None:
        """Kind of sums, on the same model."""
        base = self.model.get_base_model()
        assert isinstance(base, PreTrainedModel)
        settings = StepSettings(self.local.micro_batch_size, self.local.max_grad_norm, 0.0, 0)
        trainer = Trainer(base, self.adapter, settings)
        self.lane = Lane(0, 1, Summer(None, exact=exact, device=self.device))
        self.trainer = ClientTrainer(trainer, self.algorithm, SftObjective(), self.local, STEPS, 1, 0)

    def batches(self, rows: Sequence[TokenRow], turn: int) -> list[list[TokenRow]]:
        """The rows of each step, which peers get too."""
        return self.trainer.batches(turn, rows, 0)

    def run(self, rows: Sequence[TokenRow], turn: int, mark: Mark, lane: Lane | None = None) -> float:
        """One client's steps, alone or as a member of ``lane``; the mean loss."""
        state = self.algorithm.start(self.start)
        lane = self.lane if lane is None else lane
        return self.trainer.train(turn, rows, 0, state, None, lane, lambda done, whole: mark()).loss


class LocalStep:
    """The stage."""

    name = "local_step"

    def check(self, bench: Bench) -> list[Correctness]:
        """Same rows, same start, no dropout: the mean loss, and how the adapter moved; in bf16 the gradient."""
        if bench.dtype != torch.float32:
            return [_gradient_check(bench)]
        rows = training_rows(16 * STEPS, bench.size.vocab_size)
        client = Client(bench)
        batches = client.batches(rows, 0)
        loss = client.run(rows, 0, no_mark)
        moved = client.adapter.copy() - client.start
        found = []
        with tempfile.TemporaryDirectory() as folder:
            for what, run in _equal_peers(bench, client, folder).items():
                peer = PeerModel(bench, client.adapter.slots)
                peer.load(client.start)
                losses = run(peer, batches, client.local.lr, mark=no_mark)
                found += _compare(what, loss, moved, losses, peer.vector() - client.start)
                del peer
        return found

    def time(self, bench: Bench) -> list[Row]:
        """All competitors in turns, a few steps each time."""
        rows = training_rows(16 * CLIENT_STEPS, bench.size.vocab_size)
        turns = -(-bench.repeats // (STEPS - 1))
        with tempfile.TemporaryDirectory() as folder:
            runs, client = competitors(bench, rows, folder)
            times = runs_in_turns(runs, bench.device, turns, bench.budget_s)
        batches = [batch for turn in range(turns) for batch in client.batches(rows, turn)]
        floor_s, words = floor(bench, client, batches)
        ours = [name for name in times if name.startswith("fedsim")]
        peers = [name for name in runs if name not in ours]
        shapes = {
            "rows": 16,
            "tokens_mean": sum(map(len, rows)) / len(rows),
            "targets_mean": sum(r.num_targets for r in rows) / len(rows),
            "lora_r": PAPER_LORA.r,
            "client_steps": CLIENT_STEPS,
            "model": bench.size.name,
        }
        if not installed("trl"):
            peers.append(f"TRL SFTTrainer, {trl_peer.EQUAL}")
        absent = {rival: NO_ROOM if rival in runs else "not installed" for rival in peers if rival not in times}
        return [
            replace(
                _row(bench, own, times[own], rival, times.get(rival), shapes),
                floor_s=floor_s,
                floor=words,
                peer_absent=absent.get(rival, ""),
            )
            for own in ours
            for rival in peers
            if ("dropout" in own) == ("dropout" in rival)
        ]


def competitors(
    bench: Bench, rows: Sequence[TokenRow], folder: str
) -> tuple[dict[str, Callable[[int, Mark], object]], Client]:
    """What is timed, by name, and the client whose batches all take."""
    client = Client(bench)
    lr = client.local.lr

    def own(which: Client, exact: bool) -> Callable[[int, Mark], object]:
        def run(turn: int, mark: Mark) -> object:
            which.set(exact=exact)
            return which.run(rows, turn, mark)

        return run

    runs: dict[str, Callable[[int, Mark], object]] = {
        FAST: own(client, False),
        EXACT: own(client, True),
    }

    def peer(sft: Callable[..., object], model: PeerModel, **options: object) -> Callable[[int, Mark], object]:
        def run(turn: int, mark: Mark) -> object:
            model.load(client.start)
            return sft(model, client.batches(rows, turn), lr, mark=mark, **options)

        return run

    plain = PeerModel(bench, client.adapter.slots)

    def plain_run(checkpointed: bool) -> Callable[[int, Mark], object]:
        inner = peer(plain_loop.sft, plain)

        def run(turn: int, mark: Mark) -> object:
            plain.checkpointing(checkpointed)
            return inner(turn, mark)

        return run

    runs[CHECKPOINTED] = plain_run(True)
    runs["plain Hugging Face loop"] = plain_run(False)
    if installed("trl"):
        equal = PeerModel(bench, client.adapter.slots)
        for padding_free, how in ((False, trl_peer.EQUAL), (True, trl_peer.PADDING_FREE)):
            runs[f"TRL SFTTrainer, {how}"] = peer(
                trl_peer.sft, equal, folder=folder, equal=True, padding_free=padding_free
            )
        dropping = Client(bench, dropout=DROPOUT)
        theirs = PeerModel(bench, client.adapter.slots, replace(PAPER_LORA, dropout=DROPOUT))
        runs[f"{FAST}, dropout 0.05"] = own(dropping, False)
        runs[f"{EXACT}, dropout 0.05"] = own(dropping, True)
        runs["TRL SFTTrainer as OpenFedLLM sets it (gradient checkpointing), dropout 0.05"] = peer(
            trl_peer.sft, theirs, folder=folder, equal=False
        )
    return runs, client


def floor(bench: Bench, client: Client, batches: Sequence[Sequence[TokenRow]]) -> tuple[float, str]:
    """Seconds that the device's peak allows for a mean step, and the formula."""
    cost = ModelCost.of(client.model.get_base_model())  # type: ignore[arg-type]
    effort = sum((cost.train(rows_work(batch, 1)) for batch in batches), start=Effort())
    peak = bench.peak()
    by = max(effort.flops / peak.flops, effort.num_bytes / peak.bytes_per_s) / len(batches)
    return by, (
        f"(4 x {cost.body:,} + 6 x {cost.lora:,} for LoRA) x tokens + 4 x {cost.head:,} x targets + 12 x "
        f"{cost.attention:,} x tokens of a row squared, mean of the steps, at {peak.flops:.3g} FLOP/s ({peak.source})"
    )


def _gradient_check(bench: Bench) -> Correctness:
    """One batch of a client, on CUDA a small one: the peer in fp32 takes 32 GB before its first activation."""
    client = Client(bench)
    batch = training_rows(4 if bench.cuda else 16, bench.size.vocab_size)
    ours = of_trainer(client.trainer.trainer, batch, SftObjective(), client.lane)
    start, slots = client.start, client.adapter.slots
    del client
    give_memory_back(bench.device)
    return against_fp32(
        bench,
        lambda: PeerModel(bench, slots),
        start,
        ours,
        lambda peer: plain_loop.sft_loss(peer, batch),
        f"an SFT batch of {len(batch)} rows",
    )


def _equal_peers(bench: Bench, client: Client, folder: str) -> Mapping[str, Callable[..., list[torch.Tensor]]]:
    found: dict[str, Callable[..., list[torch.Tensor]]] = {"plain Hugging Face loop": plain_loop.sft}
    if installed("trl"):
        settings: dict[str, dict[str, Any]] = {
            trl_peer.EQUAL: {"equal": True},
            trl_peer.PADDING_FREE: {"equal": True, "padding_free": True},
            trl_peer.CHECKPOINTED: {"equal": False},
        }
        for how, options in settings.items():
            found[f"TRL SFTTrainer, {how}"] = partial(trl_peer.sft, folder=folder, **options)
    return found


def _compare(
    what: str, loss: float, moved: torch.Tensor, losses: Sequence[torch.Tensor], theirs: torch.Tensor
) -> list[Correctness]:
    mean = float(torch.stack(list(losses)).double().mean())
    return [
        Correctness(f"mean loss of {STEPS} steps, relative to {what}", abs(loss - mean) / mean, LIMIT),
        Correctness(
            f"change of the adapter in {STEPS} steps, ‖ours − theirs‖ / ‖theirs‖ of {what}",
            float((moved - theirs).norm() / theirs.norm()),
            LIMIT,
        ),
    ]


def _row(
    bench: Bench, own: str, ours: StepTimes, rival: str, theirs: StepTimes | None, shapes: Mapping[str, object]
) -> Row:
    target = None
    if bench.cuda and rival == CHECKPOINTED:
        target = Target("p50_s", GOAL_S, at_most=True)
    elif "TRL" in rival:
        target = Target("ratio", 1.8 if "OpenFedLLM" in rival else 1.25)
    figures = {"tokens_per_s": 16 * float(shapes["tokens_mean"]) / median(ours.steps)}  # type: ignore[arg-type]
    if theirs is not None:
        figures["ratio_with_setup"] = _client_s(theirs) / _client_s(ours)
    return replace(
        step_row(LocalStep.name, bench.dtype_name, own, ours, rival, theirs, shapes), figures=figures, target=target
    )


def _client_s(times: StepTimes) -> float:
    """Seconds of a client of 25 steps, set-up included."""
    return median(times.setups) + CLIENT_STEPS * median(times.steps)


STAGE = LocalStep()
