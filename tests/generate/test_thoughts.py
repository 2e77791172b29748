"""Thoughts are no part of a reply: in texts of every form, and in an engine whose model thinks."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedsim.base.ranks import OneRank
from fedsim.data.chat import ChatFormat, assistant_turn, user_turn
from fedsim.data.evaluation_sets import AdvBenchItem, HhhItem, MtQuestion
from fedsim.data.square import SquareRow
from fedsim.data.thoughts import MARKS, opens_thought, read_reply
from fedsim.evaluate.advbench import AdvBench
from fedsim.evaluate.hhh import Hhh, score_replies
from fedsim.evaluate.mt_bench import MtBench
from fedsim.evaluate.suite import Part, Suite, evaluate
from fedsim.generate.decode import Made, Request
from fedsim.generate.engine import Engine, Sampling
from fedsim.safety.cai_data import generate_conversations
from fedsim.safety.constitution import Constitution, Principle
from tests.conftest import LLAMA3_SPECIALS, LLAMA3_TEMPLATE, bytes_chat, random_llama

HTML = "Write <reasoning>why</reasoning> around it."


@pytest.mark.parametrize(("opener", "closer"), MARKS)
@pytest.mark.parametrize("opened", [False, True])
def test_replies_with_thoughts(opener: str, closer: str, opened: bool) -> None:
    def read(text: str) -> tuple[str, str]:
        return read_reply(text, opened=opened)

    assert read(f"{opener}So (A).{closer}\n\n(B) ") == ("(B)", "ended")
    assert read(f"So (A).{closer}(B)") == ("(B)", "ended")
    assert read(f"\n{opener}a{closer}one{opener}b{closer}two") == ("two", "ended")
    assert read(f"{opener}{closer}two") == ("two", "ended")
    assert read(f"{opener}So (A).") == ("", "open")
    assert read(f"{opener}a{closer}one{opener}b") == ("one", "open")


@pytest.mark.parametrize("text", ["", "Plain.", HTML, f"{HTML} <think>", "I <think> so.", "2 < 3, think>"])
def test_replies_without_thoughts_stay_as_they_are(text: str) -> None:
    assert read_reply(text) == (text, "none")


def test_a_reply_to_a_prompt_inside_a_thought_is_all_thought_until_that_ends() -> None:
    assert opens_thought("<|Assistant|><think>\n") and opens_thought("model\n[THINK]")
    assert not opens_thought("<|im_start|>assistant\n<think>\n\n</think>\n\n") and not opens_thought("<think> of it:")
    assert read_reply("So (A).", opened=True) == ("", "open")
    assert read_reply(f"{HTML}</think>Yes.", opened=True) == ("Yes.", "ended")


class Scripted(Engine):
    """An engine whose model says given texts, by row and turn, and ends them by itself unless they end in "…"."""

    def __init__(self, chat: ChatFormat, texts: Sequence[Sequence[str]], batch_size: int = 8) -> None:
        super().__init__(random_llama(), chat, OneRank(), batch_size=batch_size, max_context=1000, seed=1)
        self.texts = texts
        self.prompts: list[str] = []

    def _decoder(self, num_rows: int, max_new_tokens: int) -> Any:
        engine, end = self, next(iter(self.chat.end_ids))

        class Decoder:
            graphs = None
            passes = 0
            slots = SimpleNamespace(device=torch.device("cpu"))

            def run(self, starts: Sequence[Request], then: Any = lambda row, ids: None) -> list[list[Made]]:
                return [self.turns(row, start, then) for row, start in enumerate(starts)]

            def turns(self, row: int, start: Request, then: Any) -> list[Made]:
                made: list[Made] = []
                request: Request | None = start
                while request is not None:
                    engine.prompts.append(engine.chat.tokenizer.decode(list(request.prompt)))
                    text = engine.texts[row][len(made)]
                    ids = [*engine.chat.encode(text.removesuffix("…")), *([] if text.endswith("…") else [end])]
                    made.append(Made(ids, not text.endswith("…"), len(request.prompt), 0))
                    request = then(row, ids)
                return made

        return Decoder()


#: Qwen3's marks are plain added tokens; Magistral's are special ones, which decoding leaves out.
CHATS = {
    "plain": (bytes_chat(), "<think>", "</think>"),
    "special": (bytes_chat(specials=(*LLAMA3_SPECIALS, "[THINK]", "[/THINK]")), "[THINK]", "[/THINK]"),
    "opened": (bytes_chat(LLAMA3_TEMPLATE[: -len("{% endif %}")] + "<think>\n{% endif %}"), "", "</think>"),
}


@pytest.mark.parametrize("name", CHATS)
def test_an_engine_gives_answers_and_shows_no_thought_to_the_next_turn(name: str) -> None:
    chat, opener, closer = CHATS[name]
    texts = [
        [f"{opener}Sorry, I cannot.{closer}\n\nFly it.", f"{opener}Hm.{closer}High."],
        [f"{opener}I cannot tell…", f"{opener}Hm.{closer}Low."],
        [f"{opener}So.{closer}A long answer…", f"{opener}never ends"],
    ]
    engine = Scripted(chat, texts)
    first, second = engine.converse(
        [[user_turn("Kite?")]] * 3, [["Again?"] * 3], Sampling(0.0, 90), [("t", 1), ("t", 2)]
    )
    assert [(r.text, r.truncated, r.thought) for r in first] == [
        ("Fly it.", False, "ended"), ("", True, "open"), ("A long answer", True, "ended"),
    ]  # fmt: skip
    assert [(r.text, r.truncated, r.thought) for r in second] == [
        ("High.", False, "ended"), ("Low.", False, "ended"), ("", False, "open"),
    ]  # fmt: skip
    assert first[0].num_tokens == len(chat.encode(texts[0][0])) + 1, "thoughts are generated tokens"
    history = [user_turn("Kite?"), assistant_turn("Fly it."), user_turn("Again?")]
    assert engine.prompts[1] == chat.tokenizer.decode(chat.prompt_ids(history))


def test_a_refusal_in_thoughts_is_no_refusal() -> None:
    chat, opener, closer = CHATS["special"]
    engine = Scripted(chat, [[f"{opener}I'm sorry, I cannot.{closer}Fly it."], [f"{opener}Sorry, no."]])
    replies = engine.generate([[user_turn("Kite?")]] * 2, Sampling(0.0, 90), ("a",))
    attacks = AdvBench().measure(engine, [AdvBenchItem("Kite?", "Sure")] * 2, [[replies]])
    assert len(attacks.items) == 4 and all(values == [0, 0] for values in attacks.items.values())
    assert attacks.figures["advbench_empty"] == 1


def test_a_letter_in_thoughts_is_no_choice() -> None:
    chat, opener, closer = CHATS["plain"]
    items = [HhhItem("Which? ", ("kite", "boat"), correct, (user_turn("Which?"),)) for correct in (0, 1, 0)]
    texts = [[f"{opener}(B){closer}(A)"], [f"{opener}(A) or{closer} (B)"], [f"{opener}(A) or (B)…"]]
    ((replies,),) = Scripted(chat, texts).hold(Hhh().ask(items, ("k",)))
    score = score_replies(items, replies)
    assert score.is_right == [True, True, False] and score.num_undecided == 1


def test_the_counts_of_an_evaluation() -> None:
    """Where a model thinks; a model that does not has no such figures."""
    chat, opener, closer = CHATS["plain"]
    question = MtQuestion(81, "writing", ("Kite?", "Again?"), None, {})
    for texts, want in (
        ([f"{opener}So{closer}Up.", f"{opener}So…"], {"eval/thoughts": 2, "eval/thoughts_unfinished": 1}),
        (["Up.", f"Down, {opener} as they say."], {}),
    ):
        metrics = evaluate(Scripted(chat, [texts]), Suite([Part(MtBench(), [question])]), ("e",)).metrics
        assert {key: value for key, value in metrics.items() if "thoughts" in key} == want
        assert metrics["eval/num_replies"] == 2


def test_no_thought_is_trained_on() -> None:
    """CAI's pairs hold answers; a row whose revision never left its thoughts is dropped for it."""
    chat, opener, closer = CHATS["plain"]
    rows = [SquareRow(i, "Kite?", "", False, (), "") for i in range(3)]
    rules = Constitution((Principle("Is it kind?", "Make it kind."),))
    texts = [
        [f"{opener}Hm.{closer}No.", f"{opener}Hm.{closer}Unkind.", f"{opener}Hm.{closer}Gladly."],
        ["No.", "Unkind.", f"{opener}Be kind"],
        [f"{opener}Be kind…", "Empty.", "Gladly."],
    ]
    made = generate_conversations(Scripted(chat, texts), rows, rules, Sampling(0.0, 90))
    assert (made[0].rejected, made[0].critic_response, made[0].chosen) == ("No.", "Unkind.", "Gladly.")
    assert [row.defect for row in made] == [None, "empty_revision", "empty_response"]
    assert [row.truncated for row in made] == [(), (), ("response",)]
