"""The models that are timed: real shapes, random weights from a fixed seed, made where they are used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fedsim.study.bench_rows import LARGE


@dataclass(frozen=True)
class ModelSize:
    """A Llama's shape.

    Attributes:
        name: for rows.
        config: arguments of ``LlamaConfig``.
    """

    name: str
    config: dict[str, Any] = field(hash=False)

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return int(self.config["vocab_size"])

    def llama(self) -> LlamaConfig:
        """Its configuration."""
        return LlamaConfig(**self.config, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False)


# 5.8 M parameters: what a step of OpenFedLLM was first timed on.
CPU = ModelSize(
    "Llama of 5.8 M parameters",
    {
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 2048,
    },
)
# The public config.json of Llama-3.1-8B-Instruct.
GPU = ModelSize(
    LARGE,
    {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
)
# For tests of the benchmark itself.
MICRO = ModelSize(
    "micro",
    {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
    },
)


def build(
    size: ModelSize, dtype: torch.dtype, device: torch.device, attention: str = "sdpa", seed: int = 0
) -> PreTrainedModel:
    """A frozen model in evaluation mode; its weights are drawn on the device itself."""
    config = size.llama()
    config._attn_implementation = attention
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.requires_grad_(False)
    return model.eval()
