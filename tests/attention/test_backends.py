"""Every backend against softmax(scale · q kᵀ) v, row by row in fp64; CUDA's kernels by stand-ins."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import varlen

from fedsim.attention.backends import BACKENDS, Backend, Cached, Scores, Sdpa, _by_groups, folded, varlen_keywords
from fedsim.attention.spans import Spans

CPU = torch.device("cpu")
HERE = ["sdpa", "eager"]
SCALE = 0.3
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def definition(parts: Parts, spans: Spans, scores: Scores) -> torch.Tensor:
    """One row, one head, one query at a time."""
    query, key, value = parts
    shared = query.shape[1] // key.shape[1]
    out = torch.empty_like(query)
    q_start = k_start = 0
    for queries, keys in zip(spans.query_lengths, spans.key_lengths, strict=True):
        for i in range(queries):
            place = keys - queries + i
            first = 0 if scores.window is None else max(0, place - scores.window + 1)
            seen = slice(k_start + first, k_start + place + 1)
            for head in range(query.shape[1]):
                products = key[seen, head // shared] @ query[q_start + i, head] * scores.scale
                if scores.softcap is not None:
                    products = scores.softcap * torch.tanh(products / scores.softcap)
                out[q_start + i, head] = products.softmax(dim=0) @ value[seen, head // shared]
        q_start, k_start = q_start + queries, k_start + keys
    return out


def drawn(spans: Spans, heads: tuple[int, int], size: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Parts:
    generator = torch.Generator().manual_seed(seed)
    counts = [(spans.num_queries, heads[0]), *[(sum(spans.key_lengths), heads[1])] * 2]
    query, key, value = (torch.randn(*count, size, generator=generator, dtype=torch.float64) for count in counts)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def with_gradients(run: Any, parts: Parts) -> list[torch.Tensor]:
    """The output, and the gradients of a weighted sum of it."""
    inputs = [part.clone().requires_grad_() for part in parts]
    out = run(*inputs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    (out.double() * weight).sum().backward()
    return [out.detach(), *(part.grad for part in inputs if part.grad is not None)]


def check(backend: Backend, spans: Spans, heads: tuple[int, int], size: int, scores: Scores) -> None:
    parts = drawn(spans, heads, size)
    got = with_gradients(lambda *p: backend.spans(*p, spans, scores), parts)
    want = with_gradients(lambda *p: definition(p, spans, scores), parts)
    for mine, true in zip(got, want, strict=True):
        torch.testing.assert_close(mine, true, atol=1e-12, rtol=1e-12)


ROWS = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 4)), min_size=1, max_size=4)


@pytest.mark.parametrize("name", HERE)
@settings(deadline=None, max_examples=40)
@given(
    ROWS, st.none() | st.integers(1, 11), st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]), st.sampled_from([1, 5, 8])
)
def test_values_and_gradients_equal_the_definition(
    name: str, rows: list[tuple[int, int]], window: int | None, heads: tuple[int, int], size: int
) -> None:
    spans = Spans([q for q, _ in rows], [q + before for q, before in rows], device=CPU)
    check(BACKENDS[name], spans, heads, size, Scores(SCALE, window))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.sampled_from([(4, 4), (4, 2)]))
def test_sdpa_of_padded_groups_equals_the_definition(lengths: list[int], heads: tuple[int, int]) -> None:
    """As on CUDA, where rows do not go one by one."""

    class Padded:
        spans = staticmethod(Sdpa._padded)

    spans = Spans(lengths, device=CPU)
    assert all(group.mask(None) is None for group in spans.groups)
    check(cast(Backend, Padded()), spans, heads, 8, Scores(SCALE))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("rows", [[(3, 2), (4, 5)], [(2, 3), (2, 3)]])
@pytest.mark.parametrize("window", [None, 3])
def test_folded_heads_equal_the_definition(
    heads: tuple[int, int], rows: list[tuple[int, int]], window: int | None
) -> None:
    """What SDPA does with masks and grouped heads on CUDA: one mask a row, and one for all rows."""

    class Folding:
        def spans(self, q: Any, k: Any, v: Any, spans: Spans, scores: Scores) -> torch.Tensor:
            return _by_groups(q, k, v, spans, scores.window, lambda *parts: folded(*parts, scores.scale))

    spans = Spans([q for q, _ in rows], [q + before for q, before in rows], device=CPU)
    check(cast(Backend, Folding()), spans, heads, 8, Scores(SCALE, window))


@pytest.mark.parametrize("window", [None, 3])
def test_eager_caps_scores(window: int | None) -> None:
    spans = Spans([3, 5, 1], [7, 5, 4], device=CPU)
    check(BACKENDS["eager"], spans, (4, 2), 6, Scores(2.0, window, softcap=1.5))
    capped, plain = (BACKENDS["eager"].spans(*drawn(spans, (4, 2), 6), spans, Scores(2.0, window, cap))
                     for cap in (1.5, None))  # fmt: skip
    assert (capped - plain).abs().max() > 0.1


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("changed", [0, 1])
def test_rows_never_see_each_other(name: str, changed: int) -> None:
    """Other keys and values in one row, NaN even, leave the other row's bits alone."""
    spans = Spans([3, 4], [5, 9], device=CPU)
    parts = drawn(spans, (4, 2), 8)
    before = BACKENDS[name].spans(*parts, spans, Scores(SCALE))
    queries, keys = (slice(0, 3), slice(0, 5)) if changed == 0 else (slice(3, 7), slice(5, 14))
    for part, where in zip(parts, (queries, keys, keys), strict=True):
        part[where] = torch.randn(part[where].shape, dtype=torch.float64)
    after = BACKENDS[name].spans(*parts, spans, Scores(SCALE))
    other = slice(3, 7) if changed == 0 else slice(0, 3)
    assert torch.equal(before[other], after[other]) and not torch.equal(before[queries], after[queries])


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_rounding_of_narrow_types(name: str, dtype: torch.dtype, limit: float) -> None:
    """bf16 keeps 8 bits: half a unit in the last place is 2e-3."""
    spans = Spans([17, 64, 3], [17, 90, 40], device=CPU)
    parts = drawn(spans, (4, 2), 16, dtype)
    got = BACKENDS[name].spans(*parts, spans, Scores(0.25))
    want = BACKENDS["eager"].spans(*(part.double() for part in parts), spans, Scores(0.25))
    assert got.dtype == dtype
    assert float((got.double() - want).norm() / want.norm()) < limit


