"""Groups of runs that may be put together: they differ in seed, and in where and how they ran.

The report, tables, sweeps and W&B groups take their groups from here. A file or model counts by its
SHA-256 in the run's manifest, wherever it lay; one that the run did not read does not count. The
commit of fedsim does not count either, but is named where it differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fedsim.base.errors import ConfigError
from fedsim.config import LISTS, code_key, code_names, code_role, file_roles, model_roles
from fedsim.config.measuring import is_embedded
from fedsim.record.sameness import FREE_KEYS

FREE_SECTIONS: Final = ("record.", "wandb.", "parallel.")
"""Beginnings of keys that say where and how a run runs, beside ``seed``, ``name`` and FREE_KEYS."""

ARM_SECTIONS: Final = ("federation.algorithm", "attacks", "guard.", "cai.")
"""Beginnings of keys that make an arm of a table."""

MAX_SHOWN: Final = 3
"""Keys that a group's name shows at most."""

Settings = Mapping[str, Any]
"""Key → value of what decides a run's figures, in the schema's order."""


@dataclass(frozen=True)
class Content:
    """A file or model, equal to another of the same bytes and use.

    Attributes:
        path: as the configuration has it; does not count.
        sha256: of its content.
        embedded: it is the embedded world's, whose items have scores of their own.
    """

    path: str = field(compare=False)
    sha256: str
    embedded: bool


def settings_of(config: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Collect everything that decides a run's figures, except the seed.

    Args:
        config: the resolved configuration, dotted key → value.
        manifest: the run's; its digests replace the paths.
    """
    # SHA-256 by role: of data files, models and a user's own code.
    digests = {role: entry["sha256"] for role, entry in manifest.get("inputs", {}).items()}
    digests |= manifest.get("models", {})
    roles = {**file_roles(), **model_roles()}
    code = {}
    for key, (_, name) in code_names(config).items():
        if code_role(key) in digests:
            code[key] = Content(name, digests[code_role(key)], embedded=False)

    found: dict[str, Any] = {}
    for key, value in config.items():
        if not decides(key):
            continue
        if key in LISTS:
            entries = []
            for place, entry in enumerate(value):
                kind = code.get(code_key(key, place), entry["kind"])
                entries.append({**entry, "kind": kind})
            found[key] = entries
        elif key not in roles:
            found[key] = code.get(key, value)
        elif roles[key] in digests:
            found[key] = Content(value, digests[roles[key]], is_embedded(key, value))
        else:  # the run did not read it
            found[key] = None
    return found


def decides(key: str) -> bool:
    """Return True for keys that decide what a run computes; its name, seed and places do not."""
    return key not in {"seed", "name", *FREE_KEYS} and not key.startswith(FREE_SECTIONS)


def differing(runs: Sequence[Settings]) -> list[str]:
    """Keys of which not all runs have the same value, in the schema's order."""
    if not runs:
        return []
    first = runs[0]
    found = []
    for key in first:
        if any(run[key] != first[key] for run in runs):
            found.append(key)
    return found


def differing_beside_arms(groups: Sequence[tuple[str, Settings]]) -> list[str]:
    """Keys that differ between groups and that their arms do not account for.

    Args:
        groups: name of the arm and settings of each group.
    """
    if not groups:
        return []
    # Keys that make no arm, and those in which groups of one arm differ.
    keys = differing([own for _, own in groups])
    found = {key for key in keys if not key.startswith(ARM_SECTIONS)}
    for arm in dict.fromkeys(arm for arm, _ in groups):
        found.update(differing([own for name, own in groups if name == arm]))
    return [key for key in groups[0][1] if key in found]  # in the schema's order


def group_names(groups: Sequence[tuple[str, Settings]]) -> list[str]:
    """Name groups by their arm and the keys that distinguish them from others of that arm.

    Such as ``FedAvg, FL (local.lr=0.001)``.

    A name shows all keys that differ where they are at most :data:`MAX_SHOWN`, else those that
    suffice, and how many more differ.

    Args:
        groups: name of the arm and settings of each group; no two have both alike.
    """
    names = []
    for arm, own in groups:
        # Settings of the groups of this arm, and the keys in which they differ.
        like = [settings for name, settings in groups if name == arm]
        keys = differing(like)
        shown = _telling(keys, like)
        words = [f"{key}={shown_value(key, own, like)}" for key in shown]
        if len(keys) > len(shown):
            words.append(f"{len(keys) - len(shown)} more")
        names.append(f"{arm} ({', '.join(words)})" if words else arm)
    return names


def _telling(keys: Sequence[str], like: Sequence[Settings]) -> list[str]:
    """Select the keys to show: all if they are few, else the first ones that suffice."""
    if len(keys) <= MAX_SHOWN:
        return list(keys)
    shown: list[str] = []
    num_parts = 1
    for key in keys:
        num_with = _num_distinct([*shown, key], like)
        if num_with > num_parts:
            shown.append(key)
            num_parts = num_with
    return shown


def _num_distinct(keys: Sequence[str], runs: Sequence[Settings]) -> int:
    """Number of parts into which the values of ``keys`` divide runs."""
    parts: list[list[Any]] = []
    for run in runs:
        values = [run[key] for key in keys]
        if values not in parts:
            parts.append(values)
    return len(parts)


def shown_value(key: str, own: Settings, among: Iterable[Settings]) -> str:
    """Format a value in few letters.

    A file is shown by its name, with the beginning of its SHA-256 where another has that name.

    Args:
        among: the settings from which this one is to be distinguished.
    """
    value = own[key]
    if value is None:
        return "not read"
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    if not isinstance(value, Content):
        return str(value) or "''"
    name = Path(value.path).name
    others = [run[key] for run in among if run[key] not in (None, value)]
    if any(Path(other.path).name == name for other in others):
        return f"{name}#{value.sha256[:8]}"
    return name


def order_of(settings: Settings, keys: Iterable[str]) -> list[tuple[bool, float, str]]:
    """Return the sort key of a group among those of its arm.

    Numbers come first, by size; anything else is ordered by its text.
    """
    places = []
    for key in keys:
        value = settings[key]
        if isinstance(value, int | float):
            places.append((False, float(value), ""))
        elif isinstance(value, Content):
            places.append((True, 0.0, value.sha256))
        else:
            places.append((True, 0.0, str(value)))
    return places


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return the last parts of paths, as many as make all names differ.

    Raises:
        ConfigError: two of them are the same folder.
    """
    parts = [folder.resolve().parts for folder in folders]
    for folder, own in zip(folders, parts, strict=True):
        if parts.count(own) > 1:
            raise ConfigError(f"{folder}: is named twice; name every run once")
    length = 1
    while len({part[-length:] for part in parts}) < len(parts):
        length += 1
    return ["/".join(part[-length:]) for part in parts]
