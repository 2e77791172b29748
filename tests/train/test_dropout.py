"""Keyed dropout: draws are a micro-batch's own, and dropout is what it is in the textbook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from fedsim.attention.forward import IMPLEMENTATIONS
from fedsim.base.errors import ModelError
from fedsim.config.lora import LoraSettings
from fedsim.data.batch import collate
from fedsim.data.chat import TokenRow
from fedsim.fused.functions import DropoutMask
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.model.load import LoadedModel, attach_lora
from fedsim.model.logprobs import _HEAD_START, target_logprobs
from fedsim.train.dropout import KeyedDropout, LoraDropout, Masked, Part
from fedsim.train.loop import StepSettings, Trainer, TrainingPlan
from fedsim.train.objectives import SftObjective

Make = Callable[..., tuple[LoadedModel, FlatAdapter]]
Rows = Callable[..., list[TokenRow]]
CPU = torch.device("cpu")


def mask(found: DropoutMask | None) -> torch.Tensor:
    assert isinstance(found, Masked)
    return found.kept


def test_draws_do_not_depend_on_what_shares_the_pass() -> None:
    """Two layers, of different width, draw one after the other, and then the head for the tokens before targets."""
    draws = KeyedDropout(CPU)
    parts = [Part(7, 5, 4), Part(8, 3, 0), Part(9, 1, 1)]

    def masks(chosen: list[Part]) -> list[torch.Tensor]:
        draws.begin(chosen)
        tokens, targets = sum(p.num_tokens for p in chosen), sum(p.num_targets for p in chosen)
        layers = [mask(draws.draw(tokens, width, 0.3)) for width in (40, 64)]
        return [*layers, mask(draws.draw_of_head(targets, 40, 0.3))]

    alone = [masks([part]) for part in parts]
    for layer, together in enumerate(masks(parts)):
        assert torch.equal(together, torch.cat([one[layer] for one in alone]))
    assert not torch.equal(alone[0][0][:3], alone[1][0]), "each has draws of its own"
    draws.begin(parts)
    assert draws.draw(8, 4, 0.3) is None and draws.draw_of_head(6, 4, 0.3) is None


def test_a_layer_sees_its_tokens_in_any_shape() -> None:
    """A mixture of experts hands its tokens on without the batch's dimension."""
    draws = KeyedDropout(CPU)
    layer = LoraDropout(0.3, draws)
    outs = []
    for shape in ((9, 40), (1, 9, 40)):
        draws.begin([Part(7, 9, 0)])
        outs.append(layer(torch.ones(shape)))
    assert outs[1].shape == (1, 9, 40) and torch.equal(outs[0], outs[1][0])


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws by counters, as on CUDA, computed in plain torch."""
    monkeypatch.setattr("fedsim.train.dropout.runs_fused", lambda device: True)


@pytest.mark.usefixtures("counted")
def test_counted_draws_belong_to_micro_batch_token_column_and_layer() -> None:
    """Whatever shares the pass, and made again as they were; chunks of the head's are pieces of the whole."""
    draws = KeyedDropout(CPU)
    parts = [Part(7, 5, 4), Part(1 << 62, 3, 0), Part(9, 1, 1)]

    def kept(chosen: list[Part]) -> list[torch.Tensor]:
        draws.begin(chosen)
        tokens, targets = sum(p.num_tokens for p in chosen), sum(p.num_targets for p in chosen)
        layers = [(tokens, draws.draw(tokens, width, 0.3), width) for width in (41, 41, 64)]
        made = [*layers, (targets, draws.draw_of_head(targets, 41, 0.3), 41)]
        for number, draw, width in made:
            assert draw is not None
            assert torch.equal(draw.apply(torch.ones(number, width)), draw.apply(torch.ones(number, width)))
        return [draw.apply(torch.ones(number, width)) for number, draw, width in made if draw is not None]

    alone = [kept([part]) for part in parts]
    together = kept(parts)
    for layer, whole in enumerate(together):
        assert torch.equal(whole, torch.cat([one[layer] for one in alone]))
    assert len({draw[:4].numpy().tobytes() for draw in (together[0], together[1], together[3])}) == 3
    token = _HEAD_START.set(2)
    try:
        chunk = draws.draw_of_head(3, 41, 0.3)
    finally:
        _HEAD_START.reset(token)
    assert chunk is not None and torch.equal(chunk.apply(torch.ones(3, 41)), together[3][2:])
    assert draws.draw(8, 4, 0.3) is None and draws.draw_of_head(6, 4, 0.3) is None


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("p", [0.05, 0.2, 0.7])
def test_counted_dropout_is_inverted_dropout(p: float) -> None:
    """The share within 5 standard deviations; a gradient takes the value's way."""
    draws = KeyedDropout(CPU)
    layer = LoraDropout(p, draws)
    draws.begin([Part(1, 300, 0), Part(2, 200, 0)])
    x = torch.ones(1, 500, 202, requires_grad=True)
    out = layer(x)
    assert set(out.unique().tolist()) == {0.0, float(torch.tensor(1 / (1 - p)))}
    share = float((out == 0).double().mean())
    assert abs(share - p) < 5 * (p * (1 - p) / out.numel()) ** 0.5
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
    columns, rows = (out == 0).double().mean(dim=(0, 1)), (out == 0).double().mean(dim=(0, 2))
    assert float((columns - p).abs().max()) < 5.5 * (p * (1 - p) / 500) ** 0.5
    assert float((rows - p).abs().max()) < 5.5 * (p * (1 - p) / 202) ** 0.5


