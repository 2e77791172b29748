"""Batched sampling and scoring over the ranks, used by the guard, CAI and every evaluation.

Rows are sorted by length and cut into fixed units; a unit is computed the same way on whichever
rank it lands, and each row draws from its own key, so the number of ranks changes no token.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from typing import Any, Final, TypeVar, cast

from transformers import PreTrainedModel

from fedsim.base import keyed_random
from fedsim.base.ranks import Ranks
from fedsim.data.chat import ChatFormat, Conversation, TokenRow, assistant_turn, user_turn
from fedsim.data.thoughts import MARKS, Thought, opens_thought, read_reply
from fedsim.fused.joint import adapters_in_use, hold_adapters
from fedsim.generate.batching import generation_units
from fedsim.generate.decode import Decoder, Made, Request
from fedsim.generate.graph import Graphs, can_be_captured, capture_cuda, free_cuda, uses_graphs
from fedsim.generate.score import check_sound, score_unit
from fedsim.model.cost import Work, decode_work, rows_work

T = TypeVar("T")

CUDA_BLOCK: Final = 8
"""Steps between two reads of which rows have ended; each read synchronises with the device."""


@dataclass(frozen=True)
class Sampling:
    """Settings of drawing replies.

    Attributes:
        temperature: 0 takes the most likely token.
        max_new_tokens: a reply that has not ended by then is cut and counted as truncated; at most
            half of the engine's context.
    """

    temperature: float
    max_new_tokens: int


@dataclass(frozen=True)
class Reply:
    """One generated reply.

    Attributes:
        text: the answer, decoded without special tokens and without thoughts, stripped; empty where
            a thought has not ended.
        num_tokens: generated tokens, those of thoughts and the end-of-turn token included.
        truncated: it did not end within ``max_new_tokens`` (or the context).
        prompt_truncated: the prompt was longer than the context and lost its beginning.
        thought: whether thoughts were left out, and whether they ended.
    """

    text: str
    num_tokens: int
    truncated: bool
    prompt_truncated: bool = False
    thought: Thought = "none"


@dataclass(frozen=True)
class RowScore:
    """Sum of a row's target log-probabilities (natural log), and the number of its targets."""

    logprob: float
    num_targets: int

    @property
    def mean(self) -> float:
        """Mean log-probability of a target token; −inf for a row without targets."""
        return self.logprob / self.num_targets if self.num_targets else float("-inf")


@dataclass(frozen=True)
class Dialogues:
    """Conversations that are continued in the same way, over one turn or several.

    Attributes:
        conversations: each ends with a user turn.
        sampling: of every reply.
        turn_keys: of each turn, the key that names its draws, such as ``("eval", "advbench")``; row
            i uses ``(*key, i)``.
        follow_ups: of each turn but the last, what the user says after the reply, by conversation.
    """

    conversations: Sequence[Conversation] = field(repr=False)
    sampling: Sampling
    turn_keys: Sequence[Sequence[keyed_random.KeyPart]]
    follow_ups: Sequence[Sequence[str]] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        assert len(self.turn_keys) == len(self.follow_ups) + 1


Replies = list[list[Reply]]
"""Of dialogues: the replies of each turn, in the order of the conversations."""


@dataclass(frozen=True)
class _Dialogue:
    """One dialogue of a call, which is a row of the decoder.

    Attributes:
        kind: the dialogues that it is one of.
        index: its place among them.
        prompt: token ids of the first turn's prompt, not yet cut to the context.
        limit: most new tokens of a turn.
        length: tokens of the first turn's prompt that fit into the context beside ``limit``.
    """

    kind: Dialogues
    index: int
    prompt: Sequence[int]
    limit: int
    length: int

    @property
    def most_new(self) -> int:
        """Most new tokens over all turns."""
        return self.limit * len(self.kind.turn_keys)


