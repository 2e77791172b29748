"""Growth of what a run holds: the slope of what each round leaves behind, and a stated limit.

A series is each round's smallest value, what the round leaves behind; rounds of the warm-up and the last one, in which
pictures and a summary are made, do not count. Growth is the least-squares slope over ten blocks of rounds with
Student's 95 % interval. It is flat if the whole interval is below the limit, it grows if the whole interval is above
it, and else more rounds are needed to tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedsim.base.errors import RunError
from fedsim.evaluate.intervals import Slope
from tools.watching import CORE, Sample

MEMORY, HANDLES, FILES, DISK = "resident memory", "open files", "files in the run directory", "their bytes"
LIMITS = {MEMORY: 2.0**20, HANDLES: 1.0, FILES: 1.0, DISK: 65536.0}  # in SPAN rounds
CORE_LIMIT = 4 * LIMITS[MEMORY]  # W&B's own program: its heap grows by 3 MiB in its first 350 rounds, and then no more
SPAN = 100
FLAT, GROWS, UNDECIDED = "flat", "grows", "undecided"


def limit(quantity: str, owner: str) -> float:
    """The largest growth in :data:`SPAN` rounds that counts as flat."""
    return CORE_LIMIT if (quantity, owner) == (MEMORY, CORE) else LIMITS[quantity]


@dataclass(frozen=True)
class Growth:
    """How one quantity of one process (or of the run directory) went.

    Attributes:
        quantity: a key of :data:`LIMITS`.
        owner: process, or "" for the run directory.
        level: median after the warm-up.
        slope: growth in :data:`SPAN` rounds.
    """

    quantity: str
    owner: str
    level: float
    slope: Slope

    @property
    def bound(self) -> float:
        """The largest growth in :data:`SPAN` rounds that counts as flat."""
        return limit(self.quantity, self.owner)

    @property
    def verdict(self) -> str:
        """``flat``, ``grows`` or ``undecided``, by the module's rule."""
        if self.slope.high < self.bound:
            return FLAT
        return GROWS if self.slope.low > self.bound else UNDECIDED


@dataclass(frozen=True)
class Soak:
    """What was seen of one run.

    Attributes:
        num_ranks: its processes.
        rounds: rounds that count.
        growths: of every quantity and process.
        log_bytes: bytes that a round adds to the logs.
        evaluation_bytes: bytes that a round adds to what is kept of evaluations, on average.
    """

    num_ranks: int
    rounds: int
    growths: Sequence[Growth]
    log_bytes: float
    evaluation_bytes: float

    def worst(self, quantity: str) -> Growth:
        """Of all processes, the one whose interval reaches highest."""
        return max((g for g in self.growths if g.quantity == quantity), key=lambda g: g.slope.high)


def judge(samples: Sequence[Sample], num_ranks: int, warm_up: int) -> Soak:
    """Growth of everything that was watched.

    Raises:
        RunError: fewer than three rounds were seen after the warm-up.
    """
    by_round: dict[int, list[Sample]] = {}
    for sample in samples:
        by_round.setdefault(sample.number, []).append(sample)
    rounds = [by_round[r] for r in sorted(by_round)[:-1] if r > warm_up]
    if len(rounds) < 3:
        raise RunError(
            f"{len(rounds)} round(s) were seen after a warm-up of {warm_up}: a growth needs three; ask for more rounds "
            "(federation.num_rounds=...) or a shorter --warm-up"
        )
    growths = []
    for quantity, series in (("resident", MEMORY), ("handles", HANDLES)):
        for owner, values in _by_owner([[getattr(s, quantity) for s in seen] for seen in rounds]).items():
            growths.append(_growth(series, owner, values))
    growths.append(_growth(FILES, "", [min(s.files for s in seen) for seen in rounds]))
    growths.append(_growth(DISK, "", [min(s.kept_bytes for s in seen) for seen in rounds]))
    first, last = rounds[0][0], rounds[-1][-1]
    span = last.number - first.number
    logs, evaluations = last.log_bytes - first.log_bytes, last.evaluation_bytes - first.evaluation_bytes
    return Soak(num_ranks, len(rounds), growths, logs / span, evaluations / span)


def _by_owner(rounds: Sequence[Sequence[Mapping[str, int]]]) -> dict[str, list[int]]:
    """Each process's smallest value of each round; one that was there in less than half of them is left out."""
    found: dict[str, list[int]] = {}
    for seen in rounds:
        for owner in {name for values in seen for name in values}:
            found.setdefault(owner, []).append(min(values[owner] for values in seen if owner in values))
    return {owner: values for owner, values in sorted(found.items()) if len(values) >= max(3, len(rounds) / 2)}


def _growth(quantity: str, owner: str, values: Sequence[int]) -> Growth:
    each = Slope.of(values)
    slope = Slope(SPAN * each.value, SPAN * each.low, SPAN * each.high, each.count)
    return Growth(quantity, owner, float(sorted(values)[len(values) // 2]), slope)
