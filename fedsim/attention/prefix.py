"""Logits of a few candidate tokens after prompts that share a long prefix, here called the head.

The head's keys and values are computed once and reused by every unit of rows; only the candidates'
rows of the LM head are multiplied. Tails are packed without padding, and with fixed units a row's
result does not depend on the rank that computed it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fedsim.attention.backends import Backend, Scores
from fedsim.attention.forward import Narrowed, Place, causal_lm, packed_hidden
from fedsim.attention.head import head_logits
from fedsim.attention.spans import Spans, put


@dataclass(frozen=True, eq=False)
class Head:
    """Prefix of all prompts, already read by the model.

    Attributes:
        length: number of tokens; 0 is an empty head.
        kept: keys and values ``[length, key heads, head size]`` of each attention.
    """

    length: int
    kept: dict[Place, tuple[torch.Tensor, torch.Tensor]]


class _Reading:
    """Layout of the head as a row of its own, whose keys and values are kept."""

    def __init__(self, head: Head, spans: Spans) -> None:
        self.head = head
        self.spans = spans

    def attend(
        self,
        backend: Backend,
        place: Place,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scores: Scores,
    ) -> torch.Tensor:
        """See :class:`fedsim.attention.forward.Layout`."""
        self.head.kept[place] = (key, value)
        return backend.spans(query, key, value, self.spans, scores)


class _AfterHead:
    """Layout of tails behind the head; a row's queries are its last tokens, in a given number."""

    def __init__(
        self,
        head: Head,
        tails: Sequence[int],
        queries: Sequence[int],
        device: torch.device,
    ) -> None:
        self.head = head
        self.tails = list(tails)
        self.spans = Spans(queries, [head.length + length for length in tails], device=device)

    def attend(
        self,
        backend: Backend,
        place: Place,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scores: Scores,
    ) -> torch.Tensor:
        """See :class:`fedsim.attention.forward.Layout`."""
        if self.head.length:
            head_key, head_value = self.head.kept[place]
            key, value = self._behind(head_key, key), self._behind(head_value, value)
        return backend.spans(query, key, value, self.spans, scores)

    def _behind(self, head: torch.Tensor, tails: torch.Tensor) -> torch.Tensor:
        """Copy the head before each tail, packed, which any backend can take.

        Attending to head and tails apart and merging the softmaxes gained only 1 to 4 %.
        """
        parts = []
        for tail in tails.split(self.tails):
            parts += [head, tail]
        return torch.cat(parts)


def common_length(prompts: Sequence[np.ndarray]) -> int:
    """Number of leading ids that all ``prompts`` (int ``[length]`` each, none empty) share.

    It is less than the shortest prompt's length, so that each keeps a tail of one token or more.
    """
    assert prompts, "a common head needs at least one prompt"
    first, shared = prompts[0], min(len(p) for p in prompts) - 1
    assert shared >= 0, "a prompt has at least one token"
    for prompt in prompts[1:]:  # each can only shorten what the earlier ones share
        differs = np.flatnonzero(prompt[:shared] != first[:shared])
        if len(differs):
            shared = int(differs[0])
    return shared


@torch.no_grad()
def read_head(model: nn.Module, ids: np.ndarray) -> Head:
    """Compute the keys and values of the common head.

    Args:
        model: a causal LM, PEFT-wrapped or not, in eval mode. Weights or adapter must not change
            while the head is in use.
        ids: int ``[length]``, may be empty.
    """
    assert not model.training, "scoring needs eval mode: dropout would make the head random"
    head = Head(len(ids), {})
    if len(ids):
        device = causal_lm(model).device
        spans = Spans([len(ids)], device=device)
        (tokens,) = put([ids], device)
        packed_hidden(model, tokens, spans.positions, _Reading(head, spans))
    return head


@torch.no_grad()
def candidate_logits(
    model: nn.Module, head: Head, tails: Sequence[np.ndarray], candidates: Sequence[int]
) -> torch.Tensor:
    """Compute logits of ``candidates`` as the token that follows each prompt ``head + tail``.

    Args:
        model: the model that read ``head``, unchanged since, in eval mode.
        tails: int ``[length]`` each, none empty.
        candidates: token ids.

    Returns:
        ``[len(tails), len(candidates)]`` on the CPU, in float32 or wider, as hidden states and head
        rows are multiplied.
    """
    assert not model.training, "scoring needs eval mode: dropout would make logits random"
    assert tails and all(len(t) for t in tails), "each prompt needs a tail of one token or more"
    lengths, device = [len(t) for t in tails], causal_lm(model).device

    # All tokens of the tails; the last layer computes only each tail's last one.
    layout = _AfterHead(head, lengths, lengths, device)
    (ids,) = put([np.concatenate(tails)], device)
    last = layout.spans.query_starts[1:].long() - 1
    narrowed = Narrowed(last, _AfterHead(head, lengths, [1] * len(tails), device))
    hidden = packed_hidden(model, ids, layout.spans.positions, layout, narrowed)

    logits = head_logits(model, hidden, candidates)  # [tails, candidates]
    return logits.to(torch.promote_types(hidden.dtype, torch.float32)).cpu()
