"""The clients' usable rows as tokens, counts of the others, and the check that someone trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fedsim.base.errors import ConfigError
from fedsim.base.metric import Metric, writes
from fedsim.config import Config
from fedsim.data.chat import ChatFormat, TokenRow, assistant_turn, user_turn
from fedsim.data.square import SquareRow
from fedsim.data.usable import Tally, drop_metrics, why_unusable
from fedsim.federation.attendance import Attendance, attend
from fedsim.federation.participation import Participation

WHAT = "local rows"

LOCAL_DROPS = ("no_targets", "empty_reply", "no_weight")
"""Reasons for which local training drops rows."""


@dataclass(frozen=True, eq=False)
class LocalRows:
    """Rows of everyone who may train.

    Attributes:
        shards: usable rows of each client, or of all clients together.
        tally: counts over all of them.
        num_emptied: clients that held rows of which none is usable; they sit out like those without
            rows.
    """

    shards: list[list[TokenRow]]
    tally: Tally
    num_emptied: int

    def words(self, config: Config) -> str:
        """The counts in one line."""
        text = self.tally.words(WHAT, max_length=limit(config))
        if self.num_emptied:
            text += f"; {self.num_emptied:,} client(s) have none left"
        return text

    @writes(
        Metric("client/num_usable_rows", "rows of all clients that can be trained on", "rows"),
        Metric("client/num_cut_rows", "usable rows cut to local.max_length", "rows"),
        *drop_metrics("client/", LOCAL_DROPS),
    )
    def metrics(self) -> dict[str, int]:
        """``client/…`` counts: usable and cut rows, dropped ones by reason."""
        return {
            "client/num_usable_rows": self.tally.num_usable,
            "client/num_cut_rows": self.tally.num_cut,
            **self.tally.metrics("client/", LOCAL_DROPS),
        }


def limit(config: Config) -> str:
    """The longest row of local training, as messages name it."""
    return f"local.max_length={config.local.max_length}"


def tokenise(chat: ChatFormat, row: SquareRow, max_length: int) -> TokenRow:
    """Tokenise a client's row: question and response, loss on the response, the filter's weight."""
    tokens = chat.training_row([user_turn(row.prompt), assistant_turn(row.response)], max_length)
    return replace(tokens, weight=row.weight)


def local_rows(
    config: Config,
    participation: Participation,
    chat: ChatFormat,
    shards: Sequence[Sequence[SquareRow]],
) -> LocalRows:
    """Tokenise the rows of everyone who may train and drop those that cannot teach anything.

    Args:
        shards: rows of every client, after the filter.

    Raises:
        DataError: no client has a row.
        ConfigError: no client trains in any round, as no row is usable or every drawn client is
            kept away.
    """
    # Usable rows of each shard, and of the others the reasons.
    found: list[list[TokenRow]] = []
    reasons: list[str | None] = []
    num_emptied = 0
    for shard in participation.shards(shards):
        rows = [tokenise(chat, row, config.local.max_length) for row in shard]
        usable = []
        for tokens, row in zip(rows, shard, strict=True):
            reason = why_unusable(chat, tokens, row.response)
            reasons.append(reason)
            if reason is None:
                usable.append(tokens)
        found.append(usable)
        num_emptied += bool(rows) and not usable

    # Counts, and the check that anyone trains.
    num_cut = 0
    for rows in found:
        num_cut += sum(row.truncated for row in rows)
    tally = Tally.of(reasons, num_cut=num_cut)
    if tally.num_usable == 0:
        raise tally.none_left(WHAT, max_length=limit(config))
    check_anyone_trains(config, participation, lambda client: bool(found[client]))
    return LocalRows(found, tally, num_emptied)


def check_local_rows(
    config: Config,
    participation: Participation,
    chat: ChatFormat,
    shards: Sequence[Sequence[SquareRow]],
) -> None:
    """Make the checks of :func:`local_rows` before the filter, on as few rows as suffice.

    Raises:
        DataError, ConfigError: as :func:`local_rows`.
    """
    held = participation.shards(shards)
    known: dict[int, bool] = {}  # clients that have been looked at

    def is_usable(row: SquareRow) -> bool:
        tokens = tokenise(chat, row, config.local.max_length)
        return why_unusable(chat, tokens, row.response) is None

    def able(client: int) -> bool:
        if client not in known:
            known[client] = any(is_usable(row) for row in held[client])
        return known[client]

    if not any(able(client) for client in range(len(held))):
        local_rows(config, participation, chat, shards)  # counts the reasons and raises
    check_anyone_trains(config, participation, able)


def check_anyone_trains(
    config: Config,
    participation: Participation,
    able: Callable[[int], bool],
) -> None:
    """Check that a client trains in at least one round of the run.

    Args:
        able: returns whether a client has usable rows.

    Raises:
        ConfigError: all that are drawn are without rows, drop out or are stragglers that are left
            out.
    """
    # Draw every round's cohort as the run will, until a client trains.
    num_steps = participation.num_steps(config.local.steps)
    num_rounds, failures = config.federation.num_rounds, config.failures
    num_drawn = without_rows = dropped_out = late = 0
    for round_idx in range(num_rounds):
        drawn = participation.drawn(round_idx)
        there = [client for client in drawn if able(client)]
        present: Attendance = attend(drawn, there, num_steps, round_idx, config.seed, failures)
        if present.steps:
            return
        num_drawn += len(drawn)
        without_rows += len(present.sat_out)
        dropped_out += len(present.dropped_out)
        late += len(present.stragglers)

    # No client trains: count the causes.
    causes = {
        f"without usable rows (longer ones than {limit(config)} are cut)": without_rows,
        f"dropped out (failures.dropout_rate={failures.dropout_rate:g})": dropped_out,
        f"left out as stragglers (failures.straggler_rate={failures.straggler_rate:g}, stragglers=drop)": late,
    }
    found = {cause: count for cause, count in causes.items() if count}
    counts = ", ".join(f"{count:,} {cause}" for cause, count in found.items())
    raise ConfigError(
        f"no client trains in any of the {num_rounds:,} round(s): of {num_drawn:,} drawn {counts}; "
        "draw clients that can train (federation.clients_per_round, federation.local_client), or "
        "change these settings"
    )
