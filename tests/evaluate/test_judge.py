"""The judge on answers: FastChat's file, what is asked again and what is not, failures, and the means of pandas."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch

from fedsim.base.errors import JudgeError
from fedsim.base.ranks import OneRank
from fedsim.config import Config, load_config
from fedsim.data.evaluation_sets import MtQuestion, load_mt_bench
from fedsim.evaluate.benchmark import Result
from fedsim.evaluate.fastchat import CUT, NOT_ASKED, JudgmentFile, judgment_row
from fedsim.evaluate.judge import Judged, MtJudge, judge_metrics
from fedsim.evaluate.judge_inputs import load_questions
from fedsim.evaluate.mt_bench import MtBench
from fedsim.generate.engine import Engine
from fedsim.model.load import load_base

CPU = torch.device("cpu")
Answered = list[tuple[MtQuestion, tuple[str, str]]]


pytestmark = pytest.mark.usefixtures("pauses")  # failed requests are sent again at once


@pytest.fixture()
def config(mt_folder: Path, endpoint: Any) -> Config:
    """A judge named kites/judge at the local endpoint."""
    return load_config(
        None,
        [
            "judge.kind=openai",
            "judge.model=kites/judge",
            f"judge.base_url={endpoint.url}",
            f"eval.mt_bench={mt_folder / 'question.jsonl'}",
            f"eval.mt_bench_references={mt_folder / 'reference_answer' / 'gpt-4.jsonl'}",
        ],
    )


@pytest.fixture()
def answered(config: Config) -> Answered:
    """Two answers to each of four questions."""
    return [(q, (f"first {q.question_id}", f"second {q.question_id}")) for q in load_questions(config)]


def judge(
    config: Config,
    folder: Path,
    answered: Answered,
    model_id: str = "fed-1",
    report: Callable[[int, int], None] | None = None,
) -> Judged:
    """Judge without waiting anywhere."""
    return MtJudge(config, OneRank(), CPU).judge(folder, model_id, answered, report)


def rating(request: dict[str, Any]) -> str:
    """A judgment that depends on what is judged; none on the second answer to 83."""
    text = request["messages"][-1]["content"]
    if "second 83" in text:
        return "I cannot say."
    turn, number = ("second" in text), int(text[text.index("first ") + 6 :][:2])
    return f"Rating: [[{number - 79 + turn}]]"


SCORES = [(2.0, 3.0), (3.0, 4.0), (4.0, None), (5.0, 6.0)]


def test_all_is_judged_and_written_as_fastchat_does(
    config: Config, answered: Answered, endpoint: Any, tmp_path: Path
) -> None:
    endpoint.answer = lambda number, request: rating(request)
    seen: list[tuple[int, int]] = []
    judged = judge(config, tmp_path, answered, report=lambda done, total: seen.append((done, total)))
    assert judged == Judged(
        "kites/judge", SCORES, num_unrated=1, num_not_asked=0, num_unjudged=0, complete=True, error=None
    )
    assert seen[-1] == (8, 8) and len(endpoint.requests) == 8
    path = tmp_path / "model_judgment" / "kites--judge_single.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(r["question_id"], r["turn"], r["score"]) for r in rows] == [
        (81, 1, 2), (81, 2, 3), (82, 1, 3), (82, 2, 4), (83, 1, 4), (83, 2, -1), (84, 1, 5), (84, 2, 6),
    ]  # fmt: skip
    assert list(rows[2]) == ["question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"]
    assert rows[2]["model"] == "fed-1" and rows[2]["judge"] == ["kites/judge", "single-math-v1"]
    assert rows[2]["user_prompt"] == "Rate it.\n[Q] Ask 1?\n[R] It is {2}.\n[A] first 82"
    assert rows[2]["judgment"] == "Rating: [[3]]"
    sent = {request["messages"][-1]["content"] for request in endpoint.requests}
    assert sent == {row["user_prompt"] for row in rows}


def test_the_figures_are_those_of_pandas_on_our_file(
    config: Config, answered: Answered, endpoint: Any, tmp_path: Path
) -> None:
    """FastChat's show_result: read_json, drop score −1, mean by model and turn, and by model."""
    endpoint.answer = lambda number, request: rating(request)
    JudgmentFile(tmp_path, "kites/judge").append(
        judgment_row(81, "another", ("kites/judge", "single-v1"), "Rate.", "Rating: [[9]]", 9, 1, 0.0)
    )
    judged = judge(config, tmp_path, answered)
    table = pandas.read_json(tmp_path / "model_judgment" / "kites--judge_single.jsonl", lines=True)
    assert len(table) == 9
    table = table[["model", "score", "turn"]]
    table = table[table["score"] != -1]
    means = table[["model", "score"]].groupby(["model"]).mean()["score"]
    by_turn = table.groupby(["model", "turn"]).mean()["score"]
    metrics = judge_metrics(judged, [question for question, _ in answered])
    assert metrics["eval/mt_bench"] == pytest.approx(means["fed-1"]) == pytest.approx(27 / 7)
    assert metrics["eval/mt_bench_turn_1"] == pytest.approx(by_turn["fed-1", 1]) == 3.5
    assert metrics["eval/mt_bench_turn_2"] == pytest.approx(by_turn["fed-1", 2]) == pytest.approx(13 / 3)
    assert metrics["eval/mt_bench_category_stem"] == 4.0 and metrics["eval/mt_bench_category_writing"] == 4.0
    assert [metrics[f"eval/mt_bench{name}_count"] for name in ("", "_turn_1", "_turn_2")] == [4, 4, 3]
    assert (metrics["eval/mt_bench_unrated"], metrics["eval/mt_bench_judge_failed"]) == (1, 0)
    assert means["another"] == 9.0


