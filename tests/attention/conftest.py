"""Stand-ins for CUDA's attention kernels that follow their documentation, on the CPU and in any type."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import varlen

from fedsim.attention.backends import varlen_keywords
from fedsim.data.chat import TokenRow

Window = tuple[int, int]
INFERENCE_ONLY = "inference-only parameter"


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: Window, softcap: float
) -> torch.Tensor:
    """One row ``[length, heads, size]``; query i stands at position keys − queries + i (aligned at the lower right).

    A window (left, right) lets position p see p − left … p + right; −1 is without a bound.
    """
    shared = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(shared, dim=1) for part in (key, value))
    place = torch.arange(len(query))[:, None] + len(key) - len(query)
    other = torch.arange(len(key))
    seen = torch.ones(len(query), len(key), dtype=torch.bool)
    if window[0] >= 0:
        seen &= other >= place - window[0]
    if window[1] >= 0:
        seen &= other <= place + window[1]
    products = torch.einsum("qhd,khd->hqk", query, key) * scale
    if softcap > 0:
        products = softcap * torch.tanh(products / softcap)
    return torch.einsum("hqk,khd->qhd", products.masked_fill(~seen, -torch.inf).softmax(dim=-1), value)


def attend_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    max_query: int,
    max_key: int,
    used: torch.Tensor | None,
    scale: float,
    window: Window,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Packed rows, with the checks that the kernels make of their arguments."""
    assert query.dim() == key.dim() == value.dim() == 3 and query.shape[1] % key.shape[1] == 0
    assert all(part.stride(-1) == 1 for part in (query, key, value)), "the last dimension is contiguous"
    assert query_starts.dtype == key_starts.dtype == torch.int32 and len(query_starts) == len(key_starts)
    assert query_starts[-1] == len(query) and key_starts[-1] <= len(key)
    assert used is None or (used.dtype == torch.int32 and len(used) == len(key_starts) - 1)
    out = []
    for row in range(len(query_starts) - 1):
        begin, end = int(key_starts[row]), int(key_starts[row + 1])
        end = end if used is None else begin + int(used[row])
        mine = query[query_starts[row] : query_starts[row + 1]]
        assert len(mine) <= max_query and end - begin <= max_key, "the kernel's grid would leave tokens out"
        out.append(attend(mine, key[begin:end], value[begin:end], scale, window, softcap))
    return torch.cat(out)


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: Window = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """torch 2.12 and later."""
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError("Expect query and key/value to have the same number of heads")
    if seqused_k is not None and torch.is_grad_enabled() and query.requires_grad:
        raise RuntimeError(INFERENCE_ONLY)
    assert return_aux is block_table is None and isinstance(window_size, tuple)
    # Only one split of the keys, in a step of decoding, gives the same bits however many rows there are.
    in_order = seqused_k is not None and torch.are_deterministic_algorithms_enabled()
    assert num_splits == (1 if in_order else None)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return attend_rows(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, seqused_k, scale, window_size)


def varlen_attn_2_11(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: Window = (-1, -1),
) -> torch.Tensor:
    """torch 2.11: groups queries without being told, and knows no slots."""
    assert return_aux is None and isinstance(window_size, tuple)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return attend_rows(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, None, scale, window_size)


def varlen_attn_2_10(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    return_aux: Any = None,
) -> torch.Tensor:
    """torch 2.10: neither scale nor window."""
    raise AssertionError("must not be called")


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """flash-attn 2.7 and 2.8: causal closes the right side, whatever the window."""
    assert dropout_p == 0.0 and alibi_slopes is block_table is None and not return_attn_probs
    assert deterministic == torch.are_deterministic_algorithms_enabled(), "its backward pass adds in any order else"
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    window = (window_size[0], 0 if causal else window_size[1])
    return attend_rows(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None, scale, window, softcap)


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | int | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> torch.Tensor:
    """flash-attn 2.7 and 2.8: ``[rows, queries, heads, size]`` over the first ``cache_seqlens`` places of a cache."""
    unused = (k, v, rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad, block_table, alibi_slopes)
    assert all(part is None for part in unused) and not return_softmax_lse
    assert isinstance(cache_seqlens, torch.Tensor) and cache_seqlens.dtype == torch.int32
    assert not (torch.is_grad_enabled() and q.requires_grad), "has no backward pass"
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    window = (window_size[0], 0 if causal else window_size[1])
    rows = [
        attend(query, keys[:length], values[:length], scale, window, softcap)
        for query, keys, values, length in zip(q, k_cache, v_cache, cache_seqlens.tolist(), strict=True)
    ]
    return torch.stack(rows)


VARLEN = {"varlen": varlen_attn, "varlen 2.11": varlen_attn_2_11, "varlen 2.10": varlen_attn_2_10}


@pytest.fixture()
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """``stand_in("varlen" | "varlen 2.11" | "varlen 2.10" | "flash_attention_2")`` gives the backend's name."""

    def install(kernel: str) -> str:
        varlen_keywords.cache_clear()
        if kernel in VARLEN:
            monkeypatch.setattr(varlen, "varlen_attn", VARLEN[kernel])
            return "varlen"
        module = types.ModuleType("flash_attn")
        vars(module).update(flash_attn_varlen_func=flash_attn_varlen_func,
                            flash_attn_with_kvcache=flash_attn_with_kvcache)  # fmt: skip
        module.__spec__ = ModuleSpec("flash_attn", None)
        monkeypatch.setitem(sys.modules, "flash_attn", module)
        return "flash_attention_2"

    yield install
    varlen_keywords.cache_clear()


@pytest.fixture(scope="session")
def make_rows() -> Callable[[list[int]], list[TokenRow]]:
    """Rows of random tokens and the given lengths, whose second half is trained."""

    def make(lengths: list[int]) -> list[TokenRow]:
        draw = np.random.default_rng(0)
        return [TokenRow(draw.integers(0, 250, n).astype(np.int32), np.arange(n) >= n // 2) for n in lengths]

    return make
