"""Results of the stages as figures under their metric names."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Final

from fedsim.base.figures import Benchmarks, collapse_figures
from fedsim.base.metric import Metric, declared, writes
from fedsim.config import FailuresConfig
from fedsim.data.usable import Tally, drop_metrics
from fedsim.evaluate.collapse import measure_collapse
from fedsim.evaluate.confusion import GuardMetrics
from fedsim.evaluate.intervals import Rate
from fedsim.evaluate.measures import Metrics, collapse_metrics, rate_metrics
from fedsim.federation.algorithms import ADAPTER
from fedsim.federation.attendance import Attendance
from fedsim.federation.failures import REASONS, ClientFailure
from fedsim.report.cai_line import (
    CRITIQUE_FINDS_HARM,
    FINDINGS,
    HARMFUL_RESPONSE,
    REPAIRED_REVISION,
)
from fedsim.report.client_failures import FAILED
from fedsim.run.cohort import CohortResult
from fedsim.safety.cai_data import CaiRow
from fedsim.safety.cai_findings import Finding
from fedsim.safety.filtering import COUNTS, Filtered
from fedsim.safety.guard_curves import curve_metrics

GUARD_DROPS: Final = ("empty_reply",)
"""Reasons for which the guard's fine-tuning drops rows."""

# Conditions of metrics.
_TRAINED: Final = "a client was trained"
_DELIVERED: Final = "a client delivered an update"
_VECTORS: Final = "the rule has such a vector"
_SKIPS: Final = "failures.on_client_error=skip"
_TUNED: Final = "a guard model is fine-tuned"
_JUDGED: Final = "the grammar or a guard judges the conversations"


@writes(
    Metric(
        "point",
        "what was measured: the guard, or the point of an evaluation",
        when="the stage has points",
    )
)
def of_point(point: str) -> dict[str, str]:
    """``point``."""
    return {"point": point}


@writes(
    Metric(
        "artefact",
        "name of the artefact that holds the evaluation",
        when="runs can share the evaluation",
    ),
    Metric(
        "perf/reused",
        "true: the evaluation was read from there",
        when="runs can share the evaluation",
    ),
)
def of_origin(artefact: str | None, reused: bool) -> dict[str, str | bool]:
    """Origin of an evaluation, if runs can share it."""
    if artefact is None:
        return {}
    return {"artefact": artefact, "perf/reused": reused}


@writes(Metric("client/num_trained", "clients that delivered an update", "clients"))
def of_delivered(delivered: Sequence[int]) -> Metrics:
    """``client/num_trained``."""
    return {"client/num_trained": len(delivered)}


@writes(Metric("client/lr", "learning rate of the round", when=_TRAINED))
def of_rate(rate: float) -> Metrics:
    """``client/lr``."""
    return {"client/lr": rate}


@writes(
    Metric("client/num_attackers", "attackers of the round's cohort", "clients", "attacks are set"),
)
def of_attackers(attackers: Collection[int]) -> Metrics:
    """``client/num_attackers``."""
    return {"client/num_attackers": len(attackers)}


@writes(
    Metric("global/checksum", "BLAKE2b of the global adapter after the round"),
    Metric(
        "global/{vector}_checksum",
        "the same of the server's other vectors, such as control",
        when=_VECTORS,
    ),
)
def of_state(checksums: Mapping[str, str]) -> dict[str, str]:
    """Checksums of the server's vectors by name, the adapter's first."""
    found = {"global/checksum": checksums[ADAPTER]}
    for name, digest in checksums.items():
        if name != ADAPTER:
            found[f"global/{name}_checksum"] = digest
    return found


@writes(
    Metric("client/num_sat_out", "clients of the cohort without rows", "clients"),
    Metric(
        "client/num_dropped_out",
        "clients that dropped out",
        "clients",
        "failures.dropout_rate > 0",
    ),
    Metric(
        "client/num_stragglers",
        "clients that took fewer steps",
        "clients",
        "failures.straggler_rate > 0",
    ),
    Metric("client/steps_{client}", "steps of a straggler", "steps", "the client is a straggler"),
)
def of_attendance(attendance: Attendance, settings: FailuresConfig) -> Metrics:
    """Counts of drawn clients that did not train, and each straggler's steps.

    Counts of events that the settings rule out are left out.
    """
    metrics: Metrics = {"client/num_sat_out": len(attendance.sat_out)}
    if settings.dropout_rate > 0:
        metrics["client/num_dropped_out"] = len(attendance.dropped_out)
    if settings.straggler_rate > 0:
        metrics["client/num_stragglers"] = len(attendance.stragglers)
    for client, steps in attendance.stragglers.items():
        metrics[f"client/steps_{client:03d}"] = steps
    return metrics


