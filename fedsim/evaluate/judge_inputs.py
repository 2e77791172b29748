"""Inputs of an MT-Bench judge beside the answers: questions, FastChat's prompts and references, and their paths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedsim import world
from fedsim.base.errors import DataError
from fedsim.base.paths import user_path
from fedsim.config import Config
from fedsim.data.chat import user_turn
from fedsim.data.evaluation_sets import MtQuestion, load_mt_bench, mt_question
from fedsim.evaluate.fastchat import read_answers
from fedsim.evaluate.judge_client import check_client
from fedsim.evaluate.judge_prompts import FILE_NAME, NEED_REFERENCE, SOURCE, load_judge_prompts
from fedsim.model.load import check_model_dir, load_chat, model_dir


def check_judge(config: Config) -> None:
    """Find out without a request and without loading a model whether answers could be judged.

    Raises:
        ConfigError: see :func:`fedsim.evaluate.judge_client.check_client`.
        DataError: the questions, the judge's prompts or a reference answer are missing or malformed.
        ModelError: ``judge.path`` is no model directory, or its chat template does not write system messages.
    """
    if config.judge.kind == "none":
        return
    if config.judge.kind == "openai":
        check_client(config.judge)
    else:
        check_model_dir(config.judge.path, "judge.path")
    questions = load_questions(config)  # first: the prompts are looked for beside them
    prompts = load_judge_prompts(judge_files(config)["judge_prompts"])
    if config.judge.kind == "local" and any(prompt.system for prompt in prompts.values()):
        chat = load_chat(model_dir(config.judge.path), "judge.path")
        chat.prompt([{"role": "system", "content": "Be fair."}, user_turn("Why?")])
    load_references(config, questions)


def judge_name(config: Config) -> str:
    """The judge's name in FastChat's files: the endpoint's model, or the local model's directory; empty for none."""
    names = {"none": "", "openai": config.judge.model, "local": config.judge.path}
    name = names[config.judge.kind]
    return model_dir(name).resolve().name if config.judge.kind == "local" and name != "embedded" else name


def judge_files(config: Config) -> dict[str, Path]:
    """The files beside the questions that decide a judgment, by role; none where nothing is judged.

    Raises:
        DataError: ``judge.prompts`` is not set, and the file is not where FastChat has it.
    """
    if config.judge.kind == "none":
        return {}
    files = {"judge_prompts": _prompts_file(config)}
    if config.eval.mt_bench_references:
        files["mt_bench_references"] = user_path(config.eval.mt_bench_references)
    return files


def load_questions(config: Config) -> list[MtQuestion]:
    """The questions of ``eval.mt_bench``."""
    if config.eval.mt_bench == "embedded":
        return [mt_question(record, "the embedded questions") for record in world.mt_bench_questions()]
    return load_mt_bench(user_path(config.eval.mt_bench))


def load_references(config: Config, questions: Sequence[MtQuestion]) -> dict[int, tuple[str, str]]:
    """Reference answers by question id: of ``eval.mt_bench_references``, or else the questions' own.

    Raises:
        DataError: a question of a category that needs a reference (math, reasoning, coding) has none.
    """
    path = config.eval.mt_bench_references
    own = {q.question_id: q.reference for q in questions if q.reference is not None}
    references = read_answers(user_path(path)) if path else own
    for question in questions:
        found = references.get(question.question_id, ("", ""))
        if question.category in NEED_REFERENCE and not all(text.strip() for text in found):
            raise DataError(
                f"{path or config.eval.mt_bench}: question {question.question_id} ({question.category}) has no "
                "reference answer for both turns, which a judge must see; set eval.mt_bench_references to FastChat's "
                f"reference_answer/gpt-4.jsonl (from {SOURCE}/mt_bench)"
            )
    return references


def _prompts_file(config: Config) -> Path:
    if config.judge.prompts:
        return user_path(config.judge.prompts)
    if config.eval.mt_bench == "embedded":
        raise DataError(f"judge.prompts: is not set; take FastChat's {FILE_NAME} from {SOURCE} and give its path")
    questions = user_path(config.eval.mt_bench)
    folder = questions if questions.is_dir() else questions.parent
    for place in (folder, folder.parent):
        if (place / FILE_NAME).is_file():
            return place / FILE_NAME
    raise DataError(
        f"judge.prompts: is not set, and {FILE_NAME} is neither in {folder} nor in the folder above; take FastChat's "
        f"from {SOURCE} and put it there, or give its path"
    )
