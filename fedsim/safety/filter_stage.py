"""Safety filter of a run: classify every client's rows once, and act on the unsafe ones.

This module chooses the guard; :mod:`fedsim.safety.guard_model` loads and fine-tunes guard models.
A guard model's probabilities are an artefact shared by runs of any threshold and action.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Final

import torch

from fedsim.base.artefacts import ArtefactStore, file_digest, write_json
from fedsim.base.errors import ConfigError
from fedsim.base.ranks import Lane, Ranks
from fedsim.base.user_code import calling
from fedsim.config import Config
from fedsim.data.guard_prompt import POLICIES
from fedsim.data.prepared import PreparedData
from fedsim.data.square import SquareRow
from fedsim.evaluate.confusion import Verdict
from fedsim.extend import build, source_file
from fedsim.safety.filtering import Action, Filtered, by_shard, filter_shards, judge_shards
from fedsim.safety.guard import PART, Guard
from fedsim.safety.guard_model import GuardModel

KEY: Final = "guard.kind"
VERSION: Final = 1
"""Of a guard's verdicts on rows (:mod:`fedsim.base.artefacts`)."""


class FilterStage:
    """Stage that classifies the rows of all clients and takes the action.

    Args:
        config: the run's configuration.
        ranks: shares the scoring.
        lane: shares the guard's fine-tuning; all ranks.
        device: where a guard model is loaded.
        store: artefacts.
        facts: further inputs that numbers depend on: device kind, threads, torch version.
        on_progress: called with a phase name, (done, total).
        pass_tokens: see :class:`GuardModel`.

    Attributes:
        model: the guard model; nothing is loaded before it is needed.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        lane: Lane,
        device: torch.device,
        store: ArtefactStore,
        facts: dict[str, Any],
        on_progress: Callable[[str, int, int], None],
        pass_tokens: int = 0,
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.store = store
        self.facts = facts
        self.on_progress = on_progress
        self.model = GuardModel(config, ranks, lane, device, store, facts, on_progress, pass_tokens)

    def run(self, data: PreparedData) -> Filtered:
        """Return the rows that every client trains on, and counts of the filter.

        Without a guard all rows are kept.
        """
        settings = self.config.guard
        # A guard model, by its artefact.
        if settings.is_model:
            is_tuned = settings.tune_epochs > 0
            verdicts = self._model_verdicts(data, tuned=is_tuned, policy=settings.policy)
            return self._filter(data, verdicts)
        # Any other guard: a user's verdicts are an artefact, fedsim's own are cheap to compute.
        given = {"guard": settings, "seed": self.config.seed}
        guard = build(KEY, settings.kind, settings.options, given)
        file = source_file(KEY, settings.kind)
        if file is not None:
            return self._filter(data, self._users_verdicts(data, guard, file))
        return self._filter(data, judge_shards(guard, data.shards))

    def compare(self, data: PreparedData) -> dict[str, Filtered]:
        """Filter with the guard model before any fine-tuning (the paper's Table 2, first row).

        ``guard.measure_untuned`` adds the run's own policy, where the run's guard is fine-tuned,
        and ``guard.measure_policies`` every policy other than the run's.

        Returns:
            The filter's result by title.
        """
        settings = self.config.guard
        if not settings.is_model:
            return {}
        titles = {}  # by policy
        if settings.measure_untuned and settings.tune_epochs > 0:
            titles[settings.policy] = "untuned"
        if settings.measure_policies:
            for policy in POLICIES:
                if policy != settings.policy:
                    titles[policy] = f"untuned, policy {policy}"
        found = {}
        for policy, title in titles.items():
            verdicts = self._model_verdicts(data, tuned=False, policy=policy)
            found[title] = self._filter(data, verdicts)
        return found

    def _filter(self, data: PreparedData, verdicts: Sequence[Sequence[Verdict]]) -> Filtered:
        """Take the configured action on the rows called unsafe."""
        settings = self.config.guard
        action = Action(settings.action, settings.refusal, settings.red_weight)
        return filter_shards(data.shards, verdicts, action)

    def _model_verdicts(
        self,
        data: PreparedData,
        *,
        tuned: bool,
        policy: str,
    ) -> list[list[Verdict]]:
        """Return the guard model's verdicts, by client and row, from its artefact."""
        rows = list(chain.from_iterable(data.shards))
        depends = self.model.depends(data, tuned=tuned) | {"rows": [row.row_id for row in rows]}
        depends["guard"]["policy"] = policy
        if data.attacked:  # only then, so that runs without attackers share the artefact
            depends["attacked"] = data.attacked

        def compute() -> list[Verdict]:
            return self.model.judge(data, tuned=tuned, policy=policy).judge(rows)

        artefact = self.store.get("guard-verdicts", depends, VERSION, compute, _write_verdicts)
        verdicts = _read_verdicts(artefact.folder, self.config.guard.threshold)
        return by_shard(verdicts, data.shards)

    def _users_verdicts(self, data: PreparedData, guard: Guard, file: Path) -> list[list[Verdict]]:
        """Return the verdicts of a user's guard, by client and row.

        They are an artefact of the guard's file, its options and the rows.
        """
        settings, ranks = self.config.guard, self.ranks
        rows = list(chain.from_iterable(data.shards))
        units = [rows[start : start + PART] for start in range(0, len(rows), PART)]
        what = f"{KEY}={settings.kind!r}"
        # Everything that may decide the verdicts; the artefact's key is its digest.
        digest = ranks.once(lambda: file_digest(file))
        class_name = settings.kind.rpartition(":")[2]
        depends = {
            "guard": [digest, class_name, settings.options],
            "data": [data.source_sha256, self.config.data.language, data.attacked],
            "rows": [row.row_id for row in rows],
            "guard_rows": [row.row_id for row in data.guard_rows],
            **self.facts,
        }

        # Errors of the user's code name their place in the user's file.
        def classify(unit: list[SquareRow]) -> list[Verdict]:
            with calling(what, quiet=True):
                found = list(guard.judge(unit))
            is_typed = all(isinstance(verdict, Verdict) for verdict in found)
            if len(found) != len(unit) or not is_typed:
                rule = f"one fedsim.Verdict for each of {len(unit)} rows"
                raise ConfigError(f"{what}: judge must return {rule}")
            return found

        def report(count: int) -> None:
            self.on_progress("guard", count, len(units))

        def compute() -> list[Verdict]:
            with calling(what, quiet=True):
                guard.prepare(data.guard_rows)
            done = ranks.map(classify, units, on_done=report)
            return list(chain.from_iterable(done))

        name, write = "users-guard-verdicts", _write_users_verdicts
        artefact = self.store.get(name, depends, VERSION, compute, write)
        verdicts = [Verdict(*fields) for fields in _read(artefact.folder)]
        return by_shard(verdicts, data.shards)


def _write_users_verdicts(folder: Path, verdicts: Sequence[Verdict]) -> None:
    """Write all fields of verdicts."""
    fields = [[bool(v.unsafe), float(v.unsafe_prob), bool(v.cut)] for v in verdicts]
    write_json(folder / "verdicts.json", fields)


def _write_verdicts(folder: Path, verdicts: Sequence[Verdict]) -> None:
    """Write probabilities and cuts; a threshold belongs to the run that reads them."""
    write_json(folder / "verdicts.json", [[v.unsafe_prob, v.cut] for v in verdicts])


def _read_verdicts(folder: Path, threshold: float) -> list[Verdict]:
    """Read a file of :func:`_write_verdicts`, and classify at a threshold."""
    return [Verdict.at(threshold, prob, cut) for prob, cut in _read(folder)]


def _read(folder: Path) -> list[list[Any]]:
    """Read the fields of each row's verdict."""
    fields: list[list[Any]] = json.loads((folder / "verdicts.json").read_text(encoding="utf-8"))
    return fields
