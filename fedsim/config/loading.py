"""From a YAML file and ``key=value`` overrides to a checked :class:`Config`; every error names the
key.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import difflib
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import GenericAlias
from typing import Any, get_type_hints

import yaml

from fedsim.base.errors import ConfigError
from fedsim.config.attacks import AttackConfig
from fedsim.config.field import Rule, rule_of
from fedsim.config.measuring import EMBEDDED, HELD_OUT, BenchmarkConfig, is_embedded
from fedsim.config.schema import Config
from fedsim.config.secrets import check_no_secret
from fedsim.extend import KINDS, check_name, is_own, names_in_words

Flat = dict[str, Any]

_LARGEST = 2**63 - 1
"""Whole numbers above it fit neither a tensor nor an array."""


@dataclasses.dataclass(frozen=True)
class Listed:
    """A key whose value is a list of mappings, each of which names a user's code.

    Attributes:
        owner: dataclass of one entry.
        needed: keys that an entry must have.
        example: of a value.
    """

    owner: type
    needed: tuple[str, ...]
    example: str


LISTS = {
    "attacks": Listed(AttackConfig, ("kind", "share"), "[{kind: my.py:SignFlip, share: 0.2}]"),
    "eval.benchmarks": Listed(
        BenchmarkConfig,
        ("kind", "path"),
        "[{kind: my.py:DoNotAnswer, path: questions.csv}]",
    ),
}
"""Lists by key; ``<key>.kind`` is the kind of code that an entry names."""

_TYPE_NAMES = {
    str(list[str]): "list of str",
    str(dict[str, Any]): "mapping",
    **{str(GenericAlias(list, (listed.owner,))): "list of mappings" for listed in LISTS.values()},
}

_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
"""Numbers that YAML takes for text."""

_DEEPEST = 8
"""Lists and mappings inside one another that an option may have."""

_SHOWN = 200
"""Characters of a value that an error shows."""

SHIPPED = Path(__file__).parents[1] / "configs"
"""Configuration files that fedsim ships."""


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
    """Read a YAML file (whose ``base:`` names a file it builds on) and apply ``key=value``
    overrides in order.

    Raises:
        ConfigError: an unreadable file, an unknown key, a wrong type or a value outside its rule.
    """
    flat: Flat = {} if path is None else flat_from_file(path)
    kinds = _kinds()
    for text in overrides:
        name, sign, value = text.partition("=")
        if not sign:
            raise ConfigError(
                f"override {_quoted(text)}: must have the form key=value, such as federation.num_rounds=8",
            )
        name = name.strip()
        check_no_secret(name, value, is_key=name in kinds)
        flat = with_overrides(flat, {name: _parse(value, name, is_text=kinds.get(name) is str)})
    return from_flat(flat)


def with_overrides(flat: Mapping[str, Any], overrides: Mapping[str, Any]) -> Flat:
    """Keys and those that override them, which come last: they may set a part of what was given, or
    replace all.
    """
    kept = {
        name: value
        for name, value in flat.items()
        if name not in overrides and not any(key in overrides and name.startswith(f"{key}.") for key in _whole_keys())
    }
    return {**kept, **overrides}


def flat_from_file(path: Path) -> Flat:
    """The keys that a YAML file and those it builds on give, unchecked.

    Raises:
        ConfigError: a file cannot be read, or is no mapping.
    """
    kinds = _kinds()
    found = _read_file(config_file(path), seen=())
    return {name: _meant(value, is_text=kinds.get(name) is str) for name, value in found.items()}


def config_file(path: Path) -> Path:
    """A file as it was named; ``configs/...`` that is not in the working directory is the one that
    fedsim ships.
    """
    if path.parts[:1] == ("configs",) and not path.exists():
        shipped = SHIPPED.joinpath(*path.parts[1:])
        return shipped if shipped.is_file() else path
    return path


@functools.cache
def _kinds() -> Mapping[str, Any]:
    """Type of every key."""
    return {name: get_type_hints(owner)[declared.name] for name, owner, declared in _fields(Config)}


def from_flat(flat: Mapping[str, Any]) -> Config:
    """A config from keys, dotted or nested (a later one counts); keys that are absent take their
    defaults.
    """
    known = {name: (owner, declared) for name, owner, declared in _fields(Config)}
    flat = _with_parts(dict(_leaves(flat, "")))
    for name in flat:
        check_no_secret(name, flat[name], is_key=name in known)
        if name not in known:
            raise ConfigError(_unknown(name, flat[name], list(known)))
    groups: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        owner, declared = known[name]
        section, _, leaf = name.rpartition(".")
        groups.setdefault(section, {})[leaf] = _checked(
            name,
            value,
            get_type_hints(owner)[declared.name],
            declared,
        )
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
        flat[name] = [dataclasses.asdict(one) for one in value] if name in LISTS else value
    return flat


def to_nested(config: Config) -> dict[str, Any]:
    """A config as nested mappings; ``yaml.safe_dump`` of it is a config file that gives the same
    config.
    """
    return dataclasses.asdict(config)


def describe() -> list[KeyInfo]:
    """Every key with type, default, meaning, unit and rule."""
    infos = []
    for name, owner, declared in _fields(Config):
        default = _default_of(declared)
        kind = get_type_hints(owner)[declared.name]
        type_name = _TYPE_NAMES.get(str(kind)) or kind.__name__
        meta = declared.metadata
        rule = names_in_words(name) if name in KINDS else rule_of(declared).words()
        infos.append(KeyInfo(name, type_name, default, meta["meaning"], meta["unit"], rule))
    return infos


@functools.cache
def file_roles() -> Mapping[str, str]:
    """Keys that name a file, each with the file's role among a manifest's inputs."""
    return {name: role for name, _, declared in _fields(Config) if (role := declared.metadata["file"])}


@functools.cache
def model_roles() -> Mapping[str, str]:
    """Keys that name a model directory, each with the model's role among a manifest's models."""
    return {name: role for name, _, declared in _fields(Config) if (role := declared.metadata["model"])}


def code_names(flat: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Keys that name a user's code: key → kind of :data:`fedsim.extend.KINDS`, and name; nothing is
    loaded.
    """
    named = {key: (key, flat[key]) for key in KINDS if key.removesuffix(".kind") not in LISTS}
    for key in LISTS:
        for place, one in enumerate(flat[key]):
            named[code_key(key, place)] = (f"{key}.kind", one["kind"])
    return {key: (kind, name) for key, (kind, name) in named.items() if not is_own(kind, name)}


