"""Helpers of all benchmarks: a subset of the items, and the row of tokens that scores a reply."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

from fedsim.base import keyed_random
from fedsim.base.errors import ConfigError, ModelError
from fedsim.data.chat import ChatFormat, Ids, Message, TokenRow, as_key, assistant_turn

Item = TypeVar("Item")


def subset(items: Sequence[Item], limit: int) -> list[Item]:
    """Select at most ``limit`` items in file order (:func:`subset_places`); 0 takes them all."""
    return [items[i] for i in subset_places(len(items), limit)]


def subset_places(num_items: int, limit: int) -> list[int]:
    """Draw the places of at most ``limit`` items by a fixed key, ascending; 0 takes them all.

    They are drawn, as files are often sorted by kind. A larger subset of the same items contains
    every smaller one.

    Raises:
        ConfigError: ``limit`` is negative.
    """
    if limit < 0:
        raise ConfigError(
            f"evaluation limit {limit}: must be 0 (all items) or a positive number of items",
        )
    if limit == 0 or limit >= num_items:
        return list(range(num_items))
    # The first places of a fixed permutation.
    drawn = keyed_random.permutation(num_items, 0, "evaluation subset")[:limit]
    return sorted(int(place) for place in drawn)


def reply_ids(chat: ChatFormat, conversation: Sequence[Message], reply: str) -> tuple[Ids, Ids]:
    """Tokenise ``conversation`` and ``reply`` as the chat template writes them.

    The end-of-turn token is left out. White space at the reply's end is dropped, and at its
    beginning where the template trims replies (Llama 3), so that the ids are those that the model
    would have to generate.

    Raises:
        ModelError: the template does not write the prompt as a prefix of the whole conversation, or
            alters the reply.
    """
    prompt = chat.prompt(conversation)
    whole = chat.render([*conversation, assistant_turn(reply)], reply_follows=False)
    # Find the reply in the rendered text, behind the prompt.
    core = chat.defuse(reply).strip()
    start = whole.find(core, len(prompt.text))
    if start < 0:
        raise ModelError(
            f"chat template of {chat.template.name} does not write a reply unaltered after the "
            "prompt that asks for it: its replies cannot be scored; use a template whose "
            "generation prompt is a prefix of the text",
        )
    return chat.continuation(prompt, whole[: start + len(core)])


def reply_row(
    chat: ChatFormat,
    conversation: Sequence[Message],
    reply: str,
    max_context: int,
) -> TokenRow:
    """Make the row that scores ``reply`` after ``conversation``.

    Its targets are :func:`reply_ids`, cut by :func:`scored_row`. The chat format remembers it.

    Raises:
        ModelError: as of :func:`reply_ids`.
    """

    def compute() -> TokenRow:
        return scored_row(*reply_ids(chat, conversation, reply), max_context)

    return chat.remember(_row_key(conversation, reply, max_context), compute)


def keep_reply_row(
    chat: ChatFormat,
    conversation: Sequence[Message],
    reply: str,
    max_context: int,
    row: TokenRow,
) -> None:
    """Let :func:`reply_row` return ``row``, which another rank has computed."""
    chat.remember(_row_key(conversation, reply, max_context), lambda: row)


def _row_key(conversation: Sequence[Message], reply: str, max_context: int) -> Hashable:
    return "reply row", as_key(conversation), reply, max_context


def scored_row(prompt_ids: Ids, target_ids: Ids, max_context: int) -> TokenRow:
    """Make a row whose targets are ``target_ids``, cut to ``max_context`` tokens.

    A row that was cut is marked ``truncated``: the prompt loses its beginning (as in generation),
    and a reply longer than half the context its end, so that a row always has targets.
    """
    # The reply gets half of the context, and the part of the other half that the prompt leaves.
    target = target_ids[: max(max_context // 2, max_context - len(prompt_ids))]
    prompt = prompt_ids[-(max_context - len(target)) :]
    row = ChatFormat.join(prompt, target, max_context)
    cut = len(target) < len(target_ids) or len(prompt) < len(prompt_ids)
    return TokenRow(row.input_ids, row.loss_mask, truncated=cut)
