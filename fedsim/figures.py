"""What the stages found, as figures under their metric names."""

from __future__ import annotations

from fedsim.cohort import CohortResult
from fedsim.safety.filtering import Filtered

Metrics = dict[str, float | int]


def of_training(result: CohortResult) -> Metrics:
    """``client/…`` means over the round's clients (weighted by rows where it says so), and how the lanes were used."""
    clients = result.aggregated.clients
    rows = sum(c.num_rows for c in clients)
    metrics: Metrics = {
        "client/loss": mean_loss(result),
        "client/first_loss": sum(c.first_loss * c.num_rows for c in clients) / rows,
        "client/num_rows": rows,
        "client/num_tokens": sum(c.num_tokens for c in clients),
    }
    metrics |= {f"client/loss_{c.client:03d}": c.loss for c in clients}
    return metrics | {
        "parallel/idle_share": result.idle_share,
        "parallel/planned_idle_share": result.plan.idle_share,
        "parallel/planned_makespan_s": result.plan.makespan_s,
        "parallel/makespan_s": max(result.aggregated.busy_s),
    }


def mean_loss(result: CohortResult) -> float:
    """Mean local loss of the round's clients, weighted by rows."""
    clients = result.aggregated.clients
    return sum(c.loss * c.num_rows for c in clients) / sum(c.num_rows for c in clients)


def of_guard(filtered: Filtered, kind: str) -> dict[str, float | int | str]:
    """``guard/…`` rates in percent and counts; without a guard only what the clients hold."""
    metrics: dict[str, float | int | str] = {"client/num_kept_rows": sum(filtered.num_kept)}
    if kind == "none":
        return metrics
    metrics |= filtered.total.as_metrics()
    return metrics | {"guard/num_empty_clients": len(filtered.empty_clients)}


def headline(metrics: Metrics) -> dict[str, str]:
    """The three figures of the paper's Table 1, where measured."""
    names = {
        "AdvBench": ("eval/advbench_harmless", " %"),
        "HHH": ("eval/hhh_accuracy", " %"),
        "MT": ("eval/mt_bench", ""),
    }
    return {name: f"{metrics[key]:.1f}{unit}" for name, (key, unit) in names.items() if key in metrics}