def completion(endpoint: Any, content: Any, reason: str = "stop", **message: Any) -> Any:
    """A chat completion with this content and finish reason."""
    choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": content, **message}}
    whole = {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    return endpoint.Answer(json.dumps(whole).encode())


def test_a_judge_that_thinks_is_read_behind_its_thoughts(
    config: Config, answered: Answered, endpoint: Any, tmp_path: Path
) -> None:
    """In the content, or apart from it: the rating is the answer's, and the file keeps what was said."""
    thought = "The format is [[5]].\nNot [[1]]."
    forms = [
        lambda text: completion(endpoint, f"<think>{thought}</think>\n{text}"),
        lambda text: completion(endpoint, f"{thought}</think>{text}"),
        lambda text: completion(endpoint, text, reasoning_content=thought),
        lambda text: completion(endpoint, [{"type": "thinking", "thinking": [{"type": "text", "text": thought}]},
                                           {"type": "reasoning", "text": thought}, {"type": "text", "text": text}]),
    ]  # fmt: skip
    endpoint.answer = lambda number, request: forms[number % 4](rating(request))
    config = replace(config, judge=replace(config.judge, workers=1))
    judged = judge(config, tmp_path, answered)
    assert judged.scores == SCORES and (judged.num_unrated, judged.num_cut, judged.news) == (1, 0, ())
    texts = [row["judgment"] for row in JudgmentFile(tmp_path, "kites/judge").rows()]
    assert sum(thought in text for text in texts) == 4
    assert judge(config, tmp_path, answered) == judged and len(endpoint.requests) == 8


@pytest.mark.parametrize("reason", ["length", "content_filter", "abort"])
def test_a_judgment_that_is_cut_off_is_unrated_counted_and_asked_again(
    config: Config, answered: Answered, endpoint: Any, tmp_path: Path, reason: str
) -> None:
    """Also one that holds a rating. It is never taken over from the file."""
    number_cut = 2

    def answer(number: int, request: dict[str, Any]) -> Any:
        text = rating(request)
        cut = "first 84" in request["messages"][-1]["content"]
        return completion(endpoint, f"Rating: [[9]] {text}", reason) if cut else text

    endpoint.answer = answer
    judged = judge(config, tmp_path, answered)
    assert judged.scores == [*SCORES[:3], (None, None)] and judged.complete and judged.error is None
    assert (judged.num_unrated, judged.num_cut, judged.num_unjudged) == (1 + number_cut, number_cut, 0)
    (line,) = judged.news
    assert line.startswith("2 judgments were cut off") and "judge.max_new_tokens=2048" in line
    metrics = judge_metrics(judged, [question for question, _ in answered])
    assert (metrics["eval/mt_bench_unrated"], metrics["eval/mt_bench_judgments_cut"]) == (3, 2)
    rows = {(r["question_id"], r["turn"]): r for r in JudgmentFile(tmp_path, "kites/judge").rows()}
    assert [rows[84, turn]["score"] for turn in (1, 2)] == [-1, -1]
    assert rows[84, 1]["judgment"] == f"{CUT}Rating: [[9]] Rating: [[5]]"
    table = pandas.read_json(tmp_path / "model_judgment" / "kites--judge_single.jsonl", lines=True)
    assert metrics["eval/mt_bench"] == pytest.approx(table["score"][table["score"] != -1].mean())
    endpoint.requests.clear()
    endpoint.answer = lambda number, request: rating(request)
    again = judge(config, tmp_path, answered)
    assert len(endpoint.requests) == number_cut and again.scores == SCORES and again.num_cut == 0


def test_a_judgment_without_text_at_its_length_limit_is_cut_off_and_not_tried_again(
    config: Config, answered: Answered, endpoint: Any, tmp_path: Path
) -> None:
    """A judge whose thoughts, given apart, fill judge.max_new_tokens."""
    endpoint.answer = lambda number, request: completion(endpoint, None, "length", reasoning_content="Hm [[5]]")
    judged = judge(config, tmp_path, answered)
    assert len(endpoint.requests) == judged.num_cut == judged.num_unrated == 8 and judged.error is None
    assert judged.scores == [(None, None)] * 4


def test_nothing_is_asked_twice(config: Config, answered: Answered, endpoint: Any, tmp_path: Path) -> None:
    endpoint.answer = lambda number, request: rating(request)
    first = judge(config, tmp_path, answered)
    assert judge(config, tmp_path, answered) == first and len(endpoint.requests) == 8
    judge(config, tmp_path, answered, "fed-2")
    assert len(endpoint.requests) == 16  # another model, if it says the same
    changed = [*answered[:2], (answered[2][0], ("first 83", "other 83")), answered[3]]
    again = judge(config, tmp_path, changed)
    assert len(endpoint.requests) == 17 and again.scores[2] == (4.0, 4.0)
    changed[0] = (answered[0][0], ("first 91", "second 81"))  # the judge of turn 2 sees the answer of turn 1
    judge(config, tmp_path, changed)
    assert len(endpoint.requests) == 19
    rows = JudgmentFile(tmp_path, "kites/judge").rows()
    assert len(rows) == 16 and len({(r["model"], r["question_id"], r["turn"]) for r in rows}) == 16


def test_another_judge_has_a_file_of_its_own(config: Config, answered: Answered, endpoint: Any, tmp_path: Path) -> None:
    judge(config, tmp_path, answered)
    judge(replace(config, judge=replace(config.judge, model="other")), tmp_path, answered)
    assert len(endpoint.requests) == 16
    assert sorted(p.name for p in (tmp_path / "model_judgment").glob("*.jsonl")) == [
        "kites--judge_single.jsonl",
        "other_single.jsonl",
    ]


def test_what_fastchats_own_requests_failed_at_is_asked(
    config: Config, answered: Answered, endpoint: Any, tmp_path: Path
) -> None:
    file = JudgmentFile(tmp_path, "kites/judge")
    judge(config, tmp_path, answered)
    rows = file.rows()
    rows[0] |= {"judgment": "$ERROR$", "score": -1}
    rows[1] |= {"judgment": "Rating: [[70]]", "score": 70}  # as FastChat would have it
    file.replace("fed-1", rows)
    judged = judge(config, tmp_path, answered)
    assert len(endpoint.requests) == 9 and judged.scores[0] == (5.0, None) and judged.num_unrated == 1


def test_a_failing_endpoint_leaves_no_score_and_keeps_what_it_gave(
    config: Config, answered: Answered, endpoint: Any, tmp_path: Path
) -> None:
    """Five judgments, then nothing but errors: a second attempt asks for the other three alone."""
    config = replace(config, judge=replace(config.judge, workers=1, retries=2))
    endpoint.answer = lambda number, request: rating(request) if number < 5 else 503
    judged = judge(config, tmp_path, answered)
    assert judged.num_unjudged == 3 and judged.scores == [(None, None)] * 4
    assert isinstance(judged.error, JudgeError) and "HTTP 503" in str(judged.error)
    assert len(endpoint.requests) == 8  # five, and three attempts at the sixth
    metrics = judge_metrics(judged, [question for question, _ in answered])
    names = ("unrated", "judgments_cut", "not_asked", "judge_failed")
    assert metrics == dict(zip((f"eval/mt_bench_{name}" for name in names), (0, 0, 0, 3), strict=True))
    assert judged.gave_up and not judged.complete
    assert len(JudgmentFile(tmp_path, "kites/judge").rows()) == 5
    endpoint.requests.clear()
    endpoint.answer = lambda number, request: rating(request)
    seen: list[tuple[int, int]] = []
    assert judge(config, tmp_path, answered, report=lambda *done: seen.append(done)).scores == SCORES
    assert len(endpoint.requests) == 3 and seen[-1] == (8, 8) and min(done for done, _ in seen) >= 5


def test_every_judgment_is_on_disk_before_the_next_is_asked(
    config: Config, answered: Answered, endpoint: Any, tmp_path: Path
) -> None:
    config = replace(config, judge=replace(config.judge, workers=1))
    on_disk: list[int] = []

    def answer(number: int, request: dict[str, Any]) -> str:
        on_disk.append(len(JudgmentFile(tmp_path, "kites/judge").rows()))
        return rating(request)

    endpoint.answer = answer
    judge(config, tmp_path, answered)
    assert on_disk == list(range(8))


def test_a_crash_loses_no_judgment(config: Config, answered: Answered, endpoint: Any, tmp_path: Path) -> None:
    """The process ends while a judgment is being written: the torn line goes, the others stay."""
    endpoint.answer = lambda number, request: rating(request)
    judge(config, tmp_path, answered)
    path = JudgmentFile(tmp_path, "kites/judge").path
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex(b'"score"')])
    assert judge(config, tmp_path, answered).scores == SCORES and len(endpoint.requests) == 9
    assert len(JudgmentFile(tmp_path, "kites/judge").rows()) == 8


