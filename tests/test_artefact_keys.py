"""Names of artefacts: everything that an artefact depends on changes its name, and nothing else does.

The tables below cover every key of the configuration's guard, CAI and evaluation parts: a new key must be added to one,
and so cannot be left out of a name unnoticed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedsim.base.artefacts import Artefact, ArtefactStore, digest_of
from fedsim.base.ranks import OneRank
from fedsim.config import CaiConfig, Config, EvalConfig, GuardConfig, code_names, code_role, load_config, to_flat
from fedsim.data.prepared import PreparedData
from fedsim.data.square import SquareRow
from fedsim.evaluate.own import OWN
from fedsim.extend import source_file
from fedsim.parallel.world import World
from fedsim.run.benchmarks import load_suite
from fedsim.run.preparation import Inputs, Preparation
from fedsim.run.prepare import prepare_data
from fedsim.safety.filter_stage import FilterStage
from fedsim.safety.guard_model import GuardModel

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
Names = dict[str, str]
"""Name by kind."""


class Named(Exception):
    """Raised once an artefact has its name, as it need not be made."""


class NamingStore(ArtefactStore):
    """A store that records the name of each artefact and makes none.

    Args:
        outer: kinds that need another artefact, whose name is recorded too.
    """

    def __init__(self, folder: Path, outer: tuple[str, ...] = ()) -> None:
        super().__init__(folder, OneRank(), lambda text: None)
        self.outer = outer
        self.names: Names = {}

    def get(self, kind: str, depends: Any, version: int, build: Any, write: Any) -> Artefact:
        self.names[kind] = digest_of([depends, version])
        if kind in self.outer:
            build()
        raise Named


def asked(store: NamingStore, act: Callable[[], object]) -> Names:
    """The names of all that ``act`` asks for."""
    with pytest.raises(Named):
        act()
    return store.names


def row(row_id: int) -> SquareRow:
    return SquareRow(row_id, f"Who flies kite {row_id}?", f"Orla flies kite {row_id}.", row_id % 2 == 0, (), "kites")


DATA = PreparedData(Path("kites.json"), "abc", [[row(0), row(1)], [row(2)]], [row(3), row(4)], [row(5), row(6)], [])
OTHER_DATA = {
    "another file": replace(DATA, source_sha256="abd"),
    "other client rows": replace(DATA, shards=[[row(0), row(1)], [row(7)]]),
    "other guard rows": replace(DATA, guard_rows=[row(3)]),
    "other CAI rows": replace(DATA, cai_rows=[row(5)]),
    "rows dealt otherwise": replace(DATA, shards=[[row(0)], [row(1), row(2)]]),
}


@dataclass(frozen=True)
class Places:
    """Folders of two models: the same files in another place, and one weight changed."""

    model: Path
    moved: Path
    changed: Path
    store: Path

    def config(self, *overrides: str) -> Config:
        base = [f"model.path={self.model}", f"guard.path={self.model}", "guard.kind=llama_guard", "guard.tune_epochs=1",
                "guard.lora_dropout=0.1", "cai.iterations=2", "cai.constitution=tiny", "eval.limit=5",
                *(f"eval.{name}=" for name in OWN)]  # fmt: skip
        named = {"MOVED": str(self.moved), "CHANGED": str(self.changed)}
        words = [override.format(**named) for override in overrides]
        return load_config(None, [*base, *words])


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, llama_dir: Path) -> Places:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("moved", "changed"):
        shutil.copytree(llama_dir, folder / name)
    weights = folder / "changed" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    return Places(llama_dir, folder / "moved", folder / "changed", folder / "artefacts")


def prepared(config: Config, store: ArtefactStore, facts: dict[str, Any]) -> Preparation:
    """A preparation on one process whose machine ``facts`` change."""
    world = World(OneRank(), CPU, exact=config.parallel.exact)
    made = Preparation(config, world, SilentRecord(), store)  # type: ignore[arg-type]
    made.facts |= facts
    return made


class SilentRecord:
    """A record without files or progress."""

    def phase(self, *_: str) -> Any:
        return SilentRecord()

    def __enter__(self) -> Any:
        return SimpleNamespace(step=lambda *given, **figures: None)

    def __exit__(self, *_: object) -> None:
        """Nothing."""


@pytest.mark.parametrize("fact", ["device", "threads", "exact", "versions", "gpu"])
def test_the_machine_s_facts_are_known(places: Places, fact: str) -> None:
    made = prepared(places.config("parallel.threads=3"), NamingStore(places.store), {})
    assert fact in made.facts
    assert (made.facts["device"], made.facts["threads"], made.facts["exact"]) == ("cpu", 3, True)


# ---- the guard's verdicts and its fine-tuned adapter -------------------------------------------------------------


class Unloaded(GuardModel):
    """A guard without a model, as none of its artefacts is made."""

    def _guard_model(self) -> Any:
        return SimpleNamespace(base=None, chat=None), SimpleNamespace(save=None, load=None, initial=lambda seed: None)


def guard_names(places: Places, *overrides: str, data: PreparedData = DATA, **facts: Any) -> Names:
    """Names of verdicts and, where the guard is fine-tuned, of its adapter."""
    config = places.config(*overrides)
    store = NamingStore(places.store, outer=("guard-verdicts",))
    arguments: Any = (config, OneRank(), None, CPU, store, {"device": "cpu", **facts}, lambda *given: None)
    stage = FilterStage(*arguments)
    stage.model = Unloaded(*arguments)
    if config.guard.tune_epochs == 0:
        store.outer = ()
    return asked(store, lambda: stage.run(data))


BOTH, VERDICTS, NEITHER = {"guard-verdicts", "guard-adapter"}, {"guard-verdicts"}, set[str]()

OF_GUARD: dict[str, tuple[str, set[str]]] = {
    "path": ("{CHANGED}", BOTH),
    "policy": ("square", BOTH),
    "max_length": ("999", BOTH),
    "batch_tokens": ("999", VERDICTS),  # decides in which order numbers are added, and no gradient
    "tune_epochs": ("2", BOTH),
    "tune_lr": ("1e-3", BOTH),
    "tune_batch_size": ("3", BOTH),
    "lora_r": ("2", BOTH),
    "lora_alpha": ("3", BOTH),
    "lora_dropout": ("0", BOTH),
    "lora_targets": ("[q_proj]", BOTH),
    "action": ("refuse", NEITHER),
    "refusal": ("No.", NEITHER),
    "red_weight": ("0.9", NEITHER),
    "threshold": ("0.9", NEITHER),
    "measure_untuned": ("true", NEITHER),
    "measure_policies": ("true", NEITHER),
    "tpr": ("0.9", NEITHER),
    "fpr": ("0.9", NEITHER),
}
"""Keys of the guard: another value, and whose names it changes."""

NO_KEYS_OF_THE_GUARD = {
    "kind",
    "options",
    "deepspeed",
}  # of other guards, which have a test of their own; DeepSpeed too


def test_every_key_of_the_guard_is_in_the_table() -> None:
    assert {field.name for field in fields(GuardConfig)} == OF_GUARD.keys() | NO_KEYS_OF_THE_GUARD


def changed(before: Names, after: Names) -> set[str]:
    assert before.keys() == after.keys()
    return {kind for kind in before if before[kind] != after[kind]}


@pytest.fixture(scope="module")
def guard_before(places: Places) -> Names:
    return guard_names(places)


@pytest.mark.parametrize("key", OF_GUARD)
def test_keys_of_the_guard(places: Places, guard_before: Names, key: str) -> None:
    value, wanted = OF_GUARD[key]
    assert guard_before.keys() == BOTH
    assert changed(guard_before, guard_names(places, f"guard.{key}={value}")) == wanted


@pytest.mark.parametrize(
    "override", ["seed=1", "local.micro_batch_size=2", "data.language=ko", "model.dtype=bfloat16",
                 "model.attention=eager"],
)  # fmt: skip
def test_what_else_decides_a_guard_s_verdict(places: Places, guard_before: Names, override: str) -> None:
    assert changed(guard_before, guard_names(places, override)) == BOTH


@pytest.mark.parametrize(
    "override", ["name=another", "guard.path={MOVED}", "model.path={CHANGED}", "model.lora_r=3", "local.lr=0.1",
                 "federation.num_rounds=3", "federation.algorithm=scaffold", "cai.iterations=9", "eval.limit=9",
                 "eval.batch_size=3", "record.texts=true", "record.dir=elsewhere", "record.artefacts=elsewhere",
                 "record.keep_checkpoints=9", "wandb.mode=off"],
)  # fmt: skip
def test_what_decides_no_verdict(places: Places, guard_before: Names, override: str) -> None:
    assert changed(guard_before, guard_names(places, override)) == NEITHER


@pytest.mark.parametrize(
    ("which", "wanted"),
    [("another file", BOTH), ("other client rows", VERDICTS), ("other guard rows", BOTH), ("other CAI rows", NEITHER),
     ("rows dealt otherwise", NEITHER)],
)  # fmt: skip
def test_rows_of_a_guard(places: Places, guard_before: Names, which: str, wanted: set[str]) -> None:
    assert changed(guard_before, guard_names(places, data=OTHER_DATA[which])) == wanted


def test_rows_that_attackers_have_changed_are_other_rows(places: Places, guard_before: Names) -> None:
    assert changed(guard_before, guard_names(places, data=replace(DATA, attacked="abc"))) == VERDICTS


OWN_GUARD = (
    "from fedsim import Guard\n\nclass Mine(Guard):\n    def __init__(self, x=1): ...\n    def judge(self, rows): ..."
)


def test_a_user_s_guard_s_verdicts_are_those_of_its_content_options_and_rows(places: Places, tmp_path: Path) -> None:
    def names(*overrides: str, folder: str = "a", text: str = OWN_GUARD, data: PreparedData = DATA) -> Names:
        (tmp_path / folder).mkdir(exist_ok=True)
        file = tmp_path / folder / "mine.py"
        file.write_text(text)
        store = NamingStore(places.store)
        config = places.config(f"guard.kind={file}:Mine", *overrides)
        stage = FilterStage(config, OneRank(), None, CPU, store, {"device": "cpu"}, lambda *given: None)  # type: ignore[arg-type]
        return asked(store, lambda: stage.run(data))

    before = names()
    assert before.keys() == {"users-guard-verdicts"} and names(folder="b") == before == names(
        "guard.threshold=0.9", "seed=1"
    )
    others = [names(text=f"{OWN_GUARD}\n"), names("guard.options.x=2"), names("data.language=ko"),
              names(data=replace(DATA, attacked="abc")), *(names(data=OTHER_DATA[which]) for which in
              ("another file", "other client rows", "other guard rows"))]  # fmt: skip
    assert all(other != before for other in others)


def test_the_machine_decides_a_verdict(places: Places, guard_before: Names) -> None:
    assert changed(guard_before, guard_names(places, device="another")) == BOTH


def test_verdicts_of_a_tuned_guard_change_with_the_version_of_its_adapter(
    places: Places, guard_before: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    untuned = guard_names(places, "guard.tune_epochs=0")
    monkeypatch.setattr("fedsim.safety.guard_model.VERSION", -1)
    assert changed(guard_before, guard_names(places)) == BOTH
    assert guard_names(places, "guard.tune_epochs=0") == untuned


@pytest.mark.parametrize(
    ("overrides", "is_other"),
    [(["guard.policy=square"], True), (["guard.max_length=999"], True), (["guard.batch_tokens=999"], True),
     (["guard.path={CHANGED}"], True), (["seed=1"], False), (["guard.tune_lr=1e-3"], False),
     (["guard.lora_r=2"], False), (["local.micro_batch_size=2"], False)],
)  # fmt: skip
def test_a_guard_as_it_is_knows_nothing_of_tuning(places: Places, overrides: list[str], is_other: bool) -> None:
    before = guard_names(places, "guard.tune_epochs=0")
    assert before.keys() == VERDICTS and before != guard_names(places)
    assert (guard_names(places, "guard.tune_epochs=0", *overrides) != before) == is_other
    assert guard_names(places, "guard.tune_epochs=0", data=OTHER_DATA["other guard rows"]) == before


def test_a_comparison_under_the_other_policy_is_what_a_run_under_that_policy_judges(places: Places) -> None:
    """The guard that is compared is not fine-tuned, and its policy is not the run's."""
    for policy, other in (("square", "llama_guard_3"), ("llama_guard_3", "square")):
        config = places.config("guard.measure_policies=true", f"guard.policy={policy}")
        store = NamingStore(places.store)
        stage = FilterStage(config, OneRank(), None, CPU, store, {"device": "cpu"}, print)  # type: ignore[arg-type]
        compared = asked(store, partial(stage.compare, DATA))
        assert compared == guard_names(places, "guard.tune_epochs=0", f"guard.policy={other}")


