"""The paper's elapsed times beside times from measured pieces of work, here and on other machines.

A piece is one unit of work on one device: a ``local_step`` of 16 rows, a ``cai_iteration``, a
``tuning_step`` of the guard, a ``guard_row``, a ``conversation``, the ``aggregation`` of a round,
SCAFFOLD's ``correction`` of a local step. On another device it takes its floor (FLOPs or bytes of
the paper's work at 8B at that device's peak, whichever is longer) divided by the fraction of the
floor that was reached where it was measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedsim.base.errors import ConfigError
from fedsim.base.planner import plan_round, speedup
from fedsim.base.tables import NOT_MEASURED, Table
from fedsim.model.cost import Effort
from fedsim.record.metrics import Row
from fedsim.record.timers import top_level_seconds
from fedsim.report import paper
from fedsim.run.peak import GPUS, published
from fedsim.study.cai_cost import at_paper_counts, saved, time_text

CLIENTS, STEPS, LANE = 5, 25, 4  # of a round; of a client; ranks of the lane that is measured
MICRO_BATCHES = 4  # parts of a batch of 16 rows, which ranks can share
TUNING_STEPS = 5 * 20_000 // paper.BATCH_SIZE
FILTERED = 20_000  # rows of all clients
RANGE = (0.6, 0.3)  # fractions of the floor between which an assumption is shown


@dataclass(frozen=True)
class Piece:
    """Seconds of a unit on one device, and the floor's share of them."""

    seconds: float
    fraction: float


@dataclass(frozen=True)
class Measured:
    """A machine's committed rows.

    Attributes:
        device: its name, or "CPU".
        model: what was timed.
        projects: they are of a GPU at 8B, so that a projection assumes nothing but the ratio of
            peaks.
        stamp: machine, date and commit, for the reader.
        pieces: by name; those that were not timed are absent.
        lane_share: a step in a lane of 4 ranks over one on a single rank; None takes the ideal
            quarter.
    """

    device: str
    model: str
    projects: bool
    stamp: str
    pieces: Mapping[str, Piece]
    lane_share: float | None = None


@dataclass(frozen=True)
class Machine:
    """Equal GPUs: name, number, and FLOP/s in bfloat16 and bytes/s of one."""

    name: str
    count: int
    flops: float
    bytes_per_s: float

    def floor_s(self, effort: Effort) -> float:
        """Least seconds of some work on one GPU."""
        return max(effort.flops / self.flops, effort.num_bytes / self.bytes_per_s)


@dataclass(frozen=True)
class Line:
    """Seconds of a stage (None: a piece of it was not measured) and their formula."""

    seconds: float | None
    formula: str


def machine(text: str) -> Machine:
    """``4xH200``: a number and a GPU of :data:`fedsim.run.peak.GPUS`.

    Raises:
        ConfigError: another form, or a GPU that has no published figures there.
    """
    count, _, name = text.partition("x")
    gpu = published(name)
    if gpu is None or not count.isdecimal() or int(count) < 1:
        known = ", ".join(f"{LANE}x{'-'.join(gpu.words)}" for gpu in GPUS)
        raise ConfigError(
            f"--target {text}: must be a number and a known GPU; give one like {known}",
        )
    return Machine(f"{int(count)} x {name}", int(count), gpu.bfloat16 * 1e12, gpu.memory * 1e12)


def projected(measured: Measured, work: Mapping[str, Effort], target: Machine) -> dict[str, float]:
    """Seconds of each piece of the paper's work on one target device, at the fractions measured.

    Fine-tuning the guard has no row: it takes the local step's fraction.
    """
    fractions = {name: piece.fraction for name, piece in measured.pieces.items()}
    if "local_step" in fractions:
        fractions.setdefault("tuning_step", fractions["local_step"])
    return {name: target.floor_s(work[name]) / fraction for name, fraction in fractions.items()}


def client_times(count: int, lane_share: float | None) -> float:
    """Client times of a round of 5 equal clients, as the planner places them."""
    plan = plan_round(
        dict.fromkeys(range(CLIENTS), 1),
        [1.0] * count,
        MICRO_BATCHES,
        wide_lanes=True,
    )
    single = max((job.end_s for job in plan.jobs if job.width == 1), default=0.0)
    return single + (plan.makespan_s - single) * _loss(lane_share)


