"""TRL's trainers as peers: made anew for every run on one resident model, as OpenFedLLM does, rows in a given order.

Two settings: what OpenFedLLM's script sets (commit 14c6af2 of rui-ye/OpenFedLLM, config.py and training_scripts/
run_sft.sh: gradient checkpointing, a log every 100 steps, constant rate), the rest TRL's defaults; and equal settings:
no checkpointing, no logs, no preparation of rows that are ready, with padding and without.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, TrainerCallback

from fedsim.data.chat import TokenRow
from fedsim.train.objectives import Preference
from tools.bench.plain_loop import PeerModel

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # a trainer would report each start, and wait where it cannot

CHECKPOINTED = "gradient checkpointing, TRL's and OpenFedLLM's default"
EQUAL = "equal settings"
PADDING_FREE = "equal settings, padding-free"


class _Marks(TrainerCallback):
    """Marks the end of every step."""

    def __init__(self, mark: Callable[[], None]) -> None:
        self.mark = mark

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.mark()


class _InOrder:
    """For a trainer: batches in the dataset's order, ready rows taken as they are, losses kept on the device."""

    kept_losses: list[torch.Tensor]

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]

    def compute_loss(self, *given: Any, **named: Any) -> Any:
        loss = super().compute_loss(*given, **named)  # type: ignore[misc]
        self.kept_losses.append(loss.detach())
        return loss


def sft(
    peer: PeerModel,
    batches: Sequence[Sequence[TokenRow]],
    lr: float,
    folder: str,
    mark: Callable[[], None],
    *,
    equal: bool,
    padding_free: bool = False,
) -> list[torch.Tensor]:
    """A new SFTTrainer, one step a batch; the losses.

    Args:
        padding_free: rows of a batch end to end. TRL advises flash attention for it; with the peer's SDPA, transformers
            makes a mask of the positions, and the results are the same.
    """
    import datasets
    import trl

    class Trainer(_InOrder, trl.SFTTrainer):
        pass

    datasets.disable_progress_bars()
    rows = [row for batch in batches for row in batch]
    examples = {
        "input_ids": [row.input_ids.tolist() for row in rows],
        "labels": [np.where(row.loss_mask, row.input_ids, -100).tolist() for row in rows],
    }
    own: dict[str, Any] = {"max_length": None if padding_free else 512, "padding_free": padding_free}
    if equal:
        own["dataset_kwargs"] = {"skip_prepare_dataset": True}
    args = trl.SFTConfig(
        **_arguments(peer, batches, lr, folder, equal),
        **own,
    )
    trainer = Trainer(
        model=peer.model,
        args=args,
        train_dataset=datasets.Dataset.from_dict(examples),
        processing_class=_tokenizer(),
        callbacks=[_Marks(mark)],
    )
    return _train(trainer)


def dpo(
    peer: PeerModel,
    batches: Sequence[Sequence[Preference]],
    lr: float,
    beta: float,
    folder: str,
    mark: Callable[[], None],
    *,
    equal: bool,
) -> list[torch.Tensor]:
    """A new DPOTrainer, one step a batch; the reference is TRL's copy of the adapter."""
    import datasets
    import trl

    class Trainer(_InOrder, trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # it is tokenised

    if "ref" in peer.model.peft_config:
        peer.model.delete_adapter("ref")  # a second trainer on one model stumbles over it
    pairs = [pair for batch in batches for pair in batch]
    examples = {
        "prompt_ids": [p.chosen.input_ids[~p.chosen.loss_mask].tolist() for p in pairs],
        "chosen_ids": [p.chosen.input_ids[p.chosen.loss_mask].tolist() for p in pairs],
        "rejected_ids": [p.rejected.input_ids[p.rejected.loss_mask].tolist() for p in pairs],
    }
    trainer = Trainer(
        model=peer.model,
        args=trl.DPOConfig(**_arguments(peer, batches, lr, folder, equal), beta=beta),
        train_dataset=datasets.Dataset.from_dict(examples),
        processing_class=_tokenizer(),
        callbacks=[_Marks(mark)],
    )
    return _train(trainer)


def _arguments(
    peer: PeerModel, batches: Sequence[Sequence[object]], lr: float, folder: str, equal: bool
) -> dict[str, Any]:
    """What both trainers are told; ``bf16`` off, as TRL would turn a float32 model to mixed precision."""
    asked = {
        "output_dir": folder,
        "per_device_train_batch_size": len(batches[0]),
        "gradient_accumulation_steps": 1,
        "max_steps": len(batches),
        "learning_rate": lr,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": peer.device.type == "cpu",
        "bf16": peer.device.type == "cuda",
        "gradient_checkpointing": not equal,
    }
    if equal:
        return {**asked, "logging_strategy": "no", "logging_nan_inf_filter": False}
    return {**asked, "logging_steps": 100}


def _train(trainer: Any) -> list[torch.Tensor]:
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.kept_losses = []
    trainer.train()
    return list(trainer.kept_losses)


def _tokenizer() -> PreTrainedTokenizerFast:
    """What a trainer asks the pad token of."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
