"""Reduction at the end of a round's local training.

After a MAX that fixes the scales, one SUM carries [Σ w·delta | Σ control-variate deltas | weights
and metrics by client | seconds and tokens by rank], over all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedsim.base.ranks import Term
from fedsim.federation.algorithms import ClientOutcome, RoundSums
from fedsim.parallel.sums import Summer

_CLIENT_FIELDS = ("num_rows", "weight", "loss", "first_loss", "num_tokens")


@dataclass(frozen=True)
class ClientReport:
    """Figures of a client, known to every rank."""

    client: int
    num_rows: int
    weight: float
    loss: float
    first_loss: float
    num_tokens: int


@dataclass(frozen=True, eq=False)
class Aggregated:
    """Result of the reduction, known to every rank.

    Attributes:
        sums: for the server's step.
        clients: reports in the cohort's order.
        busy_s: seconds each rank spent in local training.
        busy_tokens: tokens of the batches that each rank took part in.
    """

    sums: RoundSums
    clients: list[ClientReport]
    busy_s: list[float]
    busy_tokens: list[float]


def aggregate(
    outcomes: Sequence[ClientOutcome],
    reporting: Sequence[ClientOutcome],
    cohort: Sequence[int],
    *,
    size: int,
    has_control: bool,
    num_clients: int,
    summer: Summer,
    rank: int,
    world_size: int,
    device: torch.device,
) -> Aggregated:
    """Sum over all clients of the round; the same on every rank.

    Args:
        outcomes: clients that this rank took part in training (for its busy time).
        reporting: those of them that it reports (a wide lane reports once, from its first member).
        cohort: all clients that delivered an update in the round, in order; without any the sums
            are 0.
        size: length of the adapter.
        has_control: whether clients report changes of control variates.
        num_clients: clients of the federation, N.
        summer: sums over all ranks.
        rank: this rank.
        world_size: ranks.
        device: of the adapter.
    """
    # Vectors: [size] a term, deltas weighted by w.
    deltas = [Term(o.delta, o.weight) for o in reporting]
    controls = [Term(o.control_delta) for o in reporting if o.control_delta is not None]

    # Figures: fp64 [clients, fields]; rows of clients that other ranks report stay 0.
    table = torch.zeros(len(cohort), len(_CLIENT_FIELDS), dtype=torch.float64, device=device)
    places = {client: place for place, client in enumerate(cohort)}
    for outcome in reporting:
        values = [float(getattr(outcome, name)) for name in _CLIENT_FIELDS]
        table[places[outcome.client]] = torch.tensor(values, dtype=torch.float64)

    # Seconds and tokens by rank: fp64 [2, ranks]; only this rank's column is set.
    busy = torch.zeros(2, world_size, dtype=torch.float64, device=device)
    busy[0, rank] = sum(o.seconds for o in outcomes)
    busy[1, rank] = sum(o.num_tokens for o in outcomes)

    # One sum of all segments.
    columns = [[Term(table[:, i].contiguous())] for i in range(len(_CLIENT_FIELDS))]
    segments = [deltas, controls, *columns, [Term(busy[0])], [Term(busy[1])]]
    control_size = size if has_control else 0
    sizes = [size, control_size, *[len(cohort)] * len(_CLIENT_FIELDS), world_size, world_size]
    # Figures have one term per rank, but only one rank's entry is not 0. The grid must not depend
    # on the world's size.
    delta, control, *rest = summer.sum(segments, sizes, count=max(1, len(cohort)))
    *fields, busy_s, busy_tokens = [column.tolist() for column in rest]

    clients = []
    for client, *figures in zip(cohort, *fields, strict=True):
        num_rows, weight, loss, first_loss, num_tokens = figures
        report = ClientReport(client, int(num_rows), weight, loss, first_loss, int(num_tokens))
        clients.append(report)
    total_weight = sum(report.weight for report in clients)
    sums = RoundSums(delta, total_weight, control if has_control else None, num_clients)
    return Aggregated(sums, clients, busy_s, busy_tokens)
