"""Write docs/results/demo.md from a finished run: ``python tools/demo_page.py [runs/demo]``.

The rows that the table is made from go to ``docs/results/demo.json``, with the date, the machine and the versions of
the run directory, and its plots beside them; nothing is typed in. Without a run directory the page is made from the
committed rows.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from fedsim.base.errors import DataError
from fedsim.base.launching import Parser, launched
from fedsim.base.tables import duration
from fedsim.base.version import commit_of
from fedsim.config import load_config, to_flat
from fedsim.evaluate.own import DESCRIBED
from fedsim.record.metrics import MetricLog, Row
from fedsim.record.timers import total_seconds
from fedsim.report.cai_line import FINDINGS, LAST_ROUND, cai_lines
from fedsim.report.sections import POINT_TITLES
from fedsim.report.summary import TEMPLATES_NOTE, RunFacts, arm_table, controls, eval_points, facts_from

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
PLOTS = ("safety.png", "helpfulness.png", "time.png")

#: Figures of an evaluation that the page shows.
FIGURES: Final = [
    *DESCRIBED.headlines,
    *(figure for figure in DESCRIBED.lines("always") if figure.is_share),
    *(figure for figure in DESCRIBED.figures if figure.name == "hhh_letter"),
]
SHOWN: Final = (*(figure.metric for figure in FIGURES), *(figure.count_metric for figure in FIGURES))


def demo_rows(run: Path) -> dict[str, Any]:
    """Data of the page: facts of the run, the machine, and the rows with the figures that it shows.

    Raises:
        DataError: the folder is no finished run's.
    """
    for name in ("config.yaml", "manifest.json", "metrics.jsonl", *PLOTS):
        if not (run / name).is_file():
            raise DataError(f"{run}: holds no {name}; give the directory of a finished run, such as runs/demo")
    rows = MetricLog(run / "metrics.jsonl").rows()
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    seconds = total_seconds(rows)
    settings = to_flat(load_config(run / "config.yaml"))
    facts = facts_from(
        settings, num_ranks=manifest["started"]["num_ranks"], total_s=seconds, places={}, benchmarks=DESCRIBED
    )
    kept = [
        *eval_points(rows).values(),
        *(row for row in rows if row["stage"] == "cai_data"),
        *[row for row in rows if row["stage"] == "round"][-1:],
    ]
    return {
        "facts": {name: value for name, value in asdict(facts).items() if name != "benchmarks"},
        "manifest": {
            "started": {name: value for name, value in manifest["started"].items() if name != "command"},
            **{name: manifest[name] for name in ("hardware", "versions", "git")},
        },
        "peak_rss_bytes": max(row.get("perf/peak_rss_bytes", 0) for row in rows),
        "rows": [_only(row) for row in kept],
    }


def _only(row: Row) -> Row:
    """A row with the figures that the page shows."""
    names = {"round", "stage", "point", *SHOWN, *FINDINGS, *LAST_ROUND}
    names |= {f"{name}{ending}" for name in (*SHOWN, *FINDINGS) for ending in ("_low", "_high", "_count")}
    return {name: value for name, value in row.items() if name in names}


INTRODUCTION: Final = (
    "What `make demo` measures in the embedded world, beside the paper's figures for an 8B model. Written by `python "
    "tools/demo_page.py` from [demo.json](demo.json). [What such figures can and cannot show](../embedded-world.md)."
)


def page(found: dict[str, Any]) -> str:
    """The result page: findings, table, plots, and the machine, date and versions of the measurement."""
    rows, manifest, facts = found["rows"], found["manifest"], RunFacts(**found["facts"], benchmarks=DESCRIBED)
    machine, versions = manifest["hardware"], manifest["versions"]
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"]) or "no GPU"
    where = (
        f"Measured on {manifest['started']['utc'][:10]}: {machine['cores']} cores of {machine['cpu']}, {gpus}; "
        f"{facts.num_ranks} processes, {duration(facts.total_s)}, {found['peak_rss_bytes'] / 2**30:.1f} GiB over all "
        f"processes; torch {versions['torch']}, transformers {versions['transformers']}, peft {versions['peft']}, "
        f"fedsim {versions['fedsim']}, commit {commit_of(manifest)}."
    )
    table = arm_table(rows, facts, short=False).markdown()
    lines = "\n".join(f"- {line}" for line in (_letter(rows), *controls(rows, DESCRIBED)) if line)
    pictures = [f"![{name.removesuffix('.png')}](demo-{name})" for name in PLOTS]
    note = f"{TEMPLATES_NOTE} {where}"
    return "\n\n".join(["# The demo", INTRODUCTION, " ".join(cai_lines(rows)), table, lines, note, *pictures]) + "\n"


def _letter(rows: list[Row]) -> str:
    """HHH by the paper's metric at every point."""
    shown = [f"{POINT_TITLES[row['point']]} {row['eval/hhh_letter']:.1f}" for row in rows if "eval/hhh_letter" in row]
    return (
        f"HHH above is by likelihood; by letter, the paper's metric, in percent: {', '.join(shown)}." if shown else ""
    )


def committed() -> dict[str, Any]:
    """Data of the page as it is committed."""
    found: dict[str, Any] = json.loads((RESULTS / "demo.json").read_text(encoding="utf-8"))
    return found


def write(asked: argparse.Namespace) -> None:
    """Copy the run's rows and plots where one is given, and rewrite the page."""
    run: Path | None = asked.run
    if run is not None:
        text = json.dumps(demo_rows(run), indent=1, ensure_ascii=False) + "\n"
        (RESULTS / "demo.json").write_text(text, encoding="utf-8")
        for name in PLOTS:
            shutil.copyfile(run / name, RESULTS / f"demo-{name}")
    (RESULTS / "demo.md").write_text(page(committed()), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    parser = Parser(prog="tools/demo_page.py", description=__doc__)
    parser.add_argument("run", metavar="RUN", nargs="?", type=Path, help="directory of a finished run")
    return launched(lambda: parser.parse_args(argv), write)


if __name__ == "__main__":
    sys.exit(main())
