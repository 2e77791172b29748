"""Partition of the federated set over clients, in equal or skewed sizes, red shares and categories."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fedsim.base import keyed_random
from fedsim.base.errors import ConfigError
from fedsim.base.user_code import calling
from fedsim.data.square import SquareRow

Partition = Callable[[Sequence[SquareRow], int, np.random.Generator], list[list[int]]]
"""``deal(rows, num_clients, rng)``: positions of each client's rows. Rows come in a drawn order."""


def partition_rows(
    rows: Sequence[SquareRow], num_clients: int, deal: Partition, name: str, seed: int
) -> list[list[int]]:
    """Deal rows to clients.

    Args:
        rows: the federated set.
        deal: the partition.
        name: of the partition, for its draws and for errors.
        seed: the run's seed.

    Returns:
        Row positions of each client, in a drawn order.

    Raises:
        ConfigError: fewer rows than clients; the partition fails, whose own message may quote a row and is left out, or
            it does not return lists of positions, one for each client, in which no row is twice.
    """
    if len(rows) < num_clients:
        raise ConfigError(
            f"federation.num_clients={num_clients}: must be <= the {len(rows)} rows of the federated set; lower it or "
            "raise data.federated_rows"
        )
    what = f"federation.partition={name!r}"
    order = [int(i) for i in keyed_random.permutation(len(rows), seed, "partition")]
    rng = keyed_random.generator(seed, "partition", name.rpartition(":")[2])
    with calling(what, ConfigError, quiet=True):
        found = deal([rows[i] for i in order], num_clients, rng)
        dealt = [[int(place) for place in members] for members in found]
    places = [place for members in dealt for place in members]
    if len(dealt) != num_clients or len(set(places)) < len(places) or not set(places) <= set(range(len(rows))):
        raise ConfigError(
            f"{what}: must return {num_clients} lists of positions from 0 to {len(rows) - 1}, no position twice; "
            f"returned {len(dealt)} lists of {len(places)} positions, {len(set(places))} of them distinct"
        )
    return [
        [order[members[int(j)]] for j in keyed_random.permutation(len(members), seed, "shard", client)]
        for client, members in enumerate(dealt)
    ]


def iid(rows: Sequence[SquareRow], num_clients: int, rng: np.random.Generator) -> list[list[int]]:
    """At random, in sizes that differ by at most one."""
    return _in_turn(range(len(rows)), num_clients)


def fixed_red_share(rows: Sequence[SquareRow], num_clients: int, rng: np.random.Generator) -> list[list[int]]:
    """Equal sizes and red shares (paper §5.1: "each client receives approximately 30 % harmful data").

    The red rows are dealt first, the others after them, so that each client's number of red rows differs by at most
    one, and its size too.
    """
    return _in_turn(sorted(range(len(rows)), key=lambda place: not rows[place].red), num_clients)


def beta_red_share(
    rows: Sequence[SquareRow], num_clients: int, rng: np.random.Generator, *, concentration: float = 10.0
) -> list[list[int]]:
    """Equal sizes; each client's red share is drawn from a Beta distribution around the whole set's.

    Red rows are dealt in proportion to the drawn shares, as far as each client's size allows.

    Args:
        concentration: a + b of the Beta distribution: small = clients of one kind, large = equal shares.
    """
    reds, others = _by_label(rows)
    sizes = np.array([len(range(client, len(rows), num_clients)) for client in range(num_clients)])
    mean = len(reds) / len(rows)
    if 0 < mean < 1:
        shares = rng.beta(mean * concentration, (1 - mean) * concentration, num_clients)
    else:
        shares = np.full(num_clients, mean)
    num_red = fill(shares * sizes, sizes, len(reds))
    return [a + b for a, b in zip(_cut(reds, num_red), _cut(others, sizes - num_red), strict=True)]


def dirichlet(
    rows: Sequence[SquareRow], num_clients: int, rng: np.random.Generator, *, alpha: float = 1.0
) -> list[list[int]]:
    """Each category's rows are shared out by a draw from a Dirichlet distribution over clients.

    Yurochkin et al. 2019, arXiv 1905.12022.

    Args:
        alpha: of the distribution: small = skewed, large = equal.
    """
    dealt: list[list[int]] = [[] for _ in range(num_clients)]
    categories = [row.categories[0] if row.categories else "" for row in rows]
    for name in sorted(set(categories)):
        members = [place for place, category in enumerate(categories) if category == name]
        weights = rng.dirichlet(np.full(num_clients, alpha))
        counts = fill(weights * len(members), np.full(num_clients, len(members)), len(members))
        for client, more in zip(dealt, _cut(members, counts), strict=True):
            client += more
    for client in dealt:  # nobody is left without a row: the largest client gives its last one
        if not client:
            client.append(max(dealt, key=len).pop())
    return dealt


def quantity_skew(
    rows: Sequence[SquareRow], num_clients: int, rng: np.random.Generator, *, alpha: float = 1.0
) -> list[list[int]]:
    """Sizes drawn from a Dirichlet distribution, at least one row each, at equal red shares.

    Args:
        alpha: of the distribution: small = skewed, large = equal.
    """
    spare = len(rows) - num_clients
    weights = rng.dirichlet(np.full(num_clients, alpha))
    sizes = 1 + fill(weights * spare, np.full(num_clients, spare), spare)
    reds, others = _by_label(rows)
    num_red = fill(sizes * (len(reds) / len(rows)), sizes, len(reds))
    return [a + b for a, b in zip(_cut(reds, num_red), _cut(others, sizes - num_red), strict=True)]


def _in_turn(places: Sequence[int], num_clients: int) -> list[list[int]]:
    """Deal places to clients in turn."""
    return [list(places[client::num_clients]) for client in range(num_clients)]


def _by_label(rows: Sequence[SquareRow]) -> tuple[list[int], list[int]]:
    """Positions of the red rows, and of the others."""
    reds = [place for place, row in enumerate(rows) if row.red]
    return reds, [place for place, row in enumerate(rows) if not row.red]


def fill(wanted: np.ndarray, room: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers that sum to ``total``, in proportion to ``wanted`` and never above ``room``.

    What a full place cannot take goes to the others in the same proportion; remainders go to the largest fractions.

    Args:
        wanted: fp64 ``[n]``, not negative.
        room: int64 ``[n]``, together at least ``total``.

    Returns:
        int64 ``[n]``.
    """
    assert room.sum() >= total, "no room for all"
    taken = np.zeros(len(wanted))
    free = np.ones(len(wanted), dtype=bool)
    while (left := total - taken[~free].sum()) > 0 and free.any():
        weights = np.where(free, wanted, 0.0)
        weights = weights if weights.sum() > 0 else np.where(free, room, 0.0)
        taken = np.where(free, left * weights / weights.sum(), taken)
        over = free & (taken >= room)
        if not over.any():
            break
        taken, free = np.where(over, room, taken), free & ~over
        taken = np.where(free, 0.0, taken)
    counts = np.minimum(np.floor(taken + 1e-9).astype(np.int64), room)
    by_fraction = np.argsort(counts - taken, kind="stable")
    while (missing := total - int(counts.sum())) > 0:
        able = [i for i in by_fraction if counts[i] < room[i]]
        counts[able[:missing]] += 1
    return counts


def _cut(rows: Sequence[int], counts: np.ndarray) -> list[list[int]]:
    """``rows`` in pieces of these lengths, in order."""
    ends = np.cumsum(counts).tolist()
    return [list(rows[end - count : end]) for end, count in zip(ends, counts.tolist(), strict=True)]