def test_inverted_dropout() -> None:
    """A share of p is zero, the rest is scaled so that the mean stays; gradients go the same way."""
    draws = KeyedDropout(CPU)
    layer = LoraDropout(0.2, draws)
    draws.begin([Part(1, 500, 0)])
    x = torch.ones(1, 500, 200, requires_grad=True)
    out = layer(x)
    assert set(out.unique().tolist()) == {0.0, 1.25}
    assert float((out == 0).double().mean()) == pytest.approx(0.2, abs=0.005)  # 4 standard deviations of 100,000 draws
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
    assert layer.eval()(x) is x


def test_only_loras_dropout_is_replaced_and_trainers_share_it(
    make_adapted: Make, make_rows: Rows, one_lane: type
) -> None:
    """A second trainer of the same model takes nothing away from the first."""
    assert KeyedDropout.install(make_adapted(dropout=0.0)[0].base) is None
    loaded, flat = make_adapted(dropout=0.3, std=0.1)
    start = flat.copy()
    first = Trainer(loaded.base, flat, StepSettings(4, 0.0, 0.0, 0))
    plan = TrainingPlan([make_rows(8)], lambda step: 1e-3, ("x",))
    want = first.run(plan, SftObjective(), one_lane()).losses
    second = Trainer(loaded.base, flat, StepSettings(4, 0.0, 0.0, 0))
    for trainer in (first, second):
        flat.load(start)
        assert trainer.run(plan, SftObjective(), one_lane()).losses == want
    found = [module for module in loaded.base.modules() if isinstance(module, LoraDropout)]
    assert len(found) == 4 and len({m.draws for m in found}) == 1 and all(m.p == 0.3 for m in found)
    assert not any(module.training for module in loaded.base.modules()), "the mode is kept"


class Spy:
    """The mask that each LoRA layer has used, by its path, in the order of calls."""

    def __init__(self, model: nn.Module) -> None:
        self.masks: dict[str, list[torch.Tensor]] = {}
        for module in model.modules():
            if isinstance(module, LoraDropout):
                module.register_forward_hook(self.look)

    def look(self, module: LoraDropout, inputs: Any, out: torch.Tensor) -> None:
        self.masks.setdefault(module.path, []).append((out != 0).flatten(0, -2))


def losses(
    made: tuple[LoadedModel, FlatAdapter], rows: list[TokenRow], lane: Any, longest: int = 0
) -> tuple[list[float], torch.Tensor]:
    trainer = Trainer(made[0].base, made[1], StepSettings(3, 0.0, 0.0, 0))
    plan = TrainingPlan([rows[:6], rows[6:]], lambda step: 1e-3, ("x",), longest=longest)
    return trainer.run(plan, SftObjective(), lane).losses, made[1].grad.clone()


def test_each_step_micro_batch_stage_and_seed_has_draws_of_its_own(
    make_adapted: Make, make_rows: Rows, one_lane: type
) -> None:
    """The same row in every place, and a learning rate of 0: only the draws can differ."""
    (row,) = make_rows(1)
    seen = []
    for seed, key in ((0, ("local", 1, 2)), (1, ("local", 1, 2)), (0, ("local", 2, 2)), (0, ("local", 1, 3))):
        loaded, flat = make_adapted(std=0.1, dropout=0.3)
        trainer = Trainer(loaded.base, flat, StepSettings(1, 0.0, 0.0, seed))
        spy = Spy(loaded.base)
        trainer.run(TrainingPlan([[row, row]] * 3, lambda step: 0.0, key), SftObjective(), one_lane())
        for masks in spy.masks.values():
            assert len(masks) == 6, "two micro-batches in each of three steps"
        seen += next(iter(spy.masks.values()))
    assert len({mask.numpy().tobytes() for mask in seen}) == len(seen) == 24


