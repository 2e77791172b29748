"""The paper's work at Llama-3.1-8B's shape, piece by piece: FLOPs and bytes of the rows that the stages time.

``python -m tools.bench.paper_work`` writes them to fedsim/study/paper_work.json, from which ``fedsim costs`` works.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fedsim.base.launching import Parser, launched
from fedsim.commands.costs import WORK
from fedsim.config.lora import LoraSettings
from fedsim.model.cost import Effort, ModelCost, Work, decode_work, rows_work
from fedsim.model.load import attach_lora
from fedsim.report import paper
from tools.bench import guard
from tools.bench.cai_iteration import NUM_PAIRS, preferences
from tools.bench.generation import ASKED, TURNS, Conversations
from tools.bench.lengths import training_rows
from tools.bench.local_step import CLIENT_STEPS
from tools.bench.models import GPU
from tools.bench.stage import PAPER_LORA, Bench

BATCH = paper.BATCH_SIZE
GUARD_ROWS, GUARD_TOKENS = 1000, 4096  # rows behind one head; guard.batch_tokens of configs/paper
CONVERSATIONS, SLOTS = 256, 128  # eval.batch_size of configs/paper
VERDICT = 4  # tokens that the guard learns of a row: the verdict, its line breaks and its end


def paper_work() -> dict[str, Effort]:
    """Effort of one unit of each piece, by name; the units are those of :mod:`fedsim.study.costs`."""
    config = GPU.llama()
    cost, watcher = (_cost(config, lora) for lora in (PAPER_LORA, guard.LORA))
    vector = 4 * cost.lora  # bytes of an adapter in fp32
    tails = guard.tail_lengths(GUARD_ROWS)
    return {
        "local_step": _local_step(cost),
        "cai_iteration": _cai_iteration(cost),
        "tuning_step": _tuning_step(watcher, tails),
        "guard_row": _share(guard.scoring(watcher, config, tails, GUARD_TOKENS), len(tails)),
        "conversation": _conversation(cost),
        "aggregation": Effort(num_bytes=vector * (5 + 2)),  # five clients read, the adapter read and written
        "correction": Effort(num_bytes=vector * 3),  # adapter and correction read, adapter written
    }


def _cost(config: LlamaConfig, lora: LoraSettings) -> ModelCost:
    """Sizes of the model with an adapter; nothing is stored."""
    with torch.device("meta"):
        base = LlamaForCausalLM(config).bfloat16()
        base.requires_grad_(False)
        inner = attach_lora(base, lora).get_base_model()
    assert isinstance(inner, PreTrainedModel)
    return ModelCost.of(inner)


def _local_step(cost: ModelCost) -> Effort:
    rows = training_rows(BATCH * CLIENT_STEPS, GPU.vocab_size)
    return _share(cost.train(rows_work(rows, CLIENT_STEPS)), CLIENT_STEPS)


def _cai_iteration(cost: ModelCost) -> Effort:
    pairs, count = preferences(NUM_PAIRS, GPU.vocab_size), NUM_PAIRS // BATCH
    chosen = rows_work([pair.chosen for pair in pairs], count)
    both = rows_work([row for pair in pairs for row in (pair.chosen, pair.rejected)], count)
    return _share(cost.train(chosen) + cost.train(both) + cost.forward(both), count)


def _tuning_step(cost: ModelCost, tails: list[int]) -> Effort:
    """A step on whole prompts, heads included, and their verdicts."""
    lengths = [guard.SHARED + tail + VERDICT - 1 for tail in tails]
    steps = -(-len(lengths) // BATCH)
    pairs = sum(length**2 for length in lengths)
    work = Work(tokens=sum(lengths), targets=VERDICT * len(lengths), pairs=pairs, passes=steps)
    return _share(cost.train(work), len(lengths) / BATCH)


def _conversation(cost: ModelCost) -> Effort:
    """Three turns of a row, all slots in use."""
    rows = Conversations(Bench(torch.device("cpu"), GPU, threads=1), CONVERSATIONS, TURNS)
    work = decode_work(_turns(rows), passes=-(-rows.num_tokens // SLOTS))
    return _share(cost.forward(work), CONVERSATIONS)


def _turns(rows: Conversations) -> Iterator[tuple[int, int, int]]:
    """Tokens kept of the turns before, of the prompt and of the reply; a reply's last token is not in the cache."""
    for prompt, *replies in zip(rows.prompts, *rows.replies, strict=True):
        kept, length = 0, len(prompt)
        for reply in replies:
            yield kept, length, reply
            kept, length = length + reply - 1, length + reply + ASKED


def written() -> str:
    """The work as the file has it."""
    return json.dumps({name: asdict(effort) for name, effort in paper_work().items()}, indent=1) + "\n"


def write(_: argparse.Namespace) -> None:
    """Write the file."""
    WORK.write_text(written(), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the file; returns the exit status."""
    parser = Parser(prog="python -m tools.bench.paper_work", description=__doc__)
    return launched(lambda: parser.parse_args(argv), write)


def _share(effort: Effort, parts: float) -> Effort:
    return Effort(effort.flops / parts, effort.num_bytes / parts, round(effort.tokens / parts))


if __name__ == "__main__":
    sys.exit(main())