class Engine:
    """Generation and scoring with one model, under the adapter that it holds at each call.

    Args:
        model: a causal LM (PEFT-wrapped or not) on its device; put into eval mode during calls.
        chat: the model's chat format.
        ranks: processes that share the work.
        batch_size: rows that are decoded or scored together.
        max_context: prompt and reply together may have this many tokens.
        seed: the run's seed; with the call's key it fixes every draw.
        on_progress: called with (done, total) rows of this rank; the total is exact where all ranks
            have as many.

    Attributes:
        graph_problem: why CUDA graphs are off, the same on every rank; None while they are on.
        spare_bytes: memory that nothing else needs at any time; slots that fit into it are kept
            between two calls, and their graphs with them.
        on_note: called on every rank with what a user should know, such as that graphs are off; by
            default a warning.
        work: what all ranks together have computed since :meth:`pop_work` was last called.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        chat: ChatFormat,
        ranks: Ranks,
        *,
        batch_size: int,
        max_context: int,
        seed: int,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.model = model
        self.chat = chat
        self.ranks = ranks
        self.batch_size = batch_size
        self.max_context = max_context
        self.seed = seed
        self.on_progress = on_progress
        self.on_note: Callable[[str], None] = self._warn
        self.graph_problem: str | None = None
        self.spare_bytes = 0
        self._kept: Decoder | None = None
        self._kept_adapters: Hashable = None  # in use when its graphs were captured
        self._noted: set[str] = set()
        self.work = Work()

    def pop_work(self) -> Work:
        """Return and reset what all ranks have computed since the last call."""
        done, self.work = self.work, Work()
        return done

    def generate(
        self,
        conversations: Sequence[Conversation],
        sampling: Sampling,
        key: Sequence[keyed_random.KeyPart],
    ) -> list[Reply]:
        """Generate one reply per conversation, in order.

        Args:
            conversations: each ends with a user turn.
            key: names the draws, such as ``("advbench", round_idx)``; row i uses ``(*key, i)``.
        """
        (replies,) = self.converse(conversations, [], sampling, [key])
        return replies

    def converse(
        self,
        conversations: Sequence[Conversation],
        follow_ups: Sequence[Sequence[str]],
        sampling: Sampling,
        turn_keys: Sequence[Sequence[keyed_random.KeyPart]],
    ) -> Replies:
        """Generate the replies of one kind of dialogues; arguments as of :class:`Dialogues`."""
        (replies,) = self.hold([Dialogues(conversations, sampling, turn_keys, follow_ups)])
        return replies

    def hold(self, kinds: Sequence[Dialogues]) -> list[Replies]:
        """Generate the replies of all dialogues together, so that slots are idle in one tail only.

        Keys and values that the cache holds of a conversation's earlier turns are reused. A row's
        draws do not depend on the other rows of the call; its logits may, in their last bits.

        Returns:
            For each kind its replies.

        Raises:
            RunError: the model's logits are not finite.
        """
        # 1. One row per conversation, and units of rows that one rank decodes together.
        rows = self._rows(kinds)
        lengths = [row.length for row in rows]
        most_new = [row.most_new for row in rows]
        units = generation_units(lengths, most_new, self.batch_size)
        costs = []  # tokens of each unit
        for unit in units:
            costs.append(float(sum(lengths[r] + most_new[r] for r in unit)))

        # 2. A decoder with slots for the largest unit; slots that graphs read should not move.
        most_rows = max(map(len, units), default=1)
        decoder = self._decoder(most_rows, max((row.limit for row in rows), default=1))
        if decoder.slots.device.type == "cuda" or decoder.graphs is not None:
            longest = min(self.max_context, self._longest_end(rows))
            decoder.lengthen(longest + decoder.block + 1)

        # 3. Decode: ranks share the units.
        report = self._progress(len(rows))

        def compute(unit: list[int]) -> tuple[list[list[tuple[Made, bool]]], int]:
            return self._decode_unit(decoder, [rows[r] for r in unit], report)

        done = self._run(compute, units, costs)

        # 4. Keep the decoder for the next call where its graphs work and memory has room.
        if decoder.graphs is not None and self.graph_problem is None:
            self._settle_graphs(decoder.graphs)
        has_graphs = decoder.graphs is not None and self.graph_problem is None
        if has_graphs and decoder.slots.num_bytes <= self.spare_bytes:
            self._kept, self._kept_adapters = decoder, adapters_in_use(self.model)

        # 5. Count the work and sort the replies by kind and turn.
        found = self._in_order(units, [turns for turns, _ in done])
        counts = []  # of each turn: cached, prompt and new tokens
        for turns in found:
            for made, _ in turns:
                counts.append((made.num_kept, made.num_prompt, len(made.ids)))
        self.work += decode_work(counts, passes=sum(passes for _, passes in done))
        return self._replies(kinds, found)

    def _rows(self, kinds: Sequence[Dialogues]) -> list[_Dialogue]:
        """Return one row per conversation, kind after kind."""
        rows = []
        for kind in kinds:
            limit = min(kind.sampling.max_new_tokens, self.max_context // 2)
            for index, conversation in enumerate(kind.conversations):
                prompt = self.chat.prompt_ids(conversation)
                length = min(len(prompt), self.max_context - limit)
                rows.append(_Dialogue(kind, index, prompt, limit, length))
        return rows

    def _decode_unit(
        self,
        decoder: Decoder,
        rows: Sequence[_Dialogue],
        report: Callable[[int], None],
    ) -> tuple[list[list[tuple[Made, bool]]], int]:
        """Decode all turns of the rows of one unit.

        Args:
            report: called with 1 whenever a row has ended its last turn.

        Returns:
            By row its turns, each with whether its prompt was cut; and the forward passes.
        """
        chats = [list(row.kind.conversations[row.index]) for row in rows]  # with the turns so far
        is_cut = [[len(row.prompt) > row.length] for row in rows]  # by row, one entry a begun turn

        def next_turn(i: int, ids: list[int]) -> Request | None:
            row, turn = rows[i], len(is_cut[i])
            if turn == len(row.kind.turn_keys):
                report(1)
                return None
            said = row.kind.follow_ups[turn - 1][row.index]
            chats[i] += [assistant_turn(self._read(ids)[0]), user_turn(said)]
            prompt = self.chat.prompt_ids(chats[i])
            is_cut[i].append(len(prompt) > self.max_context - row.limit)
            return self._request(row, turn, prompt)

        passes_before = decoder.passes
        made = decoder.run([self._request(row, 0, row.prompt) for row in rows], next_turn)
        turns = []
        for of_row, cuts in zip(made, is_cut, strict=True):
            turns.append(list(zip(of_row, cuts, strict=True)))
        return turns, decoder.passes - passes_before

    def _request(self, row: _Dialogue, turn: int, prompt: Sequence[int]) -> Request:
        """Return a turn of a row; a prompt longer than the context loses its beginning."""
        key = row.kind.turn_keys[turn]
        return Request(
            prompt[row.limit - self.max_context :],
            keyed_random.derive(self.seed, "sample", *key, row.index),
            row.limit,
            row.kind.sampling.temperature,
            name=f"{'/'.join(map(str, key))}, row {row.index}",
        )

    def _replies(
        self,
        kinds: Sequence[Dialogues],
        turns_of: Sequence[Sequence[tuple[Made, bool]]],
    ) -> list[Replies]:
        """Return each kind's replies by turn.

        Args:
            turns_of: by row, kind after kind: its turns and whether each one's prompt was cut.
        """
        by_kind = []
        rest = iter(turns_of)
        for kind in kinds:
            replies: Replies = [[] for _ in kind.turn_keys]
            for turns in islice(rest, len(kind.conversations)):
                for of_turn, (made, was_cut) in zip(replies, turns, strict=True):
                    of_turn.append(self._reply(made, was_cut))
            by_kind.append(replies)
        return by_kind

    def _settle_graphs(self, graphs: Graphs) -> None:
        """Switch graphs off on all ranks where one could not use them; shapes and bits stay.

        Sizes whose graphs do not fit into a rank's memory run without a graph on that rank, with
        one note a size.
        """
        found = self.ranks.gather((graphs.problem, graphs.pop_too_large()))
        for rank, (problem, sizes) in enumerate(found):
            where = f" on rank {rank}" if self.ranks.size > 1 else ""
            if problem is not None:
                self.graph_problem = f"CUDA graphs of decoding steps are off: {problem}{where}"
                self.on_note(self.graph_problem)
                return
            for size in sizes:
                rows, positions, _ = cast(tuple[int, int, Any], size)
                steps = f"decoding steps of {rows} rows and {positions} positions"
                note = f"{steps} run without a CUDA graph{where}: "
                if note not in self._noted:
                    self._noted.add(note)
                    self.on_note(note + "memory is full; lower eval.batch_size")

    def _warn(self, note: str) -> None:
        if self.ranks.is_main:
            warnings.warn(note, RuntimeWarning, stacklevel=2)

    def _reply(self, made: Made, prompt_truncated: bool) -> Reply:
        text, thought = self._read(made.ids)
        return Reply(text, len(made.ids), not made.ended, prompt_truncated, thought)

    def _read(self, ids: Sequence[int]) -> tuple[str, Thought]:
        """Return the answer in generated ids, and the state of the thoughts before it."""
        plain = self.chat.decode(ids)
        if not self._special_marks:
            return read_reply(plain, opened=self._opens_thought)
        # Some marks are special tokens, which decoding leaves out: look for them first, then remove
        # the others.
        whole = self.chat.tokenizer.decode(list(ids), skip_special_tokens=False)
        assert isinstance(whole, str)
        answer, thought = read_reply(whole, opened=self._opens_thought)
        if thought == "none":
            return plain, thought
        for token in self._special_tokens:
            answer = answer.replace(token, "")
        return answer.strip(), thought

    @cached_property
    def _opens_thought(self) -> bool:
        """Return whether the chat template lets every reply begin inside a thought."""
        return opens_thought(self.chat.render([user_turn("Hello")], reply_follows=True))

    @cached_property
    def _special_tokens(self) -> list[str]:
        """Texts of the tokens that decoding leaves out."""
        tokenizer = self.chat.tokenizer
        texts = {str(token) for token in tokenizer.all_special_tokens}
        for token in tokenizer.added_tokens_decoder.values():
            if token.special:
                texts.add(token.content)
        return sorted(texts)

    @cached_property
    def _special_marks(self) -> bool:
        """Return whether a mark of a thought is, or holds, a special token."""
        for mark in chain.from_iterable(MARKS):
            for token in self._special_tokens:
                if token in mark:
                    return True
        return False

    def _longest_end(self, rows: Sequence[_Dialogue]) -> int:
        """Estimate the position at which the longest row will end, in tokens."""
        sizes: dict[str, int] = {}  # tokens of each follow-up
        longest = 0
        for row in rows:
            end = row.length + row.most_new
            for texts in row.kind.follow_ups:
                text = texts[row.index]
                if text not in sizes:
                    sizes[text] = len(self.chat.prompt_ids([user_turn(text)]))
                end += sizes[text]
            longest = max(longest, end)
        return longest

    def _decoder(self, num_rows: int, max_new_tokens: int) -> Decoder:
        """Return a decoder for the units of one call.

        It is the last call's where that was kept, is large enough, and has the same adapters.
        """
        device = next(self.model.parameters()).device
        num_slots = min(self.batch_size, num_rows)
        kept, self._kept = self._kept, None
        if kept is not None:
            has_slots = kept.slots.num_rows == num_slots
            has_room = kept.state.max_new_tokens >= max_new_tokens
            if has_slots and has_room and self._kept_adapters == adapters_in_use(self.model):
                return kept
        del kept  # free its slots before others are allocated
        graphs = None
        if uses_graphs(device) and can_be_captured(self.model):
            graphs = Graphs(capture_cuda, self.graph_problem, free_cuda)
        return Decoder(
            self.model,
            num_slots,
            max_new_tokens=max_new_tokens,
            eos_ids=self.chat.end_ids,
            graphs=graphs,
            block=CUDA_BLOCK if device.type == "cuda" else 1,
        )

    def score(self, rows: Sequence[TokenRow], name: str) -> list[RowScore]:
        """Sum the log-probabilities of each row's targets (tokens with ``loss_mask``), in order.

        Units are ``batch_size`` rows, however long: logits are computed in chunks of a fixed size
        (:mod:`fedsim.model.logprobs`), so that only the layers' activations grow with the rows'
        lengths.

        Args:
            rows: tokenised rows.
            name: of the rows, for an error.

        Raises:
            RunError: the model's logits are not finite.
        """
        # Rows of similar length share a unit, the longest first, so that memory runs out early.
        order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
        units = []
        costs = []  # tokens of each unit
        for begin in range(0, len(order), self.batch_size):
            unit = order[begin : begin + self.batch_size]
            units.append(unit)
            costs.append(float(sum(len(rows[i]) for i in unit)))
        report = self._progress(len(rows))

        def compute(unit: list[int]) -> list[float]:
            sums = score_unit(self.model, [rows[i] for i in unit])
            report(len(unit))
            return sums

        done = self._run(compute, units, costs)
        self.work += rows_work(rows, passes=len(units))
        sums = self._in_order(units, done)
        check_sound(sums, name)
        return [RowScore(value, row.num_targets) for value, row in zip(sums, rows, strict=True)]

    def _run(
        self,
        compute: Callable[[list[int]], T],
        units: list[list[int]],
        costs: list[float],
    ) -> list[T]:
        """Map ``compute`` over the units, shared by the ranks, with the model in eval mode."""
        was_training = self.model.training
        self.model.eval()
        try:
            with hold_adapters(self.model):
                return self.ranks.map(compute, units, costs)
        finally:
            self.model.train(was_training)

    @staticmethod
    def _in_order(units: list[list[int]], values: Sequence[Sequence[T]]) -> list[T]:
        """Return by row the values that are given by unit."""
        by_row: dict[int, T] = {}
        for unit, of_unit in zip(units, values, strict=True):
            for row, value in zip(unit, of_unit, strict=True):
                by_row[row] = value
        return [by_row[row] for row in range(len(by_row))]

    def _progress(self, num_rows: int) -> Callable[[int], None]:
        """Return a function to be called with the number of rows just finished on this rank."""
        share, done = -(-num_rows // self.ranks.size), 0

        def report(count: int) -> None:
            nonlocal done
            done += count
            if self.on_progress is not None:
                self.on_progress(done, max(share, done))

        return report
