"""Every client's update on every rank, for aggregation rules and attacks that want more than sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from fedsim.federation.algorithms import ClientOutcome, Updates
from fedsim.parallel.sums import Summer


def gather_updates(
    reporting: Sequence[ClientOutcome],
    clients: Sequence[int],
    *,
    size: int,
    has_control: bool,
    num_clients: int,
    summer: Summer,
    device: torch.device,
) -> Updates:
    """Bring the updates of ``clients`` together, bit for bit the same on every rank and for any number of ranks.

    Every row comes from one rank; the others add zeros. Bits are added as whole numbers, so that a row arrives as it
    is, -0.0 and NaN included.

    Args:
        reporting: updates of this rank, each of which no other rank reports; those of other clients are left out.
        clients: whose updates are wanted, ascending; the same on every rank.
        size: length of the adapter.
        has_control: whether clients have control variates.
        num_clients: clients of the federation, N.
        summer: adds over all ranks.
    """
    places = {client: place for place, client in enumerate(clients)}
    mine = [outcome for outcome in reporting if outcome.client in places]
    weights = torch.zeros(len(clients), dtype=torch.float64, device=device)
    deltas = torch.zeros(len(clients), size, dtype=torch.float32, device=device)
    controls = torch.zeros_like(deltas) if has_control else None
    for outcome in mine:
        place = places[outcome.client]
        weights[place] = outcome.weight
        deltas[place] = outcome.delta
        if controls is not None and outcome.control_delta is not None:
            controls[place] = outcome.control_delta
    if summer.group is not None:
        if summer.heartbeat:
            dist.all_reduce(torch.zeros(1), group=summer.group)
        dist.all_reduce(summer.traffic.add(weights.view(torch.int64)), group=summer.group)
        for table in (deltas, controls):
            if table is not None:
                dist.all_reduce(summer.traffic.add(table.view(torch.int32)), group=summer.group)
    return Updates(tuple(clients), deltas, weights, controls, num_clients)
