"""Rows for fine-tuning a guard on labelled SQuARe responses (paper §4.1).

Their prompt ids are the same as in scoring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedsim.data.chat import ChatFormat, TokenRow
from fedsim.data.square import SquareRow
from fedsim.safety.guard_format import GuardFormat


def verdict_rows(
    chat: ChatFormat,
    rows: Sequence[SquareRow],
    policy: str,
    max_length: int,
) -> list[TokenRow]:
    """Return rows whose only targets are the verdict and the end of the turn.

    A verdict is ``safe`` or ``unsafe\\n<codes>``.

    Args:
        chat: the guard's chat format.
        rows: labelled rows of the guard set.
        policy: hazard categories, "llama_guard_3" or "square"; ``guard_format.hazard_codes`` maps
            SQuARe's.
        max_length: as in scoring; a row whose conversation was cut is marked ``truncated``, its
            verdict is whole.

    Raises:
        ConfigError, ModelError: as :class:`GuardFormat`.
    """
    form = GuardFormat(chat, policy, max_length)
    return [_row(form, row, max_length) for row in rows]


def _row(form: GuardFormat, row: SquareRow, max_length: int) -> TokenRow:
    """Return the prompt's ids, then the verdict's as targets."""
    prompt, cut = form.prompt(row.prompt, row.response)
    tokens = ChatFormat.join(prompt.tolist(), form.verdict_ids(row.red, row.categories), max_length)
    assert not tokens.truncated, "the prompt leaves room for the verdict"
    return replace(tokens, truncated=cut)
