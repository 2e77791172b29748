"""Version and commit of fedsim, as everything that it writes names them."""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fedsim

SIGNATURE = "fedsim.json"
"""File in a folder of results that says which fedsim made them."""


def repository() -> Path | None:
    """Root of the clone that this fedsim lies in; None for an installed one."""
    root = Path(fedsim.__file__).resolve().parents[1]
    return root if (root / "setup.cfg").is_file() and (root / "docs" / "results").is_dir() else None


@functools.cache
def made_by() -> Mapping[str, Any]:
    """Version and git state of this fedsim: ``{"fedsim": "0.1.0", "git": {…} or None}``.

    It is a record of origin; no hash of an artefact's dependencies covers it.
    """
    return {
        "fedsim": fedsim.__version__,
        "git": git_state(Path(fedsim.__file__).resolve().parents[1]),
    }


def maker(origin: Any) -> str:
    """A :func:`made_by` that was read from a file, in words: ``fedsim 0.1.0, commit 0123456789``.

    Args:
        origin: content of the file, of any form.
    """
    try:
        return f"fedsim {origin['fedsim']}, commit {commit_of(origin)}"
    except (TypeError, KeyError):
        return "a fedsim that has left no version"


def commit_of(facts: Mapping[str, Any]) -> str:
    """The commit's first ten digits, with a note if tracked files differed; else "unknown".

    Args:
        facts: a mapping with a ``git`` entry: a manifest, or :func:`made_by`.
    """
    git = facts.get("git")
    if not git:  # outside a clone
        return "unknown"
    changes = " with changes" if git["modified"] else ""
    return f"{git['commit'][:10]}{changes}"


def sign(folder: Path) -> None:
    """Write :data:`SIGNATURE` into a folder of results, so that copies of it can be traced."""
    # An atomic rename, since several commands may sign the same folder.
    text = json.dumps(made_by(), indent=2, sort_keys=True) + "\n"
    new = folder / ".fedsim.json.new"
    new.write_text(text, encoding="utf-8")
    new.replace(folder / SIGNATURE)


def git_state(root: Path, ignoring: Sequence[str] = ()) -> dict[str, Any] | None:
    """Commit of the clone at ``root`` and whether tracked files differ; None if it is no clone.

    Args:
        ignoring: files and folders, relative to ``root``, whose changes do not count.
    """
    if not (root / ".git").exists():
        return None
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    if commit is None:
        return None
    others = [f":(exclude){path}" for path in ignoring]
    status = ("status", "--porcelain", "--untracked-files=no", "--", ".", *others)
    changes = _output("git", "-C", str(root), *status)
    return {"commit": commit, "modified": changes != ""}


def _output(*command: str) -> str | None:
    """Output of a command without blanks around it; None if it cannot run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
