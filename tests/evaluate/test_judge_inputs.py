"""Questions, prompts and references: where they are found, and what is missing before anything is judged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fedsim.base.errors import ConfigError, DataError, ModelError
from fedsim.config import Config, load_config
from fedsim.data.evaluation_sets import load_mt_bench
from fedsim.evaluate.judge_inputs import (
    build_judge,
    check_judge,
    judge_files,
    judge_name,
    load_questions,
    load_references,
)
from fedsim.world import write_mt_bench


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key of one's own is out of the way."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def configured(folder: Path, *words: str) -> Config:
    """A judge for the folder's questions, at an endpoint that is never asked."""
    where = ["judge.kind=openai", "judge.base_url=http://127.0.0.1:9/v1", f"eval.mt_bench={folder / 'question.jsonl'}"]
    return load_config(
        None, [*where, f"eval.mt_bench_references={folder / 'reference_answer' / 'gpt-4.jsonl'}", *words]
    )


def test_all_is_there(mt_folder: Path) -> None:
    config = configured(mt_folder)
    check_judge(config)
    assert judge_files(config) == {
        "judge_prompts": mt_folder.parent / "judge_prompts.jsonl",
        "mt_bench_references": mt_folder / "reference_answer" / "gpt-4.jsonl",
    }
    assert load_references(config, load_questions(config)) == {82: ("It is {2}.", "It is 3.")}


def test_nothing_is_looked_for_without_a_judge(tmp_path: Path) -> None:
    for words in (["judge.kind=none"], ["judge.kind=none", "eval.mt_bench="]):
        config = configured(tmp_path / "absent", *words)
        check_judge(config)
        assert judge_files(config) == {}


def test_a_judge_without_questions_is_an_error(mt_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"judge\.kind=openai: .*eval\.mt_bench='' .*judge\.kind=none"):
        configured(mt_folder, "eval.mt_bench=")


def test_missing_questions_are_named_before_the_prompts_beside_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent/question\.jsonl"):
        check_judge(configured(tmp_path / "absent"))


def test_prompts_beside_the_questions_come_first(mt_folder: Path) -> None:
    beside = mt_folder / "judge_prompts.jsonl"
    shutil.copy(mt_folder.parent / "judge_prompts.jsonl", beside)
    assert judge_files(configured(mt_folder))["judge_prompts"] == beside
    named = configured(mt_folder, f"judge.prompts={mt_folder.parent / 'judge_prompts.jsonl'}")
    assert judge_files(named)["judge_prompts"] == mt_folder.parent / "judge_prompts.jsonl"
    by_folder = configured(mt_folder, f"eval.mt_bench={mt_folder}")
    assert judge_files(by_folder)["judge_prompts"] == beside


def test_missing_prompts_say_where_to_get_them(mt_folder: Path) -> None:
    (mt_folder.parent / "judge_prompts.jsonl").unlink()
    with pytest.raises(DataError, match=r"judge\.prompts: .*neither in .*github\.com/lm-sys/FastChat"):
        check_judge(configured(mt_folder))
    with pytest.raises(DataError, match=r"judge\.prompts: .*github\.com/lm-sys/FastChat"):
        check_judge(configured(mt_folder, "eval.mt_bench=embedded", "eval.mt_bench_references="))
    with pytest.raises(DataError, match=r"absent\.jsonl: cannot be read"):
        check_judge(configured(mt_folder, "judge.prompts=absent.jsonl"))


def test_a_question_that_needs_a_reference_must_have_one(mt_folder: Path) -> None:
    expected = r"question 82 \(math\) has no reference .*eval\.mt_bench_references .*reference_answer/gpt-4\.jsonl"
    with pytest.raises(DataError, match=f"question.jsonl: {expected}"):
        check_judge(configured(mt_folder, "eval.mt_bench_references="))
    path = mt_folder / "reference_answer" / "gpt-4.jsonl"
    path.write_text(json.dumps({"question_id": 82, "choices": [{"turns": ["It is 2.", " "]}]}), encoding="utf-8")
    with pytest.raises(DataError, match=f"gpt-4.jsonl: {expected}"):
        check_judge(configured(mt_folder))
    path.write_text(json.dumps({"question_id": 83, "choices": [{"turns": ["It is 2.", "3"]}]}), encoding="utf-8")
    with pytest.raises(DataError, match=expected):
        check_judge(configured(mt_folder))


def test_embedded_questions_bring_their_own_references(mt_folder: Path, tmp_path: Path) -> None:
    words = [
        "eval.mt_bench=embedded",
        "eval.mt_bench_references=",
        f"judge.prompts={mt_folder.parent}/judge_prompts.jsonl",
    ]
    config = configured(mt_folder, *words)
    check_judge(config)
    questions = load_questions(config)
    write_mt_bench(tmp_path)
    assert questions == load_mt_bench(tmp_path)
    assert load_references(config, questions) == {q.question_id: q.reference for q in questions}


def test_a_local_judge_is_looked_for(mt_folder: Path, llama_dir: Path) -> None:
    check_judge(configured(mt_folder, "judge.kind=local", "judge.path=embedded"))
    check_judge(configured(mt_folder, "judge.kind=local", f"judge.path={llama_dir}"))
    with pytest.raises(ModelError, match=r"judge\.path='.*absent': is not a directory"):
        check_judge(configured(mt_folder, "judge.kind=local", "judge.path=absent"))


def test_a_local_judge_must_take_system_messages(mt_folder: Path, llama_dir: Path, tmp_path: Path) -> None:
    """FastChat's prompts have one: a judge that cannot read it would fail after the first round, or judge without."""
    folder = tmp_path / "judge"
    shutil.copytree(llama_dir, folder)
    template = (folder / "chat_template.jinja").read_text()
    dropping = template.replace("in messages %}", "in messages if m['role'] != 'system' %}")
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + template
    for text, words in (
        (dropping, "message 1 of a conversation of the roles system, user"),
        (refusing, "no system role"),
    ):
        (folder / "chat_template.jinja").write_text(text)
        with pytest.raises(ModelError, match=words):
            check_judge(configured(mt_folder, "judge.kind=local", f"judge.path={folder}"))
    with pytest.raises(ConfigError, match=r"set judge\.path"):
        configured(mt_folder, "judge.kind=local")
    with pytest.raises(ConfigError, match=r"set judge\.model"):
        configured(mt_folder, "judge.model=")


def test_an_endpoint_without_a_key_is_found_out(mt_folder: Path) -> None:
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        check_judge(configured(mt_folder, "judge.base_url="))


def test_names(mt_folder: Path, llama_dir: Path) -> None:
    def name(*words: str) -> str:
        config = configured(mt_folder, *words)
        return judge_name(config, build_judge(config))

    assert name("judge.kind=none") == ""
    assert name("judge.model=kites/judge") == "kites/judge"
    assert name("judge.kind=local", f"judge.path={llama_dir}/") == llama_dir.name
    assert name("judge.kind=local", "judge.path=embedded") == "embedded"


def test_real_files(real_data: Path) -> None:
    folder = real_data / "mt_bench"
    check_judge(configured(folder, f"eval.mt_bench_references={folder / 'reference_answer_gpt-4.jsonl'}"))
    with pytest.raises(DataError, match=r"question 103 \(reasoning\) has no reference"):  # of its own, for turn 2
        check_judge(configured(folder, "eval.mt_bench_references="))
