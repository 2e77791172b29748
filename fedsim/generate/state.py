"""What a step of decoding reads and writes beside the cache, as tensors that stay where they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fedsim.attention.spans import to_device

_FIELDS = ("ids", "places", "counts", "limits", "alive", "lines", "sound")


class State:
    """One column of numbers per slot.

    Attributes:
        rows: int64 ``[slots]``: 0, 1, …
        ids: int64 ``[slots]``: the token that was drawn last, which the next step reads.
        places: where it goes.
        counts: tokens drawn so far.
        limits: most tokens to draw.
        alive: 1 where the turn goes on, else 0: the column's other numbers stand still.
        lines: the line of ``_out`` and ``_uniforms`` that belongs to the slot's row and moves with it.
        sound: 1 where all tokens of the turn were drawn from numbers, else 0.
    """

    def __init__(self, num_slots: int, max_new_tokens: int, device: torch.device) -> None:
        self.rows = torch.arange(num_slots, device=device)
        self._fields = torch.zeros(len(_FIELDS), num_slots, dtype=torch.int64, device=device)
        self.ids, self.places, self.counts, self.limits, self.alive, self.lines, self.sound = self._fields
        self.lines.copy_(self.rows)
        self._line_of = list(range(num_slots))
        size = (num_slots, max_new_tokens + 1)  # a slot that has ended still writes behind its last token
        self._out = torch.zeros(size, dtype=torch.int64, device=device)
        self._uniforms = torch.zeros(size, dtype=torch.float64, device=device)

    @property
    def carried(self) -> tuple[torch.Tensor, ...]:
        """What a step changes: the columns, and the tokens that were drawn."""
        return self._fields, self._out

    def clear(self) -> None:
        """No slot has a row: all of them stand still at their beginning."""
        self._fields.zero_()
        self.lines.copy_(self.rows)
        self._line_of = list(range(len(self._line_of)))

    def begin(
        self, first: int, lengths: Sequence[int], limits: Sequence[int], uniforms: Sequence[np.ndarray] | None
    ) -> None:
        """Slots from ``first`` on are about to draw the token after prompts of these lengths."""
        assert min(limits) >= 1 and max(limits) < self._out.shape[1]
        last = first + len(lengths)
        zeros, ones = [0] * len(lengths), [1] * len(lengths)
        lines = self._line_of[first:last]
        columns = [zeros, [length - 1 for length in lengths], zeros, list(limits), ones, lines, ones]
        self._fields[:, first:last] = to_device(torch.tensor(columns), self._fields.device)
        if uniforms is not None:
            padded = np.zeros((len(uniforms), self._uniforms.shape[1]))
            for line, drawn in zip(padded, uniforms, strict=True):
                line[: len(drawn)] = drawn
            self._uniforms[self.lines[first:last]] = to_device(torch.from_numpy(padded), self._uniforms.device)

    def uniforms_of(self, first: int, last: int) -> torch.Tensor:
        """fp64 ``[last − first]``: the number that each slot's next token is drawn with."""
        return self._uniforms[self.lines[first:last], self.counts[first:last]]

    def advance(self, first: int, last: int, tokens: torch.Tensor, is_sound: torch.Tensor, eos: torch.Tensor) -> None:
        """Take in the tokens (int64 ``[last − first]``) that were drawn; slots with an end token or at their limit end.

        Args:
            is_sound: bool ``[last − first]``: whether there was a distribution to draw from.
            eos: int64 ``[end tokens]``.
        """
        ids, places, counts, limits, alive, lines, sound = self._fields[:, first:last]
        sound.mul_(is_sound | (alive == 0))
        self._out[lines, counts] = tokens
        ids.copy_(tokens)
        places.add_(alive)
        counts.add_(alive)
        alive.mul_((counts < limits) & (tokens[:, None] != eos).all(dim=1))

    def read(self, num_slots: int) -> tuple[list[int], list[int], list[int]]:
        """``counts``, ``alive`` and ``sound`` of the first slots; waits for the device."""
        counts, alive, sound = self._fields[2::2, :num_slots].tolist()
        return counts, alive, sound

    def outs(self, slots: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
        """Tokens that were drawn in each of these slots, as many as ``counts`` says; waits for the device."""
        if not slots:
            return []
        lines = torch.tensor([self._line_of[slot] for slot in slots], device=self._out.device)
        tokens = self._out[lines, : max(counts)].tolist()
        return [line[:count] for line, count in zip(tokens, counts, strict=True)]

    def exchange(self, one: int, other: int) -> None:
        """Two slots take each other's place."""
        if one != other:
            columns = self._fields[:, [one, other]]
            self._fields[:, [other, one]] = columns
            self._line_of[one], self._line_of[other] = self._line_of[other], self._line_of[one]
