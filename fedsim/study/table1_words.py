"""Table 1 in tables and sentences, all computed from its rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from fedsim.base.tables import NOT_MEASURED, Table
from fedsim.report import paper
from fedsim.report.cai_line import (
    CRITIQUE_FINDS_HARM,
    DPO_LOSS,
    FINDINGS,
    HARMFUL_RESPONSE,
    LAST_ROUND,
    MARGIN,
)
from fedsim.study.paper_claims import (
    CAI,
    COLUMNS,
    COMPARISONS,
    CONTROL,
    COUNTED,
    FILTER,
    FL,
    NET,
    Comparison,
    methods,
)
from fedsim.study.published import Origin
from fedsim.study.statistics import Effect, shown_detectable
from fedsim.study.table1 import CONTROLS, REPLAY, Arm, Finding, TableOne, scale_of


def page(table: TableOne, origin: Origin) -> list[str]:
    """Paragraphs of the page, without title and introduction."""
    findings = "\n".join([*verdicts(table), *filter_findings(table)])
    parts = [
        arm_table(table).markdown(),
        f"{ARM_NOTE} {_measured(table, origin)}",
        "## Findings",
        findings,
    ]
    parts += ["## Differences", claim_table(table).markdown(), CLAIM_NOTE]
    for title, more in (("## CAI", cai_table(table)), ("## Controls", control_table(table))):
        if more is not None:
            parts += [title, more.markdown()]
    return parts


def shown(table: TableOne, origin: Origin) -> list[str]:
    """:func:`page` for a terminal."""
    parts = [
        arm_table(table).plain(),
        f"{ARM_NOTE} {_measured(table, origin)}",
        claim_table(table).plain(),
        CLAIM_NOTE,
    ]
    for more in (cai_table(table), control_table(table)):
        if more is not None:
            parts.append(more.plain())
    return [*parts, "\n".join([*verdicts(table), *filter_findings(table), *replay_lines(table)])]


def _measured(table: TableOne, origin: Origin) -> str:
    """Seeds, attacks, meaning of the intervals, and origin of the rows, as sentences."""
    parts = [origin.setting, "[low, high] = 95 % interval over seeds and prompts.", origin.prompts]
    if not any(table.of(arm, "mt_bench") for arm in table.arms()):
        parts.append("MT-Bench was not rated: judge.* sets a judge.")
    parts.append(origin.measured)
    return " ".join(part for part in parts if part)


def arm_table(table: TableOne) -> Table:
    """Every arm with its intervals, the paper's figures under it, and the harm that CAI found."""
    head = [
        "",
        *(column.heading for column in COLUMNS.values()),
        "CAI: harmful responses; critiques; DPO margin",
    ]
    lines = []
    for arm in table.arms():
        # Measured.
        figures = []
        for name, column in COLUMNS.items():
            figures.append(_shown(table.estimate(arm, name), column.digits))
        lines.append([arm.title, *figures, _cai_cell(table, arm)])

        # Published, in the columns of the same metric.
        if arm.method != REPLAY:
            published = paper.TABLE_1[arm.aggregation][arm.method]
            known = []
            for column in COLUMNS.values():
                known.append(str(getattr(published, column.published)) if column.published else "")
            lines.append(["– in the paper", *known, ""])
    return Table(head, lines)


def _cai_cell(table: TableOne, arm: Arm) -> str:
    """Share of harmful first responses, of critiques that find harm, and DPO's last margin."""
    if arm.method == paper.PRETRAINED or not methods().get(arm.method, (False, False))[1]:
        return ""
    shares = [table.pooled(arm, name) for name in (HARMFUL_RESPONSE, CRITIQUE_FINDS_HARM)]
    cells = [NOT_MEASURED if share is None else f"{share[0]:.1f} %" for share in shares]
    cells.append(_number(table.last_round(arm, MARGIN), 3))
    return "; ".join(cells)


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return NOT_MEASURED
    return f"{value:.{digits}f}"


