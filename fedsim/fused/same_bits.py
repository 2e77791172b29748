"""Layers on a CPU with fewer passes over memory than the plain modules', and with the same bits.

Every number is rounded where the modules and autograd round it, and sums are in their order, so
that no result depends on whether a layer is replaced. :mod:`fedsim.fused.cpu` replaces the layers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor | None,
        weight: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        total, out, rstd = _normed(x, delta, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        ctx.set_materialize_grads(False)
        return total, out

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        d_total: Tensor | None,
        d_out: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        total, weight, rstd = ctx.saved_tensors
        grad = d_total
        if d_out is not None:
            # Through the weight, then through 1 / rms, in autograd's order.
            grad = d_out * weight
            part = grad * total
            d_mean = part.sum(-1, keepdim=True).mul_(-0.5).mul_(rstd.pow(3)).div_(total.shape[-1])
            grad.mul_(rstd)
            if d_total is not None:
                grad.add_(d_total)
            grad.add_(torch.mul(total, d_mean.mul_(2), out=part))
        return grad, grad if ctx.needs_input_grad[1] else None, None, None


def _normed(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum, the normed sum, and 1 / rms ``[…, 1]``."""
    total = x if delta is None else x + delta
    rstd = total.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    return total, (total * rstd).mul_(weight), rstd


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight · x / rms(x)`` over the last dimension in fp32, as transformers' Llama has it."""
    return add_norm(x, None, weight, eps)[1]


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x + delta``, or ``x`` without ``delta``, and that normed as by :func:`norm`.

    The weight is frozen. The residual has to be the first result, so that gradients are added in
    the order of the modules.
    """
    if not torch.is_grad_enabled():
        return _normed(x, delta, weight, eps)[:2]
    total, out = _AddNorm.apply(x, delta, weight, eps)
    return total, out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, negative: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin, negative)
        return _turned(x, cos, negative, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        # The transpose: sines change places with their negatives, and each half with the other.
        cos, sin, negative = ctx.saved_tensors
        half = sin.shape[-1] // 2
        swapped = (part.roll(half, -1) for part in (sin, negative))
        return _turned(d_out, cos, *swapped), None, None, None


def _turned(x: Tensor, cos: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """``x · cos``, plus the exchanged halves of ``x`` times halves of ``first`` and ``second``."""
    half = x.shape[-1] // 2
    other = torch.empty_like(x)
    torch.mul(x[..., half:], first[..., :half], out=other[..., :half])
    torch.mul(x[..., :half], second[..., half:], out=other[..., half:])
    return (x * cos).add_(other)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary positions, as transformers' ``apply_rotary_pos_emb``.

    Args:
        q: ``[batch, query heads, length, head size]``.
        k: ``[batch, key heads, length, head size]``.
        cos: ``[1 or batch, length, head size]``.
        sin: likewise.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    negative = -sin
    if not torch.is_grad_enabled():
        return _turned(q, cos, negative, sin), _turned(k, cos, negative, sin)
    return _Rotate.apply(q, cos, sin, negative), _Rotate.apply(k, cos, sin, negative)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) · up``; without gradients in the memory of ``gate``."""
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return F.silu(gate) * up
    return F.silu(gate, inplace=True).mul_(up)


def lora(x: Tensor, out: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``scaling · x Aᵀ Bᵀ`` (LoRA, arXiv 2106.09685), added to ``out`` in place.

    A scaling that is a power of two rounds nothing, and is applied to the ``rank`` numbers of a
    token instead of its ``out`` numbers.
    """
    low = F.linear(x, a)
    if math.frexp(scaling)[0] == 0.5:
        return out.add_(F.linear(low * scaling, b))
    return out.add_(F.linear(low, b) * scaling)
