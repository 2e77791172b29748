"""Configuration of clients that fail, do not report or are slow."""

from __future__ import annotations

from dataclasses import dataclass

from fedsim.config.field import key


@dataclass(frozen=True)
class FailuresConfig:
    """Effect of a client's failure on a round, and simulated drop-outs and stragglers."""

    # Real failures.
    on_client_error: str = key(
        "stop",
        "a client that raises an error, becomes NaN or infinite, or exceeds "
        "max_update_norm: stop = the run ends, skip = the round goes on without the client",
        choices=("stop", "skip"),
    )
    min_clients: int = key(
        1,
        "skip: if clients fail and fewer than this number deliver an update, the round ends the "
        "run; 0 = a round may end without any update",
        unit="clients",
        low=0,
    )
    max_update_norm: float = key(
        0.0,
        "an update whose L2 norm is greater counts as a failure; 0 = no bound",
        low=0,
    )

    # Simulated drop-outs and stragglers, drawn with the seed.
    dropout_rate: float = key(
        0.0,
        "simulated: probability that a drawn client does not report in a round",
        low=0,
        below=1,
    )
    straggler_rate: float = key(
        0.0,
        "simulated: probability that a client takes only 1 to local.steps - 1 steps (uniform)",
        low=0,
        high=1,
    )
    stragglers: str = key(
        "partial",
        "partial = a straggler's update counts like any other, drop = it is left out",
        choices=("partial", "drop"),
    )

    def words(self) -> str:
        """Describe the settings: ``skip a client that fails, stop below 1; 20 % drop out``."""
        parts = ["a client that fails ends the run"]
        if self.on_client_error == "skip":
            parts = [f"skip a client that fails, stop below {self.min_clients}"]

        # Settings that are off are left out.
        if self.max_update_norm > 0:
            parts.append(f"updates of a norm of at most {self.max_update_norm:g}")
        if self.dropout_rate > 0:
            parts.append(f"{100 * self.dropout_rate:g} % drop out")
        if self.straggler_rate > 0:
            parts.append(f"{100 * self.straggler_rate:g} % straggle ({self.stragglers})")
        return "; ".join(parts)
