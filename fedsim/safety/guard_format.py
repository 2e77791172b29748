"""Token ids of the guard's prompt and its verdict, the same in fine-tuning and in scoring.

The prompt text is a Llama 3 user turn, followed by the assistant header, without a system turn
(Llama Guard 3 model card). That turn is written here when the tokenizer has Llama 3's header
tokens: Llama Guard's own chat template would put the guard prompt around our guard prompt. Any
other tokenizer's chat template is used as it is.

There the reply begins with the ids of ``"\\n\\n"``. They are appended as ids: in text they would
merge with the header's newlines. Under another template the verdict is a reply as that template
writes it, tokenised at once with the prompt. The verdict's first token, of "safe" or "unsafe",
comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import numpy as np

from fedsim.base.errors import ConfigError, ModelError
from fedsim.data.chat import ChatFormat, Prompt, assistant_turn, user_turn
from fedsim.data.guard_prompt import render_guard_prompt

_LLAMA3_TOKENS: Final = {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}
_HEADER_END: Final = "<|end_header_id|>"
_PROBE: Final = "probe"

# SQuARe's red categories → hazard codes. Under "square" they are the policy's own categories. Llama
# Guard 3 has no equal ones; the nearest by its hazard definitions: contentious (biased or demeaning
# to a group) → S10 Hate, unethical → S2 Non-Violent Crimes, predictive (certain about an unknowable
# future) → S6 Specialized Advice, and its broadest category, S2, for the rest. Codes are trained,
# but only "safe"/"unsafe" is scored.
_CODES: Final[dict[str, dict[str, int]]] = {
    "square": {"contentious": 1, "unethical": 2, "predictive": 3},
    "llama_guard_3": {"contentious": 10, "unethical": 2, "predictive": 6},
}
_OTHER: Final = {"square": 4, "llama_guard_3": 2}


def hazard_codes(categories: Iterable[str], policy: str) -> str:
    """Return a red row's second verdict line, such as ``S1,S3``.

    Args:
        categories: the row's SQuARe categories.
        policy: whose codes these become, ascending.
    """
    known = {_CODES[policy][c] for c in categories if c in _CODES[policy]}
    return ",".join(f"S{code}" for code in sorted(known or {_OTHER[policy]}))


class GuardFormat:
    """Format of exchanges for one guard.

    Args:
        chat: the guard's chat format.
        policy: hazard categories, a key of ``guard_prompt.POLICIES``.
        max_length: prompt and verdict together may have this many tokens. A longer row loses the
            end of its reply, then of its question; the instruction is never cut.

    Attributes:
        safe_id: first token of "safe".
        unsafe_id: first token of "unsafe".

    Raises:
        ConfigError: the policy is unknown, or ``max_length`` is too small for the instruction.
        ModelError: the two words begin with the same token, or the chat template cannot carry the
            prompt.
    """

    def __init__(self, chat: ChatFormat, policy: str, max_length: int) -> None:
        self.chat, self.policy = chat, policy
        # Texts around the exchange and the verdict, by the tokenizer's kind.
        added = {str(token) for token in chat.tokenizer.added_tokens_decoder.values()}
        self._own_turn = added >= _LLAMA3_TOKENS
        self._defuse = chat.defuse_tokens if self._own_turn else chat.defuse
        turn = _llama3_turn(chat) if self._own_turn else _template_turn(chat)
        self._before, self._after, self._opening, self._closing = turn
        self._verdicts: dict[str | None, list[int]] = {}

        # Verdicts are tokenised behind a text that ends as every prompt does: the last header's
        # token, which joins with nothing, or the prompt of an empty exchange.
        border = _HEADER_END if self._own_turn else self._text("", "")
        self._border = Prompt(border, np.asarray(chat.encode(border), dtype=np.int32))
        shared, opening = chat.continuation(self._border, border + self._opening)
        # Ids at a prompt's end that join with the reply's first characters.
        self._num_dropped = len(self._border.ids) - len(shared)

        # The lead is the prefix of both replies, such as "\n\n" or a space that is a token; the
        # verdict's first token follows it.
        safe, unsafe = self._reply("safe"), self._reply("unsafe")
        num_lead = 0
        while num_lead < min(len(safe), len(unsafe)) and safe[num_lead] == unsafe[num_lead]:
            num_lead += 1
        in_common = chat.decode(safe[len(opening) : num_lead], special=True)
        if safe == unsafe or in_common:
            raise ModelError(
                f"tokenizer {chat.tokenizer.name_or_path!r}: 'safe' and 'unsafe' begin with the "
                f"same token ({safe[num_lead - 1]}), so a first-token guard cannot "
                "distinguish them: use another guard model"
            )
        self._lead = safe[:num_lead]
        self.safe_id, self.unsafe_id = safe[num_lead], unsafe[num_lead]

        # Tokens that remain for the prompt beside the longest verdict, that of all categories.
        instruction = len(self._ids("", ""))
        codes = ",".join(f"S{code}" for code in (*_CODES[policy].values(), _OTHER[policy]))
        verdict = len(self._lead) + len(self._verdict(codes))
        self._room = max_length - verdict
        if instruction > self._room:
            raise ConfigError(
                f"guard.max_length={max_length}: the instruction and verdict of policy {policy!r} "
                f"take {instruction + verdict} tokens without a conversation; set a larger value"
            )

    def prompt(self, user: str, agent: str | None) -> tuple[np.ndarray, bool]:
        """Return ids up to the verdict's first token, and whether the row was cut.

        Args:
            user: the question.
            agent: the reply; None asks about the question only.

        Returns:
            int32 ``[length]``, and True if the row was cut.
        """
        # Cut the end of the reply first, then the end of the question.
        ids = self._ids(user, agent)
        cut = len(ids) > self._room
        if cut and agent is not None:
            agent = _longest(agent, lambda part: self._fits(user, part))
            ids = self._ids(user, agent)
        if len(ids) > self._room:
            user = _longest(user, lambda part: self._fits(part, agent))
            ids = self._ids(user, agent)
        assert len(ids) <= self._room
        return np.asarray(ids + self._lead, dtype=np.int32), cut

    def verdict_ids(self, red: bool, categories: Iterable[str]) -> list[int]:
        """Return target ids: ``safe``, or ``unsafe`` and hazard codes; then the end of the turn."""
        return self._verdict(hazard_codes(categories, self.policy) if red else None)

    def _verdict(self, codes: str | None) -> list[int]:
        """Return the ids of a verdict behind the lead; ``codes`` None for "safe"."""
        if codes not in self._verdicts:
            reply = self._reply("safe" if codes is None else f"unsafe\n{codes}")
            self._verdicts[codes] = reply[len(self._lead) :]
        return self._verdicts[codes]

    def _reply(self, verdict: str) -> list[int]:
        """Return the ids that a reply of ``verdict`` adds to a prompt, its end token included."""
        whole = f"{self._border.text}{self._opening}{verdict}{self._closing}"
        _, ids = self.chat.continuation(self._border, whole)
        if not self._own_turn:
            ids = self.chat.ended(ids)
        found: list[int] = ids.tolist()
        return found

    def _text(self, user: str, agent: str | None) -> str:
        """Return the prompt's text, without control tokens in the exchange."""
        if agent is not None:
            agent = self._defuse(agent)
        text = render_guard_prompt(self._defuse(user), agent, self.policy)
        return f"{self._before}{text}{self._after}"

    def _ids(self, user: str, agent: str | None) -> list[int]:
        """Return the prompt's ids that no reply changes."""
        ids = self.chat.encode(self._text(user, agent))
        return ids[: len(ids) - self._num_dropped]

    def _fits(self, user: str, agent: str | None) -> bool:
        return len(self._ids(user, agent)) <= self._room


