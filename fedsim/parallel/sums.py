"""Sums over terms that several ranks hold: order-independent (exact mode) or in fp32 (fast mode).

A sum has segments (gradients, statistics, …), each with its own scale, so that a large loss does
not coarsen a small gradient. One MAX all-reduce fixes the scales and one SUM all-reduce adds all
segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fedsim.base import reused
from fedsim.base.ranks import Term
from fedsim.kernels import fixed_point

PIECE = 1 << 18
"""fp32 numbers that a CPU thread adds at a time: 1 MiB, which stays in its cache over all terms."""


@dataclass
class Traffic:
    """Bytes that this process has handed to collectives, which may send more or fewer.

    An all-reduce counts the whole vector on every member, a gathered object its pickle on every
    rank, and a broadcast object its pickle on rank 0 only. Of DeepSpeed's collectives the gradients
    and the adapter's shares count, by their sizes. Barriers, heartbeats, the set-up of groups, and
    DeepSpeed's scalars and padding do not.
    """

    num_bytes: int = 0

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count a tensor that is about to be reduced; returns it."""
        self.num_bytes += tensor.numel() * tensor.element_size()
        return tensor

    def pop(self) -> int:
        """Bytes since the last call."""
        taken, self.num_bytes = self.num_bytes, 0
        return taken


class Summer:
    """Sum over the terms of all members of a process group; every member gets the same sums.

    Args:
        group: the members; None means this process only.
        exact: order-independent sums, bit-identical however the terms are spread over members.
        device: where the members' terms are; a member without terms joins the reduction from there.
        traffic: counts what this member contributes.
        heartbeat: one small collective over gloo before each sum (about 0.1 ms). Over NCCL a host
            call only enqueues, so a missing member raises no error: the others' GPUs wait, their
            hosts fill the launch queue and block, until a watchdog aborts the process. The
            heartbeat raises in time, before anything is enqueued.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        *,
        exact: bool,
        device: torch.device | None = None,
        traffic: Traffic | None = None,
        heartbeat: bool = False,
    ) -> None:
        self.group = group
        self.heartbeat = heartbeat and group is not None
        self.traffic = traffic or Traffic()
        self.exact = exact
        self.device = device or torch.device("cpu")

    def sum(
        self,
        segments: Sequence[Sequence[Term]],
        sizes: Sequence[int],
        count: int,
    ) -> list[torch.Tensor]:
        """Sum each segment over the terms of all members.

        Args:
            segments: this member's terms of each segment; a member without terms gives empty lists.
            sizes: length of each segment, the same on every member.
            count: an upper bound of the terms of any one segment over all members, the same on
                every member.

        Returns:
            One vector per segment, not to be changed in place: it may be a term's own. In exact
            mode they are fp64, and a segment with a non-finite term is NaN throughout; in fast mode
            they are fp32.
        """
        device = self.device
        for terms in segments:
            if terms:
                device = terms[0].vector.device
                break
        # A missing member raises here; NCCL itself would wait.
        if self.heartbeat:
            dist.all_reduce(torch.zeros(1), group=self.group)
        if self.exact:
            return self._exact(segments, sizes, count, device)
        return self._fast(segments, sizes, device)

    def _exact(
        self,
        segments: Sequence[Sequence[Term]],
        sizes: Sequence[int],
        count: int,
        device: torch.device,
    ) -> list[torch.Tensor]:
        """Sum in fixed point: integers add up to the same bits in any order."""
        # Scale of each segment, from its largest entry over all members: [segments]
        bounds = torch.stack([_bound(terms, device) for terms in segments])
        if self.group is not None:
            dist.all_reduce(self.traffic.add(bounds), op=dist.ReduceOp.MAX, group=self.group)
        exponents = fixed_point.shared_exponent(bounds, count)

        # One integer vector holds all segments, so that one all-reduce adds them.
        flat = reused.empty(sum(sizes), torch.int64, device)
        parts = flat.split(list(sizes))
        sums = []
        for part, terms, exponent, bound in zip(parts, segments, exponents, bounds, strict=True):
            vectors = [term.vector for term in terms]
            weights = [term.weight for term in terms]
            if self.group is None:
                sums.append(fixed_point.add_up(part, vectors, weights, exponent, bound))
            else:
                fixed_point.accumulate(part, vectors, weights, exponent)
        if self.group is None:
            return sums
        dist.all_reduce(self.traffic.add(flat), op=dist.ReduceOp.SUM, group=self.group)

        # Back to floating point, fp64.
        for part, exponent, bound in zip(parts, exponents, bounds, strict=True):
            sums.append(fixed_point.restore(part, exponent, bound))
        return sums

    def _fast(
        self, segments: Sequence[Sequence[Term]], sizes: Sequence[int], device: torch.device
    ) -> list[torch.Tensor]:
        """Sum in fp32, by one all-reduce of all segments."""
        if self.group is None:
            by_segment = zip(segments, sizes, strict=True)
            return [_added(terms, size, device) for terms, size in by_segment]
        # All segments in one vector, each a view: [Σ sizes]
        flat = reused.empty(sum(sizes), torch.float32, device)
        parts = flat.split(list(sizes))
        for part, terms in zip(parts, segments, strict=True):
            _add(terms, part)
        dist.all_reduce(self.traffic.add(flat), op=dist.ReduceOp.SUM, group=self.group)
        return list(parts)


def _added(terms: Sequence[Term], size: int, device: torch.device) -> torch.Tensor:
    """Σ weight · vector in fp32; a single vector of weight 1 is returned itself."""
    if len(terms) == 1 and terms[0].weight == 1.0:
        return terms[0].vector.float()
    total = reused.empty(size, torch.float32, device)
    _add(terms, total)
    return total


def _add(terms: Sequence[Term], total: torch.Tensor) -> None:
    """``total = Σ weight · vector`` in fp32, on a CPU piece by piece."""
    if not terms:
        total.zero_()
        return
    size = PIECE * torch.get_num_threads()
    if total.is_cuda:
        size = max(1, total.numel())
    vectors = [term.vector.split(size) for term in terms]
    for part, *pieces in zip(total.split(size), *vectors, strict=True):
        torch.mul(pieces[0].float(), terms[0].weight, out=part)
        for piece, term in zip(pieces[1:], terms[1:], strict=True):
            part.add_(piece, alpha=term.weight)


def _bound(terms: Sequence[Term], device: torch.device) -> torch.Tensor:
    """Largest |weight · entry| as an fp64 scalar; infinite if any entry is not finite."""
    bound = torch.zeros((), dtype=torch.float64, device=device)
    for term in terms:
        if term.vector.numel():  # no minimum of an empty vector
            low, high = term.vector.aminmax()
            peak = torch.maximum(-low, high).double() * abs(term.weight)
            bound = torch.maximum(bound, torch.where(torch.isfinite(peak), peak, torch.inf))
    return bound
