"""Operators of the fused layers: Triton on CUDA, plain torch elsewhere, shapes on a fake device.

They are registered with torch, so that a mode that looks at operators, such as a fake device's,
sees one for each kernel. None has a gradient of its own: :mod:`fedsim.fused.functions` pairs each
with the one that computes its gradient. The plain forms round where transformers' modules do, and
are the reference of the Triton kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsim.base.errors import reason
from fedsim.base.ranks import Ranks
from fedsim.kernels.sampling import BLOCK, block_sums, draw_in_block

WORD: Final = 1 << 32
"""Number of values of a random word, 32 bits."""


def runs_fused(device: torch.device) -> bool:
    """Return whether a device has fused layers: CUDA, if kernels work on all ranks."""
    return device.type == "cuda" and not why_plain(device)


_PROBLEMS: Final[dict[torch.device, str]] = {}
"""This rank's device → problem of some rank's kernels, "" for none, agreed by all ranks."""


def agree_on_kernels(device: torch.device, ranks: Ranks) -> None:
    """Agree to use kernels only if all ranks can; all ranks call this."""
    problem = kernels_problem(device) if device.type == "cuda" else ""
    _PROBLEMS[device] = ""
    for rank, found in enumerate(ranks.gather(problem)):
        if found:
            _PROBLEMS[device] = f"on rank {rank}, {found}"
            break


def why_plain(device: torch.device) -> str:
    """Problem that keeps layers on a CUDA device from being fused, or ""."""
    if device in _PROBLEMS:
        return _PROBLEMS[device]
    return kernels_problem(device)


@cache
def kernels_problem(device: torch.device) -> str:
    """Problem of the kernels on a CUDA device, or ""; tried once a process.

    Triton or the C compiler that it needs may be missing. A few kernels are compared with the plain
    forms.
    """
    if find_spec("triton") is None:
        return "Triton is not installed"
    try:
        x = torch.linspace(-2, 2, 120, device=device).view(3, 40)
        if type(x) is not Tensor:
            return ""  # a fake device computes no numbers
        ids = torch.arange(3, device=device)
        pairs: list[tuple[Tensor, Tensor]] = []  # of a kernel, of its plain form

        # Sampling: sums of blocks (their high bits), and a token.
        largest, heat, u = x.amax(dim=1, keepdim=True), 0.7 + ids.double(), ids.double() / 3 + 0.1
        sums = block_sums(x, largest, heat)
        sampled = (x, largest, heat, u, sums)
        pairs.append((OPS.block_sums(x, largest, heat) >> 40, sums >> 40))
        pairs.append((OPS.draw_in_block(*sampled), draw_in_block(*sampled)))

        # Rotation into a cache: keys and values, by each way.
        mine, plain = (torch.zeros(2, 3, 4, 2, 20, device=device) for _ in range(2))
        heads = x[:, :40].view(3, 2, 20)
        into = (heads, heads, heads, x[:, :20].contiguous(), x[:, 20:].contiguous())
        rotated = OPS.rotate_into(*into, mine[0], mine[1], ids)
        pairs.append((rotated, rotate_into(*into, plain[0], plain[1], ids)))
        pairs.append((mine, plain))

        # Dropout, log-probabilities and their gradient.
        pairs.append((OPS.drop(x, ids, ids, 1, 0.5, x), drop(x, ids, ids, 1, 0.5, x)))
        pairs.append((OPS.pick(x, ids)[0], pick(x, ids)[0]))
        total = pick(x, ids)[1]
        pairs.append((OPS.pick_grad(total, x, ids, total), pick_grad(total, x, ids, total)))

        for found, wanted in pairs:
            if not torch.allclose(found, wanted, rtol=1e-4, atol=1e-4):
                return "its kernels compute something else than they should"
    except Exception as error:  # of any class: compilers raise their own
        return reason(error)
    return ""


def _kernels() -> Any:
    from fedsim.kernels import layers_triton

    return layers_triton


def _wide(x: Tensor) -> Tensor:
    """``x`` in fp32, or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- root mean square normalisation ---------------------------------------------------------------


def norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Root mean square normalisation (Zhang & Sennrich 2019) of ``x``, or of ``x + delta``.

    Args:
        x: ``[…, width]``, contiguous.
        delta: of ``x``'s shape and dtype; None: nothing is added.
        weight: ``[width]``, of ``x``'s dtype.

    Returns:
        The sum (empty without ``delta``), ``weight · sum / rms(sum)`` of ``x``'s shape, and 1 /
        rms, fp32 or wider, one a row.
    """
    if delta is None:
        total, value = x.new_empty(0), _wide(x)
    else:
        total = x + delta
        value = _wide(total)
    rstd = torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + eps)
    return total, weight * (value * rstd).to(x.dtype), rstd.flatten()


def _norm_shapes(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    rstd = x.new_empty(x.numel() // x.shape[-1], dtype=wide)
    return x.new_empty(0 if delta is None else x.shape), torch.empty_like(x), rstd


def norm_grad(
    d_out: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    d_total: Tensor | None,
) -> Tensor:
    """Gradient of :func:`norm` with respect to the sum; the weight is frozen.

    Args:
        d_out: gradient of the normalised values, contiguous.
        x: the sum, or ``x`` if nothing was added.
        d_total: gradient of the sum on another path, which is added; contiguous.
    """
    scale = rstd.view(*x.shape[:-1], 1)
    normed = _wide(x) * scale
    grad = _wide(d_out) * weight
    grad = (grad - normed * (grad * normed).mean(-1, keepdim=True)) * scale
    return (grad if d_total is None else grad + d_total).to(x.dtype)


# --- gated feed-forward part ----------------------------------------------------------------------


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) · up``; both contiguous, of one shape and dtype."""
    return F.silu(gate) * up


