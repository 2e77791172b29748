"""Entry point: ``torchrun --nproc_per_node=4 launch/run.py [--check] [CONFIG.yaml] [key=value …]`` or plain python."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from fedsim.config import Config, help_text, load_config
from fedsim.errors import ConfigError, FedsimError

EPILOG = """Without CONFIG.yaml, configs/demo.yaml is used, which sets many of these keys.
A file may name another that it builds on (base: OTHER.yaml).
Configuration keys, with the values that they have when neither a file nor the command line sets them:
"""
DEFAULT = Path(__file__).parents[1] / "configs" / "demo.yaml"


def parse(arguments: list[str]) -> tuple[Path, list[str], bool]:
    """The config file and the overrides of a command line, and whether to check only."""
    parser = argparse.ArgumentParser(
        prog="launch/run.py",
        usage="[torchrun --nproc_per_node=N] launch/run.py [--check] [CONFIG.yaml] [key=value ...]",
        description="Run one simulation of responsible federated LLM training (arXiv 2502.16691).",
        epilog=EPILOG + help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml | key=value", help="config file and overrides")
    parser.add_argument("--check", action="store_true", help="check everything, print the plan of the run, and stop")
    options = parser.parse_args(arguments)
    words: list[str] = options.words
    files = [word for word in words if "=" not in word]
    if bad := [word for word in files if not word.endswith((".yaml", ".yml"))]:
        raise ConfigError(f"argument {bad[0]!r}: must be a config file (*.yaml) or key=value")
    if len(files) > 1:
        parser.error(f"one config file at most, not {len(files)}: {' '.join(files)}")
    return Path(files[0]) if files else DEFAULT, [word for word in words if "=" in word], options.check


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
        path, overrides, check = parse(sys.argv[1:])
        config = load_config(path, overrides)
    except FedsimError as error:  # the same on every rank: rank 0 speaks, and torchrun ends the others with it
        if os.environ.get("RANK", "0") != "0":
            time.sleep(10)
            return 2
        report(error)
        return 2
    try:
        simulate(config, check=check)
    except FedsimError as error:  # leaves simulate() on the first rank that fails; the others end quietly
        report(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