ARM_NOTE: Final = (
    "HHH by letter, choosing (A) or (B), is the paper's metric; by likelihood the more probable "
    "reply counts. AdvBench − innocent refused: a model that refuses everything gains nothing by "
    "it. CAI: share of harmful first responses, of critiques that find harm, and the reward "
    "margin of the last round's DPO in nats."
)
"""Note under :func:`arm_table`."""


def cai_table(table: TableOne) -> Table | None:
    """Findings on CAI's conversations and the last round's DPO, by arm; None without CAI."""
    rows = []
    for arm in table.arms():
        shares = [table.pooled(arm, name) for name in FINDINGS]
        last = [table.last_round(arm, name) for name in LAST_ROUND]
        is_measured = any(shares) or any(value is not None for value in last)
        if arm.method == REPLAY or not is_measured:
            continue

        # Shares in percent with their counts; then margin, accuracy and loss of DPO.
        cells = [arm.title]
        for share in shares:
            cells.append(NOT_MEASURED if share is None else f"{share[0]:.1f} of {share[1]:,}")
        for value, digits in zip(last, (4, 1, 4), strict=True):
            cells.append(_number(value, digits))
        rows.append(cells)
    if not rows:
        return None
    head = ["", *(f"{title} %" for title in FINDINGS.values())]
    head += ["DPO margin, nats (last round)", "DPO accuracy % (last round)"]
    head += ["DPO loss (last round; ln 2 = 0.6931)"]
    return Table(head, rows)


def control_table(table: TableOne) -> Table | None:
    """The figures beside the headline; None where none was measured."""
    arms = list(table.arms())
    rows = []
    for name, title in CONTROLS.items():
        found = [table.estimate(arm, name) for arm in arms]
        if any(effect is not None for effect in found):
            rows.append([f"{title}, %", *(_shown(effect, 1) for effect in found)])
    if not rows:
        return None
    return Table(["", *(arm.title for arm in arms)], rows)


def claim_table(table: TableOne) -> Table:
    """Every difference: measured, detectable, the paper's, its least size, and the verdict."""
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
    "Differences are paired by seed and prompt. Would show from: the smallest true difference "
    "that this many seeds and prompts show with about 80 % power at the 5 % level. Claimed from: "
    "two standard errors of the paper's own difference, single runs over 520, 438 and 80 items "
    "(for MT-Bench with the largest spread that its scale allows); a published difference below "
    "it counts neither way. All other differences between these arms are sums of these."
)
"""Note under :func:`claim_table`."""


def verdicts(table: TableOne) -> list[str]:
    """Sentences that count the paper's differences by verdict, one an aggregation."""
    lines = []
    for aggregation in table.aggregations:
        # Verdict → comparison → figures.
        by_verdict: dict[str, dict[str, list[str]]] = {}
        for comparison, name, found in _counted(table, aggregation):
            figures = by_verdict.setdefault(found.verdict, {}).setdefault(comparison.title, [])
            figures.append(COLUMNS[name].title)

        # A sentence for each verdict, with its number of differences.
        total, parts = 0, []
        for word, phrase in _PHRASES.items():
            if word in by_verdict:
                number = sum(map(len, by_verdict[word].values()))
                parts.append(f"{number} {phrase}: {_listed(by_verdict[word])}")
                total += number
        name = paper.algorithm_name(aggregation)
        line = f"- {name}, {total} differences. {'. '.join(parts)}."
        if len(table.seeds) == 1:
            line += " One seed cannot tell, whatever its interval over prompts."
        lines.append(line)

    # Differences whose interval decides, for the caution about multiplicity.
    num_tested = 0
    for aggregation in table.aggregations:
        for _, _, found in _counted(table, aggregation):
            num_tested += found.verdict in ("reproduced", "contradicted", "cannot tell")
    lines.append(
        "- The intervals are not corrected for multiplicity: of differences that do not exist one "
        f"in 20 would be taken for one, and {num_tested} are tested here."
    )
    return lines


def _counted(
    table: TableOne,
    aggregation: paper.Aggregation,
) -> Iterator[tuple[Comparison, str, Finding]]:
    """Comparison, figure and finding of each of the paper's differences that was measured."""
    for comparison in COMPARISONS:
        for name in COUNTED:
            found = table.difference(aggregation, comparison, name)
            if found is not None:
                yield comparison, name, found


