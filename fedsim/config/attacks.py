"""Configuration of attacks on the federation: attacking clients and rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedsim.base.errors import ConfigError
from fedsim.config.field import key


@dataclass(frozen=True)
class AttackConfig:
    """One attack; several attacks of a run have different attackers."""

    kind: str = key(
        "",
        "path/to/file.py:Name or module:Name of a class that derives from fedsim.Attack",
    )
    share: float = key(
        0.0,
        "share of all clients that attack; they are drawn with the seed",
        above=0,
        high=1,
    )
    from_round: int = key(1, "first round in which updates are attacked, counted from 1", low=1)
    until_round: int = key(0, "last such round; 0 = the last round of the run", low=0)
    options: dict[str, Any] = key({}, "keyword arguments of the attack")

    def is_on(self, round_idx: int) -> bool:
        """Return whether updates of a round (counted from 0) are attacked."""
        number = round_idx + 1  # the keys count from 1
        if number < self.from_round:
            return False
        return self.until_round == 0 or number <= self.until_round

    def num_attackers(self, num_clients: int) -> int:
        """Return the number of attackers among ``num_clients``, rounded to the nearest."""
        return int(self.share * num_clients + 0.5)


def check_attacks(
    attacks: Sequence[AttackConfig],
    num_clients: int,
    num_rounds: int,
    algorithm: str,
) -> None:
    """Check attacks against the federation.

    Args:
        attacks: of the run.
        num_clients: of the federation.
        num_rounds: of the run.
        algorithm: name of an algorithm with one participant, which has no cohort that could be
            attacked; "" for any other.

    Raises:
        ConfigError: an attack has no attacker or no round, all together have more attackers than
            there are clients, or there is no cohort.
    """
    if attacks and algorithm:
        raise ConfigError(
            f"attacks: federation.algorithm={algorithm} has no cohort to attack; leave attacks out",
        )

    # Each attack has attackers and rounds.
    for place, attack in enumerate(attacks):
        name = f"attacks.{place}"
        if attack.num_attackers(num_clients) == 0:
            raise ConfigError(
                f"{name}.share={attack.share!r}: is no client of "
                f"federation.num_clients={num_clients}; raise it to at least {1 / num_clients:.3g}",
            )
        if attack.until_round and attack.until_round < attack.from_round:
            raise ConfigError(
                f"{name}.until_round={attack.until_round}: must be >= {name}.from_round "
                f"({attack.from_round}), or 0 for the run's last",
            )
        if attack.from_round > num_rounds:
            rule = f"must be <= federation.num_rounds ({num_rounds})"
            raise ConfigError(f"{name}.from_round={attack.from_round}: {rule}")

    # The attackers of different attacks are different clients.
    total = sum(attack.num_attackers(num_clients) for attack in attacks)
    if total > num_clients:
        raise ConfigError(
            f"attacks: have {total} attackers together, more than "
            f"federation.num_clients={num_clients}, and no client takes part in two; lower their "
            "share",
        )
