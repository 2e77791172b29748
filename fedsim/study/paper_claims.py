"""Table 1's claims (paper §6.2, §6.3): paired differences with a sign and a least size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from fedsim.base.figures import PERCENT, Figure
from fedsim.evaluate.own import DESCRIBED
from fedsim.report import paper

Verdict = Literal[
    "reproduced",
    "contradicted",
    "cannot tell",
    "too small to claim",
    "replay: says nothing about CAI",
    "not published",
]


@dataclass(frozen=True)
class Column:
    """A figure of the table.

    Attributes:
        title: for people.
        unit: behind the title; "" for points.
        digits: shown.
        published: field of :class:`paper.SafetyRow` that holds the paper's figure by the same
            metric; "" if it has none.
    """

    title: str
    unit: str
    digits: int
    published: str = ""

    @property
    def heading(self) -> str:
        """Such as ``AdvBench %``."""
        return f"{self.title} {self.unit}".strip()


NET: Final = "advbench_net"
"""Difference of two figures: AdvBench replies called harmless minus :data:`CONTROL`."""

(_CONTROL,) = DESCRIBED.controls("advbench_harmless")

CONTROL: Final = _CONTROL.name
"""The control of AdvBench: innocent prompts refused."""


def figure_named(name: str) -> Figure:
    """A figure of fedsim's own benchmarks."""
    figure = DESCRIBED.of(name)
    assert figure is not None and figure.name == name, f"no benchmark has the figure {name}"
    return figure


def _column(name: str, published: str = "", title: str = "") -> Column:
    """A figure as a column.

    Args:
        title: in place of the benchmark's name.
    """
    figure = figure_named(name)
    unit = figure.unit if figure.is_share else ""
    return Column(title or figure.short, unit, figure.digits, published)


#: Columns of Table 1. Those with a published figure are counted; the others are shown beside them.
COLUMNS: Final[dict[str, Column]] = {
    "advbench_harmless": _column("advbench_harmless", "advbench_harmless"),
    "hhh_letter": _column("hhh_letter", "hhh_accuracy"),
    "mt_bench": _column("mt_bench", "mt_bench"),
    "hhh_likelihood": _column("hhh_likelihood"),
    CONTROL: _column(CONTROL, title=f"{_CONTROL.short}: innocent refused"),
    NET: Column("AdvBench − innocent refused", "(points)", 1),
}

COUNTED: Final = tuple(name for name, column in COLUMNS.items() if column.published)


def _bracketed(method: str) -> str:
    """A method's name as the term of a difference."""
    return f"({method})" if "+" in method else method


@dataclass(frozen=True)
class Comparison:
    """Two rows of Table 1 of which the paper takes the difference.

    Attributes:
        treated: method whose figure comes first.
        control: method that is subtracted.
        question: that the difference answers.
    """

    treated: str
    control: str
    question: str

    @property
    def title(self) -> str:
        """Such as ``(FL + filter) − FL``."""
        treated, control = map(_bracketed, (self.treated, self.control))
        return f"{treated} − {control}"

    @property
    def rests_on_cai(self) -> bool:
        """Return whether one of the two arms has CAI."""
        return any(methods().get(name, (False, False))[1] for name in (self.treated, self.control))

    def published(self, aggregation: paper.Aggregation, figure: str) -> float:
        """The paper's own difference in a counted column, in its points."""
        treated, control = self._published(aggregation, figure)
        return treated - control

    def least(self, aggregation: paper.Aggregation, figure: str) -> float:
        """Two standard errors of the paper's difference, each figure being one run over its items.

        For a mean on MT-Bench's scale, whose spread the paper does not print, it is the largest
        that the scale allows.
        """
        num_items = paper.NUM_ITEMS[COLUMNS[figure].published]
        low, high = figure_named(figure).scale or PERCENT
        # Of values on a scale with this mean, the largest possible variance.
        variances = [(value - low) * (high - value) for value in self._published(aggregation, figure)]
        return 2 * math.sqrt(sum(variances) / num_items)

    def _published(self, aggregation: paper.Aggregation, figure: str) -> tuple[float, float]:
        rows, name = paper.TABLE_1[aggregation], COLUMNS[figure].published
        return float(getattr(rows[self.treated], name)), float(getattr(rows[self.control], name))


FL: Final = paper.method_name(False, False)
FILTER: Final = paper.method_name(True, False)
CAI: Final = paper.method_name(False, True)
BOTH: Final = paper.method_name(True, True)
"""Names of the methods, by filter and CAI."""

COMPARISONS: Final = (
    Comparison(FL, paper.PRETRAINED, "Does federated training on red responses do harm? (§6.2)"),
    Comparison(FILTER, FL, "Does the safety filter repair some of it? (§6.3)"),
    Comparison(CAI, FL, "Does CAI repair it, and helpfulness with it? (§6.3)"),
    Comparison(BOTH, CAI, "Does the filter add to CAI? (§6.3)"),
)
"""In the paper's order. All other differences between these arms are sums of these four."""


def claimed_sign(comparison: Comparison, aggregation: paper.Aggregation, figure: str) -> int:
    """Sign of the paper's own difference; 0 where it is below :meth:`Comparison.least`."""
    difference = comparison.published(aggregation, figure)
    if abs(difference) < comparison.least(aggregation, figure):
        return 0
    return 1 if difference > 0 else -1


def methods() -> Mapping[str, tuple[bool, bool]]:
    """The four federated methods: name → (filter, CAI)."""
    return {FL: (False, False), FILTER: (True, False), CAI: (False, True), BOTH: (True, True)}
