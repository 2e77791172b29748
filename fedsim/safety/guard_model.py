"""Guard model of a run: loaded once, and fine-tuned once (an artefact that runs share)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Final

import torch

from fedsim.base import keyed_random
from fedsim.base.artefacts import ArtefactStore
from fedsim.base.ranks import Lane, Ranks
from fedsim.config import Config, GuardConfig
from fedsim.data.chat import TokenRow
from fedsim.data.prepared import PreparedData
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.model.load import LoadedModel, chosen_attention, load_model, model_digest
from fedsim.safety.guard import LlamaGuard
from fedsim.safety.guard_tuning import verdict_rows
from fedsim.train.loop import StepSettings, Trainer, TrainingPlan
from fedsim.train.objectives import SftObjective
from fedsim.train.zero import ZeroTrainer
from fedsim.train.zero_config import zero_settings

VERSION: Final = 1
"""Of fine-tuned guard adapters (:mod:`fedsim.base.artefacts`)."""

# Keys of the configuration that do not decide a guard model's probabilities: they choose the guard
# and what is done with its verdicts.
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
    },
)


class GuardModel:
    """Loader and fine-tuner of the guard model that ``guard.path`` names.

    Args:
        config: the run's configuration.
        ranks: shares the scoring.
        lane: shares the fine-tuning; all ranks.
        device: where the guard is loaded.
        store: artefacts.
        facts: further inputs that numbers depend on: device kind, threads, torch version.
        on_progress: called with a phase name, (done, total).
        pass_tokens: most tokens of a pass of fine-tuning outside exact mode; 0:
            ``micro_batch_size`` times ``max_length``.
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
        self.lane = lane
        self.device = device
        self.store = store
        self.facts = facts
        self.on_progress = on_progress
        self.pass_tokens = pass_tokens
        self._loaded: tuple[LoadedModel, FlatAdapter] | None = None
        self._sha256 = ""  # of the model directory; read where it is first needed

    def judge(self, data: PreparedData, *, tuned: bool, policy: str) -> LlamaGuard:
        """Return the guard under a policy's prompt.

        It is valid until the next call: guards share one model and adapter.

        Args:
            data: has the guard set for fine-tuning.
            tuned: use the fine-tuned adapter; False takes the model without fine-tuning.
            policy: hazard categories of the prompt. Fine-tuning always uses ``guard.policy``.
        """
        settings = self.config.guard
        model, adapter = self._guard_model()
        if tuned:
            adapter.load(self._tuned(data, model, adapter))
        else:
            adapter.load(adapter.initial(self.config.seed))
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
        """Return all that decides the guard's probabilities, except the classified rows.

        Args:
            data: has the guard set.
            tuned: of the fine-tuned guard.

        Returns:
            A JSON object: the guard's settings, digests of model and data, and the run's facts.
        """
        # The guard's settings; those of fine-tuning count only where it is fine-tuned.
        settings = {k: v for k, v in asdict(self.config.guard).items() if k not in _UNRELATED}
        if tuned:
            settings["rows"] = [row.row_id for row in data.guard_rows]
            settings["micro_batch_size"] = self.config.local.micro_batch_size
            settings["seed"] = self.config.seed
            settings["adapter_version"] = VERSION
            if self.config.guard.deepspeed:  # its sums depend on the number of ranks
                num_ranks = self.ranks.size
                settings["deepspeed"] = [zero_settings(self.config, num_ranks), num_ranks]
        else:
            settings = {k: v for k, v in settings.items() if not k.startswith(("tune_", "lora_"))}

        # The model: its weights, dtype and attention kernel.
        path, model = self.config.guard.path, self.config.model
        attention = chosen_attention(
            path,
            dtype=model.dtype,
            attention=model.attention,
            device=self.device,
            key="guard.path",
            ranks=self.ranks,
        )
        if not self._sha256:  # read once: the digest of 8B weights takes long
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
        """Return the adapter fine-tuned on the guard set, fp32 ``[size]``, from its artefact."""
        settings = self.config.guard
        depends = self.depends(data, tuned=True)
        del depends["guard"]["batch_tokens"]  # belongs to scoring

        def build() -> torch.Tensor:
            rows = verdict_rows(model.chat, data.guard_rows, settings.policy, settings.max_length)
            batches = tuning_batches(rows, settings, self.config.seed)
            adapter.load(adapter.initial(self.config.seed))
            # AdamW without weight decay on gradients of norm 1 at most; the rate decays to 0.
            steps = StepSettings(self.config.local.micro_batch_size, 1.0, 0.0, self.config.seed)
            plan = TrainingPlan(
                batches,
                lambda t: settings.tune_lr * (1 - t / len(batches)),
                ("guard_tuning",),
                what="guard fine-tuning",
                longest=settings.max_length,
                pass_tokens=self.pass_tokens,
            )
            self._trainer(model, adapter, steps).run(
                plan,
                SftObjective(),
                self.lane,
                lambda done, total: self.on_progress("guard fine-tuning", done, total),
            )
            return adapter.copy()

        artefact = self.store.get("guard-adapter", depends, VERSION, build, adapter.save)
        return adapter.read(artefact.folder)

    def _trainer(self, model: LoadedModel, adapter: FlatAdapter, steps: StepSettings) -> Trainer:
        """Return the trainer of fine-tuning, DeepSpeed's where it is configured."""
        if not self.config.guard.deepspeed:
            return Trainer(model.base, adapter, steps)
        return ZeroTrainer(model.base, adapter, steps, zero_settings(self.config, self.ranks.size))

    def _guard_model(self) -> tuple[LoadedModel, FlatAdapter]:
        """Return the guard's model and adapter, loaded on the first call."""
        if self._loaded is None:
            guard = self.config.guard
            model = self.config.model
            loaded = load_model(
                guard.path,
                guard.lora,
                dtype=model.dtype,
                attention=model.attention,
                device=self.device,
                key="guard.path",
                ranks=self.ranks,
            )
            self._loaded = loaded, FlatAdapter(loaded.model)
        return self._loaded


def tuning_batches(
    rows: Sequence[TokenRow],
    settings: GuardConfig,
    seed: int,
) -> list[list[TokenRow]]:
    """Return the rows of each fine-tuning step: ``tune_epochs`` passes, each in its own order.

    The last pass and the last step may be partial.
    """
    size = settings.tune_batch_size
    num_wanted = max(1, round(len(rows) * settings.tune_epochs))  # rows over all passes
    order: list[int] = []  # of rows, pass after pass
    for epoch in range(math.ceil(num_wanted / len(rows))):
        permutation = keyed_random.permutation(len(rows), seed, "guard_rows", epoch)
        order.extend(int(i) for i in permutation)
    batches = []
    for start in range(0, num_wanted, size):
        end = min(start + size, num_wanted)
        batches.append([rows[i] for i in order[start:end]])
    return batches
