"""List the names that a configuration can use: ``fedsim list [KEY [NAME]]``.

Without KEY all keys are listed that name code, each with fedsim's own classes or functions and
their options. With KEY it is only that key, and with NAME one entry, which may be your own:
``fedsim list federation.algorithm my.py:Krum``.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, Final

from fedsim.base.errors import ConfigError
from fedsim.base.launching import Parser, launched
from fedsim.extend import KINDS, Own, check_name, load

WIDTH: Final = 80


def text(key: str = "", name: str = "") -> str:
    """The list.

    Args:
        key: one key of :data:`fedsim.extend.KINDS`; "" = all.
        name: one name that the key can have; "" = fedsim's own.

    Raises:
        ConfigError: no such key, or a name that cannot be loaded.
    """
    # A mistyped key.
    if key and key not in KINDS:
        close = difflib.get_close_matches(key, KINDS, n=1)
        hint = f"give one of {', '.join(KINDS)}"
        if close:
            hint = f"did you mean {close[0]}?"
        raise ConfigError(f"{key[:200]}: is no key that names code; {hint}")

    # One name, one key, or all keys.
    if name:
        check_name(key, name)
        return "\n".join(_entry(key, name)) + "\n"
    keys = [key] if key else list(KINDS)
    groups = ["\n".join(_group(one)) for one in keys]
    return "\n\n".join(groups) + "\n"


def _group(key: str) -> Iterator[str]:
    """One key: its kind of value, then fedsim's own names."""
    kind = KINDS[key]
    if kind.base:
        wanted = f"a class that derives from fedsim.{kind.base.rpartition(':')[2]}"
    else:
        wanted = f"a function of ({', '.join(kind.takes)})"
    yield key
    yield from _wrapped(
        f"Your own: module:Name or path/to/file.py:Name, {wanted}. Options: {kind.options}.",
        "  ",
    )
    for name in kind.nameable:
        yield from _entry(key, name)
    if kind.own_key:
        yield "  fedsim's own have a key each:"
        for name in kind.own:
            yield f"  {kind.own_key.format(name)}"
            yield from _wrapped(first_line(load(key, name)), "      ")
    elif not kind.own:
        yield "  fedsim has none of its own."


def _entry(key: str, name: str) -> Iterator[str]:
    """One name: its docstring's first line, options with defaults, and keys of arguments."""
    kind = KINDS[key]
    found = load(key, name)
    given = kind.own.get(name, Own("")).given
    free = [option for option in options(found, kind.takes) if option.name not in given]
    if name in kind.own and any(option.default is option.empty for option in free):
        free = []  # fedsim builds it itself, from what no configuration can give
    yield f"  {name}"
    yield from _wrapped(first_line(found), "      ")
    if free:
        yield from _wrapped(f"options: {', '.join(map(_option, free))}", "      ")
    if given:
        yield from _wrapped(f"keys: {', '.join(dict.fromkeys(given.values()))}", "      ")


def first_line(found: Any) -> str:
    """First paragraph's first line of a docstring."""
    return (inspect.getdoc(found) or "(no docstring)").partition("\n")[0]


def options(found: Any, takes: Sequence[str]) -> list[inspect.Parameter]:
    """Keyword arguments of a class's constructor, or of a function after its positional ones."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = [one for one in inspect.signature(found).parameters.values() if one.kind in named]
    return parameters[len(takes) :]


def _option(option: inspect.Parameter) -> str:
    """``scale=5``, or ``scale (needed)``."""
    if option.default is option.empty:
        return f"{option.name} (needed)"
    return f"{option.name}={option.default!r}"


def _wrapped(line: str, indent: str) -> list[str]:
    """A line in 80 columns; words stay whole."""
    return textwrap.wrap(
        line,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    parser = Parser(
        prog="fedsim list",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "key",
        nargs="?",
        default="",
        metavar="KEY",
        help="such as federation.algorithm",
    )
    parser.add_argument(
        "name",
        nargs="?",
        default="",
        metavar="NAME",
        help="such as fedavg, or my.py:Krum",
    )

    def read() -> str:
        args = parser.parse_args(argv)
        return text(args.key, args.name)

    return launched(read, lambda shown: print(shown, end=""))
