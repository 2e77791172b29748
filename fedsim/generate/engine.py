"""Batched sampling and scoring over the ranks, used by the guard, CAI and every evaluation.

Rows are sorted by length and cut into fixed units; a unit is computed the same way on whichever
rank it lands, and each row draws from its own key, so the number of ranks changes no token.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
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
"""Steps between two looks at which rows have ended, where looking stops the device."""


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn.

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
    """Sum of a row's target log-probabilities (natural log) and how many targets there were."""

    logprob: float
    num_targets: int

    @property
    def mean(self) -> float:
        """Mean log-probability of a target token; −inf for a row without targets."""
        return self.logprob / self.num_targets if self.num_targets else float("-inf")


@dataclass(frozen=True)
class Dialogues:
    """Conversations that are continued alike, over one turn or several.

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
    """One of several dialogues: its kind, and its place among them."""

    kind: Dialogues
    index: int

    @property
    def conversation(self) -> Conversation:
        return self.kind.conversations[self.index]


class Engine:
    """Generation and scoring with one model, whatever adapter it holds at the time of the call.

    Args:
        model: a causal LM (PEFT-wrapped or not) on its device; put into eval mode during calls.
        chat: the model's chat format.
        ranks: who shares the work.
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
        """What all ranks have computed since the last call."""
        done, self.work = self.work, Work()
        return done

    def generate(
        self,
        conversations: Sequence[Conversation],
        sampling: Sampling,
        key: Sequence[keyed_random.KeyPart],
    ) -> list[Reply]:
        """One reply per conversation, in order.

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
        """:meth:`hold` of a single kind of dialogues; arguments as of :class:`Dialogues`."""
        (replies,) = self.hold([Dialogues(conversations, sampling, turn_keys, follow_ups)])
        return replies

    def hold(self, kinds: Sequence[Dialogues]) -> list[Replies]:
        """Generate the replies of all dialogues together, so that only one tail of the longest ones
        keeps slots idle.

        What the cache holds of a conversation's earlier turns is not computed again. A row's draws
        are its own, whatever else is generated in the same call; its logits may differ in the last
        bits.

        Returns:
            For each kind its replies.

        Raises:
            RunError: the model's logits are no numbers.
        """
        rows = [_Dialogue(kind, i) for kind in kinds for i in range(len(kind.conversations))]
        limits = [min(row.kind.sampling.max_new_tokens, self.max_context // 2) for row in rows]
        prompts = [self.chat.prompt_ids(row.conversation) for row in rows]
        lengths = [min(len(p), self.max_context - n) for p, n in zip(prompts, limits, strict=True)]
        most_new = [n * len(row.kind.turn_keys) for n, row in zip(limits, rows, strict=True)]

        def request(r: int, turn: int, whole: Sequence[int]) -> Request:
            row, limit = rows[r], limits[r]
            key = row.kind.turn_keys[turn]
            name = f"{'/'.join(map(str, key))}, row {row.index}"
            seed = keyed_random.derive(self.seed, "sample", *key, row.index)
            return Request(
                whole[limit - self.max_context :],
                seed,
                limit,
                row.kind.sampling.temperature,
                name,
            )

        def compute(unit: list[int]) -> tuple[list[list[tuple[Made, bool]]], int]:
            chats = [list(rows[r].conversation) for r in unit]
            cut = [[len(prompts[r]) > lengths[r]] for r in unit]

            def then(i: int, ids: list[int]) -> Request | None:
                turn, kind = len(cut[i]), rows[unit[i]].kind
                if turn == len(kind.turn_keys):
                    report(1)
                    return None
                said = kind.follow_ups[turn - 1][rows[unit[i]].index]
                chats[i] += [assistant_turn(self._read(ids)[0]), user_turn(said)]
                whole = self.chat.prompt_ids(chats[i])
                cut[i].append(len(whole) > self.max_context - limits[unit[i]])
                return request(unit[i], turn, whole)

            before = decoder.passes
            made = decoder.run([request(r, 0, prompts[r]) for r in unit], then)
            return [
                list(zip(*both, strict=True)) for both in zip(made, cut, strict=True)
            ], decoder.passes - before

        report = self._progress(len(rows))
        units = generation_units(lengths, most_new, self.batch_size)
        decoder = self._decoder(max(map(len, units), default=1), max(limits, default=1))
        if decoder.slots.device.type == "cuda" or decoder.graphs is not None:
            decoder.lengthen(
                min(self.max_context, self._end(rows, lengths, most_new)) + decoder.block + 1,
            )
        done = self._run(
            compute,
            units,
            [float(sum(lengths[r] + most_new[r] for r in u)) for u in units],
        )
        if decoder.graphs is not None and self.graph_problem is None:
            self._settle_graphs(decoder.graphs)
        if (
            decoder.graphs is not None
            and self.graph_problem is None
            and decoder.slots.num_bytes <= self.spare_bytes
        ):
            self._kept, self._kept_adapters = decoder, adapters_in_use(self.model)
        found = self._in_order(units, [values for values, _ in done])
        turns = [
            (made.num_kept, made.num_prompt, len(made.ids)) for row in found for made, _ in row
        ]
        self.work += decode_work(turns, passes=sum(passes for _, passes in done))
        replies = iter([[self._reply(*turn) for turn in row] for row in found])
        return [
            [list(turn) for turn in zip(*islice(replies, len(kind.conversations)), strict=True)]
            or [[] for _ in kind.turn_keys]
            for kind in kinds
        ]

    def _settle_graphs(self, graphs: Graphs) -> None:
        """Switch graphs off on all ranks where one could not use them; the steps' shapes, and bits,
        stay.

        Sizes whose graphs do not fit into a rank's memory run without on that rank, which is said
        once.
        """
        for rank, (problem, sizes) in enumerate(
            self.ranks.gather((graphs.problem, graphs.pop_too_large())),
        ):
            where = f" on rank {rank}" if self.ranks.size > 1 else ""
            if problem is not None:
                self.graph_problem = f"CUDA graphs of decoding steps are off: {problem}{where}"
                self.on_note(self.graph_problem)
                return
            for size in sizes:
                rows, positions, _ = cast(tuple[int, int, Any], size)
                note = f"decoding steps of {rows} rows and {positions} positions run without a CUDA graph{where}: "
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
        """The answer in generated ids, and whether there were thoughts before it."""
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
        """True if the chat template lets every reply begin inside a thought."""
        return opens_thought(self.chat.render([user_turn("Hello")], reply_follows=True))

    @cached_property
    def _special_tokens(self) -> list[str]:
        """Texts of the tokens that decoding leaves out."""
        tokenizer = self.chat.tokenizer
        added = [
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        ]
        return sorted({*map(str, tokenizer.all_special_tokens), *added})

    @cached_property
    def _special_marks(self) -> bool:
        """True if a mark of a thought is, or holds, a special token."""
        marks = [mark for pair in MARKS for mark in pair]
        return any(token in mark for token in self._special_tokens for mark in marks)

    def _end(
        self,
        rows: Sequence[_Dialogue],
        lengths: Sequence[int],
        most_new: Sequence[int],
    ) -> int:
        """Where the longest row will end, so that slots that graphs read need not move. A guess is
        enough.
        """
        said = {texts[row.index] for row in rows for texts in row.kind.follow_ups}
        size = {text: len(self.chat.prompt_ids([user_turn(text)])) for text in said}
        ends = [
            length + new + sum(size[texts[row.index]] for texts in row.kind.follow_ups)
            for row, length, new in zip(rows, lengths, most_new, strict=True)
        ]
        return max(ends, default=0)

    def _decoder(self, num_rows: int, max_new_tokens: int) -> Decoder:
        """For the units of one call: the last call's if it is kept and large enough, and the same
        adapters are used.
        """
        device = next(self.model.parameters()).device
        num_slots = min(self.batch_size, num_rows)
        kept, self._kept = self._kept, None
        if kept is not None:
            is_as_large = (
                kept.slots.num_rows == num_slots and kept.state.max_new_tokens >= max_new_tokens
            )
            if is_as_large and self._kept_adapters == adapters_in_use(self.model):
                return kept
        del kept  # before other slots are made
        return Decoder(
            self.model,
            num_slots,
            max_new_tokens=max_new_tokens,
            eos_ids=self.chat.end_ids,
            graphs=Graphs(capture_cuda, self.graph_problem, free_cuda)
            if uses_graphs(device) and can_be_captured(self.model)
            else None,
            block=CUDA_BLOCK if device.type == "cuda" else 1,
        )

    def score(self, rows: Sequence[TokenRow], name: str) -> list[RowScore]:
        """Log-probability of each row's targets (tokens with ``loss_mask``), in order.

        Units are ``batch_size`` rows, however long: logits are computed in chunks of a fixed size
        (:mod:`fedsim.model.logprobs`), so that the activations of the layers alone grow with the
        rows' lengths.

        Args:
            rows: what is scored.
            name: of the rows, for an error.

        Raises:
            RunError: the model's logits are no numbers.
        """
        order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
        units = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]

        def compute(unit: list[int]) -> list[float]:
            sums = score_unit(self.model, [rows[i] for i in unit])
            report(len(unit))
            return sums

        report = self._progress(len(rows))

        done = self._run(compute, units, [float(sum(len(rows[i]) for i in u)) for u in units])
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
        was_training = self.model.training
        self.model.eval()
        try:
            with hold_adapters(self.model):
                return self.ranks.map(compute, units, costs)
        finally:
            self.model.train(was_training)

    @staticmethod
    def _in_order(units: list[list[int]], values: Sequence[Sequence[T]]) -> list[T]:
        """By row what is there by unit."""
        found = {
            i: v
            for unit, those in zip(units, values, strict=True)
            for i, v in zip(unit, those, strict=True)
        }
        return [found[i] for i in range(len(found))]

    def _progress(self, num_rows: int) -> Callable[[int], None]:
        """Takes in how many rows more are finished on this rank."""
        share, done = -(-num_rows // self.ranks.size), 0

        def report(count: int) -> None:
            nonlocal done
            done += count
            if self.on_progress is not None:
                self.on_progress(done, max(share, done))

        return report
