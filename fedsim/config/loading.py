"""Reading of YAML files and ``key=value`` overrides into a checked :class:`Config`.

Every error names the key.
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

_TYPE_NAMES = {str(list[str]): "list of str", str(dict[str, Any]): "mapping"}
for _listed in LISTS.values():
    _TYPE_NAMES[str(GenericAlias(list, (_listed.owner,)))] = "list of mappings"

_TYPES_IN_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
}

_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
"""Numbers that YAML reads as text."""

_DEEPEST = 8
"""Deepest nesting of lists and mappings in an option."""

_SHOWN = 200
"""Most characters of a value that an error shows."""

SHIPPED = Path(__file__).parents[1] / "configs"
"""Configuration files that fedsim ships."""


@dataclasses.dataclass(frozen=True)
class KeyInfo:
    """One key of the schema for the reference of keys."""

    name: str
    type_name: str
    default: Any
    meaning: str
    unit: str
    rule: str


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply ``key=value`` overrides in order.

    The file's ``base:`` may name another file, whose keys it overrides.

    Args:
        path: None for the defaults.
        overrides: such as ``federation.num_rounds=8``.

    Raises:
        ConfigError: an unreadable file, an unknown key, a wrong type or a value outside its rule.
    """
    flat: Flat = {}
    if path is not None:
        flat = flat_from_file(path)

    # Overrides, in order: a later one replaces an earlier one.
    kinds = _kinds()
    for text in overrides:
        name, sign, value = text.partition("=")
        if not sign:
            form = "must have the form key=value, such as federation.num_rounds=8"
            raise ConfigError(f"override {_quoted(text)}: {form}")
        name = name.strip()
        check_no_secret(name, value, is_key=name in kinds)
        flat = with_overrides(flat, {name: _parse(value, name, is_text=kinds.get(name) is str)})
    return from_flat(flat)


def with_overrides(flat: Mapping[str, Any], overrides: Mapping[str, Any]) -> Flat:
    """Merge keys with overrides, which come last.

    An override may set a part of a list or mapping, such as ``attacks.0.share``, or replace the
    whole: then the parts that ``flat`` sets are dropped.
    """
    replaced = tuple(f"{key}." for key in _whole_keys() if key in overrides)
    kept = {}
    for name, value in flat.items():
        if name not in overrides and not str(name).startswith(replaced):
            kept[name] = value
    return {**kept, **overrides}


def flat_from_file(path: Path) -> Flat:
    """Read the keys of a YAML file and of its base files, unchecked.

    Raises:
        ConfigError: a file cannot be read, or is no mapping.
    """
    kinds = _kinds()
    found = _read_file(config_file(path), seen=())
    return {name: _meant(value, is_text=kinds.get(name) is str) for name, value in found.items()}


def config_file(path: Path) -> Path:
    """Find a config file: ``configs/...`` that does not exist may be one that fedsim ships."""
    if path.parts[:1] == ("configs",) and not path.exists():
        shipped = SHIPPED.joinpath(*path.parts[1:])
        if shipped.is_file():
            return shipped
    return path


@functools.cache
def _kinds() -> Mapping[str, Any]:
    """Type of every key."""
    return {name: get_type_hints(owner)[declared.name] for name, owner, declared in _fields(Config)}


def from_flat(flat: Mapping[str, Any]) -> Config:
    """Make a checked config from keys, dotted or nested.

    Of a key that occurs twice the later one counts; keys that are absent take their defaults.

    Raises:
        ConfigError: an unknown key, a wrong type or a value outside its rule.
    """
    # Step 1: flatten, and reject unknown keys and secrets.
    known = {name: (owner, declared) for name, owner, declared in _fields(Config)}
    flat = _with_parts(dict(_leaves(flat, "")))
    for name in flat:
        check_no_secret(name, flat[name], is_key=name in known)
        if name not in known:
            raise ConfigError(_unknown(name, flat[name], list(known)))

    # Step 2: check each value and group the values by section; "" is the run's own.
    groups: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        owner, declared = known[name]
        section, _, leaf = name.rpartition(".")
        kind = get_type_hints(owner)[declared.name]
        groups.setdefault(section, {})[leaf] = _checked(name, value, kind, declared)

    # Step 3: build the sections, which check their own rules, and the config over them.
    sections: dict[str, Any] = {}
    for name, kind in get_type_hints(Config).items():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            sections[name] = kind(**groups.get(name, {}))
    return Config(**groups.get("", {}), **sections)