def test_junk_now_and_then_changes_nothing(config: Config, answered: Answered, endpoint: Any, tmp_path: Path) -> None:
    junk = [
        endpoint.Answer(b'{"choices": [', cut=5),
        endpoint.Answer(b"<html>", headers={"content-type": "text/html"}),
        endpoint.Answer(b"slow down", 429, {"retry-after": "2"}),
        500,
        endpoint.Answer(b'{"choices": []}'),
        "  ",
        endpoint.Answer(b"{"),
    ]
    endpoint.answer = lambda number, request: rating(request) if number % 2 else junk[number // 2 % len(junk)]
    judged = judge(config, tmp_path, answered)
    assert judged.scores == SCORES and judged.error is None
    assert len(endpoint.requests) > 8


def test_a_local_judge_is_all_or_nothing(
    config: Config, answered: Answered, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which rows share a batch may show in the last bits, so that a half-judged model is judged anew as a whole."""
    local = replace(config.judge, kind="local", path=str(llama_dir), max_new_tokens=4)
    config = replace(config, judge=local)
    judged = judge(config, tmp_path, answered)
    assert judged.judge == llama_dir.name and judged.num_unjudged == 0
    assert judged.num_unrated == sum(score is None for pair in judged.scores for score in pair)
    file = JudgmentFile(tmp_path, llama_dir.name)
    assert len(file.rows()) == 8
    assert judged.num_cut == sum(row["judgment"].startswith(CUT) for row in file.rows()) > 0, "four tokens are few"
    asked: list[int] = []
    monkeypatch.setattr(
        "fedsim.evaluate.judge_local.LocalJudge.judgments",
        lambda self, work: asked.append(len(work.wanted)) or ["[[5]]"] * len(work.matches),
    )
    assert judge(config, tmp_path, answered).scores == [(5.0, 5.0)] * 4
    assert asked == [judged.num_cut], "what was cut off is asked again"
    judge(config, tmp_path, answered)
    assert asked == [judged.num_cut]
    file.replace("fed-1", file.rows()[:5])
    assert judge(config, tmp_path, answered).scores == [(5.0, 5.0)] * 4
    assert asked == [judged.num_cut, 3]


def test_what_does_not_fit_a_local_judge_is_counted_and_looked_at_again(
    config: Config, answered: Answered, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One prompt is too long for the judge; then its context grows."""
    config = replace(config, judge=replace(config.judge, kind="local", path=str(llama_dir)))
    wanted: list[list[int]] = []
    texts: list[list[str | None]] = [
        ["[[5]]"] * 7 + [f"{NOT_ASKED}it has 900 tokens"],
        [None] * 7 + [f"{NOT_ASKED}it has 900 tokens"],
        ["[[5]]"] * 7 + ["[[9]]"],
    ]
    monkeypatch.setattr(
        "fedsim.evaluate.judge_local.LocalJudge.judgments",
        lambda self, work: wanted.append(sorted(work.wanted)) or texts[len(wanted) - 1],
    )
    for _ in range(2):
        judged = judge(config, tmp_path, answered)
        assert (judged.num_not_asked, judged.num_unrated, judged.num_unjudged) == (1, 0, 0) and judged.error is None
        assert judged.complete and judged.scores == [(5.0, 5.0)] * 3 + [(5.0, None)]
        metrics = judge_metrics(judged, [question for question, _ in answered])
        assert metrics["eval/mt_bench_not_asked"] == 1 and metrics["eval/mt_bench_unrated"] == 0
    assert judge(config, tmp_path, answered).scores == [(5.0, 5.0)] * 3 + [(5.0, 9.0)]
    assert wanted == [list(range(8)), [7], [7]]
    assert len(JudgmentFile(tmp_path, llama_dir.name).rows()) == 8


def test_a_turn_that_is_never_answered_leaves_the_others_their_score(
    config: Config, answered: Answered, endpoint: Any, tmp_path: Path
) -> None:
    """A content filter takes one turn and the endpoint refuses another; both are asked for again, and only they."""
    config = replace(config, judge=replace(config.judge, retries=1))
    is_open = False

    def answer(number: int, request: dict[str, Any]) -> Any:
        text = request["messages"][-1]["content"]
        if "first 81" in text and "second" not in text and not is_open:
            return endpoint.Answer(json.dumps({"choices": [{"finish_reason": "content_filter"}]}).encode())
        return 400 if "second 84" in text and not is_open else rating(request)

    endpoint.answer = answer
    for num_requests in (6 + 2 + 1, 2 + 1):
        judged = judge(config, tmp_path, answered)
        assert len(endpoint.requests) == num_requests
        assert judged.scores == [(None, 3.0), (3.0, 4.0), (4.0, None), (5.0, None)]
        assert (judged.num_unjudged, judged.num_unrated, judged.complete, judged.gave_up) == (2, 1, True, False)
        assert isinstance(judged.error, JudgeError) and "(and 1 others)" in str(judged.error)
        metrics = judge_metrics(judged, [question for question, _ in answered])
        assert metrics["eval/mt_bench_judge_failed"] == 2 and metrics["eval/mt_bench"] == pytest.approx(19 / 5)
        rows = JudgmentFile(tmp_path, "kites/judge").rows()  # as FastChat writes them
        assert [r["question_id"] for r in rows if r["judgment"] == "$ERROR$" and r["score"] == -1] == [81, 84]
        assert len(rows) == 8
        endpoint.requests.clear()
    is_open = True
    judged = judge(config, tmp_path, answered)
    assert judged.scores == SCORES and judged.error is None and len(endpoint.requests) == 2


def test_a_judge_that_fails_later_takes_no_score_away(
    config: Config, answered: Answered, endpoint: Any, tmp_path: Path
) -> None:
    """What is left of an earlier attempt is one filtered turn; then the endpoint is gone."""
    config = replace(config, judge=replace(config.judge, retries=0))
    endpoint.answer = lambda number, request: " " if number == 0 else rating(request)
    first = judge(config, tmp_path, answered)
    assert first.num_unjudged == 1 and first.complete
    endpoint.answer = lambda number, request: 503
    second = judge(config, tmp_path, answered)
    assert second.scores == first.scores and second.complete and second.gave_up
    assert second.num_unjudged == 1 and "HTTP 503" in str(second.error)


def test_what_was_never_tried_is_asked_first(config: Config, answered: Answered, endpoint: Any, tmp_path: Path) -> None:
    config = replace(config, judge=replace(config.judge, workers=1, retries=0))
    endpoint.answer = lambda number, request: " " if number == 0 else rating(request) if number < 5 else 503
    judge(config, tmp_path, answered)
    asked = [request["messages"][-1]["content"] for request in endpoint.requests]
    endpoint.requests.clear()
    endpoint.answer = lambda number, request: rating(request)
    judge(config, tmp_path, answered)
    again = [request["messages"][-1]["content"] for request in endpoint.requests]
    assert again[0] == asked[5] and again[-1] == asked[0] and len(again) == 4


def test_two_writers_on_one_model_lose_nothing_of_each_others(
    config: Config, answered: Answered, endpoint: Any, tmp_path: Path
) -> None:
    """One has taken over what there was, nothing, when the other judges all; then the first one fails."""
    config = replace(config, judge=replace(config.judge, workers=1, retries=0))
    inner: list[Judged] = []

    def answer(number: int, request: dict[str, Any]) -> Any:
        if number == 2:  # of the first judge, whose first two are judged
            inner.append(judge(config, tmp_path, answered))
            return 503
        return rating(request)

    endpoint.answer = answer
    outer = judge(config, tmp_path, answered)
    assert inner[0].scores == SCORES and len(endpoint.requests) == 3 + 6
    assert len(JudgmentFile(tmp_path, "kites/judge").rows()) == 8
    assert outer.scores == SCORES and outer.error is None  # the other one has judged what this one could not


def test_an_endpoint_that_refuses_the_temperature_is_told_of_once(
    config: Config, answered: Answered, endpoint: Any, tmp_path: Path
) -> None:
    error = json.dumps({"error": {"message": "no", "param": "temperature"}}).encode()
    endpoint.answer = lambda n, request: endpoint.Answer(error, 400) if "temperature" in request else rating(request)
    judging = MtJudge(config, OneRank(), CPU)
    first = judging.judge(tmp_path, "fed-1", answered)
    assert first.scores == SCORES and len(first.news) == 1 and "temperature" in first.news[0]
    num_requests = len(endpoint.requests)
    assert judging.judge(tmp_path, "fed-2", answered).news == () and len(endpoint.requests) == num_requests + 8


def test_the_160_real_turns_are_answered_and_judged(
    real_data: Path, endpoint: Any, tmp_path: Path, measure: Callable[..., Result]
) -> None:
    """The published question, prompt and reference files through the model that ships with fedsim."""
    folder = real_data / "mt_bench"
    config = load_config(
        None,
        [
            "judge.kind=openai",
            f"judge.base_url={endpoint.url}",
            f"eval.mt_bench={folder / 'question.jsonl'}",
            f"eval.mt_bench_references={folder / 'reference_answer_gpt-4.jsonl'}",
        ],
    )
    questions = load_mt_bench(folder / "question.jsonl")
    model, chat = load_base("embedded", dtype="float32", attention="sdpa", device=CPU, key="model.path")
    engine = Engine(model, chat, OneRank(), batch_size=8, max_context=2048, seed=0)
    result = measure(engine, MtBench(4), questions)
    assert len(result.replies) == 160
    endpoint.answer = lambda number, request: "no rating" if number % 10 == 0 else "Rating: [[6]]"
    judged = judge(config, tmp_path, [answer.texts for answer in result.answers])
    assert len(endpoint.requests) == 160 and (judged.num_unrated, judged.num_unjudged) == (16, 0)
    metrics = judge_metrics(judged, questions)
    assert metrics["eval/mt_bench"] == 6.0
    assert sum(name.startswith("eval/mt_bench_category_") and name.endswith("_count") for name in metrics) == 8
    with_reference = [r for r in endpoint.requests if "Reference" in r["messages"][-1]["content"]]
    assert len(with_reference) == 60
