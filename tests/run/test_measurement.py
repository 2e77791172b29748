"""A measurement: the adapter that is measured, the questions, and the places of figures, texts and items."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from fedsim.base import keyed_random
from fedsim.base.errors import JudgeError
from fedsim.base.ranks import OneRank
from fedsim.config import load_config
from fedsim.data.chat import assistant_turn, user_turn
from fedsim.data.evaluation_sets import AdvBenchItem, MtQuestion
from fedsim.evaluate.advbench import AdvBench
from fedsim.evaluate.confusion import Verdict
from fedsim.evaluate.judge import Judged
from fedsim.evaluate.mt_bench import MtBench
from fedsim.evaluate.perplexity import HelpfulPerplexity
from fedsim.evaluate.suite import Evaluation, Part, Suite
from fedsim.generate.engine import Dialogues, Engine, Replies, Reply
from fedsim.parallel.world import World
from fedsim.record.metrics import Row, read_rows
from fedsim.record.outcomes import item_file
from fedsim.record.run_record import RunRecord
from fedsim.run.measurement import Measurement
from fedsim.safety.guard import LlamaGuard

CPU = torch.device("cpu")


def question(number: int) -> MtQuestion:
    return MtQuestion(number, "writing", ("Why?", "And then?"), None, {"question_id": number})


def rubric(record: Any, turn: int, reply: str) -> float:
    """Score of a reply: the adapter's number in it."""
    return float(reply.split()[-1])


ATTACKS = Part(AdvBench(max_new_tokens=5), [AdvBenchItem(f"Fly kite {i}", "Sure") for i in range(3)])
SUITE = Suite([ATTACKS, Part(MtBench(5, rubric), [question(81), question(82)])])
UNRATED = Suite([ATTACKS, Part(MtBench(5), [question(81), question(82)])])


class CountingRanks(OneRank):
    """One rank that counts how often work is shared."""

    num_maps = 0

    def map(self, *arguments: Any, **named: Any) -> list[Any]:
        self.num_maps += 1
        return super().map(*arguments, **named)


class Speaker(Engine):
    """An engine whose replies name the adapter in the model, and which records how it is asked."""

    def __init__(self, chat: Any, ranks: OneRank) -> None:
        super().__init__(torch.nn.Linear(1, 1), chat, ranks, batch_size=4, max_context=64, seed=0)  # type: ignore
        self.holds = "none"
        self.asked: list[list[tuple[keyed_random.KeyPart, ...]]] = []
        self.reports: list[Any] = []

    def hold(self, kinds: Sequence[Dialogues]) -> list[Replies]:
        self.asked += [[tuple(key) for key in kind.turn_keys] for kind in kinds]
        self.reports.append(self.on_progress)
        reply = Reply(f"I am {self.holds}", 3, False)
        return [[[reply for _ in kind.conversations] for _ in kind.turn_keys] for kind in kinds]


class Jury(LlamaGuard):
    """A guard that calls every exchange safe and records its progress callback."""

    def __init__(self) -> None:
        self.on_progress = None
        self.reports: list[Any] = []

    def judge_exchanges(self, exchanges: Any) -> list[Verdict]:
        self.reports.append(self.on_progress)
        return [Verdict(False, 0.25) for _ in exchanges]


class Stage:
    """A measurement of a model that says which adapter it holds."""

    def __init__(self, folder: Path, chat: Any, suite: Suite, shared: Any, *overrides: str) -> None:
        config = load_config(None, [f"record.dir={folder}", "name=kites", *overrides])
        world = World(CountingRanks(), CPU, exact=True)
        self.ranks = world.ranks
        self.record = RunRecord(config, world.ranks, False)
        self.record.folder.mkdir(parents=True, exist_ok=True)
        self.said: list[str] = []
        self.record.say = self.said.append  # type: ignore[method-assign]
        self.engine = Speaker(chat, world.ranks)  # type: ignore[arg-type]
        self.metered: list[tuple[str, Any]] = []
        meter: Any = SimpleNamespace(generated=lambda *given: self.metered.append(given))
        federation: Any = SimpleNamespace(engine=self.engine, flat=SimpleNamespace(load=self.load))
        self.measurement = Measurement(config, world, self.record, federation, suite, meter, shared)

    def load(self, adapter: torch.Tensor) -> None:
        self.engine.holds = f"{float(adapter[0]):g}"

    def take(self, round_idx: int, point: str, number: float) -> Row:
        """The row of a measurement on the adapter [number]."""
        self.measurement.take(round_idx, point, torch.tensor([number]))
        return self.rows()[-1]

    def rows(self) -> list[Row]:
        return read_rows(self.record.metrics_file)

    def file(self, name: str) -> Any:
        return json.loads((self.record.folder / "answers" / name).read_text(encoding="utf-8"))


