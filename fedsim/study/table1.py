"""The paper's Table 1 from finished runs: every arm beside the published figures, and what its differences show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedsim.config import Config, to_flat
from fedsim.errors import ConfigError
from fedsim.record import paper
from fedsim.record.tables import NOT_MEASURED, Table
from fedsim.study.cells import Cell
from fedsim.study.claims import BENCHMARKS, COMPARISONS, Comparison, claimed_sign, methods
from fedsim.study.effects import Effect, detectable, difference, estimate, shown_detectable, verdict
from fedsim.study.outcomes import Outcome, check_paired, sample

STUDY: Final = "table1"
"""Name of the study."""

CONFIG: Final = Path(__file__).resolve().parents[2] / "configs" / "table1.yaml"
"""Its configuration on the embedded default, with the quick schedule."""

VARIED: Final = ("federation.algorithm",)
"""Keys that every cell sets; the guard's kind and CAI's iterations are those of the arms that have them."""

AGGREGATIONS: Final[tuple[paper.Aggregation, ...]] = ("fedavg", "scaffold")

#: The paper's schedule: rounds, clients, cohort, local steps, rows a step, CAI iterations (§5.1, §5.2, §4.2).
PAPER_SCHEDULE: Final[Mapping[str, Any]] = {
    "federation.num_rounds": paper.NUM_ROUNDS,
    "federation.num_clients": paper.NUM_CLIENTS,
    "federation.clients_per_round": paper.CLIENTS_PER_ROUND,
    "local.steps": paper.LOCAL_STEPS,
    "local.batch_size": paper.BATCH_SIZE,
    "cai.iterations": paper.CAI_ITERATIONS,
}

#: Figures that say whether the headline means what it seems to: name → title.
CONTROLS: Final = {
    "advbench_harmless_strict_world": "AdvBench by the world's grammar",
    "advbench_grammatical": "replies to attacks that parse",
    "hhh_letter": "HHH by letter",
    "xstest_safe_refused": "XSTest: innocent prompts refused",
    "xstest_unsafe_refused": "XSTest: harmful prompts refused",
}


@dataclass(frozen=True)
class Arm:
    """A row of Table 1 under one aggregation."""

    aggregation: paper.Aggregation
    method: str

    @property
    def title(self) -> str:
        """Such as ``FedAvg, FL + filter``; the pretrained model is no aggregation's."""
        if self.method == paper.PRETRAINED:
            return paper.PRETRAINED
        return f"{paper.ALGORITHM_NAMES[self.aggregation]}, {self.method}"


def cells(config: Config, seeds: Sequence[int]) -> list[Cell]:
    """The runs behind the table: four methods under two aggregations for every seed.

    A method's filter and CAI are as ``config`` has them; where it has none, the guard is ``llama_guard`` and CAI takes
    the paper's iterations. The arms with both come first, as their artefacts serve all others.

    Raises:
        ConfigError: the configuration makes a method that the paper's table has no row for, such as an oracle's filter.
    """
    guard = config.guard.kind if config.guard.kind != "none" else "llama_guard"
    iterations = config.cai.iterations or paper.CAI_ITERATIONS
    found = []
    for method, (filtered, cai) in reversed(list(methods().items())):
        for aggregation in AGGREGATIONS:
            for seed in seeds:
                slug = method.lower().replace(" + ", "-")
                settings = {
                    "federation.algorithm": aggregation,
                    "guard.kind": guard if filtered else "none",
                    "cai.iterations": iterations if cai else 0,
                }
                if (own := paper.method_of({**to_flat(config), **settings})) != method:
                    raise ConfigError(
                        f"this configuration makes {own!r} where the paper's table has {method!r}: leave guard.kind, "
                        "guard.action, guard.tune_epochs and cai.every at the paper's, or compare with tools/sweep.py"
                    )
                labels = {"aggregation": paper.ALGORITHM_NAMES[aggregation], "method": method}
                found.append(Cell(f"{aggregation}-{slug}-s{seed}", seed, labels, settings))
    return found