def shared_step(count: int, lane_share: float | None) -> float:
    """A step that ``count`` ranks share, over one on a single rank."""
    if count == 1:
        return 1.0
    return _loss(lane_share) / speedup(count, MICRO_BATCHES)


def _loss(lane_share: float | None) -> float:
    """Time of a shared step over its ideal time."""
    if lane_share is None:
        return 1.0
    return lane_share * LANE


def stages(unit: Mapping[str, float], count: int, lane_share: float | None) -> dict[str, Line]:
    """Seconds of the paper's stages on ``count`` devices, from seconds of the pieces on one."""
    # Client times of a round, and a shared step over one on a single device.
    times, share = client_times(count, lane_share), shared_step(count, lane_share)
    rounds = paper.NUM_ROUNDS

    # Seconds of the pieces; None where one was not timed.
    step, iteration, tuning = (unit.get(n) for n in ("local_step", "cai_iteration", "tuning_step"))
    add, fix = unit.get("aggregation"), unit.get("correction")
    row, talk = unit.get("guard_row"), unit.get("conversation")

    # Seconds of the stages, of which each needs its pieces.
    fedavg: float | None = None
    scaffold: float | None = None
    tuned: float | None = None
    filtered: float | None = None
    written: float | None = None
    if step is not None and add is not None:
        fedavg = rounds * (STEPS * times * step + add)
        if fix is not None:
            scaffold = rounds * (STEPS * times * (step + fix) + add)
    cai: dict[str, float] = {}
    if iteration is not None:
        cai = at_paper_counts(iteration * share)
    if tuning is not None:
        tuned = TUNING_STEPS * tuning * share
    if row is not None:
        filtered = 1000 * row
    if talk is not None:
        written = paper.NUM_CAI_ROWS * talk / count

    # The same with their formulas.
    writing = f"{paper.NUM_CAI_ROWS:,} conversations x {_time(talk)}"
    if count > 1:
        writing += f" / {count}"
    found = {
        "fedavg": Line(
            fedavg,
            f"{rounds} rounds x ({STEPS} steps x {times:.3g} client times x {_time(step)} + aggregation {_time(add)})",
        ),
        "scaffold": Line(
            scaffold,
            f"{rounds} x ({STEPS} x {times:.3g} x ({_time(step)} + correction {_time(fix)}) + {_time(add)})",
        ),
        "cai": Line(cai.get("cai"), f"{rounds} rounds of CAI"),
        "cai_round": Line(
            cai.get("cai_round"),
            f"{paper.CAI_ITERATIONS} iterations x {_time(iteration)} x {share:.3g} (shared)",
        ),
        "cai_epoch": Line(
            cai.get("cai_epoch"),
            f"{paper.CAI_EPOCH_ITERATIONS:,} iterations x {_time(iteration)} x {share:.3g}",
        ),
        "guard_tuning": Line(
            tuned,
            f"{TUNING_STEPS:,} steps x {_time(tuning)} x {share:.3g}, at the local step's fraction",
        ),
        "guard_1000_rows": Line(filtered, f"1,000 rows x {_time(row)}, on one device"),
        "writing": Line(written, writing),
    }
    seconds = {name: line.seconds for name, line in found.items()}
    return {**found, "table_1": _whole(seconds, count, with_writing=True)}


def published_stages() -> dict[str, Line]:
    """The paper's own times; those of Table 1 follow from them, without writing."""
    found = {name: Line(60 * cost.minutes, "published") for name, cost in paper.COSTS.items()}
    return {
        **found,
        "writing": Line(None, "not stated"),
        "table_1": _whole(
            {name: line.seconds for name, line in found.items()},
            1,
            with_writing=False,
        ),
    }


def _whole(seconds: Mapping[str, float | None], filtering: int, *, with_writing: bool) -> Line:
    """All of Table 1: four trainings of each algorithm, CAI in half, and shared stages."""
    filterings = FILTERED / 1000 / filtering
    names = ["fedavg", "scaffold", "cai", "guard_tuning", "guard_1000_rows"]
    formula = f"4 FedAvg + 4 SCAFFOLD + 4 CAI + guard fine-tuning + {filterings:g} x filtering 1,000 rows"
    if with_writing:
        names.append("writing")
        formula += " + writing"
    formula += "; no evaluation"

    # Seconds of each stage times its count; without one of them there is no sum.
    times = {"fedavg": 4.0, "scaffold": 4.0, "cai": 4.0, "guard_1000_rows": filterings}
    parts, missing = [], []
    for name in names:
        value = seconds[name]
        if value is None:
            missing.append(name)
        else:
            parts.append(times.get(name, 1.0) * value)
    if missing:
        return Line(None, f"{formula}; not measured: {', '.join(missing)}")
    return Line(sum(parts), formula)


