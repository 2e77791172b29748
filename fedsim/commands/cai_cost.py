"""Cost of CAI on this machine: ``fedsim profile --cai [CONFIG.yaml] [key=value …]`` under plain python or torchrun.

A CAI iteration is an SFT step and a DPO step on the same rows. Some are timed with the
configuration's own model, lengths, batch and conversations (``--iterations``, after one that does
not count), data-parallel over the processes as in a run, and the paper's table (arXiv 2502.16691,
§4.2 and §6.1) is printed beside what follows from them:

- the configuration's own counts: an epoch is as many iterations as its usable conversations have
  batches;
- the paper's counts: an epoch of 1,250 iterations (20,000 rows in batches of 16) against 50, over
  50 rounds.

``--full-epoch`` runs the configuration's whole epoch instead, and prints how far an extrapolation
from its first ``--iterations`` would have been off. Writing the conversations happens once in a run
and is timed apart, on twice ``eval.batch_size`` rows a process (with ``--full-epoch`` on all rows);
the iterations train on these. Nothing is recorded but ``--json FILE``.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch

from fedsim.base.artefacts import ArtefactStore
from fedsim.base.errors import ConfigError
from fedsim.base.launching import Parser, launched
from fedsim.base.ranks import Lane
from fedsim.config import Config, load_config
from fedsim.config.command_line import DEFAULT
from fedsim.data.square import SquareRow
from fedsim.evaluate.own import OWN
from fedsim.generate.engine import Sampling
from fedsim.parallel.world import World, process_world
from fedsim.record.manifest import hardware
from fedsim.record.run_record import RunRecord
from fedsim.run.checks import preflight
from fedsim.run.needs import DPO
from fedsim.run.preparation import Preparation
from fedsim.run.resident import Resident, assemble
from fedsim.safety.alignment import Aligner
from fedsim.safety.cai_data import CaiRow, generate_conversations, usable
from fedsim.safety.cai_stage import constitution_file
from fedsim.safety.cai_usage import none_usable
from fedsim.safety.constitution import load_constitution
from fedsim.study.cai_cost import Cost, Steps, epoch_iterations, page, row

T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """Options of the command line.

    Attributes:
        iterations: how many are timed.
        full_epoch: time a whole epoch instead.
        file: where the row goes.
    """

    config: Config
    iterations: int
    full_epoch: bool
    file: Path | None


def timed_steps(
    aligner: Aligner,
    adapter: torch.Tensor,
    lane: Lane,
    iterations: int,
    clock: Callable[[], float] = time.perf_counter,
    wait: Callable[[], None] = lambda: None,
) -> Steps:
    """Time iterations from ``adapter`` on, as a round of CAI runs them: SFT steps, then DPO steps.

    Args:
        wait: returns when the device is idle; called before the clock is read.
    """

    def align(count: int) -> list[float]:
        aligner.cai = replace(aligner.cai, iterations=count)
        marks = [now()]
        aligner.align(adapter, 0, lane, lambda done, total: marks.append(now()))
        return [later - earlier for earlier, later in pairwise(marks)]

    def now() -> float:
        wait()
        return clock()

    align(1)  # warm-up: the first steps allocate and compile
    seconds = align(iterations)
    return Steps(seconds[:iterations], seconds[iterations:])


def measure(asked: Asked, world: World) -> Cost:
    """Write some conversations and time the iterations.

    Returns:
        The figures of the slowest rank, on every rank.
    """
    # Checks, rows and the model; clients keep one row each, as none of them trains.
    config = asked.config
    pass_tokens = preflight(config, world).pass_tokens.get(DPO, 0)
    record = RunRecord(config, world.ranks, synchronize=world.device.type == "cuda")
    store = ArtefactStore(config.record.artefact_folder, world.ranks, record.say)
    prepare = Preparation(config, world, record, store)
    data = prepare.read().data
    few = [shard[:1] for shard in data.shards]
    federation = assemble(config, world, few, record.client_state)

    # Writing, after a warm-up that does not count.
    rows = data.cai_rows
    if not asked.full_epoch:
        rows = rows[: 2 * config.eval.batch_size * world.size]
    _write(config, federation, rows[: world.size])
    written, written_s = _slowest(world, lambda: _write(config, federation, rows))
    pairs = usable(written)
    if not pairs:
        raise none_usable(written, config.cai)

    # Iterations on the usable conversations.
    rounds = config.federation.num_rounds
    aligner = Aligner(
        federation.trainer,
        pairs,
        federation.chat,
        config.cai,
        config.seed,
        rounds,
        pass_tokens,
    )
    size, round_iterations = (
        config.cai.batch_size,
        aligner.iterations,
    )  # timing changes the aligner's
    count = asked.iterations
    if asked.full_epoch:
        count = epoch_iterations(len(aligner.pairs), size)
    steps = timed_steps(
        aligner,
        federation.flat.initial(config.seed),
        world.everyone(),
        count,
        wait=lambda: _synchronise(world),
    )
    each = world.ranks.gather(steps)
    slowest = max(each, key=lambda found: found.total_s)
    return Cost(
        steps=slowest,
        extrapolated_from=min(asked.iterations, count),
        full_epoch=asked.full_epoch,
        num_rows=max(1, round(len(aligner.pairs) / len(rows) * len(data.cai_rows))),
        batch_size=size,
        round_iterations=round_iterations,
        num_rounds=sum(aligner.is_due(round_idx) for round_idx in range(rounds)),
        written_rows=len(rows),
        written_s=written_s,
        asked_rows=len(data.cai_rows),
    )


def _write(config: Config, federation: Resident, rows: Sequence[SquareRow]) -> list[CaiRow]:
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
    """Return the work's result, and the slowest rank's seconds."""
    _synchronise(world)
    began = time.perf_counter()
    done = work()
    _synchronise(world)
    return done, max(world.ranks.gather(time.perf_counter() - began))


def _synchronise(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def parse(arguments: Sequence[str]) -> Asked:
    """Read the command line, without the program's name."""
    parser = Parser(
        prog="fedsim profile --cai",
        usage="[torchrun --nproc_per_node=N -m] fedsim profile --cai [--iterations N] [--full-epoch] [--json FILE] "
        "[CONFIG.yaml] [key=value ...]",
        description=(__doc__ or "").partition("\n\n")[2],
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG.yaml | key=value",
        help="config file and overrides",
    )
    parser.add_argument("--iterations", type=int, default=5, help="iterations that are timed")
    parser.add_argument("--full-epoch", action="store_true", help="time a whole epoch instead")
    parser.add_argument("--json", type=Path, help="write the figures as JSON to this file")
    parser.add_argument(
        "--local_rank",
        "--local-rank",
        type=int,
        help="added by launchers; the same as LOCAL_RANK",
    )
    found = parser.parse_intermixed_args(arguments)

    # One configuration file at most; all other words are overrides.
    files = [word for word in found.words if "=" not in word]
    overrides = [word for word in found.words if "=" in word]
    if len(files) > 1:
        raise ConfigError(
            f"command line: one config file at most, not {len(files)}: {' '.join(files)}",
        )
    if found.iterations < 1:
        raise ConfigError(f"--iterations {found.iterations}: must be >= 1; time one at least")
    config = load_config(Path(files[0]) if files else DEFAULT, overrides)
    if config.cai.iterations == 0:
        raise ConfigError(
            "cai.iterations=0: this configuration has no CAI to cost; set cai.iterations=50, as the paper",
        )
    if found.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(found.local_rank))
    return Asked(only_cai(config), found.iterations, found.full_epoch, found.json)


