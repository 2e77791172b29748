"""Structured log of a rank: one JSON line for each stage that begins, ends or fails, and its place.

Every rank writes ``logs/rank-000.jsonl`` of its own in the run directory. A line is written at once
and read by others only after the fact: it shows where a rank was that died or no longer answers.
Lines carry names and figures, never a prompt or a reply.

    {"utc": "…", "event": "begin", "stage": "local training", "round": 3, "client": 7}
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedsim.base.json_text import NotJsonError, parse_json
from fedsim.base.version import made_by

Place = Mapping[str, int | str]
"""Place of a rank: ``stage``, ``round`` (from 1) and ``client``, as far as they are known.

A place that other ranks read also has ``rank``.
"""


class Journal:
    """Place of this rank, and its log once :meth:`open` has been called.

    Args:
        rank: this process.
    """

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self.folder: Path | None = None
        self._place: dict[str, int | str] = {}
        self._failed: tuple[BaseException, dict[str, int | str]] | None = None
        self._path: Path | None = None

    @property
    def place(self) -> Place:
        """Present place of this rank."""
        return dict(self._place)

    def open(self, folder: Path) -> None:
        """Append lines to the log in ``folder``, the run directory, from now on."""
        self._path = log_file(folder, self.rank)
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _cut_torn_end(self._path)
        self.folder = folder
        self.write("start", pid=os.getpid(), **made_by())

    def close(self) -> None:
        """Write no more lines."""
        self._path = None

    def write(self, event: str, **facts: Any) -> None:
        """One line: what happened, and where; a log that cannot be written ends no run."""
        if self._path is not None:
            line = {
                "utc": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "event": event,
                **self._place,
                **facts,
            }
            with (
                suppress(OSError),
                self._path.open("a", encoding="utf-8", errors="replace") as file,
            ):
                file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")

    @contextmanager
    def at(self, **place: int | str) -> Iterator[None]:
        """Log begin, end and failure of the block, with ``place`` added to the outer block's."""
        before = dict(self._place)
        began = time.monotonic()  # seconds
        self._place.update(place)
        self.write("begin")
        try:
            yield
        except BaseException as error:
            # The innermost block is the first to see an error, and the one that knows its place.
            if self._failed is None or self._failed[0] is not error:
                self._failed = (error, dict(self._place))
            seconds = round(time.monotonic() - began, 3)
            self.write("failed", seconds=seconds, error=type(error).__name__)
            raise
        else:
            self.write("end", seconds=round(time.monotonic() - began, 3))
        finally:
            self._place = before

    def place_of(self, error: BaseException) -> Place:
        """Place where ``error`` was raised; this rank's present place if that is not known."""
        if self._failed is not None and self._failed[0] is error:
            return dict(self._failed[1])
        return self.place


@dataclass(frozen=True)
class LastSeen:
    """Last session of a rank by its log.

    Attributes:
        rank: which.
        pid: its process; 0 if the log does not say.
        place: where it was.
        utc: time of its last line.
        events: names of all events of the session.
    """

    rank: int
    pid: int = 0
    place: Place = field(default_factory=dict)
    utc: str = ""
    events: tuple[str, ...] = ()


def log_file(folder: Path, rank: int) -> Path:
    """A rank's log in a run directory."""
    return folder / "logs" / f"rank-{rank:03d}.jsonl"


def read_log(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a log, oldest first; none if there is no log."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = parse_json(line)
        except NotJsonError:
            continue  # cut short: the process died while it wrote
        if isinstance(record, dict):
            found.append(record)
    return found


def last_seen(folder: Path, rank: int) -> LastSeen:
    """Return the last session of a rank: its process, and its place when it last wrote a line."""
    # The last session begins at the last "start".
    lines = read_log(log_file(folder, rank))
    starts = [i for i, line in enumerate(lines) if line.get("event") == "start"]
    if not starts:
        return LastSeen(rank)
    session = lines[starts[-1] :]
    first, last = session[0], session[-1]
    place: Place = {name: last[name] for name in ("stage", "round", "client") if name in last}
    events = tuple(str(line.get("event")) for line in session)
    return LastSeen(rank, int(first.get("pid", 0)), place, str(last.get("utc", "")), events)


def in_words(place: Place) -> str:
    """``rank 2, local training, round 3, client 7``."""
    words = []
    for name in ("rank", "stage", "round", "client"):
        if name in place:
            words.append(str(place[name]) if name == "stage" else f"{name} {place[name]}")
    return ", ".join(words)


def _cut_torn_end(path: Path) -> None:
    """Append a newline to a line that a killed session left unfinished."""
    if path.is_file() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