def device_hours(lines: Mapping[str, Line], count: int, *, filter_count: int) -> float | None:
    """GPU-hours of Table 1; filtering keeps ``filter_count`` devices busy, all else ``count``."""
    whole, filtering = lines["table_1"].seconds, lines["guard_1000_rows"].seconds
    if whole is None or filtering is None:
        return None
    filtered = filtering * FILTERED / 1000 / filter_count
    return (count * (whole - filtered) + filter_count * filtered) / 3600


TITLES = {
    "fedavg": "FedAvg, 50 rounds",
    "scaffold": "SCAFFOLD, 50 rounds",
    "cai": "CAI in all 50 rounds",
    "cai_round": "CAI in one round, 50 iterations",
    "cai_epoch": "CAI in one round, a whole epoch",
    "guard_tuning": "guard fine-tuning, 5 epochs",
    "guard_1000_rows": "filtering 1,000 rows, one device",
    "writing": "writing 20,000 CAI conversations",
    "table_1": "whole of Table 1, without evaluation",
}


@dataclass(frozen=True)
class Report:
    """All columns: stages by machine, and the range where a projection is an assumption."""

    measured: Measured
    why: str
    here: Mapping[str, Line]
    targets: Sequence[tuple[Machine, Mapping[str, Line], Sequence[Mapping[str, Line]]]]

    @property
    def label(self) -> str:
        """Heading of a projected column."""
        if self.measured.projects:
            return "measured rows scaled by the ratio of peaks"
        bounds = " to ".join(f"{100 * fraction:g} %" for fraction in RANGE)
        return f"arithmetic, not measured [at {bounds} of peak]"

    @property
    def caption(self) -> str:
        """Caption of the table, which must not be shown without it."""
        how = "Projected columns: measured rows scaled by the ratio of peaks"
        if not self.measured.projects:
            how = (
                f"Columns of other machines: arithmetic, not measured: {self.why}. They take "
                "Llama-3.1-8B's work at the fraction of the floor that the small model reaches "
                "here, an assumption, and in brackets at fixed fractions; what GPUs share loses "
                "in both as much as it does here. The paper's column was measured: beside "
                f"arithmetic it says nothing about speed{self._outside()}"
            )
        return f"{how}. Rows: {self.measured.stamp}."

    def _outside(self) -> str:
        """A clause on pieces whose fraction lies outside the brackets'; "" if none does."""
        high, low = RANGE
        outside = []
        for name, piece in self.measured.pieces.items():
            if not low <= piece.fraction <= high:
                outside.append(f"{name} {100 * piece.fraction:.2g} %")
        if not outside:
            return ""
        return f". An estimate lies outside its bracket where its fraction does: {', '.join(outside)}"

    def table(self) -> Table:
        """The paper, here, and each target."""
        published_lines = published_stages()
        head = [
            "",
            "paper, 4 x A100, measured by its authors",
            f"1 x {self.measured.device}, {self.measured.model}: measured pieces at the paper's counts",
        ]
        head += [f"{target.name}, {self.label}" for target, _, _ in self.targets]

        # A row for each stage.
        rows = []
        for name, title in TITLES.items():
            stated = published_lines[name].seconds
            first = "not stated" if stated is None else time_text(stated)
            if name == "table_1":
                first += " (follows from the paper's figures)"
            cells = [_range(lines, bounds, name) for _, lines, bounds in self.targets]
            rows.append([title, first, _time(self.here[name].seconds), *cells])

        # Below the epoch: the share that few iterations save. Last: device-hours of the whole.
        savings = [_saving(published_lines), _saving(self.here)]
        hours = [
            device_hours(published_lines, 4, filter_count=1),
            device_hours(self.here, 1, filter_count=1),
        ]
        for target, lines, _ in self.targets:
            savings.append(_saving(lines))
            hours.append(device_hours(lines, target.count, filter_count=target.count))
        rows.insert(5, ["– saved by 50 iterations", *savings])
        cells = [NOT_MEASURED if value is None else f"{value:.3g} h" for value in hours]
        rows.append(["– device-hours", *cells])
        return Table(head, rows)

    def formulas(self, work: Mapping[str, Effort]) -> list[str]:
        """The first target's arithmetic with its numbers, and Table 1's of the paper."""
        target, lines, _ = self.targets[0]
        peak_flops = f"{target.flops / 1e12:g} TFLOP/s"
        peak_bytes = f"{target.bytes_per_s / 1e12:g} TB/s"
        found = [f"On {target.name}, at {peak_flops} and {peak_bytes} each:"]

        # Pieces: FLOPs or bytes, whichever bind, over the peak and the fraction.
        units = projected(self.measured, work, target)
        for name, seconds in units.items():
            effort = work[name]
            fraction = target.floor_s(effort) / seconds
            bound = f"{effort.flops / 1e12:.3g} TFLOP / ({peak_flops}"
            if effort.flops / target.flops < target.floor_s(effort):
                bound = f"{effort.num_bytes / 1e9:.3g} GB / ({peak_bytes}"
            found.append(f"{name} = {bound} x {100 * fraction:.3g} %) = {time_text(seconds)}")

        # Stages, and the paper's own Table 1.
        for name, line in lines.items():
            found.append(f"{TITLES[name]} = {line.formula} = {_time(line.seconds)}")
        stated = published_stages()["table_1"]
        return [*found, f"the paper's Table 1 = {stated.formula} = {_time(stated.seconds)}"]


