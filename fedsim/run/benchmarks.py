"""The benchmarks that a run's configuration asks for, and the texts that they leave behind."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from fedsim.base.artefacts import ArtefactStore, write_json
from fedsim.base.errors import ConfigError, DataError, Gathered
from fedsim.base.figures import Figure, name_given_twice
from fedsim.base.paths import user_path
from fedsim.base.user_code import calling
from fedsim.config import EvalConfig, file_roles
from fedsim.config.measuring import is_embedded
from fedsim.evaluate.benchmark import Benchmark, OwnBenchmark
from fedsim.evaluate.fastchat import write_answers
from fedsim.evaluate.own import DESCRIBED, OWN
from fedsim.evaluate.suite import Evaluation, Part, Suite
from fedsim.extend import build
from fedsim.record.outcomes import write_items
from fedsim.run.prepare import embedded_file


def load_suite(
    settings: EvalConfig,
    store: ArtefactStore,
    *,
    judged: bool = False,
) -> tuple[Suite, dict[str, Path]]:
    """Read every benchmark of the configuration.

    The embedded world's grammar and rubric come with its own benchmarks only. A guard is not loaded
    here.

    Args:
        judged: a language model rates MT-Bench's answers.

    Returns:
        The benchmarks, and the file of each by the benchmark's name.

    Raises:
        ConfigError: a user's phrase rule or benchmark cannot be loaded.
        DataError: a missing or malformed file.
        Problems: several.
    """
    mistakes = Gathered()
    parts: list[Part] = []
    files: dict[str, Path] = {}

    # fedsim's own benchmarks, each with a key of its own.
    for name, kind in OWN.items():
        value = getattr(settings, name)
        if not value:
            continue
        files[name] = _file(kind, value, store)
        part = mistakes.attempt(lambda: _part(kind, settings, files[name], judged))  # noqa: B023
        if part is not None:
            parts.append(part)

    # The user's benchmarks; none if one of them cannot be built.
    benchmarks = mistakes.attempt(lambda: users_benchmarks(settings)) or []
    for benchmark, one in zip(benchmarks, settings.benchmarks, strict=bool(benchmarks)):
        files[benchmark.name] = user_path(one.path)
        part = mistakes.attempt(lambda: _users_part(benchmark, files[benchmark.name]))  # noqa: B023
        if part is not None:
            parts.append(part)
    mistakes.raise_all()
    return Suite(parts, limit=settings.limit), files


def _part(kind: type[OwnBenchmark], settings: EvalConfig, file: Path, judged: bool) -> Part:
    benchmark = kind.from_config(settings, judged=judged)
    return Part(benchmark, benchmark.load(file))


def users_benchmarks(settings: EvalConfig) -> list[Benchmark]:
    """Build and check the benchmarks of ``eval.benchmarks``; none of their files is read.

    Raises:
        ConfigError: one of them cannot be loaded or built, or has no name, title or figure that
            fedsim can take.
    """
    found: list[Benchmark] = []
    for place, one in enumerate(settings.benchmarks):
        benchmark = build("eval.benchmarks.kind", one.kind, one.options)
        check_declared(benchmark, f"eval.benchmarks.{place}.kind={one.kind!r}")
        found.append(benchmark)
    twice = name_given_twice([*DESCRIBED, *(benchmark.describe() for benchmark in found)])
    if twice is not None:
        raise ConfigError(
            f"eval.benchmarks: the {twice} is there twice; give one of the two another name",
        )
    return found


TAKEN: Final = {
    *("square", "constitution", "deepspeed"),
    *file_roles().values(),
    *(field.name for field in fields(EvalConfig)),
}.difference(OWN)
"""Names that the manifest, keys of artefacts or the configuration use for something else."""


def check_declared(benchmark: Benchmark, what: str) -> None:
    """Check name, title and figures of a user's benchmark.

    Raises:
        ConfigError: one of them is missing, or a figure's name does not begin with the benchmark's.
    """
    name = getattr(benchmark, "name", None)
    title = getattr(benchmark, "title", None)
    figures: Any = getattr(benchmark, "figures", None)

    # Name and title.
    if not isinstance(name, str) or not name.isidentifier():
        raise ConfigError(
            f'{what}: needs a name of letters, digits and "_", such as name = "do_not_answer"',
        )
    if name in TAKEN:
        raise ConfigError(
            f"{what}: the name {name!r} means another file or key of a run; give the benchmark another",
        )
    if not isinstance(title, str) or not title:
        raise ConfigError(f'{what}: needs a title for people, such as title = "DoNotAnswer"')

    # Figures, all named after the benchmark.
    is_list = isinstance(figures, list | tuple) and len(figures) > 0
    if not is_list or not all(isinstance(figure, Figure) for figure in figures):
        raise ConfigError(
            f'{what}: needs figures, such as figures = (Figure("{name}_refused", "{title}: refused"),)',
        )
    for figure in figures:
        if figure.name != name and not figure.name.startswith(f"{name}_"):
            raise ConfigError(
                f"{what}: its figure {figure.name!r} must be named {name}, or {name}_ and more",
            )


def _users_part(benchmark: Benchmark, file: Path) -> Part:
    what = f"benchmark {benchmark.name}"
    if not file.is_file():
        raise DataError(
            f"{what}: {file} is no file; give the path of one as its path in eval.benchmarks",
        )
    with calling(what, DataError, quiet=True):
        items = benchmark.load(file)
    if not isinstance(items, list | tuple) or not items:
        raise DataError(f"{what}: load() must return a list of items, at least one")
    return Part(benchmark, items)


def _file(kind: type[OwnBenchmark], value: str, store: ArtefactStore) -> Path:
    """The file that ``eval.<name>`` names; one of the embedded world is written first."""
    if not is_embedded(f"eval.{kind.name}", value):
        return user_path(value)
    embedded = kind.embedded[value]
    return embedded_file(store, embedded.artefact, embedded.name, embedded.write)


def write_texts(
    found: Evaluation,
    suite: Suite,
    folder: Path,
    model_id: str,
    *,
    attacks: bool,
) -> None:
    """Write the model's replies, on rank 0.

    Answers that a judge may read (harmless questions) are written as FastChat's files.

    Args:
        suite: what was asked.
        folder: made where there is something to write.
        model_id: names the model and the point in FastChat's files.
        attacks: also write all other free replies (``record.texts``), such as those to attacks,
            each with its item's place in the file, counted from 0; they go nowhere else.
    """
    if found.answers:
        write_answers(folder / "mt_bench", found.answers, model_id, tstamp=time.time())
    if not attacks:
        return

    # Free replies of the other benchmarks.
    for part in suite.parts:
        result = found.results.get(part.benchmark.name)
        if result is None or not result.replies or result.answers:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        places = part.places(suite.limit)
        texts = [reply.text for reply in result.replies]
        write_json(folder / f"{part.benchmark.name}-{model_id}.json", _placed(texts, places))


def _placed(texts: Sequence[str], places: Sequence[int]) -> list[dict[str, Any]]:
    """Replies with the place of their item; without it where items and replies do not match."""
    if len(texts) % len(places):
        return [{"reply": text} for text in texts]
    return [{"item": places[i % len(places)], "reply": text} for i, text in enumerate(texts)]


def write_outcomes(found: Evaluation, path: Path) -> None:
    """Write the items behind the figures (:attr:`Evaluation.items`), on rank 0, if there are any.

    Scores of a local or remote judge are not among them; they are beside the answers.

    Args:
        path: of the file; its folder is made.
    """
    if found.items:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_items(path, found.items)
