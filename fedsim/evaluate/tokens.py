"""Tokenisation of a suite's fixed prompts and replies, once a run and shared over the ranks.

The chat format remembers the result.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedsim.data.chat import Prompt, TokenRow, as_key
from fedsim.evaluate.benchmark import Asked
from fedsim.evaluate.scoring import keep_reply_row, reply_row
from fedsim.evaluate.suite import Suite
from fedsim.generate.engine import Engine

_UNIT = 64  # conversations that a rank takes at a time

Tokenised = tuple[Prompt, list[TokenRow]]
"""Of one conversation: its prompt, and one row for each reply to it that is scored."""


def tokenise(engine: Engine, suite: Suite) -> None:
    """Tokenise on all ranks and let each remember all results. All ranks must call it."""
    chat, max_context = engine.chat, engine.max_context

    def compute(unit: Sequence[Asked]) -> list[Tokenised]:
        found: list[Tokenised] = []
        for conversation, replies in unit:
            prompt = chat.keep_prompt(conversation)
            rows = [reply_row(chat, conversation, reply, max_context) for reply in replies]
            found.append((prompt, rows))
        return found

    # Each unit is tokenised by one rank; then all ranks keep what the others have computed.
    asked = requests(suite)
    units = [asked[start : start + _UNIT] for start in range(0, len(asked), _UNIT)]
    for unit, found in zip(units, engine.ranks.map(compute, units), strict=True):
        for (conversation, replies), (prompt, rows) in zip(unit, found, strict=True):
            chat.keep_prompt(conversation, prompt)
            for reply, row in zip(replies, rows, strict=True):
                keep_reply_row(chat, conversation, reply, max_context, row)


def requests(suite: Suite) -> list[Asked]:
    """Collect the conversations that are the same in every evaluation, with replies to score."""
    found: list[Asked] = []
    prompts = set()  # keys of the conversations with scored replies
    for part in suite.parts:
        items = part.chosen(suite.limit)
        with part.calling():
            scored, asked = part.benchmark.scored(items), part.benchmark.ask(items, ())
        found += scored
        prompts |= {as_key(conversation) for conversation, _ in scored}

        # Prompts of free replies, unless they are there already.
        for dialogues in asked:
            for conversation in dialogues.conversations:
                if as_key(conversation) not in prompts:
                    found.append((conversation, ()))
    return found
