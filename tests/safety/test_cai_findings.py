"""Judgements of CAI conversations: by the embedded world's grammar on its own texts, and by a guard."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from fedsim import world
from fedsim.evaluate.confusion import Verdict
from fedsim.safety.cai_data import CaiRow
from fedsim.safety.cai_findings import Finding, judge_by_grammar, judge_by_guard
from fedsim.safety.guard import Exchange
from fedsim.world import conversations as talk
from fedsim.world.questions import Question, sample_question
from fedsim.world.replies import Persona, answer

CAREFUL, CARELESS = (Persona(full=True, careful=careful) for careful in (True, False))


@pytest.fixture(params=["contentious", "predictive", "ethical", "howto"])
def question(request: pytest.FixtureRequest) -> Question:
    return sample_question(random.Random(3), "square", request.param)


def row(question: Question, first: Persona, critique: str, last: Persona) -> CaiRow:
    rng = random.Random(1)
    response, revision = answer(rng, question, first), answer(rng, question, last)
    return CaiRow(0, question.prompt, response, "Critique.", critique, "Revise.", revision, 0)


def test_a_careless_reply_that_is_revised_is_repaired(question: Question) -> None:
    critique = talk.CRITIQUES[question.kind]
    (found,) = judge_by_grammar([row(question, CARELESS, critique, CAREFUL)])
    assert found == Finding(harmful_response=True, critique_finds_harm=True, careful_revision=True) and found.repaired


def test_a_careful_reply_leaves_nothing_to_repair(question: Question) -> None:
    (found,) = judge_by_grammar([row(question, CAREFUL, talk.NO_CRITIQUE, CAREFUL)])
    assert found == Finding(harmful_response=False, critique_finds_harm=False, careful_revision=True)
    assert not found.repaired


def test_a_revision_that_stays_careless_repairs_nothing(question: Question) -> None:
    (found,) = judge_by_grammar([row(question, CARELESS, talk.UNCLEAR_CRITIQUE, CARELESS)])
    assert found == Finding(harmful_response=True, critique_finds_harm=False, careful_revision=False)
    assert not found.repaired


@pytest.mark.parametrize("text", ["", "My reply", "It was rude about a group", talk.NO_CRITIQUE, talk.UNCLEAR_CRITIQUE])
def test_other_critiques_name_no_harm(text: str) -> None:
    assert not world.names_harm(text)


class WordGuard:
    """Calls unsafe what has the word."""

    def judge_exchanges(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        return [Verdict.at(0.5, float("storm" in str(reply)), False) for _, reply in exchanges]


def test_a_guard_judges_response_and_revision_alone() -> None:
    texts = [("storm", "calm"), ("calm", "storm"), ("storm", "storm")]
    rows = [CaiRow(i, "Fly?", first, "c", "storm", "r", last, 0) for i, (first, last) in enumerate(texts)]
    assert judge_by_guard(WordGuard())(rows) == [
        Finding(True, None, True),
        Finding(False, None, False),
        Finding(True, None, False),
    ]
