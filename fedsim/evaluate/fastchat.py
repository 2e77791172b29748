"""FastChat's MT-Bench files: readers and writers of answers and judgments.

FastChat's show_result and its browser read the judgments. Field names and folders are those of
``fastchat/llm_judge`` (``gen_model_answer.py``, ``gen_judgment.py``); judgments are sorted as its
``clean_judgment.py`` sorts them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

from fedsim.base.errors import ConfigError, DataError
from fedsim.base.json_text import parse_json
from fedsim.data.evaluation_sets import question_id, two_texts
from fedsim.data.files import json_rows
from fedsim.evaluate.mt_bench import MtAnswer

Row = dict[str, Any]

Place = tuple[int, int]
"""Question and turn, which name a judgment among those of one model."""

UNRATED: Final = -1
"""Score of a judgment without a rating; FastChat leaves such rows out of every mean."""

FAILED: Final = "$ERROR$"
"""FastChat's judgment where its requests failed."""

NOT_ASKED: Final = "Not asked: "
"""Beginning of a judgment where a local judge's context has no room for the prompt."""

CUT: Final = "$CUT$ "
"""Beginning of a judgment that was cut off by length; a rating in it does not count."""

KINDS: Final = {
    "question_id": int,
    "model": str,
    "judge": list,
    "user_prompt": str,
    "judgment": str,
    "score": int | float,
    "turn": int,
}
"""Fields of a judgment that are read, and their types."""

RUBRIC: Final = "rubric"
"""Name of the embedded world's rubric where FastChat has the judge's."""


def read_answers(path: Path) -> dict[int, tuple[str, str]]:
    """Read both answers by ``question_id``, of a model or of the reference.

    FastChat's reference answers are ``reference_answer/gpt-4.jsonl``.

    Raises:
        DataError: the file cannot be read, a field is missing or of another type, or an id occurs
            twice.
    """
    answers: dict[int, tuple[str, str]] = {}
    for place, record in json_rows(path, "question_id"):
        # FastChat's format has several choices of an answer; only the first is read.
        number, choices = question_id(record, place), record.get("choices")
        turns = None
        if isinstance(choices, list) and choices and isinstance(choices[0], dict):
            turns = two_texts(choices[0].get("turns"))
        if turns is None:
            raise DataError(
                f"{place}: field 'choices' must begin with an object that has two texts as 'turns'",
            )
        if number in answers:
            raise DataError(f"{place}: question_id {number} occurs twice; ids must differ")
        answers[number] = turns
    return answers


def answer_rows(answers: Iterable[MtAnswer], model_id: str, tstamp: float) -> list[Row]:
    """Make FastChat ``model_answer`` rows, sorted by question.

    Args:
        answers: of one model.
        model_id: FastChat's name of the model.
        tstamp: seconds since 1970 of the generation. ``answer_id`` is a hash of the content, not of
            the time.
    """
    rows = []
    for answer in answers:
        turns = [reply.text for reply in answer.replies]
        # The id is a hash of the content, so that the same answers give the same file.
        content = json.dumps([model_id, answer.question.question_id, turns])
        rows.append(
            {
                "question_id": answer.question.question_id,
                "answer_id": hashlib.blake2b(content.encode(), digest_size=11).hexdigest(),
                "model_id": model_id,
                "choices": [{"index": 0, "turns": turns}],
                "tstamp": tstamp,
            },
        )
    return sorted(rows, key=lambda row: row["question_id"])


def judgment_row(
    question: int,
    model_id: str,
    judge: tuple[str, str],
    user_prompt: str,
    judgment: str,
    score: float,
    turn: int,
    tstamp: float,
) -> Row:
    """Make one FastChat ``model_judgment`` row, its fields in FastChat's order.

    Args:
        question: its id.
        model_id: FastChat's name of the model.
        judge: name of the judge, and name of its prompt.
        user_prompt: the whole text that the judge was asked.
        judgment: the judge's text.
        score: from 1 to 10, or :data:`UNRATED`.
        turn: 1 or 2.
        tstamp: seconds since 1970.
    """
    return {
        # FastChat's order of the fields.
        "question_id": question,
        "model": model_id,
        "judge": list(judge),
        "user_prompt": user_prompt,
        "judgment": judgment,
        "score": score,
        "turn": turn,
        "tstamp": tstamp,
    }


def pending(row: Row) -> bool:
    """Return whether a row has no whole judgment, so that it is asked for again."""
    judgment: str = row["judgment"]
    return judgment == FAILED or judgment.startswith((NOT_ASKED, CUT))


def rubric_rows(answers: Iterable[MtAnswer], model_id: str, tstamp: float) -> list[Row]:
    """Make judgments of the judge ``rubric``: one for each answer that has a score."""
    rows = []
    for answer in answers:
        for turn, score in enumerate(answer.scores, start=1):
            if score is None:
                continue
            # Names like those of FastChat's prompts.
            prompt_name = RUBRIC
            if turn == 2:
                prompt_name = f"{RUBRIC}-multi-turn"
            row = judgment_row(
                answer.question.question_id,
                model_id,
                (RUBRIC, prompt_name),
                answer.question.turns[turn - 1],
                f"Rating: [[{score!r}]]",
                score,
                turn,
                tstamp,
            )
            rows.append(row)
    return rows


