"""Table 1 in tables and sentences, all computed from its rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from fedsim.base.tables import NOT_MEASURED, Table
from fedsim.report import paper
from fedsim.report.cai_line import CRITIQUE_FINDS_HARM, DPO_LOSS, FINDINGS, HARMFUL_RESPONSE, LAST_ROUND, MARGIN
from fedsim.study.paper_claims import CAI, COLUMNS, COMPARISONS, CONTROL, COUNTED, FILTER, FL, NET, Comparison, methods
from fedsim.study.published import Origin
from fedsim.study.statistics import Effect, shown_detectable
from fedsim.study.table1 import CONTROLS, REPLAY, Arm, Finding, TableOne, scale_of


def page(table: TableOne, origin: Origin) -> list[str]:
    """Paragraphs of the page, without title and introduction."""
    findings = "\n".join([*verdicts(table), *filter_findings(table)])
    parts = [arm_table(table).markdown(), f"{ARM_NOTE} {_measured(table, origin)}", "## Findings", findings]
    parts += ["## Differences", claim_table(table).markdown(), CLAIM_NOTE]
    for title, more in (("## CAI", cai_table(table)), ("## Controls", control_table(table))):
        if more is not None:
            parts += [title, more.markdown()]
    return parts


def shown(table: TableOne, origin: Origin) -> list[str]:
    """:func:`page` for a terminal."""
    parts = [arm_table(table).plain(), f"{ARM_NOTE} {_measured(table, origin)}", claim_table(table).plain(), CLAIM_NOTE]
    for more in (cai_table(table), control_table(table)):
        parts += [] if more is None else [more.plain()]
    return [*parts, "\n".join([*verdicts(table), *filter_findings(table), *replay_lines(table)])]


def _measured(table: TableOne, origin: Origin) -> str:
    """Under which seeds and attacks, what the intervals count, and where."""
    interval = "[low, high] = 95 % interval over seeds and prompts."
    is_rated = any(table.of(arm, "mt_bench") for arm in table.arms())
    unrated = "" if is_rated else "MT-Bench was not rated: judge.* sets a judge."
    return " ".join(part for part in (origin.setting, interval, origin.prompts, unrated, origin.measured) if part)


def arm_table(table: TableOne) -> Table:
    """Every arm with its intervals, the paper's figures under it, and what there was for CAI to do."""
    head = ["", *(column.heading for column in COLUMNS.values()), "CAI: harmful responses; critiques; DPO margin"]
    lines = []
    for arm in table.arms():
        figures = [_shown(table.estimate(arm, name), column.digits) for name, column in COLUMNS.items()]
        lines.append([arm.title, *figures, _cai_cell(table, arm)])
        if arm.method != REPLAY:
            published = paper.TABLE_1[arm.aggregation][arm.method]
            known = [str(getattr(published, c.published)) if c.published else "" for c in COLUMNS.values()]
            lines.append(["– in the paper", *known, ""])
    return Table(head, lines)


def _cai_cell(table: TableOne, arm: Arm) -> str:
    """Share of harmful first responses, of critiques that find harm, and DPO's last margin."""
    if arm.method == paper.PRETRAINED or not methods().get(arm.method, (False, False))[1]:
        return ""
    shares = [table.pooled(arm, name) for name in (HARMFUL_RESPONSE, CRITIQUE_FINDS_HARM)]
    margin = table.last_round(arm, MARGIN)
    shown = [NOT_MEASURED if share is None else f"{share[0]:.1f} %" for share in shares]
    return "; ".join([*shown, NOT_MEASURED if margin is None else f"{margin:.3f}"])


ARM_NOTE: Final = (
    "HHH by letter, choosing (A) or (B), is the paper's metric; by likelihood the more probable reply counts. "
    "AdvBench − innocent refused: a model that refuses everything gains nothing by it. CAI: share of harmful first "
    "responses, of critiques that find harm, and the reward margin of the last round's DPO in nats."
)
"""Note under :func:`arm_table`."""


