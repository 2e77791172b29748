"""Kill ranks at random moments of every stage and compare with an undisturbed run: ``tools/chaos/run.py [--kills N]``.

A small run with every stage (guard fine-tuning, filter, generation, SCAFFOLD, CAI, evaluation, W&B offline) is killed,
started again, killed again, and at last left to finish. It must then hold what the undisturbed run holds, bit for bit.
After a single rank was killed, the others must leave by themselves, and say once which rank it was and where.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from fedsim.base.exit_file import read_ending  # noqa: E402
from fedsim.base.launching import Parser  # noqa: E402
from fedsim.base.tables import Table, duration  # noqa: E402
from fedsim.base.terminal import steady_terminal  # noqa: E402
from fedsim.base.version import made_by, maker  # noqa: E402
from fedsim.record.manifest import hardware  # noqa: E402
from fedsim.record.wandb_worker import inspected  # noqa: E402
from tools.chaos.outcome import different, outcome  # noqa: E402
from tools.chaos.sessions import HangError, Session  # noqa: E402
from tools.chaos.strikes import Strike, covered, plan, strike, timeline  # noqa: E402

CONFIG = Path(__file__).parent / "chaos.yaml"
RESULT = Path(__file__).parent / "result.json"
PAGE = ROOT / "docs" / "results" / "chaos.md"

SESSION_S = 180.0
"""No session takes longer."""

LEAVE_S = 45.0
"""A rank that misses another has left by then: 30 s of its own, and what a busy machine adds."""


@dataclass
class Report:
    """What the kills came to."""

    strikes: list[Strike] = field(default_factory=list)
    leave_s: list[float] = field(default_factory=list)
    num_runs: int = 0
    num_sessions: int = 0
    faults: list[str] = field(default_factory=list)


class Chaos:
    """Runs in a folder of their own.

    Args:
        folder: everything goes here.
        sizes: numbers of ranks; each session takes one of them.
        rng: draws it.
        overrides: ``key=value`` words on top of ``chaos.yaml``.
    """

    def __init__(self, folder: Path, sizes: Sequence[int], rng: random.Random, overrides: Sequence[str] = ()) -> None:
        self.folder = folder
        self.sizes = sizes
        self.rng = rng
        self.overrides = overrides
        self.report = Report()
        self.steps: set[int] = set()

    def words(self, name: str) -> list[str]:
        """The command line of a run."""
        place = self.folder / name
        places = [f"record.dir={place}", f"record.artefacts={place / 'artefacts'}"]
        return [str(CONFIG), *self.overrides, *places]

    def session(self, name: str) -> Session:
        """Start the command once more."""
        self.report.num_sessions += 1
        log = self.folder / f"{name}-{self.report.num_sessions}.log"
        return Session(self.words(name), self.rng.choice(self.sizes), log)

    def finish(self, name: str) -> dict[str, Any]:
        """Let the run end; returns what it decided."""
        session = self.session(name)
        session.wait(SESSION_S)
        assert set(session.codes.values()) == {0}, f"{name} failed: see {session.log}"
        self.steps = self.steps or self._steps(self.folder / name / "chaos")
        return outcome(self.folder / name / "chaos", self.folder / name / "artefacts")

    def disturbed(self, name: str, strikes: Sequence[Strike], wanted: dict[str, Any]) -> None:
        """One run that is killed at every strike; faults are noted."""
        run = self.folder / name / "chaos"
        self.report.num_runs += 1
        newest = ""
        for what in strikes:
            session = self.session(name)
            try:
                hit = strike(session, run, what, SESSION_S)
                if hit is None:
                    if set(session.codes.values()) != {0}:
                        self._fault(f"{session.log}: ended by itself with exit codes {session.codes}")
                    break
                self.report.strikes.append(hit)
                self._ended(session, run, hit)
            except HangError as error:
                self._fault(str(error))
            before, newest = newest, self._newest(run)
            if newest < before:
                self._fault(f"{name}: {before} was lost")
        found = self.finish(name)
        for part in different(found, wanted):
            self._fault(f"{name}: {part} differ from the undisturbed run's")
        if (steps := self._steps(run)) != self.steps:
            self._fault(f"{run}: has the W&B steps {sorted(steps)}, not {sorted(self.steps)}")

    def _ended(self, session: Session, run: Path, what: Strike) -> None:
        """All ranks leave; where one alone was killed, it is named once."""
        self.report.leave_s.append(session.wait(LEAVE_S))
        if what.everyone or not (run / "logs").is_dir():
            return
        others = [code for rank, code in session.codes.items() if rank != what.rank]
        named = [line for line in session.errors() if f"rank {what.rank} ended without a word" in line]
        if len(named) != 1 or len(session.errors()) != 1 or 0 in others:
            self._fault(f"{session.log}: {len(session.errors())} error lines, exit codes {others}, after {what}")
        note = read_ending(run)
        if note is None or note["reason"] != "lost rank":
            self._fault(f"{session.log}: exit.json says {note}")

    def _steps(self, run: Path) -> set[int]:
        """W&B's steps, none of which may be there twice."""
        run_id = json.loads((run / "wandb.json").read_text(encoding="utf-8"))["id"]
        files = run.glob(f"wandb/*run-*/run-{run_id}.wandb")
        records = [json.loads(line) for path in files for line in inspected(path).splitlines()]
        steps = Counter(record["history"]["step"]["num"] for record in records if record["type"] == "history")
        if double := [step for step, count in steps.items() if count > 1]:
            self._fault(f"{run}: W&B steps {double} came twice")
        return set(steps)

    @staticmethod
    def _newest(run: Path) -> str:
        return max((path.name for path in (run / "checkpoints").glob("round-*")), default="")

    def _fault(self, text: str) -> None:
        print(f"fault: {text}", flush=True)
        self.report.faults.append(text)


