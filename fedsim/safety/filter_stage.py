"""The safety filter of a run: every client's rows are judged once, and the action is taken on the unsafe ones.

Who judges is decided here; how the guard model is loaded and fine-tuned is :mod:`fedsim.safety.guard_model`'s. What a
guard model says (probabilities) is an artefact that runs share, whatever their threshold and action.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
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
from fedsim.safety.filtering import Action, Filtered, filter_shards, judge_shards
from fedsim.safety.guard import PART, Guard
from fedsim.safety.guard_model import GuardModel

KEY: Final = "guard.kind"
VERSION: Final = 1
"""Of a guard's verdicts on rows (:mod:`fedsim.base.artefacts`)."""


class FilterStage:
    """Judges the federated set and takes the action.

    Args:
        config: the run's configuration.
        ranks: shares the scoring.
        lane: shares the guard's fine-tuning; all ranks.
        device: where a guard model is loaded.
        store: artefacts.
        facts: what numbers depend on beside the configuration: device kind, threads, torch version.
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
        """The rows that every client trains on and what the filter did; without a guard all rows are kept."""
        settings = self.config.guard
        if settings.is_model:
            verdicts = self._model_verdicts(data, tuned=settings.tune_epochs > 0, policy=settings.policy)
        else:
            guard = build(KEY, settings.kind, settings.options, {"guard": settings, "seed": self.config.seed})
            file = source_file(KEY, settings.kind)
            verdicts = judge_shards(guard, data.shards) if file is None else self._users_verdicts(data, guard, file)
        return self._filter(data, verdicts)

    def compare(self, data: PreparedData) -> dict[str, Filtered]:
        """What the guard model would do as it is, before any fine-tuning (the paper's Table 2, first row), by title.

        ``guard.measure_untuned`` asks for the run's own policy, where the run's guard is fine-tuned, and
        ``guard.measure_policies`` for every policy that the run's guard is not asked under.
        """
        settings = self.config.guard
        if not settings.is_model:
            return {}
        titles = {settings.policy: "untuned"} if settings.measure_untuned and settings.tune_epochs > 0 else {}
        if settings.measure_policies:
            titles |= {policy: f"untuned, policy {policy}" for policy in POLICIES if policy != settings.policy}
        return {
            title: self._filter(data, self._model_verdicts(data, tuned=False, policy=policy))
            for policy, title in titles.items()
        }

    def _filter(self, data: PreparedData, verdicts: Sequence[Sequence[Verdict]]) -> Filtered:
        settings = self.config.guard
        return filter_shards(data.shards, verdicts, Action(settings.action, settings.refusal, settings.red_weight))

    def _model_verdicts(self, data: PreparedData, *, tuned: bool, policy: str) -> list[list[Verdict]]:
        rows = [row for shard in data.shards for row in shard]
        depends = self.model.depends(data, tuned=tuned) | {"rows": [row.row_id for row in rows]}
        depends["guard"]["policy"] = policy

        def compute() -> list[Verdict]:
            return self.model.judge(data, tuned=tuned, policy=policy).judge(rows)

        depends |= {"attacked": data.attacked} if data.attacked else {}
        artefact = self.store.get("guard-verdicts", depends, VERSION, compute, _write_verdicts)
        return _shaped(_read_verdicts(artefact.folder, self.config.guard.threshold), data)

    def _users_verdicts(self, data: PreparedData, guard: Guard, file: Path) -> list[list[Verdict]]:
        """A user's guard's verdicts, an artefact of its file's content, its options and the rows."""
        settings, ranks = self.config.guard, self.ranks
        rows = [row for shard in data.shards for row in shard]
        units = [rows[start : start + PART] for start in range(0, len(rows), PART)]
        what = f"{KEY}={settings.kind!r}"
        depends = {
            "guard": [ranks.once(lambda: file_digest(file)), settings.kind.rpartition(":")[2], settings.options],
            "data": [data.source_sha256, self.config.data.language, data.attacked],
            "rows": [row.row_id for row in rows],
            "guard_rows": [row.row_id for row in data.guard_rows],
            **self.facts,
        }

        def judge(unit: list[SquareRow]) -> list[Verdict]:
            with calling(what, quiet=True):
                found = list(guard.judge(unit))
            if len(found) != len(unit) or not all(isinstance(verdict, Verdict) for verdict in found):
                raise ConfigError(f"{what}: judge must return one fedsim.Verdict for each of {len(unit)} rows")
            return found

        def compute() -> list[Verdict]:
            with calling(what, quiet=True):
                guard.prepare(data.guard_rows)
            done = ranks.map(judge, units, on_done=lambda count: self.on_progress("guard", count, len(units)))
            return [verdict for unit in done for verdict in unit]

        artefact = self.store.get("users-guard-verdicts", depends, VERSION, compute, _write_users_verdicts)
        found = json.loads((artefact.folder / "verdicts.json").read_text(encoding="utf-8"))
        return _shaped([Verdict(*one) for one in found], data)


def _shaped(verdicts: Sequence[Verdict], data: PreparedData) -> list[list[Verdict]]:
    """Verdicts on all rows as those of each client's."""
    rest = iter(verdicts)
    return [[next(rest) for _ in shard] for shard in data.shards]


def _write_users_verdicts(folder: Path, verdicts: Sequence[Verdict]) -> None:
    write_json(folder / "verdicts.json", [[bool(v.unsafe), float(v.unsafe_prob), bool(v.cut)] for v in verdicts])


def _write_verdicts(folder: Path, verdicts: Sequence[Verdict]) -> None:
    """Probabilities and cuts; a threshold belongs to the run that reads them."""
    write_json(folder / "verdicts.json", [[v.unsafe_prob, v.cut] for v in verdicts])


def _read_verdicts(folder: Path, threshold: float) -> list[Verdict]:
    scores = json.loads((folder / "verdicts.json").read_text(encoding="utf-8"))
    return [Verdict.at(threshold, prob, cut) for prob, cut in scores]
