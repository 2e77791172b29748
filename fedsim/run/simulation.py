"""The round loop: the paper's section 2 (FedLLM) and section 4 (safety filter, constitutional AI) in one place."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedsim.base.artefacts import ArtefactStore
from fedsim.base.disk import explaining_full_disk
from fedsim.base.errors import FolderError, Gathered, RunError, Stopped
from fedsim.base.out_of_memory import explaining_memory
from fedsim.base.rounds import PRETRAINED, round_number
from fedsim.config import Config, to_flat
from fedsim.evaluate.suite import Suite
from fedsim.federation.algorithms import ServerState
from fedsim.federation.sampling import cosine_by_round
from fedsim.model.cost import ModelCost
from fedsim.parallel.signals import signal_name
from fedsim.parallel.world import World
from fedsim.record.checkpoint import Checkpoint
from fedsim.record.metrics import RESUME
from fedsim.record.run_record import RunRecord
from fedsim.report.finish import finish_run
from fedsim.report.paper import arm_of
from fedsim.run import stage_metrics
from fedsim.run.checks import Preflight, check_code, preflight
from fedsim.run.cohort import agreed_checksums
from fedsim.run.measurement import UNTOUCHED, Measurement, Shared
from fedsim.run.needs import LOCAL
from fedsim.run.peak import run_peak
from fedsim.run.plan import plan_text
from fedsim.run.preparation import Inputs, Preparation
from fedsim.run.resident import Federation, assemble
from fedsim.run.throughput import Meter
from fedsim.safety.alignment import Aligner
from fedsim.safety.filtering import Filtered


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
        self.record = RunRecord(config, world.ranks, world.device.type == "cuda", world.journal)
        folder = Path(os.path.expanduser(config.record.artefacts))
        self.store = ArtefactStore(folder, world.ranks, self.record.say, world.journal)
        self.preparation = Preparation(config, world, self.record, self.store)

    def check(self) -> None:
        """Make every check that needs no computing, and print the plan of the run."""
        with self._explaining():
            self._check()

    def _check(self) -> None:
        config, record = self.config, self.record
        self.ranks.each(lambda: check_code(config))
        record.header(arm_of(to_flat(config)), self.world.size, self.world.device, self.world.placement.words())
        record.check_directory()
        found, inputs = self._inspect()
        self.preparation.check_unchanged(inputs)
        text = self.ranks.once(lambda: plan_text(self.config, inputs, found, self.world.size))
        if self.ranks.is_main:
            print(f"\n{text}", flush=True)
        if record.is_finished:
            self._say_start(self.config.federation.num_rounds)
        record.say("checked: nothing was trained")

    def _inspect(self) -> tuple[Preflight, Inputs]:
        """Make all checks and read all data, and raise every mistake of both at once.

        Data is not read where no folder can take what is kept of it.
        """
        mistakes = Gathered()
        found = mistakes.attempt(lambda: preflight(self.config, self.world))
        inputs = None
        if not any(isinstance(error, FolderError) for error in mistakes.errors):
            inputs = mistakes.attempt(self.preparation.read)
        if found is not None and inputs is not None:  # rows are counted with the model's own tokenizer
            mistakes.attempt(lambda: self.preparation.check_rows(inputs.data))
        mistakes.raise_all()
        assert found is not None and inputs is not None
        return found, inputs

    def run(self) -> None:
        """Run to the end; the run directory is this process's alone for so long."""
        with self._explaining():
            try:
                self.record.claim()
                if self.record.is_finished:
                    self._say_start(self.config.federation.num_rounds)
                else:
                    self._run()
                self.record.finished()
                self.world.stop.obeyed()
            finally:
                gc.unfreeze()
                self.record.stream.close()
                self.world.when_leaving(self.record.release)

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Say what to do about a full disk or full memory."""
        disk = explaining_full_disk([self.record.folder.parent, self.store.folder])
        with disk, explaining_memory(self.world.journal):
            yield

    def _run(self) -> None:
        """Filter the clients' data, then alternate federated training and CAI, measuring as it goes."""
        config, record, prepare = self.config, self.record, self.preparation
        self.ranks.each(lambda: check_code(config))
        record.header(arm_of(to_flat(config)), self.world.size, self.world.device, self.world.placement.words())
        found, inputs = self._inspect()
        for role, shape in found.shapes.items():
            record.say(f"attention of the {role}: {shape.attention.words}")
            if shape.dropout_off:
                record.say(f"dropout of the {role}'s base is off, LoRA's alone counts: {shape.dropout_off}")
        for warning in found.warnings():
            record.say(f"warning: {warning}")
        prepare.pass_tokens = found.pass_tokens
        for stage, tokens in found.pass_tokens.items():
            record.say(f"passes of {stage}: up to {tokens:,} tokens, by the GPU's memory")
        prepare.write_manifest(inputs, found.shapes)
        prepare.try_models(found.untried)
        guarded = prepare.filter(inputs.data)
        federation = self._assemble(guarded.filtered)
        federation.engine.spare_bytes = found.spare_bytes
        suite = replace(inputs.suite, guard=guarded.judge)
        measurement = self._measurement(federation, suite, prepare.shared_evaluation(inputs, federation))
        checkpoint = record.resume(federation.check)
        is_new = checkpoint is None
        if checkpoint is None:
            checkpoint = Checkpoint(PRETRAINED, federation.start(config.seed))
            prepare.record_filter(guarded, federation)
            measurement.take(PRETRAINED, UNTOUCHED, checkpoint.state.adapter)
        aligner = prepare.aligner(inputs.data, federation, guarded.judge, new=is_new)
        self.meter.generated("cai_generate", federation.engine)
        checkpoint = replace(checkpoint, state=federation.to_device(checkpoint.state))
        federation.controls.index.update(checkpoint.client_rounds)
        seconds = record.timers.pop()  # this session's preparation is no round's
        spent = seconds | self.meter.pop(seconds)
        num_done, num_rounds = round_number(checkpoint.round_idx), config.federation.num_rounds
        if is_new or num_done < num_rounds:  # a finished run's record stays as it is
            record.append(checkpoint.round_idx, "prepare" if is_new else RESUME, spent)
        self._say_start(num_done)
        gc.collect()  # what is frozen is never freed: garbage must not be among it
        gc.freeze()  # libraries, model and data stay: a full collection, which takes 0.1 s, need not look at them again
        for round_idx in range(num_done, num_rounds):
            with record.round(round_idx, num_rounds):
                checkpoint = self._round(federation, round_idx, checkpoint, aligner, measurement)
            self._stop_if_asked(round_number(round_idx))
        record.progress.outside_rounds()
        self._check_trained(checkpoint.state, federation)
        with record.journal.at(stage="finishing"):
            self.ranks.once(lambda: federation.flat.save(record.folder / "adapter", checkpoint.state.adapter))
            self.ranks.once(lambda: finish_run(record, self.world.size))

    def _check_trained(self, state: ServerState, federation: Federation) -> None:
        """Check after the last round that the clients have trained the global adapter.

        Raises:
            RunError: no round had an update, or the adapter is bit for bit the one before the first round.
        """
        num_rounds, folder = self.config.federation.num_rounds, self.record.folder
        if state.num_steps == 0:
            raise RunError(
                f"no client delivered an update in any of the {num_rounds} round(s), so that nothing was trained; see "
                f"why in {self.record.metrics_file} (client/num_…), and start again under another name"
            )
        if torch.equal(state.adapter, federation.start(self.config.seed).adapter.to(state.adapter.device)):
            raise RunError(
                f"the global adapter in {folder} is bit for bit the one before the first of {num_rounds} round(s): "
                "nothing was learned; raise local.lr or server_optimizer.lr"
            )

    def _assemble(self, filtered: Filtered) -> Federation:
        with self.record.phase("load model", "load"):
            pass_tokens = self.preparation.pass_tokens.get(LOCAL, 0)
            federation = assemble(self.config, self.world, filtered.shards, self.record.client_state, pass_tokens)
            federation.engine.on_note = self.record.note
            if federation.rows.tally.num_dropped or federation.rows.tally.num_cut:
                self.record.say(federation.rows.words(self.config))
            for note in federation.chat.notes():  # before evaluations, whose rows depend on the rank
                self.record.say(note)
            if fused := federation.loaded.fused.words():
                self.record.say(f"layers of the model: {fused}")
            base = federation.loaded.base
            peak = run_peak(self.ranks, self.world.device, base.dtype)
            self.meter = Meter(ModelCost.of(base), peak, self.world)
            return federation

    def _measurement(self, federation: Federation, suite: Suite, shared: Shared | None) -> Measurement:
        return Measurement(self.config, self.world, self.record, federation, suite, self.meter, shared)

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
        self,
        federation: Federation,
        round_idx: int,
        before: Checkpoint,
        aligner: Aligner | None,
        measurement: Measurement,
    ) -> Checkpoint:
        """One round: cohort, local training, aggregation, CAI, evaluation, record, checkpoint."""
        record = self.record
        self.meter.begin()
        state, cost, metrics = self._train(federation, round_idx, before.state, self._cost(before))
        is_due = measurement.is_due(round_idx)
        has_cai = aligner is not None and aligner.is_due(round_idx)
        if aligner is not None and has_cai:
            if is_due:
                measurement.take(round_idx, "before_cai", state.adapter)
            with record.phase("constitutional AI", "cai", "steps") as phase:
                aligned = aligner.align(state.adapter, round_idx, self.world.everyone(), phase.step)
            state = replace(state, adapter=aligned.adapter)
            metrics |= aligned.metrics
            self.meter.aligned(aligner, round_idx)
        if is_due:
            point = "after_cai" if has_cai else "global"
            measurement.take(round_idx, point, state.adapter)
        after = Checkpoint(round_idx, state, dict(federation.controls.index), cost)
        self._close_round(federation, after, metrics)
        return after

    def _train(
        self, federation: Federation, round_idx: int, state: ServerState, cost: tuple[float, ...]
    ) -> tuple[ServerState, tuple[float, ...], dict[str, Any]]:
        """Local training and the server's step; returns the state and ranks' costs after it, and its figures.

        A round in which no client delivers an update changes neither the server's state nor a control variate.
        """
        record, cohorts = self.record, federation.cohorts
        attendance = federation.attendance(round_idx)
        delivered: list[int] = []
        metrics: dict[str, Any] = {**stage_metrics.of_attendance(attendance, cohorts.failures)}
        if attendance.steps:
            with record.phase("local training", "train", "steps") as phase:
                work = cohorts.train(attendance.steps, round_idx, state, cost, phase.step)
            with record.phase("aggregation", "aggregate") as phase:
                result = cohorts.reduce(work, state, cost)
                delivered = result.delivered
                if delivered:
                    state = federation.step(state, result.updates or result.aggregated.sums)
                    phase.update(0, loss=stage_metrics.mean_loss(result))
            for failure in result.failures:
                record.say(failure.words())
            cost = result.seconds_per_token
            local, num_rounds = self.config.local, self.config.federation.num_rounds
            metrics |= stage_metrics.of_rate(cosine_by_round(round_idx, num_rounds, local.lr, local.lr_min))
            metrics |= stage_metrics.of_failures(result.failures, cohorts.failures) | stage_metrics.of_training(result)
            self.meter.trained(cohorts, attendance.steps, round_idx, result)
            federation.controls.advance(delivered if federation.algorithm.has_control else (), round_idx)
        if cohorts.attacks:
            metrics |= stage_metrics.of_attackers(cohorts.attackers(round_idx, attendance.steps))
        if not delivered:
            record.say("no client delivered an update: the global adapter stays as it is")
        return state, cost, stage_metrics.of_delivered(delivered) | metrics

    def _close_round(self, federation: Federation, after: Checkpoint, metrics: dict[str, Any]) -> None:
        """Prove that the ranks agree, write the round's row, then the checkpoint that makes the round count."""
        metrics |= stage_metrics.of_state(agreed_checksums(after.state, self.ranks))
        seconds = self.record.timers.pop()
        self.record.append(after.round_idx, "round", metrics | seconds | self.meter.pop(seconds))
        with self.record.journal.at(stage="saving"):
            self.ranks.once(lambda: self._save(federation, after))

    def _stop_if_asked(self, num_done: int) -> None:
        """End between two rounds if any process was asked to.

        Raises:
            Stopped: on every rank.
        """
        num_rounds = self.config.federation.num_rounds
        asked = max(self.ranks.gather(self.world.stop.signal))
        if asked and num_done < num_rounds:
            self.world.stop.obeyed()
            raise Stopped(
                f"{signal_name(asked)} came; {num_done} of {num_rounds} rounds are done, and the same command goes on "
                "from there",
                asked,
            )

    def _save(self, federation: Federation, after: Checkpoint) -> None:
        self.record.checkpoints.save(after)
        self.record.counts(after.round_idx)
        federation.controls.drop_unused(self.record.checkpoints.kept_client_rounds())

    def _cost(self, before: Checkpoint) -> tuple[float, ...]:
        """Learned seconds per token of each rank; equal ranks where nothing is known yet."""
        known = before.seconds_per_token
        return known if len(known) == self.world.size else (1e-4,) * self.world.size
