"""Comparison of a run directory with the run to start: configuration, files and models.

A file or model counts by its SHA-256, which the manifest holds: its path may change, as a cluster's
scratch folder does with every job.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fedsim.base.digests import FileDigests, file_digest
from fedsim.base.paths import user_path
from fedsim.config import (
    LISTS,
    Config,
    code_names,
    code_role,
    file_roles,
    load_config,
    model_roles,
    to_flat,
)
from fedsim.config.measuring import is_embedded
from fedsim.extend import KINDS
from fedsim.record.manifest import read_manifest

FREE_KEYS: Final = frozenset({
    "record.dir", "record.artefacts", "record.resume", "record.keep_checkpoints", "record.texts",
    "parallel.timeout_s", "judge.base_url", "judge.workers", "judge.retries", "judge.timeout_s",
    "wandb.mode", "wandb.project", "wandb.entity", "wandb.group", "wandb.tags"})  # fmt: skip
"""Keys that may differ when a run is resumed: they decide where and how it runs."""

_NO_CODE: Final[dict[str, Any]] = {
    **{key: [] for key in LISTS},
    **{key: next(iter(kind.own)) for key, kind in KINDS.items() if kind.own},
}
"""Values of the keys that name code, for a configuration without code of a user."""


@dataclass
class Comparison:
    """Keys in which two configurations differ, in words such as ``local.lr was 0.01, is 0.5``.

    Attributes:
        changed: differences that make another run.
        moved: files and models that lie elsewhere with the same content.
    """

    changed: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)


def compare(folder: Path, config: Config) -> Comparison:
    """Compare a run directory's config.yaml with ``config``.

    Raises:
        ConfigError: config.yaml cannot be read.
        CheckpointError: a path differs, and manifest.json is damaged.
    """
    old, new = to_flat(load_config(folder / "config.yaml")), to_flat(config)
    digests = FileDigests(config.record.artefact_folder)
    found = Comparison()
    manifest: dict[str, Any] | None = None
    # Every key of the configuration, in the schema's order.
    for key, value in new.items():
        if value == old[key] or key in FREE_KEYS:
            continue
        words = f"{key} was {old[key]!r}, is {value!r}"
        if _is_moved_code(folder, key, old[key], value):
            found.moved.append(words)
            continue
        # A path of a file or model: its content counts.
        is_path = key in file_roles() or key in model_roles()
        if is_path and _names_files(key, old[key]) and _names_files(key, value):
            if manifest is None and (folder / "manifest.json").is_file():
                manifest = read_manifest(folder / "manifest.json")
            if manifest is None:
                words += ", and no manifest.json has its content's SHA-256"
            elif _is_same_content(key, value, manifest, digests):
                found.moved.append(words)
                continue
            else:
                words += ", of other content"
        found.changed.append(words)
    return found


def _is_moved_code(folder: Path, key: str, old: Any, new: Any) -> bool:
    """Return True for code of a user that lies in another file of the same content.

    Code that is named by its module is not looked for.
    """
    if key not in _NO_CODE:
        return False
    # Key of each name (a list has several) → the name, such as ``path/to/file.py:Class``.
    before, now = code_names({**_NO_CODE, key: old}), code_names({**_NO_CODE, key: new})
    if before.keys() != now.keys() or not now or not (folder / "manifest.json").is_file():
        return False
    # The same class or function, in a Python file with the SHA-256 that the manifest has.
    inputs = read_manifest(folder / "manifest.json")["inputs"]
    for place, (_, name) in now.items():
        path, _, attribute = name.rpartition(":")
        _, _, attribute_before = before[place][1].rpartition(":")
        file, entry = user_path(path), inputs.get(code_role(place))
        if attribute != attribute_before or entry is None or not path.endswith(".py"):
            return False
        if not file.is_file() or file_digest(file) != entry["sha256"]:
            return False
    if key not in LISTS:
        return True
    # Entries of a list have options beside their kind.
    return [{**entry, "kind": ""} for entry in old] == [{**entry, "kind": ""} for entry in new]


def _names_files(key: str, value: str) -> bool:
    """Return True for a path; 'embedded' and '' have a meaning of their own."""
    return value != "" and not is_embedded(key, value)


def _is_same_content(
    key: str,
    value: str,
    manifest: Mapping[str, Any],
    digests: FileDigests,
) -> bool:
    """Compare the content at a path with the one that the run began with.

    A file or model that the run does not read is the same.
    """
    path = user_path(value)
    files, models = file_roles(), model_roles()
    if key in models:
        known = manifest["models"].get(models[key])
        return known is None or (path.is_dir() and digests.model(path) == known)
    entry = manifest["inputs"].get(files[key])
    return entry is None or (path.is_file() and file_digest(path) == entry["sha256"])
