"""Chat templates of tokenizers: messages to text, and the end of a reply.

Templates are programs by a model's author. The properties that fedsim needs are tried on probes
when a model is loaded (:meth:`fedsim.data.chat.ChatFormat.check`), and every rendered conversation
is searched for its messages.
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
    "fedsim gives content as text, not as a list of parts, and needs every message once, "
    "unaltered and in order; use a model whose template writes them so, or correct "
    "chat_template.jinja"
)
_PROBE: Final = '7{n}1 Kite  {n} flies\n\n over "A & B" <c>, isn\'t it? 7{n}2'
PROBES: Final = tuple(_PROBE.format(n=n) for n in range(4))
"""Different unusual texts: both cases, blanks, line ends and signs that some templates alter."""
THOUGHT: Final = "<think>Up.</think> "
"""A thought, which templates of thinking models cut from earlier replies."""


class Template:
    """Renderer of messages by a tokenizer's chat template.

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
                f"tokenizer {self.name} has no chat template: use an instruction-tuned model, or "
                "add chat_template.jinja to its directory"
            )
        try:
            tokenizer.get_chat_template()
        except ValueError as error:
            raise ModelError(
                f"tokenizer {self.name} has several chat templates, and none is its default: keep "
                "the one to use, in chat_template.jinja"
            ) from error

    def write(self, messages: Messages, reply_follows: bool) -> str:
        """Render messages; ``reply_follows`` adds the assistant header.

        Raises:
            ModelError: the template cannot write messages of these roles.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                [{"role": m["role"], "content": m["content"]} for m in messages],
                tokenize=False,
                add_generation_prompt=reply_follows,
                chat_template=_undated(self.tokenizer),
                date_string=_DATE,  # Llama's templates take it in place of today's date
                enable_thinking=False,  # Qwen 3 and others: only the answer is trained and measured
            )
        except Exception as error:  # a template is a program, which may fail in any way
            said = " ".join(str(error).split())[:300] or type(error).__name__
            raise ModelError(
                f"chat template of {self.name} cannot write a conversation of the roles "
                f"{_roles(messages)}: {said}; use a model whose template can"
            ) from error
        assert isinstance(text, str)
        return text

    def require_all(self, messages: Messages, text: str) -> None:
        """Check that a rendered text holds the messages in order; blanks at their ends may be gone.

        Raises:
            ModelError: one is missing, altered, or at another place.
        """
        place = 0
        for number, message in enumerate(messages, 1):
            content = message["content"].strip()
            place = text.find(content, place)
            if place < 0:
                raise ModelError(
                    f"chat template of {self.name} drops, alters or moves message {number} of a "
                    f"conversation of the roles {_roles(messages)}: {_RULE}"
                )
            place += len(content)

    def require_once(self, messages: Messages, text: str) -> None:
        """As :meth:`require_all`, and check that each message occurs once.

        No message may be part of another.

        Raises:
            ModelError: as there, or a message occurs several times.
        """
        self.require_all(messages, text)
        for number, message in enumerate(messages, 1):
            times = text.count(message["content"])
            if times != 1:
                raise ModelError(
                    f"chat template of {self.name} writes message {number} of a conversation of "
                    f"the roles {_roles(messages)} {times} times: {_RULE}"
                )


@dataclass(frozen=True)
class Ending:
    """End of a reply.

    Attributes:
        ids: end tokens.
        last: the end token of a training row, if the template writes none after the last reply.
        num_behind: tokens that the template writes behind the end token of the last reply, which
            generation never reaches; None where it writes no end token.
    """

    ids: frozenset[int]
    last: int
    num_behind: int | None


def find_ending(template: Template, markers: Collection[str], stop_ids: Sequence[int]) -> Ending:
    """Find the end of a reply from rendered probes.

    Args:
        markers: texts of the tokens that open or close turns.
        stop_ids: end tokens that the model's configuration names.

    Raises:
        ModelError: no token is known that ends a reply.
    """
    tokenizer = template.tokenizer
    # End tokens at which generation stops in any case.
    eos = []
    if tokenizer.eos_token_id is not None:
        eos.append(int(tokenizer.eos_token_id))
    known = {*eos, *stop_ids}
    tokens = tokenizer.added_tokens_decoder

    def ids_of(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    # Behind the last reply: the first marker or known end token closes the reply.
    user = {"role": "user", "content": "PROBE0"}
    reply = {"role": "assistant", "content": "PROBE1"}
    again = {"role": "user", "content": "PROBE2"}
    exchange = template.write([user, reply], False)
    closing: list[int] = []
    if reply["content"] in exchange:
        closing = ids_of(exchange.rpartition(reply["content"])[2].strip())
    for place, token in enumerate(closing):
        if token in tokens and (token in known or str(tokens[token]) in markers):
            return Ending(frozenset({*known, token}), token, len(closing) - place - 1)
    if not known:
        raise ModelError(
            f"tokenizer {template.name} has no eos_token, its chat template writes no token after "
            "a reply, and neither generation_config.json nor config.json names one: no reply "
            "would ever end; add eos_token to tokenizer_config.json"
        )

    # None there: end tokens between a reply and the next message, or those of the configuration.
    three = template.write([user, reply, again], True)
    between = three.partition(reply["content"])[2].partition(again["content"])[0]
    written = [i for i in ids_of(between.strip()) if i in tokens and i in known]
    named = [i for i in eos if i in stop_ids or not stop_ids]
    return Ending(frozenset(known), [*written, *named, *stop_ids][0], None)


def _roles(messages: Messages) -> str:
    """Roles separated by commas, for errors."""
    return ", ".join(message["role"] for message in messages)


def _undated(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template with a fixed date: a prompt must not differ from day to day."""
    template = tokenizer.get_chat_template()
    if "strftime_now" not in template:
        return template
    return f"{{%- macro strftime_now(format) -%}}{_DATE}{{%- endmacro %}}{template}"
