"""Parts of a decoder layer as functions that keep little for the backward pass.

Frozen weights get no gradient.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fedsim.fused.ops import OPS


class DropoutMask(Protocol):
    """Mask of one layer's dropout in one pass: a diagonal map, which is also that of gradients."""

    def apply(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Zero the dropped numbers of ``x``, ``[tokens, width]``, scale the rest, add ``added``.

        It has no gradient.
        """
        ...


class MaskedDropout(nn.Module):
    """Dropout layer whose mask can be drawn without its forward pass."""

    def draw(self, x: Tensor) -> DropoutMask | None:
        """Draw the layer's next mask for ``x``, ``[…, width]``; None if nothing is dropped."""
        raise NotImplementedError


class _Norm(torch.autograd.Function):
    """Sum and norm; keeps the sum and one number a row."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor | None,
        weight: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        if delta is None:
            _, out, rstd = OPS.norm(x, None, weight, eps)
            total = x
        else:
            total, out, rstd = OPS.norm(x, delta.contiguous(), weight, eps)
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
        grad = d_total  # of the sum, [tokens, width]
        if d_out is not None:
            if d_total is not None:
                d_total = d_total.contiguous()
            grad = OPS.norm_grad(d_out.contiguous(), total, weight, rstd, d_total)
        return grad, grad if ctx.needs_input_grad[1] else None, None, None


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight · x / rms(x)`` over the last dimension; ``weight`` is frozen and of ``x``'s dtype.

    Keeps ``x`` and one number a row.
    """
    return add_norm(x, None, weight, eps)[1]


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x + delta``, or ``x`` without ``delta``, and that normed as by :func:`norm`.

    If the residual stream goes on with the first result, autograd need not sum its gradient and
    the norm's.
    """
    return _Norm.apply(x, delta, weight, eps)


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return OPS.silu_mul(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
        return OPS.silu_mul_grad(d_out.contiguous(), *ctx.saved_tensors)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) · up``. Keeps both."""
    return _SiluMul.apply(gate, up)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        gate_weight: Tensor,
        up_weight: Tensor,
        down_weight: Tensor,
    ) -> Tensor:
        gate, up = F.linear(x, gate_weight), F.linear(x, up_weight)
        ctx.save_for_backward(gate, up, gate_weight, up_weight, down_weight)
        inner = OPS.silu_mul(gate, up)  # [batch, length, inner width]
        if residual is None:
            return F.linear(inner, down_weight)
        # Product and sum in one kernel, over [tokens, width].
        tokens = inner.flatten(0, -2)
        out = torch.addmm(residual.flatten(0, -2), tokens, down_weight.T)
        return out.view(residual.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, gate_weight, up_weight, down_weight = ctx.saved_tensors
        # Back through the down projection and SiLU, then the sum of both projections' gradients.
        d_gate, d_up = OPS.silu_mul_grad((d_out @ down_weight).contiguous(), gate, up)
        grad = d_gate.flatten(0, -2) @ gate_weight
        grad.addmm_(d_up.flatten(0, -2), up_weight)
        d_x = grad.view(*d_out.shape[:-1], -1)
        d_residual = d_out if ctx.needs_input_grad[1] else None
        return d_x, d_residual, None, None, None


def feed_forward(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    residual: Tensor | None = None,
) -> Tensor:
    """Gated feed-forward part of frozen weights, ``(silu(x Gᵀ) · x Uᵀ) Dᵀ``, plus ``residual``.

    Keeps the two products.

    Args:
        x: ``[…, width]``.
        residual: of the result's shape and dtype; None: nothing is added.
    """
    return _FeedForward.apply(x, residual, gate_weight, up_weight, down_weight)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return OPS.rotate(q, k, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor) -> tuple[Tensor | None, ...]:
        d_q, d_k = (d if d.stride(-1) == 1 else d.contiguous() for d in (d_q, d_k))
        return *OPS.rotate(d_q, d_k, *ctx.saved_tensors, True), None, None


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary positions, as transformers' ``apply_rotary_pos_emb``; keeps only cosines and sines.

    Args:
        q: ``[batch, query heads, length, head size]``.
        k: ``[batch, key heads, length, head size]``.
        cos: ``[1 or batch, length, head size]``.
        sin: likewise.

    Returns:
        Both rotated, views of ``[batch · length, heads, head size]``.
    """
    # To [tokens, heads, head size], with a row of cosines and of sines for each token, and back.
    batch, _, length, size = q.shape
    cos, sin = (part.expand(batch, length, size).reshape(-1, size) for part in (cos, sin))
    packed = (part.transpose(1, 2).flatten(0, 1) for part in (q, k))
    rotated: tuple[Tensor, ...] = _Rotate.apply(*packed, cos, sin)
    first, second = (part.unflatten(0, (batch, length)).transpose(1, 2) for part in rotated)
    return first, second


class _Lora(torch.autograd.Function):
    """Base product and low-rank branch.

    Products with tensors of tokens are in their dtype; gradients of the low-rank matrices are in
    the matrices' dtypes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        draw: DropoutMask | None,
    ) -> Tensor:
        tokens = x.flatten(0, -2).contiguous()  # [tokens, in]
        # Scaled and cast at once.
        low_a = torch.mul(a, scaling, out=torch.empty_like(a, dtype=x.dtype))
        low_b = b.to(x.dtype)
        out = F.linear(tokens, weight, bias)  # [tokens, out]
        dropped = tokens if draw is None else draw.apply(tokens)
        inner = dropped @ low_a.T  # [tokens, rank]
        out.addmm_(inner, low_b.T)
        ctx.save_for_backward(tokens, inner, weight, low_a, low_b)
        ctx.scaling, ctx.draw, ctx.kinds = scaling, draw, (a.dtype, b.dtype)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        tokens, inner, weight, low_a, low_b = ctx.saved_tensors
        draw: DropoutMask | None = ctx.draw
        d_tokens = d_out.flatten(0, -2).contiguous()
        d_inner = d_tokens @ low_b
        d_a, d_b, d_x = None, None, None
        if ctx.needs_input_grad[3]:  # dropped again, not kept
            dropped = tokens if draw is None else draw.apply(tokens)
            d_a = product(d_inner.T, dropped, ctx.kinds[0]).mul_(ctx.scaling)
        if ctx.needs_input_grad[4]:
            d_b = product(d_tokens.T, inner, ctx.kinds[1])
        if ctx.needs_input_grad[0]:
            # Through the base, plus through the adapter and its dropout.
            d_x = d_tokens @ weight
            if draw is None:
                d_x.addmm_(d_inner, low_a)
            else:
                d_x = draw.apply(d_inner @ low_a, added=d_x)
            d_x = d_x.view(*d_out.shape[:-1], -1)
        return d_x, None, None, d_a, d_b, None, None


