"""The pretrained model's evaluation as an artefact: computed once, read back the same, without replies to attacks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from fedsim.base.artefacts import ArtefactStore
from fedsim.base.ranks import OneRank
from fedsim.data.evaluation_sets import AdvBenchItem, MtQuestion
from fedsim.evaluate.advbench import AdvBench
from fedsim.evaluate.benchmark import Result
from fedsim.evaluate.mt_bench import MtAnswer, MtBench
from fedsim.evaluate.suite import Evaluation, Part, Suite
from fedsim.generate.engine import Reply
from fedsim.run.pretrained import shared_evaluation

SECRET = "a reply that nobody may read"


def question(number: int) -> MtQuestion:
    return MtQuestion(number, "writing", ("Why?", "And then?"), None, {"question_id": number})


QUESTIONS = [question(i) for i in range(3)]
SUITE = Suite([Part(AdvBench(), [AdvBenchItem("attack", "target")]), Part(MtBench(), QUESTIONS)])


def measured() -> Evaluation:
    attacks = Result({}, replies=[Reply(SECRET, 6, False)])
    answers = [
        MtAnswer(q, (Reply(f"é{i}\u2028", 3, False), Reply("", 4, True, True)), (1.0 + i, None))
        for i, q in enumerate(QUESTIONS)
    ]
    metrics = {"eval/z": 0.1 + 0.2, "eval/a": 3, "eval/perplexity": math.inf}
    items = {"mt_bench_turn_1": {0: 1.0, 5: 2.0, 7: 0.1 + 0.2}, "advbench_harmless_gcg": {0: 0.0}}
    return Evaluation(metrics, items, answers, {"advbench": attacks})


class Counted:
    """Counts how often it measures."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Evaluation:
        self.calls += 1
        return measured()


@pytest.fixture()
def store(tmp_path: Path) -> ArtefactStore:
    return ArtefactStore(tmp_path, OneRank(), lambda text: None)


def test_the_second_run_reads_what_the_first_measured(store: ArtefactStore) -> None:
    count = Counted()
    first = shared_evaluation(store, {"seed": 1}, SUITE, count)
    again = shared_evaluation(store, {"seed": 1}, SUITE, count)
    assert count.calls == 1
    assert list(again.metrics.items()) == list(first.metrics.items())
    assert list(again.items.items()) == list(measured().items.items())
    assert again.answers == first.answers == measured().answers
    assert shared_evaluation(store, {"seed": 2}, SUITE, count) is not again and count.calls == 2


def test_no_reply_to_an_attack_is_kept(store: ArtefactStore) -> None:
    first = shared_evaluation(store, {}, SUITE, measured)
    assert first.results["advbench"].replies[0].text == SECRET
    assert not shared_evaluation(store, {}, SUITE, measured).results
    files = [path for path in store.folder.rglob("*") if path.is_file()]
    assert files and not any(SECRET in path.read_text(encoding="utf-8") for path in files)


def test_without_mt_bench_there_are_no_answers(store: ArtefactStore) -> None:
    suite = replace(SUITE, parts=SUITE.parts[:1])
    for _ in range(2):
        found = shared_evaluation(store, {}, suite, lambda: Evaluation({"eval/a": 1}))
        assert not found.answers
