"""Entry point: ``torchrun --nproc_per_node=4 launch/run.py [CONFIG.yaml] [key=value …]`` or plain ``python``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from fedsim.config import Config, help_text, load_config
from fedsim.errors import FedsimError

DEFAULT = Path(__file__).parents[1] / "configs" / "demo.yaml"


def parse(arguments: list[str]) -> tuple[Path, list[str]]:
    """The config file and the overrides of a command line."""
    parser = argparse.ArgumentParser(
        prog="launch/run.py",
        usage="[torchrun --nproc_per_node=N] launch/run.py [CONFIG.yaml] [key=value ...]",
        description="Run one simulation of responsible federated LLM training (arXiv 2502.16691).",
        epilog=f"configuration keys, with defaults:\n{help_text()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml | key=value", help="config file and overrides")
    words: list[str] = parser.parse_args(arguments).words
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        parser.error(f"one config file at most, not {len(files)}: {' '.join(files)}")
    return Path(files[0]) if files else DEFAULT, [word for word in words if "=" in word]


def simulate(config: Config) -> None:
    """Join the processes, run, and leave them in every case."""
    from fedsim.parallel.world import process_world
    from fedsim.simulation import Simulation

    parallel = config.parallel
    with process_world(exact=parallel.exact, threads=parallel.threads, timeout_s=parallel.timeout_s) as world:
        Simulation(config, world).run()


def main() -> int:
    """Run; a user's error is one line from rank 0."""
    try:
        simulate(load_config(*parse(sys.argv[1:])))
    except FedsimError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
