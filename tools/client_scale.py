"""Cost of 1,000 clients' control variates: ``tools/client_scale.py [--clients 1000] [--size 200000]``.

Writes one for every client, as a run does, and times writing and reading one, a resume's check of all and a round's
clearing away of old ones; resident memory is watched meanwhile, as only what is mapped into memory or copied shows in
it. The row goes to ``tools/bench/results/<device>/operations/client_scale.json``; ``tools/soak.py --page`` shows it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent)]

import psutil  # noqa: E402
import torch  # noqa: E402

from fedsim.base.errors import ConfigError  # noqa: E402
from fedsim.base.launching import Parser, launched  # noqa: E402
from fedsim.base.tables import byte_size, number  # noqa: E402
from fedsim.federation.client_state import ClientStateStore  # noqa: E402
from fedsim.study.bench_rows import Row, StageResult  # noqa: E402
from tools import running  # noqa: E402
from tools.bench.measure import percentiles  # noqa: E402

NAME = "client_scale"


def peak_growth(work: Callable[[], object]) -> int:
    """Bytes by which this process's resident memory was at most larger during ``work`` than before (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = psutil.Process().memory_info().rss
    work()
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return max(0, 1024 * int(line.split()[1]) - before)


def measure(folder: Path, clients: int, size: int, cohort: int = 5) -> Row:
    """Write, read, check and clear away ``clients`` control variates of ``size`` numbers below ``folder``."""
    store = ClientStateStore(folder)
    control = torch.randn(size, generator=torch.Generator().manual_seed(0))
    store.save(0, 0, control)
    store.advance([0], 0)
    store.load(0)  # what the first call sets up
    wrote = [_seconds(lambda c=c: store.save(c, 0, control)) for c in range(clients)]  # type: ignore[misc]
    store.advance(range(clients), 0)
    read: list[float] = []
    reading = peak_growth(lambda: read.extend(_seconds(lambda c=c: store.load(c)) for c in range(clients)))  # type: ignore[misc]
    checked: list[float] = []
    checking = peak_growth(lambda: checked.append(_seconds(lambda: store.check(store.index, size))))
    before = dict(store.index)
    trained = range(min(cohort, clients))
    for client in trained:
        store.save(client, 1, control)
    store.advance(trained, 1)
    cleared = [_seconds(lambda: store.drop_unused([before, store.index])) for _ in range(5)]
    return Row(
        NAME,
        "control variates of many clients",
        "float32",
        {"clients": clients, "numbers": size},
        percentiles(read),
        clients,
        figures={
            "save_s": percentiles(wrote).p50,
            "check_s": checked[0],
            "clear_s": percentiles(cleared).p50,
            "read_peak_bytes": reading,
            "check_peak_bytes": checking,
        },
        note="seconds: reading one with its checksum; save_s: writing one to disk; check_s: a resume's check of all; "
        "clear_s: a round's clearing away; …_peak_bytes: growth of resident memory meanwhile",
    )


def sentence(found: StageResult) -> str:
    """The figures in words."""
    (row,) = found.rows
    assert row.seconds is not None
    size, figures = row.shapes["numbers"], row.figures
    ms = {name: number(1e3 * figures[name]) for name in ("save_s", "clear_s")}
    return (
        f"SCAFFOLD's state of {row.shapes['clients']:,} clients, {size:,} numbers ({byte_size(4 * size)}) each, is a "
        f"file a client that is mapped into memory while it is used: {ms['save_s']} ms to write one, "
        f"{number(1e3 * row.seconds.p50)} ms to read and check one, {number(figures['check_s'])} s for a resume's "
        f"check of all, in which resident memory grew by {byte_size(figures['check_peak_bytes'])} at most, "
        f"{ms['clear_s']} ms for a round's clearing away."
    )


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(prog="tools/client_scale.py", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--clients", type=int, default=1000, help="clients (1000)")
    parser.add_argument("--size", type=int, default=200_000, help="numbers of an adapter (200000)")
    parser.add_argument("--folder", type=Path, help="where the files are for the time being (a temporary folder)")
    parser.add_argument("--out", type=Path, help="file for the row")
    asked = parser.parse_args(arguments)
    if asked.clients < 1 or asked.size < 1:
        raise ConfigError(f"--clients {asked.clients} --size {asked.size}: both must be >= 1")
    place = asked.folder or Path(tempfile.gettempdir())
    if not place.is_dir():
        raise ConfigError(f"--folder {place}: is no directory; give one that exists")
    need, free = 4 * asked.size * asked.clients, shutil.disk_usage(place).free
    if need > free:
        raise ConfigError(
            f"--clients {asked.clients} --size {asked.size}: {byte_size(need)} are needed in {place}, which has "
            f"{byte_size(free)}; take less, or another --folder"
        )
    return asked


def work(asked: argparse.Namespace) -> None:
    """Measure, print and write."""
    torch.set_num_threads(1)
    facts = running.facts()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        row = measure(Path(folder), asked.clients, asked.size)
    found = StageResult(NAME, facts, [], [row])
    print(sentence(found))
    running.write_rows(found, asked.out)


def main() -> int:
    """Measure; a mistake is one line."""
    return launched(lambda: parse(sys.argv[1:]), work)


if __name__ == "__main__":
    sys.exit(main())
