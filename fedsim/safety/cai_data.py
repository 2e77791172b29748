"""CAI conversations: response, critique and revision in one chat (paper §4.2; arXiv 2212.08073).

One conversation of three turns a row. SFT then trains prompt → revision, and DPO prefers the
revision (``chosen``) to the response (``rejected``). Rows that are of no use for this are dropped
and counted by reason.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from fedsim.base import keyed_random
from fedsim.base.errors import DataError
from fedsim.base.json_text import NotJsonError, parse_json
from fedsim.base.metric import Metric, writes
from fedsim.data.chat import Conversation, assistant_turn, user_turn
from fedsim.data.square import SquareRow
from fedsim.data.usable import drop_metrics
from fedsim.generate.engine import Engine, Reply, Sampling
from fedsim.safety.constitution import Constitution

Turn = Literal["response", "critique", "revision"]
Defect = Literal["empty_response", "empty_revision", "unchanged", "truncated"]
TURNS: Final[tuple[Turn, ...]] = ("response", "critique", "revision")
DEFECTS: Final[tuple[Defect, ...]] = ("empty_response", "empty_revision", "unchanged", "truncated")
_TEXT_KEYS: Final = (
    "init_prompt",
    "init_response",
    "critic_prompt",
    "critic_response",
    "revision_prompt",
    "revision_response",
)


@dataclass(frozen=True)
class CaiRow:
    """One conversation under one principle.

    Attributes:
        row_id: the data row whose prompt it starts from.
        principle: position of the principle in the constitution.
        truncated: turns that did not end in time, or whose conversation outgrew the context and
            lost its beginning.
    """

    row_id: int
    init_prompt: str
    init_response: str
    critic_prompt: str
    critic_response: str
    revision_prompt: str
    revision_response: str
    principle: int
    truncated: tuple[Turn, ...] = ()

    @property
    def chosen(self) -> str:
        """DPO's preferred reply to ``init_prompt``, and SFT's target: the revision."""
        return self.revision_response

    @property
    def rejected(self) -> str:
        """DPO's other reply to ``init_prompt``: the first response."""
        return self.init_response

    @property
    def defect(self) -> Defect | None:
        """First reason of :data:`DEFECTS` why the row cannot be trained on; None if it can."""
        response, revision = self.init_response.strip(), self.revision_response.strip()
        if not response:
            return "empty_response"
        if not revision:
            return "empty_revision"
        if response == revision:
            return "unchanged"
        # A truncated critique does no harm: it is not trained on.
        return "truncated" if {"response", "revision"} & set(self.truncated) else None


def generate_conversations(
    engine: Engine,
    rows: Sequence[SquareRow],
    constitution: Constitution,
    sampling: Sampling,
    *,
    first_turn: Literal["model", "dataset"] = "model",
    key: Sequence[keyed_random.KeyPart] = ("cai",),
) -> list[CaiRow]:
    """Generate one conversation per row, in order; the same on every rank.

    Args:
        engine: the model that writes all turns; its seed fixes the draws.
        rows: their prompts start the conversations.
        constitution: one of its principles is drawn for each conversation.
        sampling: of each turn (paper: temperature 1.0).
        first_turn: "model" lets the engine write the response, "dataset" takes the row's own
            response.
        key: names the draws; another key, such as ``("cai", round_idx)``, gives fresh
            conversations.
    """
    # Draw each row's principle, by its position in the constitution.
    drawn = []
    for row in rows:
        number = keyed_random.derive(engine.seed, "principle", *key, row.row_id)
        drawn.append(number % len(constitution.principles))
    principles = [constitution.principles[i] for i in drawn]

    # Generate the turns of all conversations; a response of the data set is put in as it is.
    chats: list[Conversation] = [constitution.conversation([user_turn(row.prompt)]) for row in rows]
    critics = [principle.critic for principle in principles]
    requests = [principle.revision for principle in principles]
    turn_keys = [(*key, turn) for turn in TURNS]
    if first_turn == "model":
        replies = engine.converse(chats, [critics, requests], sampling, turn_keys)
    else:
        for i, row in enumerate(rows):
            chats[i] = [*chats[i], assistant_turn(row.response), user_turn(critics[i])]
        responses = [Reply(row.response, num_tokens=0, truncated=False) for row in rows]
        replies = [responses, *engine.converse(chats, [requests], sampling, turn_keys[1:])]

    # Put the three replies of each row together.
    conversations = []
    for i, row in enumerate(rows):
        response, critique, revision = (of_turn[i] for of_turn in replies)
        truncated: list[Turn] = []
        for name, reply in zip(TURNS, (response, critique, revision), strict=True):
            if reply.truncated or reply.prompt_truncated:
                truncated.append(name)
        conversation = CaiRow(
            row_id=row.row_id,
            init_prompt=row.prompt,
            init_response=response.text,
            critic_prompt=critics[i],
            critic_response=critique.text,
            revision_prompt=requests[i],
            revision_response=revision.text,
            principle=drawn[i],
            truncated=tuple(truncated),
        )
        conversations.append(conversation)
    return conversations


