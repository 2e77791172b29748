"""Guard scoring: one forward pass behind a shared head, beside a generated verdict and beside whole prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel, StoppingCriteriaList

from fedsim.attention.prefix import candidate_logits, read_head
from fedsim.config import GuardConfig
from fedsim.config.lora import LoraSettings
from fedsim.model.cost import Effort, ModelCost, Work
from fedsim.safety.guard import units_of
from fedsim.study.bench_rows import Correctness, Row, Target
from tools.bench.generation import Limits
from tools.bench.lengths import draw, random_ids
from tools.bench.measure import percentiles, seconds_of, take_turns
from tools.bench.plain_loop import PeerModel
from tools.bench.stage import Bench

SHARED = 190  # tokens of Llama Guard 3's task and categories …
CLOSING = 44  # … and of its closing instruction with the assistant's header
MEAN = 360  # of a whole prompt
SAFE_TOKENS = 3  # of "\n\nsafe" and its end, in Llama 3's tokenizer …
UNSAFE_TOKENS = (6, 7, 8)  # … and of "\n\nunsafe\nS1" up to "\n\nunsafe\nS1,S2"
SAFE, UNSAFE = 19193, 39257  # any two tokens; modulo the vocabulary
LORA = LoraSettings(r=16, alpha=32.0, dropout=0.0, targets=("q_proj", "v_proj"))
ROWS = {False: 64, True: 512}  # by whether CUDA
BATCHES = {False: (8, 16, 32), True: (32, 64)}  # of generation, of which the best is taken
LEAST = {False: 2, True: 1}  # repeats, however long they take
BUDGETS = {False: (GuardConfig.batch_tokens,), True: (2048, 4096, 8192, 16384)}


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
        count = ROWS[bench.cuda]
        guard = Guard(bench, count)
        some = {rows: guard.thinned(max(rows, count // 4)) for rows in BATCHES[bench.cuda]}
        size = fastest({rows: (partial(few.generated, rows), len(few.prompts)) for rows, few in some.items()}, bench)
        most, few = GuardConfig.batch_tokens, guard.thinned(count // 4)
        if len(BUDGETS[bench.cuda]) > 1:
            most = fastest({n: (partial(few.scores, most=n), len(few.prompts)) for n in BUDGETS[bench.cuda]}, bench)
        calls: dict[str, Callable[[], Any]] = {
            "ours": lambda: guard.scores(most=most),
            "whole": lambda: guard.scores(shared=0, most=most),
            "generate": lambda: guard.generated(size),
            "one token": lambda: guard.generated(size, verdicts=False),
        }
        for name in ("ours", "whole"):  # kernels are set up; the peer's were when it was tuned
            seconds_of(calls[name], bench.device)
        found = take_turns(
            calls,
            bench.device,
            repeats=bench.repeats,
            warmups=0,
            budget_s=bench.budget_s,
            least=LEAST[bench.cuda],
        )
        floor = guard.floor(most)
        peers = {
            "generate": f"model.generate of verdicts ({SAFE_TOKENS} tokens, or {UNSAFE_TOKENS[0]} to "
            f"{UNSAFE_TOKENS[-1]}, half and half), {size} sorted rows padded left, same LoRA (transformers)",
            "one token": f"model.generate of 1 token, {size} sorted rows padded left, same LoRA (transformers)",
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


def fastest(calls: dict[int, tuple[Callable[[], object], int]], bench: Bench) -> int:
    """The setting whose call takes least for each of its rows, which stand beside it; one call each."""
    row_s = {setting: seconds_of(call, bench.device) / num_rows for setting, (call, num_rows) in calls.items()}
    return min(row_s, key=lambda setting: row_s[setting])


class Guard:
    """A random guard with LoRA, the peer's with equal weights, and prompts that begin alike, shortest first."""

    def __init__(self, bench: Bench, count: int) -> None:
        self.bench = bench
        self.model, adapter = bench.adapted(LORA)
        self.model.eval()
        self.peer = PeerModel(bench, adapter.slots, LORA)
        self.peer.load(adapter.values)
        self.peer.model.eval()
        vocab = bench.size.vocab_size
        self.pair = [SAFE % vocab, UNSAFE % vocab]
        head = random_ids(SHARED, vocab, "head")
        tails = tail_lengths(count)
        self.prompts = [np.asarray(head + random_ids(n, vocab, "tail", i), np.int32) for i, n in enumerate(tails)]

    def thinned(self, count: int) -> Guard:
        """The same guard with about ``count`` of the rows, evenly from the shortest to the longest."""
        some = copy(self)
        some.prompts = self.prompts[:: max(1, len(self.prompts) // count)]
        return some

    def scores(self, shared: int = SHARED, most: int = GuardConfig.batch_tokens) -> torch.Tensor:
        """Logits ``[rows, 2]``, as :class:`fedsim.safety.guard.LlamaGuard` computes them."""
        tails = [prompt[shared:] for prompt in self.prompts]
        head = read_head(self.model, self.prompts[0][:shared])
        units = units_of([len(tail) for tail in tails], most)
        return torch.cat([candidate_logits(self.model, head, [tails[i] for i in unit], self.pair) for unit in units])

    @torch.no_grad()
    def generated(self, rows: int, forced: bool = False, verdicts: bool = True) -> list[list[int]]:
        """New tokens of each prompt, greedily.

        Args:
            forced: the first is one of the two words.
            verdicts: as long as :func:`verdict_lengths`, else one token, which says as much.
        """
        base = peer(self.peer.model)
        lengths = verdict_lengths(len(self.prompts)) if verdicts else [1] * len(self.prompts)
        out: list[list[int]] = []
        for start in range(0, len(self.prompts), rows):
            batch = self.prompts[start : start + rows]
            allowed = self.pair if forced else None
            out += generate(base, batch, lengths[start : start + rows], allowed, self.bench.device)
        return out

    def floor(self, most: int) -> float:
        """Seconds at the device's peak, with ``most`` tokens of a pass."""
        base = peer(self.model)
        tails = [len(prompt) - SHARED for prompt in self.prompts]
        effort, peak = scoring(ModelCost.of(base), base.config, tails, most), self.bench.peak()
        return max(effort.flops / peak.flops, effort.num_bytes / peak.bytes_per_s)


def tail_lengths(count: int) -> list[int]:
    """Tokens of each prompt after the shared head, shortest first."""
    half = (MEAN - SHARED - CLOSING) / 2
    replies = draw("reply", count, half)
    return sorted(p + r + CLOSING for p, r in zip(draw("prompt", count, half), replies, strict=True))


def scoring(cost: ModelCost, config: Any, tails: Sequence[int], most: int) -> Effort:
    """Work of scoring behind the shared head, with ``most`` tokens of a pass; ``config`` is the model's."""
    work = Work(
        tokens=SHARED + sum(tails),
        pairs=SHARED**2 + sum(tail * (SHARED + tail) for tail in tails),
        passes=1 + len(units_of(tails, most)),
    )
    effort = cost.forward(work)
    layer = cost.body / config.num_hidden_layers
    keys_and_values = 2 * config.hidden_size * config.num_key_value_heads * config.head_dim
    return replace(effort, flops=effort.flops - 2 * sum(tails) * (layer - keys_and_values))


def peer(model: PeftModel) -> PreTrainedModel:
    """The Hugging Face model inside."""
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    return base


def verdict_lengths(count: int) -> list[int]:
    """Tokens of each verdict: every other row is safe; random weights would never end one."""
    return [SAFE_TOKENS if i % 2 == 0 else UNSAFE_TOKENS[i // 2 % len(UNSAFE_TOKENS)] for i in range(count)]


def generate(
    base: Any, batch: Sequence[np.ndarray], lengths: Sequence[int], allowed: list[int] | None, device: torch.device
) -> list[list[int]]:
    """One padded batch through transformers' generate, with transformers' own attention; ends when all rows have."""
    longest = max(map(len, batch))
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(batch):
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, longest - len(prompt) :] = 1
    made = base.generate(
        ids.to(device),
        attention_mask=mask.to(device),
        do_sample=False,
        max_new_tokens=max(lengths),
        eos_token_id=None,
        stopping_criteria=StoppingCriteriaList([Limits(longest, lengths, device)]),
        pad_token_id=0,
        prefix_allowed_tokens_fn=None if allowed is None else lambda _row, _ids: allowed,
    )
    return [row[longest : longest + length] for row, length in zip(made.tolist(), lengths, strict=True)]
