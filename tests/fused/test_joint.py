"""Joint products: what the layers compute one by one, of the adapter's present values, and in no more memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from fedsim.attention.forward import IMPLEMENTATIONS
from fedsim.attention.spans import put
from fedsim.config.lora import LoraSettings
from fedsim.fused import ops
from fedsim.fused.choice import fuse_layers
from fedsim.fused.joint import ATTRIBUTE, JointLinear, adapters_in_use, hold_adapters
from fedsim.generate import sampling as pick_module
from fedsim.generate.decode import Decoder, Made, Request
from fedsim.generate.sampling import pick
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.model.load import attach_lora

SMALL: dict[str, Any] = {
    "vocab_size": 261, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "llama with biases": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "llama with GELU": LlamaConfig(**SMALL, hidden_act="gelu"),
    "mistral": MistralConfig(**SMALL, sliding_window=6),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
}


def made(name: str = "llama") -> tuple[Any, FlatAdapter]:
    """A random model with random LoRA on queries, values and gates, and dropout."""
    config = FAMILIES[name]
    config._attn_implementation = IMPLEMENTATIONS["sdpa"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False)
        for parameter in base.parameters():
            parameter.data.add_(0.05 * torch.randn(parameter.shape))  # biases too
        model = attach_lora(base, LoraSettings(4, 6.0, 0.3, ("q_proj", "v_proj", "gate_proj")))
        adapter = FlatAdapter(model)
        adapter.values.copy_(0.3 * torch.randn(adapter.size))
    return model, adapter


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def test_adapters_in_use_are_told_apart() -> None:
    model, _ = made()
    first = adapters_in_use(model)
    assert first == adapters_in_use(model) != frozenset()
    with model.disable_adapter():
        assert adapters_in_use(model) != first
    model.merge_adapter()
    assert adapters_in_use(model) != first
    model.unmerge_adapter()
    assert adapters_in_use(model) == first


def joints(model: nn.Module) -> list[JointLinear]:
    return [vars(module)[ATTRIBUTE] for module in model.modules() if ATTRIBUTE in vars(module)]


def decoded(model: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[list[list[Made]], torch.Tensor]:
    """Replies of five rows with prompts of several lengths, and all logits that they were drawn from."""
    logits: list[torch.Tensor] = []
    monkeypatch.setattr(
        "fedsim.generate.decode.pick", lambda found, *rest: logits.append(found) or pick_module.pick(found, *rest)
    )
    decoder = Decoder(model.eval().get_base_model(), 3, max_new_tokens=9, eos_ids=frozenset({7}))
    made = decoder.run([Request([11 + row] * (1 + 5 * row), row, 4 + row, 1.0) for row in range(5)])
    return made, torch.cat(logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_decoding_with_joint_products_is_decoding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill and steps, rotated into the cache: the plain model's logits up to rounding, and its tokens."""
    wanted, right = decoded(made(name)[0], monkeypatch)
    model, _ = made(name)
    fuse_layers(model)
    num_products = 0
    call = JointLinear.__call__

    def counted(self: JointLinear, x: torch.Tensor) -> torch.Tensor:
        nonlocal num_products
        num_products += 1
        return call(self, x)

    monkeypatch.setattr(JointLinear, "__call__", counted)
    alone, _ = decoded(model, monkeypatch)
    assert alone == wanted and num_products == 0, "adapters that are not held may change"
    with hold_adapters(model):
        found, logits = decoded(model, monkeypatch)
    assert found == wanted and distance(logits, right) < 1e-5 and num_products > 0


def test_a_held_adapter_is_the_present_one() -> None:
    """Each block copies it anew, to where it was; a block's copies are used nowhere else."""
    model, adapter = made()
    plain, other = made()
    fuse_layers(model)
    ids = torch.arange(20)[None]
    addresses = set()
    for seed in range(3):
        values = 0.3 * torch.randn(adapter.size, generator=torch.Generator().manual_seed(seed))
        for one in (adapter, other):
            one.load(values)
        with torch.no_grad():
            wanted = plain.eval()(ids).logits
            assert distance(model.eval()(ids).logits, wanted) < 1e-6
            with hold_adapters(model):
                assert distance(model(ids).logits, wanted) < 1e-5
        addresses.add(tuple(part.data_ptr() for joint in joints(model) for part in joint._low or ()))
    assert len(addresses) == 1 and len(addresses.pop()) == 8, "stacked A and B of four products"
    with torch.inference_mode(), hold_adapters(model):
        model(ids)
    with hold_adapters(model):
        pass  # tensors of inference mode could not be written to here