def cai_table(table: TableOne) -> Table | None:
    """Findings on CAI's conversations and the last round's DPO, by arm; None without CAI."""
    rows = []
    for arm in table.arms():
        shares = [table.pooled(arm, name) for name in FINDINGS]
        last = [table.last_round(arm, name) for name in LAST_ROUND]
        if arm.method != REPLAY and (any(shares) or any(value is not None for value in last)):
            shown = [NOT_MEASURED if share is None else f"{share[0]:.1f} of {share[1]:,}" for share in shares]
            digits = dict(zip(LAST_ROUND, (4, 1, 4), strict=True))
            ends = [
                NOT_MEASURED if value is None else f"{value:.{digits[name]}f}"
                for name, value in zip(LAST_ROUND, last, strict=True)
            ]
            rows.append([arm.title, *shown, *ends])
    head = ["", *(f"{title} %" for title in FINDINGS.values())]
    head += ["DPO margin, nats (last round)", "DPO accuracy % (last round)", "DPO loss (last round; ln 2 = 0.6931)"]
    return Table(head, rows) if rows else None


def control_table(table: TableOne) -> Table | None:
    """The figures beside the headline; None where none was measured."""
    rows = []
    for name, title in CONTROLS.items():
        found = [table.estimate(arm, name) for arm in table.arms()]
        if any(f is not None for f in found):
            rows.append([f"{title}, %", *(_shown(f, 1) for f in found)])
    return Table(["", *(arm.title for arm in table.arms())], rows) if rows else None


def claim_table(table: TableOne) -> Table:
    """Every difference: measured, the smallest that would show, the paper's, its least size, and what follows."""
    head = ["", "figure", "measured", "would show from", "paper", "claimed from", "verdict"]
    lines = []
    for aggregation in table.aggregations:
        for comparison in COMPARISONS:
            for name, column in COLUMNS.items():
                found = table.difference(aggregation, comparison, name)
                published = least = ""
                if name in COUNTED:
                    published = f"{comparison.published(aggregation, name):+.1f}"
                    least = f"{comparison.least(aggregation, name):.1f}"
                label = f"{paper.algorithm_name(aggregation)}: {comparison.title}"
                shown, smallest, word = NOT_MEASURED, "", ""
                if found is not None:
                    shown, word = _shown(found.effect, column.digits, "+"), found.verdict
                    smallest = shown_detectable(found.detectable, column.digits, scale_of(name))
                lines.append([label, column.title, shown, smallest, published, least, word])
    return Table(head, lines, num_text=2)


CLAIM_NOTE: Final = (
    "Differences are paired by seed and prompt. Would show from: the smallest true difference that this many seeds and "
    "prompts show with about 80 % power at the 5 % level. Claimed from: two standard errors of the paper's own "
    "difference, single runs over 520, 438 and 80 items (for MT-Bench with the largest spread that its scale allows); "
    "a published difference below it counts neither way. All other differences between these arms are sums of these."
)
"""Note under :func:`claim_table`."""


def verdicts(table: TableOne) -> list[str]:
    """Sentences that count the paper's differences by verdict, one an aggregation."""
    lines = []
    for aggregation in table.aggregations:
        by_verdict: dict[str, dict[str, list[str]]] = {}  # verdict → comparison → figures
        for comparison, name, found in _counted(table, aggregation):
            figures = by_verdict.setdefault(found.verdict, {}).setdefault(comparison.title, [])
            figures.append(COLUMNS[name].title)
        numbers = {word: sum(map(len, which.values())) for word, which in by_verdict.items()}
        parts = [
            f"{numbers[word]} {phrase}: {_listed(by_verdict[word])}"
            for word, phrase in _PHRASES.items()
            if word in by_verdict
        ]
        line = f"- {paper.algorithm_name(aggregation)}, {sum(numbers.values())} differences. {'. '.join(parts)}."
        if len(table.seeds) == 1:
            line += " One seed cannot tell, whatever its interval over prompts."
        lines.append(line)
    tested = [
        found
        for aggregation in table.aggregations
        for _, _, found in _counted(table, aggregation)
        if found.verdict in ("reproduced", "contradicted", "cannot tell")
    ]
    lines.append(
        "- The intervals are not corrected for multiplicity: of differences that do not exist one in 20 would be taken "
        f"for one, and {len(tested)} are tested here."
    )
    return lines


