"""A run whose MT-Bench answers are judged: the score in its record, a judge that fails, and finishing afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim.base.digests import file_digest
from fedsim.base.errors import CheckpointError, DataError
from fedsim.base.ranks import OneRank
from fedsim.commands.judge import main as judge
from fedsim.config import load_config
from fedsim.evaluate.fastchat import JudgmentFile
from fedsim.parallel.world import World
from fedsim.record.metrics import Row, read_rows
from fedsim.run.simulation import Simulation
from fedsim.world import square_rows

ROOT = Path(__file__).parents[2]
SMALL = ROOT / "tests" / "distributed" / "small.yaml"
BRIEF = ["guard.kind=none", "cai.iterations=0", "federation.num_rounds=1", "eval.every=0", "eval.advbench=",
         "eval.hhh=", "data.federated_rows=40", "data.guard_rows=0", "data.cai_rows=0", "eval.xstest=", "eval.helpful=",
         "eval.guard_judge=none", "local.steps=1", "local.batch_size=4"]  # fmt: skip
Make = Callable[..., Simulation]


@pytest.fixture(autouse=True)
def leave_torch_as_it_was() -> Iterator[None]:
    """The command makes torch deterministic for its process."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture()
def make(tmp_path: Path, mt_folder: Path, endpoint: Any) -> Make:
    """``make(*overrides)``: a brief run on four questions, judged by kite-judge at the local endpoint."""
    path = tmp_path / "square.json"
    path.write_text(json.dumps(square_rows()[:200]), encoding="utf-8")
    where = [f"data.square={path}", f"record.dir={tmp_path / 'runs'}", f"record.artefacts={tmp_path / 'artefacts'}"]
    mt_bench = [
        f"eval.mt_bench={mt_folder / 'question.jsonl'}",
        f"eval.mt_bench_references={mt_folder / 'reference_answer' / 'gpt-4.jsonl'}",
        "judge.kind=openai",
        "judge.model=kite-judge",
        f"judge.base_url={endpoint.url}",
        "judge.retries=0",
    ]

    def made(*overrides: str) -> Simulation:
        config = load_config(SMALL, [*BRIEF, *where, *mt_bench, *overrides])
        return Simulation(config, World(OneRank(), torch.device("cpu"), exact=True))

    return made


def evaluations(simulation: Simulation) -> list[Row]:
    """The evaluation rows, pretrained first."""
    return [row for row in read_rows(simulation.record.metrics_file) if row["stage"] == "eval"]


def test_the_score_is_the_judges(make: Make, endpoint: Any) -> None:
    endpoint.answer = lambda number, request: "none" if number == 0 else "Rating: [[7]]"
    simulation = make()
    simulation.run()
    first, last = evaluations(simulation)
    assert first["eval/mt_bench"] == last["eval/mt_bench"] == 7.0
    assert (first["eval/mt_bench_unrated"], last["eval/mt_bench_unrated"]) == (1, 0)
    assert first["eval/mt_bench_judge_failed"] == 0 and len(endpoint.requests) == 16
    summary = (simulation.record.folder / "summary.md").read_text(encoding="utf-8")
    assert "MT-Bench is judged by kite-judge, the paper's by GPT-4" in summary
    assert "without a rating and left out of the means: pretrained 1 of 8." in summary
    manifest = json.loads((simulation.record.folder / "manifest.json").read_text(encoding="utf-8"))
    assert {"judge_prompts", "mt_bench_references", "mt_bench"} <= manifest["inputs"].keys()


