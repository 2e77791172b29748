"""The paper's Table 1 from rows by seed: its runs, its arms and their paired differences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from fedsim.base.errors import ConfigError, DataError
from fedsim.base.figures import PERCENT, Figure
from fedsim.base.version import commit_of
from fedsim.config import SHIPPED, Config, to_flat
from fedsim.evaluate.own import DESCRIBED, chosen_figures
from fedsim.report import paper
from fedsim.report.cai_line import (
    ACCURACY,
    FINDINGS,
    HARMFUL_RESPONSE,
    LAST_ROUND,
    MARGIN,
    is_replay,
)
from fedsim.report.finished import FinishedRun
from fedsim.study.outcomes import check_paired
from fedsim.study.paper_claims import (
    CAI,
    COLUMNS,
    CONTROL,
    COUNTED,
    FL,
    NET,
    Comparison,
    claimed_sign,
    figure_named,
    methods,
)
from fedsim.study.runs import Cell
from fedsim.study.seed_rows import SeedRow
from fedsim.study.statistics import Effect, detectable, difference, estimate, verdict

STUDY: Final = "table1"
"""Name of the study."""

CONFIG: Final = SHIPPED / "table1.yaml"
"""Its configuration on the embedded default, with the quick schedule."""

VARIED: Final = ("federation.algorithm",)
"""Keys that every cell sets, beside the guard's kind and CAI's iterations."""

AGGREGATIONS: Final[tuple[paper.Aggregation, ...]] = ("fedavg", "scaffold")

#: The paper's schedule: rounds, clients, cohort, local steps, rows a step, CAI iterations (§5.1,
#: §5.2, §4.2).
PAPER_SCHEDULE: Final[Mapping[str, Any]] = {
    "federation.num_rounds": paper.NUM_ROUNDS,
    "federation.num_clients": paper.NUM_CLIENTS,
    "federation.clients_per_round": paper.CLIENTS_PER_ROUND,
    "local.steps": paper.LOCAL_STEPS,
    "local.batch_size": paper.BATCH_SIZE,
    "cai.iterations": paper.CAI_ITERATIONS,
}


def _is_control(figure: Figure) -> bool:
    if figure.name in ("advbench_harmless_strict_world", "advbench_grammatical"):
        return True
    return figure.is_share and figure.line == "always" and not figure.control


#: Figures that show whether the headline can be trusted: name → title.
CONTROLS: Final = {one.name: one.title for one in DESCRIBED.figures if _is_control(one)}

REPLAY: Final = "replay control"
"""Method of the control arm: SFT on the model's own first replies, without revision and DPO."""


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
        return paper.arm_name(self.aggregation, self.method)


def cells(config: Config, seeds: Sequence[int]) -> list[Cell]:
    """The runs behind the table: four methods under two aggregations for every seed.

    A method's filter and CAI are as ``config`` has them; where it has none, the guard is
    ``llama_guard`` and CAI takes the paper's iterations. The arms with both come first, as their
    artefacts serve all others.

    Raises:
        ConfigError: the configuration makes a method that the paper's table has no row for, such as
            an oracle's filter.
    """
    # Guard and iterations of the methods that have them.
    guard = config.guard.kind if config.guard.kind != "none" else "llama_guard"
    iterations = config.cai.iterations or paper.CAI_ITERATIONS

    found = []
    for method, (filtered, cai) in reversed(list(methods().items())):
        for aggregation in AGGREGATIONS:
            settings = {
                "federation.algorithm": aggregation,
                "guard.kind": guard if filtered else "none",
                "cai.iterations": iterations if cai else 0,
            }
            own = paper.method_of({**to_flat(config), **settings})
            if own != method:
                raise ConfigError(
                    f"this configuration makes {own!r} where the paper's table has {method!r}: "
                    "leave guard.kind, guard.action, guard.tune_epochs and cai.every at the "
                    "paper's, or compare with fedsim sweep"
                )

            # A cell for each seed.
            slug = method.lower().replace(" + ", "-")
            labels = {"aggregation": paper.algorithm_name(aggregation), "method": method}
            for seed in seeds:
                found.append(Cell(f"{aggregation}-{slug}-s{seed}", seed, labels, settings))
    return found


