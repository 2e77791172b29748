"""The run's guard model: loaded once, fine-tuned once (an artefact that runs share), handed out as a judge."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Final

import torch

from fedsim import attention, fused, kernels, keys
from fedsim.artefacts import ArtefactStore
from fedsim.config import Config, GuardConfig
from fedsim.data import batch, chat, markers, prepare, template, thoughts
from fedsim.data.chat import TokenRow
from fedsim.data.prepare import PreparedData
from fedsim.generate import prefix, slots
from fedsim.model import fitness, flat_adapter, load, logprobs
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.model.load import LoadedModel, LoraSettings, chosen_attention, load_model, model_digest
from fedsim.parallel import sums, zero, zero_config
from fedsim.parallel.zero import ZeroTrainer
from fedsim.parallel.zero_config import zero_settings
from fedsim.ranks import Lane, Ranks
from fedsim.safety import guard, guard_format, guard_prompt, guard_tuning
from fedsim.safety.guard import LlamaGuard
from fedsim.safety.guard_tuning import verdict_rows
from fedsim.train import dropout, loop, objectives
from fedsim.train.loop import StepSettings, Trainer, TrainingPlan
from fedsim.train.objectives import SftObjective

CODE: Final = (
    *(attention, batch, chat, markers, template, thoughts, *prepare.CODE, prefix, slots, flat_adapter, logprobs),
    *(fitness, sums, loop, objectives, keys, dropout, kernels, fused, load, zero, zero_config),
    *(guard, guard_format, guard_prompt, guard_tuning),
    sys.modules[__name__],
)
"""Modules that decide what a guard says about a row."""

# Keys of the configuration that do not decide a guard's probabilities: which guard is asked, what becomes of a verdict.
_UNRELATED: Final = frozenset(
    {
        "kind",
        "options",
        "path",
        "tpr",
        "fpr",
        "measure_untuned",
        "measure_policies",
        "threshold",
        "action",
        "refusal",
        "red_weight",
        "deepspeed",
    }
)


class GuardModel:
    """Loads, fine-tunes and hands out the guard that ``guard.path`` names.

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
        self._loaded: tuple[LoadedModel, FlatAdapter] | None = None
        self._sha256 = ""  # of the model directory; read where it is first needed

    def judge(self, data: PreparedData, *, tuned: bool, policy: str) -> LlamaGuard:
        """The guard, ready to score under a policy's prompt. It is good until the next one is asked for.

        Args:
            data: whose guard set it is fine-tuned on.
            tuned: with its fine-tuned adapter; False takes the model as it is.
            policy: hazard categories of the prompt. Fine-tuning always uses ``guard.policy``.
        """
        settings = self.config.guard
        model, adapter = self._guard_model()
        adapter.load(self._tuned(data, model, adapter) if tuned else adapter.initial(self.config.seed))
        return LlamaGuard(
            model.base,
            model.chat,
            self.ranks,
            policy=policy,
            batch_tokens=settings.batch_tokens,
            threshold=settings.threshold,
            max_length=settings.max_length,
            on_progress=lambda done, total: self.on_progress("guard scoring", done, total),
        )

    def depends(self, data: PreparedData, *, tuned: bool) -> dict[str, Any]:
        """What the guard's probabilities depend on beside the code and the rows that are judged."""
        settings = {k: v for k, v in asdict(self.config.guard).items() if k not in _UNRELATED}
        if tuned:
            settings["rows"] = [row.row_id for row in data.guard_rows]
            settings["micro_batch_size"] = self.config.local.micro_batch_size
            settings["seed"] = self.config.seed
            if self.config.guard.deepspeed:  # its sums depend on the number of ranks
                settings["deepspeed"] = [zero_settings(self.config, self.ranks.size), self.ranks.size]
        else:
            settings = {k: v for k, v in settings.items() if not k.startswith(("tune_", "lora_"))}
        path, model = self.config.guard.path, self.config.model
        attention = chosen_attention(
            path,
            dtype=model.dtype,
            attention=model.attention,
            device=self.device,
            key="guard.path",
            ranks=self.ranks,
        )
        if not self._sha256:
            self._sha256 = self.ranks.once(lambda: model_digest(path, self.store.digests))
        return {
            "guard": settings,
            "tuned": tuned,
            "model": self._sha256,
            "dtype": model.dtype,
            "attention": attention.name,
            "data": data.source_sha256,
            "language": self.config.data.language,
            **self.facts,
        }

    def _tuned(self, data: PreparedData, model: LoadedModel, adapter: FlatAdapter) -> torch.Tensor:
        """The guard's adapter, fine-tuned on the guard set; it does not depend on how rows are scored."""
        settings = self.config.guard
        depends = self.depends(data, tuned=True)
        del depends["guard"]["batch_tokens"]

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
                longest=settings.max_length,
            )
            self._trainer(model, adapter, steps).run(
                plan,
                SftObjective(),
                self.lane,
                lambda done, total: self.on_progress("guard fine-tuning", done, total),
            )
            return adapter.copy()

        artefact = self.store.get("guard-adapter", depends, CODE, build, adapter.save)
        return adapter.read(artefact.folder)

    def _trainer(self, model: LoadedModel, adapter: FlatAdapter, steps: StepSettings) -> Trainer:
        if not self.config.guard.deepspeed:
            return Trainer(model.base, adapter, steps)
        return ZeroTrainer(model.base, adapter, steps, zero_settings(self.config, self.ranks.size))

    def _guard_model(self) -> tuple[LoadedModel, FlatAdapter]:
        if self._loaded is None:
            guard = self.config.guard
            lora = LoraSettings(guard.lora_r, guard.lora_alpha, guard.lora_dropout, tuple(guard.lora_targets))
            model = self.config.model
            loaded = load_model(
                guard.path,
                lora,
                dtype=model.dtype,
                attention=model.attention,
                device=self.device,
                key="guard.path",
                ranks=self.ranks,
            )
            self._loaded = loaded, FlatAdapter(loaded.model)
        return self._loaded


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
