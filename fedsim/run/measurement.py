"""Measurement of the model at a point of the run: benchmarks, judge, texts, items, their row."""

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
"""Returns the pretrained model's evaluation, from an artefact or by calling the function."""


class Measurement:
    """The benchmarks of a run, ready to be taken at any point.

    Args:
        config: what is run.
        world: the processes that run it.
        record: where figures go.
        resident: whose model is measured.
        suite: the benchmarks.
        meter: counts what was generated.
        shared: returns the pretrained model's evaluation, computed here or by an earlier run; None
            computes it always.
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
        """Return whether a round has a measurement; the last one always has."""
        every, num_rounds = self.config.eval.every, self.config.federation.num_rounds
        return round_idx == num_rounds - 1 or (every > 0 and round_number(round_idx) % every == 0)

    def take(self, round_idx: int, point: str, adapter: torch.Tensor) -> None:
        """Run the benchmarks on an adapter, with the same random numbers at every point."""
        resident, suite = self.resident, self.suite
        resident.flat.load(adapter)

        # Benchmarks, with progress from the engine and from a guard that classifies replies.
        with self.record.phase(f"evaluate, {POINT_TITLES[point]}", "evaluate") as phase:
            workers: list[Engine | LlamaGuard] = [resident.engine]
            if isinstance(suite.guard, LlamaGuard):
                workers.append(suite.guard)
            for worker in workers:
                worker.on_progress = phase.step
            found = self._evaluate(point)
            for worker in workers:
                worker.on_progress = None
            headline = stage_metrics.headline(found.metrics, suite.described)
            phase.step(phase.total, phase.total, **headline)
        self.meter.generated("evaluate", resident.engine)

        # Texts and items, on rank 0.
        number = round_number(round_idx)
        folder, model_id = (
            self.record.folder / "answers",
            f"{self.config.name}-round{number}-{point}",
        )
        items = item_file(self.record.folder, number, point)
        attacks = self.config.record.texts
        self.ranks.once(lambda: write_texts(found, suite, folder, model_id, attacks=attacks))
        self.ranks.once(lambda: write_outcomes(found, items))

        # The judge's ratings of MT-Bench, and the row.
        judged = self._judge(found, model_id, point)
        origin = stage_metrics.of_origin(found.artefact, found.reused)
        metrics = {**stage_metrics.of_point(point), **origin, **found.metrics, **judged}
        self.record.append(round_idx, "eval", metrics)

    def _evaluate(self, point: str) -> Evaluation:
        """Compute the benchmarks' figures, or take the pretrained model's from the artefact."""

        def compute() -> Evaluation:
            if not self._tokenised:  # once a process: prompts are the same at every point
                tokenise(self.resident.engine, self.suite)
                self._tokenised = True
            return evaluate(self.resident.engine, self.suite, ("eval",))

        if self.shared is None or point != UNTOUCHED:
            return compute()
        return self.shared(self.suite, compute)

    def _judge(self, found: Evaluation, model_id: str, point: str) -> Metrics:
        """Let the judge rate the MT-Bench answers; log unjudged turns, and continue the run."""
        if self.judge is None or not found.answers:
            return {}
        folder = self.record.folder / "answers" / "mt_bench"
        texts = [answer.texts for answer in found.answers]
        questions = [answer.question for answer in found.answers]

        # Ratings, and the mean score in the progress line once all turns are rated.
        unit = self.judge.unit
        with self.record.phase(f"judge MT-Bench, {POINT_TITLES[point]}", "judge", unit) as phase:
            judged = self.judge.judge(folder, model_id, texts, phase.step)
            metrics = judge_metrics(judged, questions)
            if judged.complete:
                headline = stage_metrics.headline(metrics, self.suite.described)
                phase.step(phase.total, phase.total, **headline)

        # News of the judge, and turns that it could not rate.
        for line in judged.news:
            self.record.say(line)
        if judged.error is not None:
            finish = f"fedsim judge {self.record.folder}"
            self.record.say(
                f"{judged.num_unjudged} turns stay unjudged: {judged.error}. To finish later: {finish}",
            )
        return metrics
