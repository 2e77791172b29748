"""Profile of a round: ``fedsim profile CONFIG.yaml [key=value …]`` under plain python or torchrun.

The run is simulated up to the chosen round (``--round``, 2 by default: the first after warm-up) in
a directory of its own, ``NAME-profile`` under ``record.dir``, which the next profile of that run
clears. The table's figures are that round's metric row, measured without a profiler; the round is
then done once more, under ``torch.profiler``, for the Chrome trace (open it in
https://ui.perfetto.dev). Both are the same work; the last line says how much longer the profiled
one took.
"""

from __future__ import annotations

import os

os.environ.setdefault(
    "KINETO_LOG_LEVEL",
    "6",
)  # the profiler's own notes on standard error; read when torch is loaded

import fcntl
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedsim.base.errors import ConfigError, RunError
from fedsim.base.launching import Parser, launched
from fedsim.base.rounds import round_index, round_number
from fedsim.base.tables import Table, byte_size, duration, measured
from fedsim.config import Config, load_config, to_flat
from fedsim.parallel.world import World, process_world
from fedsim.record.checkpoint import Checkpoint
from fedsim.record.metrics import Row, read_rows
from fedsim.record.timers import top_level_seconds
from fedsim.report.paper import arm_of
from fedsim.run.measurement import Measurement
from fedsim.run.simulation import Simulation

TITLES = {
    "train": "local training",
    "aggregate": "aggregation",
    "cai": "constitutional AI",
    "evaluate": "evaluation",
}
NONE = "–"
SUFFIX = "-profile"
MARK = ".profile"  # lock file in a directory that profiles use, held by the profiling process
STEADY = 0.2  # largest spread of the peak at which "bound by" is shown


class Enough(Exception):
    """The chosen round is done."""


class ProfiledSimulation(Simulation):
    """A simulation that ends with its chosen round, done twice: without and with the profiler.

    Args:
        chosen: index of the round.
        trace: where the trace is written, ``*.json`` or ``*.json.gz``.

    Attributes:
        seconds: of the chosen round, without and with the profiler.
    """

    def __init__(self, config: Config, world: World, chosen: int, trace: Path) -> None:
        super().__init__(config, world)
        self.chosen = chosen
        self.trace = trace
        self.seconds: list[float] = []

    def _round(self, federation: Any, round_idx: int, before: Checkpoint, *rest: Any) -> Checkpoint:
        if round_idx < self.chosen:
            return super()._round(federation, round_idx, before, *rest)

        # The round without a profiler, for the figures.
        self._timed(federation, round_idx, before, *rest)

        # The same round under the profiler of rank 0, for the trace.
        self.record.say("the same round once more, for the trace")
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.world.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        profiling: Any = nullcontext()
        if self.ranks.is_main:
            profiling = torch.profiler.profile(activities=activities)
        with profiling as profiler:
            self._timed(federation, round_idx, before, *rest)
        self.ranks.once(lambda: self._export(profiler))
        raise Enough

    def _export(self, profiler: Any) -> None:
        """Write the trace, and check it: torch's exporter only logs its errors."""
        partial = partial_trace(self.trace)
        profiler.export_chrome_trace(str(partial))
        if not partial.is_file() or partial.stat().st_size == 0:
            raise RunError(f"--trace {self.trace}: nothing was written; look for room on that disk")
        partial.replace(self.trace)

    def _timed(self, federation: Any, round_idx: int, before: Checkpoint, *rest: Any) -> None:
        began = time.perf_counter()
        super()._round(federation, round_idx, before, *rest)
        self.seconds.append(time.perf_counter() - began)

    def _measurement(self, *given: Any) -> Measurement:
        """Leave out evaluations before the chosen round."""
        measurement, chosen = super()._measurement(*given), self.chosen
        take = measurement.take

        def late(round_idx: int, point: str, adapter: torch.Tensor) -> None:
            if round_idx >= chosen:
                take(round_idx, point, adapter)

        measurement.take = late  # type: ignore[method-assign]
        return measurement


