"""Growth of memory, open files and disk over a long run: ``tools/soak.py [--nproc 1,4] [CONFIG.yaml] [key=value …]``.

A small run of 200 rounds (SCAFFOLD, CAI in every round, a checkpoint after each) is started with ``launch/run.py``,
once with each number of processes, and watched from outside: resident memory and open file descriptors of every
process, and the files of the run directory. glibc is told to give back at once what is freed (``MALLOC``): left alone
its heap wanders by several MiB, among which a leak would hide. What counts as flat stands in ``tools/growth.py``; the
exit status is 2 unless everything is. Logs, and what is kept of evaluations, grow on purpose: their bytes are shown.

The rows go to ``tools/bench/results/<device>/operations/soak.json``; ``--page`` runs nothing and writes
``docs/results/soak.md`` from them and from those of ``tools/client_scale.py``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent)]

from fedsim.base.errors import RunError  # noqa: E402
from fedsim.base.launching import Parser, launched  # noqa: E402
from fedsim.base.tables import Table, byte_size, number  # noqa: E402
from fedsim.config import load_config  # noqa: E402
from fedsim.study.bench_rows import Row, StageResult  # noqa: E402
from tools import client_scale, running  # noqa: E402
from tools.growth import DISK, FILES, GROWS, HANDLES, MEMORY, SPAN, UNDECIDED, Soak, judge, limit  # noqa: E402
from tools.watching import CORE, WORKER, watch  # noqa: E402

NAME = "soak"
PAGE = running.PAGES / "soak.md"
WARM_UP = 40  # caches and heaps fill
SMALL = [
    "name=soak", "federation.algorithm=scaffold", "federation.num_clients=6", "federation.clients_per_round=5",
    "federation.num_rounds=200", "data.federated_rows=60", "data.guard_rows=16", "data.cai_rows=12", "local.steps=2",
    "local.batch_size=4", "local.micro_batch_size=2", "model.lora_r=4", "guard.kind=none", "cai.iterations=1",
    "cai.batch_size=4", "eval.every=20", "eval.limit=5", "eval.max_new_tokens=16", "eval.batch_size=4",
]  # fmt: skip
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_ARENA_MAX": "1",
}


def soak(num_ranks: int, words: Sequence[str], folder: Path, warm_up: int, limit_s: float) -> Soak:
    """Run and watch.

    Raises:
        RunError: the run fails, or takes longer than ``limit_s``.
    """
    places = [f"record.dir={folder / str(num_ranks)}", f"record.artefacts={folder / 'artefacts'}"]
    config = load_config(Path(words[0]), [*words[1:], *places])
    log = folder / f"{num_ranks}.log"

    def say(number: int) -> None:
        if number % 50 == 0:
            print(f"  {number} rounds", flush=True)

    with log.open("wb") as out:
        status, samples = watch(
            running.command(num_ranks, [*words, *places]),
            folder / str(num_ranks) / config.name,
            out,
            environment=running.environment() | MALLOC,
            limit_s=limit_s,
            say=say,
        )
    if status != 0:
        last = " / ".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:])
        how = f"took longer than --limit-s {limit_s:g}" if status is None else f"ended with status {status}"
        raise RunError(f"the run of {num_ranks} process(es) {how}: {last}")
    return judge(samples, num_ranks, warm_up)


def rows_of(found: Soak) -> list[Row]:
    """A row for every quantity of every process, and one for what grows on purpose."""
    shapes = {"ranks": found.num_ranks, "rounds": found.rounds}
    rows = [
        Row(
            NAME,
            g.quantity,
            "float32",
            {**shapes, "owner": g.owner},
            figures={"level": g.level, "growth": g.slope.value, "low": g.slope.low, "high": g.slope.high},
            note=g.verdict,
        )
        for g in found.growths
    ]
    grown = {"log_bytes": found.log_bytes, "evaluation_bytes": found.evaluation_bytes}
    return [*rows, Row(NAME, WRITTEN, "float32", shapes, figures=grown, note="bytes a round")]


WRITTEN = "logs and evaluations"
GROUPS = {  # lines of the table: the rows' quantity, the beginning of the owner's name, and what it is called
    "resident memory of a rank": (MEMORY, "rank"),
    "resident memory of W&B's worker": (MEMORY, WORKER),
    "resident memory of W&B's own program": (MEMORY, CORE),
    "resident memory of the launcher": (MEMORY, "launcher"),
    "open files of a rank": (HANDLES, "rank"),
    "open files of W&B's worker": (HANDLES, WORKER),
    "open files of W&B's own program": (HANDLES, CORE),
    "open files of the launcher": (HANDLES, "launcher"),
    "files in the run directory": (FILES, ""),
    "bytes of them, without logs": (DISK, ""),
}


def table(rows: Sequence[Row]) -> Table:
    """A line for each kind of process and quantity, a column for each number of processes; of ranks the worst one."""
    counts = sorted({row.shapes["ranks"] for row in rows})
    lines = []
    for title, (quantity, owner) in GROUPS.items():
        found = [_worst(rows, quantity, owner, count) for count in counts]
        if any(found):
            size = byte_size if quantity in (MEMORY, DISK) else number
            told = f"{title} (limit {size(limit(quantity, owner))})"
            lines.append([told, *("–" if row is None else _cell(row, quantity) for row in found)])
    written = {row.shapes["ranks"]: row.figures for row in rows if row.name == WRITTEN}
    for title, figure in (("logs, a round", "log_bytes"), ("kept of evaluations, a round", "evaluation_bytes")):
        lines.append([title, *(byte_size(written[count][figure]) for count in counts)])
    return Table([f"growth in {SPAN} rounds [95 %]", *(f"{count} process(es)" for count in counts)], lines)


def _worst(rows: Sequence[Row], quantity: str, owner: str, num_ranks: int) -> Row | None:
    """The row whose interval reaches highest."""
    found = [
        row
        for row in rows
        if row.name == quantity and row.shapes["ranks"] == num_ranks and row.shapes["owner"].startswith(owner)
    ]
    return max(found, key=lambda row: row.figures["high"], default=None)


def _cell(row: Row, quantity: str) -> str:
    unit, scale = {MEMORY: (" MiB", 2**20), DISK: (" KiB", 2**10)}.get(quantity, ("", 1))
    growth, low, high = (row.figures[name] / scale for name in ("growth", "low", "high"))
    level = number(round(row.figures["level"] / scale, 1))
    return f"{level}{unit}, {growth:+.2f} [{low:.2f}, {high:.2f}], {row.note}"


def page() -> str:
    """The result page, from the rows' files."""
    found, state = running.newest_rows(NAME), running.newest_rows(client_scale.NAME)
    rounds = sorted({row.shapes["rounds"] for row in found.rows})
    parts = [
        "# Soak and client scale",
        "A long run watched from outside, and SCAFFOLD's state of many clients. Written by `python tools/soak.py "
        "--page`.",
        "## Growth over a long run",
        table(found.rows).markdown(),
        f"Level, growth and verdict over {' and '.join(map(str, rounds))} rounds after a warm-up, glibc giving "
        "back at once what is freed; of several ranks the one whose interval reaches highest. "
        f"{running.measured_on(found)} Made by `python tools/soak.py`.",
        "## State of many clients",
        f"{client_scale.sentence(state)} {running.measured_on(state)} Made by `python tools/client_scale.py`.",
    ]
    return "\n\n".join(parts) + "\n"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(prog="tools/soak.py", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml | key=value", help="another configuration, overrides")
    parser.add_argument("--nproc", default="1,4", help="numbers of processes, one run each (1,4)")
    parser.add_argument("--warm-up", type=int, default=WARM_UP, help=f"rounds that do not count ({WARM_UP})")
    parser.add_argument("--limit-s", type=float, default=540.0, help="longest time of one run (540)")
    parser.add_argument("--out", type=Path, help="file for the rows")
    parser.add_argument("--page", action="store_true", help=f"run nothing, write {PAGE.name} from the committed rows")
    asked = parser.parse_intermixed_args(arguments)
    asked.counts = running.process_counts(asked.nproc)
    asked.words = running.run_words(asked.words, SMALL)
    return asked


def work(asked: argparse.Namespace) -> None:
    """Run, print and write.

    Raises:
        RunError: something grows, or too few rounds were seen to tell.
    """
    if asked.page:
        running.write_page(PAGE, page())
        return
    facts, rows = running.facts(), []
    with tempfile.TemporaryDirectory() as folder:
        for count in asked.counts:
            print(f"{count} process(es)", flush=True)
            rows += rows_of(soak(count, asked.words, Path(folder), asked.warm_up, asked.limit_s))
    print(table(rows).plain())
    running.write_rows(StageResult(NAME, facts, [], rows), asked.out)
    bad = [f"{row.shapes['owner'] or 'run'}: {row.name} {row.note}" for row in rows if row.note in (GROWS, UNDECIDED)]
    if bad:
        raise RunError(f"not flat: {'; '.join(bad)}; look for what holds on to it, or give more rounds where undecided")


def main() -> int:
    """Soak; a mistake is one line."""
    return launched(lambda: parse(sys.argv[1:]), work)


if __name__ == "__main__":
    sys.exit(main())