def test_a_judge_that_fails_ends_no_run(make: Make, endpoint: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """It dies within the second evaluation: the run ends well, and the command judges what is left."""
    endpoint.answer = lambda number, request: "Rating: [[7]]" if number < 10 else 503
    simulation = make("judge.workers=1")
    simulation.run()
    first, last = evaluations(simulation)
    assert first["eval/mt_bench"] == 7.0
    assert not any(name in last for name in ("eval/mt_bench", "eval/mt_bench_turn_1", "eval/mt_bench_count"))
    assert last["eval/mt_bench_judge_failed"] == 6 and last["eval/mt_bench_questions"] == 4
    said = [line for line in capsys.readouterr().err.splitlines() if "HTTP 503" in line]
    folder = simulation.record.folder
    assert len(said) == 1
    assert "6 turns stay unjudged" in said[0] and f"fedsim judge {folder}" in said[0]
    summary = (folder / "summary.md").read_text(encoding="utf-8")
    assert "left unjudged, as the judge failed" in summary and "after training 6 of 8." in summary
    endpoint.requests.clear()
    endpoint.answer = lambda number, request: "Rating: [[5]]"
    assert judge([str(folder)]) == 0
    assert len(endpoint.requests) == 6
    rows = JudgmentFile(folder / "answers" / "mt_bench", "kite-judge").rows()
    assert sorted(row["score"] for row in rows) == [5] * 6 + [7] * 10
    assert "kites" not in capsys.readouterr().err


def test_a_turn_that_the_judge_never_answers_is_said(
    make: Make, endpoint: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """It takes the turn's score alone; and an endpoint that refuses temperature=0 is told of."""
    error = json.dumps({"error": {"message": "no", "param": "temperature"}}).encode()
    endpoint.answer = lambda number, request: (
        endpoint.Answer(error, 400) if "temperature" in request else " " if number == 1 else "Rating: [[7]]"
    )
    simulation = make("judge.workers=1")
    simulation.run()
    first, last = evaluations(simulation)
    assert first["eval/mt_bench"] == last["eval/mt_bench"] == 7.0
    assert (first["eval/mt_bench_judge_failed"], last["eval/mt_bench_judge_failed"]) == (1, 0)
    err = capsys.readouterr().err
    assert err.count("refuses temperature=0") == 1
    assert err.count("1 turns stay unjudged: ") == 1 and "the answer has no text" in err


def test_the_judge_takes_the_rubrics_place(make: Make, mt_folder: Path, endpoint: Any) -> None:
    prompts = f"judge.prompts={mt_folder.parent / 'judge_prompts.jsonl'}"
    simulation = make("eval.mt_bench=embedded", "eval.mt_bench_references=", prompts, "eval.limit=3")
    simulation.run()
    assert [row["eval/mt_bench"] for row in evaluations(simulation)] == [5.0, 5.0]
    names = {
        path.name for path in (simulation.record.folder / "answers" / "mt_bench" / "model_judgment").glob("*.jsonl")
    }
    assert names == {"kite-judge_single.jsonl"}


OURS = """
from fedsim import Judge


class Turns(Judge):
    def rate(self, matches):
        return [3 + match.turn for match in matches]
"""


def test_a_judge_of_one_s_own_and_its_file_that_may_not_change(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "turns.py"
    file.write_text(OURS, encoding="utf-8")
    ours = [f"judge.kind={file}:Turns", "judge.model=gpt-4", "judge.base_url=", "judge.retries=5"]
    simulation = make(*ours)
    simulation.run()
    folder = simulation.record.folder
    assert [row["eval/mt_bench"] for row in evaluations(simulation)] == [4.5, 4.5]
    assert "MT-Bench is judged by Turns, the paper's by GPT-4" in (folder / "summary.md").read_text(encoding="utf-8")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["inputs"]["code of judge.kind"]["sha256"] == file_digest(file)
    file.write_text(OURS.replace("3 +", "4 +"), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"code of judge\.kind of this run changed") as error:
        make(*ours).run()
    assert "\n" not in str(error.value)
    assert judge([str(folder)]) == 0
    judgments = sorted((folder / "answers" / "mt_bench" / "model_judgment").glob("Turns-*.jsonl"))
    assert len(judgments) == 2, "another file is another judge"
    assert "5.50" in capsys.readouterr().out


def test_what_is_missing_ends_the_run_before_anything_is_computed(make: Make, mt_folder: Path, endpoint: Any) -> None:
    (mt_folder.parent / "judge_prompts.jsonl").unlink()
    simulation = make()
    with pytest.raises(DataError, match=r"judge\.prompts"):
        simulation.run()
    made = {path.name.rpartition("-")[0] for path in Path(simulation.config.record.artefacts).iterdir()}
    assert made <= {"square-rows"} and endpoint.requests == [], "all files are read, to name every mistake at once"


def test_an_endpoint_may_move_and_the_prompts_may_not(make: Make, mt_folder: Path, endpoint: Any) -> None:
    make().run()
    asked = len(endpoint.requests)
    make("judge.base_url=http://127.0.0.1:9/v1", "judge.workers=2", "judge.retries=3", "judge.timeout_s=7").run()
    assert len(endpoint.requests) == asked  # the run was finished
    path = mt_folder.parent / "judge_prompts.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("kite", "moon"), encoding="utf-8")
    with pytest.raises(CheckpointError, match="judge_prompts of this run changed"):
        make().run()