Make = Callable[..., Stage]


@pytest.fixture()
def make(tmp_path: Path, llama3_bytes_chat: Any) -> Make:
    """``make(*overrides, suite=SUITE, shared=None)``: a measurement in the test's folder."""

    def made(*overrides: str, suite: Suite = SUITE, shared: Any = None) -> Stage:
        return Stage(tmp_path, llama3_bytes_chat, suite, shared, *overrides)

    return made


def test_the_adapter_that_is_handed_in_is_the_one_that_answers(make: Make) -> None:
    stage = make("record.texts=true")
    for round_idx, point, number in ((-1, "pretrained", 1.0), (4, "before_cai", 4.0), (4, "after_cai", 9.0)):
        row = stage.take(round_idx, point, number)
        assert (row["stage"], row["round"], row["point"]) == ("eval", round_idx + 1, point)
        assert row["eval/mt_bench"] == number
        assert row["eval/advbench_count"] == 3 and "artefact" not in row and "perf/reused" not in row
        replies = stage.file(f"advbench-kites-round{round_idx + 1}-{point}.json")
        assert replies == [{"item": i, "reply": f"I am {number:g}"} for i in range(3)]
        answers = (stage.record.folder / "answers" / "mt_bench").rglob(f"kites-round{round_idx + 1}-{point}.jsonl")
        assert [f"I am {number:g}" in path.read_text(encoding="utf-8") for path in answers] == [True]
        with item_file(stage.record.folder, round_idx + 1, point).open(encoding="utf-8") as stream:
            items = [line for line in csv.DictReader(stream) if line["figure"] == "mt_bench"]
        assert [float(line["value"]) for line in items] == [number, number]
    assert stage.metered == [("evaluate", stage.engine)] * 3


def test_every_point_draws_the_same_numbers(make: Make) -> None:
    stage = make()
    stage.take(-1, "pretrained", 1.0)
    first, stage.engine.asked = stage.engine.asked, []
    stage.take(3, "global", 2.0)
    assert stage.engine.asked == first and all(key[0] == "eval" for turns in first for key in turns)


def test_prompts_are_tokenised_once(make: Make) -> None:
    stage = make()
    stage.take(-1, "pretrained", 1.0)
    assert stage.ranks.num_maps == 1  # type: ignore[attr-defined]
    stage.take(0, "global", 2.0)
    assert stage.ranks.num_maps == 1  # type: ignore[attr-defined]


def test_replies_to_attacks_are_kept_where_they_are_asked_for(make: Make) -> None:
    stage = make("record.texts=false")
    stage.take(0, "global", 2.0)
    assert [path.name for path in (stage.record.folder / "answers").iterdir()] == ["mt_bench"]


def test_engine_and_guard_report_to_the_phase_while_it_lasts(make: Make) -> None:
    jury = Jury()
    stage = make(suite=replace(SUITE, guard=jury))
    row = stage.take(0, "global", 2.0)
    assert row["eval/advbench_guard_safe"] == 100.0
    for worker in (stage.engine, jury):
        assert worker.reports and all(report is not None for report in worker.reports)
        assert worker.on_progress is None


def test_the_headline_figures_end_the_phase(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    make().take(0, "global", 2.0)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "evaluate, after training" in line]
    assert "AdvBench" in line and "MT-Bench 2.0" in line


@pytest.mark.parametrize(
    ("every", "due"), [(0, [5]), (1, [0, 1, 2, 3, 4, 5]), (2, [1, 3, 5]), (4, [3, 5]), (6, [5]), (7, [5])]
)
def test_a_measurement_is_due_every_so_many_rounds_and_in_the_last(make: Make, every: int, due: list[int]) -> None:
    stage = make(f"eval.every={every}", "federation.num_rounds=6")
    assert [i for i in range(6) if stage.measurement.is_due(i)] == due


def test_only_the_untouched_model_s_evaluation_is_shared(make: Make) -> None:
    asked: list[tuple[Suite, Evaluation]] = []

    def shared(suite: Suite, compute: Callable[[], Evaluation]) -> Evaluation:
        asked.append((suite, compute()))
        return Evaluation({"eval/kites": 7}, artefact="kite-1", reused=True)

    stage = make(shared=shared)
    row = stage.take(-1, "pretrained", 1.0)
    assert (row["eval/kites"], row["artefact"], row["perf/reused"]) == (7, "kite-1", True)
    ((suite, computed),) = asked
    assert suite is stage.measurement.suite and computed.metrics["eval/mt_bench"] == 1.0
    row = stage.take(0, "global", 2.0)
    assert len(asked) == 1 and row["eval/mt_bench"] == 2.0 and "artefact" not in row


