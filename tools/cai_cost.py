"""What CAI costs on this machine: ``tools/cai_cost.py [CONFIG.yaml] [key=value …]`` under plain python or torchrun.

A CAI iteration is an SFT step and a DPO step on the same rows. Some are timed with the configuration's own model,
lengths, batch and conversations (``--iterations``, after one that does not count), data-parallel over the processes as
in a run, and the paper's table (arXiv 2502.16691, §4.2 and §6.1) is printed beside what follows from them:

- the configuration's own counts: an epoch is as many iterations as its usable conversations have batches;
- the paper's counts: an epoch of 1,250 iterations (20,000 rows in batches of 16) against 50, over 50 rounds.

``--full-epoch`` runs the configuration's whole epoch instead, and says how far an extrapolation from its first
``--iterations`` would have been off. Writing the conversations happens once in a run and is timed apart, on twice
``eval.batch_size`` rows a process (with ``--full-epoch`` on all rows); the iterations train on these. Nothing is
recorded but ``--json FILE``.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch

from fedsim.artefacts import ArtefactStore
from fedsim.assembly import Federation, assemble
from fedsim.config import Config, load_config
from fedsim.config.command_line import DEFAULT
from fedsim.data.square import SquareRow
from fedsim.errors import ConfigError, DataError
from fedsim.generate.engine import Sampling
from fedsim.launching import Parser, launched
from fedsim.parallel.world import World, process_world
from fedsim.preflight import preflight
from fedsim.preparation import Preparation
from fedsim.ranks import Lane
from fedsim.record import paper
from fedsim.record.manifest import hardware
from fedsim.record.run_record import RunRecord
from fedsim.record.tables import Table, duration
from fedsim.safety.alignment import Aligner
from fedsim.safety.cai_data import CaiRow, generate_conversations, unusable, usable
from fedsim.safety.cai_stage import constitution_file
from fedsim.safety.constitution import load_constitution

T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """What the command line asks for.

    Attributes:
        iterations: how many are timed.
        full_epoch: time a whole epoch instead.
        file: where the row goes.
    """

    config: Config
    iterations: int
    full_epoch: bool
    file: Path | None


@dataclass(frozen=True)
class Steps:
    """Seconds of the timed steps, in order: one SFT and one DPO step an iteration."""

    sft_s: list[float]
    dpo_s: list[float]

    @property
    def iteration_s(self) -> float:
        """Mean seconds of an iteration."""
        return self.total_s / len(self.sft_s)

    @property
    def total_s(self) -> float:
        """Seconds of all timed steps."""
        return math.fsum(self.sft_s) + math.fsum(self.dpo_s)

    def first(self, count: int) -> Steps:
        """The first ``count`` iterations alone."""
        return Steps(self.sft_s[:count], self.dpo_s[:count])


@dataclass(frozen=True)
class Cost:
    """What was measured.

    Attributes:
        steps: the timed ones.
        extrapolated_from: iterations that an extrapolation takes.
        full_epoch: whether ``steps`` are a whole epoch.
        num_rows: conversations that a run can train on: as large a share of ``asked_rows`` as of those written here.
        batch_size: rows of a step.
        round_iterations: iterations of a round (``cai.iterations``).
        num_rounds: rounds of the run.
        written_rows: conversations that were written to time the writing.
        written_s: seconds that took.
        asked_rows: conversations that a run writes.
    """

    steps: Steps
    extrapolated_from: int
    full_epoch: bool
    num_rows: int
    batch_size: int
    round_iterations: int
    num_rounds: int
    written_rows: int
    written_s: float
    asked_rows: int

    @property
    def epoch_iterations(self) -> int:
        """Iterations of the configuration's own epoch; the last batch is filled from the next epoch."""
        return epoch_iterations(self.num_rows, self.batch_size)

    @property
    def epoch_s(self) -> float:
        """Seconds of that epoch: measured, or the mean iteration times their number."""
        return self.steps.total_s if self.full_epoch else self.epoch_iterations * self.steps.iteration_s

    @property
    def extrapolated_s(self) -> float:
        """Seconds of that epoch as its first iterations would have foretold."""
        return self.epoch_iterations * self.steps.first(self.extrapolated_from).iteration_s

    @property
    def writing_s(self) -> float:
        """Seconds of writing all conversations, once."""
        return self.written_s / self.written_rows * self.asked_rows


