"""Sums over members: exact ones do not depend on who holds a term; both kinds are near the fp64 sum."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.base.ranks import Term
from fedsim.kernels import fixed_point
from fedsim.parallel import sums
from fedsim.parallel.sums import Summer


class Members:
    """Members of a group in one process: each runs up to the all-reduce that it waits for, again and again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num: int) -> None:
        self.num = num
        self.reduced: list[torch.Tensor] = []
        self.mine: list[list[torch.Tensor]] = []
        self.ops: list[object] = []
        monkeypatch.setattr(dist, "all_reduce", self._all_reduce)

    def _all_reduce(self, tensor: torch.Tensor, op: object, group: object) -> None:
        done = len(self.mine[-1])
        self.mine[-1].append(tensor.clone())
        self.ops = [*self.ops[:done], op]
        if done >= len(self.reduced):
            raise InterruptedError
        tensor.copy_(self.reduced[done])

    def sum(self, shares: Sequence[Sequence[Sequence[Term]]], sizes: Sequence[int], count: int, exact: bool) -> object:
        """Each member's result."""
        group: object = object()
        summer = Summer(group, exact=exact)  # type: ignore[arg-type]
        self.reduced = []
        while True:
            self.mine, results = [], []
            for share in shares:
                self.mine.append([])
                try:
                    results.append(summer.sum(share, sizes, count))
                except InterruptedError:
                    continue
            if len(results) == len(shares):
                return results
            stacked = torch.stack([m[len(self.reduced)] for m in self.mine])
            self.reduced.append(stacked.amax(0) if self.ops[-1] == dist.ReduceOp.MAX else stacked.sum(0))


def split(segments: list[list[Term]], num: int, seed: int) -> list[list[list[Term]]]:
    """Each term to some member, in some order."""
    generator = torch.Generator().manual_seed(seed)
    shares: list[list[list[Term]]] = [[[] for _ in segments] for _ in range(num)]
    for s, terms in enumerate(segments):
        for i in torch.randperm(len(terms), generator=generator).tolist():
            shares[int(torch.randint(num, (1,), generator=generator))][s].append(terms[i])
    return shares


def some_terms(seed: int = 0) -> tuple[list[list[Term]], list[int]]:
    """Segments of very different size and scale. In the first, large terms cancel; the rest lose bits to the grid."""
    g = torch.Generator().manual_seed(seed)
    tiny = [Term(torch.randn(11, generator=g) * 1e-12, w) for w in (3.0, 1.0)]
    large = torch.randn(11, generator=g) * 1e3
    big = [*tiny, Term(large, 0.25), Term(large, -0.25)]
    small = [Term(torch.randn(3, generator=g) * 1e-12) for _ in range(4)]
    return [big, small, [], [Term(torch.randn(1, generator=g).double() * 1e9)]], [11, 3, 2, 1]


def oracle(segments: list[list[Term]], sizes: list[int]) -> list[torch.Tensor]:
    return [
        sum((t.vector.double() * t.weight for t in terms), torch.zeros(size, dtype=torch.float64))
        for terms, size in zip(segments, sizes, strict=True)
    ]


def scales(segments: list[list[Term]]) -> list[float]:
    """The largest entry of any term of each segment."""
    return [max((float((t.vector * t.weight).abs().max()) for t in terms), default=1.0) for terms in segments]


@pytest.mark.parametrize("exact", [True, False])
def test_near_the_fp64_sum(exact: bool) -> None:
    segments, sizes = some_terms()
    found = Summer(None, exact=exact).sum(segments, sizes, 4)
    for got, want, scale in zip(found, oracle(segments, sizes), scales(segments), strict=True):
        assert got.dtype == (torch.float64 if exact else torch.float32)
        torch.testing.assert_close(got.double() / scale, want / scale, rtol=0, atol=1e-15 if exact else 1e-6)