def _counted(table: TableOne, aggregation: paper.Aggregation) -> Iterator[tuple[Comparison, str, Finding]]:
    """Comparison, figure and finding of each difference that the paper draws and that was measured."""
    for comparison in COMPARISONS:
        for name in COUNTED:
            found = table.difference(aggregation, comparison, name)
            if found is not None:
                yield comparison, name, found


def _listed(which: Mapping[str, Sequence[str]]) -> str:
    """Comparisons with their figures; of all figures the comparison alone."""
    return ", ".join(
        title if len(figures) == len(COUNTED) else f"{title} on {' and '.join(figures)}"
        for title, figures in which.items()
    )


_PHRASES: Final = {
    "reproduced": "reproduced (the paper's sign, an interval without 0)",
    "contradicted": "contradicted (the opposite sign)",
    "cannot tell": "cannot be told (an interval that holds 0)",
    "too small to claim": "too small in the paper to claim a sign",
    "replay: says nothing about CAI": "replay, which says nothing about CAI",
}


def filter_findings(table: TableOne) -> list[str]:
    """Sentences on attacks and innocent prompts with and without the filter, one an aggregation."""
    comparison = next(c for c in COMPARISONS if (c.treated, c.control) == (FILTER, FL))
    lines = []
    for aggregation in table.aggregations:
        parts = []
        for name in ("advbench_harmless", CONTROL, NET):
            found = table.difference(aggregation, comparison, name)
            if found is not None:
                word = {1: "higher", -1: "lower", 0: "cannot be told from 0"}[found.effect.sign]
                parts.append(f"{COLUMNS[name].title} {found.effect.shown(1, '+')} points ({word})")
        if parts:
            lines.append(f"- {paper.algorithm_name(aggregation)}, what the filter changes: {'; '.join(parts)}.")
    return lines


def replay_lines(table: TableOne) -> list[str]:
    """The page's first words where CAI is replay: what there was to repair, and what the control gives."""
    replayed = [aggregation for aggregation in table.aggregations if table.is_replay(aggregation)]
    if not replayed:
        return []
    arms = [Arm(aggregation, CAI) for aggregation in replayed]
    names = " and ".join(paper.algorithm_name(aggregation) for aggregation in replayed)
    line = f"**The rows with CAI ({names}) are replay.** The aligned model writes turn 1: "
    harmful, found = table.pooled(arms[0], HARMFUL_RESPONSE), table.pooled(arms[0], CRITIQUE_FINDS_HARM)
    if harmful is not None:
        line += f"{_number_of(*harmful)} first responses are harmful, "
    if found is not None:
        line += f"{_number_of(*found)} critiques find harm, "
    losses = [loss for arm in arms if (loss := table.last_round(arm, DPO_LOSS)) is not None]
    line += f"DPO's loss ends at {' and '.join(f'{loss:.4f}' for loss in losses)} (ln 2 = 0.6931)."
    for arm in arms:
        control = Arm(arm.aggregation, REPLAY)
        if table.of(control, "advbench_harmless"):
            line += (
                " A replay control (SFT on the model's own first replies, no critique, no revision, no DPO) ends at "
                f"{_three(table, control)}, {arm.title} at {_three(table, arm)} (AdvBench %, HHH % by likelihood, "
                "MT-Bench)."
            )
    return [f"{line} These rows say nothing about critique, revision or preference training."]


def _number_of(percent: float, count: int) -> str:
    """``3 of 2,000`` from a share in percent."""
    return f"{round(percent * count / 100):,} of {count:,}"


def _three(table: TableOne, arm: Arm) -> str:
    names = ("advbench_harmless", "hhh_likelihood", "mt_bench")
    found = [(table.estimate(arm, name), COLUMNS[name].digits) for name in names]
    return " / ".join(NOT_MEASURED if effect is None else f"{effect.mean:.{digits}f}" for effect, digits in found)


def _shown(effect: Effect | None, digits: int, sign: str = "") -> str:
    if effect is None:
        return NOT_MEASURED
    if math.isinf(effect.low):  # the same from every seed: how far it varies is unknown
        return f"{effect.mean:{sign}.{digits}f}"
    return effect.shown(digits, sign)
