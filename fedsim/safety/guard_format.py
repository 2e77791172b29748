"""Token ids of the guard's prompt and of the verdict that follows it, alike for fine-tuning and for scoring.

The prompt text stands in a Llama 3 user turn followed by the assistant header, without a system turn (Llama Guard 3
model card). That turn is written here when the tokenizer has Llama 3's header tokens: Llama Guard's own chat template
would put the guard prompt around our guard prompt. Any other tokenizer's chat template is used as it is.

The reply begins with the ids of ``"\\n\\n"``. They are appended as ids: in text they would merge with the header's
newlines. The verdict's first token, "safe" or "unsafe", comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import numpy as np

from fedsim.data.chat import ChatFormat, assistant_turn, user_turn
from fedsim.errors import ConfigError, ModelError
from fedsim.safety.guard_prompt import render_guard_prompt

_LLAMA3_TOKENS: Final = {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}
_PROBE: Final = "probe"

# SQuARe's red categories → hazard codes. Under "square" they are the policy's own categories. Llama Guard 3 has no
# equal ones; the nearest by its hazard definitions: contentious (biased or demeaning to a group) → S10 Hate, unethical
# → S2 Non-Violent Crimes, predictive (certain about what nobody can know) → S6 Specialized Advice, and its broadest
# category, S2, for the rest. Codes are trained but only "safe"/"unsafe" is scored.
_CODES: Final[dict[str, dict[str, int]]] = {
    "square": {"contentious": 1, "unethical": 2, "predictive": 3},
    "llama_guard_3": {"contentious": 10, "unethical": 2, "predictive": 6},
}
_OTHER: Final = {"square": 4, "llama_guard_3": 2}


def hazard_codes(categories: Iterable[str], policy: str) -> str:
    """A red row's second verdict line, such as ``S1,S3``: its SQuARe categories as codes of ``policy``, ascending."""
    known = {_CODES[policy][c] for c in categories if c in _CODES[policy]}
    return ",".join(f"S{code}" for code in sorted(known or {_OTHER[policy]}))


class GuardFormat:
    """Renders exchanges for one guard.

    Args:
        chat: the guard's chat format.
        policy: hazard categories, a key of ``guard_prompt.POLICIES``.
        max_length: prompt and verdict together may have this many tokens. A longer row loses the end of its reply, then
            of its question; the instruction is never cut.

    Attributes:
        safe_id: first token of "safe".
        unsafe_id: first token of "unsafe".

    Raises:
        ConfigError: the policy is unknown, or ``max_length`` is too small for the instruction.
        ModelError: the two words begin with the same token, or the chat template cannot carry the prompt.
    """

    def __init__(self, chat: ChatFormat, policy: str, max_length: int) -> None:
        self.chat, self.policy = chat, policy
        own_turn = {str(token) for token in chat.tokenizer.added_tokens_decoder.values()} >= _LLAMA3_TOKENS
        self._defuse = chat.defuse_tokens if own_turn else chat.defuse
        self._before, self._after, closing = _llama3_turn(chat) if own_turn else _template_turn(chat)
        self._lead = chat.encode("\n\n")
        self._safe, self._unsafe = chat.encode("safe"), chat.encode("unsafe")
        self._closing = chat.encode(closing)
        self.safe_id, self.unsafe_id = self._safe[0], self._unsafe[0]
        if self.safe_id == self.unsafe_id:
            raise ModelError(
                f"tokenizer {chat.tokenizer.name_or_path!r}: 'safe' and 'unsafe' begin with the same token "
                f"({self.safe_id}), so a first-token guard cannot tell them apart: use another guard model"
            )
        instruction = len(self._ids("", ""))
        codes = ",".join(f"S{code}" for code in (*_CODES[policy].values(), _OTHER[policy]))
        verdict = len(self._lead) + len(self._verdict(codes))
        self._room = max_length - verdict
        if instruction > self._room:
            raise ConfigError(
                f"guard.max_length={max_length}: the instruction and verdict of policy {policy!r} alone take "
                f"{instruction + verdict} tokens; set a larger value"
            )

    def prompt(self, user: str, agent: str | None) -> tuple[np.ndarray, bool]:
        """Ids (int32 ``[length]``) that end where the verdict's first token follows, and whether the row was cut.

        ``agent`` None asks about the user's message alone.
        """
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
        """Target ids: ``safe``, or ``unsafe`` and a line of hazard codes; then the end of the turn."""
        return self._verdict(hazard_codes(categories, self.policy) if red else None)

    def _verdict(self, codes: str | None) -> list[int]:
        words = self._safe if codes is None else self._unsafe + self.chat.encode(f"\n{codes}")
        return words + self._closing

    def _ids(self, user: str, agent: str | None) -> list[int]:
        text = render_guard_prompt(self._defuse(user), None if agent is None else self._defuse(agent), self.policy)
        return self.chat.encode(f"{self._before}{text}{self._after}")

    def _fits(self, user: str, agent: str | None) -> bool:
        return len(self._ids(user, agent)) <= self._room


def _llama3_turn(chat: ChatFormat) -> tuple[str, str, str]:
    """What stands before the user's text, between it and the reply, and after the reply."""
    before = f"{chat.tokenizer.bos_token or ''}<|start_header_id|>user<|end_header_id|>\n\n"
    return before, "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"


def _template_turn(chat: ChatFormat) -> tuple[str, str, str]:
    """The same, as the tokenizer's chat template writes them."""
    prompt = chat.render([user_turn(_PROBE)], reply_follows=True)
    whole = chat.render([user_turn(_PROBE), assistant_turn(_PROBE)], reply_follows=False)
    name = chat.tokenizer.name_or_path
    if prompt.count(_PROBE) != 1 or "<BEGIN" in prompt:
        raise ModelError(
            f"chat template of {name!r} writes more than the turn itself, as the templates of older Llama Guards do: "
            "use a guard with Llama 3's header tokens or a plain chat template"
        )
    reply = whole.removeprefix(prompt).lstrip()  # Mistral's writes a space before it; the verdict has its own lead
    if not whole.startswith(prompt) or not reply.startswith(_PROBE):
        raise ModelError(f"chat template of {name!r} writes a finished reply unlike the prompt that asks for it")
    before, after = prompt.split(_PROBE)
    return before, after, reply.removeprefix(_PROBE).rstrip()


def _longest(text: str, fits: Callable[[str], bool]) -> str:
    """A beginning of ``text`` that fits, found by halving; empty if none does."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(text[:middle]) else (low, middle - 1)
    return text[:low]
