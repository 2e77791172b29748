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
from fedsim.errors import DataError
from fedsim.evaluate.stage import load_suite, write_texts
from fedsim.evaluate.suite import Suite, evaluate
from fedsim.federation.algorithms import ADAPTER
from fedsim.federation.sampling import cosine_by_round
from fedsim.model.load import check_model_dir, model_digest
from fedsim.parallel.world import World
from fedsim.record.finish import finish_run
from fedsim.record.manifest import versions, write_manifest
from fedsim.record.run_record import RunRecord
from fedsim.record.sections import POINT_TITLES
from fedsim.safety.alignment import Aligner
from fedsim.safety.cai_data import count_metrics, unusable, usable
from fedsim.safety.cai_stage import cai_conversations, constitution_file
from fedsim.safety.constitution import load_constitution
from fedsim.safety.filter_stage import FilterStage
from fedsim.safety.filtering import Filtered

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
        self.facts: dict[str, Any] = {
            "device": world.device.type,
            "threads": config.parallel.threads,
            "exact": config.parallel.exact,
            "versions": versions(),
            "gpu": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None,
        }

    def run(self) -> None:
        """Run to the end; the run directory is this process's alone for so long."""
        try:
            self._run()
        finally:
            self.record.release()

    def _run(self) -> None:
        """Filter the clients' data, then alternate federated training and CAI, measuring as it goes."""
        config, record = self.config, self.record
        record.header(self.world.size, self.world.device)
        models = self.ranks.once(self._check_paths)
        data, suite = self._data(models)
        filtered, untuned = self._filter(data)
        federation = self._assemble(filtered)
        checkpoint = record.resume(federation.check)
        if checkpoint is None:
            state = federation.start(config.seed)
            self._record_preparation(filtered, untuned, federation)
            self._evaluate(federation, suite, PRETRAINED, "pretrained", state.adapter)
            checkpoint = Checkpoint(PRETRAINED, state)
        aligner = self._aligner(data, federation, new=checkpoint.round_idx == PRETRAINED)
        checkpoint = replace(checkpoint, state=federation.to_device(checkpoint.state))
        federation.controls.index.update(checkpoint.client_rounds)
        if checkpoint.round_idx == PRETRAINED:
            record.append(PRETRAINED, "prepare", record.timers.pop())
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
        state, cost = before.state, self._cost(before)
        metrics: dict[str, Any] = {"client/num_trained": len(cohort), "client/num_sat_out": num_sat_out}
        if cohort:
            with record.phase("local training", "train", "steps") as phase:
                work = federation.cohorts.train(cohort, round_idx, state, cost, phase.step)
            with record.phase("aggregation", "aggregate") as phase:
                result = federation.cohorts.reduce(work, state, cost)
                state = federation.step(state, result.aggregated.sums)
                phase.update(0, loss=figures.mean_loss(result))
            cost = result.seconds_per_token
            local = self.config.local
            metrics["client/lr"] = cosine_by_round(round_idx, settings.num_rounds, local.lr, local.lr_min)
            metrics |= figures.of_training(result)
            federation.controls.advance(cohort if federation.algorithm.has_control else (), round_idx)
        measured = self._is_measured(round_idx)
        if aligner is not None:
            if measured:
                self._evaluate(federation, suite, round_idx, "before_cai", state.adapter)
            with record.phase("constitutional AI", "cai", "steps") as phase:
                aligned = aligner.align(state.adapter, round_idx, self.world.everyone(), phase.step)
            state = replace(state, adapter=aligned.adapter)
            metrics |= aligned.metrics
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
        metrics["perf/peak_rss_bytes"] = sum(self.ranks.gather(figures.peak_rss_bytes()))
        self.record.append(after.round_idx, "round", metrics | self.record.timers.pop())
        self.ranks.once(lambda: self._save(federation, after))

    def _save(self, federation: Federation, after: Checkpoint) -> None:
        self.record.checkpoints.save(after)
        federation.controls.drop_unused(self.record.checkpoints.kept_client_rounds())

    def _check_paths(self) -> dict[str, str]:
        """Find a wrong path before the first expensive stage; returns the models in use by role."""
        models = {"model": self.config.model.path}
        if self.config.guard.kind == "llama_guard":
            models["guard"] = self.config.guard.path
        for role, path in models.items():
            check_model_dir(path, f"{role}.path")
        if self.config.cai.iterations > 0:
            load_constitution(constitution_file(self.config.cai.constitution))
        return models

    def _data(self, models: dict[str, str]) -> tuple[PreparedData, Suite]:
        """Read and split the rows, read the benchmarks, and write down what they are."""
        record = self.record
        with record.phase("data", "data"):
            data = prepare_data(self.config, self.store, self.ranks)
            suite, files = load_suite(self.config.eval, self.store)
        for note in data.notes:
            record.say(note)
        record.notes.extend(data.notes)
        inputs = {"square": data.source, **files}
        if self.config.cai.iterations > 0:
            inputs["constitution"] = constitution_file(self.config.cai.constitution)

        def write() -> None:
            hashes = {name: model_digest(path) for name, path in models.items()}
            write_manifest(record.folder, to_nested(self.config), inputs, hashes, self.world.size)

        self.ranks.once(write)
        return data, suite

    def _filter(self, data: PreparedData) -> tuple[Filtered, Filtered | None]:
        """Every client drops the rows that the guard calls unsafe (paper §4.1).

        Returns:
            The kept rows, and what the guard would have kept before its fine-tuning, where that is measured.
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
            untuned = stage.run_untuned(data) if self.config.guard.is_compared else None
            return stage.run(data), untuned

    def _assemble(self, filtered: Filtered) -> Federation:
        with self.record.phase("load model", "load"):
            return assemble(self.config, self.world, filtered.shards, self.record.client_state)

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
        chat = federation.chat
        rows = usable(conversations)
        if not rows:
            raise DataError(unusable(conversations))
        aligner = Aligner(federation.trainer, rows, chat, cai, chat.pad_id, self.config.seed)
        if new:
            counts = count_metrics(conversations) | {
                "cai/num_cut_rows": aligner.num_truncated,
                "cai/num_dropped_no_targets": aligner.num_without_targets,
            }
            self.record.append(PRETRAINED, "cai_data", counts)
        return aligner

    def _record_preparation(self, filtered: Filtered, untuned: Filtered | None, federation: Federation) -> None:
        """What the filter kept, and how many training rows had to be cut."""
        if untuned is not None:
            self.record.append(PRETRAINED, "guard", {"point": "untuned", **untuned.total.as_metrics()})
        metrics = figures.of_guard(filtered, self.config.guard.kind)
        if self.config.guard.kind == "llama_guard":
            metrics["point"] = "fine-tuned" if self.config.guard.tune_epochs > 0 else "untuned"
        metrics["client/num_cut_rows"] = sum(row.truncated for shard in federation.shards for row in shard)
        self.record.append(PRETRAINED, "filter", metrics)

    def _evaluate(
        self, federation: Federation, suite: Suite, round_idx: int, point: str, adapter: torch.Tensor
    ) -> None:
        """Run the benchmarks on an adapter. Every point draws the same random numbers, so points compare."""
        federation.flat.load(adapter)
        with self.record.phase(f"evaluate, {POINT_TITLES[point]}", "evaluate", "batches") as phase:
            federation.engine.on_progress = phase.step
            found = evaluate(federation.engine, suite, ("eval",))
            federation.engine.on_progress = None
            phase.step(phase.total, phase.total, **figures.headline(found.metrics))
        self.record.append(round_idx, "eval", {"point": point, **found.metrics})
        folder, model_id = self.record.folder / "answers", f"{self.config.name}-round{round_idx + 1}-{point}"
        self.ranks.once(lambda: write_texts(found, folder, model_id, attacks=self.config.record.texts))

    def _is_measured(self, round_idx: int) -> bool:
        every, num_rounds = self.config.eval.every, self.config.federation.num_rounds
        return round_idx == num_rounds - 1 or (every > 0 and (round_idx + 1) % every == 0)

    def _cost(self, before: Checkpoint) -> tuple[float, ...]:
        """Learned seconds per token of each rank; equal ranks where nothing is known yet."""
        known = before.seconds_per_token
        return known if len(known) == self.world.size else (1e-4,) * self.world.size
