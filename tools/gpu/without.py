"""Imports as on a machine that lacks packages which neither training nor figures need."""

from __future__ import annotations

import importlib.machinery
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Final

PACKAGES: Final = ("trl", "datasets", "wandb", "deepspeed", "matplotlib")
VARIABLE: Final = "FEDSIM_WITHOUT"
"""Environment variable with the packages' names, for processes that are started from here."""


class Without(importlib.machinery.PathFinder):
    """Finds every module but those of some packages."""

    packages: frozenset[str] = frozenset()

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """None for what is not to be found, as where it is not installed."""
        return None if fullname.partition(".")[0] in cls.packages else super().find_spec(fullname, path, target)


def hide(packages: Sequence[str]) -> None:
    """Let imports of these packages fail from now on, in this process and in those that it starts."""
    Without.packages = frozenset(packages)
    os.environ[VARIABLE] = ",".join(packages)
    if Without not in sys.meta_path:
        sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Without


def hide_as_told() -> None:
    """Hide what the environment names."""
    if names := [name for name in os.environ.get(VARIABLE, "").split(",") if name]:
        hide(names)
