"""The round loop: the paper's section 2 (FedLLM) and section 4 (safety filter, constitutional AI) in one place."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
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
from fedsim.federation.participation import cosine_by_round
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
from fedsim.run.resident import Resident, assemble
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
        self.store = ArtefactStore(config.record.artefact_folder, world.ranks, self.record.say, world.journal)
        self.preparation = Preparation(config, world, self.record, self.store)

    def check(self) -> None:
        """Make every check that needs no computing, and print the plan of the run."""
        with self._explaining():
            self._begin()
            self.record.check_directory()
            found, inputs = self._inspect()
            self.preparation.check_unchanged(inputs)
            text = self.ranks.once(lambda: plan_text(self.config, inputs, found, self.world.size))
            if self.ranks.is_main:
                print(f"\n{text}", flush=True)
            if self.record.is_finished:
                self._say_start(self.config.federation.num_rounds)
            self.record.say("checked: nothing was trained")

    def run(self) -> None:
        """Run to the end, holding the lock of the run directory."""
        with self._explaining():
            try:
                self.record.claim()
                if self.record.is_finished:
                    self._say_start(self.config.federation.num_rounds)
                else:
                    self._run()
                self.record.finished()
                self.world.stop.mark_done()
            finally:
                gc.unfreeze()
                self.record.stream.close()
                self.world.on_exit(self.record.release)

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Add to errors of a full disk or full memory what to do about them."""
        disk = explaining_full_disk([self.record.folder.parent, self.store.folder])
        with disk, explaining_memory(self.world.journal):
            yield

    def _run(self) -> None:
        """Filter the clients' rows, then alternate federated training and CAI, with evaluations in between."""
        config, record, prepare = self.config, self.record, self.preparation

        # Checks and data: every mistake is found before the first expensive stage.
        self._begin()
        found, inputs = self._inspect()
        self._say_models(found)
        prepare.pass_tokens = found.pass_tokens
        prepare.write_manifest(inputs, found.shapes)
        prepare.try_models(found.untried)

        # The guard filters the clients' rows; then the model is loaded, with everything that works on it.
        guarded = prepare.filter(inputs.data)
        resident = self._assemble(guarded.filtered)
        resident.engine.spare_bytes = found.spare_bytes
        suite = replace(inputs.suite, guard=guarded.judge)
        measurement = self._measurement(resident, suite, prepare.shared_evaluation(inputs, resident))

        # Start from the last checkpoint, or measure the pretrained model and start from it.
        checkpoint = record.resume(resident.check)
        is_new = checkpoint is None
        if checkpoint is None:
            checkpoint = Checkpoint(PRETRAINED, resident.start(config.seed))
            prepare.record_filter(guarded, resident)
            measurement.take(PRETRAINED, UNTOUCHED, checkpoint.state.adapter)
        aligner = prepare.aligner(inputs.data, resident, guarded.judge, new=is_new)
        self.meter.generated("cai_generate", resident.engine)
        checkpoint = replace(checkpoint, state=resident.to_device(checkpoint.state))
        resident.controls.index.update(checkpoint.client_rounds)

        num_done, num_rounds = round_number(checkpoint.round_idx), config.federation.num_rounds
        seconds = record.timers.pop()  # this session's preparation belongs to no round
        spent = seconds | self.meter.pop(seconds)
        if is_new or num_done < num_rounds:  # the record of a finished run stays as it is
            record.append(checkpoint.round_idx, "prepare" if is_new else RESUME, spent)
        self._say_start(num_done)

        # Rounds. Libraries, model and data are frozen: a full collection, 0.1 s, then skips them. Frozen garbage would
        # never be freed, so it is collected first.
        gc.collect()
        gc.freeze()
        for round_idx in range(num_done, num_rounds):
            with record.round(round_idx, num_rounds):
                checkpoint = self._round(resident, round_idx, checkpoint, aligner, measurement)
            self._stop_if_asked(round_number(round_idx))
        record.progress.outside_rounds()

        # The result: the adapter in PEFT's format, plots, summary, final table.
        self._check_trained(checkpoint.state, resident)
        with record.journal.at(stage="finishing"):
            self.ranks.once(lambda: resident.flat.save(record.folder / "adapter", checkpoint.state.adapter))
            self.ranks.once(lambda: finish_run(record, self.world.size))

    def _begin(self) -> None:
        """Load the user's code, and print the header."""
        self.ranks.each(lambda: check_code(self.config))
        arm, placement = arm_of(to_flat(self.config)), self.world.placement.words()
        self.record.header(arm, self.world.size, self.world.device, placement)

    def _inspect(self) -> tuple[Preflight, Inputs]:
        """Make all checks and read all data.

        Data is not read where no folder can hold what is kept of it.

        Raises:
            FedsimError: the one mistake that was found.
            Problems: every mistake of checks and data at once.
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

    def _say_models(self, found: Preflight) -> None:
        """Log the attention and dropout of each model, warnings, and the sizes of training passes."""
        say = self.record.say
        for role, shape in found.shapes.items():
            say(f"attention of the {role}: {shape.attention.words}")
            if shape.dropout_off:
                say(f"dropout of the {role}'s base is off, LoRA's alone counts: {shape.dropout_off}")
        for warning in found.warnings():
            say(f"warning: {warning}")
        for stage, tokens in found.pass_tokens.items():
            say(f"passes of {stage}: up to {tokens:,} tokens, by the GPU's memory")

    def _say_start(self, num_done: int) -> None:
        """Log after which round a run goes on, or that it is finished."""
        num_rounds = self.config.federation.num_rounds
        if num_done == num_rounds:
            self.record.say(
                f"this run is finished: all {num_rounds} rounds are in {self.record.folder}; nothing is trained"
            )
        elif num_done > 0:
            self.record.say(f"resumed after round {num_done}/{num_rounds}")

    def _assemble(self, filtered: Filtered) -> Resident:
        """Load the model and build everything around it; log what was found of it."""
        with self.record.phase("load model", "load"):
            pass_tokens = self.preparation.pass_tokens.get(LOCAL, 0)
            resident = assemble(self.config, self.world, filtered.shards, self.record.client_state, pass_tokens)
            resident.engine.on_note = self.record.note
            if resident.rows.tally.num_dropped or resident.rows.tally.num_cut:
                self.record.say(resident.rows.words(self.config))
            for note in resident.chat.notes():  # before evaluations, whose rows depend on the rank
                self.record.say(note)
            fused = resident.loaded.fused.words()
            if fused:
                self.record.say(f"layers of the model: {fused}")
            base = resident.loaded.base
            peak = run_peak(self.ranks, self.world.device, base.dtype)
            self.meter = Meter(ModelCost.of(base), peak, self.world)
            return resident

    def _measurement(self, resident: Resident, suite: Suite, shared: Shared | None) -> Measurement:
        return Measurement(self.config, self.world, self.record, resident, suite, self.meter, shared)

    def _round(
        self,
        resident: Resident,
        round_idx: int,
        before: Checkpoint,
        aligner: Aligner | None,
        measurement: Measurement,
    ) -> Checkpoint:
        """Run one round: local training, aggregation, CAI, evaluation, record, checkpoint."""
        record = self.record
        self.meter.begin()
        state, cost, metrics = self._train(resident, round_idx, before.state, self._cost(before))
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
        after = Checkpoint(round_idx, state, dict(resident.controls.index), cost)
        self._close_round(resident, after, metrics)
        return after

    def _train(
        self, resident: Resident, round_idx: int, state: ServerState, cost: tuple[float, ...]
    ) -> tuple[ServerState, tuple[float, ...], dict[str, Any]]:
        """Train the cohort and take the server's step.

        A round in which no client delivers an update changes neither the server's state nor a control variate.

        Args:
            cost: seconds per token of each rank, as learned so far.

        Returns:
            The server's state and the ranks' costs after the round, and the round's metrics.
        """
        record, cohorts = self.record, resident.cohorts
        attendance = resident.attendance(round_idx)
        delivered: list[int] = []
        metrics: dict[str, Any] = {**stage_metrics.of_attendance(attendance, cohorts.failures)}
        if attendance.steps:
            with record.phase("local training", "train", "steps") as phase:
                work = cohorts.train(attendance.steps, round_idx, state, cost, phase.step)
            with record.phase("aggregation", "aggregate") as phase:
                result = cohorts.reduce(work, state, cost)
                delivered = result.delivered
                if delivered:
                    state = resident.step(state, result.updates or result.aggregated.sums)
                    phase.update(0, loss=stage_metrics.mean_loss(result))
            for failure in result.failures:
                record.say(failure.words())
            cost = result.seconds_per_token
            local, num_rounds = self.config.local, self.config.federation.num_rounds
            metrics |= stage_metrics.of_rate(cosine_by_round(round_idx, num_rounds, local.lr, local.lr_min))
            metrics |= stage_metrics.of_failures(result.failures, cohorts.failures) | stage_metrics.of_training(result)
            self.meter.trained(cohorts, attendance.steps, round_idx, result)
            resident.controls.advance(delivered if resident.algorithm.has_control else (), round_idx)
        if cohorts.attacks:
            metrics |= stage_metrics.of_attackers(cohorts.attackers(round_idx, attendance.steps))
        if not delivered:
            record.say("no client delivered an update: the global adapter stays as it is")
        return state, cost, stage_metrics.of_delivered(delivered) | metrics

    def _cost(self, before: Checkpoint) -> tuple[float, ...]:
        """Return the learned seconds per token of each rank, or equal ones where nothing is known yet."""
        known = before.seconds_per_token
        if len(known) == self.world.size:
            return known
        return (1e-4,) * self.world.size

    def _close_round(self, resident: Resident, after: Checkpoint, metrics: dict[str, Any]) -> None:
        """Check that the ranks agree, write the round's row, then the checkpoint that makes the round count."""
        metrics |= stage_metrics.of_state(agreed_checksums(after.state, self.ranks))
        seconds = self.record.timers.pop()
        self.record.append(after.round_idx, "round", metrics | seconds | self.meter.pop(seconds))
        with self.record.journal.at(stage="saving"):
            self.ranks.once(lambda: self._save(resident, after))

    def _save(self, resident: Resident, after: Checkpoint) -> None:
        self.record.checkpoints.save(after)
        self.record.counts(after.round_idx)
        resident.controls.drop_unused(self.record.checkpoints.kept_client_rounds())

    def _stop_if_asked(self, num_done: int) -> None:
        """End between two rounds if any process received a signal.

        Raises:
            Stopped: on every rank.
        """
        num_rounds = self.config.federation.num_rounds
        asked = max(self.ranks.gather(self.world.stop.signal))
        if asked and num_done < num_rounds:
            self.world.stop.mark_done()
            raise Stopped(
                f"{signal_name(asked)} came; {num_done} of {num_rounds} rounds are done, and the same command goes on "
                "from there",
                asked,
            )

    def _check_trained(self, state: ServerState, resident: Resident) -> None:
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
        first = resident.start(self.config.seed).adapter.to(state.adapter.device)
        if torch.equal(state.adapter, first):
            raise RunError(
                f"the global adapter in {folder} is bit for bit the one before the first of {num_rounds} round(s): "
                "nothing was learned; raise local.lr or server_optimizer.lr"
            )
