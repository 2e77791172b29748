"""The memory estimate against what autograd really keeps, and its arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from fedsim.attention.choice import Choice
from fedsim.model.load import LoraSettings, attach_lora
from fedsim.model.logprobs import MAX_LOGITS
from fedsim.model.memory import free_memory, generation_need, scoring_need, training_need
from fedsim.model.shape import ModelShape, model_shape

BIG = ModelShape("LlamaForCausalLM", 8_030_261_248, 13_631_488, torch.bfloat16, 32, 4096, 14336, 2048, 128256, 131072,
                 Choice("sdpa", "asked for"))  # fmt: skip


def kept_bytes(model: torch.nn.Module, num_tokens: int) -> int:
    """Bytes of the storages that a backward pass needs, the model's own left out."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(torch.randint(0, 250, (1, num_tokens)), use_cache=False)
        output.logits.float().log_softmax(-1).sum()
    return sum(kept.values())


def test_the_estimate_is_within_a_factor_of_what_a_backward_pass_keeps(
    tmp_path: Path, make_llama: Callable[..., LlamaForCausalLM]
) -> None:
    base = make_llama(hidden_size=128, intermediate_size=448, num_hidden_layers=6)
    base.save_pretrained(tmp_path)
    lora = LoraSettings(4, 8.0, 0.0, ("q_proj", "v_proj"))
    shape = model_shape(tmp_path, lora, dtype="float32", attention="sdpa", device=torch.device("cpu"), key="model.path")
    base.requires_grad_(False)
    real = kept_bytes(attach_lora(base, lora).train(), 256)
    need = training_need(shape, "training", "key", num_tokens=256, num_vectors=0)
    estimated = need.num_bytes - shape.weight_bytes
    assert 0.5 < estimated / real < 2.0, f"estimated {estimated:,}, kept {real:,}"


def test_activations_of_the_8b_model_take_about_3_8_mb_a_token() -> None:
    needs = [training_need(BIG, "x", "k", num_tokens=n, num_vectors=0).num_bytes for n in (0, 1000)]
    logits = 1000 * 128256 * 10
    assert needs[0] == BIG.weight_bytes
    assert (needs[1] - needs[0] - logits) / 1000 == pytest.approx(3.8e6, rel=0.01)


def test_logits_take_no_more_than_what_is_computed_at_once() -> None:
    few, many, more = (training_need(BIG, "x", "k", num_tokens=n, num_vectors=0).num_bytes for n in (0, 2000, 3000))
    kept = 32 * (4 * 4096 + 3 * 14336) * 2
    assert more - many == 1000 * kept and many - few == 2000 * kept + MAX_LOGITS * 10


def test_keys_and_values_of_the_8b_model_take_128_kib_a_token() -> None:
    """In whole slots, and one layer twice; a pass reads 8,192 tokens or the one prompt that is longer."""

    def need(num_tokens: int, num_rows: int = 64) -> int:
        return generation_need(BIG, "x", "k", num_rows=num_rows, num_tokens=num_tokens).num_bytes

    token = 131072 * 33 // 32
    transient = (2 * 4096 + 3 * 14336) * 2
    logits = 24 * 128256
    assert need(100) == BIG.weight_bytes + 64 * (128 * token + logits) + 64 * 100 * transient
    assert need(301) == need(300) == BIG.weight_bytes + 64 * (384 * token + logits) + 8192 * transient
    assert need(9000, 1) == BIG.weight_bytes + 9088 * token + logits + 9000 * transient


def test_ranks_share_the_memory_of_the_machine() -> None:
    one, four = free_memory(torch.device("cpu"), 1), free_memory(torch.device("cpu"), 4)
    assert 0 < four < one and four == pytest.approx(one / 4, rel=0.2)


def test_scoring_needs_the_heads_keys_and_one_layer_of_the_unit() -> None:
    """2,048 tokens of an 8B guard take little beside its weights: on 80 GB there is room for far more."""

    def need(**changes: int) -> int:
        sizes = {"num_tokens": 2048, "head_tokens": 190, "tail_tokens": 32, **changes}
        return scoring_need(BIG, "x", "k", **sizes).num_bytes

    head = 190 * 131072
    copies = 2 * (2048 + 64 * 190) * 2048 * 2
    layer = 2048 * (4 * 4096 + 3 * 14336) * 2
    assert need() == BIG.weight_bytes + head + copies + layer
    assert need(beside=7) == need() + 7
    assert need(num_tokens=32768) < 80e9 / 3
