"""Generated blocks of the README equal what their tools write."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def tool(name: str) -> ModuleType:
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_sources_is_up_to_date() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tool("readme_sources").updated(text) == text, "run: python tools/readme_sources.py"


def test_the_benchmark_tables_are_those_of_the_committed_rows() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tool("readme_bench").updated(text) == text, "run: python tools/readme_bench.py"
