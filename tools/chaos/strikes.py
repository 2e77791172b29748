"""Choice of a kill: a stage, a moment in it and the ranks, from the timeline of an undisturbed run."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from fedsim.base.journal import last_seen, log_file, read_log
from tools.chaos.sessions import Session

#: Stages in which a rank is killed: title → the stage's name in a rank's log, by its beginning.
STAGES: Final = {
    "guard fine-tuning": "making guard-adapter",
    "filtering": "making guard-verdicts",
    "saving an artefact": "writing ",
    "generation": "making cai-conversations",
    "evaluation": "evaluate",
    "local training": "local training",
    "aggregation": "aggregation",
    "CAI": "constitutional AI",
    "saving a round": "saving",
}

BETWEEN: Final = "between stages"

ONCE: Final = frozenset(["guard fine-tuning", "filtering", "generation"])
"""Stages that a run does once: to strike there, the artefact must not be there yet."""


@dataclass(frozen=True)
class Strike:
    """One kill.

    Attributes:
        stage: title of the stage, a key of :data:`STAGES`; once struck, the one that the rank was in.
        everyone: whether all ranks are killed, or only ``rank``.
        rank: whose log is watched, modulo the session's number of ranks; once struck, the very rank.
        occurrence: how often the stage begins in the session before it is time, from 1.
        delay_s: seconds from there.
    """

    stage: str
    everyone: bool
    rank: int
    occurrence: int
    delay_s: float


def timeline(run: Path, rank: int) -> dict[str, list[float]]:
    """Title of a stage → its seconds, each time that it came in a run's last session."""
    found: dict[str, list[float]] = {}
    for line in read_log(log_file(run, rank)):
        if line.get("event") == "end" and "client" not in line and (title := _title(str(line.get("stage", "")))):
            found.setdefault(title, []).append(float(line["seconds"]))
    return found


def plan(num: int, times: dict[str, list[float]], rng: random.Random) -> list[Strike]:
    """``num`` strikes for one run: every stage in turn, those that come once first."""
    stages: list[str] = []
    while len(stages) < num:
        stages += rng.sample(list(STAGES), len(STAGES))
    order = list(STAGES)
    chosen = sorted(stages[:num], key=lambda stage: (stage not in ONCE, order.index(stage) if stage in ONCE else 0))
    strikes = []
    for stage in chosen:
        typical = times.get(stage) or [0.0]
        occurrence = 1 if stage in ONCE else rng.randint(1, 2)
        delay = rng.uniform(0.0, sorted(typical)[len(typical) // 2])
        strikes.append(Strike(stage, rng.random() < 0.4, rng.randrange(6), occurrence, delay))
    return strikes


def strike(session: Session, run: Path, what: Strike, timeout_s: float) -> Strike | None:
    """Wait for the moment and kill; returns where it hit, None where the session ended before."""
    rank = what.rank % len(session.pids)
    path = log_file(run, rank)
    start = path.stat().st_size if path.is_file() else 0
    deadline = time.monotonic() + timeout_s
    while _begun(path, start, what.stage) < what.occurrence:
        if not session.running():
            return None
        assert time.monotonic() < deadline, f"{what.stage} never came"
        time.sleep(0.0005)
    time.sleep(what.delay_s)
    if not session.running():
        return None
    session.kill(range(len(session.pids)) if what.everyone else [rank])
    time.sleep(0.05)
    if rank not in session.running() and session.codes[rank] == 0:  # it had ended a moment before
        session.wait(timeout_s)
        return None
    hit = _title(str(last_seen(run, rank).place.get("stage", "")))
    return replace(what, stage=hit or BETWEEN, rank=rank)


def _begun(path: Path, start: int, title: str) -> int:
    """How often a stage has begun in the lines after ``start`` bytes."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        file.seek(start)
        text = file.read().decode("utf-8", errors="replace")
    lines = [line for line in text.splitlines() if '"event": "begin"' in line and '"client"' not in line]
    return sum(f'"stage": "{STAGES[title]}' in line for line in lines)


def _title(stage: str) -> str | None:
    return next((title for title, name in STAGES.items() if stage.startswith(name)), None)


def covered(strikes: Sequence[Strike]) -> dict[str, tuple[int, int]]:
    """Title → how often one rank was killed there, and how often all."""
    return {
        title: (
            sum(s.stage == title and not s.everyone for s in strikes),
            sum(s.stage == title and s.everyone for s in strikes),
        )
        for title in (*STAGES, BETWEEN)
    }
