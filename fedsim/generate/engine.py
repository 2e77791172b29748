"""Batched sampling and scoring over the ranks, used by the guard, CAI and every evaluation.

Rows are sorted by length and cut into fixed units; a unit is computed the same way on whichever rank it lands, and each
row draws from its own key, so the number of ranks changes no token.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, TypeVar

from transformers import PreTrainedModel

from fedsim import keys
from fedsim.data.chat import ChatFormat, Conversation, TokenRow, assistant_turn, user_turn
from fedsim.data.thoughts import MARKS, Thought, opens_thought, read_reply
from fedsim.generate.decode import Decoder, Made, Request
from fedsim.generate.graph import Graphs, can_be_captured, capture_cuda, uses_graphs
from fedsim.generate.score import check_sound, score_unit
from fedsim.generate.units import generation_units
from fedsim.model.cost import Work, decode_work, rows_work
from fedsim.ranks import Ranks

T = TypeVar("T")

CUDA_BLOCK: Final = 8
"""Steps between two looks at which rows have ended, where looking stops the device."""


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn.

    Attributes:
        temperature: 0 takes the most likely token.
        max_new_tokens: a reply that has not ended by then is cut and counted as truncated; at most half of the
            engine's context.
    """

    temperature: float
    max_new_tokens: int


