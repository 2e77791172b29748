"""The phases that are rehearsed: the product's own code on 8B layer shapes, one function each.

All of the product that a rehearsal calls is imported here, so that a moved name is mended in one place. A phase yields
once: what comes before is preparation, what comes after is counted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import LlamaForCausalLM, PreTrainedModel

from fedsim.attention.choice import Choice
from fedsim.attention.forward import IMPLEMENTATIONS
from fedsim.attention.prefix import candidate_logits, read_head
from fedsim.base.ranks import Term
from fedsim.config import FederationConfig, LocalConfig, ServerOptimizerConfig, load_config
from fedsim.config.lora import LoraSettings
from fedsim.data.chat import TokenRow
from fedsim.federation.algorithms import RoundSums, build_algorithm
from fedsim.fused.choice import fuse
from fedsim.fused.joint import hold_adapters
from fedsim.generate.decode import Decoder, Request, _Row
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.model.load import attach_lora
from fedsim.model.shape import ModelShape, model_shape
from fedsim.parallel.sums import Summer
from fedsim.parallel.world import Lane
from fedsim.run.needs import memory_needs
from fedsim.safety.guard import units_of
from fedsim.train.client import ClientTrainer
from fedsim.train.loop import StepSettings, Trainer, TrainingPlan, TrainingStats
from fedsim.train.objectives import DpoObjective, Preference, SftObjective
from tools.bench.lengths import draw, random_ids, training_rows
from tools.bench.models import GPU, ModelSize

ROOT: Final = Path(__file__).resolve().parents[2]
CONFIG: Final = ROOT / "configs" / "paper" / "fedavg-filter-cai.yaml"
LAYERS: Final = int(GPU.config["num_hidden_layers"])
LORA: Final = LoraSettings(32, 64.0, 0.05, ("q_proj", "v_proj"))
GUARD_LORA: Final = LoraSettings(16, 32.0, 0.05, ("q_proj", "v_proj"))
WORLD, RANK = 4, 1
ROWS: Final = 16  # of a batch
MICRO: Final = 4  # rows of a micro-batch
CONTEXT: Final = 300  # tokens that stand in a slot
HEAD_TOKENS: Final = 190  # of the instruction that a guard's prompts begin with
BATCH_TOKENS: Final = 4096  # guard.batch_tokens of configs/paper
ADAPTER: Final = 13_631_488  # numbers of the paper's LoRA at 32 layers
STEP_TOKENS: Final = 1_716  # of the batch below

HIDDEN, WIDE = int(GPU.config["hidden_size"]), int(GPU.config["intermediate_size"])
HEADS, KEY_HEADS = int(GPU.config["num_attention_heads"]), int(GPU.config["num_key_value_heads"])
HEAD_SIZE: Final = HIDDEN // HEADS
LAYER_NUMBERS: Final = HIDDEN * (2 * HIDDEN + 2 * KEY_HEADS * HEAD_SIZE + 3 * WIDE)
"""Weights of a layer's matrices."""

VOCABULARY: Final = GPU.vocab_size
KV_BYTES: Final = 2 * 2 * KEY_HEADS * HEAD_SIZE
"""Keys and values of a token in one layer, in bf16."""


@dataclass(frozen=True)
class Work:
    """What no program can do without.

    Attributes:
        tokens: that go through the model; 0 where none do.
        flops: of bf16 products and attention.
        num_bytes: read or written once, such as the weights in a step of decoding.
    """

    tokens: int
    flops: float
    num_bytes: float


Steps = Generator[Work, None, None]
"""Yields once, between preparation and what is counted."""


