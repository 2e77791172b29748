"""A judge of a user's own: ratings, groups, failures, names, and what it is shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.base.errors import ConfigError, JudgeError, RunError
from fedsim.base.ranks import OneRank
from fedsim.config import Config, load_config
from fedsim.data.evaluation_sets import MtQuestion
from fedsim.evaluate.fastchat import JudgmentFile
from fedsim.evaluate.judge import Judged, MtJudge
from fedsim.evaluate.judge_inputs import check_judge
from fedsim.evaluate.judge_prompts import FIELDS, PLAIN, load_judge_prompts, parse_rating
from fedsim.run.checks import check_code

CODE = """
from fedsim import Judge
from fedsim.base.errors import JudgeError

CALLS = []


class Ours(Judge):
    def __init__(self, shift=0):
        self.shift = shift

    def rate(self, matches):
        CALLS.append(matches)
        return [BODY for match in matches]
"""

Make = Callable[..., MtJudge]
Answered = list[tuple[MtQuestion, tuple[str, str]]]


@pytest.fixture()
def make(mt_folder: Path, tmp_path: Path) -> Make:
    """``make(body, *overrides)``: a judge of four questions whose rating of a match is the expression ``body``."""

    def made(body: str, *overrides: str) -> MtJudge:
        return MtJudge(configured(body, *overrides), OneRank(), torch.device("cpu"))

    def configured(body: str, *overrides: str) -> Config:
        path = tmp_path / "ours.py"
        path.write_text(CODE.replace("BODY", body), encoding="utf-8")
        references = mt_folder / "reference_answer" / "gpt-4.jsonl"
        where = [f"eval.mt_bench={mt_folder / 'question.jsonl'}", f"eval.mt_bench_references={references}"]
        return load_config(None, [*where, f"judge.kind={path}:Ours", *overrides])

    made.configured = configured  # type: ignore[attr-defined]
    return made


def answered(judge: MtJudge) -> Answered:
    return [(q, (f"first {q.question_id}", f"second {q.question_id}")) for q in judge.questions]


def judged(judge: MtJudge, folder: Path) -> Judged:
    return judge.judge(folder, "fed-1", answered(judge))


def calls(judge: MtJudge) -> list[list[Any]]:
    """Groups that the judge was handed."""
    import sys

    found: list[list[Any]] = sys.modules[type(judge._judge).__module__].CALLS
    return found


def test_numbers_texts_and_none_are_ratings(make: Make, tmp_path: Path) -> None:
    body = "([2 + self.shift, None] if match.question_id < 83 else ['Fine. [[8.5]]', 7.25])[match.turn - 1]"
    judge = make(body, "judge.options.shift=1")
    found = judged(judge, tmp_path)
    assert found.scores == [(3.0, None), (3.0, None), (8.5, 7.25), (8.5, 7.25)]
    assert (found.num_unrated, found.num_unjudged, found.complete, found.error) == (2, 0, True, None)
    texts = [row["judgment"] for row in JudgmentFile(tmp_path, judge.name).rows()]
    assert texts[:2] == ["Rating: [[3]]", "No rating."] and texts[-2:] == ["Fine. [[8.5]]", "Rating: [[7.25]]"]
    assert judged(judge, tmp_path) == found and len(calls(judge)) == 1, "what is judged is not judged again"


def test_a_judge_sees_questions_answers_and_references_up_to_the_turn(make: Make, tmp_path: Path) -> None:
    judge = make("5")
    judged(judge, tmp_path)
    (matches,) = calls(judge)
    first, second = (match for match in matches if match.question_id == 82)
    assert (first.category, first.turn, second.turn) == ("math", 1, 2)
    assert (first.answers, second.answers) == (("first 82",), ("first 82", "second 82"))
    assert (first.references, second.references) == (("It is {2}.",), ("It is {2}.", "It is 3."))
    assert len(first.questions) == 1 and len(second.questions) == 2
    assert not any(match.references for match in matches if match.question_id != 82)
    assert first.user == f"[question]\n{first.questions[0]}\n\n[ref_answer_1]\nIt is {{2}}.\n\n[answer]\nfirst 82"


def test_the_plain_prompts_fill_in_what_fastchats_do() -> None:
    assert PLAIN.keys() == FIELDS.keys()
    for name, fields in FIELDS.items():
        assert all(f"{{{field}}}" in PLAIN[name].template for field in fields)
        PLAIN[name].template.format(**dict.fromkeys(fields, ""))


def test_fastchats_prompts_are_shown_where_they_are_given(make: Make, mt_folder: Path, tmp_path: Path) -> None:
    path = mt_folder.parent / "judge_prompts.jsonl"
    judge = make("5", f"judge.prompts={path}")
    judged(judge, tmp_path)
    (matches,) = calls(judge)
    prompts = load_judge_prompts(path)
    assert [match.system for match in matches] == [prompts[match.prompt_name].system for match in matches]
    assert "Rate it.\n[Q] Ask 1?\n[R] It is {2}.\n[A] first 82" in [match.user for match in matches]


def test_groups_are_fixed_and_only_those_with_a_missing_judgment_are_rated(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rating that depends on its group stays the same after a stop."""
    monkeypatch.setattr("fedsim.evaluate.judge_contract.UNIT", 3)
    judge = make("len(matches) + match.question_id - 81")
    found = judged(judge, tmp_path)
    assert [len(group) for group in calls(judge)] == [3, 3, 2]
    file = JudgmentFile(tmp_path, judge.name)
    whole = [row | {"tstamp": 0} for row in file.rows()]
    file.replace("fed-1", [row for row in file.rows() if (row["question_id"], row["turn"]) != (84, 2)])
    calls(judge).clear()
    assert judged(judge, tmp_path) == found
    assert [len(group) for group in calls(judge)] == [2], "the last group has the missing answer"
    assert [row | {"tstamp": 0} for row in file.rows()] == whole


