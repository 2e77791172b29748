"""Let a judge rate the MT-Bench answers of a run, or finish what a judge that failed has left.

Usage: fedsim judge RUN_DIR [--only MODEL_ID ...] [judge.kind=openai judge.model=...
judge.base_url=... ...]

The run may be finished or under way. Its config.yaml says which judge rates and where question
file, prompts and references are; overrides of judge.*, eval.mt_bench and eval.mt_bench_references
come after it. Judgments that are there already are not asked for again, except those that were cut
off by length (raise judge.max_new_tokens for them). With judge.kind=local, or a judge of your own,
it may run under torchrun. The run's own records stay as they are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedsim.base.disk import explaining_full_disk
from fedsim.base.errors import ConfigError, DataError, JudgeError
from fedsim.base.launching import Parser, launched
from fedsim.base.tables import Table
from fedsim.config import Config, load_config
from fedsim.data.evaluation_sets import MtQuestion
from fedsim.evaluate.fastchat import JudgmentFile, read_answers
from fedsim.evaluate.intervals import Mean
from fedsim.evaluate.judge import Judged, MtJudge
from fedsim.evaluate.judge_inputs import check_judge
from fedsim.evaluate.mt_bench import SCALE, mean_scores
from fedsim.parallel.world import World, process_world
from fedsim.record.progress import Progress

Answered = list[tuple[MtQuestion, tuple[str, str]]]

JUDGED, UNRATED = "turns judged", "turns without a rating"
CUT = "of these, cut off by length"
NOT_ASKED, UNJUDGED = "turns too long for the judge", "turns that the judge failed at"

FREE = (
    "judge.",
    "eval.mt_bench=",
    "eval.mt_bench_references=",
    "eval.batch_size=",
    "model.dtype=",
    "model.attention=",
)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Command-line arguments.

    Raises:
        ConfigError: they are not of the form.
    """
    parser = Parser(
        prog="fedsim judge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="a run's directory")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="overrides of the run's configuration",
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="MODEL_ID",
        help="judge only this file of answers; repeatable",
    )
    return parser.parse_intermixed_args(argv)


def load(run: Path, overrides: Sequence[str]) -> Config:
    """Load the run's configuration, with the judge that rates.

    Raises:
        ConfigError: no run, an override of something else, or no judge.
    """
    wrong = [text for text in overrides if not text.startswith(FREE)]
    if wrong:
        raise ConfigError(
            f"override {wrong[0]!r}: only the judge may be changed here: {', '.join(FREE)}",
        )
    if not (run / "config.yaml").is_file():
        raise ConfigError(
            f"{run}: holds no config.yaml; give the directory of a run (record.dir/name)",
        )
    config = load_config(run / "config.yaml", overrides)
    if not config.judge.is_on:
        raise ConfigError(
            "judge.kind=none: the run has no judge; add judge.kind=openai, judge.kind=local or "
            "judge.kind=path/to/file.py:Name to the command"
        )
    check_judge(config)
    return config


def read_run(
    run: Path,
    questions: Sequence[MtQuestion],
    only: Sequence[str] | None,
) -> dict[str, Answered]:
    """The answers by model id, oldest first, each with its question.

    Raises:
        DataError: there are none, one that is asked for is missing, or an answer's question is not
            in the file.
    """
    # Files of answers, oldest first.
    folder = run / "answers" / "mt_bench" / "model_answer"
    paths = sorted(folder.glob("*.jsonl"), key=lambda path: (path.stat().st_mtime, path.name))
    files = {path.stem: path for path in paths}
    if not files:
        raise DataError(
            f"{folder}: holds no answers yet; a run writes them with its first evaluation",
        )
    unknown = [name for name in only or () if name not in files]
    if unknown:
        raise DataError(
            f"--only {unknown[0]}: has no answers in {folder}; there are {', '.join(files)}",
        )

    # Each answer with its question.
    by_id = {question.question_id: question for question in questions}
    found: dict[str, Answered] = {}
    for name in only or files:
        answers = read_answers(files[name])
        strangers = [number for number in answers if number not in by_id]
        if strangers:
            raise DataError(
                f"{files[name]}: answers question {strangers[0]}, which eval.mt_bench does not "
                "have; give the question file of the run"
            )
        found[name] = [(by_id[number], answers[number]) for number in answers]
    return found


