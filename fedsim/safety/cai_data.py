"""CAI conversations: response, critique and revision in one chat (paper §4.2; arXiv 2212.08073).

One conversation of three turns a row. SFT then trains prompt → revision, and DPO prefers the revision
(``chosen``) to the response (``rejected``). Rows that cannot teach that are dropped and counted by reason.
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
        truncated: turns that did not end in time, or whose conversation outgrew the context and lost its beginning.
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
        """Why the row cannot be trained on, the first reason of :data:`DEFECTS` that holds; None if it can."""
        response, revision = self.init_response.strip(), self.revision_response.strip()
        if not response:
            return "empty_response"
        if not revision:
            return "empty_revision"
        if response == revision:
            return "unchanged"
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
    """One conversation per row, in order; the same on every rank.

    Args:
        engine: the model that writes all turns; its seed fixes the draws.
        rows: their prompts start the conversations.
        sampling: of each turn (paper: temperature 1.0).
        first_turn: "model" lets the engine write the response, "dataset" takes the row's own response.
        key: names the draws; another key, such as ``("cai", round_idx)``, gives fresh conversations.
    """
    drawn = [
        keyed_random.derive(engine.seed, "principle", *key, row.row_id) % len(constitution.principles) for row in rows
    ]
    principles = [constitution.principles[i] for i in drawn]
    chats: list[Conversation] = [constitution.conversation([user_turn(row.prompt)]) for row in rows]
    follow_ups = [[p.critic for p in principles], [p.revision for p in principles]]
    if first_turn == "model":
        responses, critiques, revisions = engine.converse(chats, follow_ups, sampling, [(*key, turn) for turn in TURNS])
    else:
        responses = [Reply(row.response, num_tokens=0, truncated=False) for row in rows]
        asked: list[Conversation] = [
            [*chat, assistant_turn(row.response), user_turn(request)]
            for chat, row, request in zip(chats, rows, follow_ups[0], strict=True)
        ]
        critiques, revisions = engine.converse(asked, follow_ups[1:], sampling, [(*key, turn) for turn in TURNS[1:]])
    return [
        CaiRow(
            row_id=row.row_id,
            init_prompt=row.prompt,
            init_response=turns[0].text,
            critic_prompt=constitution.principles[index].critic,
            critic_response=turns[1].text,
            revision_prompt=constitution.principles[index].revision,
            revision_response=turns[2].text,
            principle=index,
            truncated=tuple(
                name for name, turn in zip(TURNS, turns, strict=True) if turn.truncated or turn.prompt_truncated
            ),
        )
        for row, index, *turns in zip(rows, drawn, responses, critiques, revisions, strict=True)
    ]


def usable(rows: Sequence[CaiRow]) -> list[CaiRow]:
    """The rows without a defect, in order."""
    return [row for row in rows if row.defect is None]


@writes(
    Metric("cai/num_rows", "conversations", "rows"),
    *drop_metrics("cai/", DEFECTS),
    Metric("cai/num_empty_revisions", "rows with an empty revision, whatever they were dropped for", "rows"),
    Metric("cai/num_unchanged_revisions", "rows with an unchanged revision, likewise", "rows"),
    *(Metric(f"cai/num_truncated_{turn}", f"rows whose {turn} is cut off, likewise", "rows") for turn in TURNS),
)
def count_metrics(rows: Sequence[CaiRow]) -> dict[str, int]:
    """Counts as ``cai/<name>``: rows, those with a defect by reason (each once), and signs of collapse.

    ``num_empty_revisions``, ``num_unchanged_revisions`` and ``num_truncated_<turn>`` count every such row, whatever it
    was dropped for.
    """
    defects = Counter(row.defect for row in rows)
    truncated = Counter(turn for row in rows for turn in row.truncated)
    return {
        "cai/num_rows": len(rows),
        **{f"cai/num_dropped_{defect}": defects[defect] for defect in DEFECTS},
        "cai/num_empty_revisions": sum(not row.revision_response.strip() for row in rows),
        "cai/num_unchanged_revisions": sum(
            row.revision_response.strip() == row.init_response.strip() != "" for row in rows
        ),
        **{f"cai/num_truncated_{turn}": truncated[turn] for turn in TURNS},
    }


def save_conversations(rows: Sequence[CaiRow], path: Path) -> None:
    """Write JSONL, one row a line; the file appears whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(_to_json(row), ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def load_conversations(path: Path) -> list[CaiRow]:
    """Read what :func:`save_conversations` wrote.

    Raises:
        DataError: missing or malformed, with line and key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); generate the conversations anew") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 (byte {error.start}); generate the conversations anew") from error
    lines = text.removesuffix("\n").split("\n") if text else []  # splitlines() would also cut at U+2028
    return [_from_json(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _to_json(row: CaiRow) -> dict[str, Any]:
    texts = {name: getattr(row, name) for name in _TEXT_KEYS}
    pair = {"chosen": row.chosen, "rejected": row.rejected}
    return {"row_id": row.row_id, **texts, **pair, "principle": row.principle, "truncated": list(row.truncated)}


def _from_json(line: str, place: str) -> CaiRow:
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
    if (entry["chosen"], entry["rejected"]) != (entry["revision_response"], entry["init_response"]):
        raise DataError(f"{place}: 'chosen' must equal 'revision_response', and 'rejected' 'init_response'")
    truncated = entry.get("truncated", [])
    if not isinstance(truncated, list) or not all(turn in TURNS for turn in truncated):
        raise DataError(f"{place}: 'truncated' must be a list of {', '.join(TURNS)}")
    texts = {name: entry[name] for name in _TEXT_KEYS}
    return CaiRow(row_id=entry["row_id"], principle=entry["principle"], truncated=tuple(truncated), **texts)