def seed_rows(runs: Mapping[Arm, Sequence[FinishedRun]]) -> list[SeedRow]:
    """All figures of the table by arm and seed; the pretrained model's once a seed.

    Args:
        runs: for each arm its finished runs, in the order of the seeds.

    Raises:
        DataError: as of :func:`check_paired`, or a run has lost the items of a figure that it
            recorded.
    """
    check_paired(list(runs.values()))
    rows: list[SeedRow] = []

    # The pretrained model, from the first arm's runs: it is the same in all.
    first = next(iter(runs))
    for outcome in runs[first]:
        rows += _rows_of(outcome, Arm(first.aggregation, paper.PRETRAINED), paper.PRETRAINED)

    # The final models, and the CAI of the arms that have it.
    for arm, outcomes in runs.items():
        for outcome in outcomes:
            rows += _rows_of(outcome, arm, outcome.final_point)
            rows += _cai_rows(outcome, arm)
    return rows


def _rows_of(outcome: FinishedRun, arm: Arm, point: str) -> list[SeedRow]:
    """The benchmarks' figures at one point of a run."""
    chosen = chosen_figures(outcome.config.eval)
    seed, commit, rows = outcome.config.seed, commit_of(outcome.manifest), []
    for figure in (*COLUMNS, *CONTROLS):
        if figure == NET:
            continue
        name, kind = chosen.get(figure, figure), figure_named(figure)

        # The value is the items' mean where they are kept, else the recorded one.
        items = outcome.items(point, name)
        value, count = outcome.figure(point, name), 1  # a judge's score has no items here
        if value is not None and items is None and kind.is_share:
            raise DataError(
                f"{outcome.folder / 'items'}: has no items of {name} at the point {point}; restore "
                "the folder, or read the run with the fedsim that made it (its commit is in "
                "manifest.json)"
            )
        if items is not None:
            value, count = kind.factor * float(items.mean()), len(items)
        if value is not None:
            rows.append(
                SeedRow(arm.aggregation, arm.method, seed, figure, value, count, commit, items),
            )
    return rows


def _cai_rows(outcome: FinishedRun, arm: Arm) -> list[SeedRow]:
    """Findings on the run's CAI conversations, and the DPO of its last round."""
    seed, commit, rows = outcome.config.seed, commit_of(outcome.manifest), []
    data = [row for row in outcome.rows if row["stage"] == "cai_data"]
    rounds = [row for row in outcome.rows if row["stage"] == "round" and MARGIN in row]

    # Findings on conversations, in percent.
    if data:
        for figure in FINDINGS:
            if figure in data[-1]:
                value, count = float(data[-1][figure]), int(data[-1][f"{figure}_count"])
                rows.append(
                    SeedRow(arm.aggregation, arm.method, seed, figure, value, count, commit),
                )

    # The last round's DPO; its accuracy is recorded as a share and shown in percent.
    if rounds:
        for figure in LAST_ROUND:
            factor = 100.0 if figure == ACCURACY else 1.0
            value = factor * float(rounds[-1][figure])
            rows.append(SeedRow(arm.aggregation, arm.method, seed, figure, value, 1, commit))
    return rows


