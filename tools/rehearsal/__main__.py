"""``python -m tools.rehearsal``: count the CUDA path's steps at 8B shapes on a fake device, without a GPU."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tools.rehearsal import device

RESULT = Path(__file__).with_name("results") / "phases.json"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "rehearsal.md"


def main(arguments: Sequence[str]) -> int:
    """See the help; returns the exit code: 1 where a budget is exceeded, 2 where the fake device cannot be had."""
    parser = argparse.ArgumentParser(prog="python -m tools.rehearsal", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="carry 2 and 3 layers to 32, and write no results")
    parser.add_argument("--lower", action="store_true", help="as --quick, and lower the budgets to what was counted")
    parser.add_argument("--faults", action="store_true", help="seed faults too, and say how each is reported")
    parser.add_argument("--phases", metavar="TEXT", default="", help="only phases whose name holds this")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures there, and no results")
    parser.add_argument("--page", action="store_true", help=f"count nothing, write {PAGE.name} from committed figures")
    options = parser.parse_args(arguments)
    if options.page:
        _write_page()
        return 0
    if (reason := device.why_not()) is not None:
        print(f"the rehearsal cannot run here: {reason}", file=sys.stderr)
        return 2
    device.load()
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    from tools.rehearsal import budgets, measure, table  # these import torch, which the fake device comes before
    from tools.rehearsal.phases import PHASES

    names = [name for name in PHASES if options.phases in name]
    if not names:
        print(f"no phase holds {options.phases!r}; there are: {'; '.join(PHASES)}", file=sys.stderr)
        return 2
    quick = options.quick or options.lower
    found = measure.rehearse(names, quick=quick, say=lambda name: print(f"… {name}", file=sys.stderr))
    figures = {name: measure.figures(measured) for name, measured in found.items()}
    content: dict[str, Any] = {
        "versions": budgets.versions(),
        "phases": {name: {**asdict(measured), "figures": figures[name]} for name, measured in found.items()},
    }
    if options.faults:
        from tools.rehearsal.faults import reports

        content["faults"] = {name: asdict(report) for name, report in reports().items()}
    text = table.text(found, content["versions"])
    print(text, end="")
    if options.json is not None:
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    elif not quick and len(names) == len(PHASES):
        RESULT.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        _write_page()
    if options.lower:
        old = budgets.read()["phases"] if budgets.FILE.is_file() else {}
        new = budgets.lowered(figures, old)
        budgets.write({name: new.get(name) or old[name] for name in PHASES if name in new or name in old})
        return 0
    # Budgets are of figures that are carried from 2 and 3 layers; a test holds the two within 1.5 % of one another.
    return _judge(figures) if quick else 0


def _write_page() -> None:
    """Write the result page from the committed figures."""
    from tools.rehearsal import table

    PAGE.write_text(table.page(json.loads(RESULT.read_text(encoding="utf-8"))), encoding="utf-8")


def _judge(figures: dict[str, dict[str, float]]) -> int:
    """Compare with the committed budgets and say what is above or clearly below."""
    from tools.rehearsal import budgets

    committed = budgets.read()
    if committed["versions"] != budgets.versions():
        print(f"budgets are of {committed['versions']}, not of {budgets.versions()}: not compared")
        return 0
    above: list[str] = []
    below: list[str] = []
    for name, found in figures.items():
        budget = committed["phases"][name]
        above += budgets.exceeded(name, found, budget)
        below += budgets.outdated(name, found, budget)
    print("\n".join([*above, *below] or ["all figures are within their budgets"]))
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