@dataclass(frozen=True)
class Phase:
    """A phase by name.

    Attributes:
        run: made with a model.
        stage: of :func:`fedsim.run.needs.memory_needs`, whose bound the peak is held to; "": none.
        sizes: configuration keys with which that stage is as large as the phase.
        backend: attention.
        lora: of the model.
        is_step: nothing in it may wait for the device, or make it wait for the host.
        has_layers: whether its figures depend on the number of layers.
    """

    run: Callable[[Model], Steps]
    stage: str = ""
    sizes: tuple[str, ...] = ()
    backend: str = "varlen"
    lora: LoraSettings = LORA
    is_step: bool = True
    has_layers: bool = True


class Model:
    """An 8B-shaped model of some layers on the fake device or a real one, with LoRA in a flat adapter.

    Args:
        size: its shape but for the layers; the least work of a phase is that of Llama-3.1-8B in any case.

    Attributes:
        inner: the Hugging Face model, whose layers carry the adapters.
        vocabulary: number of tokens.
    """

    def __init__(self, num_layers: int, lora: LoraSettings, device: torch.device, size: ModelSize = GPU) -> None:
        config = replace(size, config={**size.config, "num_hidden_layers": num_layers}).llama()
        config._attn_implementation = IMPLEMENTATIONS["sdpa"]
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with device:
                base = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
        base.requires_grad_(False)
        self.num_layers = num_layers
        self.vocabulary = size.vocab_size
        self.device = device
        self.model = _attached(base.eval(), lora, device)
        fuse(self.model, with_trials=False)  # there are no numbers to compare
        self.adapter = FlatAdapter(self.model)
        inner = self.model.get_base_model()
        assert isinstance(inner, PreTrainedModel)
        self.inner = inner

    def take(self, backend: str) -> None:
        """Compute attention by ``backend`` from now on."""
        self.inner.config._attn_implementation = IMPLEMENTATIONS[backend]

    def tensors(self) -> Iterator[torch.Tensor]:
        """What lies in memory between steps."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        yield self.adapter.values
        yield self.adapter.grad

    def vector(self) -> torch.Tensor:
        """A vector as long as the adapter, fp32."""
        return torch.empty_like(self.adapter.values)

    def product_flops(self, tokens: float, passes: float) -> float:
        """FLOPs of the layers' matrices: 1 pass is forward, 2 with the backward pass to the inputs."""
        return 2 * passes * tokens * LAYER_NUMBERS * self.num_layers

    def head_flops(self, tokens: float, passes: float) -> float:
        """The same of the LM head."""
        return 2 * passes * tokens * HIDDEN * VOCABULARY

    def attention_flops(self, lengths: Sequence[int], passes: float, before: int = 0) -> float:
        """Two products over all pairs of a row; ``before``: positions of each row that are read already."""
        pairs = sum(n * (n + 1) / 2 + n * before for n in lengths)
        return 4 * passes * pairs * HEADS * HEAD_SIZE * self.num_layers

    @property
    def weight_bytes(self) -> float:
        """Of the layers' matrices and the head, in bf16."""
        return 2.0 * (LAYER_NUMBERS * self.num_layers + HIDDEN * VOCABULARY)


def label(name: str, module: torch.nn.Module) -> str | None:
    """The part of a Llama that a module's operators are booked under."""
    kind = type(module).__name__
    if "RMSNorm" in kind:
        return "RMSNorm"
    if isinstance(module, LoraLayer) or ".lora_" in name:
        return "LoRA"
    if "Rotary" in kind or "Attention" in kind:
        return "attention, RoPE"
    if "MLP" in kind:
        return "SwiGLU"
    if "DecoderLayer" in kind:
        return "residuals"
    if isinstance(module, torch.nn.Linear):
        return "head" if name.endswith("lm_head") else "linear"
    return "embedding" if isinstance(module, torch.nn.Embedding) else None


def _attached(base: PreTrainedModel, lora: LoraSettings, device: torch.device) -> PeftModel:
    """LoRA that is made on the device: PEFT moves it there, which fake tensors cannot."""
    real = torch.nn.Module._apply
    torch.nn.Module._apply = lambda self, fn, recurse=True: self  # type: ignore[method-assign]
    try:
        with device:
            return attach_lora(base, lora)
    finally:
        torch.nn.Module._apply = real  # type: ignore[method-assign]