def silu_mul_grad(d_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`silu_mul` with respect to ``gate`` and ``up``."""
    d, g, u = _wide(d_out), _wide(gate), _wide(up)
    share = torch.sigmoid(g)
    d_gate = d * u * share * (1 + g * (1 - share))
    d_up = d * g * share
    return d_gate.to(gate.dtype), d_up.to(up.dtype)


def silu_mul_(gate: Tensor, up: Tensor) -> None:
    """Write :func:`silu_mul` into ``gate``; both ``[tokens, width]``, any stride between tokens."""
    gate.copy_(silu_mul(gate, up))


# --- rotary positions -----------------------------------------------------------------------------


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Rotary positions (Su et al. 2021); a head's first half is paired with its second.

    Args:
        q: ``[tokens, query heads, head size]``, of any strides but 1 in the last dimension.
        k: ``[tokens, key heads, head size]``, likewise.
        cos: ``[tokens, head size]``, contiguous.
        sin: likewise.
        inverse: multiply by the transpose, which gives the gradients.

    Returns:
        The rotated queries and keys, contiguous.
    """
    cos, sin = cos[:, None], sin[:, None]

    def rotated(x: Tensor) -> Tensor:
        if inverse:
            first, second = (x * sin).chunk(2, dim=-1)
            return x * cos + torch.cat((second, -first), dim=-1)
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return rotated(q), rotated(k)


def _rotate_shapes(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def rotate_into(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    places: Tensor,
) -> Tensor:
    """Rotate a decoding step's tokens as :func:`rotate`, and write keys and values into a cache.

    Args:
        q: ``[rows, query heads, head size]``; ``k`` and ``v`` with the key heads; any strides but 1
            in the last dimension, as of ``keys`` and ``values``.
        cos: ``[rows, head size]``, contiguous; ``sin`` likewise.
        keys: ``[slots, capacity, key heads, head size]``; row i writes to slot i. ``values``
            likewise.
        places: int64 ``[rows]``: the position that each row writes.

    Returns:
        The rotated queries, contiguous.
    """
    q, k = rotate(q, k, cos, sin, False)
    rows = torch.arange(len(places), device=places.device)
    keys[rows, places], values[rows, places] = k, v
    return q.contiguous()


# --- dropout --------------------------------------------------------------------------------------


def drop(
    x: Tensor,
    seeds: Tensor,
    places: Tensor,
    draw: int,
    p: float,
    added: Tensor | None,
) -> Tensor:
    """Inverted dropout with draws by counters: ``x · kept / (1 − p)``, plus ``added``.

    The map is its own transpose, so that gradients go through it too. Column c of a token is kept
    if word ``c // n`` of Philox4x32-10 (Salmon et al. 2011) with the token's seed as key and the
    counter ``(c % n, place, draw, 0)``, where ``n = ⌈width / 4⌉``, is less than ``round((1 − p) ·
    2³²)``.

    Args:
        x: ``[tokens, width]``, contiguous.
        seeds: int64 ``[tokens]``: of each token's micro-batch.
        places: int64 ``[tokens]``: of each token in its micro-batch.
        draw: number of the layer in the pass.
        p: share that is dropped.
        added: of ``x``'s shape and dtype, contiguous; None: nothing is added.
    """
    # Four words a counter, [tokens, ⌈width / 4⌉] each.
    tokens, width = x.shape
    quarter = -(-width // 4)
    zero = torch.zeros(tokens, quarter, dtype=torch.int64, device=x.device)
    counter = (
        zero + torch.arange(quarter, device=x.device),
        zero + places[:, None],
        zero + draw,
        zero,
    )
    words = torch.cat(philox(seeds[:, None], counter), dim=1)[:, :width]
    kept = words < round((1 - p) * WORD)
    dropped = (_wide(x) * kept * (1 / (1 - p))).to(x.dtype)
    return dropped if added is None else dropped + added


def philox(key: Tensor, counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al. 2011): four words for each counter.

    Args:
        key: int64, its 64 bits.
        counter: four tensors of words; words are int64 of 0 … 2³² − 1.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & (WORD - 1), (key >> 32) & (WORD - 1)
    for _ in range(10):
        (high0, low0), (high2, low2) = _product(0xD2511F53, c0), _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & (WORD - 1), (k1 + 0xBB67AE85) & (WORD - 1)
    return c0, c1, c2, c3


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of the product of two words, in parts that fit the 63 bits of an int64."""
    low = (a & 0xFFFF) * b  # < 2^48
    high = (a >> 16) * b + (low >> 16)  # < 2^49
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


# --- log-probabilities ----------------------------------------------------------------------------


def pick(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log softmax at one token of each row.

    Args:
        logits: ``[rows, vocabulary]``, contiguous.
        ids: int64 ``[rows]``.

    Returns:
        The log-probabilities, and the logarithm of each row's sum of exponentials; fp32 or wider
        ``[rows]``.
    """
    total = _wide(logits).logsumexp(dim=-1)
    return _wide(logits).gather(1, ids[:, None])[:, 0] - total, total


def _pick_shapes(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(len(ids), dtype=wide), logits.new_empty(len(ids), dtype=wide)


def _block_sums_shapes(logits: Tensor, *_: Tensor) -> Tensor:
    rows, vocabulary = logits.shape
    return logits.new_empty(rows, -(-vocabulary // BLOCK), dtype=torch.int64)


def pick_grad(d_picked: Tensor, logits: Tensor, ids: Tensor, total: Tensor) -> Tensor:
    """Gradient of :func:`pick` with respect to the logits."""
    share = torch.exp(_wide(logits) - total[:, None])
    grad = -share * d_picked[:, None]
    return grad.scatter_add_(1, ids[:, None], d_picked[:, None]).to(logits.dtype)


_LIBRARY: Final = torch.library.Library("fedsim", "DEF")
_SAMPLED: Final = "Tensor logits, Tensor largest, Tensor temperatures"
"""Arguments of both operators of sampling."""


def _register(schema: str, plain: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    """Define an operator; on CUDA it is the Triton function of its name.

    Args:
        schema: torch's: name, arguments and results.
        plain: computes it in plain torch.
        shapes: makes empty results, for a fake device.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, plain, "CPU")
    _LIBRARY.impl(name, lambda *args: getattr(_kernels(), name)(*args), "CUDA")

    def on_one_device(*args: Any) -> Any:
        devices = {str(x.device) for x in args if isinstance(x, Tensor)}
        if len(devices) > 1:  # a kernel would read another device's memory
            places = " and ".join(sorted(devices))
            raise RuntimeError(f"fedsim::{name}: tensors on {places}; all must be on one device")
        return shapes(*args)

    torch.library.register_fake(f"fedsim::{name}", on_one_device, lib=_LIBRARY)


_register(
    "norm(Tensor x, Tensor? delta, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    norm,
    _norm_shapes,
)
_register(
    "norm_grad(Tensor d_out, Tensor x, Tensor weight, Tensor rstd, Tensor? d_total) -> Tensor",
    norm_grad,
    lambda d_out, x, *_: torch.empty_like(x),
)
_register(
    "silu_mul(Tensor gate, Tensor up) -> Tensor",
    silu_mul,
    lambda gate, up: torch.empty_like(gate),
)
_register(
    "silu_mul_grad(Tensor d_out, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    silu_mul_grad,
    lambda d_out, gate, up: (torch.empty_like(gate), torch.empty_like(up)),
)
_register(
    "rotate(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse) -> (Tensor, Tensor)",
    rotate,
    _rotate_shapes,
)
_register("silu_mul_(Tensor(a!) gate, Tensor up) -> ()", silu_mul_, lambda gate, up: None)
_register(
    "rotate_into(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) keys, "
    "Tensor(b!) values, Tensor places) -> Tensor",
    rotate_into,
    lambda q, *_: q.new_empty(q.shape),
)
_register(
    f"block_sums({_SAMPLED}) -> Tensor",
    block_sums,
    _block_sums_shapes,
)
_register(
    f"draw_in_block({_SAMPLED}, Tensor uniforms, Tensor sums) -> Tensor",
    draw_in_block,
    lambda logits, *_: logits.new_empty(len(logits), dtype=torch.int64),
)
_register(
    "drop(Tensor x, Tensor seeds, Tensor places, int draw, float p, Tensor? added) -> Tensor",
    drop,
    lambda x, *_: torch.empty_like(x),
)
_register("pick(Tensor logits, Tensor ids) -> (Tensor, Tensor)", pick, _pick_shapes)
_register(
    "pick_grad(Tensor d_picked, Tensor logits, Tensor ids, Tensor total) -> Tensor",
    pick_grad,
    lambda d_picked, logits, *_: torch.empty_like(logits),
)

OPS: Final = torch.ops.fedsim
