"""Four ways to compute attention over packed rows, alike up to rounding.

Shapes are ``[tokens, heads, head size]``; a key head serves ``query heads / key heads`` query heads
(grouped queries). Attention is causal and aligned at the end: a row's last query sees all of its
positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final, Protocol

import torch
from torch.nn import functional as F

from fedsim.attention.spans import Spans


@dataclass(frozen=True)
class Scores:
    """Parameters that turn products of queries and keys into a layer's scores.

    Attributes:
        scale: factor of the products.
        window: a query sees itself and so many − 1 positions before it; None: all before it.
        softcap: scores become ``softcap · tanh(score / softcap)`` (Gemma 2, arXiv 2408.00118 §2);
            None: as they are.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True, eq=False)
class Cached:
    """A KV cache as a step of decoding reads it: a slot a row.

    Attributes:
        keys: ``[rows, capacity, key heads, head size]``.
        values: ``[rows, capacity, key heads, value size]``.
        lengths: int32 ``[rows]``, on the device: positions of each row, the query's own included.
        max_length: the largest of them, or more, up to the capacity.
        shared: results of :meth:`hiding` and :meth:`starts`, which the layers of a step share.
    """

    keys: torch.Tensor
    values: torch.Tensor
    lengths: torch.Tensor
    max_length: int
    shared: dict[Hashable, torch.Tensor] = field(default_factory=dict)

    def heads(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as ``[rows, key heads, max_length, head size]``, views."""
        keys, values = self.keys[:, : self.max_length], self.values[:, : self.max_length]
        return keys.transpose(1, 2), values.transpose(1, 2)

    def mask(self, window: int | None) -> torch.Tensor:
        """bool ``[rows, 1, 1, max_length]``: the positions that each row's query sees."""
        places = torch.arange(self.max_length, device=self.lengths.device)
        seen = places < self.lengths[:, None]
        if window is not None:
            seen &= places >= self.lengths[:, None] - window
        return seen[:, None, None]

    def hiding(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """``[rows, 1, 1, max_length]`` to add to scores: 0 where :meth:`mask` is true, else −∞."""
        if (window, dtype) not in self.shared:
            seen = self.mask(window)
            zeros = torch.zeros_like(seen, dtype=dtype)
            self.shared[window, dtype] = zeros.masked_fill_(~seen, -torch.inf)
        return self.shared[window, dtype]

    def starts(self, step: int) -> torch.Tensor:
        """int32 ``[rows + 1]``: 0, step, 2 · step, …"""
        if step not in self.shared:
            end = len(self.keys) * step
            device = self.keys.device
            self.shared[step] = torch.arange(0, end + 1, step, dtype=torch.int32, device=device)
        return self.shared[step]


class Backend(Protocol):
    """One way to compute attention."""

    def spans(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        spans: Spans,
        scores: Scores,
    ) -> torch.Tensor:
        """Packed queries over packed keys.

        Args:
            query: ``[queries, query heads, head size]``.
            key: ``[keys, key heads, head size]``.
            value: ``[keys, key heads, value size]``.

        Returns:
            ``[queries, query heads, value size]``.
        """
        ...

    def slots(self, query: torch.Tensor, cached: Cached, scores: Scores) -> torch.Tensor:
        """One query a row over the row's slot of a KV cache, as in a step of decoding; no gradient.

        Args:
            query: ``[rows, query heads, head size]``.

        Returns:
            ``[rows, query heads, value size]``.
        """
        ...


class Sdpa:
    """torch's scaled_dot_product_attention, row by row on a CPU, else by groups of padded rows."""

    def spans(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        spans: Spans,
        scores: Scores,
    ) -> torch.Tensor:
        """See :class:`Backend`."""
        assert scores.softcap is None, "softcap is refused when the model is loaded"
        if query.device.type == "cpu":
            return self._row_by_row(query, key, value, spans, scores)
        return self._padded(query, key, value, spans, scores)

    @staticmethod
    def _row_by_row(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans, scores: Scores
    ) -> torch.Tensor:
        """Attend to views of each row; no padding is computed."""
        grouped = query.shape[1] != key.shape[1]
        outs = []
        parts = (
            query.split(spans.query_lengths),
            key.split(spans.key_lengths),
            value.split(spans.key_lengths),
        )
        for number, row in enumerate(zip(*parts, strict=True)):
            q, k, v = (part.transpose(0, 1)[None] for part in row)  # [1, heads, length, size]
            causal, mask = spans.row_mask(number, scores.window, query.dtype)
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, scale=scores.scale, enable_gqa=grouped
            )
            # squeeze, since an index in its place would fill zeros in the backward pass.
            outs.append(out.squeeze(0).transpose(0, 1))
        return torch.cat(outs)

    @staticmethod
    def _padded(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans, scores: Scores
    ) -> torch.Tensor:
        """Attend to each group of rows of similar length in one call."""

        def attend(
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            mask: torch.Tensor | None,
        ) -> torch.Tensor:
            # q, k, v: [rows, heads, length, size]
            grouped = q.shape[1] != k.shape[1]
            if grouped and mask is not None and q.device.type != "cpu":
                return folded(q, k, v, mask, scores.scale)
            return F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scores.scale,
                enable_gqa=grouped,
            )

        return _by_groups(query, key, value, spans, scores.window, attend)

    def slots(self, query: torch.Tensor, cached: Cached, scores: Scores) -> torch.Tensor:
        """See :class:`Backend`. Query heads that share a key head become its queries: no copies."""
        assert scores.softcap is None, "softcap is refused when the model is loaded"
        rows, heads, size = query.shape
        keys, values = cached.heads()
        num_keys = keys.shape[1]  # key heads
        grouped = query.view(rows, num_keys, heads // num_keys, size)
        hidden = cached.hiding(scores.window, query.dtype)

        # On a CPU by matrix products [rows · key heads, group, positions]: torch's fused kernel is
        # made for many queries.
        if query.device.type == "cpu":
            scaled = (grouped * scores.scale).flatten(0, 1)
            products = torch.bmm(scaled, keys.flatten(0, 1).transpose(1, 2))
            products.view(rows, -1, *products.shape[1:]).add_(hidden)
            weights = products.softmax(dim=-1)
            return torch.bmm(weights, values.flatten(0, 1)).view(rows, heads, -1)

        out = F.scaled_dot_product_attention(
            grouped,
            keys,
            values,
            attn_mask=hidden,
            scale=scores.scale,
        )
        return out.reshape(rows, heads, -1)


class Eager:
    """The definition, softmax(scale · q kᵀ) v in fp32 or wider; it can cap scores on any device."""

    def spans(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        spans: Spans,
        scores: Scores,
    ) -> torch.Tensor:
        """See :class:`Backend`."""

        def attend(
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            mask: torch.Tensor | None,
        ) -> torch.Tensor:
            if mask is None:  # causal
                lengths = q.shape[2], k.shape[2]
                mask = torch.ones(lengths, dtype=torch.bool, device=q.device).tril()
            return self._attend(q, k, v, mask, scores)

        return _by_groups(query, key, value, spans, scores.window, attend)

    def slots(self, query: torch.Tensor, cached: Cached, scores: Scores) -> torch.Tensor:
        """See :class:`Backend`."""
        keys, values = cached.heads()
        mask = cached.mask(scores.window)
        return self._attend(query[:, :, None], keys, values, mask, scores)[:, :, 0]

    @staticmethod
    def _attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor,
        scores: Scores,
    ) -> torch.Tensor:
        """Attend to tensors ``[rows, heads, length, head size]`` under a mask."""
        # One key head and value head for each query head.
        shared = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(shared, dim=1)
        value = value.repeat_interleave(shared, dim=1)

        # Scores [rows, heads, queries, positions].
        wide = torch.promote_types(query.dtype, torch.float32)
        products = (query @ key.transpose(2, 3)).to(wide) * scores.scale
        if scores.softcap is not None:
            products = scores.softcap * torch.tanh(products / scores.softcap)
        weights = products.masked_fill(~mask, -torch.inf).softmax(dim=-1)
        return weights.to(value.dtype) @ value


