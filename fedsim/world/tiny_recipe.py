"""Recipe of the embedded model: training from scratch on the tiny world's conversations.

A drill teaches copying, stage 1 unaligned web talk with hidden authors, stage 2 alignment. Every
conversation is drawn from its own key and a single thread computes, so that the same machine gives
the same weights bit for bit.
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
    """One stage: its conversations, its number of steps and its peak learning rate."""

    name: str
    talk: Talk
    num_steps: int
    lr: float


@dataclass(frozen=True)
class Recipe:
    """All settings that determine the weights (besides the machine)."""

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
        scaled = []
        for stage in stages:
            num_steps = max(1, round(stage.num_steps * self.steps_scale))
            scaled.append(replace(stage, num_steps=num_steps))
        return tuple(scaled)


def encode_conversations(tokenizer: PreTrainedTokenizerFast, talks: list[list[Turn]]) -> list[Row]:
    """Token ids as by the chat template, and a mask of learnt replies with their end tokens."""
    special = tokenizer.added_tokens_encoder
    bos, header, end_header, eot = (special[token] for token in (BOS, HEADER, END_HEADER, EOT))

    # All texts in one call. Not the backend's own batch call: it keeps the padding that an earlier
    # call may have switched on.
    texts = ["user", "assistant", "\n\n"]
    for talk in talks:
        for turn in talk:
            texts += [turn.user.strip(), turn.reply]
    contents = iter(tokenizer(texts, add_special_tokens=False, padding=False).input_ids)
    user, assistant, blank = next(contents), next(contents), next(contents)

    # The frame of each turn around its texts.
    rows = []
    for talk in talks:
        ids, learn = [bos], [False]
        for turn in talk:
            asked = [header, *user, end_header, *blank, *next(contents), eot]
            asked += [header, *assistant, end_header, *blank]
            replied = [*next(contents), eot]
            ids += asked + replied
            learn += [False] * len(asked) + [turn.learn] * len(replied)
        rows.append((ids, learn))
    return rows


def padded_groups(
    rows: list[Row],
    pad_id: int,
    group_tokens: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Group rows of similar length, right-padded (under causal attention padding changes nothing).

    Yields ids ``[rows, length]`` int64 and the learnt positions ``[rows, length]`` bool.
    """
    rows = sorted(rows, key=lambda row: len(row[0]))
    while rows:
        # As many rows as fit, padded to the longest of them.
        count = 1
        while count < len(rows) and (count + 1) * len(rows[count][0]) <= group_tokens:
            count += 1
        group, rows = rows[:count], rows[count:]
        length = len(group[-1][0])
        ids = torch.tensor([r[0] + [pad_id] * (length - len(r[0])) for r in group])
        learn = torch.tensor([r[1] + [False] * (length - len(r[1])) for r in group])
        yield ids, learn


def summed_loss(model: LlamaForCausalLM, ids: torch.Tensor, learn: torch.Tensor) -> torch.Tensor:
    """Cross-entropy summed over the learnt tokens."""
    # Only positions with a target are projected onto the vocabulary.
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    targets = learn[:, 1:]
    logits = model.lm_head(hidden[targets])  # [learnt tokens, vocabulary]
    return functional.cross_entropy(logits, ids[:, 1:][targets], reduction="sum")


def learning_rate(stage: Stage, step: int, warmup_steps: int) -> float:
    """Linear warm-up, then a cosine that ends at 2 % of the peak."""
    warmup = min(1.0, (step + 1) / warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * step / stage.num_steps))
    return stage.lr * warmup * (cosine + 0.02)


def train_stage(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    stage: Stage,
    report: Callable[[str, int, float], None] = lambda name, step, loss: None,
) -> list[float]:
    """Train one stage in place; returns the mean loss per learnt token of every step."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=stage.lr,
        betas=(0.9, 0.98),
        weight_decay=recipe.weight_decay,
        foreach=True,
    )
    losses = []
    for step in range(stage.num_steps):
        # The step's conversations, one key each.
        talks = []
        for row in range(recipe.batch_size):
            key = derive(recipe.seed, "tiny", stage.name, step, row)
            talks.append(stage.talk(random.Random(key)))
        rows = encode_conversations(tokenizer, talks)

        # Gradient of the mean loss, summed over groups of rows.
        num_learnt = sum(sum(learn[1:]) for _, learn in rows)
        total = 0.0
        for ids, learn in padded_groups(rows, tokenizer.pad_token_id, recipe.group_tokens):
            loss = summed_loss(model, ids, learn) / num_learnt
            loss.backward()
            total += loss.item()

        # One optimizer step.
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
    """Run the whole recipe; returns the model to evaluate, the tokenizer and all steps' losses."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tokenizer = build_tokenizer()
        model = build_model(tokenizer, recipe.seed).train()
        losses: list[float] = []
        for stage in recipe.stages():
            losses += train_stage(model, tokenizer, recipe, stage, report)
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
    """Write the Hugging Face directory and ``recipe.json`` in it; returns the record."""
    model.save_pretrained(directory)
    weights = directory / "model.safetensors"
    # The same bytes, with the umask's file mode.
    write_tensors(weights, load_file(str(weights)), {"format": "pt"})
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