def write_answers(
    directory: Path,
    answers: Sequence[MtAnswer],
    model_id: str,
    tstamp: float,
) -> list[Path]:
    """Write ``model_answer/{model_id}.jsonl`` and return the paths of all files written.

    Where a rubric gave scores, ``model_judgment/rubric_single.jsonl`` is the second. Files are
    replaced atomically.

    Raises:
        ConfigError: ``model_id`` cannot name a file.
    """
    if "/" in model_id or not model_id:
        raise ConfigError(
            f"model id {model_id!r}: names a file, so it must have a character and no '/'",
        )
    path = directory / "model_answer" / f"{model_id}.jsonl"
    _write_lines(path, answer_rows(answers, model_id, tstamp))
    # A rubric's scores replace those of an earlier evaluation of the model.
    judged = rubric_rows(answers, model_id, tstamp)
    if not judged:
        return [path]
    judgments = JudgmentFile(directory, RUBRIC)
    judgments.replace(model_id, judged)
    return [path, judgments.path]


class JudgmentFile:
    """Judgments of one judge on all models: ``model_judgment/{judge}_single.jsonl``.

    Every change holds a file lock beside the file, so that a run and a tool that judge at the same
    time lose none of each other's judgments. A line that a crash cut short is left out.

    Args:
        directory: FastChat's ``data/mt_bench``; the folder in it is made by the first judgment.
        judge: the judge's name; a ``/`` in it becomes ``--`` in the file's name.
    """

    def __init__(self, directory: Path, judge: str) -> None:
        self.judge = judge
        self.path = directory / "model_judgment" / f"{judge.replace('/', '--')}_single.jsonl"

    def rows(self) -> list[Row]:
        """Read every judgment in the file.

        Raises:
            DataError: a line other than a torn last one is no judgment.
        """
        if not self.path.exists():
            return []
        # A file that ends with a line end has an empty last part.
        *lines, last = self.path.read_bytes().split(b"\n")
        rows = []
        for number, line in enumerate(lines, start=1):
            if line.strip():
                rows.append(self._row(line, number))
        if _is_whole(last):
            rows.append(self._row(last, len(lines) + 1))
        return rows

    def append(self, row: Row) -> None:
        """Add one judgment; it is on disk when this returns."""
        with self._locked(), self.path.open("a+b") as file:
            _end_line(file)
            file.write(_line(row).encode())
            file.flush()
            os.fsync(file.fileno())

    def replace(self, model_id: str, rows: Iterable[Row]) -> None:
        """Replace this judge's judgments on ``model_id`` by ``rows``.

        The file is sorted and replaced atomically.
        """
        by_place = {(row["question_id"], row["turn"]): row for row in rows}
        self.merge(model_id, by_place, lambda row: False)

    def merge(
        self,
        model_id: str,
        own: Mapping[Place, Row],
        holds: Callable[[Row], bool],
    ) -> dict[Place, Row]:
        """Add ``own`` to this judge's valid judgments on ``model_id`` and remove its invalid ones.

        Reading and replacing happen under one lock, so that two writers on one model lose none of
        each other's judgments. One row is left of each question and turn, by this priority: a
        whole judgment before a row that is :func:`pending`, a row of ``own`` before one of the
        file, a later row of the file before an earlier one.

        Args:
            model_id: FastChat's name of the model.
            own: rows to add.
            holds: predicate of a row of the file: it is still valid.

        Returns:
            The model's judgments, as the file has them now.
        """
        with self._locked():
            # Split the file's rows: of this model and judge, and all others.
            mine, others = [], []
            for row in self.rows():
                if row["model"] == model_id and row["judge"][0] == self.judge:
                    mine.append(row)
                else:
                    others.append(row)

            # A later row takes the place of an earlier one, unless only the earlier is whole.
            merged: dict[Place, Row] = {}
            for row in [*filter(holds, mine), *own.values()]:
                place = (row["question_id"], row["turn"])
                if place not in merged or pending(merged[place]) or not pending(row):
                    merged[place] = row

            if own or len(merged) != len(mine):
                kept = [*others, *merged.values()]
                kept.sort(key=lambda row: (row["model"], row["question_id"], row["turn"]))
                _write_lines(self.path, kept)
            return merged

    def _row(self, line: bytes, number: int) -> Row:
        """Read line ``number``, counted from 1."""
        try:
            row = parse_json(line.decode())
        except ValueError:
            row = None
        # A row without a judge, or with a field of another type, is no judgment.
        if not isinstance(row, dict) or not row.get("judge"):
            row = {}
        if not all(isinstance(row.get(name), kind) for name, kind in KINDS.items()):
            place = f"{self.path}, line {number}"
            raise DataError(
                f"{place}: is no FastChat judgment of a single answer; remove the line",
            )
        return row

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with (self.path.parent / f".{self.path.stem}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _is_whole(line: bytes) -> bool:
    """Return whether a last line without line end is a whole JSON value.

    A file that was edited by hand may end so.
    """
    try:
        parse_json(line.decode())
    except ValueError:
        return False
    return True


def _end_line(file: IO[bytes]) -> None:
    """Make the file end with a line end: a whole last line gets one, a torn one is cut off."""
    # An empty file, or one with a line end, is left as it is.
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return
    # Find the last line.
    file.seek(0)
    last = file.read().rpartition(b"\n")[2]
    if _is_whole(last):
        file.write(b"\n")
    else:
        file.truncate(size - len(last))


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _write_lines(path: Path, rows: Sequence[Row]) -> None:
    """Write rows by atomic rename; they are on disk before the file gets its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as handle:
        handle.writelines(_line(row) for row in rows)
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(path)
