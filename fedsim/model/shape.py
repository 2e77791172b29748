"""Sizes of a model, read from its configuration alone: nothing is loaded, an 8B model takes a third of a second."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fedsim.errors import ModelError
from fedsim.model.load import LoraSettings, attach_lora, compute_dtype


@dataclass(frozen=True)
class ModelShape:
    """What memory and work depend on.

    Attributes:
        architecture: class name of the model.
        num_parameters: weights of the base model; tied ones count once.
        adapter_size: numbers of one LoRA adapter; 0 without one.
        dtype: of the base weights as they would be loaded.
        num_layers: decoder layers.
        hidden_size: width d.
        intermediate_size: width of the feed-forward part.
        kv_size: numbers of one token's keys and values in one layer.
        vocab_size: rows of the LM head.
        max_positions: the longest context that the configuration allows, in tokens.
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

    @property
    def weight_bytes(self) -> int:
        """Memory of the base weights."""
        return self.num_parameters * self.dtype.itemsize


def model_shape(folder: Path, lora: LoraSettings | None, *, dtype: str, device: torch.device, key: str) -> ModelShape:
    """Build the model without storage, LoRA included, and measure it.

    Args:
        folder: a Hugging Face model directory.
        lora: None for a model without an adapter.
        dtype: as in :func:`fedsim.model.load.load_model`.
        key: the configuration key to name in errors.

    Raises:
        ModelError: an unreadable or unknown configuration, or a LoRA target that no layer has.
    """
    base_dtype = compute_dtype(dtype, device)
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(config, dtype=base_dtype)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{key}={str(folder)!r}: config.json describes no causal language model that transformers can build "
            f"({reason}); give a complete Hugging Face model directory"
        ) from error
    assert isinstance(base, PreTrainedModel)
    base.requires_grad_(False)
    # Tied weights are not shared on the meta device: the head's are counted with the embeddings'.
    tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
    head = base.get_output_embeddings()
    num_parameters = sum(p.numel() for p in base.parameters())
    if tied and head is not None and head.weight is not base.get_input_embeddings().weight:
        num_parameters -= head.weight.numel()
    adapter_size = 0
    if lora is not None:
        adapter_size = sum(p.numel() for p in attach_lora(base, lora, key).parameters() if p.requires_grad)
    return ModelShape(
        architecture=type(base).__name__,
        num_parameters=num_parameters,
        adapter_size=adapter_size,
        dtype=base_dtype,
        **_text_sizes(config),
    )


def _text_sizes(config: object) -> dict[str, int]:
    """Sizes of the decoder, under the names that transformers' configurations agree on."""
    text = config.get_text_config()  # type: ignore[attr-defined]
    heads = int(text.num_attention_heads)
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    return {
        "num_layers": int(text.num_hidden_layers),
        "hidden_size": int(text.hidden_size),
        "intermediate_size": int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size),
        "kv_size": 2 * head_dim * int(getattr(text, "num_key_value_heads", None) or heads),
        "vocab_size": int(text.vocab_size),
        "max_positions": int(getattr(text, "max_position_embeddings", None) or 1 << 30),
    }
