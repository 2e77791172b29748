"""The round loop: the paper's section 2 (FedLLM) and section 4 (safety filter, constitutional AI) in one place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedsim import figures
from fedsim.artefacts import ArtefactStore
from fedsim.assembly import Federation, assemble
from fedsim.checkpoint import Checkpoint
from fedsim.cohort import agreed_checksums
from fedsim.config import Config, to_nested
from fedsim.data.prepare import PreparedData, prepare_data
from fedsim.disk import explaining_full_disk
from fedsim.errors import DataError
from fedsim.evaluate.judge import MtJudge
from fedsim.evaluate.judge_inputs import judge_files
from fedsim.evaluate.measures import Metrics
from fedsim.evaluate.stage import load_suite, write_texts
from fedsim.evaluate.suite import Evaluation, Suite, evaluate, judge_metrics
from fedsim.federation.algorithms import ADAPTER
from fedsim.federation.sampling import cosine_by_round
from fedsim.generate.engine import Engine
from fedsim.meter import Meter
from fedsim.model.cost import ModelCost
from fedsim.model.load import model_digest
from fedsim.parallel.world import World
from fedsim.plan import plan_text
from fedsim.preflight import models_in_use, preflight
from fedsim.record.finish import finish_run
from fedsim.record.manifest import versions, write_manifest
from fedsim.record.peak import run_peak
from fedsim.record.run_record import RunRecord
from fedsim.record.sections import POINT_TITLES
from fedsim.safety.alignment import Aligner
from fedsim.safety.cai_data import count_metrics, unusable, usable
from fedsim.safety.cai_stage import cai_conversations, constitution_file
from fedsim.safety.filter_stage import FilterStage
from fedsim.safety.filtering import Filtered
from fedsim.safety.guard import LlamaGuard
from fedsim.safety.guard_report import write_tables

PRETRAINED = -1  # round index of what belongs to the untouched model


class Simulation:
    """One run, from data to summary.

    Args:
        config: what to run.
        world: the processes that run it.
    """

    def __init__(self, config: Config, world: World) -> None:
        self.config = config
        self.world = world
        self.ranks = world.ranks
        self.record = RunRecord(config, world.ranks, synchronize=world.device.type == "cuda")
        self.store = ArtefactStore(Path(config.record.artefacts).expanduser(), world.ranks, self.record.say)
        self.judge: MtJudge | None = None
        self.facts: dict[str, Any] = {
            "device": world.device.type,
            "threads": config.parallel.threads,
            "exact": config.parallel.exact,
            "versions": versions(),
            "gpu": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None,
        }

    def check(self) -> None:
        """Make every check that needs no computing, and print the plan of the run."""
        record = self.record
        record.header(self.world.size, self.world.device)
        record.check_directory()
        found = preflight(self.config, self.world)
        data, suite, files = self._read()

        def show() -> None:
            text = plan_text(self.config, data, suite, self._inputs(data, files), found, self.world.size)
            print(f"\n{text}", flush=True)

        self.ranks.once(show)
        record.say("checked: nothing was trained")

    def run(self) -> None:
        """Run to the end; the run directory is this process's alone for so long."""
        record = self.record
        record.claim()
        try:
            with explaining_full_disk([record.folder.parent, self.store.folder]):
                self._run()
        finally:
            record.release()

    def _run(self) -> None:
        """Filter the clients' data, then alternate federated training and CAI, measuring as it goes."""
        config, record = self.config, self.record
        record.header(self.world.size, self.world.device)
        preflight(config, self.world)
        data, suite = self._data()
        filtered, compared, guard = self._filter(data)
        suite = replace(suite, guard=guard)
        federation = self._assemble(filtered)
        checkpoint = record.resume(federation.check)
        if checkpoint is None:
            state = federation.start(config.seed)
            self._record_preparation(filtered, compared, federation)
            self._evaluate(federation, suite, PRETRAINED, "pretrained", state.adapter)
            checkpoint = Checkpoint(PRETRAINED, state)
        aligner = self._aligner(data, federation, new=checkpoint.round_idx == PRETRAINED)
        checkpoint = replace(checkpoint, state=federation.to_device(checkpoint.state))
        federation.controls.index.update(checkpoint.client_rounds)
        if checkpoint.round_idx == PRETRAINED:
            seconds = record.timers.pop()
            record.append(PRETRAINED, "prepare", seconds | self.meter.pop(seconds))
        self._say_start(checkpoint.round_idx + 1)
        for round_idx in range(checkpoint.round_idx + 1, config.federation.num_rounds):
            checkpoint = self._round(federation, round_idx, checkpoint, aligner, suite)
        record.progress.outside_rounds()
        self.ranks.once(lambda: federation.flat.save(record.folder / "adapter", checkpoint.state.adapter))
        self.ranks.once(lambda: finish_run(record, self.world.size))

    def _say_start(self, num_done: int) -> None:
        """A run that is resumed says where it goes on."""
        num_rounds = self.config.federation.num_rounds
        if num_done == num_rounds:
            self.record.say(
                f"this run is finished: all {num_rounds} rounds are in {self.record.folder}; nothing is trained"
            )
        elif num_done > 0:
            self.record.say(f"resumed after round {num_done}/{num_rounds}")

    def _round(
        self, federation: Federation, round_idx: int, before: Checkpoint, aligner: Aligner | None, suite: Suite
    ) -> Checkpoint:
        """One round: cohort, local training, aggregation, CAI, evaluation, record, checkpoint."""
        record, settings = self.record, self.config.federation
        record.progress.round(round_idx, settings.num_rounds)
        cohort, num_sat_out = federation.cohort(round_idx)
        self.meter.begin()
        state, cost = before.state, self._cost(before)
        metrics: dict[str, Any] = {"client/num_trained": len(cohort), "client/num_sat_out": num_sat_out}
        if cohort:
            with record.phase("local training", "train", "steps") as phase:
                work = federation.cohorts.train(cohort, round_idx, state, cost, phase.step)
            with record.phase("aggregation", "aggregate") as phase:
                result = federation.cohorts.reduce(work, state, cost)
                state = federation.algorithm.server_step(state, result.aggregated.sums)
                phase.update(0, loss=figures.mean_loss(result))
            cost = result.seconds_per_token
            local = self.config.local
            metrics["client/lr"] = cosine_by_round(round_idx, settings.num_rounds, local.lr, local.lr_min)
            metrics |= figures.of_training(result)
            self.meter.trained(federation.cohorts, cohort, round_idx, result)
            federation.controls.advance(cohort if federation.algorithm.has_control else (), round_idx)
        measured = self._is_measured(round_idx)
        if aligner is not None:
            if measured:
                self._evaluate(federation, suite, round_idx, "before_cai", state.adapter)
            with record.phase("constitutional AI", "cai", "steps") as phase:
                aligned = aligner.align(state.adapter, round_idx, self.world.everyone(), phase.step)
            state = replace(state, adapter=aligned.adapter)
            metrics |= aligned.metrics
            self.meter.aligned(aligner, round_idx)
        if measured:
            point = "global" if aligner is None else "after_cai"
            self._evaluate(federation, suite, round_idx, point, state.adapter)
        after = Checkpoint(round_idx, state, dict(federation.controls.index), cost)
        self._close_round(federation, after, metrics)
        return after

    def _close_round(self, federation: Federation, after: Checkpoint, metrics: dict[str, Any]) -> None:
        """Prove that the ranks agree, write the round's row, then the checkpoint that makes the round count."""
        checksums = agreed_checksums(after.state, self.ranks)
        metrics["global/checksum"] = checksums.pop(ADAPTER)
        metrics |= {f"global/{name}_checksum": digest for name, digest in checksums.items()}
        seconds = self.record.timers.pop()
        self.record.append(after.round_idx, "round", metrics | seconds | self.meter.pop(seconds))
        self.ranks.once(lambda: self._save(federation, after))

    def _save(self, federation: Federation, after: Checkpoint) -> None:
        self.record.checkpoints.save(after)
        self.record.counts(after.round_idx)
        federation.controls.drop_unused(self.record.checkpoints.kept_client_rounds())

    def _read(self) -> tuple[PreparedData, Suite, dict[str, Path]]:
        """Read and split the rows, and read the benchmarks, whose files are returned by name."""
        with self.record.phase("data", "data"):
            data = prepare_data(self.config, self.store, self.ranks)
            suite, files = load_suite(self.config.eval, self.store)
            if self.config.judge.kind != "none" and suite.mt_bench:
                suite = replace(suite, rubric=None)  # the judge takes the rubric's place
                self.judge = MtJudge(self.config, self.ranks, self.world.device)
        for note in data.notes:
            self.record.say(note)
        return data, suite, files

    def _data(self) -> tuple[PreparedData, Suite]:
        """The rows and the benchmarks; the manifest says what they were."""
        record = self.record
        data, suite, files = self._read()
        record.notes.extend(data.notes)

        def write() -> None:
            hashes = {name: model_digest(path) for name, path in models_in_use(self.config).items()}
            write_manifest(record.folder, to_nested(self.config), self._inputs(data, files), hashes, self.world.size)

        self.ranks.once(write)
        return data, suite

    def _inputs(self, data: PreparedData, files: dict[str, Path]) -> dict[str, Path]:
        """Every data file that the run depends on, by what it is."""
        inputs = {"square": data.source, **files, **judge_files(self.config)}
        if self.config.cai.iterations > 0:
            inputs["constitution"] = constitution_file(self.config.cai.constitution)
        return inputs

    def _filter(self, data: PreparedData) -> tuple[Filtered, dict[str, Filtered], LlamaGuard | None]:
        """Every client drops, replaces or downweights the rows that the guard calls unsafe (paper §4.1).

        Returns:
            The rows to train on; what the guard would have done as it was given, by title, where that is measured; and
            the guard that will judge replies, where there is to be one.
        """
        with self.record.phase(f"safety filter ({self.config.guard.kind})", "filter", "steps") as phase:
            stage = FilterStage(
                self.config,
                self.ranks,
                self.world.everyone(),
                self.world.device,
                self.store,
                self.facts,
                lambda name, done, total: phase.step(done, total, part=name),
            )
            compared = stage.compare(data)
            filtered, judge = stage.run(data), self.config.eval.guard_judge
            if judge == "none":
                return filtered, compared, None
            guard = stage.model.judge(data, tuned=judge == "tuned", policy=self.config.guard.policy)
            guard.on_progress = None  # the phase that it would report to ends here
            return filtered, compared, guard

    def _assemble(self, filtered: Filtered) -> Federation:
        with self.record.phase("load model", "load"):
            federation = assemble(self.config, self.world, filtered.shards, self.record.client_state)
            base = federation.loaded.base
            peak = run_peak(self.ranks, self.world.device, base.dtype)
            self.meter = Meter(ModelCost.of(base), peak, self.world)
            return federation

    def _aligner(self, data: PreparedData, federation: Federation, *, new: bool) -> Aligner | None:
        """The pretrained model writes the CAI conversations (once, shared by runs); None if CAI is off."""
        cai, model = self.config.cai, self.config.model
        if cai.iterations == 0:
            return None
        federation.flat.load(federation.flat.initial(self.config.seed))
        facts = self.facts | {
            "model": self.ranks.once(lambda: model_digest(model.path)),
            "data": data.source_sha256,
            "dtype": model.dtype,
            "attention": model.attention,
        }
        with self.record.phase("CAI conversations", "cai_generate", "batches") as phase:
            federation.engine.on_progress = phase.step
            conversations = cai_conversations(self.config, federation.engine, data.cai_rows, self.store, facts)
            federation.engine.on_progress = None
        self.meter.generated("cai_generate", federation.engine)
        chat = federation.chat
        rows = usable(conversations)
        if not rows:
            raise DataError(unusable(conversations))
        aligner = Aligner(federation.trainer, rows, chat, cai, chat.pad_id, self.config.seed)
        if new:
            counts = (
                count_metrics(conversations)
                | figures.of_cai_texts(conversations)
                | {
                    "cai/num_cut_rows": aligner.num_truncated,
                    "cai/num_dropped_no_targets": aligner.num_without_targets,
                }
            )
            self.record.append(PRETRAINED, "cai_data", counts)
        return aligner

    def _record_preparation(self, filtered: Filtered, compared: dict[str, Filtered], federation: Federation) -> None:
        """How right the guard was, what its filter left, and how many training rows had to be cut."""
        guard = self.config.guard
        for point, found in compared.items():
            self.record.append(PRETRAINED, "guard", {"point": point, **figures.of_verdicts(found)})
        point = guard.kind.replace("_", " ")
        metrics = figures.of_guard(filtered, guard.kind)
        if guard.kind == "llama_guard":
            point = metrics["point"] = "fine-tuned" if guard.tune_epochs > 0 else "untuned"
        metrics["client/num_cut_rows"] = sum(row.truncated for shard in federation.shards for row in shard)
        self.record.append(PRETRAINED, "filter", metrics)
        if guard.kind != "none":
            points = {**compared, point: filtered}
            self.ranks.once(lambda: write_tables(self.record.folder / "guard", points, guard.threshold))

    def _evaluate(
        self, federation: Federation, suite: Suite, round_idx: int, point: str, adapter: torch.Tensor
    ) -> None:
        """Run the benchmarks on an adapter. Every point draws the same random numbers, so points compare."""
        federation.flat.load(adapter)
        with self.record.phase(f"evaluate, {POINT_TITLES[point]}", "evaluate", "batches") as phase:
            workers = [w for w in (federation.engine, suite.guard) if isinstance(w, Engine | LlamaGuard)]
            for worker in workers:
                worker.on_progress = phase.step
            found = evaluate(federation.engine, suite, ("eval",))
            for worker in workers:
                worker.on_progress = None
            phase.step(phase.total, phase.total, **figures.headline(found.metrics))
        self.meter.generated("evaluate", federation.engine)
        folder, model_id = self.record.folder / "answers", f"{self.config.name}-round{round_idx + 1}-{point}"
        self.ranks.once(lambda: write_texts(found, folder, model_id, attacks=self.config.record.texts))
        judged = self._judge(found, folder / "mt_bench", model_id, point)
        self.record.append(round_idx, "eval", {"point": point, **found.metrics, **judged})

    def _judge(self, found: Evaluation, folder: Path, model_id: str, point: str) -> Metrics:
        """Let the judge rate the MT-Bench answers. What it leaves unjudged is told, and ends no run."""
        if self.judge is None or found.mt_bench is None:
            return {}
        with self.record.phase(f"judge MT-Bench, {POINT_TITLES[point]}", "judge", self.judge.unit) as phase:
            judged = self.judge.judge(folder, model_id, found.mt_bench.texts, phase.step)
            metrics = judge_metrics(judged, [answer.question for answer in found.mt_bench.answers])
            if judged.error is None:
                phase.step(phase.total, phase.total, **figures.headline(metrics))
        if judged.error is not None:
            finish = f"python tools/judge.py {self.record.folder}"
            self.record.say(f"{judged.num_unjudged} turns stay unjudged: {judged.error}. To finish later: {finish}")
        return metrics

    def _is_measured(self, round_idx: int) -> bool:
        every, num_rounds = self.config.eval.every, self.config.federation.num_rounds
        return round_idx == num_rounds - 1 or (every > 0 and (round_idx + 1) % every == 0)

    def _cost(self, before: Checkpoint) -> tuple[float, ...]:
        """Learned seconds per token of each rank; equal ranks where nothing is known yet."""
        known = before.seconds_per_token
        return known if len(known) == self.world.size else (1e-4,) * self.world.size
