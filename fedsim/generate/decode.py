"""Continuous batching over the slots of one KV cache, for rows of one turn or several.

A row that ends a turn goes on in its slot with the next one, whose prompt reuses the keys and
values of the prefix that it shares with the slot's content; after the last turn the slot is free
for the next row. Rows that decode are always the first slots, so that a step computes no row that
has ended. A row's draws depend only on its seeds, and nothing here depends on other units or on
the number of ranks.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from transformers import PreTrainedModel

from fedsim.attention.forward import packed_logits
from fedsim.attention.kv_cache import Extending, Slots, Stepping, grown, parts_of
from fedsim.attention.spans import put
from fedsim.generate.graph import Graphs
from fedsim.generate.sampling import pick
from fedsim.generate.score import unsound
from fedsim.generate.slot_state import State

PREFILL_TOKENS: Final = 8192
"""Most tokens of one prefill pass, unless a single prompt is longer; bounds activation memory."""

WAITING: Final = 8
"""Prefill once one slot in so many waits: fewer passes against fewer idle slots."""


@dataclass(frozen=True)
class Request:
    """One turn of a row.

    Attributes:
        prompt: token ids, at least one.
        seed: draw t of the turn uses the t-th uniform number of its stream.
        limit: most tokens to generate, at least 1.
        temperature: 0 takes the most likely token (the smallest id of equals).
        name: of the row, for an error.
    """

    prompt: Sequence[int]
    seed: int
    limit: int
    temperature: float
    name: str = "a row"


@dataclass(frozen=True)
class Made:
    """Result of a turn.

    Attributes:
        ids: new tokens, the end token included.
        ended: it ended with an end token, not at its limit.
        num_prompt: tokens of its prompt.
        num_kept: those of them whose keys and values were in the cache.
    """

    ids: list[int]
    ended: bool
    num_prompt: int
    num_kept: int


Then = Callable[[int, list[int]], Request | None]
"""(row, new ids of its ended turn) → its next turn, None after the last; called once a turn."""


@dataclass
class _Row:
    """A row that has a slot: its turn, and how much of the prompt was in the cache."""

    index: int
    request: Request
    num_kept: int = 0


class Decoder:
    """Decoder of units of rows with one model; slots and graphs serve one unit after the other.

    Args:
        model: a Hugging Face causal LM in eval mode, unchanged while the decoder is in use.
        num_slots: rows that are decoded together.
        max_new_tokens: the largest limit of any turn.
        eos_ids: a turn ends with the first of these.
        graphs: replays steps; None runs them without graphs.
        block: steps between two reads of which rows have ended, each of which waits for the device.

    Attributes:
        passes: forward passes so far.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        num_slots: int,
        *,
        max_new_tokens: int,
        eos_ids: frozenset[int],
        graphs: Graphs | None = None,
        block: int = 1,
    ) -> None:
        device = next(model.parameters()).device
        self.model = model
        self.slots = Slots(num_slots, device, int(model.config.get_text_config().num_hidden_layers))
        self.state = State(num_slots, max_new_tokens, device)
        self.graphs = graphs
        self.block = block
        self.passes = 0
        self._eos = torch.tensor(sorted(eos_ids), dtype=torch.int64, device=device)
        self._eos_ids = eos_ids
        # By slot: rows that decode, then rows that wait for their prefill; the others are free.
        self._rows: list[_Row] = []
        self._num_active = 0  # rows that decode
        # Temperatures above 0 (True) and of 0 (False) among the unit's prefilled rows.
        self._kinds: set[bool] = set()

    @torch.inference_mode()
    def run(
        self,
        starts: Sequence[Request],
        then: Then = lambda row, ids: None,
    ) -> list[list[Made]]:
        """Decode all turns of every row of a unit.

        Args:
            starts: the first turn of each row; rows are begun in this order.
            then: gives the next turn of a row.

        Returns:
            The turns of each row, in the order of ``starts``.

        Raises:
            RunError: the model's logits are not finite.
        """
        queue = deque(enumerate(starts))
        made: list[list[Made]] = [[] for _ in starts]
        self._rows, self._num_active, self._kinds = [], 0, set()
        self.slots.clear(0, self.slots.num_rows)
        self.state.clear()
        while queue or self._rows:
            # Give free slots to rows of the queue; their prompts wait for a prefill.
            self._fill(queue)
            num_waiting = len(self._rows) - self._num_active
            are_enough = self._num_active == 0 or num_waiting * WAITING >= self.slots.num_rows
            # Prefill once enough rows wait, else take a block of decoding steps.
            if num_waiting and are_enough:
                self._read_in()
            else:
                self._decode()
            # Take ended turns out, and begin their rows' next ones.
            self._collect(made, then)
        return made

    def _fill(self, queue: deque[tuple[int, Request]]) -> None:
        """Give the free slots to rows of the queue."""
        begin = len(self._rows)
        while queue and len(self._rows) < self.slots.num_rows:
            self._rows.append(_Row(*queue.popleft()))
        if len(self._rows) > begin:
            self.slots.clear(begin, len(self._rows))

    def _read_in(self) -> None:
        """Prefill waiting slots, as many as a pass may hold, and draw the first token of each."""
        # Slots begin … end − 1 are read: the part of each prompt that the cache does not hold.
        begin = end = self._num_active
        news: list[Sequence[int]] = []
        num_new = 0  # tokens of the pass
        while end < len(self._rows):
            row = self._rows[end]
            new = row.request.prompt[row.num_kept :]
            if news and num_new + len(new) > PREFILL_TOKENS:
                break
            news.append(new)
            num_new += len(new)
            end += 1

        # Positions in the cache and per-slot state of these rows.
        rows = range(begin, end)
        requests = [self._rows[slot].request for slot in rows]
        for slot in rows:
            self.slots.lengths[slot] = self._rows[slot].num_kept
        lengths = [len(request.prompt) for request in requests]
        self._reserve(max(lengths))
        temperatures = [request.temperature for request in requests]
        self._kinds |= {temperature > 0 for temperature in temperatures}
        self.state.begin(
            begin,
            lengths,
            [r.limit for r in requests],
            temperatures,
            list(map(_uniforms, requests)),
        )

        # One packed forward pass; logits of each prompt's last token, [end − begin, vocabulary].
        layout = Extending(self.slots, rows, [len(new) for new in news])
        (ids,) = put([np.concatenate(news)], self.slots.device)
        logits = packed_logits(
            self.model,
            ids,
            layout.spans.positions,
            layout,
            layout.spans.query_starts[1:].long() - 1,
        )
        self.slots.lengths[begin:end] = lengths
        self._num_active = end
        self._draw(begin, end, logits)
        self.passes += 1

    def _decode(self) -> None:
        """Take a block of steps with all active slots.

        Replayed steps have few sizes (rows, positions), which depend only on the unit.
        """
        active = self._num_active
        longest = max(self.slots.lengths[:active])
        # A slot that ends within the block still writes behind its end.
        self._reserve(max(self.slots.lengths) + self.block + 1)
        for step in range(1, self.block + 1):
            if self.graphs is None:
                self._step(active, longest + step, self._parts(step))
            else:
                # Rows are rounded up to a power of two, positions to a length of the cache.
                num_rows = min(1 << (active - 1).bit_length(), self.slots.num_rows)
                end = grown(longest + self.block)
                size = (num_rows, end, frozenset(self._kinds))
                replayed = functools.partial(self._step, num_rows, end)
                self.graphs.run(size, replayed, self.state.carried)
        self.passes += self.block

    def lengthen(self, length: int) -> None:
        """Make slots at least ``length`` positions long.

        Graphs of steps that read the shorter slots are dropped.
        """
        before = self.slots.capacity
        self.slots.lengthen(length)
        if self.graphs is not None and self.slots.capacity != before:
            self.graphs.clear()

    def _reserve(self, length: int) -> None:
        self.lengthen(length)
        self.slots.reserve(length)

    def _parts(self, step: int) -> list[tuple[slice, int]] | None:
        """Return the rows that a CPU attends together in a step of the block, and their longest.

        None on a GPU, where one kernel attends all rows.
        """
        if self.slots.device.type != "cpu":
            return None
        ends = [length + step for length in self.slots.lengths[: self._num_active]]
        return parts_of(ends, self.slots.position_bytes)

    def _step(
        self,
        num_rows: int,
        longest: int,
        parts: list[tuple[slice, int]] | None = None,
    ) -> torch.Tensor:
        """Draw one token for each of the first slots; reads and writes tensors only.

        Args:
            num_rows: slots of the step.
            longest: positions of the longest of them, the new token included.
            parts: see :meth:`_parts`.

        Returns:
            The logits that the tokens were drawn from, ``[num_rows, vocabulary]``.
        """
        state = self.state
        rows, places = state.rows[:num_rows], state.places[:num_rows]
        layout = Stepping(self.slots, rows, places, longest, parts)
        logits = packed_logits(self.model, state.ids[:num_rows], places[None], layout, None)
        self._draw(0, num_rows, logits)
        return logits

    def _draw(self, begin: int, end: int, logits: torch.Tensor) -> None:
        """Draw a token for slots ``begin`` … ``end`` − 1 from ``[end − begin, vocabulary]``."""
        state = self.state
        # The largest logit is NaN if any of the row's is; a single −∞ may bar a token.
        largest = logits.amax(dim=-1, keepdim=True)  # [end − begin, 1]
        tokens = pick(
            logits,
            largest,
            state.uniforms_of(begin, end),
            state.temperatures[begin:end],
            self._kinds,
        )
        state.advance(begin, end, tokens, largest[:, 0].isfinite(), self._eos)

    def _collect(self, made: list[list[Made]], then: Then) -> None:
        """Take ended turns out of the active slots.

        Args:
            made: by row, to which the turns are added.
        """
        # Wait for the device: new tokens, whether the turn goes on, whether logits were finite.
        counts, alive, sound = self.state.read(self._num_active)
        if not all(sound):
            name = self._rows[sound.index(0)].request.name
            raise unsound(name)
        ended = [slot for slot in range(self._num_active) if not alive[slot]]
        for slot in range(self._num_active):
            num_prompt = len(self._rows[slot].request.prompt)
            self.slots.lengths[slot] = num_prompt + counts[slot] - 1  # the last token is not cached
        longest = max(self.slots.lengths)

        # Record the ended turns and ask for the next ones.
        outs = self.state.outs(ended, [counts[slot] for slot in ended])
        following = []
        for slot, ids in zip(ended, outs, strict=True):
            row = self._rows[slot]
            turn = Made(ids, ids[-1] in self._eos_ids, len(row.request.prompt), row.num_kept)
            made[row.index].append(turn)
            following.append(then(row.index, ids))

        # Reorder the slots, from the last: active rows first, then waiting ones.
        order = list(range(self.slots.num_rows))
        for slot, ids, request in reversed(list(zip(ended, outs, following, strict=True))):
            self._retire(slot, ids, request, order)
        self._move(order, longest)

    def _retire(self, slot: int, ids: list[int], request: Request | None, order: list[int]) -> None:
        """Move a row behind the active ones, among the waiting; without a next turn, remove it.

        Args:
            slot: the row's slot.
            ids: new tokens of its ended turn.
            request: its next turn, None if it has none.
            order: for each slot, the slot that still holds its content; exchanged with the rows.
        """

        def exchange(one: int, other: int) -> None:
            self._rows[one], self._rows[other] = self._rows[other], self._rows[one]
            order[one], order[other] = order[other], order[one]

        row = self._rows[slot]
        if request is None:
            self.slots.lengths[order[slot]] = 0
        else:
            cached = [*row.request.prompt, *ids[:-1]]
            num_kept = common_prefix(cached, request.prompt)
            self._rows[slot] = _Row(row.index, request, num_kept)
            self.slots.lengths[order[slot]] = num_kept
        self._num_active -= 1
        exchange(slot, self._num_active)
        if request is None:
            exchange(self._num_active, len(self._rows) - 1)
            self._rows.pop()

    def _move(self, order: list[int], longest: int) -> None:
        """Move the content of slots to where their rows are now, in one copy.

        Args:
            order: for each slot, the slot that holds its content.
            longest: most positions of a slot.
        """
        moved = [slot for slot, source in enumerate(order) if slot != source]
        if not moved:
            return
        # Slots with content come first; empty ones are not copied.
        moved.sort(key=lambda slot: self.slots.lengths[order[slot]] == 0)
        sources = [order[slot] for slot in moved]
        num_full = sum(self.slots.lengths[source] > 0 for source in sources)
        to, source = put([np.array(moved), np.array(sources)], self.slots.device)
        self.slots.move(order, to[:num_full], source[:num_full], longest)
        self.state.move(order, to, source)


def _uniforms(request: Request) -> np.ndarray:
    """Return the uniform numbers that a turn draws with, fp64 ``[limit]``; none if it is greedy."""
    count = request.limit if request.temperature > 0 else 0
    return np.random.Generator(np.random.Philox(key=request.seed)).random(count)


def common_prefix(cached: Sequence[int], prompt: Sequence[int]) -> int:
    """Return the number of leading ids of ``prompt`` that the cache holds.

    At most all but one: the logits of the last must be computed.
    """
    shared = min(len(cached), len(prompt) - 1)
    differs = np.flatnonzero(np.asarray(cached[:shared]) != np.asarray(prompt[:shared]))
    return int(differs[0]) if len(differs) else shared
