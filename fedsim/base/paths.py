"""Paths as a user writes them."""

from __future__ import annotations

import os
from pathlib import Path


def user_path(text: str) -> Path:
    """Return the path with ``~`` expanded; a ``~name`` of no user of this machine stays as it is."""
    return Path(os.path.expanduser(text))
