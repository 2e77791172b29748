"""Self-test of an attention backend on its device, against the definition in a wider type."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Final

import torch
from transformers import PretrainedConfig

from fedsim.attention.backends import BACKENDS, Backend, Cached, Eager, Scores
from fedsim.attention.spans import Spans

LENGTHS: Final = (1, 2, 17, 64, 127, 300)
"""Queries of each row: single ones, and lengths around and between the block sizes of kernels."""

PREFIX: Final = 33
"""Positions before the first query of a row that goes on."""

LONGEST_WINDOW: Final = 100
"""A longer window is tried at this length, as no row would be longer than it."""

LIMITS: Final = {torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Largest ‖result − definition‖ / ‖definition‖ by rounding; a bf16 number is 2e-3 off at most."""

WIDE_LIMIT: Final = 1e-5
"""The same in wider types."""

TENSORS: Final = ("out", "dq", "dk", "dv")


@dataclass(frozen=True)
class Heads:
    """Sizes of one layer's attention.

    Attributes:
        queries: query heads.
        keys: key heads.
        size: numbers of a query's and of a key's head.
        value_size: numbers of a value's head.
        window: a query sees itself and so many − 1 positions before it; None: all before it.
        softcap: bound of the scores; None: none.
    """

    queries: int
    keys: int
    size: int
    value_size: int
    window: int | None = None
    softcap: float | None = None

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Windows that are tried."""
        if self.window is None:
            return (None,)
        return (None, min(self.window, LONGEST_WINDOW))


def fault(name: str, heads: Heads, dtype: torch.dtype, device: torch.device) -> str | None:
    """Describe the fault of a backend's results on a device; None if they are right.

    Packed rows, rows behind a prefix and steps of decoding are compared with :class:`Eager` in fp32
    (of wider types in fp64): values and gradients. If torch's algorithms have to be deterministic,
    a second call must give the same bits. The answer is kept for the process.

    Args:
        name: of :data:`fedsim.attention.backends.BACKENDS`.
        heads: sizes of the attention.
        dtype: of queries, keys and values.
        device: on which the backend runs.

    Raises:
        torch.OutOfMemoryError: the device has no room for a few MiB.
    """
    return _fault(name, heads, dtype, device, torch.are_deterministic_algorithms_enabled())


@cache
def _fault(
    name: str,
    heads: Heads,
    dtype: torch.dtype,
    device: torch.device,
    exact: bool,
) -> str | None:
    limit = LIMITS.get(dtype, WIDE_LIMIT)
    try:
        for what, tensor, distance in distances(BACKENDS[name], heads, dtype, device):
            if not distance <= limit:  # NaN too
                figures = f"{distance:.2g} off, {limit:g} is allowed"
                return f"its self-test failed: {tensor} of {what} is {figures}"
        if exact:
            moving = _moving(BACKENDS[name], heads, dtype, device)
            if moving is not None:
                return f"its self-test failed: {moving} has other bits the second time"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any class: kernels refuse in their own ways
        words = " ".join(str(error).split())[:200]
        return f"its self-test ended with {type(error).__name__}: {words}"
    return None


def distances(
    backend: Backend, heads: Heads, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, str, float]]:
    """Case, tensor and relative distance from the definition, ‖Δ‖ / ‖definition‖."""
    wide = torch.float32 if dtype in LIMITS else torch.float64
    for what, case in _cases(heads, device):
        found, wanted = case(backend, dtype), case(Eager(), wide, dtype)
        # A step of decoding has no gradients, so that its list is shorter.
        for tensor, a, b in zip(TENSORS, found, wanted, strict=False):
            yield what, tensor, float((a.double() - b.double()).norm() / b.double().norm())


def _moving(backend: Backend, heads: Heads, dtype: torch.dtype, device: torch.device) -> str | None:
    """Name the first tensor that has other bits in a second, equal call; None without one."""
    for what, case in _cases(heads, device):
        first, second = case(backend, dtype), case(backend, dtype)
        for tensor, a, b in zip(TENSORS, first, second, strict=False):
            if not torch.equal(a, b):
                return f"{tensor} of {what}"
    return None


@dataclass(frozen=True)
class _Rows:
    """Case of packed rows, behind a prefix or not."""

    heads: Heads
    scores: Scores
    spans: Spans

    def __call__(
        self,
        backend: Backend,
        dtype: torch.dtype,
        rounded: torch.dtype | None = None,
    ) -> list[torch.Tensor]:
        """Compute the result and the gradients of queries, keys and values.

        Args:
            backend: computes them.
            dtype: of the computation.
            rounded: the type to which the numbers are rounded first; None: ``dtype``.
        """
        drawn = rounded or dtype
        heads, device = self.heads, self.spans.device
        num_queries, num_keys = self.spans.num_queries, sum(self.spans.key_lengths)
        query = _draw(0, (num_queries, heads.queries, heads.size), drawn, device)
        key = _draw(1, (num_keys, heads.keys, heads.size), drawn, device)
        value = _draw(2, (num_keys, heads.keys, heads.value_size), drawn, device)

        # Gradients of the result's product with a fixed weight.
        weight = _draw(3, (num_queries, heads.queries, heads.value_size), drawn, device)
        with torch.enable_grad():
            inputs = [part.to(dtype).requires_grad_() for part in (query, key, value)]
            out = backend.spans(inputs[0], inputs[1], inputs[2], self.spans, self.scores)
            gradients = torch.autograd.grad(out, inputs, weight.to(out.dtype))
        return [out.detach(), *gradients]


@dataclass(frozen=True)
class _Step:
    """Case of a step of decoding: one query a row, over slots of different lengths."""

    heads: Heads
    scores: Scores
    device: torch.device

    def __call__(
        self,
        backend: Backend,
        dtype: torch.dtype,
        rounded: torch.dtype | None = None,
    ) -> list[torch.Tensor]:
        """Compute only the result; arguments as of :class:`_Rows`."""
        drawn = rounded or dtype
        heads, rows, capacity = self.heads, len(LENGTHS), max(LENGTHS) + PREFIX
        query = _draw(4, (rows, heads.queries, heads.size), drawn, self.device)
        keys = _draw(5, (rows, capacity, heads.keys, heads.size), drawn, self.device)
        values = _draw(6, (rows, capacity, heads.keys, heads.value_size), drawn, self.device)
        lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=self.device)
        with torch.no_grad():
            cached = Cached(keys.to(dtype), values.to(dtype), lengths, max(LENGTHS))
            return [backend.slots(query.to(dtype), cached, self.scores)]


def _cases(heads: Heads, device: torch.device) -> Iterator[tuple[str, _Rows | _Step]]:
    """Names and cases of the self-test."""
    behind = [length + PREFIX for length in LENGTHS]
    for window in heads.windows:
        scores = Scores(heads.size**-0.5, window, heads.softcap)
        words = "" if window is None else f", a window of {window}"
        rows = f"rows of {LENGTHS[0]} to {LENGTHS[-1]} tokens"
        yield rows + words, _Rows(heads, scores, Spans(LENGTHS, device=device))
        after = Spans(LENGTHS, behind, device=device)
        yield f"{rows} behind a prefix{words}", _Rows(heads, scores, after)
        yield f"a step of decoding{words}", _Step(heads, scores, device)


def _draw(
    seed: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Draw normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def heads_of(config: PretrainedConfig) -> tuple[Heads, ...]:
    """Attentions of a model's layers; two if some layers have wider heads (``global_head_dim``)."""
    # The attention of most layers.
    text = config.get_text_config()
    size, value_size = head_sizes(text)
    queries, keys = int(text.num_attention_heads), num_key_heads(text)
    window = getattr(text, "sliding_window", None)
    softcap = getattr(text, "attn_logit_softcapping", None)
    found = Heads(
        queries,
        keys,
        size,
        value_size,
        window=int(window) if window else None,
        softcap=None if softcap is None else float(softcap),
    )

    # Layers without a window may have wider heads (Gemma 4).
    wider = int(getattr(text, "global_head_dim", None) or size)
    if wider == size:
        return (found,)
    return found, Heads(queries, keys, wider, wider, softcap=found.softcap)


def head_sizes(text: PretrainedConfig) -> tuple[int, int]:
    """Numbers of a key head and of a value head; in latent attention (DeepSeek) they differ."""
    width = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    plain = getattr(text, "qk_nope_head_dim", None)
    rotated = getattr(text, "qk_rope_head_dim", None)
    keys = plain + rotated if plain and rotated else getattr(text, "qk_head_dim", None)
    return int(keys or width), int(getattr(text, "v_head_dim", None) or width)


def num_key_heads(text: PretrainedConfig) -> int:
    """Key heads of a layer; latent attention (DeepSeek) unfolds one for each query head."""
    heads = int(text.num_attention_heads)
    if getattr(text, "kv_lora_rank", None):
        return heads
    return int(getattr(text, "num_key_value_heads", None) or heads)
