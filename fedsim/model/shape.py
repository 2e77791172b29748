"""Sizes of a model, and a check that its weights fit its configuration, from only the file headers.

No weight is read: an 8B model takes half a second.
"""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from fedsim.attention.choice import Choice, choose
from fedsim.attention.forward import text_names, unsupported
from fedsim.attention.self_test import head_sizes, num_key_heads
from fedsim.base.errors import ModelError, reason
from fedsim.config.lora import LoraSettings
from fedsim.model.faults import attention_table_error, names_attention
from fedsim.model.fitness import check_kind
from fedsim.model.load import (
    GIVE_COMPLETE,
    INDEX,
    architecture,
    attach_lora,
    check_report,
    compute_dtype,
    read_config,
)
from fedsim.model.quantised import check_quantised, quantisation


@dataclass(frozen=True)
class ModelShape:
    """Sizes on which memory and work depend.

    Attributes:
        architecture: class name of the model.
        num_parameters: weights of the base model; tied ones count once.
        adapter_size: numbers of one LoRA adapter; 0 without one.
        dtype: of the base weights as they would be loaded.
        num_layers: decoder layers.
        hidden_size: width d.
        intermediate_size: width of the feed-forward part.
        kv_size: numbers of one token's keys and values in one layer.
        vocab_size: rows of the embeddings and of the LM head.
        max_positions: the longest context that the configuration allows, in tokens.
        attention: the backend that it gets; :func:`model_shape` gives this process's choice.
        num_heads: query heads of a layer.
        query_size: numbers of one token's queries in one layer.
        norm_size: numbers of one token that go through a norm, over all layers.
        lora_size: numbers of one token that go into LoRA layers, over all of them.
        dropout_off: dropout rates of its configuration that are switched off; may be empty.
    """

    architecture: str
    num_parameters: int
    adapter_size: int
    dtype: torch.dtype
    num_layers: int
    hidden_size: int
    intermediate_size: int
    kv_size: int
    vocab_size: int
    max_positions: int
    attention: Choice
    num_heads: int
    query_size: int
    norm_size: int
    lora_size: int
    dropout_off: str = ""

    @property
    def weight_bytes(self) -> int:
        """Memory of the base weights."""
        return self.num_parameters * self.dtype.itemsize


def model_shape(
    folder: Path,
    lora: LoraSettings | None,
    *,
    dtype: str,
    attention: str,
    device: torch.device,
    key: str,
) -> ModelShape:
    """Build the model without storage, LoRA included; compare it with the weight files; measure it.

    Args:
        folder: a Hugging Face model directory.
        lora: None for a model without an adapter.
        dtype: as in :func:`fedsim.model.load.load_model`; also ``attention``.
        key: the configuration key to name in errors.

    Raises:
        ModelError: an unreadable or unknown configuration, an attention backend that cannot be had,
            weights that are missing or of another shape, or a LoRA target that no layer has.
    """
    # Configuration, quantisation, attention.
    base_dtype = compute_dtype(dtype, device)
    config, dropout = read_config(folder, key)
    try:
        check_quantised(config, trains=lora is not None)
    except ModelError as error:
        raise ModelError(f"{key}={str(folder)!r}: {error}") from error
    backend = choose(attention, config, base_dtype, device)

    # The model on the meta device, checked by kind and against the weight files.
    try:
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(
                copy.deepcopy(config),
                dtype=base_dtype,
                attn_implementation=backend.implementation,
                trust_remote_code=False,
            )
    except Exception as error:  # of any class: sizes that make no sense fail anywhere in torch
        if names_attention(error):
            fault = attention_table_error(architecture(config))
            raise ModelError(f"{key}={str(folder)!r}: {fault}") from error
        problem = "config.json describes no causal language model that transformers can build"
        problem += f" ({reason(error)})"
        raise ModelError(f"{key}={str(folder)!r}: {problem}; {GIVE_COMPLETE}") from error
    assert isinstance(base, PreTrainedModel)
    try:
        check_kind(base)
    except ModelError as error:
        raise ModelError(f"{key}={str(folder)!r}: {error}") from error
    embeddings = base.get_input_embeddings()
    assert isinstance(embeddings, torch.nn.Embedding)
    _check_weights(folder, config, type(base), key)
    base.requires_grad_(False)

    # Parameters. Tied weights are not shared on the meta device, and would count twice.
    tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
    head = base.get_output_embeddings()
    num_parameters = sum(p.numel() for p in base.parameters())
    if tied and head is not None and head.weight is not base.get_input_embeddings().weight:
        num_parameters -= head.weight.numel()

    # Sizes of the decoder, its norms and its adapter.
    try:
        sizes = _text_sizes(config)
    except AttributeError as error:  # such as Mamba's
        fault = unsupported(type(base).__name__, "its layers (by config.json) do not use")
        raise ModelError(f"{key}={str(folder)!r}: {fault}") from error
    norm_size = _norm_size(base, sizes)
    adapter_size = lora_size = 0
    if lora is not None:
        adapted = attach_lora(base, lora, key)
        adapter_size = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        lora_size = sum(m.in_features or 0 for m in adapted.modules() if isinstance(m, LoraLayer))
    return ModelShape(
        architecture=type(base).__name__,
        num_parameters=num_parameters,
        adapter_size=adapter_size,
        dtype=base_dtype,
        **sizes,
        vocab_size=embeddings.num_embeddings,
        attention=backend,
        norm_size=norm_size,
        lora_size=lora_size,
        dropout_off=", ".join(f"{name}={p:g}" for name, p in dropout.items()),
    )


