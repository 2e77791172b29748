"""The four prompts as FastChat renders them, which question gets which, and how a rating is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.base.errors import DataError
from fedsim.data.evaluation_sets import MtQuestion, load_mt_bench
from fedsim.data.thoughts import MARKS
from fedsim.evaluate.fastchat import CUT, read_answers
from fedsim.evaluate.judge_prompts import FIELDS, load_judge_prompts, make_matches, parse_rating

ANSWERS = ("First {answer} [[9]].", "Second.")


def question(number: int, category: str) -> MtQuestion:
    """A question whose text has braces in it."""
    return MtQuestion(number, category, ("Why {x}?", "And {question_1}?"), None, {})


def test_the_four_prompts_word_for_word(mt_folder: Path) -> None:
    prompts = load_judge_prompts(mt_folder.parent / "judge_prompts.jsonl")
    answered = [(question(81, "writing"), ANSWERS), (question(82, "math"), ANSWERS)]
    matches = make_matches(prompts, answered, {82: ("R {1}", "R2")})
    assert [(m.question_id, m.turn, m.prompt_name, m.system, m.user) for m in matches] == [
        (81, 1, "single-v1", "You are fair.",
         "Rate the kite answer.\n[Q] Why {x}?\n[A] First {answer} [[9]].\n{so}"),
        (82, 1, "single-math-v1", "You are fair.",
         "Rate it.\n[Q] Why {x}?\n[R] R {1}\n[A] First {answer} [[9]]."),
        (81, 2, "single-v1-multi-turn", "Rate the second answer.\n\n",
         "[Q1] Why {x}? [A1] First {answer} [[9]]. [Q2] And {question_1}? [A2] Second."),
        (82, 2, "single-math-v1-multi-turn", "",
         "[Q1] Why {x}? [R1] R {1} [Q2] And {question_1}? [R2] R2 [A1] First {answer} [[9]]. [A2] Second."),
    ]  # fmt: skip
    assert matches[0].conversation == [
        {"role": "system", "content": "You are fair."},
        {"role": "user", "content": matches[0].user},
    ]
    assert [message["role"] for message in matches[3].conversation] == [
        "user"
    ]  # FastChat sends no empty system message


@pytest.mark.parametrize(
    ("category", "name"),
    [("math", "math"), ("reasoning", "math"), ("coding", "math"), ("arena-hard-200", "math"), ("extraction", ""),
     ("stem", ""), ("humanities", ""), ("roleplay", ""), ("Math", "")],
)  # fmt: skip
def test_which_categories_see_a_reference(mt_folder: Path, category: str, name: str) -> None:
    prompts = load_judge_prompts(mt_folder.parent / "judge_prompts.jsonl")
    first, second = make_matches(prompts, [(question(81, category), ANSWERS)], {81: ("R1", "R2")})
    stem = "single-math-v1" if name else "single-v1"
    assert (first.prompt_name, second.prompt_name) == (stem, f"{stem}-multi-turn")
    assert ("R1" in first.user) == ("R2" in second.user) == bool(name)


@pytest.mark.parametrize(
    ("judgment", "rating"),
    [
        ("Rating: [[7]]", 7),
        ("Rating: [[7.5]] and [[3]]", 7.5),
        ("[2] steps, so Rating: [[10]]", 10),  # the doubled form wins wherever it stands
        ("Rating: [6]", 6),
        ("Rating: [[rating]], that is [4.]", 4.0),
        ("[[1,2]] [[ 5 ]] 8/10", -1),
        ("[[-3]]", -1),
        ("", -1),
        ("Rating: [[0]]", -1),  # outside the scale that the prompt sets
        ("Rating: [[11]] or [5]", -1),
        ("[[" + "9" * 5000 + "]]", -1),
        ("[[08]]", 8),
    ],
)
def test_ratings(judgment: str, rating: float) -> None:
    found = parse_rating(judgment)
    assert found == rating and isinstance(found, type(rating))


@pytest.mark.parametrize(("opener", "closer"), MARKS)
def test_a_rating_among_thoughts_is_none(opener: str, closer: str) -> None:
    thought = f"{opener}The format is [[5]]. I give [3]."
    assert parse_rating(f"{thought}{closer}\n\nFair. Rating: [[8]]") == 8
    assert parse_rating(f"[[2]] {thought}{closer} Rating: [8] or [[{closer}") == -1, (
        "a mark ends a thought as it stands"
    )
    assert parse_rating(f"The format is [[5]].{closer}[[8]]") == 8, "opened by the judge's chat template"
    assert parse_rating(f"{thought}{closer} Hm. {thought}{closer}[8]") == 8, "the last thought's end counts"
    assert parse_rating(thought) == parse_rating(f"{opener} a {closer} {thought}") == -1, "never ends"
    assert parse_rating(f"Rating: [[8]] {thought}") == 8, "what stands before it is no thought"
    assert parse_rating(f"{thought.upper()}{closer.upper()}[[8]]") == 8
    assert parse_rating(f"{thought}{closer}") == parse_rating(f"{CUT}{thought}{closer}[[8]]") == -1


PARTS = st.sampled_from(["[[5]]", "[[8]]", "[7]", "Rating: ", "so ", "\n", "[[", "]]", "<", "think>", "[/"])
PROSE = st.lists(PARTS, max_size=6).map("".join)


@given(thought=PROSE, verdict=PROSE, pair=st.sampled_from(MARKS))
def test_thoughts_change_no_rating(thought: str, verdict: str, pair: tuple[str, str]) -> None:
    """Whatever was thought, the rating is that of the verdict alone; none is read from what has no verdict."""
    opener, closer = pair
    plain = parse_rating(verdict)
    assert parse_rating(f"{opener}{thought}{closer}{verdict}") == plain
    assert parse_rating(f"{thought}{closer}{verdict}") == plain
    assert parse_rating(f"{verdict}{opener}{thought}") == plain
    assert parse_rating(f"{opener}{thought}") == parse_rating(f"{CUT}{verdict}") == -1


def test_the_first_rating_counts_as_in_fastchat() -> None:
    """Also where a judge repeats the prompt's example: plain judgments stay comparable with published ones."""
    assert parse_rating('I use the format "Rating: [[5]]". Rating: [[8]]') == 5