class TableOne:
    """All figures of the table.

    Args:
        rows: of :func:`seed_rows`, and those of the replay control where it was run.
    """

    def __init__(self, rows: Sequence[SeedRow]) -> None:
        self.rows: dict[tuple[str, str, str], list[SeedRow]] = {}
        for row in rows:
            self.rows.setdefault((row.aggregation, row.method, row.figure), []).append(row)
        self.seeds = sorted({row.seed for row in rows if row.method != REPLAY})

    @property
    def aggregations(self) -> list[paper.Aggregation]:
        """Those that were run, in the paper's order."""
        measured = {key[:2] for key in self.rows}
        return [name for name in AGGREGATIONS if (name, FL) in measured]

    def arms(self) -> Iterator[Arm]:
        """Rows of the table: the pretrained model once, a replay control after its arm."""
        yield Arm(self.aggregations[0], paper.PRETRAINED)
        for name in self.aggregations:
            for method in methods():
                yield Arm(name, method)
                if method == CAI and self.of(Arm(name, REPLAY), "advbench_harmless"):
                    yield Arm(name, REPLAY)

    def of(self, arm: Arm, figure: str) -> list[SeedRow]:
        """A figure's rows by seed; the pretrained model's are those of any aggregation."""
        found = self.rows.get((arm.aggregation, arm.method, figure))
        if found is None and arm.method == paper.PRETRAINED:
            wanted = (arm.method, figure)
            found = next((rows for key, rows in self.rows.items() if key[1:] == wanted), None)
        return sorted(found or [], key=lambda row: row.seed)

    def sample(self, arm: Arm, figure: str) -> np.ndarray | None:
        """Outcomes of an arm by seed and item.

        Returns:
            fp64 ``[num_seeds, num_items]`` in percent or points; ``[num_seeds, 1]`` where no items
            are kept, and of :data:`NET`; None where it was not measured with every seed.
        """
        # A difference of two figures over different items, by seed.
        if figure == NET:
            harmless = self.sample(arm, "advbench_harmless")
            refused = self.sample(arm, CONTROL)
            if harmless is None or refused is None:
                return None
            return harmless.mean(axis=1, keepdims=True) - refused.mean(axis=1, keepdims=True)

        rows = self.of(arm, figure)
        if [row.seed for row in rows] != self.seeds:
            return None
        factor = figure_named(figure).factor
        values = []
        for row in rows:
            found = [row.value] if row.outcomes is None else factor * row.outcomes
            values.append(np.asarray(found, dtype=np.float64))
        return np.stack(values)

    def estimate(self, arm: Arm, figure: str) -> Effect | None:
        """Mean over seeds and items with its 95 % interval."""
        found = self.sample(arm, figure)
        return None if found is None else estimate(found, scale_of(figure))

    def pooled(self, arm: Arm, figure: str) -> tuple[float, int] | None:
        """A share of CAI's conversations over all seeds.

        Returns:
            The share in percent, and the number of conversations; None if not measured.
        """
        rows = self.of(arm, figure)
        count = sum(row.count for row in rows)
        if not count:
            return None
        return sum(row.value * row.count for row in rows) / count, count

    def last_round(self, arm: Arm, figure: str) -> float | None:
        """Mean over seeds of a figure of :data:`LAST_ROUND`."""
        rows = self.of(arm, figure)
        if not rows:
            return None
        return sum(row.value for row in rows) / len(rows)

    def is_replay(self, aggregation: paper.Aggregation) -> bool:
        """Return whether hardly any first response was harmful in some arm with CAI."""
        shares = [self.pooled(Arm(aggregation, method), HARMFUL_RESPONSE) for method in methods()]
        return any(is_replay(share[0]) for share in shares if share is not None)

    def difference(
        self,
        aggregation: paper.Aggregation,
        comparison: Comparison,
        figure: str,
    ) -> Finding | None:
        """A paired difference, with a verdict on the paper's; None if not measured."""
        treated = self.sample(Arm(aggregation, comparison.treated), figure)
        control = self.sample(Arm(aggregation, comparison.control), figure)
        if treated is None or control is None:
            return None
        effect = difference(treated, control, scale_of(figure))
        smallest = detectable(treated, control)
        return Finding(effect, smallest, self._verdict(aggregation, comparison, figure, effect))

    def _verdict(
        self,
        aggregation: paper.Aggregation,
        comparison: Comparison,
        figure: str,
        effect: Effect,
    ) -> str:
        if comparison.rests_on_cai and self.is_replay(aggregation):
            return "replay: says nothing about CAI"
        if figure not in COUNTED:
            return "not published"
        sign = claimed_sign(comparison, aggregation, figure)
        return verdict(effect, sign) if sign else "too small to claim"


def scale_of(figure: str) -> tuple[float, float]:
    """Ends of a figure's scale; of a name that fedsim's own benchmarks do not have, percent."""
    if figure == NET:
        return -100.0, 100.0
    known = DESCRIBED.of(figure)
    if known is None:
        return PERCENT
    return known.scale or (-math.inf, math.inf)


@dataclass(frozen=True)
class Finding:
    """One paired difference.

    Attributes:
        effect: as measured.
        detectable: the smallest difference that this many seeds and items would show (80 % power, 5
            % level).
        verdict: one of :data:`fedsim.study.paper_claims.Verdict`.
    """

    effect: Effect
    detectable: float | None
    verdict: str
