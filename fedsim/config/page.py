"""Reference of all configuration keys: the text of ``--help``, and docs/config.md."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any, Final, get_type_hints

import yaml

from fedsim.config.loading import KeyInfo, describe
from fedsim.config.schema import Config

INTRODUCTION: Final = """# Configuration keys

Every key of a run, by section, with the value that it has when neither a file nor the command
line sets it. A key is set in a YAML file (`federation: {num_rounds: 8}`) or on the command line
(`federation.num_rounds=8`); [Your own run](run.md) has files, overrides and `--check`.
`configs/demo.yaml` and `configs/paper/*.yaml` set many of these keys. A value that breaks its rule
is an error that names the key, the rule and the fix. Written by `fedsim config --markdown`;
`fedsim run --help` prints the same."""

KINDS: Final = {
    "bool": "true or false",
    "int": "whole number",
    "float": "number",
    "str": "text",
    "list of str": "list of names",
    "mapping": "mapping",
    "list of mappings": "list of mappings",
}
"""Name of each type in the reference."""


def help_text() -> str:
    """Write the reference as ``--help`` prints it."""
    lines = []
    for section, infos in sections():
        lines.append(f"\n{section or 'run'}:")
        for info in infos:
            # Type, unit and rule of the value.
            notes = ", ".join(note for note in (info.type_name, info.unit, info.rule) if note)
            lines.append(f"  {info.name} = {_shown(info.default)}\n      {info.meaning} [{notes}]")
    return "\n".join(lines)


def page() -> str:
    """Write the reference as a Markdown page.

    It has a section for each group of keys, with the group's docstring and a table.
    """
    hints = get_type_hints(Config)
    parts = [INTRODUCTION]
    for section, infos in sections():
        about = inspect.getdoc(Config)
        if section:
            about = inspect.getdoc(hints[section])
        assert about is not None
        # One row for each key.
        lines = ["| key | default | meaning | values |", "| --- | --- | --- | --- |"]
        for info in infos:
            meaning = info.meaning.replace("|", "\\|")
            lines.append(
                f"| `{info.name}` | `{_shown(info.default)}` | {meaning} | {_values(info)} |",
            )
        parts += [f"## {section or 'run'}", about, "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def sections() -> Iterator[tuple[str, list[KeyInfo]]]:
    """Group the keys in the schema's order; keys outside any group come first, under ""."""
    infos = describe()
    names = [""]
    for name, kind in get_type_hints(Config).items():
        if dataclasses.is_dataclass(kind):
            names.append(name)
    for section in names:
        yield section, [info for info in infos if info.name.rpartition(".")[0] == section]


def _values(info: KeyInfo) -> str:
    """Describe the values of a key: ``whole number >= 1, rows``, or a list of its choices."""
    if " | " in info.rule:
        return ", ".join(f"`{choice}`" for choice in info.rule.split(" | "))
    values = f"{KINDS[info.type_name]} {info.rule}".strip()
    if info.unit:
        values += f", {info.unit}"
    return values


def _shown(value: Any) -> str:
    """Write a default as a YAML file would have it."""
    return yaml.safe_dump(value, default_flow_style=True).strip().removesuffix("...").strip()