def code_key(key: str, place: int) -> str:
    """Key of the code of the entry at a place in a list."""
    return f"{key}.{place}.kind"


def code_role(key: str) -> str:
    """Role among a manifest's inputs of the file that a key of :func:`code_names` means."""
    return f"code of {key}"


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
        raise ConfigError(
            f"config {path}: its base: files refer to each other in a circle; remove one of the links",
        )
    try:
        content = _yaml(path.read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise ConfigError(
            f"config {path}: cannot be read ({error.strerror}); give the path of a YAML file",
        ) from error
    except ValueError as error:
        raise ConfigError(f"config {path}: is not valid YAML ({error})") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"config {path}: must be a mapping of keys to values, is a {type(content).__name__}",
        )
    base = _meant(content.pop("base", None), is_text=False)
    if base is not None and not (isinstance(base, str) and base.isprintable()):
        raise ConfigError(
            f"config {path}: base={_quoted(base)} must be the path of a config file, relative to this file",
        )
    flat = {} if base is None else _read_file(path.parent / base, (*seen, path.resolve()))
    leaves = list(_leaves(content, ""))
    for name, count in Counter(name for name, _ in leaves).items():
        if count > 1:
            raise ConfigError(
                f"config {path}: {_plain(name)} is given twice; remove one of the lines",
            )
    return flat | dict(leaves)


def _yaml(text: str, loader: type[yaml.SafeLoader]) -> Any:
    """The value of a YAML text; ValueError with a reason of one line, whatever PyYAML makes of a
    malformed one.
    """
    try:
        return yaml.load(text, Loader=loader)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except yaml.YAMLError as error:
        raise ValueError(_plain(" ".join(str(error).split()))) from error
    # Tags and dates that do not fit their values, numbers of thousands of digits.
    except Exception as error:
        raise ValueError(
            f"a value cannot be read as what its form or tag says: {_plain(str(error))}",
        ) from error


