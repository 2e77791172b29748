"""Put a finished run's table into the README, and its plots into docs/: ``python tools/readme_demo.py runs/demo``.

The figures, the date, the machine and the versions come from the run directory; nothing is typed in.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from fedsim.config import load_config, to_flat
from fedsim.record.blocks import replace_block
from fedsim.record.metrics import MetricLog
from fedsim.record.summary import arm_table, facts_from
from fedsim.record.tables import duration
from fedsim.record.timers import top_level_seconds

ROOT = Path(__file__).parents[1]
PLOTS = ("safety.png", "helpfulness.png", "time.png")


def demo_block(run: Path, manifest: dict[str, Any]) -> str:
    """The table, and where, when and with what it was measured."""
    rows = MetricLog(run / "metrics.jsonl").rows()
    started, machine, versions = manifest["started"], manifest["hardware"], manifest["versions"]
    seconds = sum(sum(top_level_seconds(row).values()) for row in rows)
    peak = max(row.get("perf/peak_rss_bytes", 0) for row in rows) / 2**30
    facts = facts_from(
        to_flat(load_config(run / "config.yaml")), num_ranks=started["num_ranks"], total_s=seconds, places={}
    )
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"]) or "no GPU"
    where = (
        f"Measured on {started['utc'][:10]}: {machine['cores']} cores of {machine['cpu']}, {gpus}; "
        f"{facts.num_ranks} processes, {duration(seconds)}, {peak:.1f} GiB over all processes; "
        f"torch {versions['torch']}, transformers {versions['transformers']}, peft {versions['peft']}, "
        f"fedsim {versions['fedsim']}"
    )
    commit = manifest["git"]["commit"][:10] if manifest.get("git") else None
    table = arm_table(rows, facts, short=False).markdown()
    pictures = "\n".join(f"![{name.removesuffix('.png')}](docs/demo-{name})" for name in PLOTS)
    return f"{table}\n\n{where}{f', commit {commit}' if commit else ''}.\n\n{pictures}"


def main() -> int:
    """Rewrite the README's block."""
    if len(sys.argv) != 2:
        print("usage: python tools/readme_demo.py RUN_DIRECTORY", file=sys.stderr)
        return 2
    run = Path(sys.argv[1])
    block = demo_block(run, json.loads((run / "manifest.json").read_text(encoding="utf-8")))
    for name in PLOTS:
        shutil.copyfile(run / name, ROOT / "docs" / f"demo-{name}")
    readme = ROOT / "README.md"
    readme.write_text(replace_block(readme.read_text(encoding="utf-8"), "demo", block), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
