"""Child process for Weights & Biases: ``python -m fedsim.record.wandb_worker RUN_DIRECTORY``.

Standard input holds a JSON object a line: the settings, then the number of each round that counts,
at last the summary. The figures are read from ``metrics.jsonl``; step 0 is the preparation and the
pretrained model, step i is round i. ``wandb.json`` holds the id under which a resumed run goes on.
Standard output carries the reason of a failure.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from fedsim.record.metrics import RESUME, NewRows, Row

Figures = dict[str, float | int | bool]
Message = dict[str, Any]


def steps_of(rows: Iterable[Row]) -> dict[int, Figures]:
    """Collect the figures of each step, all rows of a round merged; texts are left out.

    Where two rows of a round hold the same figure, the last keeps its name: ``eval/hhh_accuracy``
    is the model at the end of the round (and the pretrained one at step 0). The others carry their
    point in the name's section: ``eval_before_cai/hhh_accuracy``. Of several sessions that began
    after the same round, the last one's start counts.

    Returns:
        Step → figures, in ascending order.
    """
    # Step → its rows, oldest first.
    by_step: dict[int, list[Row]] = {}
    for row in rows:
        step = by_step.setdefault(row["round"], [])
        if row["stage"] == RESUME:
            step[:] = [other for other in step if other["stage"] != RESUME]
        step.append(row)
    return {step: _merged(by_step[step]) for step in sorted(by_step)}


def _merged(rows: Sequence[Row]) -> Figures:
    """Merge the rows of one step."""
    # Rows from the current one on that hold a figure.
    left: Counter[str] = Counter()
    for row in rows:
        left.update(row.keys())
    merged: Figures = {"round": rows[0]["round"]}
    for row in rows:
        left.subtract(row.keys())
        for name, value in row.items():
            if name == "round" or not isinstance(value, int | float):
                continue
            shown = name
            if left[name] > 0:  # a later row has it too
                section, slash, figure = name.partition("/")
                shown = f"{section}_{row.get('point', row['stage'])}{slash}{figure}"
            assert shown not in merged, f"two rows of round {row['round']} hold {shown}"
            merged[shown] = value
    return merged


def inspected(path: Path, *options: str) -> str:
    """Run wandb's own inspector on a session's file.

    Returns:
        JSON, one record a line, up to where the file is cut.

    Raises:
        RuntimeError: this wandb has no such inspector, or it cannot read the file.
    """
    import wandb

    # Neither the program's path nor its command is wandb's public interface.
    try:
        from wandb.util import get_core_path

        command = [get_core_path(), "leet", "inspect", "--json", "--no-observability", *options]
        command += ["--run-file", str(path), str(path.parent)]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    except (ImportError, OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(
            f"wandb {wandb.__version__} cannot inspect {path.name}; restore the file, install wandb "
            "0.31, or set wandb.mode=off"
        ) from error


def written(folder: Path, run_id: str) -> tuple[int, bool]:
    """Read from wandb's offline files which steps of the run exist.

    wandb acknowledges a step before it is on disk, and a kill loses the newest. Steps cannot be
    repeated offline: ``wandb sync`` renumbers a session that begins below the server's next step,
    so that they would be there twice.

    Returns:
        The first step that no file has; True if a file holds the end of the whole run.
    """
    files = folder.glob(f"wandb/*run-*/run-{run_id}.wandb")  # one a session
    sessions = [json.loads(inspected(path, "--summary")) for path in files]
    steps = [session["step"] for session in sessions if session["step"] is not None]
    return max(steps, default=-1) + 1, any(session["exit_code"] == 0 for session in sessions)


def begin(folder: Path, run_id: str, first: Message) -> Any:
    """Start a session of the run.

    Args:
        first: the stream's first message.
    """
    import wandb

    # Nothing but the figures: no console, code, machine data or package list.
    settings = wandb.Settings(
        silent=True,
        console="off",
        host="",
        save_code=False,
        disable_git=True,
        disable_job_creation=True,
        x_disable_stats=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
        x_transaction_log_flush_interval=1.0,  # seconds
        init_timeout=first["limit_s"],
        finish_timeout=first["limit_s"],
    )
    given = {name: value or None for name, value in first["run"].items()}
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    about = {
        "versions": manifest["versions"],
        "git": manifest["git"],
        "num_ranks": manifest["started"]["num_ranks"],
    }
    run = wandb.init(
        **given,
        id=run_id,
        resume="allow",
        dir=str(folder),
        config={**first["config"], **about},
        settings=settings,
    )
    if run.id != run_id:  # a second run, in which every step would come again
        raise RuntimeError(f"wandb gives the run the id {run.id!r} instead of {run_id!r}")
    return run


def stream(folder: Path, first: Message, messages: Iterable[Message]) -> None:
    """Serve one session: log the steps that count and that W&B does not have, then the summary.

    Args:
        first: the settings.
        messages: the number of each round that counts; at last the summary of a finished run.
    """
    run_id = _run_id(folder / "wandb.json")
    online = first["run"]["mode"] == "online"
    next_step, is_complete = 0, False
    if not online:
        next_step, is_complete = written(folder, run_id)
    log = NewRows(folder / "metrics.jsonl")
    waiting: list[Row] = []  # rows of rounds that do not count yet
    run, number, summary = None, -1, None
    for message in messages:
        number, summary = message.get("round", number), message.get("summary")
        # Rows up to the last round that counts; its checkpoint is on disk.
        rows = waiting + log.read()
        waiting = [row for row in rows if row["round"] > number]
        steps = steps_of(row for row in rows if row["round"] <= number)
        if is_complete or (summary is None and max(steps, default=-1) < next_step):
            continue  # nothing is left to do
        # The first step that is new starts wandb.
        if run is None:
            run = begin(folder, run_id, first)
            next_step = run.starting_step if online else next_step
        for step, figures in steps.items():
            if step >= next_step:
                run.log(figures, step=step, commit=True)
                next_step = step + 1
    if run is not None:
        import wandb

        run.summary.update(summary or {})
        run.finish(exit_code=1 if summary is None else 0)
        # wandb's program answers before the last steps are on disk: wait until it has ended.
        wandb.teardown()


def _run_id(path: Path) -> str:
    """Read the run's id, or make one."""
    if not path.exists():
        new = path.with_suffix(".json.new")
        new.write_text(json.dumps({"id": secrets.token_hex(4)}) + "\n", encoding="utf-8")
        new.replace(path)
    run_id: str = json.loads(path.read_text(encoding="utf-8"))["id"]
    return run_id


