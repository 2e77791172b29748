"""One run: ``fedsim run [--check] [CONFIG.yaml] [key=value …]``, by itself or under torchrun or deepspeed.

The launcher changes nothing in a run's results. ``launch/run.py`` is the same command as a script
of a clone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from fedsim.base.launching import launched
from fedsim.config import Config, load_config
from fedsim.config.command_line import Command, parse_command


def simulate(command: Command, config: Config) -> None:
    """Join the processes, run or only check, and leave them in every case."""
    from fedsim.parallel.world import process_world
    from fedsim.run.simulation import Simulation

    if command.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(command.local_rank))
    parallel = config.parallel
    with process_world(
        exact=parallel.exact,
        threads=parallel.threads,
        timeout_s=parallel.timeout_s,
        device=parallel.device,
    ) as world:
        simulation = Simulation(config, world)
        if command.check:
            simulation.check()
        else:
            simulation.run()


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status.

    Args:
        argv: words of the command line; None = this process's.
    """

    def read() -> tuple[Command, Config]:
        command = parse_command(sys.argv[1:] if argv is None else argv)
        return command, load_config(command.file, command.overrides)

    return launched(read, lambda asked: simulate(*asked))
