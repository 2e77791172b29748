"""The judge of a configuration and its inputs: questions, prompts and reference answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from fedsim import world
from fedsim.base.artefacts import digest_of
from fedsim.base.digests import file_digest
from fedsim.base.errors import DataError
from fedsim.base.paths import user_path
from fedsim.config import Config
from fedsim.data.evaluation_sets import MtQuestion, load_mt_bench, mt_question
from fedsim.evaluate.fastchat import read_answers
from fedsim.evaluate.judge_contract import Judge, OwnJudge
from fedsim.evaluate.judge_prompts import (
    FILE_NAME,
    NEED_REFERENCE,
    PLAIN,
    SOURCE,
    JudgePrompt,
    load_judge_prompts,
)
from fedsim.extend import build, is_own, source_file, title

KEY: Final = "judge.kind"


def build_judge(config: Config) -> Judge:
    """Make the judge that ``judge.kind`` names.

    Raises:
        ConfigError: it cannot be loaded, or its options are wrong (:func:`fedsim.extend.build`).
    """
    found = build(KEY, config.judge.kind, config.judge.options, vars(config))
    assert isinstance(found, Judge)
    return found


def check_judge(config: Config) -> None:
    """Check without a request and without loading a model that answers could be judged.

    Raises:
        ConfigError: see :func:`build_judge`, and :meth:`OwnJudge.check` of the judge.
        DataError: the questions, the judge's prompts or a reference answer are missing or
            malformed.
        ModelError: see :meth:`OwnJudge.check`.
    """
    if not config.judge.is_on:
        return
    judge = build_judge(config)
    questions = load_questions(config)  # first: the prompts are looked for beside them
    prompts = load_prompts(config)
    if isinstance(judge, OwnJudge):
        judge.check(prompts)
    load_references(config, questions)


def judge_name(config: Config, judge: Judge) -> str:
    """Return the judge's name in FastChat's files.

    A user's judge is named by its class and 8 digits of a digest of its file and options, so that
    another version of the file has judgments of its own.
    """
    if isinstance(judge, OwnJudge):
        return judge.name
    file = source_file(KEY, config.judge.kind)
    assert file is not None
    digest = digest_of([file_digest(file), config.judge.options])
    return f"{title(KEY, config.judge.kind)}-{digest[:8]}"


def judge_files(config: Config) -> dict[str, Path]:
    """Find the files beside the questions that decide a judgment, by role.

    There are none where nothing is judged.

    Raises:
        DataError: ``judge.prompts`` is not set, and the file, which built-in judges need, is not
            where FastChat has it.
    """
    if not config.judge.is_on:
        return {}
    files = {}
    # A user's judge does not need FastChat's prompts.
    if config.judge.prompts or is_own(KEY, config.judge.kind):
        files["judge_prompts"] = _prompts_file(config)
    if config.eval.mt_bench_references:
        files["mt_bench_references"] = user_path(config.eval.mt_bench_references)
    return files


def load_prompts(config: Config) -> Mapping[str, JudgePrompt]:
    """Read FastChat's prompts; :data:`PLAIN` for a user's judge without ``judge.prompts``."""
    file = judge_files(config).get("judge_prompts")
    if file is None:
        return PLAIN
    return load_judge_prompts(file)


def load_questions(config: Config) -> list[MtQuestion]:
    """Read the questions of ``eval.mt_bench``."""
    if config.eval.mt_bench == "embedded":
        records = world.mt_bench_questions()
        return [mt_question(record, "the embedded questions") for record in records]
    return load_mt_bench(user_path(config.eval.mt_bench))


def load_references(config: Config, questions: Sequence[MtQuestion]) -> dict[int, tuple[str, str]]:
    """Read the reference answers, by question id.

    They are those of ``eval.mt_bench_references``, or else the questions' own.

    Raises:
        DataError: a question of a category that needs a reference (math, reasoning, coding) has
            none.
    """
    path = config.eval.mt_bench_references
    if path:
        references = read_answers(user_path(path))
    else:
        references = {q.question_id: q.reference for q in questions if q.reference is not None}

    # Categories such as math need a reference for both turns.
    for question in questions:
        found = references.get(question.question_id, ("", ""))
        if question.category in NEED_REFERENCE and not all(text.strip() for text in found):
            raise DataError(
                f"{path or config.eval.mt_bench}: question {question.question_id} "
                f"({question.category}) has no reference answer for both turns, which a judge "
                "must see; set eval.mt_bench_references to FastChat's "
                f"reference_answer/gpt-4.jsonl (from {SOURCE}/mt_bench)",
            )
    return references


def _prompts_file(config: Config) -> Path:
    """Find FastChat's prompts: ``judge.prompts``, or else beside or above the questions."""
    # The path in the configuration.
    if config.judge.prompts:
        return user_path(config.judge.prompts)
    if config.eval.mt_bench == "embedded":
        fix = f"take FastChat's {FILE_NAME} from {SOURCE} and give its path"
        raise DataError(f"judge.prompts: is not set; {fix}")
    # FastChat has the prompts in a folder above the questions.
    folder = user_path(config.eval.mt_bench)
    if not folder.is_dir():
        folder = folder.parent
    for place in (folder, folder.parent):
        if (place / FILE_NAME).is_file():
            return place / FILE_NAME
    raise DataError(
        f"judge.prompts: is not set, and {FILE_NAME} is neither in {folder} nor in the folder "
        f"above; take FastChat's from {SOURCE} and put it there, or give its path",
    )
