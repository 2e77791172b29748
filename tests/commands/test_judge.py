"""``fedsim judge`` as a user meets it: exit codes, one line for an error, what a second call asks, and the table."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fedsim.commands.judge import main
from fedsim.config import load_config, to_nested
from fedsim.data.evaluation_sets import load_mt_bench
from fedsim.evaluate.fastchat import JudgmentFile, write_answers
from fedsim.evaluate.mt_bench import MtAnswer
from fedsim.generate.engine import Reply

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def leave_torch_as_it_was() -> Iterator[None]:
    """The command makes torch deterministic for its process."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture()
def run(mt_folder: Path, tmp_path: Path) -> Path:
    """A run without a judge that has answered four questions at two points."""
    folder = tmp_path / "runs" / "kites"
    words = [f"eval.mt_bench={mt_folder / 'question.jsonl'}", "name=kites"]
    references = f"eval.mt_bench_references={mt_folder / 'reference_answer' / 'gpt-4.jsonl'}"
    config = load_config(None, [*words, references])
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_nested(config)), encoding="utf-8")
    for point in ("before", "after"):
        answers = [
            MtAnswer(q, (Reply(f"{point} 1", 2, False), Reply(f"{point} 2 {q.question_id}", 2, False)))
            for q in load_mt_bench(mt_folder)
        ]
        write_answers(folder / "answers" / "mt_bench", answers, f"kites-{point}", 1.0)
    return folder


def words(endpoint: Any, *more: str) -> list[str]:
    """Overrides that name a judge at the local endpoint."""
    return ["judge.kind=openai", "judge.model=kite-judge", f"judge.base_url={endpoint.url}", "judge.workers=1", *more]


def rating(number: int, request: dict[str, Any]) -> str:
    """6 before and 8 after for turn 2, 4 for turn 1; none for one answer."""
    text = request["messages"][-1]["content"]
    if "after 2 83" in text:
        return "no idea"
    return f"[[{4 if ' 2 8' not in text else 6 if 'before' in text else 8}]]"


def row(out: str, name: str) -> list[str]:
    """The cells of a line of the table."""
    (line,) = [line for line in out.splitlines() if line.startswith(f"{name} ")]
    return [cell.strip() for cell in line[len(name) :].split("  ") if cell.strip()]


def test_a_run_is_judged_and_shown(run: Path, endpoint: Any, capsys: pytest.CaptureFixture[str]) -> None:
    endpoint.answer = rating
    assert main([str(run), *words(endpoint)]) == 0
    out, err = capsys.readouterr()
    assert len(endpoint.requests) == 16
    assert row(out, "MT-Bench, 1–10") == ["kites-before", "kites-after"]
    assert row(out, "mean")[0] == "5.00 [5.00, 5.00] of 4" and row(out, "mean")[1].startswith("5.71 [4.68, 6.75] of 4")
    assert row(out, "turn 1") == ["4.00 [4.00, 4.00] of 4"] * 2
    assert row(out, "turn 2") == ["6.00 [6.00, 6.00] of 4", "8.00 [8.00, 8.00] of 3"]
    assert row(out, "math") == ["5.00 of 1", "6.00 of 1"] and row(out, "stem")[1] == "4.00 of 1"
    assert row(out, "turns judged") == ["8", "8"] and row(out, "turns without a rating") == ["0", "1"]
    assert "95 % interval" in out and "kite-judge_single.jsonl" in out
    assert "kites-before · 8/8 turns" in err and "kites-after · 8/8 turns" in err


