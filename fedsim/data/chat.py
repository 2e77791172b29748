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

from fedsim.base.errors import ModelError
from fedsim.data.markers import Markers, cut_marks, normalised, template_markers, token_markers
from fedsim.data.template import PROBES, THOUGHT, Template, find_ending
from fedsim.data.thoughts import opens_thought


class Message(TypedDict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


Conversation = list[Message]
Ids = Sequence[int] | np.ndarray
T = TypeVar("T")

_FIRST_WORDS = ("The", "I", "Yes", "No", "(A)", "safe", "unsafe")
"""First words of replies, to find out if the tokenizer joins the prompt's last spaces with them."""


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

    A row's ids are those of the whole conversation, tokenised at once: a reply encoded apart would get tokens that no
    conversation holds (Llama 2's tokenizer and others put a space before its first word).

    Prompts and rows of benchmarks come back at every evaluation: :func:`fedsim.evaluate.tokens.tokenise` remembers
    them here. Nothing else is kept: training rows, and turns that follow a reply, do not come again.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        stop_ids: tokens at which the model's own configuration ends a reply (:func:`fedsim.model.load.stop_ids`).

    Attributes:
        end_ids: tokens that end a reply, in training and in generation: the tokenizer's end of sequence, ``stop_ids``,
            and what the template writes after a reply where that is another one (Gemma's).
        end_id: the one that ends a training row whose template writes none.
        num_joined: training rows so far in which the tokenizer joined the prompt's end with the reply's beginning.

    Raises:
        ModelError: no token is known that ends a reply, or there is no chat template that works.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.template = Template(tokenizer)
        self.num_joined = 0
        self._remembered: dict[Hashable, Any] = {}
        self._tokens = Markers(token_markers(tokenizer))
        self._ending = find_ending(self.template, self._tokens.texts, stop_ids)
        self.end_ids, self.end_id = self._ending.ids, self._ending.last

    @cached_property
    def pad_id(self) -> int:
        """Fills the unused places of a batch; never seen by a real token and never a target."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return self.end_id

    def check(self, *, trains: bool) -> None:
        """Try the template on probes, so that what is wrong with it shows here and not in the middle of a run.

        Args:
            trains: rows with replies are made too, not prompts alone.

        Raises:
            ModelError: a message is lost, altered, moved or repeated. ``trains`` also needs prompts that begin the
                whole conversation and do not open a thought: clients' replies have none, so a tuned model would answer
                inside a thought that never ends, and its answers would be read as empty.
        """
        user, reply, again, last = PROBES
        reply = self.defuse(THOUGHT + reply)
        conversation: Conversation = [user_turn(user), assistant_turn(reply), user_turn(again), assistant_turn(last)]
        prompt = self.prompt(conversation[:-1])
        self.template.require_once(conversation[:-1], prompt.text)
        if trains:
            if opens_thought(prompt.text):
                raise ModelError(
                    f"chat template of {self.template.name} opens a thought in the prompt that asks for a reply "
                    f"({prompt.text[-30:]!r}), and the replies that are trained on have no thoughts: use a model whose "
                    "template obeys enable_thinking=False, or remove the opening mark from chat_template.jinja"
                )
            whole = self.render(conversation, reply_follows=False)
            self.template.require_once(conversation, whole)
            self.continuation(prompt, whole)

    def notes(self) -> list[str]:
        """Remarks for the user on how the training rows so far were made, one line each."""
        notes = []
        if self.left_to_reply:
            notes.append(
                f"prompts leave out the last {len(self.left_to_reply)} space(s) of the template's: the tokenizer joins "
                "them with a reply's first word"
            )
        if self.num_joined:
            notes.append(
                f"{self.num_joined:,} row(s): the tokenizer joins the prompt's last characters with the reply's first "
                "(line ends or brackets, say); the token of both is the first target"
            )
        return notes

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
        """The conversation as the template writes it; ``reply_follows`` adds the assistant header.

        Raises:
            ModelError: the template refuses the roles, or a message is lost, altered or moved.
        """
        safe: list[Message] = [{"role": m["role"], "content": self.defuse(m["content"])} for m in conversation]
        text = self.template.write(safe, reply_follows)
        self.template.require_all(safe, text)
        return text

    @cached_property
    def _markers(self) -> Markers:
        written = template_markers(self.template.write, self._tokens.texts)
        return Markers({*self._tokens.texts, *written, *cut_marks(self.tokenizer.get_chat_template())})

    @cached_property
    def left_to_reply(self) -> str:
        """Spaces at the end of the template's prompt that the tokenizer joins with a reply's first word.

        Prompts leave them out, in training, scoring and generation: behind ``"A:"`` comes ``" The"``, one token.
        """
        asked: Conversation = [user_turn("kite")]
        prompt = self.template.write(asked, True)
        spaces = prompt[len(prompt.rstrip(" ")) :]
        if spaces:
            ids = self.encode(prompt)
            for word in _FIRST_WORDS:
                whole = self.template.write([*asked, assistant_turn(word)], False)
                if whole.startswith(prompt) and self.encode(whole)[: len(ids)] != ids:
                    return spaces
        return ""

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
        text = self.render(conversation, reply_follows=True).removesuffix(self.left_to_reply)
        return Prompt(text, np.asarray(self.encode(text), dtype=np.int32))

    def prompt_ids(self, conversation: Sequence[Message]) -> list[int]:
        """Token ids that the model continues: the conversation and the assistant header."""
        ids: list[int] = self.prompt(conversation).ids.tolist()
        return ids

    def continuation(self, prompt: Prompt, whole: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a prompt and of what follows it in ``whole``: together those of ``whole``, tokenised at once.

        The prompt's ids are those that the model continues in generation, and all of them where they begin the ids of
        ``whole``. Where the tokenizer joins the two texts (a line end with the reply's own), the prompt is what both
        have in common.

        Raises:
            ModelError: ``whole`` does not begin with the prompt.
        """
        if not whole.startswith(prompt.text):
            raise ModelError(
                f"chat template of {self.template.name} writes a finished reply differently from the prompt that asks "
                "for it: fedsim needs a template whose generation prompt is a prefix of the full text"
            )
        ids = np.asarray(self.encode(whole), dtype=np.int32)
        shared = min(len(ids), len(prompt.ids))
        differs = np.flatnonzero(ids[:shared] != prompt.ids[:shared])
        size = int(differs[0]) if len(differs) else shared
        return ids[:size], ids[size:]

    def ended(self, target_ids: np.ndarray) -> np.ndarray:
        """Ids of a reply and of what the template writes behind it, up to its end token or with one behind them."""
        behind = self._ending.num_behind
        if behind is None:
            return np.append(target_ids, np.int32(self.end_id))
        return target_ids[: len(target_ids) - behind]

    def training_row(self, conversation: Sequence[Message], max_length: int) -> TokenRow:
        """Ids and loss mask of a conversation that ends with an assistant turn; the loss is on that turn alone.

        The prompt's ids equal :meth:`prompt_ids` of the conversation without its last turn, so that training sees what
        inference sees (:meth:`continuation`). The last target is the token at which generation stops. A row longer
        than ``max_length`` tokens is cut at its end and marked ``truncated``.

        Raises:
            ModelError: the template does not write the prompt as a prefix of the whole conversation.
        """
        assert conversation and conversation[-1]["role"] == "assistant", "a training row ends with an assistant turn"
        prompt = self._prompt(conversation[:-1])
        whole = self.render(conversation, reply_follows=False)
        start = len(prompt.text)
        prompt_ids, target_ids = self.continuation(prompt, whole[:start] + whole[start:].rstrip())
        self.num_joined += len(prompt_ids) < len(prompt.ids)
        return self.join(prompt_ids, self.ended(target_ids), max_length)

    @staticmethod
    def join(prompt_ids: Ids, target_ids: Ids, max_length: int) -> TokenRow:
        """A row of prompt ids (masked) followed by target ids (trained), cut to ``max_length``."""
        ids = np.concatenate([np.asarray(part, dtype=np.int32) for part in (prompt_ids, target_ids)])
        mask = np.zeros(len(ids), dtype=bool)
        mask[len(prompt_ids) :] = True
        return TokenRow(ids[:max_length], mask[:max_length], truncated=len(ids) > max_length)

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Text of ids, stripped at both ends; without special tokens unless ``special``."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=not special)
        assert isinstance(text, str)
        return text.strip()


def as_key(conversation: Sequence[Message]) -> tuple[tuple[str, str], ...]:
    """A conversation as a key of :meth:`ChatFormat.remember`."""
    return tuple((message["role"], message["content"]) for message in conversation)
