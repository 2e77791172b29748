"""The command ``fedsim``, which is also ``python -m fedsim`` and ``torchrun -m fedsim``."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Final

from fedsim import __version__
from fedsim.base.errors import ConfigError
from fedsim.base.launching import launched
from fedsim.base.user_code import load_target

COMMANDS: Final = {
    "run": ("run", "one run: prepare, train, align and evaluate"),
    "check": ("run", "check everything that a run needs, and print its plan"),
    "table1": ("table1", "the paper's Table 1: four methods, two algorithms, several seeds"),
    "table2": ("table2", "the paper's Table 2: the guard before and after fine-tuning"),
    "sweep": ("sweep", "a grid over configuration keys, with findings"),
    "judge": ("judge", "let a judge rate a run's MT-Bench answers"),
    "report": ("report", "one HTML page of finished runs"),
    "profile": ("profile", "where a round's time goes; with --cai what an iteration of CAI costs"),
    "costs": ("costs", "the paper's elapsed times beside measured and projected ones"),
    "list": ("list", "algorithms, guards and all else that a configuration can name"),
    "config": ("config", "the configuration that a file and overrides come to"),
}
"""Command → module of fedsim.commands, imported when it is chosen, and what it does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the command line names; returns the exit status.

    Args:
        argv: words of the command line; None = this process's. The command comes first; ``deepspeed
            --module fedsim`` puts its ``--local_rank`` before it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = next(
        (word for word in words if not word.startswith(("--local_rank", "--local-rank"))),
        "",
    )
    if name not in COMMANDS:
        return launched(lambda: _answer(name), _print)
    words.remove(name)
    command: Callable[[Sequence[str]], int] = load_target(
        f"fedsim.commands.{COMMANDS[name][0]}:main",
    )
    return command(["--check", *words] if name == "check" else words)


def _answer(word: str) -> str:
    """The text that a first word which is no command asks for.

    Raises:
        ConfigError: it asks for none.
    """
    if word in ("-h", "--help"):
        lines = [f"  {name:<8} {meaning}" for name, (_, meaning) in COMMANDS.items()]
        return "\n".join(
            [
                "usage: fedsim COMMAND ...",
                "",
                *lines,
                "",
                "fedsim COMMAND --help shows its options.",
            ],
        )
    if word == "--version":
        return f"fedsim {__version__}"
    if not word:
        raise ConfigError(
            f"command line: names no command; give one of {', '.join(COMMANDS)} (fedsim --help)",
        )
    close = difflib.get_close_matches(word, COMMANDS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"give one of {', '.join(COMMANDS)}"
    raise ConfigError(
        f"command line: {word[:200]!r} is no command; {hint} (fedsim --help lists all)",
    )


def _print(text: str) -> None:
    """Print, of several processes from the first."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


if __name__ == "__main__":
    sys.exit(main())