def to_flat(config: Config) -> Flat:
    """Return every key of a config with its value, in the schema's order."""
    flat: Flat = {}
    for name, _, _ in _fields(Config):
        value: Any = config
        # Follow the dotted name through the sections.
        for part in name.split("."):
            value = getattr(value, part)
        if name in LISTS:
            value = [dataclasses.asdict(one) for one in value]
        flat[name] = value
    return flat


def to_nested(config: Config) -> dict[str, Any]:
    """Return a config as nested mappings.

    ``yaml.safe_dump`` of the result is a config file that gives the same config.
    """
    return dataclasses.asdict(config)


def describe() -> list[KeyInfo]:
    """Describe every key: type, default, meaning, unit and rule."""
    infos = []
    for name, owner, declared in _fields(Config):
        default = _default_of(declared)
        kind = get_type_hints(owner)[declared.name]
        type_name = _TYPE_NAMES.get(str(kind)) or kind.__name__
        meta = declared.metadata
        rule = rule_of(declared).words()
        if name in KINDS:
            rule = names_in_words(name)
        infos.append(KeyInfo(name, type_name, default, meta["meaning"], meta["unit"], rule))
    return infos


@functools.cache
def file_roles() -> Mapping[str, str]:
    """Keys that name a file, each with the file's role among a manifest's inputs."""
    return _roles("file")


@functools.cache
def model_roles() -> Mapping[str, str]:
    """Keys that name a model directory, each with the model's role among a manifest's models."""
    return _roles("model")


def _roles(kind: str) -> dict[str, str]:
    """Keys with a role of this kind, "file" or "model", and their roles."""
    found = {}
    for name, _, declared in _fields(Config):
        if declared.metadata[kind]:
            found[name] = declared.metadata[kind]
    return found