class TableOne:
    """All figures of the table.

    Args:
        runs: for each arm its finished runs, in the order of the seeds.

    Raises:
        DataError: as of :func:`check_paired`.
    """

    def __init__(self, runs: Mapping[Arm, Sequence[Outcome]]) -> None:
        check_paired(list(runs.values()))
        self.runs = runs
        first = next(iter(runs.values()))[0].config
        self.names = {
            "advbench_harmless": f"advbench_harmless_{first.eval.advbench_phrases.replace('-', '_')}",
            "hhh_accuracy": f"hhh_{first.eval.hhh_scorer}",
            "mt_bench": "mt_bench",
        }

    @property
    def attacks(self) -> str:
        """Where the attacks came from, as the configuration has it."""
        return next(iter(self.runs.values()))[0].config.eval.advbench

    @property
    def num_seeds(self) -> int:
        """Runs of an arm."""
        return len(next(iter(self.runs.values())))

    def sample(self, arm: Arm, figure: str) -> Any:
        """fp64 ``[num_seeds, num_items]`` of an arm, in percent or points; None where it was not measured.

        Args:
            figure: a key of :data:`BENCHMARKS` or :data:`CONTROLS`.
        """
        method = FIRST if arm.method == paper.PRETRAINED else arm.method
        point = paper.PRETRAINED if arm.method == paper.PRETRAINED else "final"
        runs = self.runs.get(Arm(arm.aggregation, method))
        name = self.names.get(figure, figure)
        return None if runs is None else sample(runs, point, name, 1.0 if figure == "mt_bench" else 100.0)

    @property
    def aggregations(self) -> list[paper.Aggregation]:
        """Those that were run, in the paper's order."""
        return [name for name in AGGREGATIONS if any(arm.aggregation == name for arm in self.runs)]

    def arms(self) -> Iterator[Arm]:
        """Rows of the table, the pretrained model once."""
        yield Arm(self.aggregations[0], paper.PRETRAINED)
        yield from (Arm(name, method) for name in self.aggregations for method in methods())

    def estimate(self, arm: Arm, figure: str) -> Effect | None:
        """Mean over seeds and items with its 95 % interval."""
        found = self.sample(arm, figure)
        return None if found is None else estimate(found, scale_of(figure))

    def difference(self, aggregation: paper.Aggregation, comparison: Comparison, figure: str) -> Finding | None:
        """A paired difference, and whether it bears out the paper's."""
        treated = self.sample(Arm(aggregation, comparison.treated), figure)
        control = self.sample(Arm(aggregation, comparison.control), figure)
        if treated is None or control is None:
            return None
        effect = difference(treated, control, scale_of(figure))
        sign = claimed_sign(comparison, aggregation, figure)
        return Finding(
            effect,
            detectable(treated, control),
            comparison.published(aggregation, figure),
            verdict(effect, sign) if sign else "no claim",
        )


def scale_of(figure: str) -> tuple[float, float]:
    """Ends of a figure's scale."""
    return (1.0, 10.0) if figure.startswith("mt_bench") else (0.0, 100.0)


FIRST: Final = next(iter(methods()))
"""Method whose runs give the pretrained model's figures: they are the same before every arm's first step."""


@dataclass(frozen=True)
class Finding:
    """One paired difference.

    Attributes:
        effect: as measured.
        detectable: the smallest difference that this many seeds and items would show (80 % power, 5 % level).
        published: the paper's.
        verdict: reproduced, contradicted, cannot tell, or no claim.
    """

    effect: Effect
    detectable: float | None
    published: float
    verdict: str


def arm_table(table: TableOne) -> Table:
    """Every arm with its intervals, the paper's figures under it."""
    head = ["", *(f"{title} {unit}".strip() for title, unit, _ in BENCHMARKS.values())]
    lines = []
    for arm in table.arms():
        lines.append([arm.title, *(_shown(table.estimate(arm, name), BENCHMARKS[name][2]) for name in BENCHMARKS)])
        published = paper.TABLE_1[arm.aggregation][arm.method]
        lines.append(["– in the paper", *(f"{getattr(published, name)}" for name in BENCHMARKS)])
    return Table(head, lines)


