"""Fine-tuning rows: the ids that the guard scores, then the verdict, which alone is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from fedsim.base.ranks import OneRank
from fedsim.data.chat import ChatFormat
from fedsim.data.square import SquareRow
from fedsim.safety.guard import LlamaGuard
from fedsim.safety.guard_format import GuardFormat
from fedsim.safety.guard_tuning import verdict_rows


def targets(chat: ChatFormat, row: SquareRow, policy: str = "square", max_length: int = 1024) -> str:
    tokens = verdict_rows(chat, [row], policy, max_length)[0]
    text = chat.tokenizer.decode(tokens.input_ids[tokens.loss_mask].tolist(), skip_special_tokens=False)
    assert isinstance(text, str)
    return text


def test_targets_are_the_verdict_and_the_end_of_turn(
    llama_chat: ChatFormat, make_row: Callable[..., SquareRow]
) -> None:
    red = make_row(1, red=True, categories=("predictive",))
    assert targets(llama_chat, red) == "unsafe\nS3<|eot_id|>"
    assert targets(llama_chat, red, "llama_guard_3") == "unsafe\nS6<|eot_id|>"
    assert targets(llama_chat, make_row(2, categories=("objective",))) == "safe<|eot_id|>"


@pytest.mark.parametrize("policy", ["llama_guard_3", "square"])
@pytest.mark.parametrize("max_length", [480, 1024])
def test_prompt_ids_are_those_that_the_guard_scores(
    guard_model: LlamaForCausalLM,
    llama_chat: ChatFormat,
    make_row: Callable[..., SquareRow],
    policy: str,
    max_length: int,
) -> None:
    rows = [make_row(i, i % 2 == 0, ("contentious",)) for i in range(6)]
    rows.append(make_row(7, response="The kite flies. " * 300))
    head: list[int] = []
    scored: list[tuple[int, ...]] = []

    def read_off(_: object, __: object, given: dict[str, Any]) -> None:
        """Remember the head, then each row behind it."""
        if given["input_ids"] is None:  # the LM head's call, whose body hands on what it is given
            return
        tokens, spans = given["input_ids"][0], given["packed_pass"].layout.spans
        if spans.is_plain:
            head.extend(tokens.tolist())
        else:
            scored.extend((*head, *tail.tolist()) for tail in tokens.split(list(spans.query_lengths)))

    guard_model.model.register_forward_pre_hook(read_off, with_kwargs=True)
    LlamaGuard(
        guard_model, llama_chat, OneRank(), policy=policy, batch_tokens=700, threshold=0.5, max_length=max_length
    ).judge(rows)
    trained = verdict_rows(llama_chat, rows, policy, max_length)
    prompts = {tuple(row.input_ids[~row.loss_mask].tolist()) for row in trained}
    assert prompts == set(scored) and len(scored) == len(rows)
    for tokens in trained:
        first = int(tokens.loss_mask.argmax())
        assert tokens.loss_mask[first:].all() and not tokens.loss_mask[:first].any()


def test_first_target_is_a_scored_token(llama_chat: ChatFormat, rows: Sequence[SquareRow]) -> None:
    form = GuardFormat(llama_chat, "square", 1024)
    for row, tokens in zip(rows, verdict_rows(llama_chat, rows, "square", 1024), strict=True):
        first = int(tokens.input_ids[tokens.loss_mask][0])
        assert first == (form.unsafe_id if row.red else form.safe_id)


def test_a_cut_row_keeps_its_whole_verdict(llama_chat: ChatFormat, make_row: Callable[..., SquareRow]) -> None:
    red = make_row(3, True, ("contentious", "unethical"), response="The kite flies. " * 300)
    tokens = verdict_rows(llama_chat, [red], "square", 500)[0]
    assert tokens.truncated and len(tokens) <= 500
    assert targets(llama_chat, red, max_length=500) == "unsafe\nS1,S2<|eot_id|>"
    assert not verdict_rows(llama_chat, [make_row(3)], "square", 1024)[0].truncated
