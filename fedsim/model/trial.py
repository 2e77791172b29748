"""Trial of an architecture before any weight is read: a small random model of its configuration.

The verdict of :mod:`fedsim.model.fitness` depends on the layers' code and on the kinds of layers in
the configuration, not on the weights. So an architecture that would be refused when it is loaded,
which may be after an hour of guard fine-tuning, is refused by ``--check``. Sizes of heads, groups
of queries, kinds of layers and caps stay as they are; layers, heads and vocabulary become few, the
feed-forward part and experts small.
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
"""Width of the feed-forward part and of an expert."""
NUM_EXPERTS: Final = 32
"""Most experts; enough for eight groups of which some tokens use eight experts."""
SIGHTS: Final = ("sliding_window", "attention_chunk_size", "index_topk")
"""Configuration's names of limits on the positions that a token sees."""
SIGHT: Final = 4
"""Positions that a window, a chunk or an indexer lets a token see: fewer than a row has."""


def try_model(folder: Path, attention: str, key: str) -> bool:
    """Call :func:`try_architecture` with the configuration of a model directory.

    Args:
        key: the configuration key to name in errors.
    """
    config, _ = read_config(folder, key)
    try:
        return try_architecture(config, attention, trains=key != "judge.path")
    except ModelError as error:
        raise ModelError(f"{key}={str(folder)!r}: {error}") from error


def try_architecture(config: PretrainedConfig, attention: str, *, trains: bool = True) -> bool:
    """Check the fitness of a small model of this configuration on the CPU, in float32.

    The state of torch's generator is kept.

    Args:
        config: the model's, its dropout switched off; left as it is.
        attention: name of the backend; one that runs only on CUDA is replaced.
        trains: the model is to be trained.

    Returns:
        False if no small model could be built and run by itself: then only loading the real one
            shows.

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

    # Once more with windows that are shorter than the rows, so that they are compared in numbers
    # too.
    has_sight = _set(small.get_text_config(), dict.fromkeys(SIGHTS, SIGHT))
    if has_sight:
        model = _built(small, implementation)
        if model is not None:
            check_fitness(model, [list(row) for row in ROWS], trains=trains)
    return model is not None or not has_sight


def _built(small: PretrainedConfig, implementation: str) -> PreTrainedModel | None:
    """A random model that runs without fedsim; None if there is none, or it is still large."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        return _random_model(copy.deepcopy(small), implementation)
    except Exception:  # sizes of other kinds have to agree too, and do so only in the real model
        return None
    finally:
        transformers_logging.set_verbosity(verbosity)


def _random_model(small: PretrainedConfig, implementation: str) -> PreTrainedModel | None:
    """Build the model with random weights, and run one row through it with eager attention."""
    small._attn_implementation = implementation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)

        # Without storage first: is it small, and is its stack of layers as long as configured?
        with torch.device("meta"):
            sizes = AutoModelForCausalLM.from_config(
                copy.deepcopy(small),
                dtype=torch.float32,
                trust_remote_code=False,
            )
        if sum(parameter.numel() for parameter in sizes.parameters()) > LARGEST:
            return None
        stacks = []
        for part in text_decoder(sizes).modules():
            if isinstance(part, torch.nn.ModuleList):
                stacks.append(len(part))
        if _num_layers(small) not in stacks:
            return None

        model = AutoModelForCausalLM.from_config(
            small,
            dtype=torch.float32,
            trust_remote_code=False,
        ).eval()

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
    """Copy a configuration with few layers, heads and tokens, and small feed-forward parts.

    One layer of each kind is kept, and at least two. Widths of heads and the number of query heads
    to a key head stay. Parts that read no text get one layer.
    """
    small = copy.deepcopy(config)
    small.quantization_config = None
    text = small.get_text_config()
    _shrink_layers(text)
    _shrink_widths(text)

    # Towers that read images or sound: one layer.
    depths = ("num_hidden_layers", "depth", "num_layers", "encoder_layers")
    for part in list(vars(small).values()):
        if isinstance(part, PretrainedConfig) and part is not text:
            _set(part, dict.fromkeys(depths, 1))

    # Few tokens, with the special ones among them.
    for part in (small, text):
        _set(part, {"vocab_size": NUM_TOKENS, "vocab_size_per_layer_input": NUM_TOKENS})
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(part, name, None) is not None:
                setattr(part, name, 0)
    return small


def _shrink_layers(text: PretrainedConfig) -> None:
    """Keep the first layer of each kind, and the first two in any case.

    A layer's kind is its entries in all lists of the configuration that have one a layer.
    """
    num_layers = int(text.num_hidden_layers)
    lists = {}
    for name, values in vars(text).items():
        if isinstance(values, (list, tuple)) and len(values) == num_layers:
            lists[name] = values

    kinds: set[str] = set()
    kept = []
    for layer in range(num_layers):
        kind = repr([values[layer] for values in lists.values()])
        if kind not in kinds or layer < NUM_LAYERS:
            kept.append(layer)
        kinds.add(kind)

    text.num_hidden_layers = len(kept)
    for name, values in lists.items():
        setattr(text, name, type(values)(values[layer] for layer in kept))
    if getattr(text, "first_k_dense_replace", 0):  # DeepSeek: layers before the first with experts
        text.first_k_dense_replace = 1


def _shrink_widths(text: PretrainedConfig) -> None:
    """Keep at most two key heads, and the model's width in proportion to its heads."""
    heads, key_heads = int(text.num_attention_heads), getattr(text, "num_key_value_heads", None)
    group = heads // int(key_heads or heads)  # query heads to a key head
    most = 2 if group <= 8 else 1
    few_keys = min(heads // group, most)
    few = few_keys * group
    width = int(text.hidden_size) // heads * few
    _set(text, {"hidden_size": width, "word_embed_proj_dim": width, "num_attention_heads": few})
    if key_heads is not None:
        _set(text, {"num_key_value_heads": few_keys})

    # Feed-forward parts and experts.
    thin = (
        "intermediate_size",
        "ffn_dim",
        "n_inner",
        "intermediate_size_mlp",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
    )
    _set(text, dict.fromkeys(thin, WIDTH))
    for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        num_experts = getattr(text, name, None)
        if isinstance(num_experts, int):
            setattr(text, name, min(num_experts, NUM_EXPERTS))


def _set(part: PretrainedConfig, values: dict[str, Any]) -> bool:
    """Set those values that a configuration has as numbers; return False if it has none of them."""
    found = [name for name in values if isinstance(getattr(part, name, None), int)]
    for name in found:
        setattr(part, name, values[name])
    return bool(found)