def epoch_iterations(num_rows: int, batch_size: int) -> int:
    """Iterations that use every row once."""
    return math.ceil(num_rows / batch_size)


def timed_steps(
    aligner: Aligner,
    adapter: torch.Tensor,
    lane: Lane,
    iterations: int,
    clock: Callable[[], float] = time.perf_counter,
    wait: Callable[[], None] = lambda: None,
) -> Steps:
    """Time ``iterations`` iterations from ``adapter`` on, as a round of CAI runs them: SFT steps first, then DPO steps.

    Args:
        wait: returns when the device has done what it was given; called before every look at the clock.
    """

    def align(count: int) -> list[float]:
        aligner.cai = replace(aligner.cai, iterations=count)
        marks = [now()]
        aligner.align(adapter, 0, lane, lambda done, total: marks.append(now()))
        return [later - earlier for earlier, later in pairwise(marks)]

    def now() -> float:
        wait()
        return clock()

    align(1)  # the first steps allocate and compile what later ones find
    seconds = align(iterations)
    return Steps(seconds[:iterations], seconds[iterations:])


def table(cost: Cost) -> Table:
    """The paper's table beside what was measured and what follows from it."""
    here = cost.steps.iteration_s
    own_round, own_all = cost.round_iterations * here, cost.num_rounds
    epoch, few, rounds = paper.CAI_EPOCH_ITERATIONS, paper.CAI_ITERATIONS, paper.NUM_ROUNDS
    printed = {name: 60 * paper.COSTS[name].minutes for name in ("cai_epoch", "cai_round", "cai")}
    paper_counts = [epoch * here, few * here]
    lines = [
        ["iterations of an epoch", f"{epoch:,}", f"{epoch:,}", f"{cost.epoch_iterations:,}"],
        ["iterations of a round", f"{few:,}", f"{few:,}", f"{cost.round_iterations:,}"],
        ["one iteration (SFT + DPO step)", _time(printed["cai_round"] / few), _time(here), _time(here)],
        ["a round with a whole epoch", *map(_time, (printed["cai_epoch"], paper_counts[0], cost.epoch_s))],
        ["a round with few iterations", *map(_time, (printed["cai_round"], paper_counts[1], own_round))],
        [
            "saved by that",
            *map(
                _saved,
                (printed["cai_epoch"], paper_counts[0], cost.epoch_s),
                (printed["cai_round"], paper_counts[1], own_round),
            ),
        ],
        ["rounds", f"{rounds}", f"{rounds}", f"{own_all}"],
        [
            "all rounds with an epoch each",
            *map(_time, (rounds * printed["cai_epoch"], rounds * paper_counts[0], own_all * cost.epoch_s)),
        ],
        [
            "all rounds with few iterations",
            *map(_time, (printed["cai"], rounds * paper_counts[1], own_all * own_round)),
        ],
        ["conversations, written once", f"{paper.NUM_CAI_ROWS:,}", f"{paper.NUM_CAI_ROWS:,}", f"{cost.asked_rows:,}"],
        [
            "writing them",
            "not stated",
            _time(cost.written_s / cost.written_rows * paper.NUM_CAI_ROWS),
            _time(cost.writing_s),
        ],
    ]
    head = ["", "paper, 4 x A100", "here, the paper's counts", "here, this configuration"]
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    return Table(head, [[line[0], *(cell.rjust(widths[i]) for i, cell in enumerate(line[1:], 1))] for line in lines])


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 59.95 else duration(seconds)