@dataclass(frozen=True)
class Reply:
    """One generated reply.

    Attributes:
        text: the answer, decoded without special tokens and without thoughts, stripped; empty where a thought has not
            ended.
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


class Engine:
    """Generation and scoring with one model, whatever adapter it holds at the time of the call.

    Args:
        model: a causal LM (PEFT-wrapped or not) on its device; put into eval mode during calls.
        chat: the model's chat format.
        ranks: who shares the work.
        batch_size: rows that are decoded or scored together.
        max_context: prompt and reply together may have this many tokens.
        seed: the run's seed; with the call's key it fixes every draw.
        on_progress: called with (done, total) units of this rank.

    Attributes:
        graph_problem: why CUDA graphs are off, the same on every rank; None while they are on.
        on_note: called on every rank with what a user should know, such as that graphs are off; by default a warning.
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
        self.work = Work()

    def pop_work(self) -> Work:
        """What all ranks have computed since the last call."""
        done, self.work = self.work, Work()
        return done

    def generate(
        self, conversations: Sequence[Conversation], sampling: Sampling, key: Sequence[keys.KeyPart]
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
        turn_keys: Sequence[Sequence[keys.KeyPart]],
    ) -> list[list[Reply]]:
        """Several turns of every conversation; what the cache holds of the earlier ones is not computed again.

        Args:
            conversations: each ends with a user turn.
            follow_ups: of each turn but the last, what the user says after the reply, by conversation.
            turn_keys: of each turn, the key that names its draws; row i uses ``(*key, i)``.

        Returns:
            The replies of each turn, in the order of the conversations.

        Raises:
            RunError: the model's logits are no numbers.
        """
        assert len(turn_keys) == len(follow_ups) + 1
        num_new = min(sampling.max_new_tokens, self.max_context // 2)
        room = self.max_context - num_new

        def request(i: int, turn: int, whole: Sequence[int]) -> Request:
            key = turn_keys[turn]
            name = f"{'/'.join(map(str, key))}, row {i}"
            return Request(whole[-room:], keys.derive(self.seed, "sample", *key, i), num_new, name)

        def compute(unit: list[int]) -> tuple[list[list[tuple[Made, bool]]], int]:
            chats = [list(conversations[i]) for i in unit]
            cut = [[len(prompts[i]) > room] for i in unit]

            def then(row: int, ids: list[int]) -> Request | None:
                turn = len(cut[row])
                if turn == len(turn_keys):
                    return None
                i, chat = unit[row], chats[row]
                chat += [assistant_turn(self._read(ids)[0]), user_turn(follow_ups[turn - 1][i])]
                whole = self.chat.prompt_ids(chat)
                cut[row].append(len(whole) > room)
                return request(i, turn, whole)

            before = decoder.passes
            made = decoder.run([request(i, 0, prompts[i]) for i in unit], then)
            return [list(zip(*both, strict=True)) for both in zip(made, cut, strict=True)], decoder.passes - before

        prompts = [self.chat.prompt_ids(c) for c in conversations]
        lengths = [min(len(p), room) for p in prompts]
        units = generation_units(lengths, self.batch_size)
        decoder = self._decoder(max(map(len, units), default=1), sampling.temperature, num_new)
        if decoder.graphs is not None:
            decoder.slots.reserve(min(self.max_context, self._end(lengths, follow_ups, num_new)) + decoder.block + 1)
        done = self._run(compute, units, [float(sum(lengths[i] for i in u)) for u in units])
        if decoder.graphs is not None and self.graph_problem is None:
            self._settle_graphs(decoder.graphs.problem)
        rows = self._in_order(units, [values for values, _ in done])
        turns = [(made.num_kept, made.num_prompt, len(made.ids)) for row in rows for made, _ in row]
        self.work += decode_work(turns, passes=sum(passes for _, passes in done))
        return [[self._reply(*row[turn]) for row in rows] for turn in range(len(turn_keys))]

    def _settle_graphs(self, problem: str | None) -> None:
        """Switch graphs off on all ranks where one could not use them; the steps' shapes, and bits, stay."""
        for rank, found in enumerate(self.ranks.gather(problem)):
            if found is not None:
                where = f" on rank {rank}" if self.ranks.size > 1 else ""
                self.graph_problem = f"CUDA graphs of decoding steps are off: {found}{where}"
                self.on_note(self.graph_problem)
                return

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
        # Some marks are special tokens, which decoding leaves out: look for them first, then remove the others.
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
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        return sorted({*map(str, tokenizer.all_special_tokens), *added})

    @cached_property
    def _special_marks(self) -> bool:
        """True if a mark of a thought is, or holds, a special token."""
        marks = [mark for pair in MARKS for mark in pair]
        return any(token in mark for token in self._special_tokens for mark in marks)

    def _end(self, lengths: Sequence[int], follow_ups: Sequence[Sequence[str]], num_new: int) -> int:
        """Where the longest row will end, so that slots that graphs read need not move. A guess is enough."""
        said = [max(len(self.chat.prompt_ids([user_turn(text)])) for text in texts) for texts in follow_ups if texts]
        return max(lengths, default=0) + num_new + sum(said) + num_new * len(said)

    def _decoder(self, num_rows: int, temperature: float, max_new_tokens: int) -> Decoder:
        """For the units of one call, after which its slots are given back."""
        device = next(self.model.parameters()).device
        return Decoder(
            self.model,
            min(self.batch_size, num_rows),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            eos_ids=self.chat.end_ids,
            graphs=Graphs(capture_cuda, self.graph_problem)
            if uses_graphs(device) and can_be_captured(self.model)
            else None,
            block=CUDA_BLOCK if device.type == "cuda" else 1,
        )

    def score(self, rows: Sequence[TokenRow], name: str) -> list[RowScore]:
        """Log-probability of each row's targets (tokens with ``loss_mask``), in order.

        Units are ``batch_size`` rows, however long: logits are computed in chunks of a fixed size
        (:mod:`fedsim.model.logprobs`), so that the activations of the layers alone grow with the rows' lengths.

        Args:
            rows: what is scored.
            name: of the rows, for an error.

        Raises:
            RunError: the model's logits are no numbers.
        """
        order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
        units = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]

        def compute(unit: list[int]) -> list[float]:
            return score_unit(self.model, [rows[i] for i in unit])

        done = self._run(compute, units, [float(sum(len(rows[i]) for i in u)) for u in units])
        self.work += rows_work(rows, passes=len(units))
        sums = self._in_order(units, done)
        check_sound(sums, name)
        return [RowScore(value, row.num_targets) for value, row in zip(sums, rows, strict=True)]

    def _run(self, compute: Callable[[list[int]], T], units: list[list[int]], costs: list[float]) -> list[T]:
        was_training = self.model.training
        self.model.eval()
        try:
            return self.ranks.map(compute, units, costs, self._progress(len(units)))
        finally:
            self.model.train(was_training)

    @staticmethod
    def _in_order(units: list[list[int]], values: Sequence[Sequence[T]]) -> list[T]:
        """By row what is there by unit."""
        found = {i: v for unit, those in zip(units, values, strict=True) for i, v in zip(unit, those, strict=True)}
        return [found[i] for i in range(len(found))]

    def _progress(self, num_units: int) -> Callable[[int], None] | None:
        report = self.on_progress
        if report is None:
            return None
        share = -(-num_units // self.ranks.size)
        return lambda done: report(done, share)