def phase_table(row: Mapping[str, Any]) -> Table:
    """One line a phase of a round's metric row, the rest of the round, and the whole."""
    # Seconds by phase, in the order of a round.
    timed = top_level_seconds(row)
    seconds = {phase: timed[phase] for phase in [*TITLES, *timed] if phase in timed}

    # Waiting for the slowest rank is part of training, as in MFU.
    if "train" in seconds:
        both = seconds["train"] + seconds["aggregate"]
        seconds["train"] = min(row["parallel/makespan_s"], both)
        seconds["aggregate"] = both - seconds["train"]

    # A line for each phase, for the rest of the round, and for the whole.
    total = max(row["perf/round_s"], sum(seconds.values()))
    lines = [_line(row, phase, spent, total) for phase, spent in seconds.items()]
    rest = total - sum(seconds.values())
    lines.append(["everything else", f"{rest:.3f}", f"{100 * rest / total:.1f} %", *[NONE] * 5])
    tokens = _total(row, seconds, "tokens")
    flops = _total(row, seconds, "flops")
    least = 0.0  # seconds at the roofline
    for phase, spent in seconds.items():
        least += (measured(row, f"{_prefix(phase)}roofline") or 0.0) * spent
    lines.append(
        [
            "whole round",
            f"{total:.3f}",
            "100.0 %",
            f"{tokens:,.0f}",
            f"{tokens / total:,.0f}",
            _rate(flops / total, "FLOP/s"),
            f"{100 * least / total:.1f} %",
            NONE,
        ]
    )

    # Numbers are set flush right.
    head = [
        "phase",
        "seconds",
        "share",
        "tokens",
        "tokens/s",
        "achieved",
        "of roofline",
        "bound by",
    ]
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    right = []
    for line in [head, *lines]:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        right.append([line[0], *cells[1:]])
    return Table(right[0], right[1:])


def _line(row: Mapping[str, Any], phase: str, spent: float, total: float) -> list[str]:
    """One phase's line.

    Args:
        spent: seconds of the phase.
        total: seconds of the round.
    """
    prefix = _prefix(phase)
    tokens, flops, fraction = (measured(row, prefix + name) for name in ("tokens", "flops", "roofline"))

    # Memory binds where its traffic takes longer than the FLOPs, at the devices' peaks.
    bound = NONE
    if fraction is not None and row["perf/peak_spread"] <= STEADY:
        memory_s = row[f"{prefix}bytes"] / row["perf/peak_memory_bytes_per_s"]
        compute_s = (flops or 0.0) / row["perf/peak_flops_per_s"]
        bound = "memory" if memory_s > compute_s else "compute"

    # Phases without matrix products have neither tokens nor FLOPs.
    cells = [NONE, NONE, NONE, NONE]
    if tokens is not None:
        cells[:2] = [f"{tokens:,.0f}", f"{tokens / spent:,.0f}"]
    if flops is not None:
        cells[2] = _rate(flops / spent, "FLOP/s")
    if fraction is not None:
        cells[3] = f"{100 * fraction:.1f} %"
    share = f"{100 * spent / total:.1f} %"
    return [TITLES.get(phase, phase), f"{spent:.3f}", share, *cells, bound]


def _prefix(phase: str) -> str:
    return "perf/" if phase == "train" else f"perf/{phase}_"


def _total(row: Mapping[str, Any], phases: Iterable[str], name: str) -> float:
    return sum(measured(row, _prefix(phase) + name) or 0.0 for phase in phases)


def totals(row: Mapping[str, Any], num_ranks: int) -> dict[str, str]:
    """The figures of the round as a whole, by title."""
    # The peak, and the share of it that was reached.
    flops, memory = row["perf/peak_flops_per_s"], row["perf/peak_memory_bytes_per_s"]
    source, spread = row["perf/peak_source"], row["perf/peak_spread"]
    apart = ""
    if spread > 0:
        apart = f", two measurements {100 * spread:.0f} % apart"
    found = {
        "peak of all devices": f"{_rate(flops, 'FLOP/s')}, {_rate(memory, 'B/s')} ({source}{apart})",
    }
    for title, name in (
        ("MFU, local training", "perf/mfu"),
        ("MFU, constitutional AI", "perf/cai_mfu"),
    ):
        mfu = measured(row, name)
        if mfu is not None:
            found[title] = f"{100 * mfu:.1f} %"

    # Memory, idle time and traffic.
    resident = byte_size(row["perf/peak_rss_bytes"])
    found["peak memory"] = f"{resident} resident, all processes together"
    if "perf/peak_gpu_bytes" in row:
        allocated = byte_size(row["perf/peak_gpu_bytes"])
        found["peak GPU memory"] = f"{allocated} allocated by the process that has most"
    idle = measured(row, "parallel/idle_share")
    if idle is not None:
        planned = 100 * row["parallel/planned_idle_share"]
        idle_share = f"{100 * idle:.1f} % of {_processes(num_ranks)}"
        found["idle while training"] = f"{idle_share}, {planned:.1f} % planned"
    sent = row["parallel/comm_bytes"]
    found["communicated"] = f"{sent / 1e6:,.2f} MB ({sent:,} bytes handed to collectives by all processes)"
    return found


def _rate(value: float, unit: str) -> str:
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {letter}{unit}"
    return f"{value:.3g} {unit}"


def _processes(num_ranks: int) -> str:
    return "1 process" if num_ranks == 1 else f"{num_ranks} processes"