def _saved(whole: float, part: float) -> str:
    return f"{100 * (part / whole - 1):+.0f} %"


def page(cost: Cost, config: Config, world: World) -> str:
    """Everything that is printed."""
    steps = cost.steps
    count = len(steps.sft_s)
    place = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else hardware()["cpu"]
    sft, dpo = (math.fsum(seconds) / count for seconds in (steps.sft_s, steps.dpo_s))
    lines = [
        f"CAI of {config.name}: model {config.model.path}, batches of {cost.batch_size}; {world.size} process(es), "
        f"{config.parallel.threads} thread(s) each, {place}",
        "",
        table(cost).plain(),
        "",
        f"timed: {count} iteration(s), an SFT step {_time(sft)} and a DPO step {_time(dpo)} on average; "
        f"{cost.num_rows:,} rows / {cost.batch_size} = {cost.epoch_iterations:,} iterations an epoch "
        f"(paper: {paper.NUM_CAI_ROWS:,} / {paper.BATCH_SIZE} = {paper.CAI_EPOCH_ITERATIONS:,})",
        f"writing: timed on {cost.written_rows:,} of {cost.asked_rows:,} conversations, {_time(cost.written_s)}",
    ]
    if cost.full_epoch:
        off = 100 * (cost.extrapolated_s / cost.epoch_s - 1)
        lines.append(
            f"the whole epoch took {_time(cost.epoch_s)}; its first {cost.extrapolated_from} iteration(s) would have "
            f"foretold {_time(cost.extrapolated_s)}, {off:+.1f} %"
        )
    else:
        lines.append("the epoch is extrapolated; --full-epoch runs it")
    return "\n".join(lines)


def row(cost: Cost, config: Config, world: World) -> dict[str, object]:
    """The JSON row: what was measured, and what follows."""
    return {
        **asdict(cost),
        "iteration_s": cost.steps.iteration_s,
        "epoch_iterations": cost.epoch_iterations,
        "epoch_s": cost.epoch_s,
        "extrapolated_s": cost.extrapolated_s,
        "writing_s": cost.writing_s,
        "model": config.model.path,
        "num_ranks": world.size,
        "threads": config.parallel.threads,
        "hardware": hardware(),
        "torch": torch.__version__,
    }


def measure(asked: Asked, world: World) -> Cost:
    """Load, write some conversations, and time the iterations; the same figures on every rank: the slowest one's."""
    config = asked.config
    preflight(config, world)
    record = RunRecord(config, world.ranks, synchronize=world.device.type == "cuda")
    store = ArtefactStore(Path(config.record.artefacts).expanduser(), world.ranks, record.say)
    prepare = Preparation(config, world, record, store)
    data = prepare.read().data
    few = [shard[:1] for shard in data.shards]  # nobody trains
    federation = assemble(config, world, few, record.client_state)
    rows = data.cai_rows if asked.full_epoch else data.cai_rows[: 2 * config.eval.batch_size * world.size]
    _write(config, federation, rows[: world.size])  # what is set up once
    written, written_s = _slowest(world, lambda: _write(config, federation, rows))
    if not usable(written):
        raise DataError(unusable(written))
    aligner = Aligner(federation.trainer, usable(written), federation.chat, config.cai, config.seed)
    size = config.cai.batch_size
    count = epoch_iterations(len(aligner.pairs), size) if asked.full_epoch else asked.iterations
    steps = timed_steps(
        aligner, federation.flat.initial(config.seed), world.everyone(), count, wait=lambda: _synchronise(world)
    )
    each = world.ranks.gather(steps)
    slowest = max(each, key=lambda found: found.total_s)
    return Cost(
        steps=slowest,
        extrapolated_from=min(asked.iterations, count),
        full_epoch=asked.full_epoch,
        num_rows=max(1, round(len(aligner.pairs) / len(rows) * len(data.cai_rows))),
        batch_size=size,
        round_iterations=config.cai.iterations,
        num_rounds=config.federation.num_rounds,
        written_rows=len(rows),
        written_s=written_s,
        asked_rows=len(data.cai_rows),
    )


