"""Four ways to compute attention over packed rows, alike up to rounding.

Shapes are ``[tokens, heads, head size]``; a key head serves ``query heads / key heads`` query heads (grouped queries).
Attention is causal and aligned at the end: a row's last query sees all of its positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Protocol

import torch
from torch.nn import functional as F

from fedsim.attention.spans import Spans


@dataclass(frozen=True)
class Scores:
    """How a layer turns products of queries and keys into scores.

    Attributes:
        scale: factor of the products.
        window: a query sees itself and so many − 1 positions before it; None: all before it.
        softcap: scores become ``softcap · tanh(score / softcap)`` (Gemma 2, arXiv 2408.00118 §2); None: as they are.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


class Backend(Protocol):
    """One way to compute attention."""

    def spans(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans, scores: Scores
    ) -> torch.Tensor:
        """Packed queries over packed keys.

        Args:
            query: ``[queries, query heads, head size]``.
            key: ``[keys, key heads, head size]``; ``value`` as well.

        Returns:
            ``[queries, query heads, head size]``.
        """
        ...

    def slots(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        lengths: torch.Tensor,
        max_length: int,
        scores: Scores,
    ) -> torch.Tensor:
        """One query a row over the row's slot of a KV cache, as in a step of decoding; no gradient.

        Args:
            query: ``[rows, query heads, head size]``.
            keys: ``[rows, capacity, key heads, head size]``; ``values`` as well.
            lengths: int32 ``[rows]``, on the device: positions of each row, the query's own included.
            max_length: the largest of them, or more, up to the capacity.

        Returns:
            ``[rows, query heads, head size]``.
        """
        ...


