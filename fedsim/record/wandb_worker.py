"""The child process that talks to Weights & Biases: ``python -m fedsim.record.wandb_worker RUN_DIRECTORY``.

It is told line by line on standard input which rounds count, reads their figures from ``metrics.jsonl`` and logs one
step a round: step 0 is the preparation and the pretrained model, step i is round i. ``wandb.json`` in the run
directory holds the id under which a resumed run goes on; which steps W&B has already, those who hold them are asked:
the files offline, the server online. A reason to give up is the last line on standard output.
"""

from __future__ import annotations

import fcntl
import json
import os
import queue
import secrets
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from fedsim.record.metrics import RESUME, NewRows, Row
from fedsim.record.wandb_file import read_history

Figures = dict[str, float | int | bool]


def steps_of(rows: Iterable[Row]) -> dict[int, Figures]:
    """The figures of each step, all rows of a round merged; texts (checksums, notes) are left out.

    Where two rows of a round hold the same figure, the last keeps its name: ``eval/hhh_accuracy`` is the model at the
    end of the round (and the pretrained one at step 0). The others carry their point in the name's section:
    ``eval_before_cai/hhh_accuracy``. Of several sessions that began after the same round, the last one's start counts.
    """
    by_step: dict[int, list[Row]] = {}
    for row in rows:
        step = by_step.setdefault(row["round"], [])
        if row["stage"] == RESUME:
            step[:] = [other for other in step if other["stage"] != RESUME]
        step.append(row)
    return {step: _merged(by_step[step]) for step in sorted(by_step)}


def _merged(rows: Sequence[Row]) -> Figures:
    left = Counter(name for row in rows for name in row)
    merged: Figures = {"round": rows[0]["round"]}
    for row in rows:
        left.subtract(row.keys())
        for name, value in row.items():
            if name == "round" or not isinstance(value, int | float):
                continue
            section, slash, figure = name.partition("/")
            shown = name if left[name] == 0 else f"{section}_{row.get('point', row['stage'])}{slash}{figure}"
            assert shown not in merged, f"two rows of round {row['round']} hold {shown}"
            merged[shown] = value
    return merged


class Worker:
    """One session of a W&B run.

    Args:
        folder: the run directory.
        settings: the ``wandb`` section of the configuration, the run's name and W&B's time limits.
        config: the whole configuration.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        self.folder = folder
        self.settings = settings
        self.config = config
        self.mode: Any = settings["mode"]
        self.note = folder / "wandb.json"
        known = json.loads(self.note.read_text(encoding="utf-8")) if self.note.exists() else {}
        self.run_id: str = known.get("id") or secrets.token_hex(4)
        self.complete = known.get("complete") == self.mode  # summary and all: nothing is left to do
        self.run: Any = None
        self.next_step = 0
        self._log = NewRows(folder / "metrics.jsonl")
        self._waiting: list[Row] = []  # of rounds that do not count yet
        if self.mode == "offline":
            self.next_step = self._written_steps()

    def stream(self, number: int) -> None:
        """Log every step up to this round's that W&B does not have."""
        rows = self._waiting + self._log.read()
        self._waiting = [row for row in rows if row["round"] > number]
        steps = steps_of(row for row in rows if row["round"] <= number)
        if self.complete or max(steps, default=-1) < self.next_step:
            return
        if self.run is None:
            self._begin()
        for step, figures in steps.items():
            if step >= self.next_step:
                self.run.log(figures, step=step, commit=True)
                self.next_step = step + 1

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """End the session; without a summary the run did not come to its end."""
        if self.run is None and summary is not None and not self.complete:  # stopped just before its summary
            self._begin()
        if self.run is None:
            return
        import wandb

        self.run.summary.update(dict(summary or {}))
        self.run.finish(exit_code=0 if summary is not None else 1)
        wandb.teardown()  # its program has answered before the last steps are on disk: wait until it has ended
        is_whole = self.mode == "online" or self._written_steps() == self.next_step
        self._save_note(self.mode if summary is not None and is_whole else "")

    def _begin(self) -> None:
        import wandb

        self._save_note("")
        settings = wandb.Settings(
            silent=True,
            console="off",
            save_code=False,
            disable_git=True,
            disable_job_creation=True,
            host="",
            init_timeout=self.settings["limit_s"],
            finish_timeout=self.settings["limit_s"],
            x_disable_stats=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            x_transaction_log_flush_interval=1.0,
        )
        self.run = wandb.init(
            mode=self.mode,
            project=self.settings["project"],
            entity=self.settings["entity"] or None,
            group=self.settings["group"] or None,
            tags=self.settings["tags"] or None,
            name=self.settings["name"],
            id=self.run_id,
            resume="allow",
            dir=str(self.folder),
            settings=settings,
        )
        if self.run.id != self.run_id:  # a second run, in which every step would come again
            raise RuntimeError(f"wandb gives the run the id {self.run.id!r} instead of {self.run_id!r}")
        if self.mode == "online":
            self.next_step = int(self.run.starting_step)
        if self.next_step == 0:
            manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
            about = {name: manifest[name] for name in ("versions", "git")}
            self.run.config.update({**self.config, **about, "num_ranks": manifest["started"]["num_ranks"]})

    def _written_steps(self) -> int:
        """Number of steps up to the last that is on disk."""
        return 1 + max((step for step, _ in read_history(self.folder / "wandb", self.run_id)), default=-1)

    def _save_note(self, complete: str) -> None:
        new = self.note.with_suffix(".json.new")
        new.write_text(json.dumps({"id": self.run_id, "complete": complete}) + "\n", encoding="utf-8")
        new.replace(self.note)


def main() -> int:
    """Serve one run until its end of the pipe closes."""
    answer = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.environ["WANDB_ERROR_REPORTING"] = "false"  # wandb's own reports of its errors to its maker
    try:
        pipe = os.fdopen(os.dup(0), encoding="utf-8")
        first = json.loads(pipe.readline())
        messages = _listen(pipe, first["settings"]["limit_s"])
        folder = Path(sys.argv[1])
        _lock(folder / ".wandb.lock")
        worker = Worker(folder, first["settings"], first["config"])
        summary = None
        for message in messages:
            summary = message.get("summary", summary)
            if "round" in message:
                worker.stream(message["round"])
        worker.finish(summary)
    except Exception as error:
        os.write(answer, f"{_why(error)}\n".encode())
        os._exit(1)  # wandb's own clean-up at exit may wait for what has just failed
    os._exit(0)


def _lock(path: Path) -> None:
    """Wait until nobody writes W&B's files of this run any more, and keep others from it.

    The lock is standard input, which wandb's own program inherits: it ends with the last of the two, so that a worker
    that is killed does not give the files away while what it has sent is still being written.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.dup2(lock, 0)
    os.close(lock)


def _listen(pipe: IO[str], limit_s: float) -> Iterator[dict[str, Any]]:
    """The messages. Once the run has hung up, or is no more, this process ends within the limit, come what may."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in pipe:
            lines.put(line)
        signal.setitimer(signal.ITIMER_REAL, limit_s)  # its alarm ends the process
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    return (json.loads(line) for line in iter(lines.get, ""))


def _why(error: Exception) -> str:
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] == "wandb":
        return "wandb is not installed (pip install wandb, or set wandb.mode=off)"
    text = " ".join(str(error).split())[:200].rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
