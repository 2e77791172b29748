"""The safety filter of a run: fine-tune the guard once, judge every client's rows once, drop the unsafe ones.

Both results are artefacts: the runs behind one table share them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fedsim import keys
from fedsim.artefacts import ArtefactStore, write_json
from fedsim.config import Config, GuardConfig
from fedsim.data import batch, chat, square
from fedsim.data.chat import TokenRow
from fedsim.data.prepare import PreparedData
from fedsim.generate import prefix
from fedsim.model import flat_adapter, logprobs
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.model.load import LoadedModel, LoraSettings, load_model, model_digest
from fedsim.parallel import sums
from fedsim.parallel.ranks import Ranks
from fedsim.safety import guard, guard_format, guard_prompt, guard_tuning
from fedsim.safety.filtering import Filtered, drop_unsafe, judge_shards
from fedsim.safety.guard import LlamaGuard, NoisyOracleGuard, OracleGuard
from fedsim.safety.guard_tuning import verdict_rows
from fedsim.safety.verdict import Verdict
from fedsim.train import loop, objectives
from fedsim.train.loop import StepSettings, Trainer, TrainingLane, TrainingPlan
from fedsim.train.objectives import SftObjective

_CODE = [batch, chat, square, prefix, flat_adapter, logprobs, sums, guard, guard_format, guard_prompt, guard_tuning, loop, objectives, keys]  # fmt: skip
OnStep = Callable[[int, int], None]


class FilterStage:
    """Judges the federated set.

    Args:
        config: the run's configuration.
        ranks: shares the scoring.
        lane: shares the fine-tuning; all ranks.
        device: where the guard is loaded.
        store: artefacts.
        facts: what numbers depend on beside the configuration: device kind, threads, torch version.
        on_progress: called with a phase name, (done, total).
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        lane: TrainingLane,
        device: torch.device,
        store: ArtefactStore,
        facts: dict[str, Any],
        on_progress: Callable[[str, int, int], None],
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.lane = lane
        self.device = device
        self.store = store
        self.facts = facts
        self.on_progress = on_progress
        self.metrics: dict[str, float | int] = {}

    def run(self, data: PreparedData) -> Filtered:
        """Every client's kept rows and what the filter did; without a guard all rows are kept."""
        kind = self.config.guard.kind
        if kind == "none":
            verdicts = [[Verdict(False, 0.0) for _ in shard] for shard in data.shards]
        elif kind == "oracle":
            verdicts = judge_shards(OracleGuard(), data.shards)
        elif kind == "noisy_oracle":
            noisy = NoisyOracleGuard(self.config.guard.tpr, self.config.guard.fpr, self.config.seed)
            verdicts = judge_shards(noisy, data.shards)
        else:
            verdicts = self._model_verdicts(data)
        return drop_unsafe(data.shards, verdicts)

    def _model_verdicts(self, data: PreparedData) -> list[list[Verdict]]:
        rows = [row for shard in data.shards for row in shard]
        depends = self._depends(data) | {"rows": [row.row_id for row in rows]}
        settings = self.config.guard
        loaded: list[LoadedModel] = []

        def model() -> LoadedModel:
            if not loaded:
                lora = LoraSettings(
                    settings.lora_r, settings.lora_alpha, settings.lora_dropout, tuple(settings.lora_targets)
                )
                attention = self.config.model.attention
                dtype = self.config.model.dtype
                loaded.append(
                    load_model(
                        settings.path, lora, dtype=dtype, attention=attention, device=self.device, key="guard.path"
                    )
                )
            return loaded[0]

        def build() -> list[Verdict]:
            adapter = FlatAdapter(model().model)
            adapter.load(self._tuned(data, model(), adapter))
            judge = LlamaGuard(
                model().base,
                model().chat,
                self.ranks,
                policy=settings.policy,
                batch_size=settings.batch_size,
                threshold=settings.threshold,
                max_length=settings.max_length,
                on_progress=lambda done, total: self.on_progress("guard scoring", done, total),
            )
            return judge.judge(rows)

        artefact = self.store.get("guard-verdicts", depends, _CODE, build, _write_verdicts)
        verdicts = iter(_read_verdicts(artefact.folder))
        return [[next(verdicts) for _ in shard] for shard in data.shards]

    def _tuned(self, data: PreparedData, model: LoadedModel, adapter: FlatAdapter) -> torch.Tensor:
        """The guard's adapter: fine-tuned on the guard set, or the untouched start."""
        start = adapter.initial(self.config.seed)
        settings = self.config.guard
        if settings.tune_epochs == 0:
            return start
        depends = self._depends(data) | {"rows": [row.row_id for row in data.guard_rows]}

        def build() -> torch.Tensor:
            rows = verdict_rows(model.chat, data.guard_rows, settings.policy, settings.max_length)
            adapter.load(start)
            steps = StepSettings(self.config.local.micro_batch_size, 1.0, 0.0, self.config.seed)
            batches = tuning_batches(rows, settings, self.config.seed)
            plan = TrainingPlan(batches, lambda t: settings.tune_lr * (1 - t / len(batches)), ("guard_tuning",))
            pad = model.chat.pad_id
            report = self.on_progress
            Trainer(model.base, adapter, steps).run(
                plan, SftObjective(pad), self.lane, lambda done, total: report("guard fine-tuning", done, total)
            )
            return adapter.copy()

        artefact = self.store.get("guard-adapter", depends, _CODE, build, adapter.save)
        return adapter.read(artefact.folder)

    def _depends(self, data: PreparedData) -> dict[str, Any]:
        model = {k: getattr(self.config.model, k) for k in ("dtype", "attention")}
        return {
            "seed": self.config.seed,
            "guard": asdict(self.config.guard),
            "model": self.ranks.once(lambda: model_digest(self.config.guard.path)),
            "data": data.source_sha256,
            "micro_batch_size": self.config.local.micro_batch_size,
            **model,
            **self.facts,
        }


def tuning_batches(rows: Sequence[TokenRow], settings: GuardConfig, seed: int) -> list[list[TokenRow]]:
    """The rows of each fine-tuning step: ``tune_epochs`` passes, each in its own order; the last may be partial."""
    size = settings.tune_batch_size
    num_wanted = max(1, round(len(rows) * settings.tune_epochs))
    order = [
        int(i)
        for epoch in range(math.ceil(num_wanted / len(rows)))
        for i in keys.permutation(len(rows), seed, "guard_rows", epoch)
    ][:num_wanted]
    return [[rows[i] for i in order[start : start + size]] for start in range(0, len(order), size)]


def _write_verdicts(folder: Path, verdicts: Sequence[Verdict]) -> None:
    write_json(folder / "verdicts.json", [[v.unsafe, v.unsafe_prob, v.cut] for v in verdicts])


def _read_verdicts(folder: Path) -> list[Verdict]:
    return [Verdict(*entry) for entry in json.loads((folder / "verdicts.json").read_text(encoding="utf-8"))]
