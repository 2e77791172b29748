"""Committed budgets of the phases, which may only fall."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

FILE: Final = Path(__file__).with_name("budgets.json")
MARGIN: Final = 0.01
"""A figure that is lower than its budget by more than this share wants a lower budget."""

COMMAND: Final = "python -m tools.rehearsal --lower"
PACKAGES: Final = ("torch", "transformers", "peft")

Figures = Mapping[str, float]


def read() -> dict[str, Any]:
    """``versions`` of the packages that the figures belong to, and ``phases``: figures by phase."""
    content: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return content


def versions() -> dict[str, str]:
    """Of the installed packages, without a build's own suffix."""
    return {name: version(name).partition("+")[0] for name in PACKAGES}


def exceeded(phase: str, figures: Figures, budget: Figures) -> list[str]:
    """A line for each figure above its budget."""
    return [
        f"{phase}: {name} is {value:g}, its budget {budget[name]:g}; budgets only fall: make it cheaper"
        for name, value in figures.items()
        if value > budget[name]
    ]


def outdated(phase: str, figures: Figures, budget: Figures) -> list[str]:
    """A line for each figure that is clearly below its budget."""
    return [
        f"{phase}: {name} is {value:g}, its budget {budget[name]:g}: lower the budget with `{COMMAND}`"
        for name, value in figures.items()
        if value < budget[name] * (1 - MARGIN)
    ]


def lowered(phases: Mapping[str, Figures], old: Mapping[str, Figures]) -> dict[str, dict[str, float]]:
    """Each budget at the lower of the old one and the figure; new phases enter with their figures, others leave."""
    return {
        phase: {name: min(value, old.get(phase, {}).get(name, value)) for name, value in found.items()}
        for phase, found in phases.items()
    }


def write(phases: Mapping[str, Figures]) -> None:
    """Replace the file, for the installed versions."""
    content = {
        "what": "Roofline figures at 8B shapes and 32 layers, counted on a fake device: no GPU has run anything. See "
        "docs/performance.md.",
        "versions": versions(),
        "phases": phases,
    }
    FILE.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
