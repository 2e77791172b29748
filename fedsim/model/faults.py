"""Errors of libraries as messages for users, with the package to install."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Final

from fedsim.attention.forward import IMPLEMENTATIONS, unsupported
from fedsim.base.errors import ModelError

_CONVERT: Final = "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
MAKE_FAST: Final = f"or make a tokenizer.json where it is installed: {_CONVERT}"


def names_attention(error: Exception) -> bool:
    """True if an architecture did not find fedsim's attention in its own table."""
    return any(name in str(error) for name in IMPLEMENTATIONS.values())


def attention_table_error(architecture: str) -> ModelError:
    """Error for an architecture whose layers choose their attention from their own table."""
    return unsupported(architecture, "its layers choose their attention themselves and do not use")


def missing_tokenizer_package(folder: Path) -> str | None:
    """Describe the packages that the tokenizer's files need and that are missing; None without one.

    transformers reads ``tokenizer.model`` with sentencepiece, and if that fails it asks for
    tiktoken, even if the file is sentencepiece's.

    Args:
        folder: a Hugging Face model directory.
    """
    if (folder / "tokenizer.json").is_file():
        return None
    for name in ("tokenizer.model", "spiece.model", "tiktoken.model"):
        path = folder / name
        if not path.is_file():
            continue
        # Package → module that it installs.
        needed = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
        if _is_tiktoken(path):
            needed = {"tiktoken": "tiktoken"}
        lacking = [package for package, module in needed.items() if not _is_installed(module)]
        if lacking:
            problem = f"its tokenizer is only {name}, which needs {' and '.join(lacking)}"
            return f"{problem}, not installed here; pip install {' '.join(lacking)}, {MAKE_FAST}"
    return None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def _is_tiktoken(path: Path) -> bool:
    """True for a vocabulary of tiktoken: text, a base64 token and its rank a line.

    sentencepiece's model is binary.
    """
    with path.open("rb") as file:
        words = file.readline(1000).split()
    return len(words) == 2 and words[1].isdigit()