def run(kills: int, sizes: Sequence[int], seed: int, folder: Path, overrides: Sequence[str] = ()) -> Report:
    """``kills`` kills over as many runs as they need."""
    rng = random.Random(seed)
    chaos = Chaos(folder, sizes, rng, overrides)
    wanted = chaos.finish("undisturbed")
    times = timeline(folder / "undisturbed" / "chaos", 0)
    report = chaos.report
    report.num_sessions = 0
    while len(report.strikes) < kills and not report.faults:
        name, before = f"run-{report.num_runs}", len(report.strikes)
        chaos.disturbed(name, plan(min(9, kills - before), times, rng), wanted)
        print(f"{len(report.strikes)} of {kills} kills, {len(report.faults)} faults", flush=True)
        if report.num_runs > 10 + kills:
            report.faults.append(f"{report.num_runs} runs held only {len(report.strikes)} kills")
        if not report.faults:
            shutil.rmtree(folder / name)
    return report


def left(report: Report) -> str:
    """How long the processes that were not killed took to leave."""
    leave = sorted(report.leave_s)
    return leaving(leave[len(leave) // 2], leave[-1])


def leaving(median_s: float, longest_s: float) -> str:
    """The words of :func:`left`."""
    return f"the last process left {median_s:.1f} s after a kill (median), {longest_s:.1f} s at most"


def publish(report: Report, sizes: Sequence[int], took_s: float) -> None:
    """Write ``result.json`` and the result page."""
    leave, machine = sorted(report.leave_s), hardware()
    note = {
        "utc": datetime.now(UTC).isoformat(timespec="seconds"),
        **made_by(),
        "machine": {name: machine[name] for name in ("cores", "cpu")},
        "processes": list(sizes),
        "kills": len(report.strikes),
        "runs": report.num_runs,
        "sessions": report.num_sessions,
        "faults": report.faults,
        "median_leave_s": leave[len(leave) // 2],
        "longest_leave_s": leave[-1],
        "seconds": took_s,
        "stages": {
            title: {"one_rank": one, "all_ranks": every} for title, (one, every) in covered(report.strikes).items()
        },
    }
    RESULT.write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    PAGE.write_text(page(note), encoding="utf-8")


def page(note: Mapping[str, Any]) -> str:
    """The result page from ``result.json``."""
    rows = [[title, str(counts["one_rank"]), str(counts["all_ranks"])] for title, counts in note["stages"].items()]
    table = Table(["killed in", "one rank", "all ranks"], rows)
    text = (
        f"{note['kills']} kills over {note['runs']} runs, in {note['sessions']} sessions of "
        f"{' or '.join(map(str, note['processes']))} processes: no run differed from the undisturbed one; "
        f"{leaving(note['median_leave_s'], note['longest_leave_s'])}. Made by `make chaos` in "
        f"{duration(note['seconds'])} on {note['machine']['cores']} cores of {note['machine']['cpu']}, "
        f"{note['utc'][:10]}, {maker(note)}."
    )
    return "\n\n".join(["# Kills at random moments", INTRODUCTION, text, table.markdown()]) + "\n"


INTRODUCTION = (
    "One rank or all of them are killed at random moments of every stage. The run is started again, and at "
    "last compared with an undisturbed one: checkpoints, adapter, control variates, metric rows, replies, "
    "artefacts and W&B's steps. Written by `make chaos`."
)


@steady_terminal()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status, 1 where a fault was found."""
    parser = Parser(
        prog="tools/chaos/run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=4, help="how many (default 4)")
    parser.add_argument("--nproc", default="2,3", help="numbers of processes; a session takes one (default 2,3)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--publish", action="store_true", help="write result.json and docs/results/chaos.md")
    args = parser.parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="fedsim-chaos-"))
    sizes = [int(size) for size in args.nproc.split(",")]
    report = run(args.kills, sizes, args.seed, folder)
    if args.publish and not report.faults:
        publish(report, sizes, time.monotonic() - began)
    if report.faults:
        print(f"{len(report.faults)} faults; the runs are in {folder}", flush=True)
        return 1
    shutil.rmtree(folder)
    print(f"{len(report.strikes)} kills, no fault, in {duration(time.monotonic() - began)}; {left(report)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
