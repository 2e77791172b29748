"""MT-Bench answers and judgments as FastChat's files, so that its own tools (show_result, the browser) read them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fedsim.errors import ConfigError
from fedsim.evaluate.mt_bench import MtAnswer

Row = dict[str, Any]


def answer_rows(answers: Iterable[MtAnswer], model_id: str, tstamp: float) -> list[Row]:
    """FastChat ``model_answer`` rows, sorted by question.

    Args:
        answers: of one model.
        model_id: FastChat's name of the model.
        tstamp: seconds since 1970 of the generation. ``answer_id`` is a hash of the content, not of the time.
    """
    rows = []
    for answer in answers:
        turns = [reply.text for reply in answer.replies]
        content = json.dumps([model_id, answer.question.question_id, turns])
        rows.append(
            {
                "question_id": answer.question.question_id,
                "answer_id": hashlib.blake2b(content.encode(), digest_size=11).hexdigest(),
                "model_id": model_id,
                "choices": [{"index": 0, "turns": turns}],
                "tstamp": tstamp,
            }
        )
    return sorted(rows, key=lambda row: row["question_id"])


def judgment_rows(answers: Iterable[MtAnswer], model_id: str, tstamp: float) -> list[Row]:
    """FastChat ``model_judgment`` rows of judge ``rubric``, first of turn 1, then of turn 2; none without scores."""
    scored = sorted((a for a in answers if a.scores is not None), key=lambda a: a.question.question_id)
    return [
        {
            "question_id": answer.question.question_id,
            "model": model_id,
            "judge": ["rubric", name],
            "user_prompt": answer.question.turns[turn - 1],
            "judgment": f"Rating: [[{answer.scores[turn - 1]!r}]]",
            "score": answer.scores[turn - 1],
            "turn": turn,
            "tstamp": tstamp,
        }
        for turn, name in ((1, "rubric"), (2, "rubric-multi-turn"))
        for answer in scored
        if answer.scores is not None
    ]


def write_answers(directory: Path, answers: Sequence[MtAnswer], model_id: str, tstamp: float) -> list[Path]:
    """Write ``model_answer/{model_id}.jsonl`` and, where there are scores, ``model_judgment/rubric_single.jsonl``.

    Judgments of other models that the file already holds are kept, as FastChat keeps all models in one file. Files are
    replaced atomically. Returns their paths.

    Raises:
        ConfigError: ``model_id`` cannot name a file.
    """
    if "/" in model_id or not model_id:
        raise ConfigError(f"model id {model_id!r}: names a file, so it must have a character and no '/'")
    answers_path = directory / "model_answer" / f"{model_id}.jsonl"
    _write_lines(answers_path, answer_rows(answers, model_id, tstamp))
    judgments = judgment_rows(answers, model_id, tstamp)
    if not judgments:
        return [answers_path]
    path = directory / "model_judgment" / "rubric_single.jsonl"
    held = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line] if path.exists() else []
    _write_lines(path, [*(row for row in held if row["model"] != model_id), *judgments])
    return [answers_path, path]


def _write_lines(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(path)
