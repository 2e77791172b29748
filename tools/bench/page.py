"""Write docs/results/benchmark.md from the committed rows: ``python tools/bench/page.py``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

ROOT = Path(__file__).resolve().parents[2]
sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent)]

from fedsim.base.launching import Parser, launched  # noqa: E402
from fedsim.study.bench_rows import StageResult  # noqa: E402
from tools.bench.table import markdown_table, strongest_peers  # noqa: E402

PAGE: Final = ROOT / "docs" / "results" / "benchmark.md"
RESULTS: Final = ROOT / "tools" / "bench" / "results"
NONE: Final = "No rows are committed yet."
INTRODUCTION: Final = (
    "Written by `python tools/bench/page.py` from the rows in `tools/bench/results/`. Each device has two tables: for "
    "each piece of work the strongest peer, which is the one with the lowest ratio, and then every row. fedsim and the "
    "peers take turns on the same rows, in the same dtype, with the same threads; set-up is timed apart. On a CPU the "
    "process keeps memory that it has freed, as fedsim's runs do, which is faster for peers too than the C library's "
    "default. Ratio: the peer's median ÷ ours, so below 1 the peer is faster. The floor is the work's arithmetic or "
    "memory traffic at the device's peak."
)


def devices(results: Path) -> list[list[StageResult]]:
    """Stages by device, of the devices that have any."""
    found = []
    for folder in sorted(path for path in results.glob("*") if path.is_dir()):
        stages = [StageResult.read(file) for file in sorted(folder.glob("*.json"))]
        if stages:
            found.append(stages)
    return found


def page(results: Path = RESULTS) -> str:
    """The result page: for every device the strongest peers, all rows, and where they were measured."""
    parts = ["# Benchmark", INTRODUCTION]
    for stages in devices(results):
        parts += [f"## {stages[0].facts['device']}", *provenance(stages)]
        peers = strongest_peers(stages)
        if peers.rows:
            parts += ["### Strongest peers", peers.markdown()]
        parts += ["### All rows", markdown_table(stages).markdown()]
    return "\n\n".join(parts if len(parts) > 2 else [*parts, NONE]) + "\n"


def provenance(results: Sequence[StageResult]) -> list[str]:
    """``Measured on …``, once for every different set of facts, with the commit that was measured."""
    lines: dict[str, list[str]] = {}
    for result in results:
        facts = result.facts
        threads = "" if facts["device"].startswith("NVIDIA") else f", {facts['threads']} thread(s)"
        packages = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "transformers", "peft"))
        trl = facts["versions"]["trl"]
        peers = "no TRL" if trl is None else f"TRL {trl}"
        line = (
            f"{facts['device']}{threads}, {facts['model']}, {packages}, {peers}, "
            f"{facts['date'][:10]}, commit {(facts['commit'] or 'unknown')[:10]}"
        )
        lines.setdefault(line, []).append(result.stage)
    return ["\n".join(f"Measured on {line} ({', '.join(stages)})." for line, stages in lines.items())]


def write(_: argparse.Namespace) -> None:
    """Rewrite the page."""
    PAGE.write_text(page(), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = Parser(prog="tools/bench/page.py", description=__doc__)
    return launched(lambda: parser.parse_args(argv), write)


if __name__ == "__main__":
    sys.exit(main())
