"""Attacks on a federation: clients that change their rows, or what they report, on purpose.

Attackers are drawn once for a run, and a hook's draws are keyed by attack, round and client, so
that neither depends on the number of processes or on a stop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedsim.base import keyed_random
from fedsim.base.errors import ConfigError
from fedsim.base.user_code import calling
from fedsim.config import AttackConfig
from fedsim.extend import build, title
from fedsim.federation.algorithms import ClientOutcome, ServerState, Updates

if TYPE_CHECKING:
    from fedsim.data.square import SquareRow


class Attack:
    """Hooks of an attack, each of which may be overridden.

    Hooks must keep nothing between calls: a round may be repeated.
    """

    def rows(self, client: int, rows: list[SquareRow], rng: np.random.Generator) -> list[SquareRow]:
        """Change an attacker's rows, once for the whole run, before the filter.

        Args:
            client: the attacker.
            rows: as the partition dealt them.
            rng: this client's own draws.
        """
        return rows

    def outcome(
        self,
        outcome: ClientOutcome,
        state: ServerState,
        rng: np.random.Generator,
        colluders: Updates,
    ) -> ClientOutcome:
        """Change an attacker's report after its honest training.

        Args:
            outcome: the honest report; ``delta``, ``weight`` and ``control_delta`` reach the
                server. Not to be changed in place: ``dataclasses.replace`` makes another.
            state: the server's, from which the clients started.
            rng: this round's and client's own draws.
            colluders: honest updates of the round's attackers, this one's among them, by ascending
                id.
        """
        return outcome


@dataclass(frozen=True)
class ActiveAttack:
    """An attack and the clients that take part in it.

    Attributes:
        place: in the configuration's list.
        settings: share and rounds.
        attack: the hooks.
        clients: the attackers, ascending.
        seed: the run's.
    """

    place: int
    settings: AttackConfig
    attack: Attack
    clients: tuple[int, ...]
    seed: int

    @property
    def name(self) -> str:
        """Name in messages, such as ``attacks.0.kind='my.py:SignFlip'``."""
        return f"attacks.{self.place}.kind={self.settings.kind!r}"

    @property
    def changes_rows(self) -> bool:
        """True if the attack overrides ``rows``."""
        return type(self.attack).rows is not Attack.rows

    @property
    def changes_outcomes(self) -> bool:
        """True if the attack overrides ``outcome``."""
        return type(self.attack).outcome is not Attack.outcome

    def in_round(self, round_idx: int, cohort: Sequence[int]) -> list[int]:
        """Those of a round's clients that attack in it, in their order."""
        if not self.settings.is_on(round_idx):
            return []
        return [client for client in cohort if client in self.clients]

    def changed_rows(self, client: int, rows: Sequence[SquareRow]) -> list[SquareRow]:
        """An attacker's rows.

        Raises:
            ConfigError: the hook fails (its message, which may quote a row, is left out), or
                returns something else than rows.
        """
        # The hook gets a list of its own, to change as it likes.
        rng = keyed_random.generator(self.seed, "attack rows", self.place, client)
        with calling(self.name, ConfigError, quiet=True):
            found = list(self.attack.rows(client, list(rows), rng))
        kinds = {type(row).__name__ for row in found}
        if kinds - {"SquareRow"}:
            listed = ", ".join(sorted(kinds))
            raise ConfigError(f"{self.name}: rows must return SquareRow objects, not {listed}")
        return found

    def changed_outcome(
        self, outcome: ClientOutcome, round_idx: int, state: ServerState, colluders: Updates
    ) -> ClientOutcome:
        """An attacker's report.

        Raises:
            RunError: the hook fails.
            ConfigError: it returns no report of this client, or vectors of another shape or type.
        """
        client = outcome.client
        rng = keyed_random.generator(self.seed, "attack outcome", self.place, round_idx, client)
        colluders = colluders.copied()  # no hook sees what another one has written into it
        with calling(self.name):
            found = self.attack.outcome(outcome, state, rng, colluders)

        # The report must be of this client, with a weight and vectors that the sums can take.
        if not isinstance(found, ClientOutcome) or found.client != client:
            raise ConfigError(
                f"{self.name}: outcome must return this client's ClientOutcome, not {found!r:.100}",
            )
        if not (math.isfinite(found.weight) and found.weight >= 0):
            weight = found.weight
            raise ConfigError(
                f"{self.name}: outcome must keep weight finite and >= 0, is {weight!r}",
            )
        for part in ("delta", "control_delta"):
            old, new = getattr(outcome, part), getattr(found, part)
            if new is old:
                continue
            is_tensor = old is not None and new is not None
            if not is_tensor or new.shape != old.shape or new.dtype != old.dtype:
                raise ConfigError(f"{self.name}: outcome must keep the shape and type of {part}")
        return found

    def words(self, num_clients: int) -> str:
        """Such as ``attack SignFlip: clients 2, 5, 7, 11 (4 of 20), rounds 3 to 9``."""
        settings = self.settings
        listed = ", ".join(map(str, self.clients))
        last = "the last"  # until_round 0
        if settings.until_round > 0:
            last = str(settings.until_round)
        name = title("attacks.kind", settings.kind)
        count = f"{len(self.clients)} of {num_clients}"
        rounds = f"rounds {settings.from_round} to {last}"
        return f"attack {name}: client(s) {listed} ({count}), {rounds}"


def build_attacks(
    attacks: Sequence[AttackConfig],
    num_clients: int,
    seed: int,
) -> list[ActiveAttack]:
    """Build the attacks of a run and draw their attackers, each for one attack only.

    Raises:
        ConfigError: an attack cannot be built, overrides no hook, or changes rows but is limited to
            some rounds.
    """
    if not attacks:
        return []
    # Attacks take their clients from one random order, in turn.
    order = [int(client) for client in keyed_random.permutation(num_clients, seed, "attackers")]
    found = []
    for place, settings in enumerate(attacks):
        count = settings.num_attackers(num_clients)
        members, order = order[:count], order[count:]
        attack = build("attacks.kind", settings.kind, settings.options)
        # Its hooks must fit its settings.
        active = ActiveAttack(place, settings, attack, tuple(sorted(members)), seed)
        if not (active.changes_rows or active.changes_outcomes):
            fix = "must override rows or outcome, or it attacks nothing"
            raise ConfigError(f"{active.name}: {fix}")
        if active.changes_rows and (settings.from_round > 1 or settings.until_round > 0):
            raise ConfigError(
                f"{active.name}: changes rows once for the whole run; leave "
                f"attacks.{place}.from_round at 1 and until_round at 0"
            )
        found.append(active)
    return found