class Sdpa:
    """torch's scaled_dot_product_attention: row by row on a CPU, else a call for each group of similar rows, padded."""

    def spans(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans, scores: Scores
    ) -> torch.Tensor:
        """See :class:`Backend`."""
        assert scores.softcap is None, "softcap is refused when the model is loaded"
        if query.device.type == "cpu" and spans.is_causal(scores.window):
            return self._row_by_row(query, key, value, spans, scores)
        grouped = query.shape[1] != key.shape[1]

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scores.scale, enable_gqa=grouped
            )

        return _by_groups(query, key, value, spans, scores.window, attend)

    @staticmethod
    def _row_by_row(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans, scores: Scores
    ) -> torch.Tensor:
        """Views of each row, causal; no padding is computed."""
        outs = []
        for row in zip(*(part.split(spans.query_lengths) for part in (query, key, value)), strict=True):
            q, k, v = (part.transpose(0, 1)[None] for part in row)
            grouped = query.shape[1] != key.shape[1]
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scores.scale, enable_gqa=grouped)
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    def slots(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        lengths: torch.Tensor,
        max_length: int,
        scores: Scores,
    ) -> torch.Tensor:
        """See :class:`Backend`. Query heads that share a key head are queries of one batch entry: no key is copied."""
        assert scores.softcap is None, "softcap is refused when the model is loaded"
        rows, heads, size = query.shape
        if query.device.type == "cpu":  # the fused kernel is made for many queries
            mask = _slot_mask(lengths, max_length, scores.window)[:, None, None]
            grouped = query.view(rows, keys.shape[2], heads // keys.shape[2], size)
            hidden = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
            products = (grouped * scores.scale) @ keys[:, :max_length].permute(0, 2, 3, 1) + hidden
            return (products.softmax(dim=-1) @ values[:, :max_length].transpose(1, 2)).view(rows, heads, size)
        out = F.scaled_dot_product_attention(
            query.view(rows, keys.shape[2], heads // keys.shape[2], size),
            keys[:, :max_length].transpose(1, 2),
            values[:, :max_length].transpose(1, 2),
            attn_mask=_slot_mask(lengths, max_length, scores.window)[:, None, None],
            scale=scores.scale,
        )
        return out.reshape(rows, heads, size)


class Eager:
    """The definition, in fp32 or wider: softmax(scale · q kᵀ) v; the one that can cap scores on any device."""

    def spans(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans, scores: Scores
    ) -> torch.Tensor:
        """See :class:`Backend`."""

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            if mask is None:
                mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
            return self._attend(q, k, v, mask, scores)

        return _by_groups(query, key, value, spans, scores.window, attend)

    def slots(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        lengths: torch.Tensor,
        max_length: int,
        scores: Scores,
    ) -> torch.Tensor:
        """See :class:`Backend`."""
        mask = _slot_mask(lengths, max_length, scores.window)[:, None, None]
        key, value = keys[:, :max_length].transpose(1, 2), values[:, :max_length].transpose(1, 2)
        return self._attend(query[:, :, None], key, value, mask, scores)[:, :, 0]

    @staticmethod
    def _attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        """``[rows, heads, length, head size]`` each."""
        shared = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
        wide = torch.promote_types(query.dtype, torch.float32)
        products = (query @ key.transpose(2, 3)).to(wide) * scores.scale
        if scores.softcap is not None:
            products = scores.softcap * torch.tanh(products / scores.softcap)
        weights = products.masked_fill(~mask, -torch.inf).softmax(dim=-1)
        return weights.to(value.dtype) @ value


class Varlen:
    """torch's own variable-length kernel (FlashAttention-2 inside): bf16 and fp16 on CUDA."""

    def spans(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans, scores: Scores
    ) -> torch.Tensor:
        """See :class:`Backend`."""
        assert scores.softcap is None, "softcap is refused when the model is loaded"
        return _varlen_attn(
            query, key, value, spans.query_starts, spans.key_starts, spans.max_query, spans.max_key, scores
        )

    def slots(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        lengths: torch.Tensor,
        max_length: int,
        scores: Scores,
    ) -> torch.Tensor:
        """See :class:`Backend`."""
        assert scores.softcap is None, "softcap is refused when the model is loaded"
        if "seqused_k" not in varlen_keywords():  # a torch whose kernel knows no slots
            return BACKENDS["sdpa"].slots(query, keys, values, lengths, max_length, scores)
        rows, capacity = keys.shape[:2]
        starts = torch.arange(rows + 1, dtype=torch.int32, device=query.device)
        key, value = keys.flatten(0, 1), values.flatten(0, 1)
        return _varlen_attn(query, key, value, starts, starts * capacity, 1, max_length, scores, seqused_k=lengths)


class Flash2:
    """The flash-attn package (FlashAttention-2, arXiv 2307.08691): bf16 and fp16 on CUDA."""

    def spans(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans, scores: Scores
    ) -> torch.Tensor:
        """See :class:`Backend`."""
        from flash_attn import flash_attn_varlen_func

        out: torch.Tensor = flash_attn_varlen_func(
            query,
            key,
            value,
            spans.query_starts,
            spans.key_starts,
            spans.max_query,
            spans.max_key,
            softmax_scale=scores.scale,
            causal=True,
            window_size=(_left(scores.window), -1 if scores.window is None else 0),
            softcap=scores.softcap or 0.0,
            deterministic=torch.are_deterministic_algorithms_enabled(),  # of the backward pass; torch cannot tell it
        )
        return out

    def slots(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        lengths: torch.Tensor,
        max_length: int,
        scores: Scores,
    ) -> torch.Tensor:
        """See :class:`Backend`."""
        from flash_attn import flash_attn_with_kvcache

        out: torch.Tensor = flash_attn_with_kvcache(
            query[:, None],
            keys[:, :max_length],
            values[:, :max_length],
            cache_seqlens=lengths,
            softmax_scale=scores.scale,
            causal=True,
            window_size=(_left(scores.window), -1 if scores.window is None else 0),
            softcap=scores.softcap or 0.0,
        )
        return out[:, 0]


BACKENDS: Final[dict[str, Backend]] = {
    "sdpa": Sdpa(),
    "eager": Eager(),
    "varlen": Varlen(),
    "flash_attention_2": Flash2(),
}
"""By the name in model.attention."""


def _by_groups(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: Spans,
    window: int | None,
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor],
) -> torch.Tensor:
    """Attention of packed rows that are padded in groups of similar length, so that less than half is padding.

    Args:
        attend: takes ``[rows, heads, length, head size]`` of queries, keys and values, and the mask.
    """
    outs = []
    for group in spans.groups:
        places = (group.query_places, group.key_places, group.key_places)
        padded = [
            (part if spans.is_even else part.index_select(0, where)).view(group.num_rows, -1, *part.shape[1:])
            for part, where in zip((query, key, value), places, strict=True)
        ]
        q, k, v = (part.transpose(1, 2) for part in padded)
        outs.append(attend(q, k, v, group.mask(window)).transpose(1, 2).flatten(0, 1))
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return out if spans.is_even else out.index_select(0, spans.real_queries)


def _slot_mask(lengths: torch.Tensor, max_length: int, window: int | None) -> torch.Tensor:
    """bool ``[rows, max_length]``: the positions that each row's query sees."""
    places = torch.arange(max_length, device=lengths.device)
    seen = places < lengths[:, None]
    return seen if window is None else seen & (places >= lengths[:, None] - window)


def _left(window: int | None) -> int:
    """Flash attention's left window: positions before the query; −1 is all."""
    return -1 if window is None else window - 1


@cache
def varlen_keywords() -> frozenset[str]:
    """Arguments that the installed torch's ``varlen_attn`` takes; empty where it has none.

    torch 2.10 knows ``is_causal`` and neither scale nor window; 2.11 has ``scale`` and ``window_size`` and groups
    queries without being told; later ones add ``enable_gqa``, which must be set, and ``seqused_k``.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def _varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    max_query: int,
    max_key: int,
    scores: Scores,
    **more: torch.Tensor,
) -> torch.Tensor:
    """torch's kernel, causal (right window 0), with the arguments that this version wants."""
    from torch.nn.attention.varlen import varlen_attn

    wanted: dict[str, Any] = {"scale": scores.scale, "window_size": (_left(scores.window), 0), **more}
    if "enable_gqa" in varlen_keywords():
        wanted["enable_gqa"] = query.shape[1] != key.shape[1]
    out = varlen_attn(query, key, value, query_starts, key_starts, max_query, max_key, **wanted)
    assert isinstance(out, torch.Tensor)
    return out