@given(st.text(alphabet="[]0123456789. a"))
def test_a_rating_is_on_the_scale_or_minus_one(judgment: str) -> None:
    rating = parse_rating(judgment)
    assert rating == -1 or 1 <= rating <= 10


def rewritten(path: Path, which: str, changed: dict[str, Any]) -> Path:
    """The prompt file with fields of one prompt changed; None leaves the prompt out."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kept = [{**row, **changed} if row["name"] == which else row for row in rows]
    text = "".join(json.dumps(row) + "\n" for row in kept if row["name"] is not None)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "changed", "fragments"),
    [
        ("single-math-v1", {"name": None}, ("'single-math-v1'", "github.com/lm-sys/FastChat")),
        ("single-v1", {"output_format": "[[A]]"}, ("line 2", "'output_format'", "[[rating]]")),
        ("single-v1", {"prompt_template": 3}, ("line 2", "'prompt_template'")),
        ("single-v1", {"system_prompt": None}, ("line 2", "'system_prompt'")),
        (
            "single-v1",
            {"prompt_template": "{question} {ref_answer_1}"},
            ("line 2", "'ref_answer_1'", "answer, question"),
        ),
        ("single-v1", {"prompt_template": "{answer.__class__}"}, ("line 2", "'answer.__class__'")),
        ("single-v1", {"prompt_template": "{}"}, ("line 2", "''")),
        ("single-v1", {"prompt_template": "{answer"}, ("line 2", "no template", "brace")),
    ],
)
def test_malformed_prompts(mt_folder: Path, name: str, changed: dict[str, Any], fragments: tuple[str, ...]) -> None:
    path = rewritten(mt_folder.parent / "judge_prompts.jsonl", name, changed)
    with pytest.raises(DataError) as error:
        load_judge_prompts(path)
    assert all(fragment in str(error.value) for fragment in (path.name, *fragments))


def test_real_prompts_take_every_question_and_reference(real_data: Path) -> None:
    folder = real_data / "mt_bench"
    questions = load_mt_bench(folder / "question.jsonl")
    prompts = load_judge_prompts(folder / "judge_prompts.jsonl")
    references = read_answers(folder / "reference_answer_gpt-4.jsonl")
    answered = [(q, (f"<one {q.question_id}>", f"<two {q.question_id}>")) for q in questions]
    matches = make_matches(prompts, answered, references)
    assert len(matches) == 160
    assert {name: sum(m.prompt_name == name for m in matches) for name in FIELDS} == {
        "single-v1": 50, "single-math-v1": 30, "single-v1-multi-turn": 50, "single-math-v1-multi-turn": 30,
    }  # fmt: skip
    for match, (q, answers) in zip(matches, [*answered, *answered], strict=True):
        shown = [match.user.count(answer) for answer in answers]
        assert shown == ([1, 0] if match.turn == 1 else [1, 1])
        assert all(turn in match.user for turn in q.turns[: match.turn])
        expected = references[q.question_id][: match.turn] if "math" in match.prompt_name else ()
        assert all(reference in match.user for reference in expected)
        instructions = match.user if match.turn == 1 else match.system
        assert "[[rating]]" in instructions
