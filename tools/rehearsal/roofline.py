"""Roofline of a piece of code: every operator on the device, its bytes and FLOPs, and the least time of each on a GPU.

A dispatch mode sees each operator after autograd. One that computes is taken for one kernel, which reads its inputs
once, writes its outputs once, and takes the longest of arithmetic, memory traffic and :data:`KERNEL_S`. Views and empty
buffers launch nothing. An unknown operator, such as a custom kernel, moves its inputs and outputs; one that does
arithmetic worth counting says so with :func:`states_flops`.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tools.rehearsal.device import is_pinned


@dataclass(frozen=True)
class Gpu:
    """Peak rates of a GPU, and the shares of them that good kernels reach.

    Attributes:
        flops: FLOP/s of dense products by kind: "bf16", "tf32" and "fp32" (without tensor cores).
        bandwidth: bytes/s.
    """

    flops: Mapping[str, float]
    bandwidth: float

    def seconds(self, kind: str, num_flops: float, num_bytes: float) -> float:
        """Least time of one kernel at the rates that are reached."""
        arithmetic = num_flops / (self.flops[kind] * REACHED[kind]) if num_flops else 0.0
        return max(arithmetic, num_bytes / (self.bandwidth * REACHED["bandwidth"]), KERNEL_S)

    def floor(self, num_flops: float, num_bytes: float) -> float:
        """Time that no program beats: arithmetic in bf16 at the peak, or memory traffic at full bandwidth."""
        return max(num_flops / self.flops["bf16"], num_bytes / self.bandwidth)


GPUS: Final = {
    "A100": Gpu({"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12}, 2.039e12),
    "H200": Gpu({"bf16": 788e12, "tf32": 394e12, "fp32": 60e12}, 4.3e12),
}
REACHED: Final = {"bf16": 0.78, "tf32": 0.6, "fp32": 0.6, "bandwidth": 0.85}
KERNEL_S: Final = 2.5e-6
"""Least time of a kernel on the device, however small."""

SMALL_COPY: Final = 1 << 16
"""Bytes up to which a copy from pageable memory is staged at once and waits for nothing."""

BLOCK: Final = 512
"""Bytes that the caching allocator rounds to."""

Flops = Callable[[Mapping[str, Any]], float]
_FLOPS: dict[str, Flops] = {}


def states_flops(*names: str) -> Callable[[Flops], Flops]:
    """Register the FLOPs of operators, such as "aten::mm"; the function gets the arguments by their schema's names."""

    def register(function: Flops) -> Flops:
        _FLOPS.update(dict.fromkeys(names, function))
        return function

    return register


@states_flops("aten::mm")
def _mm(args: Mapping[str, Any]) -> float:
    return 2 * args["self"].numel() * args["mat2"].shape[-1]


@states_flops("aten::bmm")
def _bmm(args: Mapping[str, Any]) -> float:
    return 2 * args["self"].numel() * args["mat2"].shape[-1]


@states_flops("aten::addmm", "aten::addmm_")
def _addmm(args: Mapping[str, Any]) -> float:
    return 2 * args["mat1"].numel() * args["mat2"].shape[-1]


@states_flops("aten::baddbmm")
def _baddbmm(args: Mapping[str, Any]) -> float:
    return 2 * args["batch1"].numel() * args["batch2"].shape[-1]


def attention_flops(
    rows: float, heads: int, queries: float, keys: float, key_size: int, value_size: int, *, causal: bool
) -> float:
    """Two products over the pairs that see each other; causal: a row's queries are the last of its keys."""
    pairs = queries * (keys - (queries - 1) / 2) if causal else queries * keys
    return 2 * rows * heads * pairs * (key_size + value_size)


BACKWARD: Final = 2.5
"""Five products in attention's backward pass, the scores again among them, against two in the forward pass."""


