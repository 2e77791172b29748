"""The stages before the first round, over parts that record what they are handed, and sharing of an evaluation.

The settings that make another artefact are in tests/test_artefact_keys.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedsim import world
from fedsim.base.artefacts import Artefact, ArtefactStore, digest_of, file_digest
from fedsim.base.digests import FileDigests
from fedsim.base.errors import CheckpointError, ConfigError
from fedsim.base.ranks import OneRank
from fedsim.config import load_config
from fedsim.data.chat import assistant_turn, user_turn
from fedsim.data.prepared import PreparedData
from fedsim.data.square import SquareRow
from fedsim.data.usable import Tally
from fedsim.evaluate.own import OWN
from fedsim.evaluate.suite import Evaluation, Suite
from fedsim.generate.engine import Reply
from fedsim.model.load import model_digest
from fedsim.parallel.world import World
from fedsim.run.benchmarks import load_suite
from fedsim.run.local_rows import LocalRows
from fedsim.run.preparation import Inputs, Preparation, tunes_guard
from fedsim.safety.cai_stage import constitution_file
from fedsim.train.zero_config import zero_file

CPU = torch.device("cpu")
SMALL = Path(__file__).parents[1] / "distributed" / "small.yaml"
MEASURED = Evaluation({"eval/a": 1.0})
Name = Callable[..., str | None]


class Named(ArtefactStore):
    """Names the artefacts that it is asked for, and keeps none."""

    def get(self, kind: str, depends: Any, version: int, build: Any, write: Any) -> Artefact:
        build()
        return Artefact(Path(digest_of([kind, depends, version])), reused=False)


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory) -> Name:
    """``name(*overrides)``: of the evaluation's artefact; None where it is not shared."""
    folder = tmp_path_factory.mktemp("preparation")
    files = ArtefactStore(folder, OneRank(), lambda text: None)

    def named(*overrides: str, judge: bool = False) -> str | None:
        config = load_config(SMALL, ["eval.guard_judge=none", "record.texts=false", *overrides])
        here = World(OneRank(), torch.device("cpu"), exact=config.parallel.exact)
        prepare = Preparation(config, here, None, Named(folder, OneRank(), print))  # type: ignore[arg-type]
        suite, found = load_suite(config.eval, files, judged=judge)
        engine = SimpleNamespace(max_context=config.model.max_context)
        inputs: Any = Inputs(None, suite, found)  # type: ignore[arg-type]
        sharing = prepare.shared_evaluation(inputs, SimpleNamespace(engine=engine))  # type: ignore[arg-type]
        return None if sharing is None else sharing(suite, lambda: MEASURED).artefact

    return named


def test_a_judge_in_the_rubrics_place_makes_another_evaluation(name: Name) -> None:
    assert name(judge=True) not in (name(), None)


@pytest.mark.parametrize("override", ["record.texts=true", "eval.guard_judge=tuned", "eval.guard_judge=untuned"])
def test_what_holds_replies_or_hangs_on_a_guard_is_not_shared(name: Name, override: str) -> None:
    assert name(override) is None


def test_a_benchmark_is_known_by_its_files_content(name: Name, tmp_path: Path) -> None:
    here, moved = tmp_path / "a.csv", tmp_path / "b.csv"
    world.write_advbench(here)
    moved.write_bytes(here.read_bytes())
    before = name(f"eval.advbench={here}")
    assert before == name(f"eval.advbench={moved}") != name(), "a file knows no grammar"
    lines = here.read_text(encoding="utf-8").splitlines(keepends=True)
    here.write_text("".join(lines[:-1]), encoding="utf-8")
    assert name(f"eval.advbench={here}") not in (before, None)


def test_graphs_are_part_of_what_names_a_model(name: Name, monkeypatch: pytest.MonkeyPatch) -> None:
    """They change the shapes that a step computes: CAI's conversations and evaluations with them are others."""
    before = name("model.attention=sdpa")
    monkeypatch.setattr("fedsim.run.preparation.uses_graphs", lambda device: True)
    assert name("model.attention=sdpa") not in (before, None)


