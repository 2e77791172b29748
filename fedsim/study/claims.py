"""What the paper concludes from Table 1 (§6.2, §6.3): paired differences between arms, each with a claimed sign."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from fedsim.record import paper

Verdict = Literal["reproduced", "contradicted", "cannot tell", "no claim"]

#: Fields of :class:`paper.SafetyRow` → title, unit and digits of a figure.
BENCHMARKS: Final[dict[str, tuple[str, str, int]]] = {
    "advbench_harmless": ("AdvBench", "%", 1),
    "hhh_accuracy": ("HHH", "%", 1),
    "mt_bench": ("MT-Bench", "", 2),
}


@dataclass(frozen=True)
class Comparison:
    """Two rows of Table 1 of which the paper takes the difference.

    Attributes:
        treated: method whose figure comes first.
        control: method that is subtracted.
        question: what the difference answers.
    """

    treated: str
    control: str
    question: str

    @property
    def title(self) -> str:
        """Such as ``(FL + filter) − FL``."""
        treated, control = (f"({name})" if "+" in name else name for name in (self.treated, self.control))
        return f"{treated} − {control}"

    def published(self, aggregation: paper.Aggregation, benchmark: str) -> float:
        """The paper's own difference, in the benchmark's points."""
        rows = paper.TABLE_1[aggregation]
        return float(getattr(rows[self.treated], benchmark)) - float(getattr(rows[self.control], benchmark))


FL, FILTER, CAI, BOTH = (
    paper.method_name(*arm) for arm in ((False, False), (True, False), (False, True), (True, True))
)

COMPARISONS: Final = (
    Comparison(FL, paper.PRETRAINED, "Does federated training on red responses do harm? (§6.2)"),
    Comparison(FILTER, FL, "Does the safety filter repair some of it? (§6.3)"),
    Comparison(CAI, FL, "Does CAI repair it, and helpfulness with it? (§6.3)"),
    Comparison(BOTH, CAI, "Does the filter add to CAI? (§6.3)"),
    Comparison(BOTH, FL, "What do both do together? (abstract)"),
    Comparison(CAI, FILTER, "Does CAI repair more than the filter? (Table 1)"),
)
"""In the paper's order; the last follows from its table alone."""


def claimed_sign(comparison: Comparison, aggregation: paper.Aggregation, benchmark: str) -> int:
    """+1 or −1 as the paper's own difference; 0 where its printed figures are equal."""
    difference = round(comparison.published(aggregation, benchmark), 6)
    return (difference > 0) - (difference < 0)


def methods() -> Mapping[str, tuple[bool, bool]]:
    """The four federated methods: name → (filter, CAI)."""
    return {FL: (False, False), FILTER: (True, False), CAI: (False, True), BOTH: (True, True)}