class Varlen:
    """torch's own variable-length kernel (FlashAttention-2 inside): bf16 and fp16 on CUDA."""

    def spans(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        spans: Spans,
        scores: Scores,
    ) -> torch.Tensor:
        """See :class:`Backend`."""
        assert scores.softcap is None, "softcap is refused when the model is loaded"
        return _varlen_attn(
            query,
            key,
            value,
            spans.query_starts,
            spans.key_starts,
            spans.max_query,
            spans.max_key,
            scores,
        )

    def slots(self, query: torch.Tensor, cached: Cached, scores: Scores) -> torch.Tensor:
        """See :class:`Backend`."""
        assert scores.softcap is None, "softcap is refused when the model is loaded"
        if "seqused_k" not in varlen_keywords():  # a torch whose kernel knows no slots
            return BACKENDS["sdpa"].slots(query, cached, scores)

        # The slots as packed rows of `capacity` positions, of which the first `lengths` are used.
        capacity = cached.keys.shape[1]
        key, value = cached.keys.flatten(0, 1), cached.values.flatten(0, 1)
        more: dict[str, Any] = {"seqused_k": cached.lengths}
        if scores.window is None or scores.window >= cached.max_length:
            # One query sees all positions of its slot, causal or not; only without windows does the
            # kernel read each key head once for all query heads that share it.
            more["window_size"] = (-1, -1)
        if torch.are_deterministic_algorithms_enabled() and "num_splits" in varlen_keywords():
            more["num_splits"] = 1  # else the kernel splits the keys by the number of rows
        starts = cached.starts(1), cached.starts(capacity)
        return _varlen_attn(query, key, value, *starts, 1, cached.max_length, scores, **more)


