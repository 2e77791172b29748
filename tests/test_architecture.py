"""Table of the parts of fedsim that each part may import; the base and the lookup of user code serve every part."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Final

ROOT = Path(__file__).parents[1]

EVERYWHERE: Final = {"base", "extend"}
"""Parts that every other may import: what knows nothing of a simulation, and the lookup of a user's own code."""

LOADED_LATER: Final = {"__init__"}
"""Gives its names on demand, and so is no importer."""

ALLOWED: Final[dict[str, set[str]]] = {
    "base": set(),
    "extend": set(),
    "config": set(),
    "kernels": set(),
    "attention": {"kernels"},
    "data": {"config", "attention"},
    "world": {"data"},
    "fused": {"kernels", "attention"},
    "model": {"config", "attention", "data", "fused", "kernels"},
    "generate": {"attention", "data", "fused", "kernels", "model"},
    "federation": {"config"},
    "train": {"config", "attention", "data", "federation", "fused", "kernels", "model", "parallel"},
    "parallel": {"attention", "federation", "kernels"},
    "evaluate": {"config", "attention", "data", "fused", "generate", "kernels", "model", "world"},
    "safety": {"config", "attention", "data", "evaluate", "fused", "generate", "kernels", "model", "train", "world"},
    "record": {"config", "federation"},
    "report": {"config", "data", "evaluate", "record", "world"},
    "run": {
        "config", "attention", "data", "evaluate", "federation", "fused", "generate", "model", "parallel", "record",
        "report", "safety", "train", "world",
    },
    "study": {"config", "data", "evaluate", "model", "parallel", "record", "report", "run", "world"},
    "api": {"config", "parallel", "record", "run"},
    "commands": {
        "config", "data", "evaluate", "generate", "parallel", "record", "report", "run", "safety", "study",
    },
    "__main__": {"commands"},
}  # fmt: skip
"""Part → parts that it may import beside the base."""

GROUPS: Final = {"parallel", "train/zero.py"}
"""Places that may import torch.distributed: the parts over process groups, and training by DeepSpeed."""


def imported(tree: ast.AST) -> Iterator[str]:
    """Top names of fedsim that a file imports, but for those that only a type checker reads."""
    if isinstance(tree, ast.If) and ast.unparse(tree.test).endswith("TYPE_CHECKING"):
        return
    if isinstance(tree, ast.Import):
        yield from (alias.name.split(".")[1] for alias in tree.names if alias.name.startswith("fedsim."))
    elif isinstance(tree, ast.ImportFrom) and tree.module == "fedsim":
        yield from (alias.name for alias in tree.names if not alias.name.startswith("_"))
    elif isinstance(tree, ast.ImportFrom) and tree.module is not None and tree.module.startswith("fedsim."):
        yield tree.module.split(".")[1]
    for child in ast.iter_child_nodes(tree):
        yield from imported(child)


def arrows() -> set[tuple[str, str, str]]:
    """``(file, its part, a part that it imports)`` for every import between parts."""
    files = {path.relative_to(ROOT / "fedsim"): path for path in (ROOT / "fedsim").rglob("*.py")}
    files |= {path.relative_to(ROOT): path for path in (ROOT / "kernels").rglob("*.py")}
    found = set()
    for name, path in files.items():
        own = name.parts[0].removesuffix(".py")
        for other in imported(ast.parse(path.read_text(encoding="utf-8"))):
            if other != own and own not in LOADED_LATER:
                found.add((str(name), own, other))
    return found


def test_imports_are_those_of_the_table() -> None:
    found = {f"{file} -> {other}" for file, own, other in arrows() if other not in ALLOWED[own] | EVERYWHERE}
    assert found == set(), "imports outside the table; turn them round, or move what they want"


def test_the_table_names_every_part_and_has_no_circle() -> None:
    tops = {path.name.removesuffix(".py") for path in (ROOT / "fedsim").iterdir() if path.name != "__pycache__"}
    assert tops - LOADED_LATER - {"configs"} == ALLOWED.keys()
    assert len(list(TopologicalSorter(ALLOWED).static_order())) == len(ALLOWED)


def test_process_groups_are_used_in_few_places() -> None:
    users = set()
    for path in (ROOT / "fedsim").rglob("*.py"):
        name = path.relative_to(ROOT / "fedsim")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            if any(module.startswith("torch.distributed") for module in modules):
                users.add(name.parts[0] if name.parts[0] in GROUPS else str(name))
    assert users == GROUPS
