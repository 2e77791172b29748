"""From a YAML file and ``key=value`` overrides to a checked :class:`Config`; every error names the key."""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from fedsim.config.keys import rule_of
from fedsim.config.measuring import EMBEDDED, HELD_OUT, is_embedded
from fedsim.config.schema import Config
from fedsim.config.secrets import check_no_secret
from fedsim.errors import ConfigError

Flat = dict[str, Any]

_LARGEST = 2**63 - 1
"""Whole numbers above it fit neither a tensor nor an array."""

_SHOWN = 200
"""Characters of a value that an error shows."""


@dataclasses.dataclass(frozen=True)
class KeyInfo:
    """One key of the schema, ready to print."""

    name: str
    type_name: str
    default: Any
    meaning: str
    unit: str
    rule: str


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (whose ``base:`` names a file it builds on) and apply ``key=value`` overrides in order.

    Raises:
        ConfigError: an unreadable file, an unknown key, a wrong type or a value outside its rule.
    """
    read: Flat = {} if path is None else _read_file(path, seen=())
    kinds = {name: get_type_hints(owner)[declared.name] for name, owner, declared in _fields(Config)}
    flat = {name: _meant(value, is_text=kinds.get(name) is str) for name, value in read.items()}
    for text in overrides:
        name, sign, value = text.partition("=")
        if not sign:
            raise ConfigError(
                f"override {_quoted(text)}: must have the form key=value, such as federation.num_rounds=8"
            )
        name = name.strip()
        check_no_secret(name, value, is_key=name in kinds)
        flat[name] = _parse(value, name, is_text=kinds.get(name) is str)
    return from_flat(flat)


def from_flat(flat: Mapping[str, Any]) -> Config:
    """A config from dotted keys; keys that are absent take their defaults."""
    known = {name: (owner, declared) for name, owner, declared in _fields(Config)}
    for name in flat:
        check_no_secret(name, flat[name], is_key=name in known)
        if name not in known:
            raise ConfigError(_unknown(name, flat[name], list(known)))
    groups: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        owner, declared = known[name]
        section, _, leaf = name.rpartition(".")
        groups.setdefault(section, {})[leaf] = _checked(name, value, get_type_hints(owner)[declared.name], declared)
    sections: dict[str, Any] = {
        name: kind(**groups.get(name, {}))
        for name, kind in get_type_hints(Config).items()
        if isinstance(kind, type) and dataclasses.is_dataclass(kind)
    }
    return Config(**groups.get("", {}), **sections)


def to_flat(config: Config) -> Flat:
    """Every key of a config with its value, in the schema's order."""
    flat: Flat = {}
    for name, _, _ in _fields(Config):
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part)
        flat[name] = value
    return flat


def to_nested(config: Config) -> dict[str, Any]:
    """A config as nested mappings; ``yaml.safe_dump`` of it is a config file that gives the same config."""
    return dataclasses.asdict(config)


def describe() -> list[KeyInfo]:
    """Every key with type, default, meaning, unit and rule."""
    infos = []
    for name, owner, declared in _fields(Config):
        default = _default_of(declared)
        kind = get_type_hints(owner)[declared.name]
        type_name = getattr(kind, "__name__", str(kind)) if not hasattr(kind, "__origin__") else "list of str"
        meta = declared.metadata
        infos.append(KeyInfo(name, type_name, default, meta["meaning"], meta["unit"], rule_of(declared).words()))
    return infos


@functools.cache
def file_roles() -> Mapping[str, str]:
    """Keys that name a file, each with the file's role among a manifest's inputs."""
    return {name: role for name, _, declared in _fields(Config) if (role := declared.metadata["file"])}


@functools.cache
def model_roles() -> Mapping[str, str]:
    """Keys that name a model directory, each with the model's role among a manifest's models."""
    return {name: role for name, _, declared in _fields(Config) if (role := declared.metadata["model"])}


def _default_of(declared: dataclasses.Field[Any]) -> Any:
    if declared.default is not dataclasses.MISSING:
        return declared.default
    assert declared.default_factory is not dataclasses.MISSING
    return declared.default_factory()


def _fields(owner: type, prefix: str = "") -> Iterator[tuple[str, type, dataclasses.Field[Any]]]:
    hints = get_type_hints(owner)
    for declared in dataclasses.fields(owner):
        kind = hints[declared.name]
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            yield from _fields(kind, f"{prefix}{declared.name}.")
        else:
            yield f"{prefix}{declared.name}", owner, declared


def _read_file(path: Path, seen: tuple[Path, ...]) -> Flat:
    if path.resolve() in seen:
        raise ConfigError(f"config {path}: its base: files refer to each other in a circle; remove one of the links")
    try:
        content = _yaml(path.read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise ConfigError(f"config {path}: cannot be read ({error.strerror}); give the path of a YAML file") from error
    except ValueError as error:
        raise ConfigError(f"config {path}: is not valid YAML ({error})") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"config {path}: must be a mapping of keys to values, is a {type(content).__name__}")
    base = _meant(content.pop("base", None), is_text=False)
    if base is not None and not (isinstance(base, str) and base.isprintable()):
        raise ConfigError(
            f"config {path}: base={_quoted(base)} must be the path of a config file, relative to this file"
        )
    flat = {} if base is None else _read_file(path.parent / base, (*seen, path.resolve()))
    leaves = list(_leaves(content, ""))
    for name, count in Counter(name for name, _ in leaves).items():
        if count > 1:
            raise ConfigError(f"config {path}: {_plain(name)} is given twice; remove one of the lines")
    return flat | dict(leaves)


