"""The README's tree is the one that the files themselves tell."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def tool(name: str) -> ModuleType:
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def readme_tree() -> ModuleType:
    return tool("readme_tree")


def test_the_table_of_sources_is_up_to_date() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tool("readme_sources").updated(text) == text, "run: python tools/readme_sources.py"


def test_the_benchmark_tables_are_those_of_the_committed_rows() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tool("readme_bench").updated(text) == text, "run: python tools/readme_bench.py"


def test_the_tree_is_up_to_date(readme_tree: ModuleType) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme_tree.updated(text) == text, "run: python tools/readme_tree.py"


def test_every_module_has_a_line(readme_tree: ModuleType) -> None:
    tree = readme_tree.tree()
    for path in (ROOT / "fedsim").rglob("*.py"):
        if path.name != "__init__.py" and "kernels" not in path.parts[-2:]:
            assert f"  {path.name} " in tree, path


def test_a_readme_without_the_place_is_refused(readme_tree: ModuleType) -> None:
    with pytest.raises(ValueError, match="must hold one block"):
        readme_tree.updated("# fedsim")
