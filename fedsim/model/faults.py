"""Errors of libraries in a user's words: no bare key, no internal name, and the package to install."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Final

from fedsim.attention.forward import IMPLEMENTATIONS, unsupported
from fedsim.base.errors import ModelError

MAKE_FAST: Final = (
    "or make a tokenizer.json where it is installed: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
)


def names_attention(error: Exception) -> bool:
    """An architecture did not find fedsim's attention in a table of its own."""
    return any(name in str(error) for name in IMPLEMENTATIONS.values())


def own_attention(architecture: str) -> ModelError:
    """The error of an architecture whose layers choose their attention from a table of their own."""
    return unsupported(architecture, "its layers choose their attention themselves and do not use")


def missing_tokenizer_package(folder: Path) -> str | None:
    """The package that the tokenizer's files need and that is not installed, with the way out; None if none is.

    transformers reads ``tokenizer.model`` with sentencepiece, and where that fails asks for tiktoken, whatever the file
    holds.
    """
    if (folder / "tokenizer.json").is_file():
        return None
    files = {name: folder / name for name in ("tokenizer.model", "spiece.model", "tiktoken.model")}
    for name, path in files.items():
        if not path.is_file():
            continue
        needed = ["tiktoken"] if _is_tiktoken(path) else ["sentencepiece", "protobuf"]
        modules = {"protobuf": "google.protobuf"}
        lacking = [package for package in needed if not _is_installed(modules.get(package, package))]
        if lacking:
            return (
                f"its tokenizer is {name} alone, which needs {' and '.join(lacking)}, not installed here; pip install "
                f"{' '.join(lacking)}, {MAKE_FAST}"
            )
    return None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would lie in
        return False


def _is_tiktoken(path: Path) -> bool:
    """A vocabulary of tiktoken is text, a base64 token and its rank a line; sentencepiece's model is binary."""
    with path.open("rb") as file:
        words = file.readline(1000).split()
    return len(words) == 2 and words[1].isdigit()
