"""What a run shows cannot end it: characters, pipes and terminals that fail, in processes of their own."""

from __future__ import annotations

import ast
import io
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from fedsim.base.exit_file import read_ending
from fedsim.base.terminal import Terminal, steady, steady_terminal
from fedsim.record.progress import Progress

ROOT = Path(__file__).parents[2]

# Shows much on both streams, in text that ASCII lacks; then leaves a mark, while C code writes to the same descriptors.
WORK = """
import os, sys
from contextlib import suppress
from pathlib import Path
from fedsim.base.launching import launched
from fedsim.record.progress import Progress

def work(mark):
    progress = Progress(sys.stderr)
    for i in range(200):
        progress.note("연 · kite " + 500 * "x")
        print("연 · kite " + 500 * "x", flush=i % 2 == 0)
    if "close" in sys.argv:
        sys.stdout.close(), sys.stderr.close()
    print("left in the buffer")
    with mark.open("w") as file:
        for descriptor in (1, 2):
            with suppress(BlockingIOError):
                os.write(descriptor, b"from C")
        file.write("done")

sys.exit(launched(lambda: Path(sys.argv[1]), work))
"""


def pipe_without_reader() -> int:
    read, write = os.pipe()
    os.close(read)
    return write


def lost_tty() -> int:
    """A terminal whose window was closed: every write is EIO."""
    master, slave = pty.openpty()
    os.close(master)
    return slave


def pipe_that_does_not_block() -> int:
    """Nobody reads, and a write to the full pipe is EAGAIN; its read end stays open in this process."""
    _, write = os.pipe()
    os.set_blocking(write, False)
    with suppress(BlockingIOError):
        while True:
            os.write(write, bytes(4096))
    return write


PLACES: dict[str, Callable[[], int]] = {
    "pipe": pipe_without_reader,
    "tty": lost_tty,
    "full disk": lambda: os.open("/dev/full", os.O_WRONLY),
    "full pipe": pipe_that_does_not_block,
}


def start(mark: Path, *words: str, **given: object) -> int:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-c", WORK, str(mark), *words]
    return subprocess.run(command, env=environment, timeout=60, check=False, **given).returncode  # type: ignore


@pytest.mark.parametrize("place", PLACES)
def test_a_terminal_that_takes_no_text_changes_nothing(tmp_path: Path, place: str) -> None:
    lost = PLACES[place]()
    try:
        assert start(tmp_path / "mark", stdout=lost, stderr=lost) == 0
    finally:
        os.close(lost)
    assert (tmp_path / "mark").read_text() == "done"


@pytest.mark.parametrize("closed", [(1, 2), (0, 1, 2), (1,), (2,)])
def test_closed_descriptors_are_no_other_files(tmp_path: Path, closed: tuple[int, ...]) -> None:
    """Started with ``>&-``: what C code writes to descriptor 2 must not get into the run's files."""
    mark = tmp_path / "mark"
    code = start(mark, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=lambda: [os.close(i) for i in closed])
    assert code == 0 and mark.read_text() == "done"


def test_streams_that_the_work_itself_closes(tmp_path: Path) -> None:
    assert start(tmp_path / "mark", "close", stdout=subprocess.PIPE, stderr=subprocess.PIPE) == 0
    assert (tmp_path / "mark").read_text() == "done"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "euc-kr", "utf-8"])
def test_characters_that_the_encoding_lacks_are_replaced(encoding: str) -> None:
    script = "import sys; from fedsim.base.launching import launched\n"
    script += "sys.exit(launched(lambda: 0, lambda _: print('연 · kite \\udcff', file=sys.stdout)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode(encoding).strip() == "연 · kite ?".encode(encoding, "replace").decode(encoding)


def test_a_full_pipe_drops_its_text_and_no_later_one() -> None:
    class Busy(io.StringIO):
        is_busy = True

        def write(self, text: str) -> int:
            if self.is_busy:
                raise BlockingIOError
            return super().write(text)

    stream = Busy()
    terminal = Terminal(stream)
    terminal.write("one")
    stream.is_busy = False
    terminal.write("two")
    assert stream.getvalue() == "two"


def test_a_closed_stream_is_no_terminal_and_progress_goes_on() -> None:
    stream = io.StringIO()
    stream.close()
    progress = Progress(stream)
    with progress.phase("train", 3) as phase:
        phase.update(3)
    progress.note("kites")
    assert not steady(stream).isatty()


def test_streams_are_wrapped_once_and_given_back() -> None:
    before = sys.stdout, sys.stderr
    with steady_terminal():
        outer = sys.stdout
        assert isinstance(outer, Terminal)
        with steady_terminal():
            assert sys.stdout is outer and steady(sys.stdout) is outer
        assert sys.stdout is outer
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.deep
def test_a_run_of_two_processes_outlasts_its_terminal(tmp_path: Path) -> None:
    """Encoding, reader and all: the run ends as finished, and so does the launcher."""
    brief = ["guard.kind=none", "cai.iterations=0", "federation.num_rounds=1", "local.steps=1", "eval.limit=1",
             "eval.hhh=", "eval.mt_bench=", "eval.xstest=", "eval.helpful=", "wandb.mode=off"]  # fmt: skip
    places = [f"record.dir={tmp_path}", f"record.artefacts={tmp_path / 'artefacts'}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "launch/run.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    lost = pipe_without_reader()
    try:
        words = ["tests/distributed/small.yaml", *brief, *places]
        done = subprocess.run(
            [*torchrun, *words], cwd=ROOT, env=environment, stdout=lost, stderr=lost, timeout=180, check=False
        )
    finally:
        os.close(lost)
    note = read_ending(tmp_path / "small")
    assert (done.returncode, note and note["reason"]) == (0, "finished")
    assert (tmp_path / "small" / "summary.md").is_file()


QUIET = {"fedsim/record/wandb_worker.py", "tools/audit.py", "tools/bench/engine.py", "tools/bench/lengths.py",
         "tools/gpu/launch.py", "tools/rehearsal/__main__.py", "launch/run.py"}  # fmt: skip
"""Entry points that show nothing or only their result at the end, or lead into that of ``fedsim run``."""


def test_every_entry_point_keeps_its_terminal_steady() -> None:
    found = set()
    for folder in ("fedsim", "launch", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            source = path.read_text(encoding="utf-8")
            name = path.relative_to(ROOT).as_posix()
            is_command = name.startswith("fedsim/commands/") and path.name != "__init__.py"
            if is_command or ('if __name__ == "__main__":' in source and name not in QUIET):
                found.add(name)
                (main,) = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "main"]
                text = ast.unparse(main)
                assert "launched(" in text or "@steady_terminal()" in text, f"{name}: its terminal can end it"
    assert {"fedsim/__main__.py", "fedsim/commands/run.py"} <= found and len(found) > 15
