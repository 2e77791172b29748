"""Write the README's tree: one line per file, from each file's own first sentence. ``python tools/readme_tree.py``."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

from fedsim.record.blocks import replace_block

ROOT = Path(__file__).parents[1]
FOLDERS = ("launch", "configs", "fedsim", "kernels", "tools", "tests")
WIDTH = 140


def first_sentence(path: Path) -> str:
    """What a file says of itself: the first sentence of its docstring or leading comment."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        said = ast.get_docstring(ast.parse(text)) or ""
    else:
        said = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    paragraph = " ".join(said.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[a-z)`\"'])[.;] ", paragraph)[0].rstrip(".:;")
    return sentence.replace("``", "")


def tree() -> str:
    """The tree of source files; a folder's tests and one-line package files are left out."""
    lines = []
    for folder in FOLDERS:
        seen: set[Path] = set()
        for path in sorted(files_of(ROOT / folder), key=lambda p: (p.parent.as_posix(), p.name)):
            if path.parent not in seen:
                seen.add(path.parent)
                lines.append(f"{path.parent.relative_to(ROOT).as_posix()}/")
            said = first_sentence(path)
            lines.append(
                f"  {path.name:<22} {said if len(said) <= WIDTH - 25 else said[: WIDTH - 26].rsplit(' ', 1)[0] + ' …'}"
            )
    return "\n".join(lines)


def files_of(folder: Path) -> list[Path]:
    """Python and YAML files below a folder, links not followed."""
    found = []
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink() and path.name != "__pycache__":
            found += files_of(path)
        elif path.suffix in (".py", ".yaml") and (path.suffix != ".py" or first_sentence(path)):
            found.append(path)
    return found


def updated(readme: str) -> str:
    """The README's text with a fresh tree.

    Raises:
        ValueError: the README has not exactly one place for it.
    """
    return replace_block(readme, "tree", f"```text\n{tree()}\n```")


def main() -> int:
    """Rewrite the README."""
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