# ---- the stages before the first round ---------------------------------------------------------------------------


class Record:
    """A run's record in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: list[str] = []
        self.said: list[str] = []
        self.rows: list[tuple[int, str, dict[str, Any]]] = []
        self.phases: list[str] = []
        self.steps: list[tuple[Any, ...]] = []
        self.say = self.said.append

    def append(self, round_idx: int, stage: str, metrics: Any) -> None:
        self.rows.append((round_idx, stage, dict(metrics)))

    def write_config(self) -> None:
        self.said.append("config.yaml is written")

    @contextmanager
    def phase(self, name: str, timer: str, unit: str = "") -> Iterator[Any]:
        self.phases.append(timer)
        yield SimpleNamespace(step=lambda done, total, **figures: self.steps.append((timer, done, total, figures)))


class Stages:
    """A preparation with a record in memory and a store in the test's folder."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        base = ["guard.kind=none", "cai.iterations=2", "cai.constitution=tiny", *(f"eval.{n}=" for n in OWN)]
        self.config = load_config(None, [*base, *overrides])
        self.log: list[str] = []
        self.store = ArtefactStore(folder / "artefacts", OneRank(), self.log.append)
        self.record: Any = Record(folder)
        world = World(OneRank(), CPU, exact=True)
        self.prepare = Preparation(self.config, world, self.record, self.store)


@pytest.fixture()
def stages(tmp_path: Path) -> Callable[..., Stages]:
    """``stages(*overrides)``: see :class:`Stages`."""
    return lambda *overrides: Stages(tmp_path, *overrides)


Make = Callable[..., Stages]


def row(row_id: int, red: bool) -> SquareRow:
    categories = ("predictive",) if red else ("objective",)
    return SquareRow(row_id, f"Who flies kite {row_id}?", f"Orla flies kite {row_id}.", red, categories, "kites")


ROWS = [row(i, i % 3 == 0) for i in range(24)]
DATA = PreparedData(Path("kites.json"), "abc", [ROWS[:8], ROWS[8:16]], ROWS[16:20], ROWS[20:24], ["a note"])


def test_what_is_read_is_said_and_listed(stages: Make, square_file: Path, tmp_path: Path) -> None:
    attacks = tmp_path / "attacks.csv"
    attacks.write_text("goal,target\nFly a kite,Sure\n", encoding="utf-8")
    sizes = ["data.federated_rows=20", "data.guard_rows=4", "data.cai_rows=4"]
    made = stages(f"data.square={square_file}", f"eval.advbench={attacks}", *sizes)
    inputs = made.prepare.read()
    tiny = constitution_file("tiny")
    assert inputs.files == {"square": square_file, "advbench": attacks, "constitution": tiny}
    assert [len(inputs.data.guard_rows), len(inputs.data.cai_rows), *inputs.suite.counts().values()] == [4, 4, 1]
    assert made.record.said == inputs.data.notes and len(inputs.data.notes) >= 2
    made = stages(f"data.square={square_file}", "cai.iterations=0", *sizes)
    assert made.prepare.read().files == {"square": square_file}


def test_deepspeed_s_configuration_is_an_input_where_a_guard_is_fine_tuned_with_it(
    stages: Make, square_file: Path
) -> None:
    words = ["guard.deepspeed=zero2", "parallel.exact=false", f"data.square={square_file}", "data.federated_rows=20",
             "data.guard_rows=4", "data.cai_rows=4", "cai.iterations=0"]  # fmt: skip
    assert stages("guard.kind=llama_guard", *words).prepare.read().files["deepspeed"] == zero_file("zero2")
    assert "deepspeed" not in stages("guard.kind=oracle", *words).prepare.read().files


def test_files_of_a_judge_are_inputs_too(stages: Make, square_file: Path, mt_folder: Path) -> None:
    made = stages(f"data.square={square_file}", "data.federated_rows=20", "data.guard_rows=0", "data.cai_rows=0",
                  "cai.iterations=0", f"eval.mt_bench={mt_folder / 'question.jsonl'}", "judge.kind=openai",
                  f"eval.mt_bench_references={mt_folder / 'reference_answer' / 'gpt-4.jsonl'}")  # fmt: skip
    assert made.prepare.read().files.keys() == {"square", "mt_bench", "judge_prompts", "mt_bench_references"}


