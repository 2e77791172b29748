"""Elementwise parts of a decoder layer in Triton: inputs are read once, results written once.

Arithmetic is in fp32, rounded where the plain modules of transformers round. References in plain
torch are in :mod:`fedsim.fused.ops`, which calls these functions and imports this module only if it
uses them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fedsim.kernels.sampling import BLOCK, weight_bits

TILE = 4096  # numbers of a program if rows are short, columns of a chunk if they are long
COLUMNS = 1024  # of a program of an elementwise kernel
WORD = 1 << 32  # values of a random word
EXACT = {"enable_fp_fusion": False}  # a fused multiply-add would skip the rounding of a product


@triton.jit
def _norm_kernel(  # type: ignore[no-untyped-def]
    x, delta, weight, total, out, rstd, num_rows, width, eps,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # A tile [ROWS, BLOCK] of whole rows.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < num_rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(delta + place, mask=inside, other=0.0).to(tl.float32)
        # The sum as the residual stream holds it.
        value = value.to(total.dtype.element_ty).to(tl.float32)
        tl.store(total + place, value.to(total.dtype.element_ty), mask=inside)

    # 1 / rms of each row, and the normed rows.
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / width + eps)
    tl.store(rstd + row, scale, mask=row < num_rows)
    normed = (value * scale[:, None]).to(out.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out + place, (normed * factor[None, :]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_grad_kernel(  # type: ignore[no-untyped-def]
    d_out, x, weight, rstd, d_total, d_x, num_rows, width,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < num_rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    scale = tl.load(rstd + row, mask=row < num_rows, other=0.0)[:, None]
    normed = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * scale
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    grad = tl.load(d_out + place, mask=inside, other=0.0).to(tl.float32) * factor[None, :]
    # Less the part along the normed row, which the norm takes away.
    along = tl.sum(grad * normed, axis=1) / width
    grad = (grad - normed * along[:, None]) * scale
    if ADD:
        grad += tl.load(d_total + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(d_x + place, grad.to(d_x.dtype.element_ty), mask=inside)


@triton.jit
def _silu_mul_kernel(  # type: ignore[no-untyped-def]
    gate, up, out, gate_row, up_row, out_row, width, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    g = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
    activated = (g / (1.0 + tl.exp(-g))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * out_row + column, (activated * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _silu_mul_grad_kernel(  # type: ignore[no-untyped-def]
    d_out, gate, up, d_gate, d_up, size, BLOCK: tl.constexpr
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    d = tl.load(d_out + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-g))
    tl.store(d_up + place, (d * g * share).to(d_up.dtype.element_ty), mask=inside)
    d_g = d * u * share * (1.0 + g * (1.0 - share))
    tl.store(d_gate + place, d_g.to(d_gate.dtype.element_ty), mask=inside)


@triton.jit
def _rotated_heads(  # type: ignore[no-untyped-def]
    x, out, x_head, out_head, cos1, cos2, sin1, sin2,
    heads: tl.constexpr, HEADS: tl.constexpr, half: tl.constexpr, HALF: tl.constexpr,
    INVERSE: tl.constexpr,
):  # fmt: skip
    head = tl.arange(0, HEADS)
    column = tl.arange(0, HALF)
    inside = (head < heads)[:, None] & (column < half)[None, :]
    source = x + head[:, None] * x_head + column[None, :]
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    if INVERSE:  # the transpose of the rotation
        low = (first * cos1).to(kind).to(tl.float32) + (second * sin2).to(kind).to(tl.float32)
        high = (second * cos2).to(kind).to(tl.float32) - (first * sin1).to(kind).to(tl.float32)
    else:
        low = (first * cos1).to(kind).to(tl.float32) - (second * sin1).to(kind).to(tl.float32)
        high = (second * cos2).to(kind).to(tl.float32) + (first * sin2).to(kind).to(tl.float32)
    goal = out + head[:, None] * out_head + column[None, :]
    tl.store(goal, low.to(kind), mask=inside)
    tl.store(goal + half, high.to(kind), mask=inside)


@triton.jit
def _angles(x, token, half: tl.constexpr, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Both halves of a token's cosines or sines."""
    column = tl.arange(0, HALF)
    inside = column < half
    x += token * 2 * half
    first = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    second = tl.load(x + half + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    return first, second


@triton.jit
def _rotate_kernel(  # type: ignore[no-untyped-def]
    q, k, cos, sin, q_out, k_out, q_token, q_head, k_token, k_head,
    Q_HEADS: tl.constexpr, Q_BLOCK: tl.constexpr, K_HEADS: tl.constexpr, K_BLOCK: tl.constexpr,
    half: tl.constexpr, HALF: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    c1, c2 = _angles(cos, token, half, HALF)
    s1, s2 = _angles(sin, token, half, HALF)
    q_out += token * Q_HEADS * 2 * half
    k_out += token * K_HEADS * 2 * half
    _rotated_heads(
        q + token * q_token, q_out, q_head, 2 * half, c1, c2, s1, s2,
        Q_HEADS, Q_BLOCK, half, HALF, INVERSE,
    )  # fmt: skip
    _rotated_heads(
        k + token * k_token, k_out, k_head, 2 * half, c1, c2, s1, s2,
        K_HEADS, K_BLOCK, half, HALF, INVERSE,
    )  # fmt: skip


@triton.jit
def _rotate_into_kernel(  # type: ignore[no-untyped-def]
    q, k, v, cos, sin, q_out, keys, values, places,
    q_token, q_head, k_token, k_head, v_token, v_head,
    keys_slot, keys_position, keys_head, values_slot, values_position, values_head,
    Q_HEADS: tl.constexpr, Q_BLOCK: tl.constexpr, K_HEADS: tl.constexpr, K_BLOCK: tl.constexpr,
    half: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    place = tl.load(places + token)
    c1, c2 = _angles(cos, token, half, HALF)
    s1, s2 = _angles(sin, token, half, HALF)
    q_out += token * Q_HEADS * 2 * half
    _rotated_heads(
        q + token * q_token, q_out, q_head, 2 * half, c1, c2, s1, s2,
        Q_HEADS, Q_BLOCK, half, HALF, False,
    )  # fmt: skip
    keys += token * keys_slot + place * keys_position
    _rotated_heads(
        k + token * k_token, keys, k_head, keys_head, c1, c2, s1, s2,
        K_HEADS, K_BLOCK, half, HALF, False,
    )  # fmt: skip

    # Values are only copied, both halves of each head.
    head = tl.arange(0, K_BLOCK)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = (head < K_HEADS) & (column < half)
    source = v + token * v_token + head * v_head + column
    goal = values + token * values_slot + place * values_position + head * values_head + column
    tl.store(goal, tl.load(source, mask=inside), mask=inside)
    tl.store(goal + half, tl.load(source + half, mask=inside), mask=inside)


@triton.jit
def _drop_words(  # type: ignore[no-untyped-def]
    x, added, out, word, place, column, width, kept_below, factor, ADD: tl.constexpr
):
    inside = column < width
    value = tl.load(x + place + column, mask=inside, other=0.0).to(tl.float32)
    keeps = word.to(tl.uint32, bitcast=True).to(tl.int64) < kept_below
    value = tl.where(keeps, value, 0.0) * factor
    if ADD:
        value = value.to(out.dtype.element_ty).to(tl.float32)
        value += tl.load(added + place + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _drop_kernel(  # type: ignore[no-untyped-def]
    x, added, out, seeds, places, draw, width, kept_below, factor,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    quarter = tl.cdiv(width, 4)
    counter = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seeds + token)
    zero = counter * 0
    place = zero + tl.load(places + token).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, counter, place, zero + draw, zero)
    # Word j of a counter is for column j · ⌈width / 4⌉ + counter.
    column = tl.where(counter < quarter, counter, width)
    row = token * width
    _drop_words(x, added, out, w0, row, column, width, kept_below, factor, ADD)
    _drop_words(x, added, out, w1, row, column + quarter, width, kept_below, factor, ADD)
    _drop_words(x, added, out, w2, row, column + 2 * quarter, width, kept_below, factor, ADD)
    _drop_words(x, added, out, w3, row, column + 3 * quarter, width, kept_below, factor, ADD)


@triton.jit
def _pick_kernel(  # type: ignore[no-untyped-def]
    logits, ids, picked, total, width, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * width

    # Running maximum and sum of exponentials, in each of BLOCK columns.
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    summed = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(logits + column, mask=column < width, other=float("-inf")).to(tl.float32)
        above = tl.maximum(largest, value)
        base = tl.where(above == float("-inf"), 0.0, above)
        summed = summed * tl.exp(largest - base) + tl.exp(value - base)
        largest = above

    # Those of the row, and the log-probability of its token.
    top = tl.max(largest, axis=0)
    summed = tl.sum(summed * tl.exp(largest - top), axis=0)
    log_total = top + tl.log(summed)
    tl.store(total + row, log_total)
    chosen = tl.load(logits + tl.load(ids + row)).to(tl.float32)
    tl.store(picked + row, chosen - log_total)


@triton.jit
def _pick_grad_kernel(  # type: ignore[no-untyped-def]
    d_picked, logits, ids, total, d_logits, width, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    d = tl.load(d_picked + row)
    value = tl.load(logits + row * width + column, mask=inside, other=0.0).to(tl.float32)
    share = tl.exp(value - tl.load(total + row))
    hit = tl.where(column == tl.load(ids + row), 1.0, 0.0)
    tl.store(
        d_logits + row * width + column,
        (d * (hit - share)).to(d_logits.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def _token_weights(  # type: ignore[no-untyped-def]
    logits, column, width, largest, temperature, factor
):  # fmt: skip
    value = tl.load(logits + column, mask=column < width, other=float("-inf")).to(tl.float64)
    return (tl.exp(value / temperature - largest / temperature) * factor).to(tl.int64)


@triton.jit
def _block_sums_kernel(  # type: ignore[no-untyped-def]
    logits, largest, temperatures, sums, width, num_blocks, factor,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    top = tl.load(largest + row).to(tl.float64)
    temperature = tl.load(temperatures + row)
    weight = _token_weights(logits + row * width, column, width, top, temperature, factor)
    tl.store(sums + row * num_blocks + block, tl.sum(weight, axis=1), mask=block < num_blocks)


@triton.jit
def _draw_in_block_kernel(  # type: ignore[no-untyped-def]
    logits, largest, temperatures, uniforms, sums, tokens, width, num_blocks, factor,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    weight = tl.load(sums + row * num_blocks + block, mask=block < num_blocks, other=0)
    total = tl.sum(weight, axis=0)

    # The block in which the level falls, then the token in it.
    level = (tl.load(uniforms + row) * total.to(tl.float64)).to(tl.int64)
    level = tl.minimum(level, total - 1)
    passed = (tl.cumsum(weight, axis=0) <= level) & (block < num_blocks)
    chosen = tl.minimum(tl.sum(passed.to(tl.int32), axis=0), num_blocks - 1)
    rest = level - tl.sum(tl.where(block < chosen, weight, 0), axis=0)
    column = chosen * BLOCK + tl.arange(0, BLOCK)
    top = tl.load(largest + row).to(tl.float64)
    temperature = tl.load(temperatures + row)
    inner = _token_weights(logits + row * width, column, width, top, temperature, factor)
    token = chosen * BLOCK + tl.sum((tl.cumsum(inner, axis=0) <= rest).to(tl.int32), axis=0)
    tl.store(tokens + row, tl.minimum(token, width - 1).to(tl.int64))


def _rows_of(x: torch.Tensor) -> tuple[int, int, int, int]:
    """(rows, width, rows of a program, columns of a program) of a contiguous tensor."""
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    return x.numel() // width, width, max(1, TILE // block), block


def norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`fedsim.fused.ops.norm`."""
    num_rows, width, rows, block = _rows_of(x)
    total = x.new_empty(0) if delta is None else torch.empty_like(x)
    out = torch.empty_like(x)
    rstd = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(num_rows, rows),)
    is_sum = delta is not None
    _norm_kernel[grid](
        x, delta if is_sum else x, weight, total if is_sum else out, out, rstd,
        num_rows, width, eps, ADD=is_sum, ROWS=rows, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return total, out, rstd


def norm_grad(
    d_out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    d_total: torch.Tensor | None,
) -> torch.Tensor:
    """See :func:`fedsim.fused.ops.norm_grad`."""
    num_rows, width, rows, block = _rows_of(x)
    d_x = torch.empty_like(x)
    _norm_grad_kernel[(triton.cdiv(num_rows, rows),)](
        d_out, x, weight, rstd, d_out if d_total is None else d_total, d_x, num_rows, width,
        ADD=d_total is not None, ROWS=rows, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return d_x


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See :func:`fedsim.fused.ops.silu_mul`."""
    out = torch.empty_like(gate)
    width = gate.shape[-1]
    _silu_mul(gate.view(-1, width), up.view(-1, width), out.view(-1, width))
    return out


def silu_mul_(gate: torch.Tensor, up: torch.Tensor) -> None:
    """See :func:`fedsim.fused.ops.silu_mul_`."""
    _silu_mul(gate, up, gate)


def _silu_mul(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor) -> None:
    rows, width = gate.shape
    grid = (rows, triton.cdiv(width, COLUMNS))
    strides = gate.stride(0), up.stride(0), out.stride(0)
    _silu_mul_kernel[grid](gate, up, out, *strides, width, BLOCK=COLUMNS)


def silu_mul_grad(
    d_out: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`fedsim.fused.ops.silu_mul_grad`."""
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    grid = (triton.cdiv(gate.numel(), COLUMNS),)
    _silu_mul_grad_kernel[grid](d_out, gate, up, d_gate, d_up, gate.numel(), BLOCK=COLUMNS)
    return d_gate, d_up


def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`fedsim.fused.ops.rotate`."""
    tokens, q_heads, size = q.shape
    k_heads = k.shape[1]
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    _rotate_kernel[(tokens,)](
        q, k, cos, sin, q_out, k_out, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        Q_HEADS=q_heads, Q_BLOCK=triton.next_power_of_2(q_heads),
        K_HEADS=k_heads, K_BLOCK=triton.next_power_of_2(k_heads),
        half=size // 2, HALF=triton.next_power_of_2(size // 2), INVERSE=inverse, **EXACT,
    )  # fmt: skip
    return q_out, k_out


def rotate_into(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    places: torch.Tensor,
) -> torch.Tensor:
    """See :func:`fedsim.fused.ops.rotate_into`."""
    tokens, q_heads, size = q.shape
    k_heads = k.shape[1]
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)

    # Strides of a token and a head; in the caches, of a slot, a position and a head.
    strides: list[int] = []
    for part in (q, k, v):
        strides += part.stride()[:2]
    for cache in (keys, values):
        strides += cache.stride()[:3]
    _rotate_into_kernel[(tokens,)](
        q, k, v, cos, sin, q_out, keys, values, places, *strides,
        Q_HEADS=q_heads, Q_BLOCK=triton.next_power_of_2(q_heads),
        K_HEADS=k_heads, K_BLOCK=triton.next_power_of_2(k_heads),
        half=size // 2, HALF=triton.next_power_of_2(size // 2), **EXACT,
    )  # fmt: skip
    return q_out


def block_sums(
    logits: torch.Tensor,
    largest: torch.Tensor,
    temperatures: torch.Tensor,
) -> torch.Tensor:
    """See :func:`fedsim.kernels.sampling.block_sums`."""
    rows, width = logits.shape
    num_blocks = triton.cdiv(width, BLOCK)
    sums = torch.empty(rows, num_blocks, dtype=torch.int64, device=logits.device)
    blocks = TILE // BLOCK
    _block_sums_kernel[(rows, triton.cdiv(num_blocks, blocks))](
        logits, largest, temperatures, sums, width, num_blocks, 2.0 ** weight_bits(width),
        BLOCKS=blocks, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return sums


def draw_in_block(
    logits: torch.Tensor,
    largest: torch.Tensor,
    temperatures: torch.Tensor,
    uniforms: torch.Tensor,
    sums: torch.Tensor,
) -> torch.Tensor:
    """See :func:`fedsim.kernels.sampling.draw_in_block`."""
    rows, width = logits.shape
    num_blocks = sums.shape[1]
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _draw_in_block_kernel[(rows,)](
        logits, largest, temperatures, uniforms, sums, tokens,
        width, num_blocks, 2.0 ** weight_bits(width),
        BLOCKS=triton.next_power_of_2(num_blocks), BLOCK=BLOCK,
    )  # fmt: skip
    return tokens


def drop(
    x: torch.Tensor,
    seeds: torch.Tensor,
    places: torch.Tensor,
    draw: int,
    p: float,
    added: torch.Tensor | None,
) -> torch.Tensor:
    """See :func:`fedsim.fused.ops.drop`."""
    tokens, width = x.shape
    out = torch.empty_like(x)
    block = min(COLUMNS, triton.next_power_of_2(triton.cdiv(width, 4)))
    grid = (tokens, triton.cdiv(triton.cdiv(width, 4), block))
    _drop_kernel[grid](
        x, x if added is None else added, out, seeds, places, draw,
        width, round((1 - p) * WORD), 1 / (1 - p), ADD=added is not None, BLOCK=block,
    )  # fmt: skip
    return out


def pick(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`fedsim.fused.ops.pick`."""
    rows, width = logits.shape
    picked = torch.empty(rows, dtype=torch.float32, device=logits.device)
    total = torch.empty_like(picked)
    if rows:
        _pick_kernel[(rows,)](logits, ids, picked, total, width, BLOCK=TILE, num_warps=8)
    return picked, total


def pick_grad(
    d_picked: torch.Tensor,
    logits: torch.Tensor,
    ids: torch.Tensor,
    total: torch.Tensor,
) -> torch.Tensor:
    """See :func:`fedsim.fused.ops.pick_grad`."""
    rows, width = logits.shape
    d_logits = torch.empty_like(logits)
    if rows:
        grid = (rows, triton.cdiv(width, TILE))
        _pick_grad_kernel[grid](
            d_picked, logits, ids, total, d_logits, width, BLOCK=TILE, num_warps=8,
        )  # fmt: skip
    return d_logits