def _check_weights(
    folder: Path,
    config: PretrainedConfig,
    architecture: type[PreTrainedModel],
    key: str,
) -> None:
    """Check the weight files' names and shapes: transformers loads such tensors without storage.

    So each renaming, merging and tying that it does is taken into account.

    Raises:
        ModelError: weights are missing or of another shape.
    """
    headers = _headers(folder)
    if headers is None or quantisation(config) is not None:  # quantised ones are packed
        return
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its warnings are errors here
    try:
        loaded: Any = architecture.from_pretrained(
            None,
            config=copy.deepcopy(config),
            state_dict=headers,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception:  # some architectures need numbers: a fault then shows when they are loaded
        return
    finally:
        transformers_logging.set_verbosity(verbosity)
    check_report(loaded[1], folder, key)


def _headers(folder: Path) -> dict[str, torch.Tensor] | None:
    """Tensors without storage for those in the weight files, by name; None without such files."""
    if (folder / "model.safetensors").is_file():
        files = {"model.safetensors"}
    elif (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        files = set(index.get("weight_map", {}).values())
    else:
        return None
    found = {}
    for name in sorted(files):
        with safe_open(str(folder / name), "pt") as file:
            for tensor in file.keys():  # noqa: SIM118 - it is no mapping
                shape = file.get_slice(tensor).get_shape()
                found[tensor] = torch.empty(shape, device="meta")
    return found


def _norm_size(base: PreTrainedModel, sizes: dict[str, int]) -> int:
    """Numbers of one token that go through the norms of text layers."""
    text = text_names(base)
    head_size = sizes["query_size"] // sizes["num_heads"]
    total = 0
    for name, module in base.named_modules():
        if "Norm" not in type(module).__name__ or not re.fullmatch(text, name):
            continue
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is None:
            continue
        size = weight.numel()
        if size == head_size < sizes["hidden_size"]:  # each head is normed with the same weights
            size *= sizes["num_heads"]
        total += size
    return total


def _text_sizes(config: object) -> dict[str, int]:
    """Sizes of the decoder, under the names that transformers' configurations agree on."""
    text = config.get_text_config()  # type: ignore[attr-defined]
    heads = int(text.num_attention_heads)
    key_size, value_size = head_sizes(text)
    return {
        "num_layers": int(text.num_hidden_layers),
        "hidden_size": int(text.hidden_size),
        "intermediate_size": int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size),
        "num_heads": heads,
        "query_size": heads * key_size,
        "kv_size": (key_size + value_size) * num_key_heads(text),
        "max_positions": int(getattr(text, "max_position_embeddings", None) or 1 << 30),
    }
