"""A model under test against :class:`tools.gpu.reference.Reference`: logits, guard scores, losses, every gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from fedsim.attention.choice import problem
from fedsim.attention.forward import IMPLEMENTATIONS, Rows, packed_hidden, packed_logits
from fedsim.attention.head import head_logits
from fedsim.attention.prefix import candidate_logits, read_head
from fedsim.attention.spans import Spans, put
from fedsim.model import logprobs
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.parallel.sums import Summer
from fedsim.parallel.world import Lane
from fedsim.train.loop import StepSettings, Trainer, TrainingPlan
from fedsim.train.objectives import DpoObjective, Objective, SftObjective
from tools.bench.aggregation import relative
from tools.bench.cai_iteration import preferences
from tools.bench.gradients import Item, SeenGradient
from tools.bench.lengths import random_ids, token_row
from tools.gpu.reference import Reference
from tools.gpu.report import Report

BETA = 0.1
ODD = (1, 2, 3, 17, 64, 127, 130)
SHARED = 61  # tokens of the guard's head
TAILS = (1, 2, 17, 64, 65)


@dataclass(frozen=True)
class Tolerances:
    """The largest distances that pass, in one dtype.

    Attributes:
        logits: ‖Δ‖ / ‖reference‖ of a row's logits.
        probability: |Δ| of a probability, and of a drawn number from its token's interval.
        loss: of SFT, relative.
        preference_loss: of DPO, relative; it depends on small differences of long sums.
        gradient: ‖Δ‖ / ‖reference‖ of any one LoRA matrix.
        gap: log-probability by which a greedy token may lie below the reference's best one.
    """

    logits: float
    probability: float
    loss: float
    preference_loss: float
    gradient: float
    gap: float


# fp32 keeps 24 bits and bf16 8: rounding is 6e-8 and 4e-3 of a number, and grows over the layers.
TOLERANCES = {
    torch.float32: Tolerances(logits=1e-4, probability=1e-4, loss=1e-5, preference_loss=1e-4, gradient=1e-3, gap=1e-3),
    torch.bfloat16: Tolerances(logits=4e-2, probability=4e-2, loss=1e-2, preference_loss=0.1, gradient=0.2, gap=0.3),
}


@dataclass(frozen=True, eq=False)
class Sides:
    """A model under test and its reference, with the same weights and the same adapter.

    Attributes:
        model: with LoRA inside, in a flat adapter.
        start: the adapter's values.
        vocab_size: ids of rows lie below.
    """

    model: PeftModel
    adapter: FlatAdapter
    reference: Reference
    start: torch.Tensor
    vocab_size: int

    @property
    def base(self) -> PreTrainedModel:
        """The Hugging Face model inside."""
        base = self.model.get_base_model()
        assert isinstance(base, PreTrainedModel)
        return base

    @property
    def dtype(self) -> torch.dtype:
        """Of the base's weights."""
        return self.base.dtype

    @property
    def tolerances(self) -> Tolerances:
        """By dtype."""
        return TOLERANCES[self.dtype]

    @property
    def device(self) -> torch.device:
        """Of the model under test."""
        return self.base.device

    def reset(self) -> None:
        """Both adapters at the start."""
        self.adapter.load(self.start)
        self.reference.load(self.start)


def backends(sides: Sides) -> list[str]:
    """Attention backends that can be had here."""
    return [name for name in IMPLEMENTATIONS if problem(name, sides.base.config, sides.dtype, sides.device) is None]


@contextmanager
def attending(sides: Sides, name: str) -> Iterator[None]:
    """The model under test attends by one backend."""
    before = sides.base.config._attn_implementation
    sides.base.set_attn_implementation(IMPLEMENTATIONS[name])
    try:
        yield
    finally:
        sides.base.set_attn_implementation(before)


def check_all(report: Report, sides: Sides, of: str) -> None:
    """Forward and backward passes by every backend; one that breaks off fails, alone."""
    known = Known(sides)
    for name in backends(sides):
        what = f"{of}, {name}"
        for check in (_logits, _guard, _sft, _dpo):
            with report.guarding(f"{what}: {check.__name__.strip('_')} breaks off"), attending(sides, name):
                sides.reset()
                check(report, sides, known, what)


class Known:
    """Rows, and what the reference says of them, computed once."""

    def __init__(self, sides: Sides) -> None:
        vocab, reference = sides.vocab_size, sides.reference
        sides.reset()
        self.rows = [random_ids(length, vocab, "row", i) for i, length in enumerate(ODD)]
        head = random_ids(SHARED, vocab, "head")
        self.prompts = [head + random_ids(length, vocab, "tail", i) for i, length in enumerate(TAILS)]
        self.pair = random_ids(2, vocab, "pair")
        with torch.no_grad():
            self.logits = [reference.logits(row) for row in self.rows]
            self.verdicts = torch.stack([reference.logits(p)[-1, self.pair].softmax(-1)[1] for p in self.prompts]).cpu()
        self.batch = [
            token_row(p, r, vocab, "sft", i) for i, (p, r) in enumerate(((40, 30), (3, 1), (17, 64), (90, 5)))
        ]
        self.pairs = preferences(3, vocab)
        noise = torch.randn(sides.adapter.size, generator=torch.Generator().manual_seed(0)).to(sides.start.device)
        self.policy = sides.start + 0.01 * noise
        self.sft = reference.gradient(lambda: reference.sft_loss(self.batch))
        self.dpo = reference.gradient(lambda: reference.dpo_loss(self.pairs, sides.start, self.policy, BETA))


