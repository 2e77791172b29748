"""The flat adapter: one vector behind PEFT's parameters, PEFT's own format on disk."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from fedsim.base.errors import ModelError
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.model.load import LoadedModel

Make = Callable[..., tuple[LoadedModel, FlatAdapter]]
IDS = torch.arange(3, 43).view(2, 20)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def test_parameters_and_gradients_are_views(make_adapted: Make) -> None:
    loaded, flat = make_adapted(std=0.1)
    named = {n: p for n, p in loaded.model.named_parameters() if p.requires_grad}
    assert [s.name for s in flat.slots] == list(named)
    assert flat.size == sum(p.numel() for p in named.values()) == flat.slots[-1].stop
    for slot in flat.slots:
        parameter = named[slot.name]
        assert torch.equal(parameter.data.flatten(), flat.values[slot.start : slot.stop])
        flat.values[slot.start] = 42.0
        assert float(parameter.data.flatten()[0]) == 42.0
        parameter.data.flatten()[-1] = -7.0
        assert float(flat.values[slot.stop - 1]) == -7.0


def test_backward_accumulates_into_the_flat_gradient(make_adapted: Make) -> None:
    loaded, flat = make_adapted(std=0.1)
    twin, other = make_adapted(std=0.1)
    for model in (loaded.base, twin.base):
        model.train()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    reference = torch.cat([p.grad.flatten() for p in twin.model.parameters() if p.requires_grad])  # type: ignore[union-attr]
    assert float(flat.grad.norm()) > 0 and torch.equal(flat.grad, reference) and torch.equal(other.grad, flat.grad)
    once = flat.grad.clone()
    loaded.base(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    torch.testing.assert_close(flat.grad, 2 * once)
    flat.grad.zero_()
    loaded.base(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert torch.equal(flat.grad, once)


def test_load_and_copy(make_adapted: Make) -> None:
    loaded, flat = make_adapted()
    before = logits(loaded.base)
    vector = torch.randn(flat.size)
    flat.load(vector)
    copied = flat.copy()
    assert torch.equal(copied, vector) and not torch.equal(logits(loaded.base), before)
    flat.values.zero_()
    assert torch.equal(copied, vector)
    with pytest.raises(AssertionError, match="adapter has"):
        flat.load(torch.zeros(flat.size + 1))


def test_the_start_changes_nothing(make_adapted: Make, make_llama: Callable[..., LlamaForCausalLM]) -> None:
    loaded, flat = make_adapted(seed=5, dropout=0.3)
    assert torch.equal(logits(loaded.base), logits(make_llama(seed=5)))
    start = flat.initial(9)
    assert torch.equal(start, flat.initial(9)) and not torch.equal(start, flat.initial(10))
    tensors = []
    for slot in flat.slots:
        values = start[slot.start : slot.stop]
        if "lora_B" in slot.name:
            assert not values.any()
            continue
        bound = 1 / math.sqrt(slot.shape[1])
        assert float(values.abs().max()) <= bound and float(values.abs().max()) > 0.9 * bound
        assert float(values.std()) == pytest.approx(bound / math.sqrt(3), rel=0.2)
        tensors.append(values[:32])
    assert not any(torch.equal(a, b) for i, a in enumerate(tensors) for b in tensors[:i])


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("q_proj", "o_proj", "gate_proj", "down_proj")])
def test_peft_reads_what_is_saved(
    make_adapted: Make, make_llama: Callable[..., LlamaForCausalLM], tmp_path: Path, targets: tuple[str, ...]
) -> None:
    loaded, flat = make_adapted(seed=2, targets=targets, std=0.2)
    vector = torch.randn(flat.size) * 0.1
    flat.save(tmp_path / "adapter", vector)
    flat.load(vector)
    tensors = load_file(str(tmp_path / "adapter" / "adapter_model.safetensors"))
    own = get_peft_model_state_dict(loaded.model)
    assert set(tensors) == set(own)
    assert all(torch.equal(tensors[n], own[n]) for n in own)
    other = PeftModel.from_pretrained(make_llama(seed=2), str(tmp_path / "adapter"))
    assert torch.equal(logits(other), logits(loaded.base))
    assert not torch.equal(logits(other), logits(make_llama(seed=2)))
    assert torch.equal(flat.read(tmp_path / "adapter"), vector)


def test_reads_what_peft_saves(make_adapted: Make, tmp_path: Path) -> None:
    loaded, flat = make_adapted(std=0.2)
    loaded.model.save_pretrained(str(tmp_path))
    want = flat.copy()
    flat.load(torch.zeros(flat.size))
    assert torch.equal(flat.read(tmp_path), want)


@pytest.mark.parametrize("damage", ["missing", "cut", "rank", "name"])
def test_a_wrong_file_is_an_error(make_adapted: Make, tmp_path: Path, damage: str) -> None:
    _, flat = make_adapted(std=0.2)
    flat.save(tmp_path, flat.copy())
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(str(path))
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "rank":
        _, other = make_adapted(r=8)
        other.save(tmp_path, other.copy())
    else:
        save_file({n.replace("q_proj", "k_proj"): t for n, t in tensors.items()}, str(path))
    words = "cannot be read" if damage in ("missing", "cut") else "adapter of another shape .*same base model, rank"
    with pytest.raises(ModelError, match=words):
        flat.read(tmp_path)
