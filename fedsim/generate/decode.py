"""Continuous batching: rows in the slots of one KV cache, each drawing from its own key, over one
turn or several.

A row that ends a turn goes on in its slot with the next one, whose prompt reuses the keys and
values that it has in common with what the slot holds; after the last turn the slot is the next
row's. Rows that decode are always the first slots, so that a step computes no row that has ended.
The numbers of a row come from its seeds alone, and nothing here depends on other units or on the
number of ranks.
"""

from __future__ import annotations

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
"""Most tokens that one pass reads beside a single longer prompt; it bounds the memory of
activations.
"""

WAITING: Final = 8
"""Rows are read in together once one in so many slots waits: fewer passes against fewer idle slots.
"""


@dataclass(frozen=True)
class Request:
    """One turn of a row.

    Attributes:
        prompt: token ids, at least one.
        seed: draw t of the turn uses the t-th uniform number of its stream.
        limit: most tokens to generate, at least 1.
        temperature: 0 takes the most likely token (the smallest id of equals).
        name: what an error calls it.
    """

    prompt: Sequence[int]
    seed: int
    limit: int
    temperature: float
    name: str = "a row"


@dataclass(frozen=True)
class Made:
    """What a turn gave.

    Attributes:
        ids: new tokens, the end token included.
        ended: it ended by itself.
        num_prompt: tokens of its prompt.
        num_kept: those of them whose keys and values stood in the cache.
    """

    ids: list[int]
    ended: bool
    num_prompt: int
    num_kept: int


Then = Callable[[int, list[int]], Request | None]
"""(row, new ids of the turn that it has ended) to its next turn, None after the last; called once a
turn, in order.
"""


@dataclass
class _Row:
    """A row that has a slot: its turn, and how much of the prompt was in the cache."""

    index: int
    request: Request
    num_kept: int = 0