def page(simulation: ProfiledSimulation, row: Row) -> str:
    """Everything that is printed."""
    config, world = simulation.config, simulation.world
    arm = arm_of(to_flat(config))
    threads = config.parallel.threads
    place = f"{_processes(world.size)} on {world.device.type}, {threads} thread(s) each"
    plain, profiled = simulation.seconds
    found = totals(row, world.size)
    slower = f"{profiled / plain:.2f} x the measured pass"
    found["trace of rank 0"] = f"{simulation.trace} ({duration(profiled)}, {slower})"
    title = f"Round {row['round']} of {config.name.removesuffix(SUFFIX)}: {arm}; {place}"
    lines = [f"{what:<22}  {figure}" for what, figure in found.items()]
    return "\n".join([title, "", phase_table(row).plain(), "", *lines])


def parse(arguments: Sequence[str]) -> tuple[Config, int, Path | None]:
    """Read the command line: configuration, index of the round, path of the trace or None."""
    parser = Parser(
        prog="fedsim profile",
        usage="[torchrun --nproc_per_node=N -m] fedsim profile [--round N] [--trace FILE] CONFIG.yaml [key=value ...]\n"
        "       [torchrun --nproc_per_node=N -m] fedsim profile --cai ...  (--cai --help: cost of CAI)",
        description=(__doc__ or "").partition("\n\n")[2],
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--round", type=int, default=2, help="which round, counted from 1")
    parser.add_argument("--trace", type=Path, help="Chrome trace to write, *.json or *.json.gz")
    parser.add_argument(
        "--local_rank",
        "--local-rank",
        type=int,
        help="added by launchers; the same as LOCAL_RANK",
    )
    found = parser.parse_intermixed_args(arguments)

    # A profile neither logs to W&B nor refuses to begin again.
    config = load_config(found.config, [*found.overrides, "wandb.mode=off", "record.resume=auto"])
    if not 1 <= found.round <= config.federation.num_rounds:
        raise ConfigError(f"--round {found.round}: must be >= 1 and <= federation.num_rounds (now "
                          f"{config.federation.num_rounds}); choose another round")  # fmt: skip
    if found.trace is not None and not found.trace.name.endswith((".json", ".json.gz")):
        raise ConfigError(
            f"--trace {found.trace}: must end in .json or .json.gz, which trace viewers read",
        )
    if found.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(found.local_rank))
    return replace(config, name=config.name + SUFFIX), round_index(found.round), found.trace


@contextmanager
def own_directory(folder: Path) -> Iterator[None]:
    """Empty a profile's directory (an earlier profile would be resumed) and hold its lock.

    Raises:
        ConfigError: another process profiles in it, it holds something else than profiles, or it
            cannot be made.
    """
    # Only a directory that a profile has made may be emptied.
    try:
        if folder.is_dir() and not (folder / MARK).is_file() and any(folder.iterdir()):
            raise ConfigError(
                f"{folder}: exists and was not made by a profile; move it, or give the profiled "
                "run another name (name=...)"
            )
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / MARK).open("a")
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be made or written ({error.strerror}); give another record.dir",
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{folder}: another process is profiling this very run; wait for it, or give this "
                "one another name (name=...)"
            ) from error
        for path in folder.iterdir():
            if path.name == MARK:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        yield


def partial_trace(trace: Path) -> Path:
    """Path of an unfinished trace; it keeps the ending, which decides the format."""
    return trace.with_name(f".partial-{trace.name}")


def check_trace(trace: Path) -> None:
    """Make the trace's directory, and check that the trace can be written.

    Raises:
        ConfigError: it cannot.
    """
    try:
        trace.parent.mkdir(parents=True, exist_ok=True)
        if trace.is_dir():
            raise IsADirectoryError(0, "a directory has this name")
        partial_trace(trace).touch()
        partial_trace(trace).unlink()
    except OSError as error:
        raise ConfigError(
            f"--trace {trace}: cannot be written ({error.strerror}); give another path",
        ) from error


def profile(config: Config, chosen: int, trace: Path | None) -> None:
    """Simulate, trace and print."""
    parallel = config.parallel
    folder = config.folder
    target = trace or folder / f"trace-round{round_number(chosen)}.json.gz"
    with (
        ExitStack() as held,
        process_world(
            exact=parallel.exact,
            threads=parallel.threads,
            timeout_s=parallel.timeout_s,
            device=parallel.device,
        ) as world,
    ):
        world.ranks.once(lambda: held.enter_context(own_directory(folder)))
        world.ranks.once(lambda: check_trace(target))
        simulation = ProfiledSimulation(config, world, chosen, target)
        try:
            simulation.run()
        except Enough:
            if not world.ranks.is_main:
                return
            for row in read_rows(simulation.record.metrics_file):
                if row["stage"] == "round" and row["round"] == round_number(chosen):
                    print(f"\n{page(simulation, row)}", flush=True)
                    break


def main(argv: Sequence[str]) -> int:
    """Profile one round; a user's error is one line, from rank 0 or from the one rank with it."""
    if "--cai" in argv:
        from fedsim.commands import cai_cost

        return cai_cost.main([word for word in argv if word != "--cai"])
    return launched(lambda: parse(argv), lambda given: profile(*given))
