"""How the federated set reaches the clients."""

from __future__ import annotations

from collections.abc import Sequence

from fedsim import keys
from fedsim.errors import ConfigError


def partition_rows(red: Sequence[bool], num_clients: int, kind: str, seed: int) -> list[list[int]]:
    """Deal all rows to clients; sizes differ by at most one.

    Args:
        red: label of each row.
        num_clients: how many clients.
        kind: "iid" deals a random order round-robin; "fixed_red_share" deals the red rows first and the others after
            them, so that each client's number of red rows differs by at most one (paper §5.1: "each client receives
            approximately 30 % harmful data").
        seed: the run's seed.

    Returns:
        Row positions of each client, in a drawn order.

    Raises:
        ConfigError: fewer rows than clients, or an unknown kind.
    """
    if len(red) < num_clients:
        raise ConfigError(
            f"federation.num_clients={num_clients}: must be <= the {len(red)} rows of the federated set; lower it or "
            "raise data.federated_rows"
        )
    order = [int(i) for i in keys.permutation(len(red), seed, "partition")]
    if kind == "fixed_red_share":
        order.sort(key=lambda i: not red[i])
    elif kind != "iid":
        raise ConfigError(f"federation.partition={kind!r}: must be iid or fixed_red_share")
    return [
        [members[int(j)] for j in keys.permutation(len(members), seed, "shard", client)]
        for client in range(num_clients)
        for members in [order[client::num_clients]]
    ]
