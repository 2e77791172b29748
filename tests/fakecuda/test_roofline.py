"""The rehearsal's arithmetic on cases that are computed by hand."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from fedsim.fused.ops import OPS  # noqa: E402
from tools.rehearsal import budgets  # noqa: E402
from tools.rehearsal.roofline import GPUS, KERNEL_S, Counted, Roofline, attention_flops  # noqa: E402


@pytest.fixture(autouse=True)
def fake() -> Iterator[None]:
    """Tensors on "cuda" are shapes alone."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def on_cuda(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


def test_a_product_has_its_flops_and_moves_three_matrices() -> None:
    a, b = on_cuda(3, 5), on_cuda(5, 7)
    with Roofline() as roofline:
        a @ b
    counted = roofline.counted
    assert counted.kernels == 1
    assert counted.flops == {"bf16": 2 * 3 * 5 * 7}
    assert counted.num_bytes == 2 * (3 * 5 + 5 * 7 + 3 * 7)


def test_a_batched_product_and_an_fp32_one() -> None:
    with Roofline() as roofline:
        on_cuda(4, 3, 5) @ on_cuda(4, 5, 7)
        torch.addmm(
            on_cuda(7, dtype=torch.float32), on_cuda(3, 5, dtype=torch.float32), on_cuda(5, 7, dtype=torch.float32)
        )
    assert roofline.counted.flops == {"bf16": 2 * 4 * 3 * 5 * 7, "fp32": 2 * 3 * 5 * 7}


def test_attention_counts_the_pairs_that_see_each_other() -> None:
    # 2 rows, 3 heads, 4 queries that are the last of 6 keys: 3 + 4 + 5 + 6 pairs; sizes 8 and 16
    assert attention_flops(2, 3, 4, 6, 8, 16, causal=True) == 2 * 2 * 3 * (3 + 4 + 5 + 6) * (8 + 16)
    assert attention_flops(2, 3, 4, 6, 8, 16, causal=False) == 2 * 2 * 3 * 24 * (8 + 16)


def test_packed_attention_takes_its_rows_as_equally_long() -> None:
    from torch.nn.attention.varlen import varlen_attn

    query, key = on_cuda(12, 4, 8), on_cuda(12, 2, 8)
    starts = on_cuda(4, dtype=torch.int32)
    with Roofline() as roofline:
        varlen_attn(query, key, key, starts, starts, 4, 4, window_size=(-1, 0), enable_gqa=True)
    assert roofline.counted.flops == {"bf16": 3 * 4 * 4 * (1 + 2 + 3 + 4) * 8}


def test_a_step_over_slots_reads_them_up_to_the_longest_row() -> None:
    from torch.nn.attention.varlen import varlen_attn

    rows, capacity, longest = 5, 100, 10
    query, key = on_cuda(rows, 4, 8), on_cuda(rows * capacity, 2, 8)
    starts, used = on_cuda(rows + 1, dtype=torch.int32), on_cuda(rows, dtype=torch.int32)
    with Roofline() as roofline:
        varlen_attn(
            query, key, key.clone(), starts, starts, 1, longest, window_size=(-1, -1), enable_gqa=True, seqused_k=used
        )
    copied = 2 * 2 * rows * capacity * 2 * 8  # by clone()
    cached = 2 * 2 * rows * longest * 2 * 8
    rest = roofline.counted.num_bytes - copied - cached
    assert 0 < rest < 2000, "query, output, starts, lengths, statistics"
    assert roofline.counted.flops == {"bf16": 4 * rows * 4 * longest * 8}


def test_a_step_that_writes_to_a_cache_touches_its_own_positions() -> None:
    q, k, v, cos, sin = on_cuda(5, 4, 8), on_cuda(5, 2, 8), on_cuda(5, 2, 8), on_cuda(5, 8), on_cuda(5, 8)
    keys, values, places = on_cuda(5, 100, 2, 8), on_cuda(5, 100, 2, 8), on_cuda(5, dtype=torch.int64)
    with Roofline() as roofline:
        OPS.rotate_into(q, k, v, cos, sin, keys, values, places)
    assert roofline.counted.kernels == 1
    assert roofline.counted.num_bytes == 2 * (2 * 5 * (4 + 2 + 2 + 1 + 1) * 8 + 8 * 5)


def test_elementwise_work_moves_what_it_reads_and_writes() -> None:
    x, row = on_cuda(10, 10, dtype=torch.float32), on_cuda(10, dtype=torch.float32)
    with Roofline() as roofline:
        x + row  # a row is read once
        x.mul_(2.0)  # read and written
        x.zero_()  # written
        torch.add(x, 1.0, out=on_cuda(10, 10, dtype=torch.float32))  # read once, written once
    counted = roofline.counted
    assert counted.kernels == 4
    assert counted.num_bytes == 4 * ((100 + 10 + 100) + 200 + 100 + 200)


def test_expanded_tensors_are_read_once() -> None:
    row = on_cuda(1, 10, dtype=torch.float32).expand(10, 10)
    with Roofline() as roofline:
        row + row
    assert roofline.counted.num_bytes == 4 * (10 + 10 + 100)