@cache
def _group() -> dist.ProcessGroup:
    """torch's "fake" process group: rank 1 of 4, whose collectives return at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if not dist.is_initialized():
        dist.init_process_group("fake", rank=RANK, world_size=WORLD, store=FakeStore())
    group = dist.group.WORLD
    assert group is not None
    return group


def _lane(model: Model, *, exact: bool = False, wide: bool = False) -> Lane:
    group = _group() if wide else None
    return Lane(RANK if wide else 0, WORLD if wide else 1, Summer(group, exact=exact, device=model.device))


def _trainer(model: Model) -> Trainer:
    return Trainer(model.inner, model.adapter, StepSettings(MICRO, 1.0, 0.0, 0))


def _rows(model: Model) -> list[TokenRow]:
    rows = training_rows(ROWS, model.vocabulary)
    assert sum(map(len, rows)) == STEP_TOKENS
    return rows


def sft(model: Model, *, algorithm: str = "fedavg", exact: bool = False, wide: bool = False) -> Steps:
    """A client's step on 16 rows, 110 tokens long in the mean."""
    rows, objective, trainer = _rows(model), SftObjective(), _trainer(model)
    federation = build_algorithm(FederationConfig(algorithm=algorithm), ServerOptimizerConfig())
    state = federation.start(model.vector())
    correction = federation.correction(state, model.vector() if federation.has_control else None)
    plan = TrainingPlan([rows], lambda step: 5e-5, ("local", 0, 0), correction, longest=512)
    lane = _lane(model, exact=exact, wide=wide)
    model.model.train()
    lengths = [objective.num_inputs([row]) for row in rows]
    share = 1 / lane.size
    yield Work(
        round(sum(lengths) * share),
        share
        * (
            model.product_flops(sum(lengths), 2)
            + model.head_flops(objective.num_targets(rows), 2)
            + model.attention_flops(lengths, 3)
        ),
        model.weight_bytes,
    )
    trainer._step(0, rows, plan, objective, lane)


def dpo(model: Model) -> Steps:
    """A DPO step on 16 pairs of 200-token rows: policy and reference."""
    chosen = training_rows(ROWS, model.vocabulary, prompt_mean=110, reply_mean=90)
    rejected = training_rows(ROWS, model.vocabulary, prompt_mean=110, reply_mean=60, seed=1)
    pairs = [Preference(*pair) for pair in zip(chosen, rejected, strict=True)]
    objective = DpoObjective(model.adapter, model.adapter.copy(), 0.1)
    trainer, lane = _trainer(model), _lane(model)
    plan = TrainingPlan([pairs], lambda step: 5e-5, ("dpo", 0), longest=4 * 1024)
    model.model.eval()
    lengths = [len(row) - 1 for row in [*chosen, *rejected]]
    yield Work(
        sum(lengths),
        model.product_flops(sum(lengths), 3)
        + model.head_flops(objective.num_targets(pairs), 3)
        + model.attention_flops(lengths, 4),
        model.weight_bytes,
    )
    trainer._step(0, pairs, plan, objective, lane)


def client(model: Model) -> Steps:
    """A SCAFFOLD client of one step: the global adapter in, control variates and delta out."""
    federation = build_algorithm(FederationConfig(algorithm="scaffold"), ServerOptimizerConfig())
    local = LocalConfig(steps=1, batch_size=ROWS, micro_batch_size=MICRO)
    trainer = _trainer(model)
    _answer_stats(trainer)
    clients = ClientTrainer(trainer, federation, SftObjective(), local, 1, 3, 0)
    state = federation.start(model.vector())
    control = torch.zeros(model.adapter.size)  # kept on the host
    rows = _rows(model)
    yield Work(0, 0.0, 0.0)
    clients.train(0, rows, 1, state, control, _lane(model))