@dataclasses.dataclass(frozen=True)
class _Scalar:
    """A value that YAML reads as something else than text, such as a number or a date, and what was
    written.
    """

    value: Any
    source: str


def _meant(value: Any, *, is_text: bool) -> Any:
    """A value as its key needs it: a text key takes what was written, but a value that is left out
    is none.
    """
    if isinstance(value, dict):
        return {name: _meant(part, is_text=False) for name, part in value.items()}
    if isinstance(value, list):
        return [_meant(part, is_text=False) for part in value]
    if not isinstance(value, _Scalar):
        return value
    # No key is one: an error shows it as it was written.
    is_date = isinstance(value.value, datetime.date)
    return value.source if is_date or (is_text and value.value is not None) else value.value


class _Plain(yaml.SafeLoader):
    """YAML without aliases: a few lines of them can stand for more than any memory holds, or for
    themselves.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            where = self.peek_event().start_mark
            raise yaml.composer.ComposerError(
                None,
                None,
                "aliases (*name) are not taken; write the value out",
                where,
            )
        return super().compose_node(parent, index)


class _UniqueKeys(_Plain):
    """YAML in which a repeated key is an error instead of the last one winning, and values know
    what was written.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = Counter(name.value for name, _ in node.value if isinstance(name, yaml.ScalarNode))
        for name, count in names.items():
            if count > 1:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"{name} is given twice",
                    node.start_mark,
                )
        made = super().construct_mapping(node, deep)
        for name, value in node.value:
            key = self.construct_object(name, deep=True)
            if isinstance(value, yaml.ScalarNode) and not isinstance(made[key], str):
                made[key] = _Scalar(made[key], value.value)
        return made


def _leaves(content: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, dict) and f"{prefix}{name}" not in _whole_keys():
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _parse(value: str, name: str, *, is_text: bool) -> Any:
    """The value as YAML reads it; for a text key, what is no text to YAML stays as it was typed
    (``name=010``).
    """
    try:
        parsed = _yaml(value, _Plain) if value.strip() else ""
    except ValueError as error:
        raise ConfigError(
            f"override {_plain(name)}={_quoted(value)}: the value is not valid YAML ({error}); quote it",
        ) from error
    is_date = isinstance(parsed, datetime.date)  # no key is one: an error shows it as it was typed
    return value.strip() if is_date or (is_text and not isinstance(parsed, str)) else parsed


def _checked(name: str, value: Any, kind: Any, declared: dataclasses.Field[Any]) -> Any:
    if name in LISTS:
        return _checked_list(name, value, LISTS[name])
    if kind == dict[str, Any]:
        return _checked_options(name, value)
    rule = rule_of(declared)
    if value == [] and kind == list[str] and _default_of(declared) == []:
        return value
    value = _coerced(name, value, kind, rule.words())
    broken = rule.broken_by(value)
    if broken is not None:
        raise ConfigError(
            f"{name}={_quoted(value)}: {broken}{_nearest_choice(value, rule.choices)}",
        )
    if name in KINDS:
        check_name(name, value)
    if value == HELD_OUT and _default_of(declared) == EMBEDDED and not is_embedded(name, value):
        raise ConfigError(
            f"{name}={value!r}: eval.advbench alone has such items; set {EMBEDDED!r}, or give a path",
        )
    return value


