"""How the federated set reaches the clients: in equal or skewed sizes, red shares and categories."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedsim import keys
from fedsim.errors import ConfigError


def partition_rows(
    red: Sequence[bool],
    num_clients: int,
    kind: str,
    seed: int,
    *,
    categories: Sequence[str] = (),
    concentration: float = 10.0,
    alpha: float = 1.0,
) -> list[list[int]]:
    """Deal all rows to clients; every client gets at least one.

    Args:
        red: label of each row.
        num_clients: how many clients.
        kind: ``iid`` deals a random order round-robin. ``fixed_red_share`` deals the red rows first, the others after
            them, so that each client's number of red rows differs by at most one (paper §5.1: "each client receives
            approximately 30 % harmful data"). ``beta_red_share`` draws each client's red share from a Beta distribution
            around the whole set's. Under these three, sizes differ by at most one. ``dirichlet`` draws for every
            category how its rows are shared out, from a Dirichlet distribution over clients (Yurochkin et al. 2019,
            arXiv 1905.12022). ``quantity_skew`` draws the clients' sizes so, at equal red shares.
        seed: the run's seed.
        categories: category of each row, for ``dirichlet``.
        concentration: a + b of the Beta distribution: small = clients of one kind, large = equal shares.
        alpha: of the Dirichlet distribution: small = skewed, large = equal.

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
    rng = keys.generator(seed, "partition", kind)
    if kind == "iid":
        dealt = [order[client::num_clients] for client in range(num_clients)]
    elif kind == "fixed_red_share":
        order.sort(key=lambda i: not red[i])
        dealt = [order[client::num_clients] for client in range(num_clients)]
    elif kind == "beta_red_share":
        dealt = _by_red_share(order, red, num_clients, concentration, rng)
    elif kind == "dirichlet":
        dealt = _by_category(order, categories, num_clients, alpha, rng)
    elif kind == "quantity_skew":
        dealt = _by_size(order, red, num_clients, alpha, rng)
    else:
        raise ConfigError(f"federation.partition={kind!r}: is not a partition; launch/run.py --help lists them")
    return [
        [members[int(j)] for j in keys.permutation(len(members), seed, "shard", client)]
        for client, members in enumerate(dealt)
    ]


def _by_red_share(
    order: Sequence[int], red: Sequence[bool], num_clients: int, concentration: float, rng: np.random.Generator
) -> list[list[int]]:
    """Equal sizes; red rows in proportion to drawn shares, as far as each client's size allows."""
    reds, others = [i for i in order if red[i]], [i for i in order if not red[i]]
    sizes = np.array([len(range(client, len(order), num_clients)) for client in range(num_clients)])
    mean = len(reds) / len(order)
    if 0 < mean < 1:
        shares = rng.beta(mean * concentration, (1 - mean) * concentration, num_clients)
    else:
        shares = np.full(num_clients, mean)
    num_red = fill(shares * sizes, sizes, len(reds))
    return [a + b for a, b in zip(_cut(reds, num_red), _cut(others, sizes - num_red), strict=True)]


def _by_category(
    order: Sequence[int], categories: Sequence[str], num_clients: int, alpha: float, rng: np.random.Generator
) -> list[list[int]]:
    dealt: list[list[int]] = [[] for _ in range(num_clients)]
    for name in sorted(set(categories)):
        rows = [i for i in order if categories[i] == name]
        weights = rng.dirichlet(np.full(num_clients, alpha))
        counts = fill(weights * len(rows), np.full(num_clients, len(rows)), len(rows))
        for members, more in zip(dealt, _cut(rows, counts), strict=True):
            members += more
    for members in dealt:  # nobody is left without a row: the largest client gives its last one
        if not members:
            members.append(max(dealt, key=len).pop())
    return dealt


def _by_size(
    order: Sequence[int], red: Sequence[bool], num_clients: int, alpha: float, rng: np.random.Generator
) -> list[list[int]]:
    """Drawn sizes, at least one row each; rows by label in proportion to the sizes."""
    spare = len(order) - num_clients
    weights = rng.dirichlet(np.full(num_clients, alpha))
    sizes = 1 + fill(weights * spare, np.full(num_clients, spare), spare)
    reds, others = [i for i in order if red[i]], [i for i in order if not red[i]]
    num_red = fill(sizes * (len(reds) / len(order)), sizes, len(reds))
    return [a + b for a, b in zip(_cut(reds, num_red), _cut(others, sizes - num_red), strict=True)]


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
