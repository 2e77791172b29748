"""Aggregation: sums over clients beside OpenFedLLM's loop over dicts, SCAFFOLD's correction beside its callback."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from fedsim.federation.scaffold import ValueCorrection
from fedsim.kernels import fixed_point
from fedsim.study.bench_rows import Correctness, Row, Target
from tools.bench.clients import ROWS, Clients, dict_loop, scaffold_callback
from tools.bench.measure import launches, percentiles, take_turns
from tools.bench.stage import Bench

LOOP = "OpenFedLLM's loop over dicts"
CALLBACK = "OpenFedLLM's callback, without PEFT's part"
Accumulate = Callable[[torch.Tensor, Sequence[torch.Tensor], torch.Tensor], None]


@dataclass(frozen=True)
class AggregationStage:
    """See the module.

    Attributes:
        layers: of the Llama-3.1-8B whose LoRA is aggregated.
    """

    layers: int = 32
    name: str = "aggregation"

    def check(self, bench: Bench) -> list[Correctness]:
        """Sums against fp64; exact ones in two orders; on CUDA the integer pass against the CPU's, bit by bit."""
        clients = Clients(1, bench.device)
        true = sum(
            (v.double() * n for v, n in zip(clients.vectors, ROWS, strict=True)), torch.zeros(()).to(bench.device)
        )
        loop = torch.cat([part.flatten() for part in dict_loop(clients.dicts, ROWS).values()])
        exact, backwards = (clients.sum(True, order) for order in (1, -1))
        found = [
            Correctness("fast sums against fp64, ‖Δ‖ / ‖sum‖", relative(clients.sum(False), true), 1e-6),
            Correctness("exact sums against fp64, ‖Δ‖ / ‖sum‖", relative(exact, true), 1e-13),
            Correctness("exact sums in two orders, numbers that differ", differing(exact, backwards), 0.0),
            Correctness("the peer's mean against fp64, ‖Δ‖ / ‖mean‖", relative(loop, true / sum(ROWS)), 1e-6),
        ]
        if bench.cuda:
            differ = distances(fixed_point.accumulate_scaled, bench.device)
            found += [Correctness(f"the pass to fixed point, {what}: integers that differ", n, 0.0)
                      for what, n in differ.items()]  # fmt: skip
        return found

    def time(self, bench: Bench) -> list[Row]:
        """Sums with and without the server's step, the integer pass alone, and a step's correction.

        The peer's loop gives the new global adapter, so it is set beside the sums with the server's step alone.
        """
        clients = Clients(self.layers, bench.device)
        calls: dict[str, Callable[[], object]] = {
            LOOP: partial(dict_loop, clients.dicts, ROWS),
            "fast sum": partial(clients.sum, False),
            "exact sum": partial(clients.sum, True),
            "fast sum and FedAvg's step": partial(clients.round, False),
            "exact sum and FedAvg's step": partial(clients.round, True),
        }
        seconds = take_turns(calls, bench.device, repeats=bench.repeats, budget_s=bench.budget_s / 2)
        bandwidth = bench.peak().bytes_per_s
        goals = {
            "fast sum and FedAvg's step": Target("ratio", 1.5),
            "exact sum and FedAvg's step": Target("ratio", 0.5),
        }
        rows = []
        for what in list(calls)[1:]:
            passes, written = (2, 8) if "exact" in what else (1, 4)
            is_whole = "step" in what  # the same result as the peer's
            num_bytes = clients.size * (passes * 4 * len(ROWS) + (8 if is_whole else written))
            rows.append(
                Row(
                    self.name,
                    what,
                    "float32",
                    clients.shapes,
                    percentiles(seconds[what]),
                    len(seconds[what]),
                    peer=LOOP if is_whole else None,
                    peer_seconds=percentiles(seconds[LOOP]) if is_whole else None,
                    target=None if bench.cuda else goals.get(what),
                    floor_s=num_bytes / bandwidth,
                    floor=f"clients read {passes} x, " + ("adapter read and written" if is_whole else "sum written"),
                    note="the peer averages adapters, sum([d[key] * n / total for d in dicts]) for each key, in new "
                    "tensors of the allocator's default settings; ours adds deltas, and the step moves the adapter by "
                    "their mean, in memory of the round before the last, as in a run. Neither counts how a client's "
                    "vector came to be: the peer's copies of its state_dict, our subtraction of the start"
                    if is_whole
                    else "",
                )
            )
        return [*rows, self._pass(bench, clients), self._correction(bench, clients)]

    def _pass(self, bench: Bench, clients: Clients) -> Row:
        """The pass that turns all clients into integers."""
        total = torch.empty(clients.size, dtype=torch.int64, device=bench.device)
        factors = torch.tensor(ROWS, dtype=torch.float64, device=bench.device) * 2.0**40
        call = partial(fixed_point.accumulate_scaled, total, clients.vectors, factors)
        if bench.cuda:
            found = launches(call, bench.repeats)
        else:
            found = take_turns({"": call}, bench.device, repeats=bench.repeats, budget_s=bench.budget_s / 4)[""]
        floor, seconds = clients.size * (4 * len(ROWS) + 8) / bench.peak().bytes_per_s, percentiles(found)
        return Row(
            self.name,
            "pass to fixed point, plain torch",
            "float32",
            clients.shapes,
            seconds,
            len(found),
            figures={"of_bandwidth": floor / seconds.p50},
            floor_s=floor,
            floor="clients read, integers written",
        )

    def _correction(self, bench: Bench, clients: Clients) -> Row:
        """y − lr (c − c_i), which SCAFFOLD takes after every optimizer step."""
        values, correction = clients.vectors[0].clone(), ValueCorrection(clients.vectors[1])
        model, corrections = clients.views(clients.vectors[2].clone()), clients.dicts[1]
        calls = {
            "ours": lambda: correction.on_values(values, 1e-5),
            CALLBACK: lambda: scaffold_callback(model, corrections, 1e-5),
        }
        found = take_turns(calls, bench.device, repeats=bench.repeats, budget_s=bench.budget_s / 4)
        return Row(
            self.name,
            "SCAFFOLD's correction of a local step",
            "float32",
            clients.shapes,
            percentiles(found["ours"]),
            len(found["ours"]),
            peer=CALLBACK,
            peer_seconds=percentiles(found[CALLBACK]),
            floor_s=clients.size * 12 / bench.peak().bytes_per_s,
            floor="adapter and correction read, adapter written",
        )