@pytest.mark.parametrize("num", [1, 2, 3, 4])
def test_exact_bits_do_not_depend_on_the_members(monkeypatch: pytest.MonkeyPatch, num: int) -> None:
    segments, sizes = some_terms()
    want = Summer(None, exact=True).sum(segments, sizes, 4)
    members = Members(monkeypatch, num)
    for seed in range(5):
        for result in members.sum(split(segments, num, seed), sizes, 4, exact=True):  # type: ignore[attr-defined]
            assert all(torch.equal(a, b) for a, b in zip(result, want, strict=True))


def test_fast_members_agree_within_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    segments, sizes = some_terms()
    wants = oracle(segments, sizes)
    for result in Members(monkeypatch, 3).sum(split(segments, 3, 0), sizes, 4, exact=False):  # type: ignore[attr-defined]
        for got, want, scale in zip(result, wants, scales(segments), strict=True):
            torch.testing.assert_close(got.double() / scale, want / scale, rtol=0, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(width=32), min_size=3, max_size=3), min_size=1, max_size=5))
def test_a_non_finite_term_makes_its_segment_nan(rows: list[list[float]]) -> None:
    terms = [Term(torch.tensor(row)) for row in rows]
    clean = [Term(torch.tensor([1.0, 2.0]))]
    got, other = Summer(None, exact=True).sum([terms, clean], [3, 2], len(rows))
    finite = all(torch.isfinite(t.vector).all() for t in terms)
    assert bool(torch.isfinite(got).all()) == finite and bool(torch.isnan(got).all()) == (not finite)
    assert other.tolist() == [1.0, 2.0]


def test_a_small_segment_is_not_coarsened_by_a_large_one() -> None:
    small, large = torch.tensor([1e-20]), torch.tensor([1e20])
    got, _ = Summer(None, exact=True).sum([[Term(small)], [Term(large)]], [1, 1], 1)
    assert got.float() == small


def test_zero_weight_hides_nothing_infinite() -> None:
    (got,) = Summer(None, exact=True).sum([[Term(torch.tensor([float("inf")]), 0.0)]], [1], 1)
    assert torch.isnan(got).all()


def test_a_lone_fast_term_is_not_copied() -> None:
    vector = torch.ones(3)
    weighted = Term(vector, 2.0)
    found = Summer(None, exact=False).sum([[Term(vector)], [weighted], [Term(vector.double())]], [3, 3, 3], 1)
    assert found[0] is vector
    assert found[1].tolist() == [2.0] * 3 and vector.tolist() == [1.0] * 3
    assert found[2].dtype == torch.float32


def test_fast_weights_of_bf16_terms_are_applied_in_fp32() -> None:
    """1 + 2^-7 times 1 + 2^-7 needs 15 bits."""
    vector = torch.tensor([1 + 2.0**-7], dtype=torch.bfloat16)
    terms = [Term(vector, 1 + 2.0**-7), Term(vector, 1 + 2.0**-7)]
    (found,) = Summer(None, exact=False).sum([terms], [1], 2)
    assert float(found) == 2 * (1 + 2.0**-7) ** 2


def test_terms_are_left_as_they_were() -> None:
    segments, sizes = some_terms()
    before = [t.vector.clone() for terms in segments for t in terms]
    for exact in (True, False):
        Summer(None, exact=exact).sum(segments, sizes, 4)
    assert all(torch.equal(a, t.vector) for a, t in zip(before, (t for s in segments for t in s), strict=True))


@pytest.mark.parametrize("exact", [True, False])
def test_members_meet_on_the_cpu_before_a_sum_over_nccl(monkeypatch: pytest.MonkeyPatch, exact: bool) -> None:
    """One number first, before anything is enqueued; it is no contribution, and no other sum has it."""
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, *_, **__: seen.append(tensor.clone()))
    group: object = object()
    terms, found = [[Term(torch.tensor([1.0, 2.0]))]], []
    for heartbeat in (False, True):
        seen.clear()
        summer = Summer(group, exact=exact, heartbeat=heartbeat)  # type: ignore[arg-type]
        total = summer.sum(terms, [2], 1)[0]
        found.append((total.tolist(), summer.traffic.num_bytes, len(seen)))
    assert seen[0].shape == (1,) and seen[0].device.type == "cpu"
    assert found[0][:2] == found[1][:2] and found[1][2] == found[0][2] + 1
    seen.clear()
    Summer(None, exact=exact, heartbeat=True).sum(terms, [2], 1)
    assert not seen, "alone there is nobody to meet"


