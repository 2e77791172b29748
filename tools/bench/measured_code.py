"""Digest of the code that a stage's rows speak of, so that rows of older code can be marked."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]

_TRAINING: Final = ("attention", "model", "train", "federation", "parallel/sums.py", "data/batch.py", "reused.py")
_STAGES: Final[dict[str, tuple[str, ...]]] = {
    "attention": ("attention",),
    "local_step": _TRAINING,
    "wide_lane": (*_TRAINING, "parallel/planner.py"),
    "guard": ("attention", "model", "safety/guard.py", "generate/prefix.py"),
    "generation": ("attention", "model", "generate"),
    "cai_iteration": (*_TRAINING, "safety/alignment.py"),
    "aggregation": ("federation", "parallel/sums.py", "kernels", "reused.py"),
}
"""Files and folders of ``fedsim/`` by stage, all of it for any other; the stage's file in ``tools/bench/`` is added."""


_PEERS: Final = ("plain_loop.py", "trl_peer.py", "clients.py")
"""Files of ``tools/bench/`` that hold peers of more than one stage."""


def code_digest(stage: str, root: Path = ROOT) -> str:
    """SHA-256 (hex) over the syntax of the code that a stage measures, without docstrings and comments.

    Args:
        stage: name of a stage.
        root: a checkout.
    """
    digest = hashlib.sha256()
    for path in _files(stage, root):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        _remove_docstrings(tree)
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()


def _files(stage: str, root: Path) -> Iterator[Path]:
    for place in _STAGES.get(stage, ("",)):
        path = root / "fedsim" / place
        if path.is_file():
            yield path
        else:
            yield from sorted(path.rglob("*.py"))
    for name in (f"{stage}.py", *_PEERS):
        path = root / "tools" / "bench" / name
        if path.is_file():
            yield path


def _remove_docstrings(tree: ast.Module) -> None:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
