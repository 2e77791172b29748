"""Constitutions: pairs of critique and revision requests (arXiv 2212.08073).

A file is ``{"constitutions": [{"critic": str, "revision": str}, …], "system_chat": [[message, …],
…]}``. Each entry of ``system_chat`` is an example dialogue, a list of ``{"role", "content"}``,
shown before every conversation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.base.errors import DataError
from fedsim.data.chat import Conversation, Message, assistant_turn, user_turn
from fedsim.data.files import json_object

_FORM = "one JSON object with a list 'constitutions' of critic and revision pairs"


@dataclass(frozen=True)
class Principle:
    """Requests that follow the model's reply: first ``critic``, then ``revision``."""

    critic: str
    revision: str


@dataclass(frozen=True)
class Constitution:
    """Principles, one of which is drawn per conversation, and messages that precede each one."""

    principles: tuple[Principle, ...]
    system_chat: tuple[Message, ...] = ()

    def conversation(self, messages: Conversation) -> Conversation:
        """Return ``messages`` behind the example dialogues."""
        return [*self.system_chat, *messages]


def load_constitution(path: Path) -> Constitution:
    """Read and check a constitution file.

    Raises:
        DataError: missing or malformed, with the place.
    """
    # Check the file's form before its entries.
    content = json_object(path, _FORM)
    if not isinstance(content.get("constitutions"), list):
        raise DataError(f"{path}: must be {_FORM}")
    pairs = content["constitutions"]
    if not pairs:
        fix = "give at least one critic and revision pair"
        raise DataError(f"{path}: 'constitutions' is empty; {fix}")
    examples = content.get("system_chat", [])
    if not isinstance(examples, list):
        kind = type(examples).__name__
        raise DataError(f"{path}: 'system_chat' must be a list of example dialogues, is {kind}")
    # Each error names the entry by its index.
    principles = []
    for i, pair in enumerate(pairs):
        principles.append(_principle(pair, f"{path}, constitutions[{i}]"))
    chat: list[Message] = []  # all example dialogues, one after the other
    for i, dialogue in enumerate(examples):
        chat += _dialogue(dialogue, f"{path}, system_chat[{i}]")
    return Constitution(tuple(principles), tuple(chat))


def _principle(pair: Any, place: str) -> Principle:
    """Check an entry of 'constitutions'; errors name ``place``."""
    if not isinstance(pair, dict):
        kind = type(pair).__name__
        raise DataError(f"{place}: must be an object with 'critic' and 'revision', is {kind}")
    for name in ("critic", "revision"):
        if not isinstance(pair.get(name), str) or not pair[name].strip():
            raise DataError(f"{place}: {name!r} must be a non-empty text")
    return Principle(pair["critic"], pair["revision"])


def _dialogue(dialogue: Any, place: str) -> list[Message]:
    """Check an example dialogue and return its messages; errors name ``place``.

    User and assistant turns alternate, so that a chat template accepts the turns that follow.
    """
    if not isinstance(dialogue, list) or len(dialogue) % 2:
        raise DataError(f"{place}: must be a list of messages that ends with an assistant turn")
    messages: list[Message] = []
    for i, message in enumerate(dialogue):
        role, turn = ("user", user_turn) if i % 2 == 0 else ("assistant", assistant_turn)
        fields = message if isinstance(message, dict) else {}
        if fields.get("role") != role or not isinstance(fields.get("content"), str):
            form = f"{{'role': {role!r}, 'content': text}}"
            raise DataError(f"{place}[{i}]: must be {form}; roles alternate from 'user'")
        messages.append(turn(fields["content"]))
    return messages