def slots_and_spans(backend: Backend, lengths: list[int], capacity: int, max_length: int, scores: Scores,
                    heads: tuple[int, int] = (4, 2)) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """A step of decoding by slots, whose unused places hold garbage, and by the definition of one query a row."""
    generator = torch.Generator().manual_seed(4)
    query = torch.randn(len(lengths), heads[0], 8, generator=generator, dtype=torch.float64)
    keys, values = (torch.randn(len(lengths), capacity, heads[1], 8, generator=generator, dtype=torch.float64)
                    for _ in range(2))  # fmt: skip
    device_lengths = torch.tensor(lengths, dtype=torch.int32)
    got = backend.slots(query, Cached(keys, values, device_lengths, max_length), scores)
    packed = [torch.cat([slot[:length] for slot, length in zip(part, lengths, strict=True)]) for part in (keys, values)]
    spans = Spans([1] * len(lengths), lengths, device=CPU)
    return got, definition((query, packed[0], packed[1]), spans, scores)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("window", [None, 1, 4, 30])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("max_length", [9, 12])
def test_a_step_of_decoding_equals_one_query_a_row(
    name: str, window: int | None, heads: tuple[int, int], max_length: int
) -> None:
    got, want = slots_and_spans(BACKENDS[name], [9, 1, 4], 12, max_length, Scores(SCALE, window), heads)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_eager_caps_scores_of_a_step() -> None:
    got, want = slots_and_spans(BACKENDS["eager"], [9, 1, 4], 12, 9, Scores(2.0, None, softcap=0.7))
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["sdpa", "varlen"])
def test_backends_that_cannot_cap_scores_say_so(name: str) -> None:
    spans = Spans([2], device=CPU)
    with pytest.raises(AssertionError, match="refused when the model is loaded"):
        BACKENDS[name].spans(*drawn(spans, (2, 2), 4), spans, Scores(1.0, None, 3.0))
    with pytest.raises(AssertionError, match="refused when the model is loaded"):
        slots_and_spans(BACKENDS[name], [2], 2, 2, Scores(1.0, None, 3.0))