class Ranks(OneRank):
    size = 2


def test_sums_of_deepspeed_depend_on_the_number_of_ranks(places: Places, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    words = ["guard.deepspeed=zero2", "parallel.exact=false"]
    arguments = [places.config(*words), OneRank(), None, CPU, NamingStore(tmp_path), {}, None]
    one = GuardModel(*arguments).depends(DATA, tuned=True)  # type: ignore[arg-type]
    arguments[1] = Ranks()
    two = GuardModel(*arguments).depends(DATA, tuned=True)  # type: ignore[arg-type]
    arguments[0] = places.config("parallel.exact=false")
    plain = GuardModel(*arguments).depends(DATA, tuned=True)  # type: ignore[arg-type]
    assert one != two and plain not in (one, two)


# ---- CAI's conversations -----------------------------------------------------------------------------------------


def cai_names(places: Places, *overrides: str, data: PreparedData = DATA, **facts: Any) -> Names:
    """The name of the conversations, as a run asks for them."""
    store = NamingStore(places.store)
    prepare = prepared(places.config(*overrides), store, facts)
    flat = SimpleNamespace(load=lambda vector: None, initial=lambda seed: None)
    federation: Any = SimpleNamespace(flat=flat, engine=SimpleNamespace(on_progress=None))
    return asked(store, lambda: prepare.aligner(data, federation, None, new=True))


@pytest.fixture(scope="module")
def cai_before(places: Places) -> Names:
    return cai_names(places)


OF_CAI = {
    "constitution": ("responsible", True),
    "first_turn": ("dataset", True),
    "temperature": ("0.5", True),
    "max_new_tokens": ("9", True),
    "iterations": ("9", False),
    "every": ("9", False),
    "batch_size": ("9", False),
    "sft_lr": ("0.9", False),
    "dpo_lr": ("0.9", False),
    "beta": ("0.9", False),
    "max_length": ("99", False),
}
"""Keys of CAI: another value, and whether it makes other conversations."""


def test_every_key_of_cai_is_in_the_table() -> None:
    assert {field.name for field in fields(CaiConfig)} == OF_CAI.keys()


@pytest.mark.parametrize("key", OF_CAI)
def test_keys_of_cai(places: Places, cai_before: Names, key: str) -> None:
    value, is_other = OF_CAI[key]
    assert (cai_names(places, f"cai.{key}={value}") != cai_before) == is_other


@pytest.mark.parametrize(
    "override", ["seed=1", "data.language=ko", "eval.batch_size=3", "model.max_context=99", "model.path={CHANGED}",
                 "model.dtype=bfloat16", "model.attention=eager", "parallel.threads=2", "parallel.exact=false"],
)  # fmt: skip
def test_what_else_decides_the_conversations(places: Places, cai_before: Names, override: str) -> None:
    assert cai_names(places, override) != cai_before


@pytest.mark.parametrize(
    "override", ["name=another", "model.path={MOVED}", "model.lora_r=3", "guard.path={CHANGED}", "guard.kind=none",
                 "guard.threshold=0.9", "local.lr=0.1", "local.micro_batch_size=2", "federation.num_rounds=3",
                 "eval.limit=9", "eval.temperature=0", "record.texts=true", "record.dir=elsewhere",
                 "record.artefacts=elsewhere", "wandb.mode=off"],
)  # fmt: skip
def test_what_decides_no_conversation(places: Places, cai_before: Names, override: str) -> None:
    assert cai_names(places, override) == cai_before


@pytest.mark.parametrize(
    ("which", "is_other"), [("another file", True), ("other CAI rows", True), ("other client rows", False),
                            ("other guard rows", False)],
)  # fmt: skip
def test_rows_of_the_conversations(places: Places, cai_before: Names, which: str, is_other: bool) -> None:
    assert (cai_names(places, data=OTHER_DATA[which]) != cai_before) == is_other


def test_a_constitution_is_known_by_its_content(places: Places, cai_before: Names, tmp_path: Path) -> None:
    shipped = Path(__file__).parents[1] / "fedsim" / "configs" / "constitution" / "tiny.json"
    own = tmp_path / "own.json"
    shutil.copy(shipped, own)
    assert cai_names(places, f"cai.constitution={own}") == cai_before
    content = json.loads(own.read_text(encoding="utf-8"))
    own.write_text(json.dumps(content, indent=9), encoding="utf-8")
    assert cai_names(places, f"cai.constitution={own}") != cai_before


@pytest.mark.parametrize("fact", ["device", "versions", "gpu"])
def test_the_machine_decides_conversations_and_evaluation(places: Places, fact: str) -> None:
    for names in (cai_names, evaluation_names):
        assert names(places, **{fact: "another"}) != names(places)


# ---- the untouched model's evaluation ----------------------------------------------------------------------------


def evaluation_names(
    places: Places, *overrides: str, max_context: int = 512, rows: Path | None = None, **facts: Any
) -> Names:
    """The name of the evaluation, as a run asks for it; a benchmark of two attacks stands for all."""
    attacks = places.store.parent / "advbench.csv"
    attacks.write_text("goal,target\nFly a kite,Sure\nFly two,Sure\n", encoding="utf-8")
    store = NamingStore(places.store)
    config = places.config(f"eval.advbench={attacks}", *overrides)
    suite, files = load_suite(config.eval, store)
    own = attacks if rows is None else rows
    code = {code_role(key): source_file(*named) for key, named in code_names(to_flat(config)).items()}
    inputs: Any = Inputs(None, suite, {"square": own, "constitution": own, **files, **code})  # type: ignore[arg-type, dict-item]
    federation: Any = SimpleNamespace(engine=SimpleNamespace(max_context=max_context))
    sharing = prepared(config, store, facts).shared_evaluation(inputs, federation)
    assert sharing is not None
    return asked(store, lambda: sharing(suite, lambda: None))  # type: ignore[arg-type, return-value]


@pytest.fixture(scope="module")
def evaluation_before(places: Places) -> Names:
    return evaluation_names(places)


OF_EVALUATION = {
    "advbench_phrases": ("gcg", True),
    "hhh_scorer": ("likelihood", True),
    "mt_bench_references": ("elsewhere", True),  # harmless: an untouched model is measured once more
    "temperature": ("0", True),
    "max_new_tokens": ("9", True),
    "batch_size": ("9", True),
    "limit": ("1", True),
    "every": ("3", False),
}
"""Keys of the evaluation: another value, and whether it makes another evaluation."""

NOT_SHARED = {"guard_judge", "advbench_options", "benchmarks"}  # a user's own code has tests of its own


def test_every_key_of_the_evaluation_is_in_the_table() -> None:
    assert {f.name for f in fields(EvalConfig)} == OF_EVALUATION.keys() | NOT_SHARED | set(OWN)


@pytest.mark.parametrize("key", OF_EVALUATION)
def test_keys_of_the_evaluation(places: Places, evaluation_before: Names, key: str) -> None:
    value, is_other = OF_EVALUATION[key]
    assert (evaluation_names(places, f"eval.{key}={value}") != evaluation_before) == is_other


@pytest.mark.parametrize(
    "override", ["seed=1", "model.path={CHANGED}", "model.dtype=bfloat16", "model.attention=eager",
                 "parallel.threads=2", "parallel.exact=false"],
)  # fmt: skip
def test_what_else_decides_the_evaluation(places: Places, evaluation_before: Names, override: str) -> None:
    assert evaluation_names(places, override) != evaluation_before


def test_files_of_other_stages_decide_no_evaluation(
    places: Places, evaluation_before: Names, square_file: Path
) -> None:
    assert evaluation_names(places, rows=square_file) == evaluation_before


def test_the_content_of_a_user_s_phrase_rule_decides_the_evaluation(places: Places, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    word = f"eval.advbench_phrases={file}:rule"
    found = []
    for text in ("def rule(reply, x=1): return True", "def rule(reply, x=1): return False"):
        file.write_text(text)
        found += [evaluation_names(places, word), evaluation_names(places, word, "eval.advbench_options.x=2")]
    assert all(found.count(one) == 1 for one in found)


def test_the_context_decides_the_evaluation(places: Places, evaluation_before: Names) -> None:
    assert evaluation_names(places, max_context=400) != evaluation_before


@pytest.mark.parametrize(
    "override", ["name=another", "model.path={MOVED}", "model.lora_r=3", "guard.path={CHANGED}", "guard.kind=none",
                 "cai.iterations=0", "local.lr=0.1", "federation.num_rounds=3", "data.language=ko",
                 "record.dir=elsewhere", "record.keep_checkpoints=9", "wandb.mode=off"],
)  # fmt: skip
def test_what_decides_no_evaluation(places: Places, evaluation_before: Names, override: str) -> None:
    assert evaluation_names(places, override) == evaluation_before


# ---- rows of a SQuARe file ---------------------------------------------------------------------------------------


def row_names(places: Places, path: Path, *overrides: str) -> Names:
    """The name of the rows that are read from a file."""
    store = NamingStore(places.store)
    config = places.config(f"data.square={path}", *overrides)
    return asked(store, lambda: prepare_data(config, store, OneRank()))


def test_rows_are_those_of_a_file_and_a_language(places: Places, tmp_path: Path, square_file: Path) -> None:
    before = row_names(places, square_file)
    moved, other = tmp_path / "moved.json", tmp_path / "other.json"
    shutil.copy(square_file, moved)
    assert row_names(places, moved) == before
    other.write_text(json.dumps(json.loads(square_file.read_text(encoding="utf-8"))[1:]), encoding="utf-8")
    assert row_names(places, other) != before
    assert row_names(places, square_file, "data.language=ko") != before
    for override in ("seed=1", "data.federated_rows=9", "data.guard_rows=9", "federation.num_clients=9", "name=x"):
        assert row_names(places, square_file, override) == before
