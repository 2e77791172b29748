"""Simulations from Python: ``fedsim.simulate`` in the calling process, such as a notebook's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedsim.base.errors import FedsimError, RunError
from fedsim.config import Config, flat_from_file, from_flat, to_flat, with_overrides
from fedsim.parallel.world import process_world
from fedsim.record.metrics import Row, read_rows
from fedsim.record.outcomes import read_items
from fedsim.run.simulation import Simulation


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        config: of the run.
        folder: the run directory.
    """

    config: Config
    folder: Path

    @property
    def metrics(self) -> list[Row]:
        """Flat records of metrics.jsonl, oldest first.

        ``pandas.DataFrame(result.metrics)`` is a table of them.
        """
        return read_rows(self.folder / "metrics.jsonl")

    @property
    def items(self) -> list[dict[str, Any]]:
        """Outcomes of single benchmark items, one record for each.

        A record has ``evaluation``, ``figure``, ``item`` (its place, counted from 0) and ``value``.
        """
        found = []
        # One file for each evaluation, with one column for each figure.
        for path in sorted((self.folder / "items").glob("*.csv")):
            for figure, values in read_items(path).items():
                for item, value in enumerate(values.tolist()):
                    record = {"evaluation": path.stem, "figure": figure, "item": item}
                    found.append({**record, "value": value})
        return found

    @property
    def adapter(self) -> Path:
        """Folder of the global adapter, for ``PeftModel.from_pretrained``."""
        return self.folder / "adapter"

    @property
    def summary(self) -> Path:
        """File of the summary, in Markdown."""
        return self.folder / "summary.md"


def simulate(config: str | Path | Config | Mapping[str, Any], **overrides: Any) -> Result:
    """Run a simulation in this process and return its results.

    A run that was interrupted is resumed, and a finished one is only read. It prints progress as
    the command does. Ctrl-C raises KeyboardInterrupt; the same call then resumes after the last
    finished round. Under torchrun every process calls it alike.

    Args:
        config: a YAML file's path, keys with their values (nested or dotted), or a configuration.
        overrides: further keys: ``seed=1``, ``federation={"num_rounds": 2}``,
            ``**{"local.lr": 1e-4}``.

    Returns:
        The run directory and readers of its parts.

    Raises:
        FedsimError: with the message that the command would print as ``error: …``.
    """
    asked = configuration(config, overrides)
    parallel = asked.parallel
    try:
        with (
            _torch_as_it_was(),
            process_world(
                exact=parallel.exact,
                threads=parallel.threads,
                timeout_s=parallel.timeout_s,
                device=parallel.device,
                signals=False,
            ) as world,
        ):
            Simulation(asked, world).run()
    except SystemExit as ended:
        cause = ended.__cause__
        if isinstance(cause, FedsimError):
            raise cause from None
        # Of several processes another one has the error's text.
        raise RunError("another process of the run failed") from None
    return Result(asked, asked.folder)


def configuration(
    config: str | Path | Config | Mapping[str, Any],
    overrides: Mapping[str, Any],
) -> Config:
    """Make the configuration from the arguments of :func:`simulate`."""
    # Dotted keys with their values.
    if isinstance(config, Config):
        flat = to_flat(config)
    elif isinstance(config, str | Path):
        flat = flat_from_file(Path(config))
    else:
        flat = dict(config)
    return from_flat(with_overrides(flat, overrides))


@contextmanager
def _torch_as_it_was() -> Iterator[None]:
    """Restore torch's settings after a run, which changes them for the whole process."""
    threads = torch.get_num_threads()
    is_exact = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(is_exact, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
