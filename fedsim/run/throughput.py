"""Throughput of a round: each phase's work against its time and the peak of the devices.

Local training has the plain names (``perf/tokens_per_s``, ``perf/flops``, ``perf/mfu``,
``perf/roofline``), other phases their own (``perf/cai_mfu``, ``perf/evaluate_mfu``). MFU is FLOPs ÷
(seconds × peak FLOP/s of all devices); the roofline fraction is the least time that the phase's
FLOPs or its memory traffic allow, whichever is longer, ÷ seconds. Seconds of local training are the
slowest rank's, so that idle ranks count as such.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping

import torch

from fedsim.base.metric import Metric, writes
from fedsim.data.chat import TokenRow
from fedsim.generate.engine import Engine
from fedsim.model.cost import Effort, ModelCost, rows_work
from fedsim.parallel.world import World
from fedsim.run.cohort import CohortResult, CohortRunner
from fedsim.run.peak import Peak
from fedsim.safety.alignment import Aligner

Metrics = dict[str, float | int | str]

_LOCAL = "a client was trained"
_OTHERS = "the phase computed something"


def _rates_of(prefix: str, title: str, when: str) -> tuple[Metric, ...]:
    """Metrics of the work of one phase, or of several."""
    has_flops = f"{when}, by matrix products"
    return (
        Metric(
            f"{prefix}roofline",
            f"{title}: least time that its FLOPs or memory traffic allow ÷ its time",
            "share, 0 to 1",
            when,
        ),
        Metric(f"{prefix}bytes", f"{title}: memory traffic", "bytes", when),
        Metric(
            f"{prefix}flops",
            f"{title}: floating-point operations of the model",
            "FLOPs",
            has_flops,
        ),
        Metric(
            f"{prefix}mfu",
            f"{title}: FLOPs ÷ (time × peak of all devices)",
            "share, 0 to 1",
            has_flops,
        ),
        Metric(f"{prefix}tokens", f"{title}: tokens", "tokens", has_flops),
        Metric(f"{prefix}tokens_per_s", f"{title}: tokens ÷ time", "tokens/s", has_flops),
    )


class Meter:
    """Collects the work of a round's phases until :meth:`pop`.

    Args:
        cost: of the model.
        peak: of all devices together.
        world: all processes.
    """

    def __init__(self, cost: ModelCost, peak: Peak, world: World) -> None:
        self.cost = cost
        self.peak = peak
        self.world = world
        self._efforts: dict[str, Effort] = {}
        self._seconds: dict[str, float] = {}
        self._began: float | None = None

    def begin(self) -> None:
        """Start the round's clock."""
        self._began = time.perf_counter()

    def trained(
        self,
        cohorts: CohortRunner,
        steps: Mapping[int, int],
        round_idx: int,
        result: CohortResult,
    ) -> None:
        """Add the clients' local training and the aggregation that followed it.

        Work of clients that failed is not counted; its time is.

        Args:
            steps: optimizer steps of each client.
        """
        # Training, client by client.
        trainer = cohorts.trainer
        size = trainer.local.micro_batch_size
        for client in result.delivered:
            for batch in trainer.batches(client, cohorts.shards[client], round_idx, steps[client]):
                passes = -(-len(batch) // size)
                self._add("train", self.cost.train(rows_work(batch, passes)))
        self._seconds["train"] = max(result.busy_s)

        # Aggregation: memory traffic only.
        num_summed = len(result.delivered) + 2  # fp32 deltas in, an fp64 sum out
        num_vectors = (1 + trainer.algorithm.has_control) * num_summed
        self._add("aggregate", Effort(num_bytes=4.0 * num_vectors * trainer.trainer.adapter.size))

    def aligned(self, aligner: Aligner, round_idx: int) -> None:
        """Add a round of CAI: SFT on revisions, DPO on both replies, the reference's pass."""
        size = aligner.trainer.settings.micro_batch_size
        for batch in aligner.batches(round_idx):
            passes = -(-len(batch) // size)
            self._add("cai", self.cost.train(rows_work([pair.chosen for pair in batch], passes)))
            pairs: list[TokenRow] = []
            for pair in batch:
                pairs += (pair.chosen, pair.rejected)
            both = rows_work(pairs, passes)
            self._add("cai", self.cost.train(both) + self.cost.forward(both))

    def generated(self, phase: str, engine: Engine) -> None:
        """Add the tokens that the engine has generated and scored in a phase."""
        self._add(phase, self.cost.forward(engine.pop_work()))

    @writes(
        Metric("perf/round_s", "wall-clock time of the round", "s", "in a round"),
        *_rates_of("perf/", "local training", _LOCAL),
        *_rates_of("perf/{phase}_", "a phase (aggregate, cai, cai_generate, evaluate)", _OTHERS),
        Metric("perf/peak_rss_bytes", "peak resident memory of all processes", "bytes"),
        Metric("parallel/comm_bytes", "handed to collectives by all processes", "bytes"),
        Metric("perf/peak_gpu_bytes", "peak memory of the fullest GPU", "bytes", "on GPUs"),
        Metric("perf/peak_flops_per_s", "peak of all devices", "FLOP/s"),
        Metric("perf/peak_memory_bytes_per_s", "peak memory bandwidth of all devices", "bytes/s"),
        Metric("perf/peak_source", "origin of the two peaks"),
        Metric(
            "perf/peak_spread",
            "1 − worse ÷ better of two measurements of the peaks; 0 if published",
            "share, 0 to 1",
        ),
    )
    def pop(self, seconds: Mapping[str, float]) -> Metrics:
        """``perf/…`` and ``parallel/comm_bytes`` since the last call; all ranks must call it.

        Args:
            seconds: ``time/…`` of the round, as the timers give them.
        """
        metrics: Metrics = {}
        if self._began is not None:
            metrics["perf/round_s"] = time.perf_counter() - self._began

        # Ranks wait for the slowest one in the reduction: that time is training's.
        both = sum(seconds.get(f"time/{name}_s", 0.0) for name in ("train", "aggregate"))
        if "train" in self._seconds:
            self._seconds["train"] = min(self._seconds["train"], both)
            self._seconds["aggregate"] = both - self._seconds["train"]

        # Rates of each phase that did some work and was timed.
        for phase, effort in self._efforts.items():
            spent = self._seconds.get(phase, seconds.get(f"time/{phase}_s", 0.0))
            prefix = "perf/" if phase == "train" else f"perf/{phase}_"
            if spent > 0 and (effort.flops or effort.num_bytes):
                metrics |= self._rates(prefix, effort, spent)
        self._efforts, self._seconds = {}, {}
        return metrics | self._usage() | self._peaks()

    def _rates(self, prefix: str, effort: Effort, seconds: float) -> Metrics:
        least = max(effort.flops / self.peak.flops, effort.num_bytes / self.peak.bytes_per_s)
        rates: Metrics = {f"{prefix}roofline": least / seconds, f"{prefix}bytes": effort.num_bytes}
        if effort.flops:
            rates[f"{prefix}flops"] = effort.flops
            rates[f"{prefix}mfu"] = effort.flops / seconds / self.peak.flops
            rates[f"{prefix}tokens"] = effort.tokens
            rates[f"{prefix}tokens_per_s"] = effort.tokens / seconds
        return rates

    def _usage(self) -> Metrics:
        """Memory and traffic; bytes sent at the end of a round count in the next one."""
        # This process's bytes.
        device = self.world.device
        on_gpu = device.type == "cuda"
        gpu_bytes = torch.cuda.max_memory_allocated(device) if on_gpu else 0
        own = (peak_rss_bytes(), gpu_bytes, self.world.traffic.pop())

        # All processes'.
        resident, allocated, sent = zip(*self.world.ranks.gather(own), strict=True)
        usage: Metrics = {"perf/peak_rss_bytes": sum(resident), "parallel/comm_bytes": sum(sent)}
        if on_gpu:
            usage["perf/peak_gpu_bytes"] = max(allocated)
            torch.cuda.reset_peak_memory_stats(device)
        return usage

    def _peaks(self) -> Metrics:
        return {
            "perf/peak_flops_per_s": self.peak.flops,
            "perf/peak_memory_bytes_per_s": self.peak.bytes_per_s,
            "perf/peak_source": self.peak.source,
            "perf/peak_spread": self.peak.spread,
        }

    def _add(self, phase: str, effort: Effort) -> None:
        self._efforts[phase] = self._efforts.get(phase, Effort()) + effort


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