def test_no_joint_product_hides_training_or_another_adapter() -> None:
    """Gradients, dropout, a switched off adapter, a second and a merged one all take the plain way."""
    model, _ = made()
    fuse_layers(model)
    x, ids = torch.randn(1, 4, 32), torch.arange(9)[None]
    with hold_adapters(model):
        assert not any(joint.takes(x) for joint in joints(model)), "gradients"
        with torch.no_grad():
            assert [joint.takes(x) for joint in joints(model.train())].count(False) == 4, "dropout"
            model.eval()
            assert all(joint.takes(x) for joint in joints(model))
            assert not any(joint.takes(x.double()) for joint in joints(model))
            with model.disable_adapter():
                bare = model(ids).logits
            assert distance(model(ids).logits, bare) > 1e-3
            plain, _ = made()
            with plain.disable_adapter():
                assert distance(bare, plain.eval()(ids).logits) < 1e-6
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter("other")
    with torch.no_grad(), hold_adapters(model):
        assert not any(joint.takes(x) for joint in joints(model))


def test_weights_are_views_of_one_matrix() -> None:
    """Names, values and memory stay; what is loaded or added in place reaches the joint product."""
    model, _ = made("llama with biases")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    fuse_layers(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], x) for name, x in before.items())
    attention: Any = dict(model.named_modules())["base_model.model.model.layers.0.self_attn"]
    layers = attention.q_proj.base_layer, attention.k_proj, attention.v_proj.base_layer
    assert len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == 1
    assert layers[0].weight.untyped_storage().nbytes() == sum(layer.weight.nbytes for layer in layers)
    x, joint = torch.randn(3, 32), vars(attention)[ATTRIBUTE]
    layers[1].weight.copy_(torch.randn(16, 32))
    with torch.no_grad():
        assert torch.allclose(joint(x)[:, 32:48], layers[1](x), atol=1e-5)


def test_a_joint_product_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = made()
    call = JointLinear.__call__
    monkeypatch.setattr(JointLinear, "__call__", lambda self, x: 1.01 * call(self, x))
    found = fuse_layers(model)
    assert not any("joint" in kind for kind in found.taken) and found.taken["decoder layers"] == 2
    assert not joints(model), "nothing is copied for it"
    assert "2 joint attention products (LlamaAttention: computes something else)" in found.words()
    monkeypatch.undo()
    plain, _ = made()
    with torch.no_grad(), hold_adapters(model):
        ids = torch.arange(9)[None]
        assert distance(model.eval()(ids).logits, plain.eval()(ids).logits) < 1e-6


def test_draws_are_the_same_by_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """One way for CUDA and one for the CPU, at every mix of temperatures."""
    logits = 4 * torch.randn(6, 700)
    largest, uniforms = logits.amax(dim=1, keepdim=True), torch.rand(6, dtype=torch.float64)
    for heat in ([0.0] * 6, [0.7, 1.0] * 3, [0.0, 1.3] * 3):
        temperatures, kinds = torch.tensor(heat, dtype=torch.float64), {t > 0 for t in heat}
        wanted = pick(logits, largest, uniforms, temperatures, kinds)
        with monkeypatch.context() as patch:
            patch.setattr(pick_module, "runs_fused", lambda device: True)
            assert torch.equal(pick(logits, largest, uniforms, temperatures, kinds), wanted)


def test_new_operators_know_their_shapes() -> None:
    """See test_functions: types, shapes and strides on a fake device, and what each changes."""
    joint = torch.randn(5, 8, 6)
    q, k, v = joint.split([4, 2, 2], dim=1)
    keys, values = torch.zeros(2, 7, 9, 2, 6)
    cos, (places,) = torch.randn(5, 6), put([np.arange(5)], torch.device("cpu"))
    logits, heat = torch.randn(3, 300), torch.ones(3, dtype=torch.float64)
    largest = logits.amax(dim=1, keepdim=True)
    gate, up = torch.randn(4, 10).split(5, dim=1)
    cases: dict[str, tuple[Any, ...]] = {
        "silu_mul_": (gate, up),
        "rotate_into": (q, k, v, cos, cos, keys, values, places),
        "block_sums": (logits, largest, heat),
        "draw_in_block": (logits, largest, heat, 0.5 * heat, ops.block_sums(logits, largest, heat)),
    }
    for name, args in cases.items():
        tests = ("test_schema", "test_faketensor")
        check: Callable[..., Any] = torch.library.opcheck
        check(getattr(ops.OPS, name).default, args, test_utils=tests)