HARD = [0.0, -0.0, 1e-45, -3e-45, 1.1754944e-38, 0.5, -0.5, 1.5, 2.5, -3.5, 2.0**30, -(2.0**-40), 1 / 3]


@pytest.mark.parametrize("block", [1, 5, 64])
@pytest.mark.parametrize("size", [1, 5, 13, 29])
@pytest.mark.parametrize("bad", [None, torch.nan, torch.inf, -torch.inf])
def test_exact_sums_in_blocks_have_the_bits_of_whole_vectors(
    monkeypatch: pytest.MonkeyPatch, block: int, size: int, bad: float | None
) -> None:
    """Alone, the integers of a block become fp64 at once; the formula says it of whole vectors."""
    monkeypatch.setattr(fixed_point, "BLOCK", block)
    monkeypatch.setattr(fixed_point, "MAX_TERMS", 3)
    g = torch.Generator().manual_seed(size)
    hard = torch.tensor(HARD).repeat(3)
    weights = (200.0, 1.0, 0.1, -3.0, 310.0)
    vectors = [hard.roll(i)[:size] * 10.0 ** (torch.rand(size, generator=g) * 12 - 9) for i in range(5)]
    if bad is not None:
        vectors[2][-1] = bad
    terms = [Term(vector, weight) for vector, weight in zip(vectors, weights, strict=True)]
    peaks = torch.stack([(v.abs().max().double() * abs(w)) for v, w in zip(vectors, weights, strict=True)])
    bound = peaks.max() if bad is None else torch.tensor(torch.inf, dtype=torch.float64)
    exponent = fixed_point.shared_exponent(bound, 5)
    scale = fixed_point.power_of_two(exponent)
    integers = sum((v.double() * (w * scale)).round().long() for v, w in zip(vectors, weights, strict=True))
    (found,) = Summer(None, exact=True).sum([terms], [size], 5)
    assert isinstance(integers, torch.Tensor) and found.dtype == torch.float64
    if bad is None:
        assert torch.equal(found, integers.double() * fixed_point.power_of_two(-exponent))
    else:
        assert found.isnan().all()


@pytest.mark.parametrize("piece", [1, 5, 64])
@pytest.mark.parametrize("size", [1, 5, 13, 29])
def test_fast_sums_in_pieces_are_those_of_whole_vectors(monkeypatch: pytest.MonkeyPatch, piece: int, size: int) -> None:
    """Integers, whose sums are exact; what is not finite stays where it is."""
    monkeypatch.setattr(sums, "PIECE", piece)
    vectors = [torch.arange(size).float() * (i + 1) - 7 for i in range(4)]
    vectors[1][-1] = torch.inf
    vectors[2][0] = torch.nan
    terms = [Term(vector, float(i)) for i, vector in enumerate(vectors)]
    (found,) = Summer(None, exact=False).sum([terms], [size], 4)
    want = vectors[0] * 0.0 + vectors[1] + vectors[2] * 2 + vectors[3] * 3
    assert torch.equal(found.nan_to_num(1e9), want.nan_to_num(1e9))


@pytest.mark.parametrize("exact", [True, False])
def test_a_sum_outlives_the_next_one(exact: bool) -> None:
    """Long sums are in memory that is used again: not while a result is in use."""
    size = 1 << 18
    ones = Term(torch.ones(size), 2.0)
    summer = Summer(None, exact=exact)
    (first,) = summer.sum([[ones, ones]], [size], 2)
    (second,) = summer.sum([[ones, ones, ones]], [size], 3)
    assert bool((first == 4).all()) and bool((second == 6).all())
