"""Logits of hidden states that are there already, through the model's own forward and its own scaling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from fedsim.attention.forward import causal_lm, text_decoder
from fedsim.attention.spans import put
from fedsim.base.errors import ModelError


class _Handed(BaseModelOutputWithPast):
    """Hidden states in place of what a body returns; its other outputs, such as router logits, are None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def head_logits(model: nn.Module, hidden: torch.Tensor, candidates: Sequence[int] | None = None) -> torch.Tensor:
    """Logits of last hidden states ``[tokens, width]``, as the model itself makes them.

    The model's own forward runs, with its soft-capping and scaling; its body only hands ``hidden`` on.

    Args:
        candidates: token ids; None: the whole vocabulary. Of a plain head only their rows are multiplied, in float32
            or wider; one that carries an adapter is applied as a whole.

    Returns:
        ``[tokens, vocabulary or candidates]``.

    Raises:
        ModelError: the model makes logits by other means than its body and its head.
    """
    causal = causal_lm(model)
    head: nn.Module = causal.get_output_embeddings()
    num_calls = 0
    # int64 [candidates]; a list as an index would be copied to the device while the host waits.
    chosen = None if candidates is None else put([np.array(candidates)], hidden.device)[0]

    def body(*_: Any, **__: Any) -> _Handed:
        nonlocal num_calls
        num_calls += 1
        return _Handed(last_hidden_state=hidden[None])

    def rows(states: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(states.dtype, torch.float32)
        assert isinstance(head, nn.Linear) and chosen is not None
        bias = None if head.bias is None else head.bias.index_select(0, chosen).to(wide)
        return nn.functional.linear(states.to(wide), head.weight.index_select(0, chosen).to(wide), bias)

    # Of encoder-decoder descent, a model may call its decoder past the body.
    stand_ins: dict[nn.Module, Callable[..., Any]] = {causal.base_model: body, text_decoder(causal): body}
    narrow = candidates is not None and type(head) is nn.Linear
    if narrow:
        stand_ins[head] = rows
    try:
        for module, forward in stand_ins.items():
            module.forward = forward
        logits: torch.Tensor | None = causal(inputs_embeds=hidden[None], use_cache=False).logits
    finally:
        for module in stand_ins:
            vars(module).pop("forward", None)  # the class's own again
    if num_calls != 1 or logits is None:
        raise ModelError(f"{type(causal).__name__}: does not make its logits from its body's output; use another model")
    return logits[0] if narrow or chosen is None else logits[0].index_select(1, chosen)
