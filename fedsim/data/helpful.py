"""Reader of held-out helpful conversations: JSON rows ``{"messages": [{"role", "content"}, …]}``.

Errors name file, line and field and never quote a message.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedsim.base.errors import DataError
from fedsim.data.chat import Conversation, assistant_turn, user_turn
from fedsim.data.files import json_rows, not_empty

_RULE = "an optional 'system' message, then 'user' and 'assistant' in turn, 'assistant' last"


def load_helpful(path: Path) -> list[Conversation]:
    """Read the conversations, in order; each ends with an assistant turn.

    Raises:
        DataError: the file is missing or empty, or a row is not a conversation in that form.
    """
    rows = json_rows(path, "messages")
    return not_empty([_conversation(record, place) for place, record in rows], path)


def _conversation(record: dict[str, Any], place: str) -> Conversation:
    """Check one row: its messages, their texts, and their roles."""
    messages = record.get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise DataError(
            f"{place}: field 'messages' must be a list of objects with 'role' and 'content'",
        )
    for i, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            raise DataError(
                f"{place}: field 'messages[{i}].content' must be text that is not empty",
            )

    # An optional system message, then whole exchanges.
    roles = [message.get("role") for message in messages]
    start = int(roles[:1] == ["system"])
    num_pairs = (len(roles) - start) // 2
    if num_pairs == 0 or roles[start:] != ["user", "assistant"] * num_pairs:
        raise DataError(f"{place}: field 'messages' must hold {_RULE}")
    conversation: Conversation = []
    for message in messages[:start]:
        conversation.append({"role": "system", "content": message["content"]})
    make = {"user": user_turn, "assistant": assistant_turn}
    for message in messages[start:]:
        conversation.append(make[message["role"]](message["content"]))
    return conversation