def _end_with(pipe: IO[str], limit_s: float) -> None:
    """End this process ``limit_s`` + 1 seconds after the run has closed the pipe or was killed."""
    run = select.poll()
    run.register(pipe, 0)  # reports a closed pipe and nothing else

    def watch() -> None:
        run.poll()
        signal.setitimer(signal.ITIMER_REAL, limit_s + 1.0)  # its alarm ends the process

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Serve one run until its end of the pipe closes."""
    folder = Path(sys.argv[1])
    # Keep both ends of the run's pipes; what wandb prints goes nowhere.
    pipe, answer = os.fdopen(os.dup(0), encoding="utf-8"), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        first = json.loads(pipe.readline())
        _end_with(pipe, first["limit_s"])
        # wandb-core inherits the lock with standard input: this session waits while that of a
        # killed one writes.
        lock = os.open(folder / ".wandb.lock", os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.dup2(lock, 0)
        os.close(lock)
        stream(folder, first, (json.loads(line) for line in pipe))
    except Exception as error:
        os.write(answer, f"{_why(error)}\n".encode())
        os._exit(1)  # wandb's own clean-up at exit may wait for what has just failed
    os._exit(0)


def _why(error: Exception) -> str:
    """State the reason of a failure on one line of 200 characters at most."""
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] == "wandb":
        return "wandb is not installed (pip install wandb, or set wandb.mode=off)"
    text = " ".join(str(error).split())[:200].rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


if __name__ == "__main__":
    main()
