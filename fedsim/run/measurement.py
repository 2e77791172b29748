"""Measures the model at a point of the run: benchmarks, judge, texts, items, and the row that records them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from fedsim.base.figures import write_benchmarks
from fedsim.base.rounds import round_number
from fedsim.config import Config
from fedsim.evaluate.judge import MtJudge, judge_metrics
from fedsim.evaluate.measures import Metrics
from fedsim.evaluate.suite import Evaluation, Suite, evaluate
from fedsim.evaluate.tokens import tokenise
from fedsim.generate.engine import Engine
from fedsim.parallel.world import World
from fedsim.record.outcomes import item_file
from fedsim.record.run_record import RunRecord
from fedsim.report.sections import POINT_TITLES
from fedsim.run import stage_metrics
from fedsim.run.benchmarks import write_outcomes, write_texts
from fedsim.run.resident import Resident
from fedsim.run.throughput import Meter
from fedsim.safety.guard import LlamaGuard

UNTOUCHED: Final = "pretrained"
"""Evaluation point: the pretrained model."""

Shared = Callable[[Suite, Callable[[], Evaluation]], Evaluation]
"""Returns the pretrained model's evaluation by a suite, from an artefact or by calling the function."""


class Measurement:
    """The benchmarks of a run, ready to be taken at any point.

    Args:
        config: what is run.
        world: the processes that run it.
        record: where figures go.
        resident: whose model is measured.
        suite: the benchmarks.
        meter: counts what was generated.
        shared: gives the untouched model's evaluation, computed here or by a run before; None computes it always.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        record: RunRecord,
        resident: Resident,
        suite: Suite,
        meter: Meter,
        shared: Shared | None = None,
    ) -> None:
        self.config = config
        self.ranks = world.ranks
        self.record = record
        self.resident = resident
        self.meter = meter
        self.judge: MtJudge | None = None
        if config.judge.is_on and suite.part("mt_bench") is not None:
            self.judge = MtJudge(config, world.ranks, world.device)
        self.suite = suite
        self.ranks.once(lambda: write_benchmarks(record.folder, suite.described))
        self.shared = shared
        self._tokenised = False

    def is_due(self, round_idx: int) -> bool:
        """Return whether the configuration asks for a measurement in this round; in the last one always."""
        every, num_rounds = self.config.eval.every, self.config.federation.num_rounds
        return round_idx == num_rounds - 1 or (every > 0 and round_number(round_idx) % every == 0)

    def take(self, round_idx: int, point: str, adapter: torch.Tensor) -> None:
        """Run the benchmarks on an adapter. Every point draws the same random numbers, so points compare."""
        resident, suite = self.resident, self.suite
        resident.flat.load(adapter)
        with self.record.phase(f"evaluate, {POINT_TITLES[point]}", "evaluate") as phase:
            workers = [w for w in (resident.engine, suite.guard) if isinstance(w, Engine | LlamaGuard)]
            for worker in workers:
                worker.on_progress = phase.step
            found = self._evaluate(point)
            for worker in workers:
                worker.on_progress = None
            phase.step(phase.total, phase.total, **stage_metrics.headline(found.metrics, suite.described))
        self.meter.generated("evaluate", resident.engine)
        number = round_number(round_idx)
        folder, model_id = self.record.folder / "answers", f"{self.config.name}-round{number}-{point}"
        items = item_file(self.record.folder, number, point)
        self.ranks.once(lambda: write_texts(found, suite, folder, model_id, attacks=self.config.record.texts))
        self.ranks.once(lambda: write_outcomes(found, items))
        judged = self._judge(found, model_id, point)
        origin = stage_metrics.of_origin(found.artefact, found.reused)
        self.record.append(round_idx, "eval", {**stage_metrics.of_point(point), **origin, **found.metrics, **judged})

    def _evaluate(self, point: str) -> Evaluation:
        def compute() -> Evaluation:
            if not self._tokenised:
                tokenise(self.resident.engine, self.suite)
                self._tokenised = True
            return evaluate(self.resident.engine, self.suite, ("eval",))

        return compute() if self.shared is None or point != UNTOUCHED else self.shared(self.suite, compute)

    def _judge(self, found: Evaluation, model_id: str, point: str) -> Metrics:
        """Let the judge rate the MT-Bench answers; unjudged turns are logged, and the run continues."""
        if self.judge is None or not found.answers:
            return {}
        folder = self.record.folder / "answers" / "mt_bench"
        with self.record.phase(f"judge MT-Bench, {POINT_TITLES[point]}", "judge", self.judge.unit) as phase:
            judged = self.judge.judge(folder, model_id, [answer.texts for answer in found.answers], phase.step)
            metrics = judge_metrics(judged, [answer.question for answer in found.answers])
            if judged.complete:
                phase.step(phase.total, phase.total, **stage_metrics.headline(metrics, self.suite.described))
        for line in judged.news:
            self.record.say(line)
        if judged.error is not None:
            finish = f"fedsim judge {self.record.folder}"
            self.record.say(f"{judged.num_unjudged} turns stay unjudged: {judged.error}. To finish later: {finish}")
        return metrics