@writes(
    Metric("client/num_failed", "clients that failed", "clients", _SKIPS),
    *(
        Metric(
            f"client/num_failed_{reason.replace(' ', '_')}",
            f"clients that failed: {reason}",
            "clients",
            _SKIPS,
        )
        for reason in REASONS
    ),
    Metric(f"{FAILED}{{client}}", "reason of a client's failure", when="the client failed"),
)
def of_failures(
    failures: Sequence[ClientFailure],
    settings: FailuresConfig,
) -> dict[str, float | int | str]:
    """``client/num_failed``, by reason and by client; {} where a failure stops the run."""
    if settings.on_client_error == "stop":
        return {}
    counts = Counter(failure.reason for failure in failures)
    metrics: dict[str, float | int | str] = {"client/num_failed": len(failures)}
    for reason in REASONS:
        metrics[f"client/num_failed_{reason.replace(' ', '_')}"] = counts[reason]
    for failure in failures:
        metrics[f"{FAILED}{failure.client:03d}"] = failure.reason
    return metrics


@writes(
    Metric("client/loss", "mean local loss, weighted by rows", "nats per token", _DELIVERED),
    Metric(
        "client/first_loss",
        "mean loss of the first local step, weighted by rows",
        "nats per token",
        _DELIVERED,
    ),
    Metric("client/num_rows", "rows that the round's clients hold", "rows", _DELIVERED),
    Metric("client/num_tokens", "tokens of the local steps", "tokens", _DELIVERED),
    Metric(
        "client/loss_{client}",
        "local loss of a client",
        "nats per token",
        "the client delivered an update",
    ),
    Metric(
        "parallel/idle_share",
        "idle time of the ranks in local training",
        "share, 0 to 1",
        _TRAINED,
    ),
    Metric("parallel/planned_idle_share", "the same as planned", "share, 0 to 1", _TRAINED),
    Metric("parallel/planned_makespan_s", "planned time of the slowest rank", "s", _TRAINED),
    Metric("parallel/makespan_s", "time of the slowest rank", "s", _TRAINED),
)
def of_training(result: CohortResult) -> Metrics:
    """Losses and counts of the clients that delivered an update, and the lanes' use."""
    metrics: Metrics = {}
    if result.delivered:
        metrics |= _of_clients(result)
    metrics["parallel/idle_share"] = result.idle_share
    metrics["parallel/planned_idle_share"] = result.plan.idle_share
    metrics["parallel/planned_makespan_s"] = result.plan.makespan_s  # seconds
    metrics["parallel/makespan_s"] = max(result.busy_s)
    return metrics


def _of_clients(result: CohortResult) -> Metrics:
    clients = result.aggregated.clients
    num_rows = sum(c.num_rows for c in clients)
    metrics: Metrics = {
        "client/loss": mean_loss(result),
        "client/first_loss": sum(c.first_loss * c.num_rows for c in clients) / num_rows,
        "client/num_rows": num_rows,
        "client/num_tokens": sum(c.num_tokens for c in clients),
    }
    for one in clients:
        metrics[f"client/loss_{one.client:03d}"] = one.loss
    return metrics


def mean_loss(result: CohortResult) -> float:
    """Mean local loss of the round's clients, weighted by rows."""
    clients = result.aggregated.clients
    return sum(c.loss * c.num_rows for c in clients) / sum(c.num_rows for c in clients)


@writes(
    Metric("guard/num_dropped", "rows dropped as unsafe", "rows", "guard.action=drop"),
    Metric(
        "guard/num_refused",
        "unsafe rows answered with a refusal",
        "rows",
        "guard.action=refuse",
    ),
    Metric(
        "guard/num_downweighted",
        "unsafe rows that count less",
        "rows",
        "guard.action=downweight",
    ),
    *declared(GuardMetrics.as_metrics),
    *declared(curve_metrics),
    Metric(
        "guard/red_share_after",
        "red rows after the filter",
        "%",
        "guard.action leaves rows out",
    ),
)
def of_verdicts(filtered: Filtered) -> Metrics:
    """The guard's confusion counts and curves, and the effect of the run's action."""
    rows, verdicts = filtered.judged

    # Verdicts against the labels.
    metrics: Metrics = filtered.total.as_metrics()
    metrics |= curve_metrics(
        [row.red for row in rows],
        [verdict.unsafe_prob for verdict in verdicts],
    )

    # Rows that the action changes, and the red share that it leaves, in percent.
    metrics[f"guard/{COUNTS[filtered.action.name]}"] = filtered.total.num_unsafe
    after = filtered.action.red_share_after(filtered.total)
    if after is not None:
        metrics["guard/red_share_after"] = 100.0 * after
    return metrics


