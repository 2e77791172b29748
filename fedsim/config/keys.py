"""How one configuration key is declared: default, meaning, unit and rule in one place."""

from __future__ import annotations

from dataclasses import Field, dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Rule:
    """What a value must satisfy, beside its type.

    Attributes:
        low: smallest allowed value (inclusive).
        high: largest allowed value (inclusive).
        above: the value must be greater than this.
        below: the value must be less than this.
        choices: the only allowed values.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] | None = None

    def broken_by(self, value: Any) -> str | None:
        """The rule in words if ``value`` breaks it, else None."""
        if self.choices is not None and value not in self.choices:
            return f"must be one of {', '.join(self.choices)}"
        if isinstance(value, int | float) and not isinstance(value, bool):
            inside = (
                (self.low is None or value >= self.low)
                and (self.high is None or value <= self.high)
                and (self.above is None or value > self.above)
                and (self.below is None or value < self.below)
            )
            if not inside:
                return f"must be {self.words()}"
        return None

    def words(self) -> str:
        """The rule as words, such as ``>= 1`` or ``> 0 and <= 1``; empty if there is none."""
        if self.choices is not None:
            return " | ".join(self.choices)
        bounds = [(">=", self.low), (">", self.above), ("<=", self.high), ("<", self.below)]
        return " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)


def key(default: T, meaning: str, *, unit: str = "", **rule: Any) -> T:
    """A documented dataclass field; ``rule`` takes the attributes of :class:`Rule`."""
    made: Any = (
        field(default_factory=lambda: list(default), metadata=_meta(meaning, unit, rule))
        if isinstance(default, list)
        else field(default=default, metadata=_meta(meaning, unit, rule))
    )
    return made


def rule_of(declared: Field[Any]) -> Rule:
    """The rule that a key was declared with."""
    found = declared.metadata.get("rule", Rule())
    assert isinstance(found, Rule)
    return found


def _meta(meaning: str, unit: str, rule: dict[str, Any]) -> dict[str, Any]:
    return {"meaning": meaning, "unit": unit, "rule": Rule(**rule)}