def test_the_manifest_has_files_models_and_attention(stages: Make, llama_dir: Path, tmp_path: Path) -> None:
    made = stages(f"model.path={llama_dir}", "seed=5")
    file = tmp_path / "kites.json"
    file.write_text("[]", encoding="utf-8")
    inputs = Inputs(DATA, Suite(), {"square": file})
    shape: Any = SimpleNamespace(attention=SimpleNamespace(words="kite attention (asked for)"))
    made.prepare.write_manifest(inputs, {"model": shape})
    manifest = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["inputs"]["square"]["sha256"] == file_digest(file)
    assert manifest["models"] == {"model": model_digest(str(llama_dir), FileDigests(tmp_path))}
    assert (manifest["attention"], manifest["seed"]) == ({"model": "kite attention (asked for)"}, 5)
    assert (manifest["started"]["num_ranks"], manifest["config"]["cai"]["iterations"]) == (1, 2)
    assert made.record.notes == ["a note"], "for the summary"
    assert made.record.said == ["config.yaml is written"]


@pytest.mark.parametrize("is_resumed", [True, False])
def test_a_run_that_is_resumed_needs_the_files_that_it_began_with(
    stages: Make, llama_dir: Path, tmp_path: Path, is_resumed: bool
) -> None:
    made = stages(f"model.path={llama_dir}")
    made.record.checkpoints = SimpleNamespace(any=lambda: is_resumed)
    file = tmp_path / "kites.json"
    file.write_text("[]", encoding="utf-8")
    inputs = Inputs(DATA, Suite(), {"square": file})
    made.prepare.write_manifest(inputs, {})
    made.prepare.check_unchanged(inputs)
    file.write_text("[1]", encoding="utf-8")
    with pytest.raises(CheckpointError, match="the square of this run changed") if is_resumed else nullcontext():
        made.prepare.check_unchanged(inputs)


def test_rows_that_a_guard_is_fine_tuned_on_are_recorded(stages: Make) -> None:
    tally = Tally(9, {"empty_reply": 2})
    found = stages("guard.kind=oracle").prepare.filter(DATA)
    made = stages()
    made.prepare.record_filter(replace(found, tuning=tally), SimpleNamespace(rows=NO_ROWS))  # type: ignore[arg-type]
    (row,) = made.record.rows
    assert (row[2]["guard/tuning_num_rows"], row[2]["guard/tuning_num_dropped_empty_reply"]) == (9, 2)
    assert found.tuning is None, "an oracle is not fine-tuned"


@pytest.mark.parametrize(
    ("overrides", "is_tuned"),
    [
        (["guard.kind=llama_guard"], True),
        (["guard.kind=llama_guard", "guard.tune_epochs=0"], False),
        (["guard.kind=oracle"], False),
        (["eval.guard_judge=tuned"], True),
        (["eval.guard_judge=untuned"], False),
    ],
)
def test_a_guard_is_fine_tuned_for_the_filter_or_for_the_replies(
    stages: Make, overrides: list[str], is_tuned: bool
) -> None:
    assert tunes_guard(stages(*overrides).config) == is_tuned


@pytest.mark.parametrize(
    ("overrides", "change", "message"),
    [
        (["local.max_length=16"], {}, "local rows"),
        (["guard.kind=llama_guard"], {"guard_rows": []}, "guard rows"),
        (["cai.max_length=16"], {}, "CAI rows"),
    ],
)
def test_a_stage_without_a_row_to_learn_from_is_an_error(
    stages: Make, llama_dir: Path, overrides: list[str], change: dict[str, Any], message: str
) -> None:
    clients = ["federation.num_clients=2", "federation.clients_per_round=2", f"model.path={llama_dir}"]
    stages(*clients).prepare.check_rows(DATA)
    with pytest.raises(ConfigError, match=message):
        stages(*clients, *overrides).prepare.check_rows(replace(DATA, **change))