def code_names(flat: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Find the keys that name a user's code; nothing is loaded.

    Returns:
        Key → kind of :data:`fedsim.extend.KINDS`, and name.
    """
    named = {key: (key, flat[key]) for key in KINDS if key.removesuffix(".kind") not in LISTS}
    for key in LISTS:
        for place, one in enumerate(flat[key]):
            named[code_key(key, place)] = (f"{key}.kind", one["kind"])
    return {key: (kind, name) for key, (kind, name) in named.items() if not is_own(kind, name)}


def code_key(key: str, place: int) -> str:
    """Name the key of the code of the entry at a place in a list."""
    return f"{key}.{place}.kind"


def code_role(key: str) -> str:
    """Name the role, among a manifest's inputs, of the file of a key of :func:`code_names`."""
    return f"code of {key}"


def _default_of(declared: dataclasses.Field[Any]) -> Any:
    """Return the default of a key; a list or mapping is a new one in each call."""
    if declared.default is not dataclasses.MISSING:
        return declared.default
    assert declared.default_factory is not dataclasses.MISSING
    return declared.default_factory()


def _fields(owner: type, prefix: str = "") -> Iterator[tuple[str, type, dataclasses.Field[Any]]]:
    """Iterate over the keys in the schema's order: dotted name, dataclass and field."""
    hints = get_type_hints(owner)
    for declared in dataclasses.fields(owner):
        kind = hints[declared.name]
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            yield from _fields(kind, f"{prefix}{declared.name}.")
        else:
            yield f"{prefix}{declared.name}", owner, declared


def _read_file(path: Path, seen: tuple[Path, ...]) -> Flat:
    """Read a file and its base files.

    Args:
        path: of the file.
        seen: files that refer to it, directly or not.
    """
    if path.resolve() in seen:
        circle = "its base: files refer to each other in a circle; remove one of the links"
        raise ConfigError(f"config {path}: {circle}")

    # The file's own keys.
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

    # Keys of the base file, if there is one; the file's own override them.
    flat: Flat = {}
    base = _meant(content.pop("base", None), is_text=False)
    if base is not None:
        if not (isinstance(base, str) and base.isprintable()):
            rule = "must be the path of a config file, relative to this file"
            raise ConfigError(f"config {path}: base={_quoted(base)} {rule}")
        flat = _read_file(path.parent / base, (*seen, path.resolve()))

    # A key may be written nested and dotted, but only once.
    leaves = list(_leaves(content, ""))
    for name, count in Counter(name for name, _ in leaves).items():
        if count > 1:
            raise ConfigError(
                f"config {path}: {_plain(name)} is given twice; remove one of the lines",
            )
    return flat | dict(leaves)


def _yaml(text: str, loader: type[yaml.SafeLoader]) -> Any:
    """Parse a YAML text.

    Raises:
        ValueError: it is malformed; the reason has one line, for any error of PyYAML.
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
    """A value that YAML reads as a number, a date or the like, and its text in the file."""

    value: Any
    source: str


def _meant(value: Any, *, is_text: bool) -> Any:
    """Replace :class:`_Scalar` in a value by what its key needs.

    A text key takes the text in the file, except that an empty value is None.
    """
    if isinstance(value, dict):
        return {name: _meant(part, is_text=False) for name, part in value.items()}
    if isinstance(value, list):
        return [_meant(part, is_text=False) for part in value]
    if not isinstance(value, _Scalar):
        return value
    # No key is a date: an error shows it as it was written.
    is_date = isinstance(value.value, datetime.date)
    if is_date or (is_text and value.value is not None):
        return value.source
    return value.value


class _Plain(yaml.SafeLoader):
    """YAML without aliases.

    A few lines of aliases can expand to more than any memory holds, or contain themselves.
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
    """YAML in which a repeated key is an error, and values keep their text (:class:`_Scalar`)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # A key that is written twice is an error.
        names = Counter(name.value for name, _ in node.value if isinstance(name, yaml.ScalarNode))
        for name, count in names.items():
            if count > 1:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"{name} is given twice",
                    node.start_mark,
                )
        # Values that are no text keep their text in the file.
        made = super().construct_mapping(node, deep)
        for name, value in node.value:
            key = self.construct_object(name, deep=True)
            if isinstance(value, yaml.ScalarNode) and not isinstance(made[key], str):
                made[key] = _Scalar(made[key], value.value)
        return made


def _leaves(content: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Flatten nested mappings to dotted keys; the value of some keys is a mapping itself."""
    for name, value in content.items():
        if isinstance(value, dict) and f"{prefix}{name}" not in _whole_keys():
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _parse(value: str, name: str, *, is_text: bool) -> Any:
    """Parse the value of an override as YAML.

    For a text key, a value that YAML reads as something else stays as it was typed (``name=010``).
    """
    if not value.strip():
        return ""
    try:
        parsed = _yaml(value, _Plain)
    except ValueError as error:
        reason = f"the value is not valid YAML ({error}); quote it"
        raise ConfigError(f"override {_plain(name)}={_quoted(value)}: {reason}") from error
    # No key is a date: an error shows it as it was typed.
    is_date = isinstance(parsed, datetime.date)
    if is_date or (is_text and not isinstance(parsed, str)):
        return value.strip()
    return parsed


def _checked(name: str, value: Any, kind: Any, declared: dataclasses.Field[Any]) -> Any:
    """Check a value against its key's type and rule; return it converted to the type."""
    # Lists of mappings and options have checks of their own.
    if name in LISTS:
        return _checked_list(name, value, LISTS[name])
    if kind == dict[str, Any]:
        return _checked_options(name, value)
    rule = rule_of(declared)
    if value == [] and kind == list[str] and _default_of(declared) == []:
        return value

    # Type, rule, and the form of a name of code.
    value = _coerced(name, value, kind, rule.words())
    broken = rule.broken_by(value)
    if broken is not None:
        raise ConfigError(
            f"{name}={_quoted(value)}: {broken}{_nearest_choice(value, rule.choices)}",
        )
    if name in KINDS:
        check_name(name, value)
    if value == HELD_OUT and _default_of(declared) == EMBEDDED and not is_embedded(name, value):
        fix = f"set {EMBEDDED!r}, or give a path"
        raise ConfigError(f"{name}={value!r}: only eval.advbench has such items; {fix}")
    return value


def _checked_list(name: str, value: Any, listed: Listed) -> list[Any]:
    """Convert a list of mappings to dataclasses; errors name keys as in ``attacks.0.share``."""
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        what = name.rpartition(".")[2]
        raise ConfigError(
            f"{name}={_quoted(value)}: must be a list of {what}, such as {listed.example}",
        )
    hints = get_type_hints(listed.owner)
    fields = {one.name: one for one in dataclasses.fields(listed.owner)}
    found = []
    for place, given in enumerate(value):
        entry = f"{name}.{place}"

        # The entry has known keys only, and all that it needs.
        for part in given:
            if part not in fields:
                known = [f"{entry}.{leaf}" for leaf in fields]
                raise ConfigError(_unknown(f"{entry}.{part}", given[part], known))
        for part in listed.needed:
            if part not in given:
                raise ConfigError(f"{entry}: needs {entry}.{part}; set it")

        # Each value fits its type and rule.
        checked = {}
        for part in given:
            checked[part] = _checked(f"{entry}.{part}", given[part], hints[part], fields[part])
        check_name(f"{name}.kind", checked["kind"], shown=f"{entry}.kind")
        found.append(listed.owner(**checked))
    return found


def _checked_options(name: str, value: Any) -> dict[str, Any]:
    """Check options by name; a number in text, such as ``5e-5``, is a number."""
    is_mapping = isinstance(value, dict)
    if not (is_mapping and all(isinstance(n, str) and n.isidentifier() for n in value)):
        raise ConfigError(
            f"{name}={_quoted(value)}: must be a mapping of names to values, such as {{scale: 5}}",
        )
    return {option: _plain_option(f"{name}.{option}", part) for option, part in value.items()}


def _plain_option(name: str, value: Any, depth: int = 0) -> Any:
    """Check that an option consists of plain values: numbers, texts, lists and mappings."""
    # Containers, up to a depth.
    if isinstance(value, list | dict) and depth > _DEEPEST:
        raise ConfigError(f"{name}: must be nested at most {_DEEPEST} deep")
    if isinstance(value, list):
        return [_plain_option(name, part, depth + 1) for part in value]
    if isinstance(value, dict):
        if not all(isinstance(part, str) and part.isprintable() for part in value):
            raise ConfigError(f"{_plain(name)}={_quoted(value)}: must have texts for keys")
        return {part: _plain_option(f"{name}.{part}", value[part], depth + 1) for part in value}

    # Single values.
    check_no_secret(name, value, is_key=False)
    if isinstance(value, str):
        broken = Rule(lines=True).broken_by(value)
        if broken is not None:
            raise ConfigError(f"{_plain(name)}={_quoted(value)}: {broken}")
        if _EXPONENT.fullmatch(value) and math.isfinite(float(value)):
            return float(value)
        return value
    if value is None or isinstance(value, bool):
        return value
    if not isinstance(value, int | float):
        rule = "must be a number, a text, true, false, null, a list or a mapping"
        raise ConfigError(f"{_plain(name)}={_quoted(value)}: {rule}")
    return _coerced(name, value, type(value), "")


def _with_parts(flat: Mapping[str, Any]) -> Flat:
    """Merge keys that set a part of a mapping or list, such as ``attacks.0.share``, into it."""
    found: Flat = {}
    for name, value in flat.items():
        owner = next((key for key in _whole_keys() if name.startswith(f"{key}.")), None)
        if owner is None:
            found[name] = value
            continue

        # The whole so far; it is copied, as it may belong to the caller.
        whole: Any = {}
        if owner in LISTS:
            whole = []
        whole = copy.deepcopy(found.get(owner, whole))

        # Follow the parts of the name to the place that the key sets.
        place = whole
        *parts, last = name.removeprefix(f"{owner}.").split(".")
        try:
            for part in parts:
                place = _inside(place, part)
            if isinstance(place, list):
                place[int(last)] = value
            else:
                place[last] = value
        except (ValueError, IndexError, TypeError, AttributeError):
            raise ConfigError(
                f"{_plain(name)}={_quoted(value)}: there is no such part of "
                f"{owner}={_quoted(found.get(owner))}; set {owner} as a whole",
            ) from None
        found[owner] = whole
    return found


def _inside(place: Any, part: str) -> Any:
    """Entry of a list, or value of a mapping, where it is made if it is missing."""
    if isinstance(place, list):
        return place[int(part)]
    return place.setdefault(part, {})


@functools.cache
def _whole_keys() -> tuple[str, ...]:
    """Keys whose value is a mapping, or a list of them."""
    kinds = _kinds().items()
    return tuple(name for name, kind in kinds if name in LISTS or kind == dict[str, Any])


def _coerced(name: str, value: Any, kind: Any, rule: str) -> Any:
    """Convert ``value`` to ``kind``; YAML reads ``5e-5`` as text, so that it is converted too.

    Args:
        name: the key.
        value: as YAML reads it.
        kind: the key's type.
        rule: in words, for errors; "" for none.
    """
    # Conversions that lose nothing: to a number, from a whole float, to a text.
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        except OverflowError:
            number = float("inf")
        if not math.isnan(number):
            value = number
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)

    # Check the type; a bool is an int to Python, but no number here.
    if kind == list[str]:
        fits = isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)
    else:
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    shown_rule = ""
    if rule:
        shown_rule = f" ({rule})"
    if not fits:
        words = _TYPES_IN_WORDS.get(kind, "a list of names, such as [q_proj, v_proj]")
        raise ConfigError(f"{name}={_quoted(value)}: must be {words}{shown_rule}")

    # Numbers that tensors can hold.
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}={value!r}: must be a finite number{shown_rule}")
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise ConfigError(f"{name}={_quoted(value)}: must be at most {_LARGEST}")
    return value