def test_picking_rows_moves_the_picked_ones() -> None:
    table, ids = on_cuda(1000, 4), on_cuda(3, dtype=torch.int64)
    with Roofline() as roofline:
        table.index_select(0, ids)
        torch.nn.functional.embedding(ids, table)
        table.index_copy_(0, ids, on_cuda(3, 4))
    assert roofline.counted.num_bytes == 3 * 2 * (2 * 3 * 4)


def test_views_and_empty_buffers_launch_nothing() -> None:
    x = on_cuda(4, 6)
    with Roofline() as roofline:
        x.view(6, 4).t().narrow(1, 1, 2).unsqueeze(0).expand(3, -1, -1)
        torch.empty_like(x).split(2)
        torch.empty(10)  # on the host
    assert roofline.counted.kernels == 0 and roofline.counted.num_bytes == 0


def test_an_unknown_operator_is_one_kernel_that_moves_inputs_and_outputs() -> None:
    @torch.library.custom_op("rehearsal_test::scale", mutates_args=())
    def scale(x: torch.Tensor, factor: float) -> torch.Tensor:
        return x * factor

    @scale.register_fake
    def _(x: torch.Tensor, factor: float) -> torch.Tensor:
        return torch.empty_like(x)

    with Roofline() as roofline:
        scale(on_cuda(8, 8), 2.0)
    assert roofline.counted.operators == {"rehearsal_test::scale": 1}
    assert roofline.counted.num_bytes == 2 * (64 + 64)


def test_time_is_the_longest_of_arithmetic_traffic_and_launch() -> None:
    gpu = GPUS["A100"]
    assert gpu.seconds("bf16", 312e12, 0) == pytest.approx(1 / 0.78)
    assert gpu.seconds("bf16", 1.0, 2.039e12) == pytest.approx(1 / 0.85)
    assert gpu.seconds("fp32", 19.5e12, 0) == pytest.approx(1 / 0.6)
    assert gpu.seconds("bf16", 0.0, 100) == KERNEL_S
    assert gpu.floor(312e12, 2.039e12) == 1.0


def test_the_peak_is_the_largest_sum_of_live_tensors() -> None:
    with Roofline() as roofline:
        a = torch.empty(1000, dtype=torch.uint8, device="cuda")  # two blocks of 512 bytes
        b = torch.empty(512, dtype=torch.uint8, device="cuda")
        view = a.narrow(0, 10, 5)
        del a
        c = torch.empty(1, dtype=torch.uint8, device="cuda")
        assert roofline.counted.peak == 4 * 512
        del view, b, c
        roofline.restart()
        assert roofline.counted.peak == 0
        torch.empty(513, dtype=torch.uint8, device="cuda")
    assert roofline.counted.peak == 2 * 512


def copies(run: object) -> Counted:
    with Roofline() as roofline:
        run()  # type: ignore[operator]
    return roofline.counted


def test_what_a_copy_waits_for() -> None:
    small, large = torch.empty(10), torch.empty(1 << 20)
    there = on_cuda(10)
    put = torch.ops.aten._to_copy
    assert copies(lambda: put(small, device="cuda", non_blocking=True)).waits == []  # staged at once
    assert len(copies(lambda: put(large, device="cuda", non_blocking=True)).waits) == 1  # pageable
    assert len(copies(lambda: put(small, device="cuda")).waits) == 1
    assert len(copies(lambda: put(there, device="cpu")).waits) == 1
    assert len(copies(lambda: torch.ops.aten.copy_(there, small)).waits) == 1
    assert copies(lambda: there.to(torch.float32)).waits == []


def test_an_index_on_the_host_waits() -> None:
    counted = copies(lambda: torch.ops.aten.index(on_cuda(10), [torch.tensor([1, 2])]))
    assert len(counted.waits) == 1


def test_collectives_count_their_bytes_and_no_kernel() -> None:
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    try:
        counted = copies(lambda: dist.all_reduce(on_cuda(100, dtype=torch.float32)))
    finally:
        dist.destroy_process_group()
    assert counted.kernels == 0 and counted.collectives == {"c10d::allreduce_": 400}


BUDGET = {"kernels": 100, "a100_ms": 50.0}


def test_above_its_budget_a_figure_is_named_with_phase_value_and_budget() -> None:
    (line,) = budgets.exceeded("SFT step", {"kernels": 101, "a100_ms": 50.0}, BUDGET)
    assert line.startswith("SFT step: kernels is 101, its budget 100")


def test_clearly_below_it_the_budget_is_to_be_lowered() -> None:
    assert budgets.outdated("SFT step", {"kernels": 100, "a100_ms": 49.6}, BUDGET) == []
    (line,) = budgets.outdated("SFT step", {"kernels": 98, "a100_ms": 50.0}, BUDGET)
    assert budgets.COMMAND in line and "kernels is 98" in line


def test_lowering_never_raises() -> None:
    old = {"a": {"kernels": 10, "a100_ms": 5.0}, "gone": {"kernels": 1}}
    found = {"a": {"kernels": 12, "a100_ms": 4.0}, "new": {"kernels": 3}}
    assert budgets.lowered(found, old) == {"a": {"kernels": 10, "a100_ms": 4.0}, "new": {"kernels": 3}}
