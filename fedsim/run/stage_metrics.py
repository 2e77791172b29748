"""Results of the stages as figures under their metric names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fedsim.base.figures import Benchmarks
from fedsim.config import FailuresConfig
from fedsim.evaluate.collapse import measure_collapse
from fedsim.evaluate.intervals import Rate
from fedsim.evaluate.measures import Metrics, collapse_metrics, rate_metrics
from fedsim.federation.attendance import Attendance
from fedsim.federation.failures import REASONS, ClientFailure
from fedsim.report.cai_line import CRITIQUE_FINDS_HARM, HARMFUL_RESPONSE, REPAIRED_REVISION
from fedsim.report.client_failures import FAILED
from fedsim.run.cohort import CohortResult
from fedsim.safety.cai_data import CaiRow
from fedsim.safety.cai_findings import Finding
from fedsim.safety.filtering import COUNTS, Filtered
from fedsim.safety.guard_curves import curve_metrics


def of_attendance(attendance: Attendance, settings: FailuresConfig) -> Metrics:
    """How many were drawn and did not train, and what each straggler managed; only what the settings make happen."""
    metrics: Metrics = {"client/num_sat_out": len(attendance.sat_out)}
    if settings.dropout_rate > 0:
        metrics["client/num_dropped_out"] = len(attendance.dropped_out)
    if settings.straggler_rate > 0:
        metrics["client/num_stragglers"] = len(attendance.stragglers)
    return metrics | {f"client/steps_{client:03d}": steps for client, steps in attendance.stragglers.items()}


def of_failures(failures: Sequence[ClientFailure], settings: FailuresConfig) -> dict[str, float | int | str]:
    """``client/num_failed``, by reason, and the reason of each client that failed; nothing where a failure stops."""
    if settings.on_client_error == "stop":
        return {}
    counts = Counter(failure.reason for failure in failures)
    metrics: dict[str, float | int | str] = {"client/num_failed": len(failures)}
    metrics |= {f"client/num_failed_{reason.replace(' ', '_')}": counts[reason] for reason in REASONS}
    return metrics | {f"{FAILED}{failure.client:03d}": failure.reason for failure in failures}


def of_training(result: CohortResult) -> Metrics:
    """``client/…`` means over the clients that delivered an update (weighted by rows where it says so), and the lanes'
    use."""
    return (_of_clients(result) if result.delivered else {}) | {
        "parallel/idle_share": result.idle_share,
        "parallel/planned_idle_share": result.plan.idle_share,
        "parallel/planned_makespan_s": result.plan.makespan_s,
        "parallel/makespan_s": max(result.busy_s),
    }


def _of_clients(result: CohortResult) -> Metrics:
    clients = result.aggregated.clients
    rows = sum(c.num_rows for c in clients)
    metrics: Metrics = {
        "client/loss": mean_loss(result),
        "client/first_loss": sum(c.first_loss * c.num_rows for c in clients) / rows,
        "client/num_rows": rows,
        "client/num_tokens": sum(c.num_tokens for c in clients),
    }
    return metrics | {f"client/loss_{c.client:03d}": c.loss for c in clients}


def mean_loss(result: CohortResult) -> float:
    """Mean local loss of the round's clients, weighted by rows."""
    clients = result.aggregated.clients
    return sum(c.loss * c.num_rows for c in clients) / sum(c.num_rows for c in clients)


def of_guard(filtered: Filtered, kind: str) -> dict[str, float | int | str]:
    """``guard/…`` rates in percent and counts; without a guard only what the clients hold."""
    metrics: dict[str, float | int | str] = {"client/num_kept_rows": sum(filtered.num_kept)}
    if kind == "none":
        return metrics
    if filtered.action.name == "downweight":
        metrics["client/kept_weight"] = sum(row.weight for shard in filtered.shards for row in shard)
    return metrics | of_verdicts(filtered) | {"guard/num_empty_clients": len(filtered.empty_clients)}


def of_verdicts(filtered: Filtered) -> Metrics:
    """How right the guard was, and what the run's action makes of it."""
    rows, verdicts = filtered.judged
    metrics: Metrics = filtered.total.as_metrics()
    metrics |= curve_metrics([row.red for row in rows], [verdict.unsafe_prob for verdict in verdicts])
    metrics[f"guard/{COUNTS[filtered.action.name]}"] = filtered.total.num_unsafe
    after = filtered.action.red_share_after(filtered.total)
    return metrics if after is None else metrics | {"guard/red_share_after": 100.0 * after}


def of_cai_texts(conversations: Sequence[CaiRow]) -> Metrics:
    """``cai/response_…`` and ``cai/revision_…``: signs of collapse in DPO's rejected and chosen texts, in percent.

    All rows count, the unusable ones too: a collapsed writer makes those.
    """
    responses = measure_collapse([row.init_response for row in conversations])
    revisions = measure_collapse([row.revision_response for row in conversations])
    return collapse_metrics("cai/response", responses) | collapse_metrics("cai/revision", revisions)


def of_cai_findings(found: Sequence[Finding]) -> Metrics:
    """Shares of all conversations in percent, each with interval and ``_count``; nothing where none was judged."""
    flags = {
        HARMFUL_RESPONSE: [finding.harmful_response for finding in found],
        CRITIQUE_FINDS_HARM: [f.critique_finds_harm for f in found if f.critique_finds_harm is not None],
        REPAIRED_REVISION: [finding.repaired for finding in found],
    }
    metrics: Metrics = {}
    for name, values in flags.items():
        if values:
            metrics |= rate_metrics(name, Rate.of(values)) | {f"{name}_count": len(values)}
    return metrics


def headline(metrics: Metrics, benchmarks: Benchmarks) -> dict[str, str]:
    """The headline figure of each benchmark, such as the three of the paper's Table 1, where measured."""
    shown = {}
    for figure in benchmarks.headlines:
        if figure.metric in metrics:
            unit = " %" if figure.is_share else ""
            shown[figure.short] = f"{metrics[figure.metric]:.1f}{unit}"
    return shown