def _yaml(text: str, loader: type[yaml.SafeLoader]) -> Any:
    """The value of a YAML text; ValueError with a reason of one line, whatever PyYAML makes of a malformed one."""
    try:
        return yaml.load(text, Loader=loader)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except yaml.YAMLError as error:
        raise ValueError(_plain(" ".join(str(error).split()))) from error
    except Exception as error:  # tags and dates that do not fit their values, numbers of thousands of digits
        raise ValueError(f"a value cannot be read as what its form or tag says: {_plain(str(error))}") from error


@dataclasses.dataclass(frozen=True)
class _Scalar:
    """A value that YAML reads as something else than text, such as a number or a date, and what was written."""

    value: Any
    source: str


def _meant(value: Any, *, is_text: bool) -> Any:
    """A value as its key needs it: a text key takes what was written, but a value that is left out is none."""
    if not isinstance(value, _Scalar):
        return value
    is_date = isinstance(value.value, datetime.date)  # no key is one: an error shows it as it was written
    return value.source if is_date or (is_text and value.value is not None) else value.value


class _Plain(yaml.SafeLoader):
    """YAML without aliases: a few lines of them can stand for more than any memory holds, or for themselves."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            where = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not taken; write the value out", where)
        return super().compose_node(parent, index)


class _UniqueKeys(_Plain):
    """YAML in which a repeated key is an error instead of the last one winning, and values know what was written."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = Counter(name.value for name, _ in node.value if isinstance(name, yaml.ScalarNode))
        for name, count in names.items():
            if count > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{name} is given twice", node.start_mark)
        made = super().construct_mapping(node, deep)
        for name, value in node.value:
            key = self.construct_object(name, deep=True)
            if isinstance(value, yaml.ScalarNode) and not isinstance(made[key], str):
                made[key] = _Scalar(made[key], value.value)
        return made


def _leaves(content: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _parse(value: str, name: str, *, is_text: bool) -> Any:
    """The value as YAML reads it; for a text key, what is no text to YAML stays as it was typed (``name=010``)."""
    try:
        parsed = _yaml(value, _Plain) if value.strip() else ""
    except ValueError as error:
        raise ConfigError(
            f"override {_plain(name)}={_quoted(value)}: the value is not valid YAML ({error}); quote it"
        ) from error
    is_date = isinstance(parsed, datetime.date)  # no key is one: an error shows it as it was typed
    return value.strip() if is_date or (is_text and not isinstance(parsed, str)) else parsed


def _checked(name: str, value: Any, kind: Any, declared: dataclasses.Field[Any]) -> Any:
    rule = rule_of(declared)
    if value == [] and kind == list[str] and _default_of(declared) == []:
        return value
    value = _coerced(name, value, kind, rule.words())
    broken = rule.broken_by(value)
    if broken is not None:
        raise ConfigError(f"{name}={_quoted(value)}: {broken}{_nearest_choice(value, rule.choices)}")
    if value == HELD_OUT and _default_of(declared) == EMBEDDED and not is_embedded(name, value):
        raise ConfigError(f"{name}={value!r}: eval.advbench alone has such items; set {EMBEDDED!r}, or give a path")
    return value


def _coerced(name: str, value: Any, kind: Any, rule: str) -> Any:
    """``value`` as ``kind``; YAML reads ``5e-5`` as text, so numbers in text are numbers."""
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        except OverflowError:
            number = float("inf")
        value = number if number == number else value
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if kind == list[str] and isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        return value
    plain = kind if isinstance(kind, type) else list
    if not isinstance(value, plain) or (isinstance(value, bool) and kind is not bool) or kind == list[str]:
        wanted = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
        words = wanted.get(getattr(kind, "__name__", ""), "a list of names, such as [q_proj, v_proj]")
        raise ConfigError(f"{name}={_quoted(value)}: must be {words}{f' ({rule})' if rule else ''}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}={value!r}: must be a finite number{f' ({rule})' if rule else ''}")
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise ConfigError(f"{name}={_quoted(value)}: must be at most {_LARGEST}")
    return value


def _quoted(value: Any) -> str:
    """A value in an error: one line of bearable length."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _plain(name: str) -> str:
    """A key or a library's words in an error: likewise, without quotes where all can be printed."""
    return name if name.isprintable() and len(name) <= 2 * _SHOWN else _quoted(name)


def _nearest_choice(value: Any, choices: tuple[str, ...] | None) -> str:
    close = difflib.get_close_matches(str(value), choices or (), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _unknown(name: str, value: Any, known: Sequence[str]) -> str:
    leaf = name.rpartition(".")[2]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5) or [
        k
        for k in known
        if k.rpartition(".")[2] in difflib.get_close_matches(leaf, [x.rpartition(".")[2] for x in known])
    ]
    sections = [k for k in known if k.startswith(f"{name}.")]
    if sections:
        return f"{name}={_quoted(value)}: is a group of keys, not a key; set one of {', '.join(sections)}"
    hint = f"the nearest key is {close[0]}" if close else "no key is close"
    return f"{_plain(name)}={_quoted(value)}: is not a configuration key; {hint} (launch/run.py --help lists all keys)"
