"""Which layers are fused: whole models of several families compute what they did, and what differs stays as it is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from fedsim.attention.forward import IMPLEMENTATIONS
from fedsim.base.ranks import OneRank
from fedsim.config.lora import LoraSettings
from fedsim.data.batch import collate
from fedsim.data.chat import TokenRow
from fedsim.fused import choice, ops
from fedsim.fused.choice import fuse, fuse_layers
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.model.load import attach_lora
from fedsim.model.logprobs import target_logprobs
from fedsim.train.dropout import KeyedDropout, Part
from fedsim.train.objectives import SftObjective

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "vocab_size": 261, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HEADS = {"head_dim": 8, "query_pre_attn_scalar": 8}
SINGLE = {"norms": 5, "feed-forward parts": 2, "rotations": 2, "LoRA layers": 4, "decoder layers": 2}
WHOLE = {**SINGLE, "joint feed-forward products": 2, "joint attention products": 2}
# Gemma's norms are of 1 + weight, its feed-forward part has GELU, its layers four norms.
FAMILIES: dict[str, tuple[PretrainedConfig, dict[str, int]]] = {
    "llama": (LlamaConfig(**SMALL), WHOLE),
    "llama with biases": (LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True), WHOLE),
    "mistral": (MistralConfig(**SMALL, sliding_window=6), WHOLE),
    "qwen2": (Qwen2Config(**SMALL), WHOLE),
    "qwen3": (  # norms of queries and keys come before their rotation
        Qwen3Config(**SMALL, head_dim=8),
        {**SINGLE, "norms": 9, "joint feed-forward products": 2},
    ),
    "llama with GELU": (
        LlamaConfig(**SMALL, hidden_act="gelu"),
        {name: n for name, n in WHOLE.items() if "feed-forward" not in name},
    ),
    "opt": (  # its decoder layers are decorated as Llama's are, and are others
        OPTConfig(
            **{
                name: value for name, value in SMALL.items() if name not in ("intermediate_size", "num_key_value_heads")
            },
            ffn_dim=48,
            word_embed_proj_dim=32,
            dropout=0.0,
        ),
        {"LoRA layers": 4},
    ),
    "gemma2": (Gemma2Config(**SMALL, **HEADS), {"rotations": 2, "LoRA layers": 4}),
    "gemma3": (Gemma3TextConfig(**SMALL, **HEADS), {"rotations": 2, "LoRA layers": 4}),
}


def random_rows(num: int) -> list[TokenRow]:
    """Rows of 6 to 40 tokens, of which some last ones are targets."""
    draws = np.random.default_rng(num)
    lengths = [int(draws.integers(6, 40)) for _ in range(num)]
    starts = [int(draws.integers(1, length)) for length in lengths]
    return [
        TokenRow(draws.integers(0, 250, length).astype(np.int32), np.arange(length) >= start)
        for length, start in zip(lengths, starts, strict=True)
    ]


def made(
    config: PretrainedConfig, dtype: torch.dtype = torch.float32, targets: tuple[str, ...] = ("q_proj", "v_proj")
) -> tuple[Any, FlatAdapter]:
    """A random model with LoRA of random values and dropout; its norms' weights are random too."""
    config._attn_implementation = IMPLEMENTATIONS["eager" if "Gemma2" in type(config).__name__ else "sdpa"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for name, parameter in base.named_parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape).to(dtype) if "norm" in name else 0)
        model = attach_lora(base.requires_grad_(False), LoraSettings(4, 6.0, 0.3, targets))
        adapter = FlatAdapter(model)
        adapter.values.copy_(0.3 * torch.randn(adapter.size))
    return model, adapter