def _logits(report: Report, sides: Sides, known: Known, what: str) -> None:
    """All logits of packed rows, and the head on hidden states that are there already."""
    spans = Spans([len(row) for row in known.rows], device=sides.device)
    ids, every = put(
        [np.concatenate([np.asarray(row) for row in known.rows]), np.arange(spans.num_queries)], sides.device
    )
    sides.model.eval()
    with torch.no_grad():
        mine = packed_logits(sides.model, ids, spans.positions, Rows(spans), every)
        hidden = packed_hidden(sides.model, ids, spans.positions, Rows(spans))
        later = head_logits(sides.model, hidden)
        few = head_logits(sides.model, hidden, known.pair)
    true = torch.cat(known.logits)
    distance = worst(
        relative(part, row.to(part.device))
        for part, row in zip(mine.split(spans.query_lengths), known.logits, strict=True)
    )
    limit = sides.tolerances.logits
    report.add(f"{what}: logits of packed rows, ‖Δ‖ / ‖reference‖ of the worst row", distance, limit)
    report.add(f"{what}: the head alone, ‖Δ‖ / ‖reference‖", relative(later, true.to(later.device)), limit)
    some = true[:, known.pair].to(few.device)
    report.add(f"{what}: the head's rows of two tokens, ‖Δ‖ / ‖reference‖", relative(few, some), limit)


def _guard(report: Report, sides: Sides, known: Known, what: str) -> None:
    """Verdicts behind a shared head, and of whole prompts."""
    sides.model.eval()
    for shared in (SHARED, 0):
        head = read_head(sides.model, np.asarray(known.prompts[0][:shared], np.int32))
        tails = [np.asarray(prompt[shared:], np.int32) for prompt in known.prompts]
        mine = candidate_logits(sides.model, head, tails, known.pair).softmax(-1)[:, 1]
        where = "behind the shared head" if shared else "of whole prompts"
        error = worst((mine.double() - known.verdicts.double()).abs().tolist())
        report.add(f"{what}: guard's probability {where}, max |Δ|", error, sides.tolerances.probability)


def _sft(report: Report, sides: Sides, known: Known, what: str) -> None:
    """SFT by the trainer in exact and fast sums, and with the head in chunks."""
    whole = logprobs.MAX_LOGITS
    try:
        for how, exact, most in (
            ("exact sums", True, whole),
            ("fast sums", False, whole),
            ("head in chunks", False, 0),
        ):
            logprobs.MAX_LOGITS = most or 7 * sides.vocab_size  # type: ignore[misc]
            sides.adapter.load(sides.start)
            mine = step(sides, known.batch, SftObjective(), exact=exact)
            _compare(report, sides, mine, known.sft, f"{what}: SFT, {how}", sides.tolerances.loss)
    finally:
        logprobs.MAX_LOGITS = whole  # type: ignore[misc]


def _dpo(report: Report, sides: Sides, known: Known, what: str) -> None:
    sides.adapter.load(known.policy)
    mine = step(sides, known.pairs, DpoObjective(sides.adapter, sides.start, BETA), exact=True)
    _compare(report, sides, mine, known.dpo, f"{what}: DPO", sides.tolerances.preference_loss)


def step(sides: Sides, batch: Sequence[Item], objective: Objective[Item], *, exact: bool) -> tuple[float, torch.Tensor]:
    """Loss and gradient of a batch in micro-batches, as a run computes them; the adapter stays as it is."""
    seen = SeenGradient()
    trainer = Trainer(sides.base, sides.adapter, StepSettings(2, 1.0, 0.0, 0))
    plan = TrainingPlan([batch], lambda _: 0.0, ("gradient",), correction=seen)
    found = trainer.run(plan, objective, Lane(0, 1, Summer(None, exact=exact, device=sides.device)))
    assert seen.gradient is not None
    return found.losses[0], seen.gradient


def _compare(
    report: Report,
    sides: Sides,
    mine: tuple[float, torch.Tensor],
    true: tuple[float, torch.Tensor],
    what: str,
    limit: float,
) -> None:
    report.add(f"{what}: loss, relative", abs(mine[0] - true[0]) / abs(true[0]), limit)
    ours, theirs = mine[1].double().cpu(), true[1].double().cpu()
    errors = [relative(ours[s.start : s.stop], theirs[s.start : s.stop]) for s in sides.adapter.slots]
    name = f"{what}: gradient of each of {len(errors)} LoRA matrices, ‖Δ‖ / ‖reference‖ of the worst"
    report.add(name, worst(errors), sides.tolerances.gradient)


def worst(errors: object) -> float:
    """The largest; NaN if any is, which Python's max may lose."""
    return float(torch.tensor(list(errors), dtype=torch.float64).max())  # type: ignore[call-overload]
