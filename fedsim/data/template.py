"""A tokenizer's chat template: messages in, text out, and how a reply ends in it.

Templates are programs of a model's author. What fedsim relies on is tried on probes when a model is loaded
(:meth:`fedsim.data.chat.ChatFormat.check`), and every conversation is searched for its messages after it was written.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from fedsim.base.errors import ModelError

Messages = Sequence[Mapping[str, Any]]

_DATE: Final = "26 Jul 2024"  # the default of Llama 3.1's template
_RULE: Final = (
    "fedsim gives content as text, not as a list of parts, and needs every message once, unaltered and in order; use a "
    "model whose template writes them so, or correct chat_template.jinja"
)
PROBES: Final = tuple(f'7{n}1 Kite  {n} flies\n\n over "A & B" <c>, isn\'t it? 7{n}2' for n in range(4))
"""Unusual texts, all different: letters of both cases, blanks, line ends and signs that templates are seen to alter."""
THOUGHT: Final = "<think>Up.</think> "
"""A thought, which templates of thinking models cut from earlier replies (:func:`fedsim.data.markers.cut_marks`)."""


class Template:
    """Writes messages as a tokenizer's chat template does.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.

    Raises:
        ModelError: the tokenizer has no chat template, or several and no default.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.name = repr(tokenizer.name_or_path)
        if not tokenizer.chat_template:
            raise ModelError(
                f"tokenizer {self.name} has no chat template: use an instruction-tuned model, or add "
                "chat_template.jinja to its directory"
            )
        try:
            tokenizer.get_chat_template()
        except ValueError as error:
            raise ModelError(
                f"tokenizer {self.name} has several chat templates, and none is its default: keep the one to use, in "
                "chat_template.jinja"
            ) from error

    def write(self, messages: Messages, reply_follows: bool) -> str:
        """The messages as the template writes them; ``reply_follows`` adds the assistant header.

        Raises:
            ModelError: the template cannot write messages of these roles.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                [{"role": m["role"], "content": m["content"]} for m in messages],
                tokenize=False,
                add_generation_prompt=reply_follows,
                chat_template=_undated(self.tokenizer),
                date_string=_DATE,  # what Llama's templates take in the place of today's date
                enable_thinking=False,  # Qwen 3 and others: the reply itself is what is trained and measured
            )
        except Exception as error:  # a template is a program: its own errors, the sandbox's, or one of any operation
            said = " ".join(str(error).split())[:300] or type(error).__name__
            raise ModelError(
                f"chat template of {self.name} cannot write a conversation of the roles {_roles(messages)}: {said}; "
                "use a model whose template can"
            ) from error
        assert isinstance(text, str)
        return text

    def require_all(self, messages: Messages, text: str) -> None:
        """Require that the text written of the messages holds them in order; blanks at their ends may be gone.

        Raises:
            ModelError: one is not there, altered, or at another place.
        """
        place = 0
        for number, message in enumerate(messages, 1):
            content = message["content"].strip()
            place = text.find(content, place)
            if place < 0:
                raise ModelError(
                    f"chat template of {self.name} drops, alters or moves message {number} of a conversation of the "
                    f"roles {_roles(messages)}: {_RULE}"
                )
            place += len(content)

    def require_once(self, messages: Messages, text: str) -> None:
        """As :meth:`require_all`, for messages of which none is part of another: each stands there once.

        Raises:
            ModelError: it does not.
        """
        self.require_all(messages, text)
        for number, message in enumerate(messages, 1):
            times = text.count(message["content"])
            if times != 1:
                raise ModelError(
                    f"chat template of {self.name} writes message {number} of a conversation of the roles "
                    f"{_roles(messages)} {times} times: {_RULE}"
                )


@dataclass(frozen=True)
class Ending:
    """The end of a reply.

    Attributes:
        ids: the tokens that end one.
        last: the one that ends a training row, where the template writes none after the last reply.
        num_behind: how many tokens the template writes behind the end token of the last reply, which nobody meets as
            generation has stopped; None where it writes no end token.
    """

    ids: frozenset[int]
    last: int
    num_behind: int | None


def find_ending(template: Template, markers: Collection[str], stop_ids: Sequence[int]) -> Ending:
    """Read off probes how replies end.

    Args:
        markers: texts of the tokens that open or close turns.
        stop_ids: what the model's own configuration names.

    Raises:
        ModelError: no token is known that ends a reply.
    """
    tokenizer = template.tokenizer
    eos = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    known = {*eos, *stop_ids}  # generation stops there whatever the template writes
    tokens = tokenizer.added_tokens_decoder

    def ids_of(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    # What stands behind the last reply: its first marker, or known end, closes the reply.
    user, reply, again = ({"role": r, "content": f"PROBE{i}"} for i, r in enumerate(("user", "assistant", "user")))
    exchange = template.write([user, reply], False)
    closing = ids_of(exchange.rpartition(reply["content"])[2].strip()) if reply["content"] in exchange else []
    for place, token in enumerate(closing):
        if token in tokens and (token in known or str(tokens[token]) in markers):
            return Ending(frozenset({*known, token}), token, len(closing) - place - 1)
    if not known:
        raise ModelError(
            f"tokenizer {template.name} has no eos_token, its chat template writes no token after a reply, and neither "
            "generation_config.json nor config.json names one: no reply would ever end; add eos_token to "
            "tokenizer_config.json"
        )

    # None there: what the template writes between a reply and the next message, or what the configuration names.
    between = template.write([user, reply, again], True).partition(reply["content"])[2].partition(again["content"])[0]
    written = [i for i in ids_of(between.strip()) if i in tokens and i in known]
    named = [i for i in eos if i in stop_ids or not stop_ids]
    return Ending(frozenset(known), [*written, *named, *stop_ids][0], None)


def _roles(messages: Messages) -> str:
    return ", ".join(message["role"] for message in messages)


def _undated(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template with a fixed date, where it writes today's: a prompt must not differ from day to day."""
    template = tokenizer.get_chat_template()
    if "strftime_now" not in template:
        return template
    return f"{{%- macro strftime_now(format) -%}}{_DATE}{{%- endmacro %}}{template}"