def outcome(model: Any, adapter: FlatAdapter, rows: list[TokenRow]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of targets, and the adapter's gradient, with dropout."""
    draws, objective = KeyedDropout.install(model.get_base_model()), SftObjective()
    assert draws is not None
    model.train()
    adapter.grad.zero_()
    draws.begin([Part(5, objective.num_inputs(rows), objective.num_targets(rows))])
    found = target_logprobs(model, collate(rows, CPU))
    found.sum().backward()
    return found.detach(), adapter.grad.clone()


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_computes_what_it_did(name: str) -> None:
    """Value and gradient with the same dropout, to the rounding of fp32; in bf16 no further off than plain."""
    config, wanted = FAMILIES[name]
    rows = random_rows(5)
    plain = outcome(*made(config), rows)
    model, adapter = made(config)
    assert dict(fuse_layers(model).taken) == wanted
    for found, right in zip(outcome(model, adapter, rows), plain, strict=True):
        assert distance(found, right) < 1e-5
    rough = outcome(*made(config, torch.bfloat16), rows)
    model, adapter = made(config, torch.bfloat16)
    assert dict(fuse_layers(model).taken) == wanted
    for found, before, right in zip(outcome(model, adapter, rows), rough, plain, strict=True):
        assert distance(found, right) < 1.5 * distance(before, right) + 4e-3


@pytest.mark.parametrize("targets", [("gate_proj", "up_proj", "down_proj"), ("q_proj", "k_proj", "o_proj", "lm_head")])
def test_any_target_of_lora(targets: tuple[str, ...]) -> None:
    config, rows = FAMILIES["llama"][0], random_rows(5)
    plain = outcome(*made(config, targets=targets), rows)
    model, adapter = made(config, targets=targets)
    fuse_layers(model)
    for found, right in zip(outcome(model, adapter, rows), plain, strict=True):
        assert distance(found, right) < 1e-5


def test_lora_that_comes_after_the_choice_is_not_passed_over() -> None:
    """A fused feed-forward part looks at its layers when it runs."""
    config, rows, targets = FAMILIES["llama"][0], random_rows(5), ("gate_proj", "down_proj")
    plain = outcome(*made(config, targets=targets), rows)
    model, adapter = made(config, targets=targets)
    adapted = dict(model.named_modules())
    feed = adapted["base_model.model.model.layers.0.mlp"]
    layers = feed.gate_proj, feed.down_proj
    feed.gate_proj, feed.down_proj = (layer.base_layer for layer in layers)
    fuse_layers(model)
    feed.gate_proj, feed.down_proj = layers
    for found, right in zip(outcome(model, adapter, rows), plain, strict=True):
        assert distance(found, right) < 1e-5


def test_evaluation_and_switched_off_adapters() -> None:
    batch = collate(random_rows(3), CPU)
    (plain, _), (model, _) = made(FAMILIES["llama"][0]), made(FAMILIES["llama"][0])
    fuse_layers(model)
    with torch.no_grad():
        for one in (plain, model):
            one.eval()
        wanted = target_logprobs(plain, batch)
        assert distance(target_logprobs(model, batch), wanted) < 1e-6
        with plain.disable_adapter(), model.disable_adapter():
            bare = target_logprobs(plain, batch)
            assert distance(target_logprobs(model, batch), bare) < 1e-6 < distance(bare, wanted)


@pytest.mark.parametrize("change", [{"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}])
def test_other_kinds_of_lora(change: dict[str, bool]) -> None:
    """DoRA and biases stay plain; another scale is only another number."""
    base = AutoModelForCausalLM.from_config(FAMILIES["llama"][0]).requires_grad_(False)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **change))
    assert fuse_layers(model).taken["LoRA layers"] == (2 if "use_rslora" in change else 0)


def test_a_second_adapter_takes_the_plain_way() -> None:
    """PEFT's own forward pass stays within reach for whatever a fused one does not know."""
    model, _ = made(FAMILIES["llama"][0])
    layer: Any = next(m for m in model.modules() if type(m).__name__ == "Linear" and hasattr(m, "lora_A"))
    x, plain = torch.randn(3, 32), layer.forward
    fuse_layers(model)
    model.eval()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter("other")
    assert torch.equal(layer(x), plain(x))


class ScaledRMSNorm(nn.Module):
    """A norm that looks like Llama's and is not: a factor, an error, no gradient, or another type."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8), requires_grad=False)
        self.variance_epsilon = 1e-5
        self.what = what

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.what == "error":
            raise RuntimeError("no such kernel\nand more")
        x = hidden_states.detach() if self.what == "no gradient" else hidden_states
        out = self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return {"factor": 1.001 * out, "type": out.double(), "nan": out * torch.nan}.get(self.what, out)


@pytest.mark.parametrize("what", ["factor", "error", "no gradient", "type", "nan"])
def test_what_differs_stays_as_it_is(what: str) -> None:
    model = nn.Sequential(ScaledRMSNorm(what))
    found = fuse_layers(model)
    assert not found.taken and sum(found.refused.values()) == 1 and "forward" not in vars(model[0])
    assert found.words().startswith("plain: 1 norms (ScaledRMSNorm: ") and "\n" not in found.words()


def test_the_same_norm_is_taken() -> None:
    model = nn.Sequential(ScaledRMSNorm(""))
    assert fuse_layers(model).words() == "fused: 1 norms"
    x = torch.randn(2, 3, 8)
    assert torch.allclose(model(x), ScaledRMSNorm.forward(model[0], x), atol=1e-6)
    assert model(x.double()).dtype == torch.float64, "another type takes the plain way"


def test_trained_weights_and_wide_rows_stay_plain() -> None:
    trained = nn.Sequential(ScaledRMSNorm("").requires_grad_(True))
    assert not fuse_layers(trained).taken
    wide = ScaledRMSNorm("")
    wide.weight = nn.Parameter(torch.rand(choice.WIDEST + 1), requires_grad=False)
    assert not fuse_layers(nn.Sequential(wide)).taken


def test_trials_leave_everything_as_it_was() -> None:
    """Weights, gradients, modes and the generators."""
    model, adapter = made(FAMILIES["qwen3"][0])
    adapter.grad.fill_(3.0)
    model.train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    state = torch.random.get_rng_state()
    names = [name for name, _ in model.named_modules()]
    fuse_layers(model)
    assert torch.equal(state, torch.random.get_rng_state())
    assert bool((adapter.grad == 3).all()) and all(module.training for module in model.modules())
    assert names == [name for name, _ in model.named_modules()]
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


def test_layers_are_fused_on_cuda_where_kernels_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU's bits are the published ones, and stay."""
    cuda = torch.device("cuda", 1)
    monkeypatch.setattr(ops, "_PROBLEMS", {})
    for problem in ("", "no C compiler"):
        monkeypatch.setattr(ops, "kernels_problem", lambda device, problem=problem: problem)
        assert ops.runs_fused(cuda) == (not problem)
        assert not ops.runs_fused(CPU)
    model, _ = made(FAMILIES["llama"][0])
    assert fuse(model).words() == "", "what has the same bits needs no word in the log"


class TwoRanks(OneRank):
    """The other rank says ``other``, or what this one does."""

    def __init__(self, other: Any = None) -> None:
        super().__init__()
        self.other = other

    def gather(self, item: Any) -> list[Any]:
        return [item, item if self.other is None else self.other]


def test_ranks_fuse_where_all_can(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 1)
    monkeypatch.setattr(ops, "_PROBLEMS", {})
    monkeypatch.setattr(ops, "kernels_problem", lambda device: "")
    ops.agree_on_kernels(cuda, TwoRanks())
    assert ops.runs_fused(cuda)
    ops.agree_on_kernels(cuda, TwoRanks("Triton is not installed"))
    assert not ops.runs_fused(cuda) and ops.why_plain(cuda) == "on rank 1, Triton is not installed"


def test_ranks_that_disagree_about_layers_fuse_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "agree_on_kernels", lambda device, ranks: None)
    monkeypatch.setattr(choice, "runs_fused", lambda device: True)
    same, other = (nn.Sequential(ScaledRMSNorm("")) for _ in range(2))
    assert fuse(same, TwoRanks()).words() == "fused: 1 norms" and "forward" in vars(same[0])
    assert "some ranks" in fuse(other, TwoRanks("fused: 2 norms")).words() and "forward" not in vars(other[0])


def test_kernels_are_tried_before_any_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton is there or not, a kernel raises, a kernel is wrong: each is said, and cached."""
    problem = ops.kernels_problem.__wrapped__
    monkeypatch.setattr(ops, "find_spec", lambda name: None)
    assert problem(CPU) == "Triton is not installed"
    monkeypatch.setattr(ops, "find_spec", lambda name: object())
    assert problem(CPU) == "", "the plain operators agree with themselves"
    right = ops.drop
    wrong: Any = lambda *args: right(*args) + 1  # noqa: E731
    monkeypatch.setattr(ops, "drop", wrong)
    assert "something else" in problem(CPU)
    assert "CUDA" in problem(torch.device("cuda", 0)), "torch's own words"


def test_a_gpu_without_working_kernels_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = nn.Linear(2, 2)
    monkeypatch.setattr(ops, "_PROBLEMS", {})
    monkeypatch.setattr(ops, "kernels_problem", lambda device: "no C compiler")
    monkeypatch.setattr(model, "parameters", lambda: iter([SimpleNamespace(device=torch.device("cuda"))]))
    assert fuse(model).words() == "plain: 1 model (on rank 0, no C compiler)"
