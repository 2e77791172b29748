"""Preparation before the first round: data, the clients' filter, CAI conversations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedsim.base.artefacts import ArtefactStore, digest_of, file_digest
from fedsim.base.errors import Gathered
from fedsim.base.rounds import PRETRAINED
from fedsim.config import Config, code_names, code_role, to_flat, to_nested
from fedsim.config.measuring import is_embedded
from fedsim.data.prepared import PreparedData
from fedsim.data.square import SquareRow
from fedsim.data.usable import Tally
from fedsim.evaluate.judge_inputs import judge_files
from fedsim.evaluate.measures import Metrics
from fedsim.evaluate.own import OWN
from fedsim.evaluate.suite import Evaluation, Suite
from fedsim.extend import source_file, title
from fedsim.federation.algorithms import build_algorithm
from fedsim.federation.attacks import ActiveAttack, build_attacks
from fedsim.fused.ops import agree_on_kernels, runs_fused
from fedsim.generate.graph import uses_graphs
from fedsim.model.load import check_model_dir, chosen_attention, load_base, load_chat, model_digest
from fedsim.model.shape import ModelShape
from fedsim.parallel.world import World
from fedsim.record.manifest import check_unchanged, read_manifest, versions, write_manifest
from fedsim.record.run_record import RunRecord
from fedsim.run import stage_metrics
from fedsim.run.benchmarks import load_suite
from fedsim.run.checks import models_in_use
from fedsim.run.local_rows import check_local_rows
from fedsim.run.measurement import Shared
from fedsim.run.needs import DPO, TUNING
from fedsim.run.prepare import prepare_data
from fedsim.run.pretrained import shared_evaluation
from fedsim.run.resident import Resident
from fedsim.safety.alignment import Aligner, check_prompts
from fedsim.safety.cai_data import CaiRow, count_metrics, usable
from fedsim.safety.cai_findings import judge_by_grammar, judge_by_guard
from fedsim.safety.cai_stage import cai_conversations, constitution_file
from fedsim.safety.cai_usage import CaiUsage, none_usable
from fedsim.safety.filter_stage import FilterStage
from fedsim.safety.filtering import Filtered
from fedsim.safety.guard import LlamaGuard
from fedsim.safety.guard_report import write_tables
from fedsim.train.zero_config import zero_file


@dataclass(frozen=True)
class Inputs:
    """Rows, benchmarks and files of a run.

    Attributes:
        data: the clients', the guard's and CAI's rows.
        suite: the benchmarks.
        files: every data file that the run depends on, by what it is.
    """

    data: PreparedData
    suite: Suite
    files: dict[str, Path]


@dataclass(frozen=True)
class Guarded:
    """Outcome of the filter stage.

    Attributes:
        filtered: the rows to train on.
        compared: outcomes of the guard before fine-tuning, by title, where that is measured.
        judge: the guard that classifies replies, where the run asks for it.
        tuning: counts of the rows that a guard is fine-tuned on; None where none is.
    """

    filtered: Filtered
    compared: dict[str, Filtered]
    judge: LlamaGuard | None
    tuning: Tally | None = None


class Preparation:
    """The stages before the first round; their expensive results are artefacts that runs share.

    Args:
        config: what to run.
        world: the processes that run it.
        record: where it is written down.
        store: artefacts.

    Attributes:
        pass_tokens: most tokens of a training pass by stage, where memory decides
            (:mod:`fedsim.run.needs`).
    """

    def __init__(
        self,
        config: Config,
        world: World,
        record: RunRecord,
        store: ArtefactStore,
    ) -> None:
        self.config = config
        self.world = world
        self.ranks = world.ranks
        self.record = record
        self.store = store
        self.pass_tokens: Mapping[str, int] = {}
        agree_on_kernels(world.device, world.ranks)
        self.facts: dict[str, Any] = {
            "device": world.device.type,
            "threads": config.parallel.threads,
            "exact": config.parallel.exact,
            "versions": versions(),
            "fused": runs_fused(world.device),  # as all ranks can
            "gpu": None,
        }
        if world.device.type == "cuda":
            self.facts["gpu"] = torch.cuda.get_device_name(world.device)

    def read(self) -> Inputs:
        """Read and split the rows, and read the benchmarks.

        Raises:
            ConfigError, DataError: the one mistake that was found, such as a malformed file, or
                splits that the file cannot supply.
            Problems: several.
        """
        mistakes = Gathered()  # of all four readers, so that one mistake does not hide the others
        with self.record.phase("data", "data"):
            data = mistakes.attempt(
                lambda: self._attacked(prepare_data(self.config, self.store, self.ranks)),
            )
            found = mistakes.attempt(
                lambda: load_suite(self.config.eval, self.store, judged=self.config.judge.is_on),
            )
            of_judge = mistakes.attempt(lambda: judge_files(self.config))
            users = mistakes.attempt(self._users_files)
        mistakes.raise_all()
        assert data is not None and found is not None and of_judge is not None and users is not None
        suite, files = found
        for note in data.notes:
            self.record.say(note)
        return Inputs(data, suite, {"square": data.source, **files, **of_judge, **users})

    def _attacked(self, data: PreparedData) -> PreparedData:
        """Replace the attackers' rows by the poisoned ones, on rank 0 for all."""
        # Poisoned rows by client; of two attacks by one client the later counts.
        shards = list(data.shards)
        notes = []
        changed: dict[int, list[SquareRow]] = {}
        for attack in self._attacks():
            notes.append(attack.words(len(shards)))
            if attack.changes_rows:
                changed |= self.ranks.once(partial(_changed_rows, attack, shards))

        # The digest of the poisoned rows goes into keys of artefacts that depend on the data.
        content = []
        for client, rows in changed.items():
            shards[client] = rows
            content.append([client, [asdict(row) for row in rows]])
        digest = digest_of(content) if changed else ""
        return replace(data, shards=shards, notes=[*data.notes, *notes], attacked=digest)

    def _attacks(self) -> list[ActiveAttack]:
        config = self.config
        return build_attacks(config.attacks, config.federation.num_clients, config.seed)

    def _users_files(self) -> dict[str, Path]:
        """Return the user's code, constitution and DeepSpeed file that the run uses."""
        files = {}
        for key, (kind, name) in code_names(to_flat(self.config)).items():
            file = source_file(kind, name)
            assert file is not None
            files[code_role(key)] = file
        if self.config.cai.is_on:
            files["constitution"] = constitution_file(self.config.cai.constitution)
        if self.config.guard.is_model and self.config.guard.deepspeed:
            files["deepspeed"] = zero_file(self.config.guard.deepspeed)
        return files

    def check_rows(self, data: PreparedData) -> None:
        """Check on rank 0 that every stage has rows to learn from (:func:`check_rows`).

        The models' directories must have been checked before.
        """
        self.ranks.once(lambda: check_rows(self.config, data))

    def try_models(self, roles: Sequence[str]) -> None:
        """Load each of these models once and free it, so that one that does not fit fails early.

        Only for architectures of which no small model could be made; loading takes a minute at 8B.
        """
        model = self.config.model
        for role in roles:
            path = models_in_use(self.config)[role]
            with self.record.phase(f"trying the {role}'s architecture", "load"):
                load_base(
                    path,
                    dtype=model.dtype,
                    attention=model.attention,
                    device=self.world.device,
                    key=f"{role}.path",
                    ranks=self.ranks,
                )
                if self.world.device.type == "cuda":
                    torch.cuda.empty_cache()

    def write_manifest(self, inputs: Inputs, shapes: Mapping[str, ModelShape]) -> None:
        """Write down what the run's figures depend on.

        Args:
            shapes: of the models in use, by role.

        Raises:
            CheckpointError: a resumed run's files or models are no longer those that it began with.
        """
        self.record.notes.extend(inputs.data.notes)

        def write() -> None:
            hashes = self._model_hashes()
            attention = {role: shape.attention.words for role, shape in shapes.items()}
            write_manifest(
                self.record.folder,
                to_nested(self.config),
                inputs.files,
                hashes,
                attention,
                num_ranks=self.world.size,
                devices=self.world.placement.facts(),
                attackers={f"attacks.{attack.place}": attack.clients for attack in self._attacks()},
                pass_tokens=self.pass_tokens,
            )
            self.record.write_config()

        self.ranks.once(write)

    def check_unchanged(self, inputs: Inputs) -> None:
        """Check the files and models of a run that would be resumed; nothing is written.

        Raises:
            CheckpointError: as :meth:`write_manifest`.
        """

        def check() -> None:
            path = self.record.folder / "manifest.json"
            if self.record.checkpoints.any():
                check_unchanged(path, read_manifest(path), inputs.files, self._model_hashes())

        self.ranks.once(check)

    def _model_hashes(self) -> dict[str, str]:
        hashes = {}
        for role, path in models_in_use(self.config).items():
            hashes[role] = model_digest(path, self.store.digests)
        return hashes

    def filter(self, data: PreparedData) -> Guarded:
        """Drop, refuse or downweight the rows that the guard calls unsafe (paper §4.1)."""
        guard = self.config.guard
        with self.record.phase(f"safety filter ({guard.kind})", "filter", "steps") as phase:
            stage = FilterStage(
                self.config,
                self.ranks,
                self.world.everyone(),
                self.world.device,
                self.store,
                self.facts,
                lambda name, done, total: phase.step(done, total, part=name),
                self.pass_tokens.get(TUNING, 0),
            )
            compared = stage.compare(data)
            filtered = stage.run(data)

            # A guard that classifies replies in evaluations stays in memory.
            wanted = self.config.eval.guard_judge
            judge = None
            if wanted != "none":
                judge = stage.model.judge(data, tuned=wanted == "tuned", policy=guard.policy)
                judge.on_progress = None  # the phase that it would report to ends here
            tuning = data.guard_tally if tunes_guard(self.config) else None
            return Guarded(filtered, compared, judge, tuning)

    def record_filter(self, guarded: Guarded, resident: Resident) -> None:
        """Record the guard's confusion counts, the filter's effect, and counts of usable rows."""
        guard = self.config.guard

        # The guard before fine-tuning or with other policies, where the run measures that.
        for point, found in guarded.compared.items():
            self.record.append(
                PRETRAINED,
                "guard",
                stage_metrics.of_point(point) | stage_metrics.of_verdicts(found),
            )

        # The run's own filter.
        point = title("guard.kind", guard.kind)
        metrics = stage_metrics.of_guard(guarded.filtered, guard.kind)
        if guard.is_model:
            point = "fine-tuned" if guard.tune_epochs > 0 else "untuned"
            metrics |= stage_metrics.of_point(point)
        metrics |= resident.rows.metrics()
        if guarded.tuning is not None:
            metrics |= stage_metrics.of_tuning(guarded.tuning)
        self.record.append(PRETRAINED, "filter", metrics)

        # Confusion tables of all points.
        if guard.kind != "none":
            points = {**guarded.compared, point: guarded.filtered}
            folder = self.record.folder / "guard"
            self.ranks.once(lambda: write_tables(folder, points, guard.threshold))

    def shared_evaluation(self, inputs: Inputs, resident: Resident) -> Shared | None:
        """Return a function that shares the pretrained model's evaluation between runs.

        None where a guard classifies replies, or replies to attacks are kept: neither is in the
        artefact.
        """
        config = self.config
        if config.eval.guard_judge != "none" or config.record.texts:
            return None

        # Evaluation settings that decide the figures; benchmarks have facts of their own below.
        settings = {}
        for name, value in asdict(config.eval).items():
            if name not in ("every", *OWN):
                settings[name] = value

        def shared(suite: Suite, compute: Callable[[], Evaluation]) -> Evaluation:
            benchmarks = [part.benchmark for part in suite.parts]

            def digests() -> dict[str, str]:
                return {one.name: file_digest(inputs.files[one.name]) for one in benchmarks}

            depends = {
                "seed": config.seed,
                "model": self._model_facts(),
                "max_context": resident.engine.max_context,
                "eval": settings,
                "files": self.ranks.once(digests),
                "benchmarks": {one.name: one.depends() for one in benchmarks},
                **self._users_code(inputs),
                **self.facts,
            }
            return shared_evaluation(self.store, depends, suite, compute)

        return shared

    def _users_code(self, inputs: Inputs) -> dict[str, Any]:
        """Digests of a user's phrase rule and benchmarks by role, for keys of artefacts."""
        beginning = code_role("eval.")
        files = {role: file for role, file in inputs.files.items() if role.startswith(beginning)}
        return self.ranks.once(lambda: {role: file_digest(file) for role, file in files.items()})

    def _model_facts(self) -> dict[str, Any]:
        """Facts that identify the model in keys of artefacts."""
        model = self.config.model
        digest = self.ranks.once(lambda: model_digest(model.path, self.store.digests))
        attention = chosen_attention(
            model.path,
            dtype=model.dtype,
            attention=model.attention,
            device=self.world.device,
            key="model.path",
            ranks=self.ranks,
        )
        graphs = uses_graphs(self.world.device)
        return {
            "model": digest,
            "dtype": model.dtype,
            "attention": attention.name,
            "graphs": graphs,
        }

    def aligner(
        self,
        data: PreparedData,
        resident: Resident,
        guard: LlamaGuard | None,
        *,
        new: bool,
    ) -> Aligner | None:
        """Let the pretrained model write the CAI conversations; return their aligner.

        The conversations are an artefact, written once and shared by runs.

        Args:
            guard: classifies replies, where the run has one.
            new: the run begins here; figures of the conversations are recorded.

        Returns:
            The aligner; None if CAI is off.

        Raises:
            ConfigError: no conversation can be trained on.
        """
        cai = self.config.cai
        if not cai.is_on:
            return None

        # The conversations, from the adapter that changes nothing.
        resident.flat.load(resident.flat.initial(self.config.seed))
        facts = self.facts | self._model_facts() | {"data": data.source_sha256}
        with self.record.phase("CAI conversations", "cai_generate", "rows") as phase:
            resident.engine.on_progress = phase.step
            conversations = cai_conversations(
                self.config,
                resident.engine,
                data.cai_rows,
                self.store,
                facts,
            )
            resident.engine.on_progress = None
        rows = usable(conversations)
        if not rows:
            raise none_usable(conversations, cai)

        # SFT and DPO on the usable ones.
        num_rounds = self.config.federation.num_rounds
        pass_tokens = self.pass_tokens.get(DPO, 0)
        aligner = Aligner(
            resident.trainer,
            rows,
            resident.chat,
            cai,
            self.config.seed,
            num_rounds,
            pass_tokens,
        )

        # Counts for the log, and in the first session figures for the record.
        usage = CaiUsage.of(conversations, aligner)
        for line in usage.words():
            self.record.say(line)
        if new:
            figures_of_texts = count_metrics(conversations) | stage_metrics.of_cai_texts(
                conversations,
            )
            found = self._cai_findings(conversations, guard)
            self.record.append(PRETRAINED, "cai_data", figures_of_texts | found | usage.metrics())
        return aligner

    def _cai_findings(self, conversations: list[CaiRow], guard: LlamaGuard | None) -> Metrics:
        """Shares of harmful first responses, and of critiques and revisions that mend them.

        The embedded world's grammar rates its own questions; a guard classifies others where the
        run has one for replies (``eval.guard_judge``); else nothing is measured.
        """
        if is_embedded("data.square", self.config.data.square):
            return stage_metrics.of_cai_findings(judge_by_grammar(conversations))
        if guard is None:
            return {}
        with self.record.phase("guard judges the CAI conversations", "cai_judge"):
            return stage_metrics.of_cai_findings(judge_by_guard(guard)(conversations))


def _changed_rows(
    attack: ActiveAttack,
    shards: Sequence[list[SquareRow]],
) -> dict[int, list[SquareRow]]:
    """Rows of each attacker after its attack, by client."""
    return {client: attack.changed_rows(client, shards[client]) for client in attack.clients}


def tunes_guard(config: Config) -> bool:
    """True if the run fine-tunes a guard model, as its filter or as a judge of replies."""
    guard = config.guard
    return (guard.is_model and guard.tune_epochs > 0) or config.eval.guard_judge == "tuned"


def check_rows(config: Config, data: PreparedData) -> None:
    """Check before the first expensive stage that no stage will lack a row to learn from.

    Raises:
        DataError: no client has a row.
        ConfigError: a stage has no usable row, or no client trains in any round.
    """
    chat = load_chat(check_model_dir(config.model.path, "model.path"), "model.path")
    algorithm = build_algorithm(config.federation, config.server_optimizer)
    participation = algorithm.participation(config.federation, config.seed)
    check_local_rows(config, participation, chat, data.shards)
    if tunes_guard(config) and not data.guard_rows:
        raise data.guard_tally.none_left("guard rows")
    if config.cai.is_on:
        check_prompts(chat, [row.prompt for row in data.cai_rows], config.cai.max_length)
