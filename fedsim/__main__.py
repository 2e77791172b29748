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
    "profile": ("profile", "times of a round's stages; with --cai the cost of an iteration of CAI"),
    "costs": ("costs", "the paper's elapsed times beside measured and projected ones"),
    "list": ("list", "algorithms, guards and other classes that a configuration can name"),
    "config": ("config", "the configuration that results from a file and overrides"),
}
"""Command → module of fedsim.commands, imported when it is chosen, and one line of help."""

LOCAL_RANK: Final = ("--local_rank", "--local-rank")
"""Option that a launcher puts before the command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command of a command line and return the exit status.

    Args:
        argv: words of the command line; None = this process's. The command comes first; ``deepspeed
            --module fedsim`` puts its ``--local_rank`` before it.
    """
    if argv is None:
        argv = sys.argv[1:]
    words = list(argv)

    # The first word names the command, but for the option of a launcher.
    name = ""
    for word in words:
        if not word.startswith(LOCAL_RANK):
            name = word
            break
    if name not in COMMANDS:
        return launched(lambda: _answer(name), _print)
    words.remove(name)
    if COMMANDS[name][0] not in ("run", "profile"):  # the others take no launcher's option
        words = [word for word in words if not word.startswith(LOCAL_RANK)]

    # Import only the module of this command.
    target = f"fedsim.commands.{COMMANDS[name][0]}:main"
    command: Callable[[Sequence[str]], int] = load_target(target)
    if name == "check":
        words.insert(0, "--check")
    return command(words)


def _answer(word: str) -> str:
    """Return the text of ``--help`` or ``--version``.

    Args:
        word: first word of a command line without a command; "" for none.

    Raises:
        ConfigError: it is neither of them.
    """
    if word in ("-h", "--help"):
        lines = ["usage: fedsim COMMAND ...", ""]
        for name, (_, meaning) in COMMANDS.items():
            lines.append(f"  {name:<8} {meaning}")
        lines += ["", "fedsim COMMAND --help shows its options."]
        return "\n".join(lines)
    if word == "--version":
        return f"fedsim {__version__}"
    if not word:
        raise ConfigError(
            f"command line: names no command; give one of {', '.join(COMMANDS)} (fedsim --help)",
        )
    # A mistyped command.
    close = difflib.get_close_matches(word, COMMANDS, n=1)
    hint = f"give one of {', '.join(COMMANDS)}"
    if close:
        hint = f"did you mean {close[0]}?"
    raise ConfigError(
        f"command line: {word[:200]!r} is no command; {hint} (fedsim --help lists all)",
    )


def _print(text: str) -> None:
    """Print a text, only in the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


if __name__ == "__main__":
    sys.exit(main())