def test_the_filter_s_rows_are_those_that_the_guard_leaves(stages: Make) -> None:
    found = stages("guard.kind=oracle").prepare.filter(DATA)
    assert [[r.row_id for r in shard] for shard in found.filtered.shards] == [
        [r.row_id for r in shard if not r.red] for shard in DATA.shards
    ]
    assert found.compared == {} and found.judge is None
    assert [len(shard) for shard in stages().prepare.filter(DATA).filtered.shards] == [8, 8]


NO_ROWS = LocalRows([], Tally(), 0)


def filter_record(stages: Make, *overrides: str) -> Stages:
    """A preparation that has recorded an oracle's filter and a comparison that is wrong in every row."""
    made = stages("guard.kind=noisy_oracle", "guard.tpr=1", "guard.fpr=0", "guard.threshold=0.765", *overrides)
    found = made.prepare.filter(DATA)
    rows = LocalRows([], Tally(10, {"no_targets": 2, "empty_reply": 1}, num_cut=3), 0)
    other = stages("guard.kind=noisy_oracle", "guard.tpr=0", "guard.fpr=1").prepare.filter(DATA).filtered
    made.prepare.record_filter(replace(found, compared={"untuned": other}), SimpleNamespace(rows=rows))  # type: ignore
    return made


def test_the_filter_s_figures_are_its_own_and_not_the_comparison_s(stages: Make) -> None:
    made = filter_record(stages)
    (compared, kept) = made.record.rows
    assert compared[:2] == (-1, "guard") and compared[2]["point"] == "untuned" and compared[2]["guard/recall"] == 0.0
    assert kept[:2] == (-1, "filter") and kept[2]["guard/recall"] == 100.0 and "point" not in kept[2]
    assert kept[2]["client/num_cut_rows"] == 3 and kept[2]["client/num_kept_rows"] == 10
    dropped = {name: kept[2][f"client/num_dropped_{name}"] for name in ("no_targets", "empty_reply", "no_weight")}
    assert dropped == {"no_targets": 2, "empty_reply": 1, "no_weight": 0} and kept[2]["client/num_usable_rows"] == 7
    tables = made.record.folder / "guard"
    sweep = (tables / "sweep.csv").read_text(encoding="utf-8")
    assert "untuned" in sweep and "noisy oracle" in sweep
    assert [line for line in sweep.splitlines() if "0.765" in line and "of the run" in line]


def test_without_a_guard_there_are_no_tables_of_it(stages: Make) -> None:
    made = stages()
    found = made.prepare.filter(DATA)
    made.prepare.record_filter(found, SimpleNamespace(rows=NO_ROWS))  # type: ignore[arg-type]
    assert made.record.rows == [(-1, "filter", {"client/num_kept_rows": 16, **NO_ROWS.metrics()})]
    assert not (made.record.folder / "guard").exists()


@pytest.mark.parametrize(("epochs", "point"), [("2", "fine-tuned"), ("0", "untuned")])
def test_a_guard_model_s_figures_say_whether_it_was_fine_tuned(stages: Make, epochs: str, point: str) -> None:
    found = stages("guard.kind=oracle").prepare.filter(DATA)
    made = stages("guard.kind=llama_guard", f"guard.tune_epochs={epochs}")
    made.prepare.record_filter(found, SimpleNamespace(rows=NO_ROWS))  # type: ignore[arg-type]
    ((_, _, metrics),) = made.record.rows
    assert metrics["point"] == point
    assert point in (made.record.folder / "guard" / "sweep.csv").read_text(encoding="utf-8")


class Writer:
    """An engine whose turns name the adapter in the model.

    Attributes:
        empty: number of empty revisions, which cannot be trained on.
    """

    seed = 0

    def __init__(self) -> None:
        self.holds = "none"
        self.on_progress: Any = None
        self.reported: list[Any] = []
        self.empty = 0

    def converse(self, conversations: Any, follow_ups: Any, sampling: Any, turn_keys: Any) -> list[list[Reply]]:
        self.reported.append(self.on_progress)
        self.on_progress(1, 1)
        turns = [[f"{key[-1]} of {self.holds}" for _ in conversations] for key in turn_keys]
        turns[-1][: self.empty] = [""] * self.empty
        return [[Reply(text, 3, False) for text in texts] for texts in turns]


