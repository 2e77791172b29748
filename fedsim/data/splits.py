"""Three disjoint splits of a SQuARe file: federated set, guard fine-tuning set, CAI set (paper §5.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from fedsim.base import keyed_random
from fedsim.base.errors import DataError
from fedsim.data.square import SquareRow


@dataclass(frozen=True)
class Demand:
    """How many rows of each label a split wants."""

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
    """Positions of the file's rows in each split, in drawn order, and what is left over.

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
    rows: Sequence[SquareRow], demands: Sequence[Demand], seed: int, *, fit: bool, group_by_question: bool
) -> Splits:
    """Draw disjoint splits at random.

    Args:
        rows: the file's rows; labels are counted from them.
        demands: what each split wants.
        seed: the run's seed; the key is (seed, "split", label).
        fit: a file that is too small shrinks all demands by one factor instead of raising.
        group_by_question: all rows of one question go to one split (whole questions are dealt until a split is full, so
            some rows may be left over).

    Raises:
        DataError: the file cannot supply the demands: which label falls short, by how many, and what would fit.
    """
    order = [int(i) for i in keyed_random.permutation(len(rows), seed, "split")]
    have = (sum(r.red for r in rows), sum(not r.red for r in rows))
    factor = largest_factor(demands, *have)
    if factor < 1 and not fit:
        raise DataError(shortage(demands, *have))
    if group_by_question:
        return _split_by_question(rows, demands, order, fit)
    wanted = [d.scaled(factor) for d in demands] if factor < 1 else list(demands)
    red, acceptable = [i for i in order if rows[i].red], [i for i in order if not rows[i].red]
    parts = {}
    place = {row: i for i, row in enumerate(order)}
    for demand in wanted:
        parts[demand.name] = sorted(red[: demand.num_red] + acceptable[: demand.num_acceptable], key=place.__getitem__)
        red, acceptable = red[demand.num_red :], acceptable[demand.num_acceptable :]
    return _checked(Splits(parts, len(red), len(acceptable), float(factor)), demands)


def largest_factor(demands: Sequence[Demand], num_red: int, num_acceptable: int) -> Fraction:
    """The largest factor ≤ 1 by which all demands must shrink to fit."""
    asked = (sum(d.num_red for d in demands), sum(d.num_acceptable for d in demands))
    shares = [Fraction(h, a) for h, a in zip((num_red, num_acceptable), asked, strict=True) if a > 0]
    return min([Fraction(1), *shares])


def shortage(demands: Sequence[Demand], num_red: int, num_acceptable: int) -> str:
    """The feasibility error: what falls short, by how many, and the largest splits that fit."""
    asked_red, asked_ok = sum(d.num_red for d in demands), sum(d.num_acceptable for d in demands)
    short = [
        f"{asked - have} {label} rows short ({asked} asked, {have} in the file)"
        for label, asked, have in (("red", asked_red, num_red), ("acceptable", asked_ok, num_acceptable))
        if asked > have
    ]
    factor = largest_factor(demands, num_red, num_acceptable)
    fitting = ", ".join(f"data.{d.name}_rows={d.scaled(factor).num_rows}" for d in demands if d.num_rows)
    return (
        f"the splits need more rows than the data has: {' and '.join(short)}; the largest that fit are {fitting}, "
        "or set data.fit=true"
    )


def _split_by_question(rows: Sequence[SquareRow], demands: Sequence[Demand], order: list[int], fit: bool) -> Splits:
    questions: dict[str, list[int]] = {}
    for i in order:
        questions.setdefault(rows[i].prompt, []).append(i)
    total = sum(d.num_rows for d in demands)
    have = (sum(r.red for r in rows), sum(not r.red for r in rows))
    factor = largest_factor(demands, *have)
    for attempt in range(60):  # whole questions fit less tightly than rows: shrink by 2 % until they do
        shrink = factor * Fraction(98, 100) ** attempt
        wanted = [d.scaled(shrink) for d in demands]
        if any(d.num_rows and not w.num_rows for d, w in zip(demands, wanted, strict=True)):
            break
        parts = _deal(rows, list(questions.values()), wanted)
        if parts is not None and (shrink == 1 or fit):
            used = [rows[i].red for part in parts.values() for i in part]
            left = (have[0] - sum(used), have[1] - used.count(False))
            return _checked(Splits(parts, *left, float(shrink)), demands)
        if parts is not None:
            sizes = ", ".join(f"data.{n}_rows={len(p)}" for n, p in parts.items() if p)
            raise DataError(
                f"data.group_by_question: {total} rows do not fit when every question stays in one split; the largest "
                f"splits found are {sizes}; or set data.fit=true"
            )
    raise DataError(
        f"data.group_by_question: {len(questions)} questions are too few to be shared by {len(demands)} splits"
    )


def _deal(
    rows: Sequence[SquareRow], questions: list[list[int]], demands: Sequence[Demand]
) -> dict[str, list[int]] | None:
    """Give each question to the split that still misses most; None if a split stays short."""
    room = {d.name: [d.num_acceptable, d.num_red] for d in demands}
    parts: dict[str, list[int]] = {d.name: [] for d in demands}
    for members in questions:
        name = max(parts, key=lambda n: (sum(min(1, room[n][rows[i].red]) for i in members), sum(room[n])))
        for i in members:
            if room[name][rows[i].red] > 0:
                room[name][rows[i].red] -= 1
                parts[name].append(i)
    return parts if all(v == [0, 0] for v in room.values()) else None


def _checked(splits: Splits, demands: Sequence[Demand]) -> Splits:
    empty = [d.name for d in demands if d.num_rows and not splits.parts[d.name]]
    if empty:
        raise DataError(
            f"data: the file is too small: nothing is left for the {' and '.join(empty)} split; use a larger file"
        )
    used = [i for part in splits.parts.values() for i in part]
    assert len(used) == len(set(used)), "splits are disjoint"
    return splits