def _write(config: Config, federation: Federation, rows: Sequence[SquareRow]) -> list[CaiRow]:
    """Write conversations as a run does."""
    federation.flat.load(federation.flat.initial(config.seed))
    return generate_conversations(
        federation.engine,
        rows,
        load_constitution(constitution_file(config.cai.constitution)),
        Sampling(config.cai.temperature, config.cai.max_new_tokens),
        first_turn="model" if config.cai.first_turn == "model" else "dataset",
    )


def _slowest(world: World, work: Callable[[], T]) -> tuple[T, float]:
    """What the work gave, and the slowest rank's seconds."""
    _synchronise(world)
    began = time.perf_counter()
    done = work()
    _synchronise(world)
    return done, max(world.ranks.gather(time.perf_counter() - began))


def _synchronise(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def parse(arguments: Sequence[str]) -> Asked:
    """The command line, without the program's name."""
    parser = Parser(
        prog="tools/cai_cost.py",
        usage="[torchrun --nproc_per_node=N] tools/cai_cost.py [--iterations N] [--full-epoch] [--json FILE] "
        "[CONFIG.yaml] [key=value ...]",
        description=(__doc__ or "").partition("\n\n")[2],
    )
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml | key=value", help="config file and overrides")
    parser.add_argument("--iterations", type=int, default=5, help="iterations that are timed")
    parser.add_argument("--full-epoch", action="store_true", help="time a whole epoch instead")
    parser.add_argument("--json", type=Path, help="write the figures as JSON to this file")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="added by launchers; the same as LOCAL_RANK")
    found = parser.parse_intermixed_args(arguments)
    files = [word for word in found.words if "=" not in word]
    if len(files) > 1:
        raise ConfigError(f"command line: one config file at most, not {len(files)}: {' '.join(files)}")
    if found.iterations < 1:
        raise ConfigError(f"--iterations {found.iterations}: must be >= 1; time one at least")
    config = load_config(Path(files[0]) if files else DEFAULT, [w for w in found.words if "=" in w])
    if config.cai.iterations == 0:
        raise ConfigError(
            "cai.iterations=0: this configuration has no CAI to cost; set cai.iterations=50, as the paper"
        )
    if found.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(found.local_rank))
    return Asked(cai_alone(config), found.iterations, found.full_epoch, found.json)


def cai_alone(config: Config) -> Config:
    """The configuration without what CAI does not need: neither guard nor benchmarks nor judge has to be there."""
    return replace(
        config,
        guard=replace(config.guard, kind="none"),
        eval=replace(config.eval, advbench="", hhh="", mt_bench="", xstest="", helpful="", guard_judge="none"),
        judge=replace(config.judge, kind="none"),
    )


def cost_of(asked: Asked) -> None:
    """Measure, print and write, from rank 0."""
    parallel = asked.config.parallel
    with process_world(exact=parallel.exact, threads=parallel.threads, timeout_s=parallel.timeout_s) as world:
        cost = measure(asked, world)
        world.ranks.once(lambda: _tell(asked, cost, world))


def _tell(asked: Asked, cost: Cost, world: World) -> None:
    print(f"\n{page(cost, asked.config, world)}", flush=True)
    if asked.file is not None:
        try:
            asked.file.write_text(json.dumps(row(cost, asked.config, world)) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"--json {asked.file}: cannot be written ({error.strerror}); give another path"
            ) from error


def main() -> int:
    """Cost CAI; a user's error is one line, from rank 0."""
    return launched(lambda: parse(sys.argv[1:]), cost_of)


if __name__ == "__main__":
    sys.exit(main())