KERNELS = ["varlen", "varlen 2.11", "flash_attention_2"]
StandIn = Any


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("window", [None, 1, 4, 30])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("before", [[0, 0, 0], [3, 0, 6]])
def test_kernels_are_called_as_documented(
    stand_in: StandIn, kernel: str, window: int | None, heads: tuple[int, int], before: list[int]
) -> None:
    backend = BACKENDS[stand_in(kernel)]
    lengths = [3, 7, 1]
    spans = Spans(lengths, [q + b for q, b in zip(lengths, before, strict=True)], device=CPU)
    check(backend, spans, heads, 8, Scores(SCALE, window))
    got, want = slots_and_spans(backend, [9, 1, 4], 12, 10, Scores(SCALE, window), heads)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("window", "passed"), [(None, (-1, -1)), (10, (-1, -1)), (30, (-1, -1)), (9, (8, 0)), (4, (3, 0))]
)
@pytest.mark.parametrize("exact", [False, True])
def test_a_step_of_varlen_has_no_window_where_all_is_seen(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, window: int | None, passed: tuple[int, int], exact: bool
) -> None:
    """Then the kernel packs the query heads of a key head; in exact mode it does not split the keys."""
    backend, kernel = BACKENDS[stand_in("varlen")], varlen.varlen_attn
    seen: list[dict[str, Any]] = []
    varlen_keywords()  # the signature of the stand-in, not of what notes its arguments
    monkeypatch.setattr(varlen, "varlen_attn", lambda *a, **more: seen.append(more) or kernel(*a, **more))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(exact)
    try:
        got, want = slots_and_spans(backend, [9, 1, 4], 12, 10, Scores(SCALE, window))
    finally:
        torch.use_deterministic_algorithms(before)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    assert [more["window_size"] for more in seen] == [passed]
    assert [more.get("num_splits") for more in seen] == [1 if exact else None]


@pytest.mark.parametrize("window", [None, 3])
def test_flash_attention_2_caps_scores(stand_in: StandIn, window: int | None) -> None:
    backend, scores = BACKENDS[stand_in("flash_attention_2")], Scores(2.0, window, softcap=0.7)
    check(backend, Spans([3, 5], [7, 5], device=CPU), (4, 2), 8, scores)
    got, want = slots_and_spans(backend, [9, 1, 4], 12, 9, scores)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_flash_attention_2_is_deterministic_where_torch_is(stand_in: StandIn) -> None:
    """The stand-in compares its argument with torch's setting."""
    backend, spans = BACKENDS[stand_in("flash_attention_2")], Spans([3, 5], device=CPU)
    before = torch.are_deterministic_algorithms_enabled()
    try:
        for wanted in (True, False):
            torch.use_deterministic_algorithms(wanted)
            check(backend, spans, (4, 2), 8, Scores(SCALE))
    finally:
        torch.use_deterministic_algorithms(before)


def test_what_the_installed_varlen_attn_takes(stand_in: StandIn) -> None:
    """The arguments that the backend passes are the installed torch's, and each known version's."""
    passed = {"scale", "window_size"}
    assert varlen_keywords() >= passed
    for kernel, more in (("varlen", {"enable_gqa", "seqused_k"}), ("varlen 2.11", set())):
        stand_in(kernel)
        assert varlen_keywords() & {*passed, "enable_gqa", "seqused_k"} == passed | more
    stand_in("varlen 2.10")
    assert not varlen_keywords() & passed
