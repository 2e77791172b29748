"""An architecture tried before any weight is read: a small random model of the same configuration.

What :mod:`fedsim.model.fitness` refuses depends on the layers' code and on the kinds of layers in the
configuration, not on the weights. So an architecture that would be refused when it is loaded, which may be after an
hour of guard fine-tuning, is refused by ``--check``. Sizes of heads, groups of queries, kinds of layers and caps stay
as they are; layers, heads and vocabulary become few, the feed-forward part and experts small.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from fedsim.attention.forward import IMPLEMENTATIONS, text_decoder
from fedsim.base.errors import ModelError
from fedsim.model.fitness import check_fitness
from fedsim.model.load import read_config

LARGEST: Final = 50_000_000
"""Parameters of the largest model that is tried; random numbers for so many take half a second."""

ROWS: Final = ((5, 7, 9, 11, 20, 31, 44, 7, 8, 12, 3, 6), (50, 60, 34, 13, 21, 40, 2))
"""Token ids, of different lengths, all below :data:`NUM_TOKENS`."""

NUM_TOKENS: Final = 64
NUM_LAYERS: Final = 2
WIDTH: Final = 32
"""Of the feed-forward part and of an expert."""
NUM_EXPERTS: Final = 32
"""At most; enough for eight groups of which some tokens use eight experts."""
SIGHTS: Final = ("sliding_window", "attention_chunk_size", "index_topk")
SIGHT: Final = 4
"""Positions that a window, a chunk or an indexer lets a token see: fewer than a row has."""


def try_model(folder: Path, attention: str, key: str) -> bool:
    """:func:`try_architecture` with the configuration of a model directory.

    Args:
        key: the configuration key to name in errors.
    """
    config, _ = read_config(folder, key)
    try:
        return try_architecture(config, attention, trains=key != "judge.path")
    except ModelError as error:
        raise ModelError(f"{key}={str(folder)!r}: {error}") from error


def try_architecture(config: PretrainedConfig, attention: str, *, trains: bool = True) -> bool:
    """Check the fitness of a small model of this configuration on the CPU, in float32; torch's generator stays put.

    Args:
        config: the model's, its dropout switched off; left as it is.
        attention: name of the backend; one that is CUDA's alone is replaced.
        trains: the model is to be trained.

    Returns:
        False if no small model could be built and run by itself: then only loading the real one shows.

    Raises:
        ModelError: the architecture does not fit.
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    implementation = IMPLEMENTATIONS["eager" if attention == "eager" or capped else "sdpa"]
    small = shrunken(config)
    model = _built(small, implementation)
    if model is None:
        return False
    check_fitness(model, [list(row) for row in ROWS], trains=trains)

    # Once more with windows that are shorter than the rows, so that they are compared in numbers too.
    if has_sight := _set(small.get_text_config(), dict.fromkeys(SIGHTS, SIGHT)):
        model = _built(small, implementation)
        if model is not None:
            check_fitness(model, [list(row) for row in ROWS], trains=trains)
    return model is not None or not has_sight


def _built(small: PretrainedConfig, implementation: str) -> PreTrainedModel | None:
    """A random model that computes by itself; None where there is none, or it is still large."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        return _random_model(copy.deepcopy(small), implementation)
    except Exception:  # sizes of another kind that have to agree: the real model's do
        return None
    finally:
        transformers_logging.set_verbosity(verbosity)


def _random_model(small: PretrainedConfig, implementation: str) -> PreTrainedModel | None:
    small._attn_implementation = implementation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with torch.device("meta"):
            sizes = AutoModelForCausalLM.from_config(copy.deepcopy(small), dtype=torch.float32, trust_remote_code=False)
        stacks = [len(part) for part in text_decoder(sizes).modules() if isinstance(part, torch.nn.ModuleList)]
        if sum(p.numel() for p in sizes.parameters()) > LARGEST or _num_layers(small) not in stacks:
            return None
        model = AutoModelForCausalLM.from_config(small, dtype=torch.float32, trust_remote_code=False).eval()
    assert isinstance(model, PreTrainedModel)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        model(input_ids=torch.tensor([ROWS[0]]), use_cache=False)
    model.set_attn_implementation(implementation)
    return model


def _num_layers(config: PretrainedConfig) -> int:
    """Layers of the decoder."""
    return int(config.get_text_config().num_hidden_layers)


def shrunken(config: PretrainedConfig) -> PretrainedConfig:
    """A copy with few layers (one of each kind, at least two), few heads, few tokens and small feed-forward parts.

    Widths of heads and the number of query heads to a key head stay. Parts that read no text get one layer.
    """
    small = copy.deepcopy(config)
    small.quantization_config = None
    text = small.get_text_config()
    _shrink_layers(text)
    _shrink_widths(text)
    for part in {id(part): part for part in vars(small).values() if isinstance(part, PretrainedConfig)}.values():
        if part is not text:
            _set(part, {name: 1 for name in ("num_hidden_layers", "depth", "num_layers", "encoder_layers")})
    for part in (small, text):
        _set(part, {"vocab_size": NUM_TOKENS, "vocab_size_per_layer_input": NUM_TOKENS})
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(part, name, None) is not None:
                setattr(part, name, 0)
    return small


def _shrink_layers(text: PretrainedConfig) -> None:
    """Keep the first layer of each kind, by all lists that have an entry a layer, and two layers at least."""
    num_layers = int(text.num_hidden_layers)
    lists = {name: v for name, v in vars(text).items() if isinstance(v, (list, tuple)) and len(v) == num_layers}
    kinds = [repr([values[layer] for values in lists.values()]) for layer in range(num_layers)]
    kept = [layer for layer in range(num_layers) if kinds.index(kinds[layer]) == layer]
    kept = sorted({*kept, *range(min(NUM_LAYERS, num_layers))})
    text.num_hidden_layers = len(kept)
    for name, values in lists.items():
        setattr(text, name, type(values)(values[layer] for layer in kept))
    if getattr(text, "first_k_dense_replace", 0):  # DeepSeek: the layers before the first one with experts
        text.first_k_dense_replace = 1


def _shrink_widths(text: PretrainedConfig) -> None:
    """At most two key heads; the model's width stays in proportion to its heads."""
    heads, key_heads = int(text.num_attention_heads), getattr(text, "num_key_value_heads", None)
    groups = heads // int(key_heads or heads)
    few = min(heads // groups, 2 if groups <= 8 else 1) * groups
    width = int(text.hidden_size) // heads * few
    wide = {"hidden_size": width, "word_embed_proj_dim": width, "num_attention_heads": few}
    _set(text, {**wide, **({"num_key_value_heads": few // groups} if key_heads is not None else {})})
    thin = ("intermediate_size", "ffn_dim", "n_inner", "intermediate_size_mlp", "moe_intermediate_size",
            "shared_expert_intermediate_size")  # fmt: skip
    _set(text, dict.fromkeys(thin, WIDTH))
    for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        if isinstance(there := getattr(text, name, None), int):
            setattr(text, name, min(there, NUM_EXPERTS))


def _set(part: PretrainedConfig, values: dict[str, Any]) -> bool:
    """Set what a configuration has, where it has a number there; False if it has none of them."""
    found = [name for name in values if isinstance(getattr(part, name, None), int)]
    for name in found:
        setattr(part, name, values[name])
    return bool(found)