def usable(rows: Sequence[CaiRow]) -> list[CaiRow]:
    """Return the rows without a defect, in order."""
    return [row for row in rows if row.defect is None]


@writes(
    Metric("cai/num_rows", "conversations", "rows"),
    *drop_metrics("cai/", DEFECTS),
    Metric("cai/num_empty_revisions", "rows with an empty revision, whatever they were dropped for", "rows"),
    Metric("cai/num_unchanged_revisions", "rows with an unchanged revision, likewise", "rows"),
    *(Metric(f"cai/num_truncated_{turn}", f"rows whose {turn} is cut off, likewise", "rows") for turn in TURNS),
)
def count_metrics(rows: Sequence[CaiRow]) -> dict[str, int]:
    """Count rows, those with a defect by reason (each once), and signs of collapse.

    ``num_empty_revisions``, ``num_unchanged_revisions`` and ``num_truncated_<turn>`` count every
    such row, dropped for that reason or another.

    Returns:
        Counts by ``cai/<name>``.
    """
    defects = Counter(row.defect for row in rows)  # the first defect of each row
    truncated: Counter[Turn] = Counter()
    num_empty = num_unchanged = 0
    for row in rows:
        truncated.update(row.truncated)
        response, revision = row.init_response.strip(), row.revision_response.strip()
        num_empty += not revision
        num_unchanged += response == revision != ""
    return {
        "cai/num_rows": len(rows),
        **{f"cai/num_dropped_{defect}": defects[defect] for defect in DEFECTS},
        "cai/num_empty_revisions": num_empty,
        "cai/num_unchanged_revisions": num_unchanged,
        **{f"cai/num_truncated_{turn}": truncated[turn] for turn in TURNS},
    }


def save_conversations(rows: Sequence[CaiRow], path: Path) -> None:
    """Write JSONL, one row a line, published by an atomic rename."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(_to_json(row), ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())  # the content is on disk before the rename
    part.replace(path)


def load_conversations(path: Path) -> list[CaiRow]:
    """Read a file of :func:`save_conversations`, row by row.

    Raises:
        DataError: it is missing or malformed; the message has line and key.
    """
    fix = "generate the conversations again"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {fix}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 (byte {error.start}); {fix}") from error
    if not text:
        return []
    rows = []
    # splitlines() would also cut at U+2028, which JSON leaves as it is.
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        rows.append(_from_json(line, f"{path}, line {number}"))
    return rows


def _to_json(row: CaiRow) -> dict[str, Any]:
    """Return a row's JSON object, in the order of its keys in the file."""
    texts = {name: getattr(row, name) for name in _TEXT_KEYS}
    pair = {"chosen": row.chosen, "rejected": row.rejected}
    return {
        "row_id": row.row_id,
        **texts,
        **pair,
        "principle": row.principle,
        "truncated": list(row.truncated),
    }


def _from_json(line: str, place: str) -> CaiRow:
    """Parse and check one line; errors name ``place``."""
    try:
        entry = parse_json(line)
    except NotJsonError as error:
        raise DataError(f"{place}: is not valid JSON ({error.reason})") from error
    if not isinstance(entry, dict):
        raise DataError(f"{place}: must be an object, is {type(entry).__name__}")
    for name in (*_TEXT_KEYS, "chosen", "rejected"):
        if not isinstance(entry.get(name), str):
            raise DataError(f"{place}: {name!r} must be text")
    for name in ("row_id", "principle"):
        if not isinstance(entry.get(name), int):
            raise DataError(f"{place}: {name!r} must be a whole number")
    # The pair is derived from the turns; it is in the file for its readers.
    if (entry["chosen"], entry["rejected"]) != (entry["revision_response"], entry["init_response"]):
        rule = "'chosen' must equal 'revision_response', and 'rejected' 'init_response'"
        raise DataError(f"{place}: {rule}")
    truncated = entry.get("truncated", [])
    if not isinstance(truncated, list) or not all(turn in TURNS for turn in truncated):
        raise DataError(f"{place}: 'truncated' must be a list of {', '.join(TURNS)}")
    texts = {name: entry[name] for name in _TEXT_KEYS}
    return CaiRow(
        row_id=entry["row_id"],
        principle=entry["principle"],
        truncated=tuple(truncated),
        **texts,
    )
