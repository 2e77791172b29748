"""Declaration of one configuration key: default, meaning, unit and rule in one place."""

from __future__ import annotations

import copy
import re
from dataclasses import Field, dataclass, field
from typing import Any, Final, TypeVar

T = TypeVar("T")

# Characters that control a terminal, and halves of surrogate pairs.
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_SEVERAL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""The same characters without tabs and line ends."""


@dataclass(frozen=True)
class Rule:
    """Condition on a value, beside its type.

    Attributes:
        low: smallest allowed value (inclusive).
        high: largest allowed value (inclusive).
        above: the value must be greater than this.
        below: the value must be less than this.
        choices: the only allowed values.
        lines: a text may have several lines; else it has none of the characters that control a
            terminal.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] | None = None
    lines: bool = False

    def broken_by(self, value: Any) -> str | None:
        """Describe the part of the rule that ``value`` breaks; None if it breaks none."""
        if self.choices is not None and value not in self.choices:
            return f"must be one of {', '.join(self.choices)}"

        # Texts, also those of a list, without forbidden characters.
        forbidden = _CONTROL
        if self.lines:
            forbidden = _SEVERAL
        texts = [value]
        if isinstance(value, list):
            texts = value
        for text in texts:
            if isinstance(text, str) and forbidden.search(text):
                return "must not hold control characters or bytes that are not UTF-8"

        # Numbers within their bounds.
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
        """Describe the rule, such as ``>= 1`` or ``> 0 and <= 1``; empty if there is none."""
        if self.choices is not None:
            return " | ".join(self.choices)
        bounds = [(">=", self.low), (">", self.above), ("<=", self.high), ("<", self.below)]
        return " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)


def key(
    default: T,
    meaning: str,
    *,
    unit: str = "",
    file: str = "",
    model: str = "",
    **rule: Any,
) -> T:
    """Declare a documented dataclass field.

    Args:
        default: a list or mapping is copied for each instance.
        meaning: one line for the reference of keys.
        unit: of the value.
        file: for a key that names a file: its role among a manifest's inputs. The file's content
            counts, not its path.
        model: for a key that names a model directory: its role among a manifest's models, likewise.
        rule: attributes of :class:`Rule`.
    """
    metadata = {
        "meaning": meaning,
        "unit": unit,
        "file": file,
        "model": model,
        "rule": Rule(**rule),
    }
    made: Any  # a dataclass field, which type checkers are to take for its default
    if isinstance(default, list | dict):
        made = field(default_factory=lambda: copy.copy(default), metadata=metadata)
    else:
        made = field(default=default, metadata=metadata)
    return made


def rule_of(declared: Field[Any]) -> Rule:
    """Return the rule that a key was declared with."""
    found = declared.metadata.get("rule", Rule())
    assert isinstance(found, Rule)
    return found
