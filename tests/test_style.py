"""Counts of how the package's code reads; each limit may only fall.

A line counts where it is not blank. Nested comprehensions hold another one or have several ``for``; a question is a
docstring whose first word asks.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[1]
COMPREHENSIONS: Final = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
QUESTION: Final = re.compile(r"(What|Whether|Who|How|Where|Which|When|Why)\b")

LIMITS: Final = {"nested": 2.0, "if-expressions": 12.0, "walrus": 1.0, "questions": 0.0}
"""Most of a kind in 1,000 lines."""

LEAST_COMMENTS: Final = 40.0
"""Fewest comments in 1,000 lines."""


def sources() -> Iterator[Path]:
    """Files of the package and of the kernels, the links of a clone left out."""
    for folder in ("fedsim", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not any(parent.is_symlink() for parent in path.parents):
                yield path


def is_nested(node: ast.AST) -> bool:
    """Return whether a comprehension holds another, or has several clauses."""
    if not isinstance(node, COMPREHENSIONS):
        return False
    inner = [child for child in ast.walk(node) if isinstance(child, COMPREHENSIONS)]
    return len(node.generators) > 1 or len(inner) > 1


def asks(node: ast.AST) -> bool:
    """Return whether the docstring of a module, class or function begins as a question."""
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
        return False
    return QUESTION.match(ast.get_docstring(node) or "") is not None


def counts(text: str) -> Counter[str]:
    """Numbers of lines, comments and each kind of :data:`LIMITS` in a file."""
    found = Counter(lines=sum(1 for line in text.splitlines() if line.strip()))
    for node in ast.walk(ast.parse(text)):
        found["nested"] += is_nested(node)
        found["if-expressions"] += isinstance(node, ast.IfExp)
        found["walrus"] += isinstance(node, ast.NamedExpr)
        found["questions"] += asks(node)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        found["comments"] += token.type == tokenize.COMMENT
    return found


@pytest.fixture(scope="module")
def per_thousand() -> dict[str, float]:
    """Counts of all files in 1,000 lines."""
    total: Counter[str] = Counter()
    for path in sources():
        total += counts(path.read_text(encoding="utf-8"))
    return {name: 1000 * total[name] / total["lines"] for name in (*LIMITS, "comments")}


@pytest.mark.parametrize("name", LIMITS)
def test_there_are_few(per_thousand: dict[str, float], name: str) -> None:
    assert per_thousand[name] <= LIMITS[name]


def test_long_functions_have_landmarks(per_thousand: dict[str, float]) -> None:
    assert per_thousand["comments"] >= LEAST_COMMENTS


def test_each_kind_is_counted() -> None:
    text = (
        '"""What it is."""\n'
        "a = [x for y in z for x in y]\n"
        "b = {k: [v for v in w] for k, w in c.items()}\n"
        "d = [x for x in z]  # plain\n\n"
        "e = 1 if (f := a) else 2\n"
    )
    wanted = {"lines": 5, "nested": 2, "if-expressions": 1, "walrus": 1, "questions": 1, "comments": 1}
    assert counts(text) == wanted