def _listed(which: Mapping[str, Sequence[str]]) -> str:
    """Comparisons with their figures; only the comparison where it has all figures."""
    parts = []
    for title, figures in which.items():
        has_all = len(figures) == len(COUNTED)
        parts.append(title if has_all else f"{title} on {' and '.join(figures)}")
    return ", ".join(parts)


_PHRASES: Final = {
    "reproduced": "reproduced (the paper's sign, an interval without 0)",
    "contradicted": "contradicted (the opposite sign)",
    "cannot tell": "cannot be told (an interval that holds 0)",
    "too small to claim": "too small in the paper to claim a sign",
    "replay: says nothing about CAI": "replay, which says nothing about CAI",
}


def filter_findings(table: TableOne) -> list[str]:
    """Sentences on attacks and innocent prompts with and without the filter, one an aggregation."""
    comparison = next(one for one in COMPARISONS if (one.treated, one.control) == (FILTER, FL))
    lines = []
    for aggregation in table.aggregations:
        parts = []
        for name in ("advbench_harmless", CONTROL, NET):
            found = table.difference(aggregation, comparison, name)
            if found is not None:
                word = {1: "higher", -1: "lower", 0: "cannot be told from 0"}[found.effect.sign]
                size = found.effect.shown(1, "+")
                parts.append(f"{COLUMNS[name].title} {size} points ({word})")
        if parts:
            name = paper.algorithm_name(aggregation)
            lines.append(f"- {name}, what the filter changes: {'; '.join(parts)}.")
    return lines


def replay_lines(table: TableOne) -> list[str]:
    """The page's first paragraph where CAI is replay: its harm, and the control's figures."""
    replayed = [aggregation for aggregation in table.aggregations if table.is_replay(aggregation)]
    if not replayed:
        return []

    # Harm in the conversations, and DPO's last loss.
    arms = [Arm(aggregation, CAI) for aggregation in replayed]
    names = " and ".join(paper.algorithm_name(aggregation) for aggregation in replayed)
    line = f"**The rows with CAI ({names}) are replay.** The aligned model writes turn 1: "
    harmful, found = (
        table.pooled(arms[0], HARMFUL_RESPONSE),
        table.pooled(arms[0], CRITIQUE_FINDS_HARM),
    )
    if harmful is not None:
        line += f"{_number_of(*harmful)} first responses are harmful, "
    if found is not None:
        line += f"{_number_of(*found)} critiques find harm, "
    losses = []
    for arm in arms:
        loss = table.last_round(arm, DPO_LOSS)
        if loss is not None:
            losses.append(f"{loss:.4f}")
    line += f"DPO's loss ends at {' and '.join(losses)} (ln 2 = 0.6931)."

    # The replay control, where it was run.
    for arm in arms:
        control = Arm(arm.aggregation, REPLAY)
        if table.of(control, "advbench_harmless"):
            line += (
                " A replay control (SFT on the model's own first replies, no critique, no "
                f"revision, no DPO) ends at {_three(table, control)}, {arm.title} at "
                f"{_three(table, arm)} (AdvBench %, HHH % by likelihood, MT-Bench)."
            )
    return [f"{line} These rows say nothing about critique, revision or preference training."]


def _number_of(percent: float, count: int) -> str:
    """``3 of 2,000`` from a share in percent."""
    return f"{round(percent * count / 100):,} of {count:,}"


def _three(table: TableOne, arm: Arm) -> str:
    names = ("advbench_harmless", "hhh_likelihood", "mt_bench")
    cells = []
    for name in names:
        effect = table.estimate(arm, name)
        mean = None if effect is None else effect.mean
        cells.append(_number(mean, COLUMNS[name].digits))
    return " / ".join(cells)


def _shown(effect: Effect | None, digits: int, sign: str = "") -> str:
    if effect is None:
        return NOT_MEASURED
    if math.isinf(effect.low):  # the same from every seed: its spread is unknown
        return f"{effect.mean:{sign}.{digits}f}"
    return effect.shown(digits, sign)
