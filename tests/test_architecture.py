"""Which part of fedsim may import which: a table, and the imports of today that lie outside it.

Every part may import the base. :data:`BREACHES` may only shrink: an import that is gone must leave the list, too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Final

ROOT = Path(__file__).parents[1]

BASE: Final = {
    "artefacts", "benchmarks", "digests", "disk", "errors", "extend", "json_text", "keys", "launching", "out_of_memory",
    "processes", "ranks", "reused", "rounds", "tensor_file", "terminal", "user_code", "version",
}  # fmt: skip
"""Modules at the top that every part may import, and that import nothing but one another."""

RUN: Final = {
    "assembly", "checkpoint", "cohort", "figures", "fitting", "local_rows", "measurement", "meter", "needs", "plan",
    "preflight", "preparation", "simulation",
}  # fmt: skip
"""Modules at the top that put a run together: one part, named "run"."""

LOADED_LATER: Final = {"__init__"}
"""Gives its names on demand, and so is no importer."""

ALLOWED: Final[dict[str, set[str]]] = {
    "base": set(),
    "config": set(),
    "kernels": set(),
    "attention": {"kernels"},
    "data": {"config", "attention"},
    "fused": {"kernels", "attention"},
    "model": {"config", "attention", "data", "fused", "kernels"},
    "generate": {"attention", "data", "fused", "kernels", "model"},
    "federation": {"config"},
    "train": {"config", "attention", "data", "federation", "fused", "kernels", "model"},
    "parallel": {"config", "attention", "federation", "kernels", "model", "train"},
    "evaluate": {"config", "attention", "data", "fused", "generate", "kernels", "model"},
    "safety": {"config", "attention", "data", "evaluate", "fused", "generate", "kernels", "model", "train"},
    "record": {"config"},
    "report": {"config", "data", "evaluate", "record"},
    "run": {
        "config", "attention", "data", "evaluate", "federation", "fused", "generate", "model", "parallel", "record",
        "safety", "train",
    },
    "study": {"config", "data", "evaluate", "record", "report", "run"},
    "api": {"config", "parallel", "record", "run"},
}  # fmt: skip
"""Part → parts that it may import beside the base."""

BREACHES: Final = {
    "artefacts.py -> record",
    "evaluate/guard_judge.py -> safety",
    "evaluate/stage.py -> record",
    "fused/choice.py -> model",
    "fused/ops.py -> model",
    "launching.py -> record",
    "model/fitness.py -> generate",
    "model/memory.py -> generate",
    "model/tiny_model.py -> safety",
    "model/tiny_recipe.py -> safety",
    "model/tiny_skills.py -> safety",
    "out_of_memory.py -> record",
    "parallel/failing.py -> record",
    "parallel/post_mortem.py -> record",
    "parallel/world.py -> record",
    "record/costs.py -> model",
    "record/costs.py -> parallel",
    "record/dropped_rows.py -> data",
    "record/places.py -> federation",
    "record/run_record.py -> federation",
    "record/run_record.py -> run",
    "safety/guard_model.py -> parallel",
    "study/cells.py -> parallel",
}
"""``file -> part``: imports outside the table."""


def part_of(name: str) -> str:
    """The part that a module or package at the top of fedsim belongs to."""
    return "base" if name in BASE else "run" if name in RUN else name


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
        own = part_of(name.parts[0].removesuffix(".py"))
        for other in imported(ast.parse(path.read_text(encoding="utf-8"))):
            if part_of(other) != own and own not in LOADED_LATER:
                found.add((str(name), own, part_of(other)))
    return found


def test_imports_are_those_of_the_table_or_known_breaches() -> None:
    found = {f"{file} -> {other}" for file, own, other in arrows() if other not in ALLOWED[own] | {"base"}}
    assert found - BREACHES == set(), "imports outside the table; turn them round, or move what they want"
    assert BREACHES - found == set(), "breaches that are gone: take them off the list"


def test_the_table_names_every_part_and_has_no_circle() -> None:
    tops = {path.name.removesuffix(".py") for path in (ROOT / "fedsim").iterdir() if path.name != "__pycache__"}
    assert {part_of(name) for name in tops} - LOADED_LATER - {"configs"} == ALLOWED.keys()
    assert tops >= BASE | RUN, "modules that are gone: take them off the table"
    assert len(list(TopologicalSorter(ALLOWED).static_order())) == len(ALLOWED)


def test_only_parallel_and_what_it_serves_touch_torch_distributed() -> None:
    """The process group is invisible to every other part."""
    users = {
        path.relative_to(ROOT / "fedsim").parts[0]
        for path in (ROOT / "fedsim").rglob("*.py")
        if any(
            (isinstance(node, ast.Import) and any(a.name.startswith("torch.distributed") for a in node.names))
            or (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.distributed"))
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        )
    }
    assert users == {"parallel"}