def _checked_list(name: str, value: Any, listed: Listed) -> list[Any]:
    """A list of mappings as dataclasses; their keys are named as in ``attacks.0.share``."""
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        what = name.rpartition(".")[2]
        raise ConfigError(
            f"{name}={_quoted(value)}: must be a list of {what}, such as {listed.example}",
        )
    hints, fields = (
        get_type_hints(listed.owner),
        {one.name: one for one in dataclasses.fields(listed.owner)},
    )
    found = []
    for place, given in enumerate(value):
        for part in given:
            if part not in fields:
                known = [f"{name}.{place}.{leaf}" for leaf in fields]
                raise ConfigError(_unknown(f"{name}.{place}.{part}", given[part], known))
        for part in listed.needed:
            if part not in given:
                raise ConfigError(f"{name}.{place}: needs {name}.{place}.{part}; set it")
        checked = {part: _checked(f"{name}.{place}.{part}", given[part], hints[part], fields[part]) for part in given}
        check_name(f"{name}.kind", checked["kind"], shown=f"{name}.{place}.kind")
        found.append(listed.owner(**checked))
    return found


def _checked_options(name: str, value: Any) -> dict[str, Any]:
    """Options by name; a number in text, such as ``5e-5``, is a number."""
    if not isinstance(value, dict) or not all(isinstance(option, str) and option.isidentifier() for option in value):
        raise ConfigError(
            f"{name}={_quoted(value)}: must be a mapping of names to values, such as {{scale: 5}}",
        )
    return {option: _plain_option(f"{name}.{option}", part) for option, part in value.items()}


def _plain_option(name: str, value: Any, depth: int = 0) -> Any:
    if isinstance(value, list | dict) and depth > _DEEPEST:
        raise ConfigError(f"{name}: must be nested at most {_DEEPEST} deep")
    if isinstance(value, list):
        return [_plain_option(name, part, depth + 1) for part in value]
    if isinstance(value, dict):
        if not all(isinstance(part, str) and part.isprintable() for part in value):
            raise ConfigError(f"{_plain(name)}={_quoted(value)}: must have texts for keys")
        return {part: _plain_option(f"{name}.{part}", value[part], depth + 1) for part in value}
    check_no_secret(name, value, is_key=False)
    if isinstance(value, str):
        if (broken := Rule(lines=True).broken_by(value)) is not None:
            raise ConfigError(f"{_plain(name)}={_quoted(value)}: {broken}")
        return float(value) if _EXPONENT.fullmatch(value) and math.isfinite(float(value)) else value
    if value is None or isinstance(value, bool):
        return value
    if not isinstance(value, int | float):
        raise ConfigError(
            f"{_plain(name)}={_quoted(value)}: must be a number, a text, true, false, null, a list or a mapping",
        )
    return _coerced(name, value, type(value), "")


def _with_parts(flat: Mapping[str, Any]) -> Flat:
    """``flat`` with keys that set a part of a mapping or list, such as ``attacks.0.share``, put
    into the whole.
    """
    found: Flat = {}
    for name, value in flat.items():
        owner = next((key for key in _whole_keys() if name.startswith(f"{key}.")), None)
        if owner is None:
            found[name] = value
            continue
        whole = copy.deepcopy(found.get(owner, [] if owner in LISTS else {}))
        place: Any = whole
        *parts, last = name.removeprefix(f"{owner}.").split(".")
        try:
            for part in parts:
                place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
            place[int(last) if isinstance(place, list) else last] = value
        except (ValueError, IndexError, TypeError, AttributeError):
            raise ConfigError(
                f"{_plain(name)}={_quoted(value)}: there is no such part of {owner}={_quoted(found.get(owner))}; set "
                f"{owner} as a whole",
            ) from None
        found[owner] = whole
    return found


@functools.cache
def _whole_keys() -> tuple[str, ...]:
    """Keys whose value is a mapping, or a list of them."""
    return tuple(name for name, kind in _kinds().items() if name in LISTS or kind == dict[str, Any])


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
        wanted = {
            "int": "a whole number",
            "float": "a number",
            "bool": "true or false",
            "str": "text",
        }
        words = wanted.get(
            getattr(kind, "__name__", ""),
            "a list of names, such as [q_proj, v_proj]",
        )
        raise ConfigError(f"{name}={_quoted(value)}: must be {words}{f' ({rule})' if rule else ''}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(
            f"{name}={value!r}: must be a finite number{f' ({rule})' if rule else ''}",
        )
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
    return f"{_plain(name)}={_quoted(value)}: is not a configuration key; {hint} (fedsim run --help lists all keys)"