def judge_all(
    judge: MtJudge,
    folder: Path,
    answered: Mapping[str, Answered],
    progress: Progress,
) -> tuple[dict[str, Judged], list[str], JudgeError | None]:
    """Judge one model after the other, until one cannot be finished.

    Returns:
        Ratings of the models whose every turn was tried, the names of those to be judged again, and
        the error.
    """
    done: dict[str, Judged] = {}
    left: list[str] = []
    failure: JudgeError | None = None
    for i, (model_id, answers) in enumerate(answered.items(), start=1):
        with progress.phase(model_id, 0, judge.unit) as phase:
            judged = judge.judge(folder, model_id, answers, phase.step)
        for line in judged.news:
            progress.note(line)

        # A judge that gave up, or turns that it failed at; unfinished models end the command.
        if judged.gave_up:
            left, failure = [*left, model_id], judged.error
        elif judged.error is not None:
            progress.note(f"{model_id}: {judged.num_unjudged} turns stay unjudged: {judged.error}")
        if not judged.complete:
            return done, [*left, *list(answered)[i:]], failure
        done[model_id] = judged
    return done, left, failure


def table(judged: Mapping[str, Judged], answered: Mapping[str, Answered]) -> Table:
    """Scores of every model: mean, turns and categories with 95 % intervals and counts."""
    # A column for each model: means with intervals, then counts of turns.
    columns: list[dict[str, str]] = []
    for model_id, outcome in judged.items():
        means = mean_scores([question for question, _ in answered[model_id]], outcome.scores)
        cells: dict[str, Mean | None] = {
            "mean": means.score,
            "turn 1": means.by_turn[0],
            "turn 2": means.by_turn[1],
        }
        column = {name: _cell(mean) for name, mean in (cells | means.by_category).items()}
        num_left = outcome.num_not_asked + outcome.num_unjudged
        column[JUDGED] = str(2 * len(answered[model_id]) - num_left)
        column[UNRATED] = str(outcome.num_unrated)
        rare = {
            CUT: outcome.num_cut,
            NOT_ASKED: outcome.num_not_asked,
            UNJUDGED: outcome.num_unjudged,
        }
        column |= {name: str(count) for name, count in rare.items() if count}
        columns.append(column)

    # Lines: means in the order in which they first appear, then counts; rare ones only if any.
    counts = [JUDGED, UNRATED]
    for name in (CUT, NOT_ASKED, UNJUDGED):
        if any(name in column for column in columns):
            counts.append(name)
    names: dict[str, None] = {}
    for column in columns:
        for name in column:
            if name not in counts:
                names[name] = None
    lines = []
    for name in [*names, *counts]:
        missing = "0" if name in counts else "none"
        lines.append([name, *(column.get(name, missing) for column in columns)])
    return Table(["MT-Bench, 1–10", *judged], lines)


def _cell(mean: Mean | None) -> str:
    """``5.81 [5.32, 6.30] of 80``; one question has no interval."""
    if mean is None:
        return "none"
    if mean.count <= 1:
        return f"{mean.value:.2f} of {mean.count}"
    low, high = max(mean.low, SCALE[0]), min(mean.high, SCALE[1])
    return f"{mean.value:.2f} [{low:.2f}, {high:.2f}] of {mean.count}"


def run(config: Config, world: World, run: Path, only: Sequence[str] | None) -> None:
    """Judge the answers and print the table of scores.

    Raises:
        JudgeError: some answers are left unjudged.
    """
    judge = MtJudge(config, world.ranks, world.device)
    answered = world.ranks.once(lambda: read_run(run, judge.questions, only))
    folder = run / "answers" / "mt_bench"
    with explaining_full_disk([folder], "the last judgment"):
        done, left, error = judge_all(
            judge,
            folder,
            answered,
            Progress(sys.stderr, enabled=world.ranks.is_main),
        )
    if done and world.ranks.is_main:
        print(table(done, answered).plain())
        print("[low, high] = 95 % interval; of = questions with a rating")
        print(f"judgments: {JudgmentFile(folder, judge.name).path}", flush=True)
    if error is not None:
        raise JudgeError(
            f"{error}. Not finished: {', '.join(left)}; what was judged is kept, and the same command goes on from it",
        )


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""

    def read() -> tuple[argparse.Namespace, Config]:
        args = parse_args(argv)
        return args, load(args.run, args.overrides)

    def work(asked: tuple[argparse.Namespace, Config]) -> None:
        args, config = asked
        parallel = config.parallel
        with process_world(
            exact=parallel.exact,
            threads=parallel.threads,
            timeout_s=parallel.timeout_s,
            device=parallel.device,
        ) as world:
            run(config, world, args.run, args.only)

    return launched(read, work)