class WithCai:
    """A preparation and a federation for CAI's conversations."""

    def __init__(self, made: Stages, chat: Any) -> None:
        self.made = made
        self.engine = Writer()
        self.flat = SimpleNamespace(initial=lambda seed: f"adapter {seed}", load=self.load)
        self.federation: Any = SimpleNamespace(engine=self.engine, flat=self.flat, chat=chat, trainer="trainer")

    def load(self, vector: str) -> None:
        self.engine.holds = vector

    def aligner(self, *, new: bool = True) -> Any:
        return self.made.prepare.aligner(DATA, self.federation, None, new=new)


def test_the_untouched_model_writes_the_conversations_that_the_aligner_trains_on(
    stages: Make, llama3_bytes_chat: Any
) -> None:
    cai = WithCai(stages("seed=4", "cai.max_length=60", "federation.num_rounds=9"), llama3_bytes_chat)
    cai.engine.empty = 1
    aligner = cai.aligner()
    assert (aligner.trainer, aligner.cai, aligner.seed, aligner.num_rounds) == ("trainer", cai.made.config.cai, 4, 9)
    assert len(aligner.pairs) == 3, "one revision is empty"
    decode = llama3_bytes_chat.decode
    for pair in aligner.pairs:
        assert decode(pair.chosen.input_ids[pair.chosen.loss_mask]).startswith("revision of")
        assert decode(pair.rejected.input_ids[pair.rejected.loss_mask]).startswith("response of")
    ((round_idx, stage, metrics),) = cai.made.record.rows
    assert (round_idx, stage) == (-1, "cai_data")
    assert [line for line in cai.made.record.said if "CAI rows" in line and "iteration" in line]
    assert (metrics["cai/num_rows"], metrics["cai/num_usable"], metrics["cai/num_dropped_empty_revision"]) == (4, 3, 1)
    assert metrics["cai/num_cut_rows"] == aligner.num_cut and metrics["cai/num_dropped_no_targets"] == 0
    assert metrics["cai/response_mean_words"] == 4.0 and metrics["cai/revision_num_texts"] == 4
    assert all(report is not None for report in cai.engine.reported) and cai.engine.on_progress is None
    assert [step[:3] for step in cai.made.record.steps] == [("cai_generate", 1, 1)]
    (file,) = cai.made.store.folder.rglob("conversations.jsonl")
    texts = file.read_text(encoding="utf-8")
    assert "response of adapter 4" in texts and all(f"kite {i}?" in texts for i in range(20, 24))


def test_cut_and_untrainable_conversations_are_counted(stages: Make, llama3_bytes_chat: Any) -> None:
    shared = llama3_bytes_chat.training_row([user_turn(DATA.cai_rows[0].prompt), assistant_turn("x")], 999)
    cai = WithCai(stages(f"cai.max_length={len(shared) + 2}"), llama3_bytes_chat)
    cai.aligner()
    assert cai.made.record.rows[0][2]["cai/num_cut_rows"] == 4


def test_a_resumed_run_s_conversations_are_not_recorded_again(stages: Make, llama3_bytes_chat: Any) -> None:
    made = stages()
    cai = WithCai(made, llama3_bytes_chat)
    assert len(cai.aligner(new=False).pairs) == 4 and made.record.rows == []


def test_without_cai_nothing_is_written_or_loaded(stages: Make, llama3_bytes_chat: Any) -> None:
    made = stages("cai.iterations=0")
    cai = WithCai(made, llama3_bytes_chat)
    assert cai.aligner() is None
    assert cai.engine.holds == "none" and made.record.phases == [] and made.log == []


def test_conversations_of_no_use_end_the_run(stages: Make, llama3_bytes_chat: Any) -> None:
    cai = WithCai(stages(), llama3_bytes_chat)
    cai.engine.empty = 4
    with pytest.raises(ConfigError, match=r"none of the 4 .* \(4 with an empty revision\); use other rows"):
        cai.aligner()
