"""The safety filter of a run: fine-tune the guard once, judge every client's rows once, drop the unsafe ones.

Both results are artefacts: the runs behind one table share them.
"""

from __future__ import annotations

import json
import math
import sys
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
from fedsim.kernels import fixed_point
from fedsim.model import flat_adapter, load, logprobs
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.model.load import LoadedModel, LoraSettings, load_model, model_digest
from fedsim.parallel import sums, zero, zero_config
from fedsim.parallel.zero import ZeroTrainer
from fedsim.parallel.zero_config import zero_settings
from fedsim.ranks import Lane, Ranks
from fedsim.safety import guard, guard_format, guard_prompt, guard_tuning, verdict
from fedsim.safety.filtering import Filtered, drop_unsafe, judge_shards
from fedsim.safety.guard import LlamaGuard, NoisyOracleGuard, OracleGuard
from fedsim.safety.guard_tuning import verdict_rows
from fedsim.safety.verdict import Verdict
from fedsim.train import loop, objectives
from fedsim.train.loop import StepSettings, Trainer, TrainingPlan
from fedsim.train.objectives import SftObjective

_CODE = [
    *(batch, chat, square, prefix, flat_adapter, logprobs, sums, loop, objectives, keys, fixed_point),
    *(guard, guard_format, guard_prompt, guard_tuning, verdict, load, zero, zero_config, sys.modules[__name__]),
]


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
        lane: Lane,
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
        self._model: LoadedModel | None = None
        self._model_sha256 = ""  # of the guard; read where a guard model is used

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
            verdicts = self._model_verdicts(data, tuned=self.config.guard.tune_epochs > 0)
        return drop_unsafe(data.shards, verdicts)

    def run_untuned(self, data: PreparedData) -> Filtered:
        """What the guard model would keep as it is, to compare (the paper's Table 2, first row)."""
        return drop_unsafe(data.shards, self._model_verdicts(data, tuned=False))

    def _model_verdicts(self, data: PreparedData, *, tuned: bool) -> list[list[Verdict]]:
        rows = [row for shard in data.shards for row in shard]
        if not self._model_sha256:
            self._model_sha256 = self.ranks.once(lambda: model_digest(self.config.guard.path))
        depends = self._depends(data, tuned=tuned) | {"rows": [row.row_id for row in rows]}

        def build() -> list[Verdict]:
            model = self._guard_model()
            adapter = FlatAdapter(model.model)
            adapter.load(self._tuned(data, model, adapter) if tuned else adapter.initial(self.config.seed))
            settings = self.config.guard
            judge = LlamaGuard(
                model.base,
                model.chat,
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
        """The guard's adapter, fine-tuned on the guard set; it does not depend on how rows are scored."""
        settings = self.config.guard
        depends = self._depends(data, tuned=True)
        for name in ("threshold", "batch_size"):
            del depends["guard"][name]

        def build() -> torch.Tensor:
            rows = verdict_rows(model.chat, data.guard_rows, settings.policy, settings.max_length)
            adapter.load(adapter.initial(self.config.seed))
            steps = StepSettings(self.config.local.micro_batch_size, 1.0, 0.0, self.config.seed)
            batches = tuning_batches(rows, settings, self.config.seed)
            plan = TrainingPlan(
                batches,
                lambda t: settings.tune_lr * (1 - t / len(batches)),
                ("guard_tuning",),
                what="guard fine-tuning",
            )
            self._trainer(model, adapter, steps).run(
                plan,
                SftObjective(model.chat.pad_id),
                self.lane,
                lambda done, total: self.on_progress("guard fine-tuning", done, total),
            )
            return adapter.copy()

        artefact = self.store.get("guard-adapter", depends, _CODE, build, adapter.save)
        return adapter.read(artefact.folder)

    def _trainer(self, model: LoadedModel, adapter: FlatAdapter, steps: StepSettings) -> Trainer:
        if not self.config.guard.deepspeed:
            return Trainer(model.base, adapter, steps)
        return ZeroTrainer(model.base, adapter, steps, zero_settings(self.config, self.ranks.size))

    def _guard_model(self) -> LoadedModel:
        if self._model is None:
            guard = self.config.guard
            lora = LoraSettings(guard.lora_r, guard.lora_alpha, guard.lora_dropout, tuple(guard.lora_targets))
            model = self.config.model
            self._model = load_model(
                guard.path, lora, dtype=model.dtype, attention=model.attention, device=self.device, key="guard.path"
            )
        return self._model

    def _depends(self, data: PreparedData, *, tuned: bool) -> dict[str, Any]:
        unrelated = {"kind", "path", "tpr", "fpr", "measure_untuned", "deepspeed"}
        settings = {k: v for k, v in asdict(self.config.guard).items() if k not in unrelated}
        if not tuned:
            settings = {k: v for k, v in settings.items() if not k.startswith(("tune_", "lora_"))}
        else:
            settings["rows"] = [row.row_id for row in data.guard_rows]
            settings["micro_batch_size"] = self.config.local.micro_batch_size
            settings["seed"] = self.config.seed
            if self.config.guard.deepspeed:  # its sums depend on the number of ranks
                settings["deepspeed"] = [zero_settings(self.config, self.ranks.size), self.ranks.size]
        return {
            "guard": settings,
            "tuned": tuned,
            "model": self._model_sha256,
            "dtype": self.config.model.dtype,
            "attention": self.config.model.attention,
            "data": data.source_sha256,
            "language": self.config.data.language,
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