@pytest.mark.parametrize("bf16", [False, True])
def test_a_head_in_chunks_draws_the_same_twice_and_as_a_whole_one(
    make_adapted: Make, make_rows: Rows, one_lane: type, monkeypatch: pytest.MonkeyPatch, bf16: bool
) -> None:
    """LoRA on lm_head: what a chunk drops is the same in the forward pass, computed again, and without chunks."""
    rows = make_rows(6)

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        loaded, flat = make_adapted(std=0.1, dropout=0.3, targets=("q_proj", "lm_head"))
        if bf16:  # PEFT's fp32 copy of the head's input is no view of it
            for parameter in loaded.base.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()
        draws = KeyedDropout.install(loaded.base)
        assert draws is not None
        spy = Spy(loaded.base.train())
        objective = SftObjective()
        draws.begin([Part(5, objective.num_inputs(rows), objective.num_targets(rows))])
        values = target_logprobs(loaded.base, collate(rows, CPU))
        values.sum().backward()
        return flat.grad.clone(), spy.masks["lm_head"]

    whole, (mask_of_all,) = run()
    monkeypatch.setattr("fedsim.model.logprobs.MAX_LOGITS", 261 * 7)
    chunked, masks = run()
    half = len(masks) // 2
    assert half > 2 and torch.equal(torch.cat(masks[:half]), mask_of_all)
    again = sorted(masks[half:], key=lambda m: [bool((m[0] == f[0]).all()) for f in masks[:half]].index(True))
    assert torch.equal(torch.cat(again), mask_of_all)
    assert float((whole - chunked).norm() / whole.norm()) < (1e-2 if bf16 else 1e-5)


@pytest.mark.parametrize(
    "targets", [("q_proj", "lm_head"), ("lm_head",), ("q_proj", "o_proj", "gate_proj", "down_proj")]
)
def test_any_target_draws_the_same_whatever_shares_a_pass(
    make_adapted: Make, make_rows: Rows, one_lane: type, targets: tuple[str, ...]
) -> None:
    rows = make_rows(13)
    (want, gradient), (got, other) = (
        losses(make_adapted(std=0.1, dropout=0.3, targets=targets), rows, one_lane(exact), longest)
        for exact, longest in ((True, 0), (False, 1000))
    )
    assert got == pytest.approx(want, rel=1e-6)
    assert float((gradient - other).norm() / gradient.norm()) < 1e-4
    plain, _ = losses(make_adapted(std=0.1, targets=targets), rows, one_lane())
    assert plain != pytest.approx(want, rel=1e-4), "something is dropped"


def moe(targets: tuple[str, ...]) -> tuple[LoadedModel, FlatAdapter]:
    torch.manual_seed(0)
    base = Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            vocab_size=261, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, moe_intermediate_size=16, shared_expert_intermediate_size=24, num_experts=4,
            num_experts_per_tok=2, attn_implementation=IMPLEMENTATIONS["sdpa"], initializer_range=0.2,
        )
    ).eval()  # fmt: skip
    model = attach_lora(base.requires_grad_(False), LoraSettings(4, 8.0, 0.3, targets))
    flat = FlatAdapter(model)
    flat.load(torch.randn(flat.size, generator=torch.Generator().manual_seed(0)) * 0.1)
    return LoadedModel(model, None), flat  # type: ignore[arg-type]


def test_a_shared_expert_sees_all_tokens(make_rows: Rows, one_lane: type) -> None:
    """It gets them ``[tokens, width]``."""
    rows = make_rows(13)
    want, got = (losses(moe(("q_proj", "up_proj")), rows, one_lane(e), n)[0] for e, n in ((True, 0), (False, 1000)))
    assert got == pytest.approx(want, rel=1e-5)


class Routed(nn.Module):
    """An MLP with experts of which each sees some tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.ModuleDict({"up_proj": nn.Linear(width, width)}) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([e["up_proj"](part) for e, part in zip(self.experts, x.chunk(2, dim=1), strict=True)], dim=1)


class Halved(nn.Module):
    """A layer that sees half of the tokens without saying so."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.up_proj(x[:, : x.shape[1] // 2]).sum()


@pytest.mark.parametrize(("kind", "where"), [(Routed, "layers.1.mlp.experts.0.up_proj is an expert"),
                                             (Halved, "layers.1.mlp.up_proj sees other tokens")])  # fmt: skip
def test_a_layer_that_sees_only_some_tokens_is_refused(
    make_llama: Callable[..., Any], make_rows: Rows, one_lane: type, kind: type[nn.Module], where: str
) -> None:
    """Experts when the trainer is made, before any work."""
    base = make_llama()
    for layer in base.model.layers[1:]:
        layer.mlp = kind(32)
    model = attach_lora(base.requires_grad_(False), LoraSettings(4, 8.0, 0.3, ("up_proj",)))
    with pytest.raises(ModelError, match=rf"lora_targets: 'up_proj'.*{where}.*leave 'up_proj' out.*lora_dropout=0"):
        trainer = Trainer(base, FlatAdapter(model), StepSettings(4, 0.0, 0.0, 0))
        assert kind is Halved
        trainer.run(TrainingPlan([make_rows(4)], lambda step: 1e-3, ("x",)), SftObjective(), one_lane())