def only_cai(config: Config) -> Config:
    """The configuration without guard, benchmarks and judge, which CAI does not need."""
    no_benchmark: dict[str, Any] = {
        **dict.fromkeys(OWN, ""),
        "benchmarks": [],
        "guard_judge": "none",
    }
    return replace(
        config,
        guard=replace(config.guard, kind="none"),
        eval=replace(config.eval, **no_benchmark),
        judge=replace(config.judge, kind="none"),
    )


def cost_of(asked: Asked) -> None:
    """Measure, print and write, from rank 0."""
    parallel = asked.config.parallel
    with process_world(
        exact=parallel.exact,
        threads=parallel.threads,
        timeout_s=parallel.timeout_s,
        device=parallel.device,
    ) as world:
        cost = measure(asked, world)
        world.ranks.once(lambda: _show(asked, cost, world))


def _show(asked: Asked, cost: Cost, world: World) -> None:
    """Print the tables, and write the row of JSON where asked."""
    config, machine = asked.config, hardware()
    place = machine["cpu"]
    if world.device.type == "cuda":
        place = torch.cuda.get_device_name(world.device)
    heading = (
        f"CAI of {config.name}: model {config.model.path}, batches of {cost.batch_size}; "
        f"{world.size} process(es), {config.parallel.threads} thread(s) each, {place}"
    )
    facts = {
        "model": config.model.path,
        "num_ranks": world.size,
        "threads": config.parallel.threads,
        "hardware": machine,
        "torch": torch.__version__,
    }
    print(f"\n{page(cost, heading)}", flush=True)
    if asked.file is not None:
        try:
            asked.file.write_text(json.dumps(row(cost, facts)) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"--json {asked.file}: cannot be written ({error.strerror}); give another path",
            ) from error


def main(argv: Sequence[str]) -> int:
    """Cost CAI; a user's error is one line, from rank 0."""
    return launched(lambda: parse(argv), cost_of)
