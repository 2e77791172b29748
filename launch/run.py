"""Entry point: ``launch/run.py [--check] [CONFIG.yaml] [key=value …]`` under plain python, ``torchrun
--nproc_per_node=4`` or ``deepspeed --num_gpus 4``; the launcher changes nothing in a run's results."""

from __future__ import annotations

import os
import sys

from fedsim.base.launching import launched
from fedsim.config import Config, load_config
from fedsim.config.command_line import Command, parse_command


def read() -> tuple[Command, Config]:
    """The command line and the configuration that it names."""
    command = parse_command(sys.argv[1:])
    return command, load_config(command.file, command.overrides)


def simulate(asked: tuple[Command, Config]) -> None:
    """Join the processes, run or only check, and leave them in every case."""
    from fedsim.parallel.world import process_world
    from fedsim.run.simulation import Simulation

    command, config = asked
    if command.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(command.local_rank))
    parallel = config.parallel
    with process_world(
        exact=parallel.exact, threads=parallel.threads, timeout_s=parallel.timeout_s, device=parallel.device
    ) as world:
        simulation = Simulation(config, world)
        simulation.check() if command.check else simulation.run()


def main() -> int:
    """Run; returns the exit status."""
    return launched(read, simulate)


if __name__ == "__main__":
    sys.exit(main())
