"""Print the configuration that a run would have: ``fedsim config [FILE.yaml] [key=value …]``.

The output is a configuration file that gives the same run. ``--markdown`` prints the reference of
all keys instead, which is docs/config.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import yaml

from fedsim.base.errors import ConfigError
from fedsim.base.launching import Parser, launched
from fedsim.config import load_config, to_nested
from fedsim.config.command_line import DEFAULT, split_words
from fedsim.config.page import page


def text(args: argparse.Namespace) -> str:
    """Return the text that the command prints.

    Raises:
        ConfigError: a mistake in the configuration, or words beside ``--markdown``.
    """
    if args.markdown:
        if args.words:
            raise ConfigError(
                f"--markdown: is about all keys, and takes no {args.words[0]!r}; leave one of them out",
            )
        return page()
    file, overrides = split_words(args.words)
    config = load_config(file or DEFAULT, overrides)
    return yaml.safe_dump(to_nested(config), sort_keys=False, allow_unicode=True)


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    parser = Parser(
        prog="fedsim config",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG.yaml | key=value",
        help="config file and overrides",
    )
    parser.add_argument(
        "--markdown",
        action="store_true",
        help="print the reference of all keys as Markdown",
    )
    return launched(
        lambda: text(parser.parse_intermixed_args(argv)),
        lambda shown: print(shown, end=""),
    )
