"""Row lengths as SQuARe has them, from a committed histogram: how many characters its questions and responses have.

``python tools/bench/lengths.py FILE`` makes the histogram from a SQuARe response file; it holds no text. Lengths are
drawn as characters and scaled to tokens by one factor for prompts and one for replies, so that the means are those
that a stage asks for; questions' and responses' lengths are all but uncorrelated in the file, and drawn apart.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np

from fedsim.base import keyed_random
from fedsim.data.chat import ChatFormat, TokenRow

FILE = Path(__file__).with_name("lengths.json")
FIRST_TOKEN = 3  # below are the special tokens of the benchmark's models: padding, beginning, end
END = 2


@cache
def characters(part: str) -> np.ndarray:
    """All lengths of "prompt" or "reply" in ascending order, one entry a row of the file."""
    counts = {int(length): count for length, count in json.loads(FILE.read_text())[part].items()}
    return np.repeat(np.asarray(sorted(counts)), [counts[length] for length in sorted(counts)])


def draw(part: str, count: int, mean: float, seed: int = 0) -> list[int]:
    """Lengths in tokens, at least 1: the file's in one random order after another, scaled to ``mean``."""
    known = characters(part)
    orders = [
        keyed_random.permutation(len(known), seed, "lengths", part, turn) for turn in range(-(-count // len(known)))
    ]
    drawn = known[np.concatenate(orders)[:count]] * (mean / known.mean())
    return [max(1, round(length)) for length in drawn.tolist()]


def training_rows(
    count: int, vocab_size: int, *, prompt_mean: float = 55.0, reply_mean: float = 55.0, seed: int = 0
) -> list[TokenRow]:
    """Rows of random tokens, 110 long in the mean and half of that reply; the reply ends with the end token."""
    prompts, replies = (
        draw(part, count, mean, seed) for part, mean in (("prompt", prompt_mean), ("reply", reply_mean))
    )
    return [
        token_row(prompt, reply, vocab_size, seed, index)
        for index, (prompt, reply) in enumerate(zip(prompts, replies, strict=True))
    ]


def token_row(prompt: int, reply: int, vocab_size: int, *key: keyed_random.KeyPart) -> TokenRow:
    """A row of ``prompt`` + ``reply`` random tokens, the last one the end token."""
    ids = random_ids(prompt + reply, vocab_size, *key)
    return ChatFormat.join(ids[:prompt], [*ids[prompt:-1], END], prompt + reply)


def random_ids(count: int, vocab_size: int, *key: keyed_random.KeyPart) -> list[int]:
    """Tokens that are no special ones."""
    drawn: list[int] = keyed_random.generator(0, "tokens", *key).integers(FIRST_TOKEN, vocab_size, size=count).tolist()
    return drawn


def main(arguments: list[str]) -> int:
    """Write the histogram of a SQuARe response file."""
    rows = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    parts = {"prompt": "question_en", "reply": "response_en"}
    histograms = {part: Counter(len(row[name]) for row in rows) for part, name in parts.items()}
    content = {
        "source": f"SQuARe, {Path(arguments[0]).name}: characters of question_en (prompt) and response_en (reply); "
        f"{len(rows)} rows; MIT, Copyright 2023-present NAVER Cloud Corp.",
        "scaling": "draw() scales characters to tokens so that prompts and replies have the means that a stage asks "
        "for; a training row: 55 + 55 tokens",
        "mean_characters": {p: sum(k * v for k, v in h.items()) / len(rows) for p, h in histograms.items()},
        **{part: {str(k): h[k] for k in sorted(h)} for part, h in histograms.items()},
    }
    FILE.write_text(json.dumps(content, indent=None, separators=(", ", ": ")) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