@states_flops(
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_flash_attention_backward",
    "aten::_scaled_dot_product_efficient_attention_backward",
)
def _padded_attention(args: Mapping[str, Any]) -> float:
    """``[rows, heads, length, size]``; a mask is computed in full."""
    query, key, value = args["query"], args["key"], args["value"]
    rows, heads, length, size = query.shape
    causal = bool(args.get("is_causal"))
    flops = attention_flops(rows, heads, length, key.shape[2], size, value.shape[-1], causal=causal)
    return flops * (BACKWARD if "logsumexp" in args else 1)


@states_flops("torch_attn::_varlen_attn", "torch_attn::_varlen_attn_backward")
def _packed_attention(args: Mapping[str, Any]) -> float:
    """``[tokens, heads, size]``, causal; rows are taken as equally long, which is least."""
    query, value = args["query"], args["value"]
    rows = args["cu_seq_q"].shape[0] - 1
    num_keys = min(packed_keys(args), value.shape[0]) / rows
    flops = attention_flops(
        rows, query.shape[1], query.shape[0] / rows, num_keys, query.shape[2], value.shape[2], causal=True
    )
    return flops * (BACKWARD if "lse" in args else 1)


def packed_keys(args: Mapping[str, Any]) -> int:
    """Keys that variable-length attention reads: those of a cache of slots up to the longest row alone."""
    total = int(args["key"].shape[0])
    if args.get("seqused_k") is None:
        return total
    return min(total, int(args["max_k"]) * (args["cu_seq_q"].shape[0] - 1))


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_NO_KERNEL: Final = _words(
    "detach view _unsafe_view alias t expand slice select transpose permute unsqueeze squeeze split split_with_sizes "
    "as_strided empty empty_like empty_strided empty_permuted new_empty new_empty_strided _reshape_alias lift_fresh "
    "unbind chunk is_same_size sym_size sym_stride sym_numel resize_ set_ record_stream"
)
"""Operators that launch nothing though their schema does not say so."""

_WRITE_ONLY: Final = _words("copy_ fill_ zero_ bernoulli_ random_ normal_ uniform_ exponential_")
"""Operators in place that do not read what they overwrite."""

_CREATING: Final = _words("zeros_like ones_like full_like new_zeros new_ones new_full nll_loss_backward")
"""Operators that read nothing of their inputs but a few numbers."""

_PICKING: Final = _words("index_select index embedding gather take take_along_dim nll_loss_forward")
"""Operators that read of their first input only what they return."""

_PLACING: Final = _words("index_put_ _index_put_impl_ index_copy_ scatter_")
"""Operators that touch of their first input only what they write: as much as the source holds."""

_ADDING: Final = _words("index_add_ scatter_add_")
"""The same, read before it is written."""


_STORING: Final = _words("fedsim::rotate_into")
"""Operators that write to the tensors they change as much as their other inputs hold, at most."""


@dataclass
class Copy:
    """A copy between host and device.

    Attributes:
        what: operator and shape.
        waits: the host waits for it: not asked to be asynchronous, from pageable memory, or to the host.
    """

    what: str
    num_bytes: int
    waits: bool


@dataclass
class Counted:
    """What a piece of code did on the device.

    Attributes:
        kernels: operators that compute.
        num_bytes: read and written by them.
        flops: of products, by kind ("bf16", "tf32", "fp32").
        seconds: on each GPU, one kernel after the other.
        peak: largest sum of live tensors' bytes.
        to_device, to_host: copies.
        collectives: bytes that were handed to collectives, by operator; their time is not counted.
        lost: seconds on the A100 outside bf16 products and attention, by module.
        kernels_of: kernels by module.
        operators: kernels by operator.
    """

    kernels: int = 0
    num_bytes: float = 0.0
    flops: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    peak: int = 0
    to_device: list[Copy] = field(default_factory=list)
    to_host: list[Copy] = field(default_factory=list)
    collectives: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    lost: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    kernels_of: Counter[str] = field(default_factory=Counter)
    operators: Counter[str] = field(default_factory=Counter)

    @property
    def waits(self) -> list[str]:
        """Copies that the host waits for."""
        return [copy.what for copy in [*self.to_device, *self.to_host] if copy.waits]


