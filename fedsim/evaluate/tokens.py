"""Tokenises a suite's fixed prompts and replies once, shared over the ranks, into the chat format's
memory.
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


def tokenise(engine: Engine, suite: Suite) -> None:
    """Fill the memory of every rank. All ranks must call it."""
    chat = engine.chat

    def compute(unit: Sequence[Asked]) -> list[Tokenised]:
        return [
            (
                chat.keep_prompt(conversation),
                [reply_row(chat, conversation, r, engine.max_context) for r in replies],
            )
            for conversation, replies in unit
        ]

    asked = requests(suite)
    units = [asked[start : start + _UNIT] for start in range(0, len(asked), _UNIT)]
    for unit, found in zip(units, engine.ranks.map(compute, units), strict=True):
        for (conversation, replies), (prompt, rows) in zip(unit, found, strict=True):
            chat.keep_prompt(conversation, prompt)
            for reply, row in zip(replies, rows, strict=True):
                keep_reply_row(chat, conversation, reply, engine.max_context, row)


def requests(suite: Suite) -> list[Asked]:
    """Every conversation that is the same in each evaluation, once, with the replies to it that are
    scored.
    """
    found: list[Asked] = []
    prompts = set()
    for part in suite.parts:
        items = part.chosen(suite.limit)
        with part.calling():
            scored, asked = part.benchmark.scored(items), part.benchmark.ask(items, ())
        found += scored
        prompts |= {as_key(conversation) for conversation, _ in scored}
        for dialogues in asked:
            new = [conversation for conversation in dialogues.conversations if as_key(conversation) not in prompts]
            found += [(conversation, ()) for conversation in new]
    return found
