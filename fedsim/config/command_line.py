"""Command line of a run: a config file, overrides, and the options that launchers add."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedsim.base.errors import ConfigError
from fedsim.base.launching import Parser
from fedsim.config.loading import SHIPPED
from fedsim.config.page import help_text

DEFAULT = SHIPPED / "demo.yaml"
EPILOG = """Without CONFIG.yaml, configs/demo.yaml is used, which sets many of these keys.
A file may name another that it builds on (base: OTHER.yaml).
Configuration keys, with their values when neither a file nor the command line sets them:
"""


@dataclass(frozen=True)
class Command:
    """A parsed command line.

    Attributes:
        file: the config file.
        overrides: ``key=value`` words, in order.
        local_rank: rank among the processes of this machine, where the launcher gives it as an
            option (deepspeed, torch.distributed.launch).
        check: check everything, print the plan of the run, and stop.
    """

    file: Path
    overrides: list[str]
    local_rank: int | None
    check: bool


def parse_command(arguments: Sequence[str]) -> Command:
    """Read a command line, without the program's name.

    Raises:
        ConfigError: a word that is neither a config file nor key=value, a second file, an unknown
            option.
    """
    # The keys of the configuration are documented in the help, and no options of the parser.
    parser = Parser(
        prog="fedsim run",
        usage="fedsim run [--check] [CONFIG.yaml] [key=value ...]\n"
        "       torchrun --nproc_per_node=N -m fedsim run ...\n"
        "       torchrun --nproc_per_node=N launch/run.py ...  (in a clone)\n"
        "       deepspeed --num_gpus N launch/run.py ...  (in a clone)",
        description="Run one simulation of responsible federated LLM training (arXiv 2502.16691).",
        epilog=EPILOG + help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG.yaml | key=value",
        help="config file and overrides",
    )
    parser.add_argument(
        "--local_rank",
        "--local-rank",
        type=int,
        help="added by launchers; the same as LOCAL_RANK",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="check everything, print the plan of the run, and stop",
    )
    given = parser.parse_intermixed_args(arguments)
    file, overrides = split_words(given.words)
    return Command(file or DEFAULT, overrides, given.local_rank, given.check)


def split_words(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Separate the config file, None if there is none, from the ``key=value`` words.

    Raises:
        ConfigError: a word that is neither, or a second file.
    """
    # A word with "=" is an override, any other names a file.
    files = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    for word in files:
        if not word.endswith((".yaml", ".yml")):
            raise ConfigError(f"argument {word!r}: must be a config file (*.yaml) or key=value")
    if len(files) > 1:
        raise ConfigError(
            f"command line: one config file at most, not {len(files)}: {' '.join(files)}",
        )
    if not files:
        return None, overrides
    return Path(files[0]), overrides
