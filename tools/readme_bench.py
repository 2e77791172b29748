"""Write the README's benchmark tables from the committed rows: ``python tools/readme_bench.py``."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fedsim.record.blocks import replace_block  # noqa: E402
from tools.bench.rows import StageResult  # noqa: E402
from tools.bench.table import readme_table  # noqa: E402

README = ROOT / "README.md"
RESULTS = ROOT / "tools" / "bench" / "results"


def markdown(results: Path = RESULTS) -> str:
    """A table for every device, of the rows that have a target, and where and with what they were measured."""
    parts = []
    for folder in sorted(path for path in results.glob("*") if path.is_dir()):
        found = [StageResult.read(file) for file in sorted(folder.glob("*.json"))]
        table = readme_table(found)
        if table.rows:
            parts += [table.markdown(), measured_on(found)]
    return "\n\n".join(parts) or "No rows are committed yet."


def measured_on(results: list[StageResult]) -> str:
    """``Measured on …``, once for every different set of facts."""
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
    return "\n".join(f"Measured on {line} ({', '.join(stages)})." for line, stages in lines.items())


def updated(readme: str) -> str:
    """The README's text with the tables as they should be."""
    return replace_block(readme, "bench", markdown())


def main() -> int:
    """Rewrite the README."""
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
