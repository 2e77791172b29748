"""The recipe of the embedded model: training from scratch on the tiny world's conversations.

A drill teaches copying, stage 1 learns unaligned web talk with hidden authors, stage 2 aligns. Every conversation is
drawn from its own key, a single thread computes, and so the same machine gives the same weights bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from fedsim.base.keyed_random import derive
from fedsim.base.tensor_file import write_tensors
from fedsim.data.guard_prompt import render_guard_prompt
from fedsim.world.conversations import Turn, aligned_talk, echo_drill, web_talk
from fedsim.world.tiny_model import BOS, END_HEADER, EOT, HEADER, build_model, build_tokenizer
from fedsim.world.tiny_skills import Skill

Talk = Callable[[random.Random], list[Turn]]
Row = tuple[list[int], list[bool]]  # token ids; whether each one is to be predicted


@dataclass(frozen=True)
class Stage:
    """One stage: what its conversations are, how many steps it takes and its peak learning rate."""

    name: str
    talk: Talk
    num_steps: int
    lr: float


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights (besides the machine)."""

    seed: int = 0
    steps_scale: float = 1.0
    batch_size: int = 32  # conversations a step
    group_tokens: int = 1536  # padded tokens of one forward pass
    warmup_steps: int = 40
    weight_decay: float = 0.01

    def stages(self) -> tuple[Stage, ...]:
        """The stages in order, their steps scaled by ``steps_scale``."""
        stages = (
            Stage("echo_drill", echo_drill, 300, 3e-3),
            Stage("web_talk", web_talk, 1150, 3e-3),
            Stage("alignment", lambda rng: aligned_talk(rng, render_guard_prompt), 450, 1e-3),
        )
        return tuple(replace(s, num_steps=max(1, round(s.num_steps * self.steps_scale))) for s in stages)


def encode_conversations(tokenizer: PreTrainedTokenizerFast, talks: list[list[Turn]]) -> list[Row]:
    """Token ids as the chat template gives them, and the tokens of learnt replies (their end token included)."""
    bos, header, end_header, eot = (tokenizer.added_tokens_encoder[t] for t in (BOS, HEADER, END_HEADER, EOT))
    texts = [text for talk in talks for turn in talk for text in (turn.user.strip(), turn.reply)]
    # Not the backend's own batch call: the backend keeps the padding that an earlier call may have switched on.
    contents = iter(tokenizer(["user", "assistant", "\n\n", *texts], add_special_tokens=False, padding=False).input_ids)
    user, assistant, blank = next(contents), next(contents), next(contents)
    rows = []
    for talk in talks:
        ids, learn = [bos], [False]
        for turn in talk:
            asked = [header, *user, end_header, *blank, *next(contents), eot, header, *assistant, end_header, *blank]
            replied = [*next(contents), eot]
            ids += asked + replied
            learn += [False] * len(asked) + [turn.learn] * len(replied)
        rows.append((ids, learn))
    return rows


def padded_groups(rows: list[Row], pad_id: int, group_tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows of similar length together, right-padded (under causal attention the padding changes nothing).

    Yields ids ``[rows, length]`` int64 and the learnt positions ``[rows, length]`` bool.
    """
    rows = sorted(rows, key=lambda row: len(row[0]))
    while rows:
        count = 1
        while count < len(rows) and (count + 1) * len(rows[count][0]) <= group_tokens:
            count += 1
        group, rows = rows[:count], rows[count:]
        length = len(group[-1][0])
        ids = torch.tensor([r[0] + [pad_id] * (length - len(r[0])) for r in group])
        learn = torch.tensor([r[1] + [False] * (length - len(r[1])) for r in group])
        yield ids, learn


def summed_loss(model: LlamaForCausalLM, ids: torch.Tensor, learn: torch.Tensor) -> torch.Tensor:
    """Cross-entropy summed over the learnt tokens; only their positions are projected onto the vocabulary."""
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    targets = learn[:, 1:]
    return functional.cross_entropy(model.lm_head(hidden[targets]), ids[:, 1:][targets], reduction="sum")


def learning_rate(stage: Stage, step: int, warmup_steps: int) -> float:
    """Linear warm-up, then a cosine that ends at 2 % of the peak."""
    return (
        stage.lr * min(1.0, (step + 1) / warmup_steps) * (0.5 * (1 + math.cos(math.pi * step / stage.num_steps)) + 0.02)
    )


def train_stage(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    stage: Stage,
    report: Callable[[str, int, float], None] = lambda name, step, loss: None,
) -> list[float]:
    """Train in place; returns the mean loss per learnt token of every step."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=stage.lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay, foreach=True
    )
    losses = []
    for step in range(stage.num_steps):
        keys = (derive(recipe.seed, "tiny", stage.name, step, row) for row in range(recipe.batch_size))
        rows = encode_conversations(tokenizer, [stage.talk(random.Random(key)) for key in keys])
        num_learnt = sum(sum(learn[1:]) for _, learn in rows)
        total = 0.0
        for ids, learn in padded_groups(rows, tokenizer.pad_token_id, recipe.group_tokens):
            loss = summed_loss(model, ids, learn) / num_learnt
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(stage, step, recipe.warmup_steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
        report(stage.name, step, total)
    return losses


def train(
    recipe: Recipe, report: Callable[[str, int, float], None] = lambda name, step, loss: None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, list[float]]:
    """The whole recipe; returns the model in evaluation mode, the tokenizer and the losses of all steps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tokenizer = build_tokenizer()
        model = build_model(tokenizer, recipe.seed).train()
        losses = [loss for stage in recipe.stages() for loss in train_stage(model, tokenizer, recipe, stage, report)]
    finally:
        torch.set_num_threads(threads)
    return model.eval(), tokenizer, losses


def save_model(
    directory: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    losses: list[float],
    skills: Mapping[str, Skill],
    cpu_seconds: float,
) -> dict[str, Any]:
    """Write the Hugging Face directory and ``recipe.json`` beside it; returns the record."""
    model.save_pretrained(directory)
    weights = directory / "model.safetensors"
    write_tensors(weights, load_file(str(weights)), {"format": "pt"})  # the same bytes with the umask's mode
    tokenizer.save_pretrained(directory)
    record = {
        "sha256": weights_hash(directory),
        "recipe": asdict(recipe),
        "stages": [{"name": s.name, "num_steps": s.num_steps, "lr": s.lr} for s in recipe.stages()],
        "num_parameters": model.num_parameters(),
        "final_loss": round(sum(losses[-50:]) / len(losses[-50:]), 4),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "machine": f"{platform.system()} {platform.machine()}, one thread",
        "train_cpu_seconds": round(cpu_seconds, 1),
        "skills": {name: skill.as_dict() for name, skill in skills.items()},
    }
    (directory / "recipe.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def weights_hash(directory: Path) -> str:
    """SHA-256 of the directory's ``model.safetensors``, in hexadecimal."""
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
