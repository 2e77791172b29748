"""The one chat-template path: conversations in, token ids and loss masks out.

Training, guard, CAI and every evaluation go through :class:`ChatFormat`, so that a prompt has the same ids wherever it
is used. Chat markers inside user text are defused before rendering: data can never forge a turn. transformers renders
in jinja2's sandbox: a template from a model directory can neither reach Python's objects nor files.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypedDict, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from fedsim.data.markers import Markers, normalised, template_markers, token_markers
from fedsim.errors import ModelError


class Message(TypedDict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


Conversation = list[Message]
Ids = Sequence[int] | np.ndarray
T = TypeVar("T")

_PROBE = "probe"
_DATE = "26 Jul 2024"  # the default of Llama 3.1's template


def user_turn(text: str) -> Message:
    """A user's message."""
    return {"role": "user", "content": text}


def assistant_turn(text: str) -> Message:
    """A model's message."""
    return {"role": "assistant", "content": text}


@dataclass(frozen=True, eq=False)
class TokenRow:
    """One tokenised conversation.

    Attributes:
        input_ids: int32 ``[length]``.
        loss_mask: bool ``[length]``; True where a token is a target (the last reply and its end-of-turn token).
        truncated: whether tokens were cut from the end to fit the maximum length.
        weight: how much the row counts in a client's training, 0 to 1 (see guard.action=downweight).
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    truncated: bool = False
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.input_ids)

    @cached_property
    def num_targets(self) -> int:
        """How many tokens the loss is taken on (a row's first token is never a target)."""
        return int(self.loss_mask[1:].sum())


@dataclass(frozen=True, eq=False)
class Prompt:
    """A conversation that a reply follows: as the template writes it, and its token ids (int32 ``[length]``)."""

    text: str
    ids: np.ndarray


class ChatFormat:
    """Turns conversations into token ids with the tokenizer's own chat template.

    Prompts and rows of benchmarks come back at every evaluation: who knows that remembers them here
    (:func:`fedsim.evaluate.tokens.tokenise`). Nothing else is kept: training rows, and turns that follow a reply, do
    not come again.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.

    Attributes:
        end_ids: tokens that end a reply: the tokenizer's end of sequence, and what the template writes after a reply
            where that is another one (Gemma's).

    Raises:
        ModelError: the tokenizer has no end-of-sequence token, or no chat template that works.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise ModelError(
                f"tokenizer {tokenizer.name_or_path!r} has no chat template: use an instruction-tuned model, or add "
                "chat_template.jinja to its directory"
            )
        if tokenizer.eos_token_id is None:
            raise ModelError(f"tokenizer {tokenizer.name_or_path!r} has no eos_token: add one to tokenizer_config.json")
        self.tokenizer = tokenizer
        try:
            tokenizer.get_chat_template()
        except ValueError as error:
            raise ModelError(
                f"tokenizer {tokenizer.name_or_path!r} has several chat templates, and none is its default: keep the "
                "one to use, in chat_template.jinja"
            ) from error
        self._remembered: dict[Hashable, Any] = {}
        self._tokens = Markers(token_markers(tokenizer))
        self.end_ids = frozenset({int(tokenizer.eos_token_id), *self._closing_ids()})

    @cached_property
    def pad_id(self) -> int:
        """Fills the unused places of a batch; never seen by a real token and never a target."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    def defuse(self, text: str) -> str:
        """``text`` with every chat marker broken by a space after its first character (``< |eot_id|>``)."""
        return self._broken(self._markers, text)

    def defuse_tokens(self, text: str) -> str:
        """As :meth:`defuse`, for text that goes into a turn which the template does not write: tokens alone count."""
        return self._broken(self._tokens, text)

    def _broken(self, markers: Markers, text: str) -> str:
        """``text`` without markers, also after the tokenizer's own changes, such as a wide letter made a plain one."""
        broken = markers.break_in(text)
        changed = normalised(self.tokenizer, broken)
        return broken if (again := markers.break_in(changed)) == changed else again

    def render(self, conversation: Sequence[Message], *, reply_follows: bool) -> str:
        """The conversation as the template writes it; ``reply_follows`` adds the assistant header."""
        safe: list[Message] = [{"role": m["role"], "content": self.defuse(m["content"])} for m in conversation]
        return self._write(safe, reply_follows)

    @cached_property
    def _markers(self) -> Markers:
        return Markers({*self._tokens.texts, *template_markers(self._write, self._tokens.texts)})

    def _closing_ids(self) -> list[int]:
        """The special token that the template writes after a reply; none where it writes none."""
        exchange = self._write([user_turn(_PROBE), assistant_turn(_PROBE)], reply_follows=False)
        closing = self.encode(exchange.rpartition(_PROBE)[2].strip())[:1]
        return [i for i in closing if self.tokenizer.convert_ids_to_tokens(i) in self._tokens.texts]

    def _write(self, conversation: Sequence[Message], reply_follows: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                [{"role": m["role"], "content": m["content"]} for m in conversation],
                tokenize=False,
                add_generation_prompt=reply_follows,
                chat_template=_undated(self.tokenizer),
                date_string=_DATE,  # what Llama's templates take in the place of today's date
                enable_thinking=False,  # Qwen 3 and others: the reply itself is what is trained and measured
            )
        except Exception as error:  # a template is a program: its own errors, the sandbox's, or one of any operation
            roles = ", ".join(m["role"] for m in conversation)
            said = " ".join(str(error).split())[:300] or type(error).__name__
            raise ModelError(
                f"chat template of {self.tokenizer.name_or_path!r} cannot write a conversation of the roles {roles}: "
                f"{said}; use a model whose template can"
            ) from error
        assert isinstance(text, str)
        return text

    def encode(self, text: str) -> list[int]:
        """Token ids of already rendered text; no token is added."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def remember(self, key: Hashable, compute: Callable[[], T]) -> T:
        """``compute()``, or what it gave before; it depends on nothing but ``key``, and nobody changes its result.

        For what is the same in every evaluation: nothing is ever forgotten.
        """
        if key not in self._remembered:
            self._remembered[key] = compute()
        found: T = self._remembered[key]
        return found

    def prompt(self, conversation: Sequence[Message]) -> Prompt:
        """The conversation and the assistant header: remembered (:meth:`keep_prompt`), or else computed."""
        kept: Prompt | None = self._remembered.get(("prompt", as_key(conversation))) if self._remembered else None
        return self._prompt(conversation) if kept is None else kept

    def keep_prompt(self, conversation: Sequence[Message], prompt: Prompt | None = None) -> Prompt:
        """Let :meth:`prompt` remember the conversation's, which another rank may have computed."""
        key = ("prompt", as_key(conversation))
        return self.remember(key, lambda: self._prompt(conversation) if prompt is None else prompt)

    def _prompt(self, conversation: Sequence[Message]) -> Prompt:
        text = self.render(conversation, reply_follows=True)
        return Prompt(text, np.asarray(self.encode(text), dtype=np.int32))

    def prompt_ids(self, conversation: Sequence[Message]) -> list[int]:
        """Token ids that the model continues: the conversation and the assistant header."""
        ids: list[int] = self.prompt(conversation).ids.tolist()
        return ids

    def training_row(self, conversation: Sequence[Message], max_length: int) -> TokenRow:
        """Ids and loss mask of a conversation that ends with an assistant turn; the loss is on that turn alone.

        The prompt's ids equal :meth:`prompt_ids` of the conversation without its last turn, so that training sees what
        inference sees. A row longer than ``max_length`` tokens is cut at its end and marked ``truncated``.

        Raises:
            ModelError: the template does not write the prompt as a prefix of the whole conversation.
        """
        assert conversation and conversation[-1]["role"] == "assistant", "a training row ends with an assistant turn"
        prompt = self._prompt(conversation[:-1])
        whole = self.render(conversation, reply_follows=False)
        if not whole.startswith(prompt.text):
            raise ModelError(
                f"chat template of {self.tokenizer.name_or_path!r} writes a finished reply differently from the prompt "
                "that asks for it: fedsim needs a template whose generation prompt is a prefix of the full text"
            )
        return self.join(prompt.ids, self.encode(whole[len(prompt.text) :].rstrip()), max_length)

    @staticmethod
    def join(prompt_ids: Ids, target_ids: Ids, max_length: int) -> TokenRow:
        """A row of prompt ids (masked) followed by target ids (trained), cut to ``max_length``."""
        ids = np.concatenate([np.asarray(part, dtype=np.int32) for part in (prompt_ids, target_ids)])
        mask = np.zeros(len(ids), dtype=bool)
        mask[len(prompt_ids) :] = True
        return TokenRow(ids[:max_length], mask[:max_length], truncated=len(ids) > max_length)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of generated ids without special tokens, stripped at both ends."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        assert isinstance(text, str)
        return text.strip()


def as_key(conversation: Sequence[Message]) -> tuple[tuple[str, str], ...]:
    """A conversation as a key of :meth:`ChatFormat.remember`."""
    return tuple((message["role"], message["content"]) for message in conversation)


def _undated(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template with a fixed date, where it writes today's: a prompt must not differ from day to day."""
    template = tokenizer.get_chat_template()
    if "strftime_now" not in template:
        return template
    return f"{{%- macro strftime_now(format) -%}}{_DATE}{{%- endmacro %}}{template}"