def _answer_stats(trainer: Trainer) -> None:
    """Answer for the device what is read once, after all steps."""

    def stats(rows: Sequence[Any], plan: Any, objective: Any) -> TrainingStats:
        return TrainingStats([0.0] * len(rows), {}, 1)

    trainer._stats = stats  # type: ignore[method-assign]


def guard_unit(model: Model) -> Steps:
    """A unit of guard scoring: tails of 170 tokens in the mean behind a common head that is read already."""
    model.model.eval()
    lengths = [60 + reply for reply in draw("prompt", 1000, 110.0)]
    units = units_of(lengths, BATCH_TOKENS)
    unit = [lengths[i] for i in units[len(units) // 2]]
    with hold_adapters(model.inner):
        yield from _guard_unit(model, unit)


def _guard_unit(model: Model, unit: list[int]) -> Steps:
    head = read_head(model.inner, np.arange(HEAD_TOKENS))
    tails = [np.arange(length) for length in unit]
    last = 2 * LAYER_NUMBERS * (sum(unit) - len(unit))  # the last layer computes keys and values of all tokens
    last -= 2 * 2 * HIDDEN * KEY_HEADS * HEAD_SIZE * (sum(unit) - len(unit))
    yield Work(
        sum(unit),
        model.product_flops(sum(unit), 1)
        - last
        + model.attention_flops(unit, 1, HEAD_TOKENS) * (1 - 1 / model.num_layers),
        model.weight_bytes - 2 * HIDDEN * VOCABULARY,
    )
    candidate_logits(model.inner, head, tails, [5, 6])


def _decoder(model: Model, num_rows: int) -> Decoder:
    model.model.eval()
    ends = frozenset({1, 2})
    return Decoder(model.inner, num_rows, max_new_tokens=64, eos_ids=ends, graphs=None, block=8)


def prefill(model: Model) -> Steps:
    """A pass that reads as many 300-token prompts as it may hold, into slots that are there already."""
    decoder = _decoder(model, 64)
    prompts = [random_ids(CONTEXT, model.vocabulary, "prompt", i) for i in range(64)]
    decoder._rows = [_Row(i, Request(ids, i, 32, 1.0)) for i, ids in enumerate(prompts)]
    with hold_adapters(model.inner), torch.inference_mode():
        decoder._reserve(CONTEXT)
        decoder._read_in()  # makes the slots
        before = decoder._num_active
        num_rows = 8192 // CONTEXT
        yield Work(
            num_rows * CONTEXT,
            model.product_flops(num_rows * CONTEXT, 1)
            + model.head_flops(num_rows, 1)
            + model.attention_flops([CONTEXT] * num_rows, 1),
            model.weight_bytes,
        )
        decoder._read_in()
        assert decoder._num_active - before == num_rows


def decode(model: Model, num_rows: int) -> Steps:
    """One step of decoding with 300 tokens in each slot."""
    decoder = _decoder(model, num_rows)
    with hold_adapters(model.inner), torch.inference_mode():
        decoder.slots.reserve(CONTEXT + 10)
        decoder.slots.lengths = [CONTEXT] * num_rows
        decoder._kinds = {True}  # rows draw
        decoder._step(num_rows, CONTEXT + 1)  # makes the slots
        cache_bytes = KV_BYTES * model.num_layers * num_rows * CONTEXT
        yield Work(
            num_rows,
            model.product_flops(num_rows, 1) + model.head_flops(num_rows, 1),
            model.weight_bytes + cache_bytes,
        )
        decoder._step(num_rows, CONTEXT + 1)


def sums(model: Model, *, exact: bool) -> Steps:
    """A round's sum of two clients on this rank, over four ranks, and the server's step."""
    federation = build_algorithm(FederationConfig(algorithm="fedavg"), ServerOptimizerConfig())
    deltas = [torch.empty(ADAPTER, device=model.device) for _ in range(2)]
    state = federation.start(torch.empty(ADAPTER, device=model.device))
    summer = Summer(_group(), exact=exact, device=model.device)
    yield Work(0, 0.0, 4.0 * ADAPTER * (2 + 2))  # two deltas and x in, x out
    (total,) = summer.sum([[Term(deltas[0], 0.2), Term(deltas[1], 0.3)]], [ADAPTER], 5)
    federation.server_step(state, RoundSums(total, 1.0, None, 20))


TRAINING: Final = (f"local.max_length={-(-STEP_TOKENS // MICRO)}",)
DECODING: Final = ("eval.max_new_tokens=5", "local.max_length=300", "cai.iterations=0")

PHASES: Final[Mapping[str, Phase]] = {
    "SFT step": Phase(sft, "local training", TRAINING),
    "SFT step, sdpa": Phase(sft, "local training", TRAINING, backend="sdpa"),
    "SFT step, exact": Phase(lambda m: sft(m, exact=True), "local training", (*TRAINING, "parallel.exact=true")),
    "SFT step, lane of 4": Phase(lambda m: sft(m, wide=True), "local training", TRAINING),
    "SCAFFOLD step": Phase(lambda m: sft(m, algorithm="scaffold"), "local training", TRAINING),
    "FedProx step": Phase(lambda m: sft(m, algorithm="fedprox"), "local training", TRAINING),
    "SCAFFOLD client": Phase(client, "local training", TRAINING, is_step=False),
    "DPO step": Phase(dpo, "CAI (DPO)", (f"cai.max_length={-(-5888 // (2 * MICRO))}",)),
    "guard unit": Phase(guard_unit, "guard scoring", lora=GUARD_LORA, is_step=False),
    "guard unit, sdpa": Phase(guard_unit, "guard scoring", backend="sdpa", lora=GUARD_LORA, is_step=False),
    "prefill": Phase(prefill, "generation", DECODING),
    "decode, 64 rows": Phase(lambda m: decode(m, 64), "generation", DECODING),
    "decode, 64 rows, sdpa": Phase(lambda m: decode(m, 64), "generation", DECODING, backend="sdpa"),
    "decode, 128 rows": Phase(lambda m: decode(m, 128), "generation", (*DECODING, "eval.batch_size=128")),
    "exact sum": Phase(lambda m: sums(m, exact=True), is_step=False, has_layers=False),
    "fast sum": Phase(lambda m: sums(m, exact=False), is_step=False, has_layers=False),
}


@cache
def needed(phase: Phase) -> int | None:
    """Bytes that ``memory_needs`` gives for the stage at the phase's size, at 32 layers; None without a stage."""
    if not phase.stage:
        return None
    choice = Choice(phase.backend, "")
    shapes = {"model": replace(_shape(LORA), attention=choice), "guard": replace(_shape(GUARD_LORA), attention=choice)}
    config = load_config(CONFIG, ["model.path=/model", "guard.path=/guard", *phase.sizes])
    return next(n.num_bytes for n in memory_needs(config, shapes, WORLD) if n.stage == phase.stage)


@cache
def _shape(lora: LoraSettings) -> ModelShape:
    """Sizes of the whole model. It is measured as on a CPU: no device is asked whether it can have a backend."""
    with tempfile.TemporaryDirectory() as folder:
        GPU.llama().save_pretrained(folder)
        cpu = torch.device("cpu")
        return model_shape(Path(folder), lora, dtype="bfloat16", attention="sdpa", device=cpu, key="model.path")


@contextmanager
def steps(phase: Phase, model: Model) -> Iterator[tuple[Work, Callable[[], None]]]:
    """The phase prepared: its least work, and what runs it."""
    model.take(phase.backend)
    running = phase.run(model)
    work = next(running)

    def run() -> None:
        if next(running, None) is not None:
            raise AssertionError("a phase yields once")

    try:
        yield work, run
    finally:
        running.close()
