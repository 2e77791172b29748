"""Every client's update on every rank, for aggregation rules and attacks that need them."""

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
    """Gather the updates of ``clients``: the same bits on every rank, for any number of ranks.

    Every row comes from one rank; the others add zeros. The bits are added as integers, so that a
    row arrives unchanged, -0.0 and NaN included.

    Args:
        reporting: updates that only this rank reports; those of clients that are not wanted are
            left out.
        clients: ids of the wanted updates, ascending; the same on every rank.
        size: length of the adapter.
        has_control: whether clients have control variates.
        num_clients: clients of the federation, N.
        summer: adds over all ranks.
    """
    places = {client: place for place, client in enumerate(clients)}
    # This rank's rows: weights [clients]; deltas and control-variate deltas [clients, size].
    weights = torch.zeros(len(clients), dtype=torch.float64, device=device)
    deltas = torch.zeros(len(clients), size, dtype=torch.float32, device=device)
    controls = None
    if has_control:
        controls = torch.zeros_like(deltas)
    for outcome in reporting:
        if outcome.client not in places:
            continue
        place = places[outcome.client]
        weights[place] = outcome.weight
        deltas[place] = outcome.delta
        if controls is not None and outcome.control_delta is not None:
            controls[place] = outcome.control_delta

    # Add the rows of all ranks, as integers.
    if summer.group is not None:
        if summer.heartbeat:
            # A missing member raises here; NCCL itself would wait.
            dist.all_reduce(torch.zeros(1), group=summer.group)
        dist.all_reduce(summer.traffic.add(weights.view(torch.int64)), group=summer.group)
        for table in (deltas, controls):
            if table is not None:
                dist.all_reduce(summer.traffic.add(table.view(torch.int32)), group=summer.group)
    return Updates(tuple(clients), deltas, weights, controls, num_clients)
