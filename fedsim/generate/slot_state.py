"""Per-slot tensors of decoding, other than the KV cache, at fixed addresses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fedsim.attention.spans import put, to_device

_FIELDS = ("ids", "places", "counts", "limits", "alive", "lines", "sound", "temperatures")


class State:
    """State of the slots: one column of numbers each.

    Attributes:
        rows: int64 ``[slots]``: 0, 1, …
        ids: int64 ``[slots]``: the token that was drawn last, which the next step reads.
        places: where it goes.
        counts: tokens drawn so far.
        limits: most tokens to draw.
        alive: 1 where the turn goes on, else 0: the column's other numbers no longer change.
        lines: the line of ``_out`` and ``_uniforms`` that belongs to the slot's row and moves with
            it.
        sound: 1 where all tokens of the turn were drawn from finite logits, else 0.
        temperatures: fp64 ``[slots]``: of the draws.
    """

    def __init__(self, num_slots: int, max_new_tokens: int, device: torch.device) -> None:
        self.rows = torch.arange(num_slots, device=device)
        self._fields = torch.zeros(len(_FIELDS), num_slots, dtype=torch.int64, device=device)
        (
            self.ids,
            self.places,
            self.counts,
            self.limits,
            self.alive,
            self.lines,
            self.sound,
            bits,
        ) = self._fields
        # Kept as bits in the same tensor, so that one copy moves all columns.
        self.temperatures = bits.view(torch.float64)
        self.lines.copy_(self.rows)
        self.temperatures.fill_(1.0)
        self._line_of = list(range(num_slots))
        # New tokens and their uniforms; a slot that has ended still writes behind its last token.
        size = (num_slots, max_new_tokens + 1)
        self._out = torch.zeros(size, dtype=torch.int64, device=device)
        self._uniforms = torch.zeros(size, dtype=torch.float64, device=device)

    @property
    def max_new_tokens(self) -> int:
        """Most tokens of a turn."""
        return self._out.shape[1] - 1

    @property
    def carried(self) -> tuple[torch.Tensor, ...]:
        """Tensors that a step changes: the columns, and the drawn tokens."""
        return self._fields, self._out

    def clear(self) -> None:
        """Reset all slots: none has a row."""
        self._fields.zero_()
        self.lines.copy_(self.rows)
        self.temperatures.fill_(1.0)
        self._line_of = list(range(len(self._line_of)))

    def begin(
        self,
        first: int,
        lengths: Sequence[int],
        limits: Sequence[int],
        temperatures: Sequence[float],
        uniforms: Sequence[np.ndarray],
    ) -> None:
        """Prepare slots from ``first`` on to draw the token that follows their prompts.

        Args:
            first: the first of the slots.
            lengths: tokens of each prompt.
            limits: most new tokens of each row.
            temperatures: of each row's draws.
            uniforms: of each row the numbers that it draws with, as many as its limit; none of a
                greedy row.
        """
        assert min(limits) >= 1 and max(limits) < self._out.shape[1]
        last = first + len(lengths)
        zeros, ones = [0] * len(lengths), [1] * len(lengths)
        lines = self._line_of[first:last]
        bits = np.array(temperatures, dtype=np.float64).view(np.int64).tolist()
        places = [length - 1 for length in lengths]
        # One row a field, in the order of _FIELDS: int64 [fields, slots].
        columns = [zeros, places, zeros, list(limits), ones, lines, ones, bits]
        self._fields[:, first:last] = to_device(torch.tensor(columns), self._fields.device)
        # Uniforms, padded to the longest limit: fp64 [slots, most new tokens + 1].
        if any(map(len, uniforms)):
            padded = np.zeros((len(uniforms), self._uniforms.shape[1]))
            for line, drawn in zip(padded, uniforms, strict=True):
                line[: len(drawn)] = drawn
            self._uniforms[self.lines[first:last]] = to_device(
                torch.from_numpy(padded),
                self._uniforms.device,
            )

    def uniforms_of(self, first: int, last: int) -> torch.Tensor:
        """Return the number that each slot's next token is drawn with, fp64 ``[last − first]``."""
        return self._uniforms[self.lines[first:last], self.counts[first:last]]

    def advance(
        self,
        first: int,
        last: int,
        tokens: torch.Tensor,
        is_sound: torch.Tensor,
        eos: torch.Tensor,
    ) -> None:
        """Store drawn tokens; slots with an end token or at their limit end.

        Args:
            first: the first of the slots.
            last: one behind the last of them.
            tokens: int64 ``[last − first]``.
            is_sound: bool ``[last − first]``: the token was drawn from finite logits.
            eos: int64 ``[end tokens]``.
        """
        ids, _, counts, limits, alive, lines, sound, _ = self._fields[:, first:last]
        sound.mul_(is_sound | (alive == 0))
        self._out[lines, counts] = tokens
        ids.copy_(tokens)
        self._fields[1:3, first:last].add_(alive)  # places and counts
        alive.mul_((counts < limits) & (tokens[:, None] != eos).all(dim=1))

    def read(self, num_slots: int) -> tuple[list[int], list[int], list[int]]:
        """Read ``counts``, ``alive`` and ``sound`` of the first slots; waits for the device."""
        counts, alive, sound = self._fields[2:7:2, :num_slots].tolist()
        return counts, alive, sound

    def outs(self, slots: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
        """Read the first ``counts`` drawn tokens of each of ``slots``; waits for the device."""
        if not slots:
            return []
        (lines,) = put([np.array([self._line_of[slot] for slot in slots])], self._out.device)
        tokens = self._out[lines, : max(counts)].tolist()
        return [line[:count] for line, count in zip(tokens, counts, strict=True)]

    def move(self, order: Sequence[int], to: torch.Tensor, source: torch.Tensor) -> None:
        """Give slot i the content of slot ``order[i]``.

        Args:
            order: a permutation of the slots.
            to: int64 ``[moved]``, on the device: the slots that get another's content.
            source: int64 ``[moved]``, on the device: the slots that it comes from.
        """
        self._fields.index_copy_(1, to, self._fields.index_select(1, source))
        self._line_of = [self._line_of[slot] for slot in order]
