"""Version and commit: read from the clone, told in words, and left beside results."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import fedsim
from fedsim.base.version import commit_of, git_state, made_by, maker, sign

ROOT = Path(__file__).parents[2]


def test_git_state_sees_commit_and_changes(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert git_state(tmp_path) is None
    git("init", "-q")
    assert git_state(tmp_path) is None  # nothing committed
    (tmp_path / "a.txt").write_text("a")
    git("add", "a.txt")
    git("commit", "-qm", "first", "--no-verify")
    head = git("rev-parse", "HEAD")
    (tmp_path / "untracked.txt").write_text("b")
    assert git_state(tmp_path) == {"commit": head, "modified": False}
    (tmp_path / "a.txt").write_text("changed")
    assert git_state(tmp_path) == {"commit": head, "modified": True}
    assert git_state(tmp_path / "sub") is None


def test_what_runs_here_is_named() -> None:
    assert made_by() == {"fedsim": fedsim.__version__, "git": git_state(ROOT)}
    assert maker(made_by()) == f"fedsim {fedsim.__version__}, commit {commit_of(made_by())}"


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        ({"fedsim": "1.2", "git": {"commit": "0123456789abcdef", "modified": False}}, "fedsim 1.2, commit 0123456789"),
        (
            {"fedsim": "1.2", "git": {"commit": "0123456789abcdef", "modified": True}},
            "fedsim 1.2, commit 0123456789 with changes",
        ),
        ({"fedsim": "1.2", "git": None}, "fedsim 1.2, commit unknown"),
        *(
            (nothing, "a fedsim that has left no version")
            for nothing in (None, [], "x", 3, {}, {"fedsim": "1", "git": 3})
        ),
    ],
)
def test_a_maker_in_words(origin: Any, words: str) -> None:
    assert maker(origin) == words


def test_a_folder_is_signed(tmp_path: Path) -> None:
    sign(tmp_path)
    sign(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["fedsim.json"]
    assert json.loads((tmp_path / "fedsim.json").read_text()) == made_by()
