"""Partitions of the federated set over clients: equal or skewed sizes, red shares, categories."""

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
        ConfigError: there are fewer rows than clients; the partition fails (its message, which may
            quote a row, is left out), or does not return lists of positions, one for each client,
            in which no row is twice.
    """
    if len(rows) < num_clients:
        raise ConfigError(
            f"federation.num_clients={num_clients}: must be <= the {len(rows)} rows of the "
            "federated set; lower it or raise data.federated_rows"
        )

    # The rows in a drawn order, and the partition's own draws.
    what = f"federation.partition={name!r}"
    order = [int(i) for i in keyed_random.permutation(len(rows), seed, "partition")]
    rng = keyed_random.generator(seed, "partition", name.rpartition(":")[2])
    with calling(what, ConfigError, quiet=True):
        dealt = []
        for members in deal([rows[i] for i in order], num_clients, rng):
            dealt.append([int(place) for place in members])

    # Every row at most once.
    places: list[int] = []
    for members in dealt:
        places += members
    distinct = set(places)
    is_partition = len(distinct) == len(places) and distinct <= set(range(len(rows)))
    if len(dealt) != num_clients or not is_partition:
        raise ConfigError(
            f"{what}: must return {num_clients} lists of positions from 0 to {len(rows) - 1}, no "
            f"position twice; returned {len(dealt)} lists of {len(places)} positions, "
            f"{len(set(places))} of them distinct"
        )

    # Back to positions of the file, each client's in a drawn order.
    shards = []
    for client, members in enumerate(dealt):
        shuffled = keyed_random.permutation(len(members), seed, "shard", client)
        shards.append([order[members[int(place)]] for place in shuffled])
    return shards


def iid(rows: Sequence[SquareRow], num_clients: int, rng: np.random.Generator) -> list[list[int]]:
    """Random partition, in sizes that differ by at most one."""
    return _in_turn(range(len(rows)), num_clients)


def fixed_red_share(
    rows: Sequence[SquareRow],
    num_clients: int,
    rng: np.random.Generator,
) -> list[list[int]]:
    """Equal sizes and red shares, "approximately 30 % harmful data" (paper §5.1).

    Red rows are dealt first, then the others: numbers of red rows differ by at most one, and sizes
    too.
    """
    reds, others = _by_label(rows)
    return _in_turn(reds + others, num_clients)


def beta_red_share(
    rows: Sequence[SquareRow],
    num_clients: int,
    rng: np.random.Generator,
    *,
    concentration: float = 10.0,
) -> list[list[int]]:
    """Equal sizes; red shares drawn from a Beta distribution around the whole set's.

    Red rows are dealt in proportion to the drawn shares, as far as each client's size allows.

    Args:
        concentration: a + b of the Beta distribution: small = clients of one kind, large = equal
            shares.
    """
    reds, others = _by_label(rows)
    sizes = np.array([len(range(client, len(rows), num_clients)) for client in range(num_clients)])
    # Each client's red share: [clients]
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
    """Each category dealt in shares drawn from a Dirichlet distribution over clients.

    Yurochkin et al. 2019, arXiv 1905.12022.

    Args:
        alpha: of the distribution: small = skewed, large = equal.
    """
    dealt: list[list[int]] = [[] for _ in range(num_clients)]
    # The first category of each row; "" without one.
    categories = ["".join(row.categories[:1]) for row in rows]
    for name in sorted(set(categories)):
        members = [place for place, category in enumerate(categories) if category == name]
        weights = rng.dirichlet(np.full(num_clients, alpha))
        counts = fill(weights * len(members), np.full(num_clients, len(members)), len(members))
        for client, more in zip(dealt, _cut(members, counts), strict=True):
            client += more
    # The largest client gives its last row to a client without any.
    for client in dealt:
        if not client:
            client.append(max(dealt, key=len).pop())
    return dealt


def quantity_skew(
    rows: Sequence[SquareRow], num_clients: int, rng: np.random.Generator, *, alpha: float = 1.0
) -> list[list[int]]:
    """Sizes drawn from a Dirichlet distribution, at least one row each, with equal red shares.

    Args:
        alpha: of the distribution: small = skewed, large = equal.
    """
    # One row for each client, the spare ones by drawn weights.
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

    The excess of a full place goes to the others in the same proportion; remainders go to the
    largest fractions.

    Args:
        wanted: fp64 ``[n]``, not negative.
        room: int64 ``[n]``, together at least ``total``.

    Returns:
        int64 ``[n]``.
    """
    assert room.sum() >= total, "no room for all"
    # Share out fractions, fp64 [n]; places that are full drop out until none overflows.
    taken = np.zeros(len(wanted))
    free = np.ones(len(wanted), dtype=bool)
    while free.any():
        left = total - taken[~free].sum()
        if left <= 0:
            break
        weights = np.where(free, wanted, 0.0)
        if weights.sum() <= 0:  # nothing is wanted: by room
            weights = np.where(free, room, 0.0)
        taken = np.where(free, left * weights / weights.sum(), taken)
        over = free & (taken >= room)
        if not over.any():
            break
        taken, free = np.where(over, room, taken), free & ~over
        taken = np.where(free, 0.0, taken)

    # Round down, then give the missing ones to the largest fractions.
    counts = np.minimum(np.floor(taken + 1e-9).astype(np.int64), room)
    by_fraction = np.argsort(counts - taken, kind="stable")
    while True:
        missing = total - int(counts.sum())
        if missing <= 0:
            return counts
        able = [i for i in by_fraction if counts[i] < room[i]]
        counts[able[:missing]] += 1


def _cut(rows: Sequence[int], counts: np.ndarray) -> list[list[int]]:
    """Cut ``rows`` into pieces of these lengths, in order."""
    ends = np.cumsum(counts).tolist()
    return [list(rows[end - count : end]) for end, count in zip(ends, counts.tolist(), strict=True)]
