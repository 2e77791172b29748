"""Options that the commands of all studies share, a study's launch, and its lines of progress."""

from __future__ import annotations

import argparse
import csv
import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from fedsim.base.errors import ConfigError
from fedsim.base.launching import Parser
from fedsim.base.version import repository
from fedsim.config import load_config
from fedsim.config.command_line import split_words
from fedsim.study.runs import Launch, words_of

PUBLISH = "--publish"
"""Option that also copies a study's rows to docs/results and writes its page from them."""

PAGE = "--page"
"""Option that runs nothing and writes the page from the committed rows."""

RESULTS: Final = Path("docs") / "results"
"""Folder of committed rows and of the pages made from them, below the root of the repository."""

HERE = re.compile(r"(?<![^=])~?/(?:[^/=]+/)*(?=[^/=]+/?$)")
"""The folders of an absolute path that is a word, or the value of one."""

ENTRY = ("-m", "fedsim", "run")
"""Arguments of python, or of torchrun, that start a run."""


def add_run_options(
    parser: argparse.ArgumentParser,
    default_seeds: str,
    first: str = "CONFIG.yaml",
) -> None:
    """Options of a study: configuration, seeds, processes of a run, runs at once.

    Args:
        default_seeds: "" where the file names them.
        first: the file, as the help shows it.
    """
    parser.add_argument(
        "words",
        nargs="*",
        metavar=f"{first} | key=value",
        help=f"{first} and overrides",
    )
    parser.add_argument(
        "--seeds",
        default=default_seeds,
        help=f"such as 0-2 or 3,5,8 (default: {default_seeds or 'those of the sweep'})",
    )
    parser.add_argument("--nproc", type=int, help="processes of a run (default: one a GPU, else 1)")
    pages = parser.add_mutually_exclusive_group()
    pages.add_argument(
        PUBLISH,
        action="store_true",
        help="also copy the rows to docs/results and write the page there",
    )
    pages.add_argument(
        PAGE,
        action="store_true",
        help="run nothing, write the page from the committed rows",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        help="runs at once (default: 1 on GPUs, else as many as fill the cores)",
    )


def parse_table(prog: str, description: str | None, argv: Sequence[str]) -> argparse.Namespace:
    """The command line of the commands that make the paper's tables.

    Returns:
        The options of :func:`add_run_options`, ``paper`` (take the paper's schedule) and
        ``made_by``.
    """
    parser = Parser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_options(parser, default_seeds="0-2")
    parser.add_argument(
        "--paper",
        action="store_true",
        help="the paper's schedule: 50 rounds of 5 x 25 steps, 50 CAI iterations a round",
    )
    args = parser.parse_intermixed_args(argv)
    args.made_by = made_by(prog, argv)
    check_publishing(args)
    return args


def launch_of(
    args: argparse.Namespace,
    study: str,
    default_config: Path,
    settings: Mapping[str, Any] | None = None,
    varied: Iterable[str] = (),
) -> Launch:
    """Build the launch of a study from its command line.

    Args:
        study: its name.
        default_config: configuration file where the command line names none.
        settings: keys that the study sets for all cells, before the user's own.
        varied: keys of which every cell has its own value, beside ``name`` and ``seed``.

    Raises:
        ConfigError: a word that is neither a config file nor key=value, one of a key that the cells
            vary, or a count below 1.
    """
    # Words of keys that every cell sets itself are errors.
    file, overrides = split_words(args.words)
    for word in overrides:
        key = word.partition("=")[0].strip()
        if key in {"name", "seed", *varied}:
            fix = "give --seeds" if key == "seed" else "leave it out"
            raise ConfigError(
                f"command line: {word}: every run of {study} has its own {key}; {fix}",
            )

    # Processes of a run, and runs at once: one on GPUs, as many as fill the cores on the CPU.
    config = file or default_config
    own = words_of(settings or {})
    num_gpus = torch.cuda.device_count()
    num_processes = max(num_gpus, 1) if args.nproc is None else args.nproc
    threads = load_config(config, [*own, *overrides]).parallel.threads
    fitting = max(1, num_cores() // max(num_processes * threads, 1))
    num_jobs = 1 if num_gpus else fitting
    if args.jobs is not None:
        num_jobs = args.jobs
    for name, value in (("--nproc", num_processes), ("--jobs", num_jobs)):
        if value < 1:
            raise ConfigError(f"{name} {value}: must be at least 1")
    return Launch(study, config, [*own, *overrides], num_processes, num_jobs, ENTRY)


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def parse_seeds(text: str) -> list[int]:
    """``0-2`` → [0, 1, 2]; ``3,5`` → [3, 5].

    Raises:
        ConfigError: another form, or a seed twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise ConfigError(
                f"--seeds {text!r}: must be whole numbers and ranges, such as 0-2 or 3,5,8",
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first >= 1000:
            raise ConfigError(
                f"--seeds {text!r}: {part.strip()} must go upwards, over fewer than 1,000 seeds",
            )
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {text!r}: names a seed twice; name each once")
    return seeds


def say(text: str) -> None:
    """Print one line of a study's progress."""
    print(text, file=sys.stderr, flush=True)


def write_csv(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write a tidy CSV file; its columns are the records' keys, in order of first appearance."""
    columns: dict[str, None] = {}
    for record in records:
        columns |= dict.fromkeys(record)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def made_by(program: str, argv: Sequence[str]) -> str:
    """The command as a reader would type it, without this machine's folders and publishing.

    Args:
        program: such as ``fedsim table1``.
    """
    words = program.split()
    for word in argv:
        if word != PUBLISH and not word.startswith("record."):
            words.append(HERE.sub(r"…/", word))
    return f"`{shlex.join(words)}`"


def results_folder(option: str) -> Path:
    """``docs/results`` of the clone that fedsim runs from: published rows and pages.

    Args:
        option: what asks for it, for the error.

    Raises:
        ConfigError: fedsim is installed without a clone.
    """
    root = repository()
    if root is None:
        raise ConfigError(
            f"{option}: needs docs/results of a clone of fedsim, and this fedsim is installed "
            "without one; leave it out (a study's rows and tables are in its folder under "
            "record.dir), or run from a clone"
        )
    return root / RESULTS


def check_publishing(args: argparse.Namespace) -> None:
    """Check, before anything is run, that published rows and pages have a folder.

    Raises:
        ConfigError: it has none.
    """
    if args.publish or args.page:
        results_folder(PUBLISH if args.publish else PAGE)