class Roofline(TorchDispatchMode):
    """Counts what runs inside it.

    Args:
        device_type: of the device; on others nothing is counted.
        labels: names the part of the model that an operator belongs to; None counts no parts.
    """

    def __init__(self, device_type: str = "cuda", labels: Labels | None = None) -> None:
        super().__init__()
        self.device_type = device_type
        self.labels = labels
        self.counted = Counted()
        self._live: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._num_live = 0

    def restart(self) -> None:
        """Forget what was counted; tensors that live go on counting as memory."""
        self.counted = Counted(peak=self._num_live)

    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count the memory of tensors that were made before."""
        for tensor in tensors:
            self._track(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator and count it."""
        kwargs = dict(kwargs or {})
        if _is_composed(func):  # inference mode shows these whole
            if func._schema.name == "aten::dropout" and not args[2]:
                return args[0]
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if func.namespace not in ("prim", "profiler"):
            self._count(func, args, kwargs, out)
        return out

    def _count(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        schema = func._schema
        name = schema.name.removeprefix("aten::")
        named = {a.name: v for a, v in zip(schema.arguments, args, strict=False)} | dict(kwargs)
        inputs, outputs = list(_tensors((args, *kwargs.values()))), list(_tensors(out))
        for tensor in outputs:
            self._track(tensor)
        there = [self._is_there(tensor) for tensor in inputs]
        if name in ("_to_copy", "copy_", "_copy_from"):
            self._copied(name, named, inputs, outputs)
        elif any(there):  # an index on the host is copied by the operator itself, which waits for it
            for tensor, on_device in zip(inputs, there, strict=True):
                if not on_device and tensor.dim() > 0 and tensor.numel() and tensor.device.type == "cpu":
                    self._add_copy(self.counted.to_device, f"{name} with a host tensor", tensor, True)
        if func.namespace == "c10d":
            self.counted.collectives[name] += sum(_size(t) for t in outputs if self._is_there(t))
            return
        if not any(there) and not any(map(self._is_there, outputs)):
            return
        if func.is_view or name in _NO_KERNEL:
            return
        if name in ("_to_copy", "copy_") and not all(there + [self._is_there(tensor) for tensor in outputs]):
            return  # between host and device: no kernel
        self._add_kernel(name, schema, named, inputs, outputs)

    def _add_kernel(
        self,
        name: str,
        schema: Any,
        named: Mapping[str, Any],
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
    ) -> None:
        counted = self.counted
        num_bytes = self._traffic(name, schema, named, inputs, outputs)
        flops = _FLOPS[schema.name](named) if schema.name in _FLOPS else 0.0
        kind = _kind(next((t.dtype for t in inputs if t.is_floating_point()), torch.float32))
        counted.kernels += 1
        counted.num_bytes += num_bytes
        counted.operators[schema.name] += 1
        if flops:
            counted.flops[kind] += flops
        for gpu, rates in GPUS.items():
            counted.seconds[gpu] += rates.seconds(kind, flops, num_bytes)
        if self.labels is not None:
            label = self.labels.current()
            counted.kernels_of[label] += 1
            if not flops or kind != "bf16":
                counted.lost[label] += GPUS["A100"].seconds(kind, flops, num_bytes)

    def _traffic(
        self,
        name: str,
        schema: Any,
        named: Mapping[str, Any],
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
    ) -> float:
        """Bytes that a kernel reads and writes at least."""
        base = name.removesuffix("_") if name not in _WRITE_ONLY | _PLACING | _ADDING else name
        if name in _CREATING:
            return sum(map(_size, outputs))
        if base in _PICKING:
            return 2 * sum(map(_size, outputs))
        if name in _STORING:
            changed = [t for a in schema.arguments if a.is_write for t in _tensors(named[a.name])]
            return 2 * sum(_size(t) for t in inputs if not any(t is other for other in changed))
        if name in _PLACING | _ADDING:
            return (3 if name in _ADDING else 2) * _size(inputs[-1])
        if name == "torch_attn::_varlen_attn" and named.get("seqused_k") is not None:
            share = packed_keys(named) / named["key"].shape[0]
            cached = _size(named["key"]) + _size(named["value"])
            whole = sum(_size(t) for t in [*inputs, *outputs] if self._is_there(t))
            return whole - (1 - share) * cached
        written = [t for a in schema.arguments if a.is_write for t in _tensors(named.get(a.name))]
        overwritten: list[torch.Tensor] = []
        for argument in schema.arguments:
            if argument.is_write and (argument.is_out or name in _WRITE_ONLY):
                overwritten += _tensors(named.get(argument.name))
        read = [t for t in inputs if not any(t is other for other in overwritten)]
        fresh = [t for t in outputs if not any(t is other for other in inputs)]
        return sum(_size(t) for t in [*read, *written, *fresh] if self._is_there(t))

    def _copied(
        self,
        name: str,
        named: Mapping[str, Any],
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
    ) -> None:
        """A copy between host and device, if it is one."""
        source = inputs[1] if name == "copy_" and len(inputs) > 1 else inputs[0]
        target = outputs[0]
        if self._is_there(source) == self._is_there(target):
            return
        asynchronous = bool(named.get("non_blocking"))
        if self._is_there(source):
            self._add_copy(self.counted.to_host, f"{name} to the host", source, not asynchronous)
            return
        small = is_pinned(source) or _size(source) <= SMALL_COPY
        self._add_copy(self.counted.to_device, f"{name} from the host", source, not (asynchronous and small))

    @staticmethod
    def _add_copy(copies: list[Copy], what: str, tensor: torch.Tensor, waits: bool) -> None:
        kind = str(tensor.dtype).removeprefix("torch.")
        copies.append(Copy(f"{what}, {kind} {list(tensor.shape)}", int(_size(tensor)), waits))

    def _is_there(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == self.device_type

    def _track(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage as live until it is freed."""
        if not self._is_there(tensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = math.ceil(storage.nbytes() / BLOCK) * BLOCK

        def freed(_: Any) -> None:
            if self._live.pop(key, None) is not None:
                self._num_live -= size

        self._live[key] = (weakref.ref(storage, freed), size)
        self._num_live += size
        self.counted.peak = max(self.counted.peak, self._num_live)


class Labels:
    """Names the module that an operator belongs to, also in the backward pass.

    An operator of the backward pass belongs to the module whose forward made its autograd node.

    Args:
        name_of: the label of a module, given its name and itself; None: it counts with the one that calls it.
    """

    OUTSIDE: Final = "outside the model"
    SUMS: Final = "adding up gradients"

    def __init__(self, model: torch.nn.Module, name_of: Callable[[str, torch.nn.Module], str | None]) -> None:
        self._stack: list[tuple[torch.nn.Module | None, str]] = [(None, self.OUTSIDE)]
        self._of_node: dict[int, str] = {}
        for name, module in model.named_modules():
            if (label := name_of(name, module)) is not None:
                module.register_forward_pre_hook(lambda m, _, label=label: self._stack.append((m, label)))
                module.register_forward_hook(lambda m, *_: self._leave(m))

    def current(self) -> str:
        """Of the operator that runs now."""
        node: Any = torch._C._current_autograd_node()
        if node is None:
            label = self._stack[-1][1]
            # The operator's own node is the last one made; later operators without a gradient make none.
            self._of_node.setdefault(torch._C._autograd._get_sequence_nr() - 1, label)
            return label
        return self._of_node.get(node._sequence_nr(), self.SUMS)

    def _leave(self, module: torch.nn.Module) -> None:
        """The module is done, and whatever an exception left inside it."""
        while self._stack.pop()[0] is not module:
            pass


@cache
def _is_composed(func: Any) -> bool:
    """Return whether other operators compute this one on CUDA, although it may have a kernel of its own too."""
    if func.namespace != "aten" or not func._can_decompose():
        return False
    return not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CUDA")


def _kind(dtype: torch.dtype) -> str:
    if dtype in (torch.bfloat16, torch.float16):
        return "bf16"
    return "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _size(tensor: torch.Tensor) -> float:
    """Bytes that reading a tensor once takes; expanded dimensions count once."""
    numbers = math.prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step != 0 or n == 0)
    return numbers * tensor.element_size()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