def _with_guard(metric: Metric) -> Metric:
    """A metric that is written only if there is a guard."""
    when = "there is a guard"
    if metric.when:
        when = f"{when}, and {metric.when}"
    return replace(metric, when=when)


@writes(
    Metric("client/num_kept_rows", "rows of all clients that the filter keeps", "rows"),
    Metric("client/kept_weight", "sum of the rows' weights", when="guard.action=downweight"),
    *map(_with_guard, declared(of_verdicts)),
    _with_guard(
        Metric("guard/num_empty_clients", "clients that the filter leaves without rows", "clients"),
    ),
)
def of_guard(filtered: Filtered, kind: str) -> dict[str, float | int | str]:
    """``guard/…`` rates in percent and counts; without a guard only the clients' rows."""
    metrics: dict[str, float | int | str] = {"client/num_kept_rows": sum(filtered.num_kept)}
    if kind == "none":
        return metrics
    if filtered.action.name == "downweight":
        rows = itertools.chain.from_iterable(filtered.shards)
        metrics["client/kept_weight"] = sum(row.weight for row in rows)
    metrics |= of_verdicts(filtered)
    metrics["guard/num_empty_clients"] = len(filtered.empty_clients)
    return metrics


@writes(
    Metric("guard/tuning_num_rows", "rows of the guard's fine-tuning", "rows", _TUNED),
    *(replace(metric, when=_TUNED) for metric in drop_metrics("guard/tuning_", GUARD_DROPS)),
)
def of_tuning(tally: Tally) -> Metrics:
    """Rows of the guard's fine-tuning, and why some were dropped."""
    return {"guard/tuning_num_rows": tally.num_rows, **tally.metrics("guard/tuning_", GUARD_DROPS)}


_CAI_FIGURES: Final = (
    *collapse_figures("response", "first responses"),
    *collapse_figures("revision", "revisions"),
)


@writes(*(Metric(f"cai/{one.name}", one.title, one.unit) for one in _CAI_FIGURES))
def of_cai_texts(conversations: Sequence[CaiRow]) -> Metrics:
    """``cai/response_…`` and ``cai/revision_…``: signs of collapse in DPO's texts, in percent.

    Responses are DPO's rejected texts, revisions its chosen ones.
    All rows count, the unusable ones too: a collapsed writer makes those.
    """
    responses = measure_collapse([row.init_response for row in conversations])
    revisions = measure_collapse([row.revision_response for row in conversations])
    return collapse_metrics("cai/response", responses) | collapse_metrics("cai/revision", revisions)


def _finding_metric(name: str, title: str) -> Metric:
    return Metric(name, title, "%", _JUDGED, interval=True, count=True)


@writes(*(_finding_metric(name, title) for name, title in FINDINGS.items()))
def of_cai_findings(found: Sequence[Finding]) -> Metrics:
    """Shares of all conversations in percent, each with interval and ``_count``.

    A figure that no conversation has is left out.
    """
    critiques = [finding.critique_finds_harm for finding in found]
    flags = {
        HARMFUL_RESPONSE: [finding.harmful_response for finding in found],
        CRITIQUE_FINDS_HARM: [flag for flag in critiques if flag is not None],
        REPAIRED_REVISION: [finding.repaired for finding in found],
    }
    metrics: Metrics = {}
    for name, values in flags.items():
        if values:
            metrics |= rate_metrics(name, Rate.of(values)) | {f"{name}_count": len(values)}
    return metrics


def headline(metrics: Metrics, benchmarks: Benchmarks) -> dict[str, str]:
    """The headline figures that were measured, such as the three of the paper's Table 1."""
    shown = {}
    for figure in benchmarks.headlines:
        if figure.metric in metrics:
            value = f"{metrics[figure.metric]:.1f}"
            shown[figure.short] = f"{value} %" if figure.is_share else value
    return shown