def _quoted(value: Any) -> str:
    """Show a value in an error: one line, cut to :data:`_SHOWN` characters."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"
    if len(text) > _SHOWN:
        return f"{text[:_SHOWN]}…"
    return text


def _plain(name: str) -> str:
    """Show a key or a library's text in an error, without quotes if it is short and printable."""
    if name.isprintable() and len(name) <= 2 * _SHOWN:
        return name
    return _quoted(name)


def _nearest_choice(value: Any, choices: tuple[str, ...] | None) -> str:
    """Suggest a similar choice for an error; "" if there is none."""
    close = difflib.get_close_matches(str(value), choices or (), n=1)
    if not close:
        return ""
    return f"; did you mean {close[0]}?"


def _unknown(name: str, value: Any, known: Sequence[str]) -> str:
    """Make the text of the error for an unknown key."""
    in_group = [key for key in known if key.startswith(f"{name}.")]
    if in_group:
        keys = ", ".join(in_group)
        return f"{name}={_quoted(value)}: is a group of keys, not a key; set one of {keys}"

    # The most similar key, or else one whose last part is similar.
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not close:
        last_parts = [key.rpartition(".")[2] for key in known]
        similar = difflib.get_close_matches(name.rpartition(".")[2], last_parts)
        close = [key for key in known if key.rpartition(".")[2] in similar]
    hint = "no key is close"
    if close:
        hint = f"the nearest key is {close[0]}"
    hint += " (fedsim run --help lists all keys)"
    return f"{_plain(name)}={_quoted(value)}: is not a configuration key; {hint}"
