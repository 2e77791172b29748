"""Guard scoring: one forward pass behind a shared head, beside a generated verdict and beside whole prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from fedsim.config import GuardConfig
from fedsim.generate.prefix import candidate_logits, read_head
from fedsim.model.cost import ModelCost, Work
from fedsim.model.load import LoraSettings
from fedsim.safety.guard import units_of
from tools.bench.lengths import draw, random_ids
from tools.bench.measure import percentiles, seconds_of, take_turns
from tools.bench.rows import Correctness, Row, Target
from tools.bench.stage import Bench

SHARED = 190  # tokens of Llama Guard 3's task and categories …
CLOSING = 44  # … and of its closing instruction with the assistant's header
MEAN = 360  # of a whole prompt
VERDICT = 8  # tokens of "\n\nunsafe\nS1,S2" and its end, in Llama 3's tokenizer
SAFE, UNSAFE = 19193, 39257  # any two tokens; modulo the vocabulary
LORA = LoraSettings(r=16, alpha=32.0, dropout=0.0, targets=("q_proj", "v_proj"))
BATCHES = (4, 8, 16, 32, 64)  # of generation, of which the best is taken
BUDGETS = {False: (GuardConfig.batch_tokens,), True: (1024, 2048, 4096, 8192, 16384)}  # by whether CUDA


class GuardStage:
    """See the module."""

    name = "guard"

    def check(self, bench: Bench) -> list[Correctness]:
        """Probabilities behind the shared head and of whole prompts; verdicts of ours and of generation."""
        guard = Guard(bench, 24)
        pair = guard.pair
        alone = torch.softmax(guard.scores(shared=0, most=1).double(), dim=1)[:, 1]
        shared = torch.softmax(guard.scores().double(), dim=1)[:, 1]
        clear = (alone - 0.5).abs() > (0.05 if bench.cuda else 1e-4)  # rounding decides the others
        said = torch.tensor([ids[0] == pair[1] for ids in guard.generated(8, forced=True)])
        return [
            Correctness(
                "probability of unsafe behind the shared head, against each whole prompt alone, max |Δ|",
                float((shared - alone).abs().max()),
                3e-2 if bench.cuda else 1e-5,
            ),
            Correctness(
                f"verdicts unlike those of generate, held to the two words, of {int(clear.sum())} clear ones",
                float((said != (shared > 0.5))[clear].sum()) if clear.any() else float("nan"),
                0.0,
            ),
        ]

    def time(self, bench: Bench) -> list[Row]:
        """All rows, tokenised; generation at its best batch size, and our own without a shared head."""
        count = 1024 if bench.cuda else 48
        guard = Guard(bench, count)
        size = fastest({rows: partial(guard.generated, rows) for rows in BATCHES if rows <= count}, bench)
        most = fastest({tokens: partial(guard.scores, most=tokens) for tokens in BUDGETS[bench.cuda]}, bench)
        calls: dict[str, Callable[[], Any]] = {
            "ours": lambda: guard.scores(most=most),
            "whole": lambda: guard.scores(shared=0, most=most),
            "generate": lambda: guard.generated(size),
        }
        found = take_turns(calls, bench.device, repeats=bench.repeats, warmups=1, budget_s=bench.budget_s)
        floor = guard.floor()
        peers = {
            "generate": f"model.generate of {VERDICT} tokens, {size} sorted rows padded left, same LoRA (transformers)",
            "whole": "ours without a shared head",
        }
        return [
            Row(
                self.name,
                f"{count} prompts of {MEAN} tokens, {SHARED} of them shared",
                bench.dtype_name,
                {"rows": count, "tokens": sum(map(len, guard.prompts)), "shared": SHARED, "batch_tokens": most},
                percentiles(found["ours"]),
                len(found["ours"]),
                peer=what,
                peer_seconds=percentiles(found[other]),
                figures={
                    "rows_per_min": 60 * count / percentiles(found["ours"]).p50,
                    "peer_rows_per_min": 60 * count / percentiles(found[other]).p50,
                },
                target=target(bench) if other == "generate" else None,
                floor_s=floor,
                floor="the head once and tails through the layers, of the last one keys and values alone, at the peak",
                note=f"attention: {peer(guard.model).config._attn_implementation}",
            )
            for other, what in peers.items()
        ]


STAGE = GuardStage()


def target(bench: Bench) -> Target:
    """What is asked of the row."""
    return Target("rows_per_min", 12_000.0) if bench.cuda else Target("ratio", 3.0)


def fastest(calls: dict[int, Callable[[], object]], bench: Bench) -> int:
    """The setting whose call takes least, of two each."""
    best = {setting: min(seconds_of(call, bench.device) for _ in range(2)) for setting, call in calls.items()}
    return min(best, key=lambda setting: best[setting])


class Guard:
    """A random guard with LoRA, and prompts that begin alike, shortest first."""

    def __init__(self, bench: Bench, count: int) -> None:
        self.bench = bench
        self.model, _ = bench.adapted(LORA)
        self.model.eval()
        vocab = bench.size.vocab_size
        self.pair = [SAFE % vocab, UNSAFE % vocab]
        half = (MEAN - SHARED - CLOSING) / 2
        lengths = sorted(
            p + r + CLOSING for p, r in zip(draw("prompt", count, half), draw("reply", count, half), strict=True)
        )
        head = random_ids(SHARED, vocab, "head")
        self.prompts = [np.asarray(head + random_ids(n, vocab, "tail", i), np.int32) for i, n in enumerate(lengths)]

    def scores(self, shared: int = SHARED, most: int = GuardConfig.batch_tokens) -> torch.Tensor:
        """Logits ``[rows, 2]``, as :class:`fedsim.safety.guard.LlamaGuard` computes them."""
        tails = [prompt[shared:] for prompt in self.prompts]
        head = read_head(self.model, self.prompts[0][:shared])
        units = units_of([len(tail) for tail in tails], most)
        return torch.cat([candidate_logits(self.model, head, [tails[i] for i in unit], self.pair) for unit in units])

    @torch.no_grad()
    def generated(self, rows: int, forced: bool = False) -> list[list[int]]:
        """New tokens of each prompt, greedily; ``forced``: the first is one of the two words."""
        base = peer(self.model)
        out: list[list[int]] = []
        for start in range(0, len(self.prompts), rows):
            batch = self.prompts[start : start + rows]
            out += generate(base, batch, self.pair if forced else None, self.bench.device)
        return out

    def floor(self) -> float:
        """Seconds at the device's peak."""
        base = peer(self.model)
        cost, tails = ModelCost.of(base), [len(prompt) - SHARED for prompt in self.prompts]
        work = Work(
            tokens=SHARED + sum(tails),
            pairs=SHARED**2 + sum(tail * (SHARED + tail) for tail in tails),
            passes=1 + len(units_of(tails, GuardConfig.batch_tokens)),
        )
        effort, peak = cost.forward(work), self.bench.peak()
        config = base.config
        layer = cost.body / config.num_hidden_layers
        keys_and_values = 2 * config.hidden_size * config.num_key_value_heads * config.head_dim
        flops = effort.flops - 2 * sum(tails) * (layer - keys_and_values)
        return max(flops / peak.flops, effort.num_bytes / peak.bytes_per_s)


def peer(model: PeftModel) -> PreTrainedModel:
    """The Hugging Face model inside."""
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    return base


def generate(
    base: Any, batch: Sequence[np.ndarray], allowed: list[int] | None, device: torch.device
) -> list[list[int]]:
    """One padded batch through transformers' generate, with transformers' own attention."""
    longest = max(map(len, batch))
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(batch):
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, longest - len(prompt) :] = 1
    ours = base.config._attn_implementation
    base.set_attn_implementation("sdpa")
    try:
        made = base.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            do_sample=False,
            max_new_tokens=VERDICT,
            pad_token_id=0,
            prefix_allowed_tokens_fn=None if allowed is None else lambda _row, _ids: allowed,
        )
    finally:
        base.set_attn_implementation(ours)
    new: list[list[int]] = made[:, longest:].tolist()
    return new