def _llama3_turn(chat: ChatFormat) -> tuple[str, str, str, str]:
    """Return the texts around the user's message and the verdict in Llama 3's format.

    They are the texts before the message, between it and the reply, before the verdict, and behind
    it.
    """
    before = f"{chat.tokenizer.bos_token or ''}<|start_header_id|>user<|end_header_id|>\n\n"
    return before, f"<|eot_id|><|start_header_id|>assistant{_HEADER_END}\n\n", "\n\n", "<|eot_id|>"


def _template_turn(chat: ChatFormat) -> tuple[str, str, str, str]:
    """Return the texts of :func:`_llama3_turn` as the tokenizer's chat template writes them.

    Raises:
        ModelError: the template writes more than the turn.
    """
    # The turn with a probe as the user's message, up to the reply.
    name = chat.template.name
    asked, probe = [user_turn(_PROBE)], assistant_turn(_PROBE)
    prompt = chat.template.write(asked, True).removesuffix(chat.left_to_reply)
    if prompt.count(_PROBE) != 1 or "<BEGIN" in prompt:
        raise ModelError(
            f"chat template of {name} writes more than the turn itself, as the templates of older "
            "Llama Guards do: use a guard with Llama 3's header tokens or a plain chat template"
        )
    chat.check(trains=True)
    # The same turn with the probe as its reply, to see the texts around the reply.
    whole = chat.render([*asked, probe], reply_follows=False)
    before, after = prompt.split(_PROBE)
    opening, _, closing = whole.removeprefix(prompt).partition(_PROBE)
    return before, after, opening, closing.rstrip()


def _longest(text: str, fits: Callable[[str], bool]) -> str:
    """Return a beginning of ``text`` that fits, found by bisection; empty if none does."""
    low, high = 0, len(text)  # the first ``low`` characters fit; more than ``high`` are not tried
    while low < high:
        middle = (low + high + 1) // 2
        if fits(text[:middle]):
            low = middle
        else:
            high = middle - 1
    return text[:low]