class Decoder:
    """Decodes units of rows with one model; slots and graphs serve one unit after the other.

    Args:
        model: a Hugging Face causal LM in eval mode, unchanged while the decoder is in use.
        num_slots: rows that are decoded together.
        max_new_tokens: the largest limit of any turn.
        eos_ids: a turn ends with the first of these.
        graphs: replays steps; None runs them as they are.
        block: steps between two looks at which rows have ended, each of which waits for the device.

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
        self._rows: list[
            _Row
        ] = []  # by slot: those that decode, then those that wait; the other slots are free
        self._num_active = 0
        self._kinds: set[bool] = set()  # whether rows draw; those of the unit that has been read

    @torch.inference_mode()
    def run(
        self,
        starts: Sequence[Request],
        then: Then = lambda row, ids: None,
    ) -> list[list[Made]]:
        """All turns of every row of a unit, by row. Rows are begun in the given order.

        Raises:
            RunError: the model's logits are no numbers.
        """
        queue = deque(enumerate(starts))
        made: list[list[Made]] = [[] for _ in starts]
        self._rows, self._num_active, self._kinds = [], 0, set()
        self.slots.clear(0, self.slots.num_rows)
        self.state.clear()
        while queue or self._rows:
            self._fill(queue)
            num_waiting = len(self._rows) - self._num_active
            if num_waiting and (
                self._num_active == 0 or num_waiting * WAITING >= self.slots.num_rows
            ):
                self._read_in()
            else:
                self._decode()
            self._collect(made, then)
        return made

    def _fill(self, queue: deque[tuple[int, Request]]) -> None:
        """Give the free slots to rows that have none."""
        begin = len(self._rows)
        while queue and len(self._rows) < self.slots.num_rows:
            self._rows.append(_Row(*queue.popleft()))
        if len(self._rows) > begin:
            self.slots.clear(begin, len(self._rows))

    def _read_in(self) -> None:
        """Prefill the slots that wait, as many as a pass may hold, and draw the first token of
        each.
        """
        begin = end = self._num_active
        news: list[Sequence[int]] = []
        while end < len(self._rows):
            row = self._rows[end]
            new = row.request.prompt[row.num_kept :]
            if news and sum(map(len, news)) + len(new) > PREFILL_TOKENS:
                break
            news.append(new)
            end += 1
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
        """Take a block of steps with all active slots; a replayed one has few sizes, which the unit
        alone decides.
        """
        active = self._num_active
        longest = max(self.slots.lengths[:active])
        self._reserve(
            max(self.slots.lengths) + self.block + 1,
        )  # a slot that has ended still writes behind its end
        for step in range(1, self.block + 1):
            if self.graphs is None:
                self._step(active, longest + step, self._parts(step))
            else:
                size = (
                    min(1 << (active - 1).bit_length(), self.slots.num_rows),
                    grown(longest + self.block),
                )
                whole = (*size, frozenset(self._kinds))
                self.graphs.run(whole, lambda size=size: self._step(*size), self.state.carried)  # type: ignore[misc]
        self.passes += self.block

    def lengthen(self, length: int) -> None:
        """Make slots at least ``length`` positions long; graphs of steps that read shorter ones are
        forgotten.
        """
        before = self.slots.capacity
        self.slots.lengthen(length)
        if self.graphs is not None and self.slots.capacity != before:
            self.graphs.clear()

    def _reserve(self, length: int) -> None:
        self.lengthen(length)
        self.slots.reserve(length)

    def _parts(self, step: int) -> list[tuple[slice, int]] | None:
        """Rows that a CPU attends together in the block's step; a GPU attends all at once, by one
        kernel.
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
        """One token of each of the first slots; touches tensors alone.

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
        state = self.state
        largest = logits.amax(dim=-1, keepdim=True)
        tokens = pick(
            logits,
            largest,
            state.uniforms_of(begin, end),
            state.temperatures[begin:end],
            self._kinds,
        )
        state.advance(
            begin,
            end,
            tokens,
            largest[:, 0].isfinite(),
            self._eos,
        )  # NaN if any is; −∞ may bar a token

    def _collect(self, made: list[list[Made]], then: Then) -> None:
        """Take what has ended out of the active slots."""
        counts, alive, sound = self.state.read(self._num_active)
        if not all(sound):
            name = self._rows[sound.index(0)].request.name
            raise unsound(name)
        ended = [slot for slot in range(self._num_active) if not alive[slot]]
        for slot in range(self._num_active):
            row = self._rows[slot]
            self.slots.lengths[slot] = (
                len(row.request.prompt) + counts[slot] - 1
            )  # the last token has not been read
        longest = max(self.slots.lengths)
        outs = self.state.outs(ended, [counts[slot] for slot in ended])
        following = []
        for slot, ids in zip(ended, outs, strict=True):
            row = self._rows[slot]
            turn = Made(ids, ids[-1] in self._eos_ids, len(row.request.prompt), row.num_kept)
            made[row.index].append(turn)
            following.append(then(row.index, ids))
        order = list(range(self.slots.num_rows))
        for slot, ids, request in reversed(list(zip(ended, outs, following, strict=True))):
            self._retire(slot, ids, request, order)
        self._move(order, longest)

    def _retire(self, slot: int, ids: list[int], request: Request | None, order: list[int]) -> None:
        """Put a row behind the active ones: with those that wait for their next turn, or out.

        Args:
            order: by slot, where what is to be in it still is; exchanged with the rows.
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
        """Move the content of slots, ``longest`` positions at most, to where the rows are now, all
        at once.
        """
        moved = [slot for slot, source in enumerate(order) if slot != source]
        if not moved:
            return
        moved.sort(
            key=lambda slot: self.slots.lengths[order[slot]] == 0,
        )  # what is empty is not copied
        num_full = sum(self.slots.lengths[order[slot]] > 0 for slot in moved)
        to, source = put(
            [np.array(moved), np.array([order[slot] for slot in moved])],
            self.slots.device,
        )
        self.slots.move(order, to[:num_full], source[:num_full], longest)
        self.state.move(order, to, source)


def _uniforms(request: Request) -> np.ndarray:
    """The numbers that a turn draws with; a greedy one takes none."""
    count = request.limit if request.temperature > 0 else 0
    return np.random.Generator(np.random.Philox(key=request.seed)).random(count)


def common_prefix(cached: Sequence[int], prompt: Sequence[int]) -> int:
    """How many leading ids of ``prompt`` the cache holds, less than all: the last one's logits must
    be computed.
    """
    shared = min(len(cached), len(prompt) - 1)
    differs = np.flatnonzero(np.asarray(cached[:shared]) != np.asarray(prompt[:shared]))
    return int(differs[0]) if len(differs) else shared