class Judge:
    """A judge that rates every answer 8 and records what it is shown."""

    unit = "turns"

    def __init__(self, **changes: Any) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.judged = replace(Judged("judge", [(8.0, 8.0)] * 2, 0, 0, 0, complete=True, error=None), **changes)

    def judge(self, folder: Path, model_id: str, answered: Any, report: Any) -> Judged:
        self.seen.append((folder, model_id, answered))
        report(4 if self.judged.complete else 1, 4)
        return self.judged


def judged(make: Make, **changes: Any) -> tuple[Stage, Judge, Row]:
    """A measurement of round 3 by a judge."""
    stage, judge = make(suite=UNRATED), Judge(**changes)
    stage.measurement.judge = judge  # type: ignore[assignment]
    return stage, judge, stage.take(2, "global", 2.0)


def test_the_judge_is_shown_this_model_s_answers(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    stage, judge, row = judged(make, news=("it was slow",))
    texts = [(question(number), ("I am 2", "I am 2")) for number in (81, 82)]
    assert judge.seen == [(stage.record.folder / "answers" / "mt_bench", "kites-round3-global", texts)]
    assert row["eval/mt_bench"] == 8.0 and row["eval/mt_bench_judge_failed"] == 0 and row["eval/advbench_count"] == 3
    assert stage.said == ["it was slow"]
    assert stage.record.timers.pop().keys() == {"time/evaluate_s", "time/judge_s"}
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "judge MT-Bench" in line]
    assert "MT-Bench 8.0" in line


def test_a_judge_that_failed_is_reported_with_the_way_to_finish(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    error = JudgeError("it rains")
    stage, _, row = judged(make, scores=[(None, None)] * 2, num_unjudged=4, complete=False, error=error)
    assert row["eval/mt_bench_judge_failed"] == 4 and "eval/mt_bench" not in row
    assert stage.said == [f"4 turns stay unjudged: it rains. To finish later: fedsim judge {stage.record.folder}"]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "judge MT-Bench" in line]
    assert "MT-Bench 8" not in line and "1/4 turns" in line, "what was not judged is not shown as done"


def test_a_judge_is_there_where_the_configuration_has_one_and_there_are_answers(make: Make, mt_folder: Path) -> None:
    assert make().measurement.judge is None
    files = [f"eval.mt_bench={mt_folder / 'question.jsonl'}", "judge.kind=openai", "judge.model=kite-judge",
             f"eval.mt_bench_references={mt_folder / 'reference_answer' / 'gpt-4.jsonl'}"]  # fmt: skip
    assert make(*files, suite=UNRATED).measurement.judge is not None
    assert make(*files, suite=Suite([ATTACKS])).measurement.judge is None


def test_without_mt_bench_the_judge_is_not_asked(make: Make) -> None:
    stage, judge = make(suite=Suite([ATTACKS])), Judge()
    stage.measurement.judge = judge  # type: ignore[assignment]
    assert "eval/mt_bench_judge_failed" not in stage.take(0, "global", 2.0) and judge.seen == []


def test_a_real_engine_measures_the_adapter_that_is_loaded(
    tmp_path: Path, make_adapted: Callable[..., Any], llama3_bytes_chat: Any
) -> None:
    """The adapter of another measurement is not left in the model: each figure is its own adapter's, in any order."""
    loaded, flat = make_adapted(std=0.0)
    assert isinstance(loaded.base, LlamaForCausalLM)
    conversations = [[user_turn("Why?"), assistant_turn(f"Kite {i}.")] for i in (1, 2)]
    stage = Stage(tmp_path, llama3_bytes_chat, Suite([Part(HelpfulPerplexity(), conversations)]), None)
    engine = Engine(loaded.base, loaded.chat, OneRank(), batch_size=4, max_context=128, seed=0)
    stage.measurement.resident = SimpleNamespace(engine=engine, flat=flat)  # type: ignore[assignment]
    start = flat.initial(0)
    moved = start + 0.3 * torch.sin(torch.arange(flat.size, dtype=torch.float32))
    taken = [(-1, "pretrained", start), (0, "before_cai", moved), (0, "after_cai", start)]
    found = []
    for round_idx, point, adapter in taken:
        stage.measurement.take(round_idx, point, adapter)
        found.append(stage.rows()[-1]["eval/perplexity"])
    assert found[0] == found[2] != found[1]