def lora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    draw: DropoutMask | None,
) -> Tensor:
    """Frozen linear layer with LoRA, ``x Wᵀ + bias + scaling · drop(x) Aᵀ Bᵀ`` (arXiv 2106.09685).

    Keeps ``x``, which several layers share, and ``scaling · drop(x) Aᵀ``; dropout's mask is drawn
    again.

    Args:
        x: ``[…, in]``.
        weight: ``[out, in]``, of ``x``'s dtype; frozen, as is ``bias``.
        a: ``[rank, in]``, in fp32 or ``x``'s dtype; its gradient is summed and kept in its dtype.
        b: ``[out, rank]``, likewise.
    """
    return _Lora.apply(x, weight, bias, a, b, scaling, draw)


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrix product whose sums are rounded only once, to ``dtype``."""
    if left.dtype == dtype:
        return left @ right
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, draw: DropoutMask) -> Tensor:
        ctx.draw = draw
        return draw.apply(x.flatten(0, -2).contiguous()).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:
        return ctx.draw.apply(d_out.flatten(0, -2).contiguous()).view(d_out.shape), None


def dropped(x: Tensor, draw: DropoutMask) -> Tensor:
    """``draw.apply(x)`` with its gradient; keeps nothing of ``x``."""
    return _Dropped.apply(x, draw)


class _Pick(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> Tensor:
        picked, total = OPS.pick(logits, ids)
        ctx.save_for_backward(logits, ids, total)
        return picked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_picked: Tensor) -> tuple[Tensor, None]:
        return OPS.pick_grad(d_picked.contiguous(), *ctx.saved_tensors), None


def pick(logits: Tensor, ids: Tensor) -> Tensor:
    """Log softmax of ``[rows, vocabulary]`` at one token a row, fp32 or wider; keeps the logits."""
    return _Pick.apply(logits.contiguous(), ids)
