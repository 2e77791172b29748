"""Conversations to token ids and loss masks, through the tokenizer's chat template.

Training, guard, CAI and every evaluation go through :class:`ChatFormat`, so that a prompt has the
same ids wherever it is used. Chat markers inside user text are defused before rendering: data can
never forge a turn. transformers renders in jinja2's sandbox: a template from a model directory can
neither reach Python's objects nor files.
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
"""First words of replies, to see if the tokenizer joins the prompt's last spaces with them."""


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
        loss_mask: bool ``[length]``; True where a token is a target (the last reply and its
            end-of-turn token).
        truncated: whether tokens were cut from the end to fit the maximum length.
        weight: of the row in a client's training, 0 to 1 (see guard.action=downweight).
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    truncated: bool = False
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.input_ids)

    @cached_property
    def num_targets(self) -> int:
        """Number of tokens in the loss (a row's first token is never a target)."""
        return int(self.loss_mask[1:].sum())


@dataclass(frozen=True, eq=False)
class Prompt:
    """A conversation that a reply follows: its rendered text and token ids (int32 ``[length]``)."""

    text: str
    ids: np.ndarray


class ChatFormat:
    """Conversion of conversations into token ids with the tokenizer's own chat template.

    A row's ids are those of the whole conversation, tokenised at once: a reply encoded by itself
    would get tokens that no conversation holds (Llama 2's tokenizer and others put a space before
    its first word).

    Prompts and rows of benchmarks recur at every evaluation:
    :func:`fedsim.evaluate.tokens.tokenise` remembers them here. Nothing else is kept: training
    rows, and turns that follow a reply, do not recur.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        stop_ids: tokens at which the model's own configuration ends a reply
            (:func:`fedsim.model.load.stop_ids`).

    Attributes:
        end_ids: tokens that end a reply, in training and in generation: the tokenizer's end of
            sequence, ``stop_ids``, and what the template writes after a reply where that is another
            one (Gemma's).
        end_id: the one that ends a training row whose template writes none.
        num_joined: training rows so far in which the tokenizer joined the prompt's end with the
            reply's beginning.

    Raises:
        ModelError: no token is known that ends a reply, or no chat template works.
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
        """Id of padding, to which no token attends and which is no target."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return self.end_id

    def check(self, *, trains: bool) -> None:
        """Try the template on probes, so that its faults show here and not in the middle of a run.

        Args:
            trains: rows with replies are made too, not only prompts.

        Raises:
            ModelError: a message is lost, altered, moved or repeated. ``trains`` also needs prompts
                that begin the whole conversation and do not open a thought: clients' replies have
                none, so a tuned model would answer inside a thought that never ends, and its
                answers would be read as empty.
        """
        # A prompt of two turns and a reply with a thought.
        user, reply, again, last = PROBES
        reply = self.defuse(THOUGHT + reply)
        conversation: Conversation = [
            user_turn(user),
            assistant_turn(reply),
            user_turn(again),
            assistant_turn(last),
        ]
        prompt = self.prompt(conversation[:-1])
        self.template.require_once(conversation[:-1], prompt.text)

        # The whole conversation, which must begin with the prompt.
        if trains:
            if opens_thought(prompt.text):
                raise ModelError(
                    f"chat template of {self.template.name} opens a thought in the prompt that "
                    f"asks for a reply ({prompt.text[-30:]!r}), and the replies that are trained "
                    "on have no thoughts: use a model whose template obeys enable_thinking=False, "
                    "or remove the opening mark from chat_template.jinja"
                )
            whole = self.render(conversation, reply_follows=False)
            self.template.require_once(conversation, whole)
            self.continuation(prompt, whole)

    def notes(self) -> list[str]:
        """Remarks for the user on how the training rows so far were made, one line each."""
        notes = []
        if self.left_to_reply:
            notes.append(
                f"prompts leave out the last {len(self.left_to_reply)} space(s) of the template's: "
                "the tokenizer joins them with a reply's first word"
            )
        if self.num_joined:
            notes.append(
                f"{self.num_joined:,} row(s): the tokenizer joins the prompt's last characters "
                "with the reply's first (line ends or brackets, say); the token of both is the "
                "first target"
            )
        return notes

    def defuse(self, text: str) -> str:
        """Break every chat marker by a space after its first character (``< |eot_id|>``)."""
        return self._broken(self._markers, text)

    def defuse_tokens(self, text: str) -> str:
        """As :meth:`defuse`, but for tokens only: for turns that the template does not write."""
        return self._broken(self._tokens, text)

    def _broken(self, markers: Markers, text: str) -> str:
        """``text`` without markers, also after the tokenizer's normalisation."""
        broken = markers.break_in(text)
        changed = normalised(self.tokenizer, broken)
        again = markers.break_in(changed)
        if again == changed:  # normalisation makes no marker
            return broken
        return again

    def render(self, conversation: Sequence[Message], *, reply_follows: bool) -> str:
        """Render a conversation by the template; ``reply_follows`` adds the assistant header.

        Raises:
            ModelError: the template refuses the roles, or a message is lost, altered or moved.
        """
        safe: list[Message] = []
        for message in conversation:
            safe.append({"role": message["role"], "content": self.defuse(message["content"])})
        text = self.template.write(safe, reply_follows)
        self.template.require_all(safe, text)
        return text

    @cached_property
    def _markers(self) -> Markers:
        """Markers of the template and the tokenizer."""
        written = template_markers(self.template.write, self._tokens.texts)
        return Markers(
            {*self._tokens.texts, *written, *cut_marks(self.tokenizer.get_chat_template())},
        )

    @cached_property
    def left_to_reply(self) -> str:
        """Spaces at the prompt's end that the tokenizer joins with a reply's first word.

        Prompts leave them out, in training, scoring and generation: ``"A:"`` is followed by ``"
        The"``, one token.
        """
        asked: Conversation = [user_turn("kite")]
        prompt = self.template.write(asked, True)
        spaces = prompt[len(prompt.rstrip(" ")) :]
        if spaces:
            # Joined, if the prompt's ids do not begin those of prompt and reply.
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
        """Result of ``compute()``, cached for ever: for what is the same in every evaluation.

        Args:
            key: all that the result depends on.
            compute: its result must not be changed in place.
        """
        if key not in self._remembered:
            self._remembered[key] = compute()
        found: T = self._remembered[key]
        return found

    def prompt(self, conversation: Sequence[Message]) -> Prompt:
        """The conversation and the assistant header; cached (:meth:`keep_prompt`) or computed."""
        kept: Prompt | None = None
        if self._remembered:  # the key takes time to make
            kept = self._remembered.get(("prompt", as_key(conversation)))
        if kept is None:
            return self._prompt(conversation)
        return kept

    def keep_prompt(self, conversation: Sequence[Message], prompt: Prompt | None = None) -> Prompt:
        """Let :meth:`prompt` remember a prompt, which another rank may have computed."""

        def compute() -> Prompt:
            if prompt is None:
                return self._prompt(conversation)
            return prompt

        return self.remember(("prompt", as_key(conversation)), compute)

    def _prompt(self, conversation: Sequence[Message]) -> Prompt:
        """Render and tokenise the conversation and the assistant header."""
        text = self.render(conversation, reply_follows=True).removesuffix(self.left_to_reply)
        return Prompt(text, np.asarray(self.encode(text), dtype=np.int32))

    def prompt_ids(self, conversation: Sequence[Message]) -> list[int]:
        """Token ids for the model to continue: the conversation and the assistant header."""
        ids: list[int] = self.prompt(conversation).ids.tolist()
        return ids

    def continuation(self, prompt: Prompt, whole: str) -> tuple[np.ndarray, np.ndarray]:
        """Split the ids of ``whole``, tokenised at once, into the prompt's and the rest.

        The prompt's ids are those that the model continues in generation. Where the tokenizer joins
        the two texts (a line end with the reply's own), only the ids before the joined token count
        as the prompt's.

        Returns:
            Ids of the prompt and of what follows it, int32 ``[length]`` each.

        Raises:
            ModelError: ``whole`` does not begin with the prompt.
        """
        if not whole.startswith(prompt.text):
            raise ModelError(
                f"chat template of {self.template.name} writes a finished reply differently from "
                "the prompt that asks for it: fedsim needs a template whose generation prompt is "
                "a prefix of the full text"
            )
        ids = np.asarray(self.encode(whole), dtype=np.int32)
        # The prompt ends where its ids first differ from those of the whole.
        size = min(len(ids), len(prompt.ids))
        differs = np.flatnonzero(ids[:size] != prompt.ids[:size])
        if len(differs) > 0:
            size = int(differs[0])
        return ids[:size], ids[size:]

    def ended(self, target_ids: np.ndarray) -> np.ndarray:
        """End a reply's ids with its end token: cut what follows it, or append one."""
        behind = self._ending.num_behind
        if behind is None:
            return np.append(target_ids, np.int32(self.end_id))
        return target_ids[: len(target_ids) - behind]

    def training_row(self, conversation: Sequence[Message], max_length: int) -> TokenRow:
        """Tokenise a conversation that ends with an assistant turn; the loss is on that turn only.

        The prompt's ids equal :meth:`prompt_ids` of the conversation without its last turn, so that
        training sees the same ids as inference (:meth:`continuation`). The last target is the token
        at which generation stops. A row longer than ``max_length`` tokens is cut at its end and
        marked ``truncated``.

        Raises:
            ModelError: the template does not write the prompt as a prefix of the whole
                conversation.
        """
        ends_with_reply = bool(conversation) and conversation[-1]["role"] == "assistant"
        assert ends_with_reply, "a training row ends with an assistant turn"
        prompt = self._prompt(conversation[:-1])
        whole = self.render(conversation, reply_follows=False)
        start = len(prompt.text)
        prompt_ids, target_ids = self.continuation(prompt, whole[:start] + whole[start:].rstrip())
        self.num_joined += len(prompt_ids) < len(prompt.ids)
        return self.join(prompt_ids, self.ended(target_ids), max_length)

    @staticmethod
    def join(prompt_ids: Ids, target_ids: Ids, max_length: int) -> TokenRow:
        """A row of prompt ids (masked) followed by target ids (trained), cut to ``max_length``."""
        parts = [np.asarray(part, dtype=np.int32) for part in (prompt_ids, target_ids)]
        ids = np.concatenate(parts)
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
