"""Disjoint splits of a SQuARe file: federated set, guard fine-tuning set, CAI set (paper §5.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from fedsim.base import keyed_random
from fedsim.base.errors import DataError
from fedsim.data.square import SquareRow


@dataclass(frozen=True)
class Demand:
    """Numbers of rows that a split wants, by label."""

    name: str
    num_red: int
    num_acceptable: int

    @classmethod
    def of(cls, name: str, num_rows: int, red_share: float) -> Demand:
        """``num_rows`` rows of which ``red_share`` (rounded to a whole row) are red."""
        num_red = int(num_rows * red_share + 0.5)
        return cls(name, num_red, num_rows - num_red)

    @property
    def num_rows(self) -> int:
        """Rows of both labels."""
        return self.num_red + self.num_acceptable

    def scaled(self, factor: Fraction) -> Demand:
        """The same shares at ``factor`` (≤ 1) of the size, rounded down."""
        return Demand(self.name, int(self.num_red * factor), int(self.num_acceptable * factor))


@dataclass(frozen=True)
class Splits:
    """Positions of the file's rows in each split, in drawn order, and the numbers left over.

    Attributes:
        parts: split name → row positions.
        leftover_red: red rows in no split.
        leftover_acceptable: acceptable rows in no split.
        factor: 1.0, or the share of the asked sizes that the file could supply.
    """

    parts: dict[str, list[int]]
    leftover_red: int
    leftover_acceptable: int
    factor: float


def split_rows(
    rows: Sequence[SquareRow],
    demands: Sequence[Demand],
    seed: int,
    *,
    fit: bool,
    group_by_question: bool,
) -> Splits:
    """Draw disjoint splits at random.

    Args:
        rows: the file's rows; labels are counted from them.
        demands: rows that each split wants.
        seed: the run's seed; the key is (seed, "split", label).
        fit: a file that is too small shrinks all demands by one factor instead of raising.
        group_by_question: all rows of one question go to one split (whole questions are dealt until
            a split is full, so some rows may be left over).

    Raises:
        DataError: the file cannot supply the demands; it names the label that falls short, by how
            many rows, and sizes that would fit.
    """
    # Rows in a drawn order, and how many of them are red or acceptable.
    order = [int(i) for i in keyed_random.permutation(len(rows), seed, "split")]
    red = [i for i in order if rows[i].red]
    acceptable = [i for i in order if not rows[i].red]
    have = (len(red), len(acceptable))

    # Do the demands fit?
    factor = largest_factor(demands, *have)
    if factor < 1 and not fit:
        raise DataError(shortage(demands, *have))
    if group_by_question:
        return _split_by_question(rows, demands, order, fit)

    # Each split takes the next rows of both labels, and keeps the drawn order.
    parts = {}
    place = {row: i for i, row in enumerate(order)}
    for demand in demands:
        if factor < 1:
            demand = demand.scaled(factor)
        taken = red[: demand.num_red] + acceptable[: demand.num_acceptable]
        parts[demand.name] = sorted(taken, key=place.__getitem__)
        red, acceptable = red[demand.num_red :], acceptable[demand.num_acceptable :]
    return _checked(Splits(parts, len(red), len(acceptable), float(factor)), demands)


def largest_factor(demands: Sequence[Demand], num_red: int, num_acceptable: int) -> Fraction:
    """Largest factor ≤ 1 by which all demands must shrink to fit."""
    factor = Fraction(1)
    asked_red = sum(d.num_red for d in demands)
    if asked_red > 0:
        factor = min(factor, Fraction(num_red, asked_red))
    asked_acceptable = sum(d.num_acceptable for d in demands)
    if asked_acceptable > 0:
        factor = min(factor, Fraction(num_acceptable, asked_acceptable))
    return factor


def shortage(demands: Sequence[Demand], num_red: int, num_acceptable: int) -> str:
    """Message on demands that do not fit: labels, missing rows, largest splits that fit."""
    short = []
    for label, asked, have in (
        ("red", sum(d.num_red for d in demands), num_red),
        ("acceptable", sum(d.num_acceptable for d in demands), num_acceptable),
    ):
        if asked > have:
            short.append(f"{asked - have} {label} rows short ({asked} asked, {have} in the file)")
    factor = largest_factor(demands, num_red, num_acceptable)
    sizes = []
    for demand in demands:
        if demand.num_rows:
            sizes.append(f"data.{demand.name}_rows={demand.scaled(factor).num_rows}")
    fitting = ", ".join(sizes)
    return (
        f"the splits need more rows than the data has: {' and '.join(short)}; the largest that fit "
        f"are {fitting}, or set data.fit=true"
    )


def _split_by_question(
    rows: Sequence[SquareRow],
    demands: Sequence[Demand],
    order: list[int],
    fit: bool,
) -> Splits:
    """Splits of whole questions, at the largest size found that the questions fill."""
    # Rows of each question, in drawn order.
    questions: dict[str, list[int]] = {}
    for i in order:
        questions.setdefault(rows[i].prompt, []).append(i)
    total = sum(d.num_rows for d in demands)
    have = (sum(r.red for r in rows), sum(not r.red for r in rows))
    factor = largest_factor(demands, *have)
    # Whole questions fit less tightly than rows: shrink by 2 % until they do.
    for attempt in range(60):
        shrink = factor * Fraction(98, 100) ** attempt
        wanted = [d.scaled(shrink) for d in demands]
        if any(d.num_rows and not w.num_rows for d, w in zip(demands, wanted, strict=True)):
            break
        parts = _deal(rows, list(questions.values()), wanted)
        if parts is not None and (shrink == 1 or fit):
            used = [0, 0]  # acceptable, red
            for part in parts.values():
                for i in part:
                    used[rows[i].red] += 1
            left = (have[0] - used[1], have[1] - used[0])
            return _checked(Splits(parts, *left, float(shrink)), demands)
        if parts is not None:
            # They fit only in smaller splits, which the user has not allowed.
            sizes = ", ".join(f"data.{n}_rows={len(p)}" for n, p in parts.items() if p)
            raise DataError(
                f"data.group_by_question: {total} rows do not fit when every question stays in one "
                f"split; the largest splits found are {sizes}; or set data.fit=true"
            )
    shared = f"{len(questions)} questions are too few to be shared by {len(demands)} splits"
    raise DataError(f"data.group_by_question: {shared}")


def _deal(
    rows: Sequence[SquareRow], questions: list[list[int]], demands: Sequence[Demand]
) -> dict[str, list[int]] | None:
    """Give each question to the split that still misses most; None if a split stays short."""
    # Rows that a split still misses, by name: acceptable, red.
    room = {d.name: [d.num_acceptable, d.num_red] for d in demands}
    parts: dict[str, list[int]] = {d.name: [] for d in demands}
    for members in questions:
        labels = [rows[i].red for i in members]
        name, best = "", (-1, -1)
        for candidate, missing in room.items():
            # The most rows of the question that a label still misses, then the most room.
            gain = (sum(min(1, missing[red]) for red in labels), sum(missing))
            if gain > best:
                name, best = candidate, gain
        for i, red in zip(members, labels, strict=True):
            if room[name][red] > 0:
                room[name][red] -= 1
                parts[name].append(i)
    if any(missing != [0, 0] for missing in room.values()):
        return None
    return parts


def _checked(splits: Splits, demands: Sequence[Demand]) -> Splits:
    """Check that no wanted split is empty, and that splits are disjoint."""
    empty = [d.name for d in demands if d.num_rows and not splits.parts[d.name]]
    if empty:
        listed = " and ".join(empty)
        fault = f"nothing is left for the {listed} split"
        raise DataError(f"data: the file is too small: {fault}; use a larger file")
    used: list[int] = []
    for part in splits.parts.values():
        used += part
    assert len(used) == len(set(used)), "splits are disjoint"
    return splits