STAGE = AggregationStage()


def distances(
    accumulate: Accumulate, device: torch.device, sizes: Sequence[int] = (1, 7, 1023, 1025, 100_003)
) -> dict[str, float]:
    """Integers in which a pass differs from plain torch's on the CPU, by case, of vectors of these sizes."""
    g = torch.Generator().manual_seed(0)
    found: dict[str, float] = {}

    def compare(what: str, vectors: Sequence[torch.Tensor], factors: torch.Tensor) -> None:
        want, got = (torch.full(vectors[0].shape, 5, device=place) for place in (torch.device("cpu"), device))
        fixed_point.accumulate_scaled(want, vectors, factors)
        accumulate(got, [moved(vector, device) for vector in vectors], factors.to(device))
        found[what] = found.get(what, 0.0) + differing(got.cpu(), want)

    factors = torch.linspace(-3e14, 5e14, 9, dtype=torch.float64)
    for size in sizes:
        wide = torch.randn(9, 3 * size, generator=g) * 10.0 ** (torch.rand(9, 3 * size, generator=g) * 12 - 9)
        for what, vectors in (
            ("fp32", wide[:, :size]),
            ("bf16", wide[:, :size].bfloat16()),
            ("fp64", wide[:, :size].double()),
            ("strided", wide[:, ::3]),
            ("strided bf16", wide.bfloat16()[:, 1::3]),
            ("strided fp64", wide.double()[:, 2::3]),
        ):
            for num in (1, 4, 5, 9):
                compare(what, list(vectors[:num]), factors[:num])
    halves = torch.arange(-4096, 4096, dtype=torch.float64) / 2
    edges = [s * (2.0**e + d) for s in (1, -1) for e in (50, 51, 52, 53, 60, 61) for d in (-0.5, 0.0, 0.5)]
    limits = torch.cat([halves, torch.tensor(edges, dtype=torch.float64)])
    compare("halves and limits", [limits], torch.ones(1, dtype=torch.float64))
    denormals = torch.tensor([1e-45, -3e-45, 1.1754944e-38])
    compare("denormals", [denormals, denormals], torch.tensor([2.0**187, -(2.0**150)], dtype=torch.float64))
    return found


def moved(vector: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On ``device``, with its stride kept."""
    stride = vector.stride(0)
    spread = torch.zeros(max(1, len(vector) * stride), dtype=vector.dtype, device=device)[::stride][: len(vector)]
    return spread.copy_(vector)


def differing(mine: torch.Tensor, other: torch.Tensor) -> float:
    """How many numbers differ."""
    return float((mine != other).sum())


def relative(mine: torch.Tensor, true: torch.Tensor) -> float:
    """‖mine − true‖ / ‖true‖."""
    return float((mine.double() - true).norm() / true.norm())