def report(
    measured: Measured,
    work: Mapping[str, Effort],
    targets: Sequence[Machine],
    why: str,
) -> Report:
    """Compute all columns.

    Args:
        why: reason why a projection is an assumption, where it is one, such as "no GPU row is
            committed".
    """
    share = measured.lane_share
    seconds = {name: piece.seconds for name, piece in measured.pieces.items()}
    here = stages(seconds, 1, None)

    # A column for each target; where it is an assumption, also at the ends of the range.
    fractions = () if measured.projects else RANGE
    columns = []
    for target in targets:
        bounds = []
        for fraction in fractions:
            units = {name: target.floor_s(effort) / fraction for name, effort in work.items()}
            bounds.append(stages(units, target.count, share))
        lines = stages(projected(measured, work, target), target.count, share)
        columns.append((target, lines, bounds))
    return Report(measured, why, here, columns)


def run_table(runs: Mapping[str, Iterable[Row]]) -> Table:
    """Seconds of finished runs by phase, from their metric rows; reused artefacts took none."""
    # Phase → run → seconds.
    phases: dict[str, dict[str, float]] = {}
    for run, rows in runs.items():
        for row in rows:
            for phase, seconds in top_level_seconds(row).items():
                sums = phases.setdefault(phase, {})
                sums[run] = sums.get(run, 0.0) + seconds
    lines = []
    for phase, sums in phases.items():
        lines.append([phase, *(_time(sums.get(run)) for run in runs)])

    # Sums over phases, and evaluation's share of them.
    wholes, shares = [], []
    evaluated = phases.get("evaluate", {})
    for run in runs:
        whole = sum(sums.get(run, 0.0) for sums in phases.values())
        wholes.append(_time(whole or None))
        if whole:
            shares.append(f"{100 * evaluated.get(run, 0.0) / whole:.3g} %")
        else:
            shares.append(NOT_MEASURED)
    lines += [["all phases", *wholes], ["– evaluation's share", *shares]]
    return Table(["seconds of a run", *runs], lines)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return NOT_MEASURED
    return time_text(seconds)


def _range(lines: Mapping[str, Line], bounds: Sequence[Mapping[str, Line]], name: str) -> str:
    estimate = _time(lines[name].seconds)
    if not bounds:
        return estimate
    ends = [_time(bound[name].seconds) for bound in bounds]
    return f"{estimate} [{' to '.join(ends)}]"


def _saving(lines: Mapping[str, Line]) -> str:
    whole, part = lines["cai_epoch"].seconds, lines["cai_round"].seconds
    if whole is None or part is None:
        return NOT_MEASURED
    return saved(whole, part)