def control_table(table: TableOne) -> Table | None:
    """The figures beside the headline; None where none was measured."""
    rows = []
    for name, title in CONTROLS.items():
        found = [table.estimate(arm, name) for arm in table.arms()]
        if any(f is not None for f in found):
            rows.append([f"{title}, %", *(_shown(f, 1) for f in found)])
    return Table(["", *(arm.title for arm in table.arms())], rows) if rows else None


def claim_table(table: TableOne) -> Table:
    """Every difference that the paper draws: measured, the smallest that would show, the paper's, and what follows."""
    head = ["", "benchmark", "measured", "would show from", "paper", "the paper's sign is"]
    lines = []
    for aggregation in table.aggregations:
        for comparison in COMPARISONS:
            for name, (title, _, digits) in BENCHMARKS.items():
                found = table.difference(aggregation, comparison, name)
                label = f"{paper.ALGORITHM_NAMES[aggregation]}: {comparison.title}"
                if found is None:
                    lines.append(
                        [label, title, NOT_MEASURED, "", f"{comparison.published(aggregation, name):+.1f}", ""]
                    )
                    continue
                smallest = shown_detectable(found.detectable, digits, scale_of(name))
                shown = _shown(found.effect, digits, "+")
                lines.append([label, title, shown, smallest, f"{found.published:+.1f}", found.verdict])
    return Table(head, lines, num_text=2)


CLAIM_NOTE: Final = (
    "Differences are paired by seed and prompt. Would show from: the smallest true difference that this many seeds and "
    "prompts show with about 80 % power at the 5 % level. Signs are those of the published figures, however small; the "
    "paper's are single runs without intervals, and the last comparison follows from its table alone. The intervals "
    "are not corrected for the number of comparisons, and comparisons with a figure at the end of its scale share data."
)
"""What stands under :func:`claim_table`."""


def verdicts(table: TableOne) -> list[str]:
    """How many of the paper's differences have its sign here, per aggregation, and which have another or none."""
    lines = []
    for aggregation in table.aggregations:
        by_verdict: dict[str, list[str]] = {}
        for comparison in COMPARISONS:
            for name, (title, *_) in BENCHMARKS.items():
                found = table.difference(aggregation, comparison, name)
                if found is not None:
                    by_verdict.setdefault(found.verdict, []).append(f"{comparison.title} on {title}")
        unclear = "an interval that holds 0" if table.num_seeds > 1 else "not to be told"
        total = sum(len(which) for word, which in by_verdict.items() if word != "no claim")
        line = (
            f"- {paper.ALGORITHM_NAMES[aggregation]}: {len(by_verdict.get('reproduced', []))} of {total} differences "
        )
        line += "are reproduced (the paper's sign, and an interval without 0)"
        for verdict_, phrase in (("contradicted", "the opposite sign"), ("cannot tell", unclear)):
            if which := by_verdict.get(verdict_):
                line += f"; {phrase}: {', '.join(which)}"
        if table.num_seeds == 1:
            line += "; one seed cannot tell, whatever its interval over prompts"
        lines.append(f"{line}.")
    return lines


def tidy_rows(table: TableOne) -> list[dict[str, Any]]:
    """One record per arm and figure, for a CSV file."""
    records = []
    for arm in table.arms():
        for name in (*BENCHMARKS, *CONTROLS):
            found = table.estimate(arm, name)
            if found is not None:
                records.append(
                    {
                        "aggregation": arm.aggregation,
                        "method": arm.method,
                        "figure": name,
                        "mean": found.mean,
                        "low": found.low,
                        "high": found.high,
                        "num_seeds": found.num_seeds,
                        "num_items": found.num_items,
                    }
                )
    return records


def _shown(effect: Effect | None, digits: int, sign: str = "") -> str:
    if effect is None:
        return NOT_MEASURED
    return effect.shown(digits, sign)