class Flash2:
    """The flash-attn package (FlashAttention-2, arXiv 2307.08691): bf16 and fp16 on CUDA."""

    def spans(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        spans: Spans,
        scores: Scores,
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
            # Of the backward pass; torch's setting does not reach it.
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return out

    def slots(self, query: torch.Tensor, cached: Cached, scores: Scores) -> torch.Tensor:
        """See :class:`Backend`."""
        from flash_attn import flash_attn_with_kvcache

        out: torch.Tensor = flash_attn_with_kvcache(
            query[:, None],
            cached.keys[:, : cached.max_length],
            cached.values[:, : cached.max_length],
            cache_seqlens=cached.lengths,
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
"""Name in model.attention → backend."""


def _by_groups(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: Spans,
    window: int | None,
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor],
) -> torch.Tensor:
    """Attend to packed rows that are padded in groups of similar length: less than half is padding.

    Args:
        query: packed, as of :class:`Backend`; so are ``key`` and ``value``.
        attend: takes queries, keys and values ``[rows, heads, length, head size]``, and the mask.

    Returns:
        ``[queries, query heads, value size]``, packed.
    """
    outs = []
    for group in spans.groups:
        places = (group.query_places, group.key_places, group.key_places)
        padded = []
        for part, where in zip((query, key, value), places, strict=True):
            rows = part if spans.is_even else part.index_select(0, where)  # [rows · length, …]
            rows = rows.view(group.num_rows, -1, *part.shape[1:])
            padded.append(rows.transpose(1, 2))
        q, k, v = padded
        outs.append(attend(q, k, v, group.mask(window)).transpose(1, 2).flatten(0, 1))

    # Back to packed queries, without the padding.
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return out if spans.is_even else out.index_select(0, spans.real_queries)


def folded(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Masked attention with the query heads of a key head folded into queries of that head.

    With a mask and ``enable_gqa`` torch takes its unfused kernel on CUDA, which keeps fp32 scores;
    folded, the memory-efficient one fits, and no key is copied.

    Args:
        query: ``[rows, query heads, queries, head size]``; keys and values likewise.
        mask: bool ``[rows or 1, 1, queries, keys]``.

    Returns:
        ``[rows, query heads, queries, value size]``.
    """
    rows, heads, length, size = query.shape
    shared = heads // key.shape[1]
    queries = query.reshape(rows, key.shape[1], shared * length, size)
    mask = mask.repeat(1, 1, shared, 1)
    out = F.scaled_dot_product_attention(queries, key, value, attn_mask=mask, scale=scale)
    return out.reshape(rows, heads, length, -1)


def leave_out_cudnn() -> None:
    """Keep SDPA from taking cuDNN's kernels in this process.

    Where torch prefers them (compute capability 9 and 10, cuDNN newer than 9.15), cuDNN builds a
    plan for every new shape, some 0.4 s each, and packed rows hardly ever repeat a shape.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def _left(window: int | None) -> int:
    """Flash attention's left window: positions before the query; −1 is all."""
    return -1 if window is None else window - 1


@cache
def varlen_keywords() -> frozenset[str]:
    """Arguments that the installed torch's ``varlen_attn`` takes; empty if there is no such kernel.

    torch 2.10 has ``is_causal`` and neither scale nor window; 2.11 has ``scale`` and
    ``window_size`` and groups queries by default; later ones add ``enable_gqa``, which must be set,
    and ``seqused_k``.
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
    **more: Any,
) -> torch.Tensor:
    """Call torch's kernel with the arguments that it takes; causal (right window 0) by default."""
    from torch.nn.attention.varlen import varlen_attn

    wanted: dict[str, Any] = {
        "scale": scores.scale,
        "window_size": (_left(scores.window), 0),
        **more,
    }
    if "enable_gqa" in varlen_keywords():  # grouped queries have to be asked for
        wanted["enable_gqa"] = query.shape[1] != key.shape[1]
    out = varlen_attn(query, key, value, query_starts, key_starts, max_query, max_key, **wanted)
    assert isinstance(out, torch.Tensor)
    return out
