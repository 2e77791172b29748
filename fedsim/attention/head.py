"""Logits of given hidden states, through the model's own forward pass and scaling."""

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
    """Hidden states in place of a body's output; all others, such as router logits, are None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def head_logits(
    model: nn.Module,
    hidden: torch.Tensor,
    candidates: Sequence[int] | None = None,
) -> torch.Tensor:
    """Compute logits of last hidden states ``[tokens, width]`` as the model itself does.

    The model's own forward runs, with its soft-capping and scaling; its body only returns
    ``hidden``.

    Args:
        model: a causal LM, PEFT-wrapped or not.
        hidden: ``[tokens, width]``.
        candidates: token ids; None: the whole vocabulary. Of a plain LM head only their rows are
            multiplied, in float32 or wider; one with an adapter is applied as a whole.

    Returns:
        ``[tokens, vocabulary or candidates]``.

    Raises:
        ModelError: the model makes logits by other means than its body and its head.
    """
    causal = causal_lm(model)
    head: nn.Module = causal.get_output_embeddings()
    num_calls = 0
    chosen: torch.Tensor | None = None  # int64 [candidates]
    if candidates is not None:
        # A list as an index would be copied to the device while the host waits.
        (chosen,) = put([np.array(candidates)], hidden.device)

    # In place of the body: the hidden states that are given.
    def body(*_: Any, **__: Any) -> _Handed:
        nonlocal num_calls
        num_calls += 1
        return _Handed(last_hidden_state=hidden[None])

    # In place of the LM head: only the candidates' rows [candidates, width].
    def rows(states: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(states.dtype, torch.float32)
        assert isinstance(head, nn.Linear) and chosen is not None
        weight = head.weight.index_select(0, chosen).to(wide)
        bias = None if head.bias is None else head.bias.index_select(0, chosen).to(wide)
        return nn.functional.linear(states.to(wide), weight, bias)

    # A model made from an encoder-decoder may call its decoder, not its body.
    replaced: dict[nn.Module, Callable[..., Any]] = {
        causal.base_model: body,
        text_decoder(causal): body,
    }
    narrow = candidates is not None and type(head) is nn.Linear
    if narrow:
        replaced[head] = rows

    # The model's own forward pass over them.
    try:
        for module, forward in replaced.items():
            module.forward = forward
        logits: torch.Tensor | None = causal(inputs_embeds=hidden[None], use_cache=False).logits
    finally:
        for module in replaced:
            vars(module).pop("forward", None)  # the class's own again
    if num_calls != 1 or logits is None:
        problem = "does not make its logits from its body's output"
        raise ModelError(f"{type(causal).__name__}: {problem}; use another model")
    if narrow or chosen is None:
        return logits[0]
    return logits[0].index_select(1, chosen)
