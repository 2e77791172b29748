"""The aggregation stage: its checks see wrong sums, and its peers compute what OpenFedLLM does."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from fedsim.kernels import fixed_point
from tools.bench.aggregation import AggregationStage, distances
from tools.bench.clients import ROWS, Clients, dict_loop, scaffold_callback
from tools.bench.models import MICRO
from tools.bench.stage import Bench

CPU = torch.device("cpu")


def test_the_stage_runs_on_a_cpu() -> None:
    bench = Bench(CPU, MICRO, threads=1, repeats=3, budget_s=0.0, say=lambda line: None)
    stage = AggregationStage(layers=1)
    assert all(check.passed for check in stage.check(bench))
    rows = stage.time(bench)
    assert [row.name for row in rows][:2] == ["fast sum", "exact sum"] and len(rows) == 6
    assert all(row.seconds is not None and row.floor_s is not None and row.shapes["clients"] == 5 for row in rows)
    assert [row.target is not None for row in rows] == [False, False, True, True, False, False]
    assert [row.peer is not None for row in rows] == [False, False, True, True, False, True], "like with like"


def test_five_clients_have_the_papers_size() -> None:
    clients = Clients(1, CPU)
    assert clients.size * 32 == 13_631_488 and len(clients.tensors) == 4


def test_the_loop_is_the_weighted_mean_and_ours_moves_there() -> None:
    clients = Clients(1, CPU)
    want = sum(n * v.double() for n, v in zip(ROWS, clients.vectors, strict=True)) / sum(ROWS)
    mean = torch.cat([part.flatten() for part in dict_loop(clients.dicts, ROWS).values()])
    torch.testing.assert_close(mean.double(), want, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(clients.round(True).adapter.double(), want, rtol=1e-6, atol=0)


def test_the_callback_subtracts_in_place() -> None:
    model, before = {"a": torch.ones(3)}, {"a": torch.ones(3)}
    view = model["a"]
    scaffold_callback(model, before, 0.25)
    assert view.tolist() == [0.75] * 3 and before["a"].tolist() == [1.0] * 3


def test_a_right_pass_differs_nowhere() -> None:
    found = distances(fixed_point.accumulate_scaled, CPU)
    assert set(found.values()) == {0.0} and len(found) == 8


@pytest.mark.parametrize("fault", ["halves", "fp32", "added", "contiguous"])
def test_the_check_sees_a_wrong_pass(fault: str) -> None:
    """Halves away from zero, products in fp32, old integers kept, strides ignored."""

    def wrong(total: torch.Tensor, vectors: Sequence[torch.Tensor], factors: torch.Tensor) -> None:
        sums = total.clone() if fault == "added" else torch.zeros_like(total)
        for vector, factor in zip(vectors, factors, strict=True):
            if fault == "contiguous":
                vector = torch.as_strided(vector, vector.shape, (1,))
            value = (vector * factor.float()).double() if fault == "fp32" else vector.double() * factor
            if fault == "halves":
                value = value.sign() * (value.abs() + 0.5).floor()
            sums += value.round().long()
        total.copy_(sums)

    found = distances(wrong, CPU)
    assert max(found.values()) > 0
    if fault == "contiguous":
        assert {what for what, num in found.items() if num} == {"strided", "strided bf16", "strided fp64"}
