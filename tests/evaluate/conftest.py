"""Engines that answer from a function, and a tokenizer in which every byte is a token, so that oracles are exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedsim.data.chat import ChatFormat, Conversation, TokenRow, assistant_turn, user_turn
from fedsim.evaluate.benchmark import Benchmark, Result
from fedsim.evaluate.guard_judge import ExchangeJudge
from fedsim.generate.engine import Dialogues, Engine, Replies, Reply, RowScore, Sampling

LLAMA3_TEMPLATE = (
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
UNTRIMMED_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SPECIALS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>"]


def byte_chat(template: str) -> ChatFormat:
    """A chat format whose tokens are bytes and four markers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIALS)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|eot_id|>", pad_token="<|pad|>")
    tokenizer.chat_template = template
    return ChatFormat(tokenizer)


class StubEngine(Engine):
    """An engine without a model.

    Args:
        chat: the chat format.
        reply: what is answered to a conversation.
        logprob: log-probability of a target text after a prompt text.
        max_context: longest row, in tokens (bytes).
    """

    def __init__(
        self,
        chat: ChatFormat,
        reply: Callable[[Conversation], str] | None = None,
        logprob: Callable[[str, str], float] | None = None,
        max_context: int = 100_000,
    ) -> None:
        self.chat = chat
        self.max_context = max_context
        self._reply = reply
        self._logprob = logprob
        self.calls: list[tuple[list[Conversation], Sampling, tuple[int | str, ...]]] = []

    def hold(self, kinds: Sequence[Dialogues]) -> list[Replies]:
        return [self._hold(kind) for kind in kinds]

    def _hold(self, kind: Dialogues) -> Replies:
        assert self._reply is not None
        chats, turns = [list(c) for c in kind.conversations], []
        for turn, key in enumerate(kind.turn_keys):
            if turn:
                for chat, reply, text in zip(chats, turns[-1], kind.follow_ups[turn - 1], strict=True):
                    chat += [assistant_turn(reply.text), user_turn(text)]
            self.calls.append(([list(c) for c in chats], kind.sampling, tuple(key)))
            texts = [self._reply(chat) for chat in chats]
            sizes = [len(text.split()) + 1 for text in texts]
            limit = kind.sampling.max_new_tokens
            turns.append([Reply(t, n, truncated=n > limit) for t, n in zip(texts, sizes, strict=True)])
        return turns

    def score(self, rows: Sequence[TokenRow], name: str) -> list[RowScore]:
        assert self._logprob is not None
        decode = self.chat.tokenizer.decode
        scores = []
        for row in rows:
            prompt = decode(row.input_ids[~row.loss_mask].tolist())
            target = decode(row.input_ids[row.loss_mask].tolist())
            scores.append(RowScore(self._logprob(prompt, target), row.num_targets))
        return scores


@pytest.fixture(scope="session")
def chat() -> ChatFormat:
    """Trims messages, as Llama 3 does."""
    return byte_chat(LLAMA3_TEMPLATE)


@pytest.fixture(scope="session")
def untrimmed_chat() -> ChatFormat:
    """Writes messages as they are."""
    return byte_chat(UNTRIMMED_TEMPLATE)


@pytest.fixture(scope="session")
def stub_engine() -> type[StubEngine]:
    """The class of engines without a model."""
    return StubEngine


def result_of(
    engine: Engine,
    benchmark: Benchmark,
    items: Sequence[Any],
    key: Sequence[int | str] = ("eval",),
    guard: ExchangeJudge | None = None,
) -> Result:
    """A benchmark's result on all items, with its draws named by ``key``."""
    replies = engine.hold(list(benchmark.ask(items, key)))
    return benchmark.measure(engine, items, replies, guard)


@pytest.fixture(scope="session")
def measure() -> Callable[..., Result]:
    """``measure(engine, benchmark, items, key, guard)``: see :func:`result_of`."""
    return result_of