def test_judgments_that_are_cut_off_are_shown_and_asked_again(
    run: Path, endpoint: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def cut(number: int, request: dict[str, Any]) -> Any:
        choice = {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": "[[9]] is"}}
        whole = {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
        return rating(number, request) if number > 2 else endpoint.Answer(json.dumps(whole).encode())

    endpoint.answer = cut
    assert main([str(run), *words(endpoint), "judge.max_new_tokens=64"]) == 0
    out, err = capsys.readouterr()
    assert row(out, "turns judged") == ["8", "8"] and row(out, "turns without a rating") == ["3", "1"]
    assert row(out, "of these, cut off by length") == ["3", "0"] and row(out, "mean")[0].startswith("5.60 ")
    assert "3 judgments were cut off by length (judge.max_new_tokens=64)" in err
    endpoint.requests.clear()
    endpoint.answer = rating
    assert main([str(run), *words(endpoint), "judge.max_new_tokens=4096"]) == 0
    out, err = capsys.readouterr()
    assert len(endpoint.requests) == 3 and {r["max_tokens"] for r in endpoint.requests} == {4096}
    assert row(out, "mean")[0] == "5.00 [5.00, 5.00] of 4" and "cut off" not in out + err


def test_a_second_call_finishes_what_a_failed_one_left(
    run: Path, endpoint: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.answer = lambda number, request: rating(number, request) if number < 11 else 503
    assert main([str(run), *words(endpoint, "judge.retries=0")]) == 2
    out, err = capsys.readouterr()
    assert row(out, "MT-Bench, 1–10") == ["kites-before"]  # whole; the other is not
    errors = [line for line in err.splitlines() if "error" in line]
    assert len(errors) == 1 and errors[0].startswith("error: judge 'kite-judge' at ")
    assert errors[0].endswith(
        "Not finished: kites-after; what was judged is kept, and the same command goes on from it"
    )
    assert len(JudgmentFile(run / "answers" / "mt_bench", "kite-judge").rows()) == 11
    endpoint.requests.clear()
    endpoint.answer = rating
    assert main([str(run), *words(endpoint)]) == 0
    assert len(endpoint.requests) == 5
    assert main([str(run), *words(endpoint)]) == 0
    assert len(endpoint.requests) == 5


def test_a_turn_that_stays_unjudged_is_noted_and_stops_nothing(
    run: Path, endpoint: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.answer = lambda number, request: " " if number == 2 else rating(number, request)
    assert main([str(run), *words(endpoint, "judge.retries=0")]) == 0
    out, err = capsys.readouterr()
    assert len(endpoint.requests) == 16
    assert row(out, "turns judged") == ["7", "8"] and row(out, "turns that the judge failed at") == ["1", "0"]
    assert row(out, "turn 1") == ["4.00 [4.00, 4.00] of 3", "4.00 [4.00, 4.00] of 4"]
    assert "too long for the judge" not in out
    (note,) = [line for line in err.splitlines() if "unjudged" in line]
    assert "kites-before: 1 turns stay unjudged: judge 'kite-judge' at" in note and "the answer has no text" in note


def test_an_endpoint_that_judges_nothing_more_is_an_error(
    run: Path, endpoint: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last five turns get no judgment: every turn was tried, and yet the judge seems to fail."""
    endpoint.answer = lambda number, request: rating(number, request) if number < 11 else 500
    assert main([str(run), *words(endpoint, "judge.retries=0")]) == 2
    out, err = capsys.readouterr()
    assert row(out, "turns that the judge failed at") == ["0", "5"]
    assert "error: 5 turns in a row without a judgment" in err and "Not finished: kites-after;" in err


def test_a_full_disk_is_one_line(
    run: Path, endpoint: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(JudgmentFile, "append", full)
    assert main([str(run), *words(endpoint)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: the disk has no room for what is to be written (") and line.endswith(
        "it goes on after the last judgment"
    )


def test_torchrun_is_told_the_cause_and_one_rank_tells_the_user(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cause = tmp_path / "cause.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(cause))
    monkeypatch.setattr("fedsim.base.launching.time.sleep", lambda seconds: None)
    for wrong in (["judge.kind=none"], ["--nonsense"]):
        monkeypatch.setenv("RANK", "1")
        assert main([str(run), *wrong]) == 2
        assert capsys.readouterr().err == "" and not cause.exists()
        monkeypatch.setenv("RANK", "0")
        assert main([str(run), *wrong]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert json.loads(cause.read_text(encoding="utf-8"))["message"]["message"] == line.removeprefix("error: ")
        cause.unlink()


def test_only_some_models(run: Path, endpoint: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--only", "kites-after", *words(endpoint)]) == 0
    assert len(endpoint.requests) == 8 and "kites-before" not in capsys.readouterr().out
    assert main([str(run), *words(endpoint), "--only", "kites-never"]) == 2
    assert "--only kites-never: has no answers in" in capsys.readouterr().err


def test_a_local_judge(run: Path, llama_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    local = ["judge.kind=local", f"judge.path={llama_dir}", "judge.max_new_tokens=4"]
    assert main([str(run), *local]) == 0
    assert len(JudgmentFile(run / "answers" / "mt_bench", llama_dir.name).rows()) == 16
    assert row(capsys.readouterr().out, "turns judged") == ["8", "8"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["judge.kind=none"], "judge.kind=none: the run has no judge; add judge.kind=openai"),
        (["federation.num_rounds=2"], "override 'federation.num_rounds=2': only the judge may be changed here"),
        (["judge.prompts=absent.jsonl"], "absent.jsonl: cannot be read"),
        (["eval.mt_bench_references="], "question 82 (math) has no reference"),
        (["eval.mt_bench="], "judge.kind=openai: there is nothing to judge, as eval.mt_bench=''"),
        (["eval.mt_bench=/nope"], "/nope: cannot be read"),
        (["judge.base_url=http://[::1"], "must be an address with host"),
        (["judge.base_url="], "export OPENAI_API_KEY"),
    ],
)
def test_mistakes_are_one_line(
    run: Path, endpoint: Any, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), *words(endpoint, *more)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1
    assert endpoint.requests == []


def test_a_folder_that_is_no_run(run: Path, endpoint: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run.parent), *words(endpoint)]) == 2
    assert "holds no config.yaml" in capsys.readouterr().err
    questions = run.parents[1] / "data" / "mt_bench" / "question.jsonl"
    questions.write_text("\n".join(questions.read_text(encoding="utf-8").splitlines()[:3]), encoding="utf-8")
    assert main([str(run), *words(endpoint)]) == 2
    assert "answers question 84, which eval.mt_bench does not have" in capsys.readouterr().err
    for path in (run / "answers" / "mt_bench" / "model_answer").iterdir():
        path.unlink()
    assert main([str(run), *words(endpoint)]) == 2
    assert "holds no answers yet" in capsys.readouterr().err