@pytest.mark.parametrize(
    ("rating", "words"),
    [
        ("11", "rate returns 11; each rating must be a number from 1 to 10"),
        ("True", "rate returns True; "),
        ("[5]", r"rate returns \[5\]; "),
        ("float('nan')", "rate returns nan; "),
        ("'$ERROR$'", r"rate returns '\$ERROR\$', which marks a failure; raise fedsim.JudgeError"),
        ("'$CUT$ and so on'", r"rate returns '\$CUT\$ and so on', which marks a failure; "),
    ],
)
def test_a_rating_must_be_one(make: Make, tmp_path: Path, rating: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"^judge.kind='.*ours.py:Ours': {words}"):
        judged(make(rating), tmp_path)


@pytest.mark.parametrize("word", ["judge.model=gpt-9", "judge.workers=2", "judge.base_url=http://localhost/v1"])
def test_keys_of_built_in_judges_are_refused(make: Make, word: str) -> None:
    key, _, _ = word.partition("=")
    with pytest.raises(ConfigError, match=rf"^{key}=.*: only built-in judges take this key; set judge\.options"):
        make.configured("5", word)  # type: ignore[attr-defined]


def test_numpy_s_numbers_are_numbers(make: Make, tmp_path: Path) -> None:
    assert np.float64(6.5) == 6.5
    judge = make("__import__('numpy').float64(6.5) if match.turn == 1 else __import__('numpy').int64(4)")
    assert judged(judge, tmp_path).scores == [(6.5, 4.0)] * 4


def test_a_rating_for_each_answer_is_wanted(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rate must return one rating for each of 8 answers"):
        judged(make("5 for match in matches[1:]] + [5 for match in ()"), tmp_path)


def test_an_error_names_file_and_line_and_quotes_nothing(make: Make, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"^judge.kind='.*': .*ours.py, line 14, in \S+: KeyError$") as error:
        judged(make("{}[match.user]"), tmp_path)
    assert "first" not in str(error.value) and "\n" not in str(error.value)


def test_a_service_that_fails_leaves_the_rest_unjudged(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsim.evaluate.judge_contract.UNIT", 3)
    judge = make("(_ for _ in ()).throw(JudgeError('quota')) if len(CALLS) == 2 else 6")
    found = judged(judge, tmp_path)
    assert isinstance(found.error, JudgeError) and str(found.error) == "quota" and found.gave_up
    assert (found.num_unjudged, found.complete, found.scores) == (5, False, [(None, None)] * 4)
    assert judged(judge, tmp_path).scores == [(6.0, 6.0)] * 4, "the next attempt judges the rest"
    assert [len(group) for group in calls(judge)] == [3, 3, 3, 2]


def test_another_content_or_option_is_another_judge(make: Make) -> None:
    judge = make("5")
    assert judge.name.startswith("Ours-") and len(judge.name) == 5 + 8
    assert make("5").name == judge.name
    assert len({judge.name, make("6").name, make("5", "judge.options.shift=1").name}) == 3
    assert judge.unit == "turns"


def test_what_is_wrong_is_found_before_the_run(make: Any, mt_folder: Path) -> None:
    check_judge(make.configured("5"))
    for override, words in (
        ("judge.options.shirt=1", "judge.options.shirt=1: .*did you mean shift"),
        ("judge.kind=nowhere.py:Ours", "nowhere.py cannot be read"),
        ("judge.kind=fedsim.safety.guard:NoGuard", "must be a class that derives from fedsim.Judge"),
    ):
        config = make.configured("5", override)
        for check in (check_judge, check_code):
            with pytest.raises(ConfigError, match=words):
                check(config)
    with pytest.raises(ConfigError, match=r"judge\.kind='opena': must be one of none, openai, local, or .*mean openai"):
        make.configured("5", "judge.kind=opena")
    with pytest.raises(ConfigError, match=r"judge\.options\.a=1: judge.kind='none' has no such option; it takes none"):
        check_code(load_config(None, ["judge.options.a=1"]))


def test_a_judgment_s_text_has_its_rating() -> None:
    assert [parse_rating(f"Rating: [[{number}]]") for number in (1, 10, 7.25)] == [1, 10, 7.25]
