"""Entry point: ``launch/run.py [--check] [CONFIG.yaml] [key=value …]`` under plain python, ``torchrun
--nproc_per_node=4`` or ``deepspeed --num_gpus 4``; the launcher changes nothing in a run's results."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from fedsim.config import Config, load_config
from fedsim.config.command_line import parse_command
from fedsim.errors import FedsimError


def simulate(config: Config, *, check: bool) -> None:
    """Join the processes, run or only check, and leave them in every case."""
    from fedsim.parallel.world import process_world
    from fedsim.simulation import Simulation

    parallel = config.parallel
    with process_world(exact=parallel.exact, threads=parallel.threads, timeout_s=parallel.timeout_s) as world:
        simulation = Simulation(config, world)
        simulation.check() if check else simulation.run()


def report(error: FedsimError) -> None:
    """The error as one line; torchrun, whose own report follows, is told the cause, so that it also ends with it."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        cause = {"message": str(error), "extraInfo": {"timestamp": int(time.time()) - 1}}  # earliest = root cause
        Path(path).write_text(json.dumps({"message": cause}), encoding="utf-8")


def main() -> int:
    """Run; a user's error is one line, from rank 0 or from the only rank that it concerns."""
    try:
        command = parse_command(sys.argv[1:])
        config = load_config(command.file, command.overrides)
    except FedsimError as error:  # the same on every rank: rank 0 speaks, and the launcher ends the others with it
        if os.environ.get("RANK", "0") != "0":
            time.sleep(10)
            return 2
        report(error)
        return 2
    if command.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(command.local_rank))
    try:
        simulate(config, check=command.check)
    except FedsimError as error:  # leaves simulate() on the first rank that fails; the others end quietly
        report(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
