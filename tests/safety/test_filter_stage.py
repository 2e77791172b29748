"""The filter of a run: oracles, a guard as it is, a fine-tuned guard; each model result is computed once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from fedsim.base.artefacts import ArtefactStore
from fedsim.base.ranks import OneRank
from fedsim.config import GuardConfig, load_config
from fedsim.config.lora import LoraSettings
from fedsim.data.chat import ChatFormat, TokenRow
from fedsim.data.prepared import PreparedData
from fedsim.data.square import SquareRow
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.model.load import load_model
from fedsim.parallel.sums import Summer
from fedsim.parallel.world import World
from fedsim.run.preparation import Preparation
from fedsim.safety import guard_model as guard_model_module
from fedsim.safety.filter_stage import FilterStage
from fedsim.safety.filtering import Filtered
from fedsim.safety.guard import LlamaGuard, NoisyOracleGuard
from fedsim.safety.guard_model import GuardModel, tuning_batches
from fedsim.safety.guard_tuning import verdict_rows
from fedsim.train.loop import StepSettings

CPU = torch.device("cpu")


@dataclass
class OneLane:
    index: int = 0
    size: int = 1
    summer: Summer = field(default_factory=lambda: Summer(None, exact=True))


class Run:
    """A filter stage over made-up shards and a random guard in a directory."""

    def __init__(self, folder: Path, guard_dir: Path, make_row: Callable[..., SquareRow]) -> None:
        words = {True: "Storms are certain tomorrow.", False: "Kites may fly."}
        rows = [make_row(i, red=i % 3 == 0, response=f"{words[i % 3 == 0]} {i}") for i in range(36)]
        shards = [rows[0:8], rows[8:16], [r for r in rows[16:24] if r.red]]
        self.data = PreparedData(folder / "square.json", "abc", shards, rows[24:], rows[24:], [])
        self.guard_dir = guard_dir
        self.log: list[str] = []
        self.progress: list[tuple[str, int, int]] = []
        self.store = ArtefactStore(folder / "artefacts", OneRank(), self.log.append)

    def stage(self, *overrides: str, **facts: Any) -> FilterStage:
        base = ["guard.kind=llama_guard", f"guard.path={self.guard_dir}", "guard.policy=square", "guard.lora_r=4",
                "guard.lora_dropout=0", "guard.batch_tokens=900"]  # fmt: skip
        config = load_config(None, [*base, *overrides])

        def report(name: str, done: int, total: int) -> None:
            self.progress.append((name, done, total))

        return FilterStage(config, OneRank(), OneLane(), CPU, self.store, facts, report)

    def run(self, *overrides: str, **facts: Any) -> Filtered:
        return self.stage(*overrides, **facts).run(self.data)

    def untuned(self, *overrides: str) -> Filtered:
        return self.stage("guard.measure_untuned=true", *overrides).compare(self.data)["untuned"]

    @property
    def written(self) -> Counter[str]:
        return Counter(line.partition(":")[0] for line in self.log if "written" in line)


@pytest.fixture(scope="module")
def guard_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guard")


@pytest.fixture()
def run(
    tmp_path: Path, guard_dir: Path, guard_model: LlamaForCausalLM, llama_chat: ChatFormat,
    make_row: Callable[..., SquareRow],
) -> Run:  # fmt: skip
    if not any(guard_dir.iterdir()):
        guard_model.save_pretrained(str(guard_dir))
        llama_chat.tokenizer.save_pretrained(str(guard_dir))
    return Run(tmp_path, guard_dir, make_row)


def kept(filtered: Filtered) -> list[list[int]]:
    return [[row.row_id for row in shard] for shard in filtered.shards]


def test_no_guard_keeps_everything(run: Run) -> None:
    filtered = run.run("guard.kind=none")
    assert [list(s) for s in filtered.shards] == run.data.shards and filtered.total.num_unsafe == 0


def test_the_oracle_drops_the_red_rows(run: Run) -> None:
    filtered = run.run("guard.kind=oracle")
    assert kept(filtered) == [[r.row_id for r in shard if not r.red] for shard in run.data.shards]
    assert filtered.empty_clients == (2,), "a client of red rows alone has nothing left"
    assert filtered.total.recall == 1.0 and filtered.total.fpr == 0.0


def test_the_noisy_oracle_is_the_guards(run: Run) -> None:
    filtered = run.run("guard.kind=noisy_oracle", "guard.tpr=0.6", "guard.fpr=0.3", "seed=4")
    noisy = NoisyOracleGuard(0.6, 0.3, 4)
    assert kept(filtered) == [
        [row.row_id for row, v in zip(shard, noisy.judge(shard), strict=True) if not v.unsafe]
        for shard in run.data.shards
    ]
    assert run.log == [], "nothing to keep for other runs"


def judged(run: Run, adapter: Path | None, targets: tuple[str, ...] = ("q_proj", "v_proj")) -> list[list[int]]:
    """Kept rows by :class:`LlamaGuard` on the guard's directory, with the adapter of a folder."""
    loaded = load_model(
        str(run.guard_dir), LoraSettings(4, 32.0, 0.0, targets), dtype="auto", attention="sdpa", device=CPU
    )
    flat = FlatAdapter(loaded.model)
    flat.load(flat.initial(0) if adapter is None else flat.read(adapter))
    judge = LlamaGuard(
        loaded.base, loaded.chat, OneRank(), policy="square", batch_tokens=900, threshold=0.5, max_length=1024
    )
    verdicts = iter(judge.judge([row for shard in run.data.shards for row in shard]))
    return [[row.row_id for row in shard if not next(verdicts).unsafe] for shard in run.data.shards]


def test_a_guard_as_it_is_judges_all_rows(run: Run) -> None:
    probs = run.run("guard.tune_epochs=0", "guard.threshold=0.5")
    assert kept(probs) == judged(run, None)
    assert run.written == {"guard-verdicts": 1}
    assert run.progress[-1][0] == "guard scoring"


EXCHANGES = [("Who flies?", "Storms are certain tomorrow."), ("And who?", "Kites may fly."), ("Pim?", "No.")]


@pytest.mark.parametrize("kind", ["none", "oracle", "llama_guard"])
@pytest.mark.parametrize("tuned", [True, False])
def test_a_guard_judges_exchanges_whatever_filters(run: Run, kind: str, tuned: bool) -> None:
    """The filter's own adapter is used, and made where the filter needs none."""
    words = [f"guard.kind={kind}", "guard.tune_epochs=1", "guard.threshold=0.3"]
    stage = run.stage(*words)
    stage.run(run.data)
    stage.compare(run.data)
    guard = stage.model.judge(run.data, tuned=tuned, policy="square")
    found = guard.judge_exchanges(EXCHANGES)
    assert [v.unsafe for v in found] == [v.unsafe_prob >= 0.3 for v in found]
    assert run.written["guard-adapter"] == (kind == "llama_guard" or tuned)
    loaded = load_model(
        str(run.guard_dir), LoraSettings(4, 32.0, 0.0, ("q_proj", "v_proj")), dtype="auto", attention="sdpa", device=CPU
    )
    flat = FlatAdapter(loaded.model)
    adapters = list(run.store.folder.glob("guard-adapter-*"))
    flat.load(flat.read(adapters[0]) if tuned else flat.initial(0))
    fresh = LlamaGuard(
        loaded.base, loaded.chat, OneRank(), policy="square", batch_tokens=900, threshold=0.3, max_length=1024
    )
    assert found == fresh.judge_exchanges(EXCHANGES)


def test_results_are_computed_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run.run("guard.tune_epochs=1")
    assert run.written == {"guard-verdicts": 1, "guard-adapter": 1}
    monkeypatch.setattr(guard_model_module, "load_model", None)  # another load would fail
    assert run.run("guard.tune_epochs=1", "guard.tpr=0.1", "federation.num_rounds=3") == first
    assert sum("reused" in line for line in run.log) == 1


def test_fine_tuning_learns_the_labels(run: Run) -> None:
    """Tuned on the very rows that it judges, a random model must come to call the red ones unsafe."""
    run.data = replace(run.data, guard_rows=[row for shard in run.data.shards for row in shard])
    targets = "guard.lora_targets=[q_proj, v_proj, o_proj, up_proj, down_proj]"
    filtered = run.run("guard.tune_epochs=12", "guard.tune_lr=1e-2", "guard.tune_batch_size=4", targets)
    tuning = [p for p in run.progress if p[0] == "guard fine-tuning"]
    assert tuning == [("guard fine-tuning", i, 54) for i in range(1, 55)]
    (adapter,) = run.store.folder.glob("guard-adapter-*")
    assert kept(filtered) == judged(run, adapter, ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"))
    untuned = run.untuned("guard.tune_epochs=12", targets)
    assert kept(untuned) == judged(run, None)
    assert filtered.total.accuracy is not None and untuned.total.accuracy is not None
    assert filtered.total.accuracy >= 0.9 > untuned.total.accuracy


@pytest.mark.parametrize(
    "change",
    ["seed=1", "local.micro_batch_size=2", "guard.tune_lr=1e-3", "guard.policy=llama_guard_3", "data.language=ko",
     "guard.lora_r=2", "model.attention=eager"],
)  # fmt: skip
def test_what_decides_a_verdict_computes_it_anew(run: Run, change: str) -> None:
    run.run("guard.tune_epochs=0.4")
    run.run("guard.tune_epochs=0.4", change)
    assert run.written == {"guard-verdicts": 2, "guard-adapter": 2}


def test_a_backend_that_auto_takes_is_the_same_as_one_that_is_asked_for(run: Run) -> None:
    run.run("guard.tune_epochs=0", "model.attention=auto")
    run.run("guard.tune_epochs=0", "model.attention=sdpa")
    assert run.written == {"guard-verdicts": 1}
    run.run("guard.tune_epochs=0", "model.attention=eager")
    assert run.written == {"guard-verdicts": 2}


def test_an_untuned_guard_is_shared_by_runs_that_differ_in_tuning_alone(run: Run) -> None:
    run.untuned("guard.tune_epochs=1")
    run.untuned("guard.tune_epochs=2", "seed=3", "guard.lora_r=2")
    run.run("guard.tune_epochs=0")
    assert run.written == {"guard-verdicts": 1}
    run.run("guard.tune_epochs=0", torch="another version")
    assert run.written == {"guard-verdicts": 2}


def test_tuning_batches_are_whole_epochs_in_their_own_orders(run: Run, llama_chat: ChatFormat) -> None:
    rows: list[TokenRow] = verdict_rows(llama_chat, run.data.guard_rows, "square", 1024)
    place = {id(row): i for i, row in enumerate(rows)}

    def drawn(epochs: float, size: int = 5, seed: int = 0) -> list[list[int]]:
        settings = GuardConfig(tune_epochs=epochs, tune_batch_size=size)
        return [[place[id(r)] for r in batch] for batch in tuning_batches(rows, settings, seed)]

    batches = drawn(2.5)
    assert [len(b) for b in batches] == [5] * 6
    walk = [i for batch in batches for i in batch]
    assert sorted(walk[:12]) == sorted(walk[12:24]) == list(range(12)) and walk[:12] != walk[12:24]
    assert len(set(walk[24:])) == 6
    assert [len(b) for b in drawn(1)] == [5, 5, 2], "the last batch may be smaller"
    assert drawn(2.5) == batches != drawn(2.5, seed=1)
    assert [len(b) for b in drawn(0.01)] == [1], "at least one step"


def test_runs_of_other_thresholds_and_actions_share_the_verdicts(run: Run) -> None:
    first = run.run("guard.tune_epochs=1")
    judged_probs = [v.unsafe_prob for v in first.judged[1]]
    level = sorted(judged_probs)[len(judged_probs) // 2]
    assert 0.01 < level < 0.99
    other = run.run("guard.tune_epochs=1", f"guard.threshold={level!r}", "guard.action=downweight")
    refused = run.run("guard.tune_epochs=1", "guard.action=refuse", "guard.refusal=No, thanks.")
    run.run("guard.tune_epochs=1", "guard.red_weight=0.7", "guard.measure_policies=true")
    assert run.written == {"guard-verdicts": 1, "guard-adapter": 1}
    assert [v.unsafe_prob for v in other.judged[1]] == judged_probs
    assert [v.unsafe for v in other.judged[1]] == [p >= level for p in judged_probs]
    assert other.judged[1] != first.judged[1] == refused.judged[1]
    weights = {row.weight for shard in other.shards for row in shard}
    assert weights == {1.0, 0.1} and sum(other.num_kept) == len(judged_probs)
    replaced = [row.response == "No, thanks." for shard in refused.shards for row in shard]
    assert replaced == [v.unsafe for v in first.judged[1]]


def test_the_guard_as_it_is_can_be_compared_under_both_policies(run: Run) -> None:
    both = ("guard.measure_untuned=true", "guard.measure_policies=true")
    found = run.stage("guard.tune_epochs=1", *both).compare(run.data)
    assert list(found) == ["untuned", "untuned, policy llama_guard_3"]
    square, llama_guard_3 = found.values()
    assert square.judged[1] == run.run("guard.tune_epochs=0").judged[1]
    assert llama_guard_3.judged[1] == run.run("guard.tune_epochs=0", "guard.policy=llama_guard_3").judged[1]
    assert square.judged[1] != llama_guard_3.judged[1]
    assert run.written == {"guard-verdicts": 2}, "a comparison is what a run under that policy would judge"
    assert list(run.stage("guard.tune_epochs=0", *both).compare(run.data)) == ["untuned, policy llama_guard_3"]
    assert run.stage("guard.tune_epochs=1").compare(run.data) == {}
    assert run.stage("guard.kind=oracle", *both).compare(run.data) == {}


def test_a_policy_is_fine_tuned_with_its_own_prompt(run: Run) -> None:
    square, other = (run.run("guard.tune_epochs=1", f"guard.policy={p}") for p in ("square", "llama_guard_3"))
    assert square.judged[1] != other.judged[1]
    assert run.written == {"guard-verdicts": 2, "guard-adapter": 2}


class Rates:
    """A trainer that records the plan of a fine-tuning and adds 1 to the adapter."""

    def __init__(self, adapter: FlatAdapter, settings: StepSettings) -> None:
        self.adapter = adapter
        self.settings = settings
        self.start: torch.Tensor | None = None

    def run(self, plan: Any, objective: Any, lane: Any, on_step: Callable[[int, int], None]) -> None:
        self.plan, self.objective, self.lane = plan, objective, lane
        self.start = self.adapter.copy()
        self.adapter.values.add_(1.0)
        on_step(1, 2)


class Watched(GuardModel):
    """A guard whose fine-tuning is done by :class:`Rates`."""

    def _trainer(self, model: Any, adapter: FlatAdapter, steps: StepSettings) -> Any:
        self.rates = Rates(adapter, steps)
        return self.rates


def test_fine_tuning_is_as_the_settings_say_and_its_rate_falls_to_zero(run: Run) -> None:
    words = ["guard.tune_epochs=1.5", "guard.tune_lr=0.5", "guard.tune_batch_size=4", "local.micro_batch_size=3",
             "local.max_grad_norm=7", "local.weight_decay=0.7", "guard.max_length=900", "seed=8"]  # fmt: skip
    run.data = replace(run.data, cai_rows=run.data.shards[0])
    stage = run.stage(*words)
    given: Any = (stage.config, OneRank(), OneLane(), CPU, run.store, {}, lambda *told: run.progress.append(told))
    stage.model = Watched(*given)
    stage.run(run.data)
    rates = stage.model.rates
    batches = rates.plan.batches
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 2], "a pass and a half over 12 rows"
    assert [rates.plan.lr(step) for step in range(5)] == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])
    assert (rates.plan.key, rates.plan.longest) == (("guard_tuning",), 900)
    assert rates.settings == StepSettings(3, 1.0, 0.0, 8), "the clip and decay of clients are not the guard's"
    loaded, flat = stage.model._guard_model()
    assert rates.start is not None and torch.equal(rates.start, flat.initial(8))
    rows = verdict_rows(loaded.chat, run.data.guard_rows, "square", 900)
    wanted = tuning_batches(rows, stage.config.guard, 8)
    ids = [[[tuple(row.input_ids) for row in batch] for batch in made] for made in (batches, wanted)]
    assert ids[0] == ids[1], "the guard's rows, in the order that the seed draws"
    (folder,) = run.store.folder.glob("guard-adapter-*")
    assert torch.equal(flat.read(folder), flat.initial(8) + 1.0), "what is kept is what the training left"
    assert torch.equal(flat.values, flat.read(folder)), "and what scores"
    assert ("guard fine-tuning", 1, 2) in run.progress


@pytest.mark.parametrize("wanted", ["tuned", "untuned"])
def test_the_guard_that_judges_replies_is_the_one_that_is_asked_for(run: Run, wanted: str) -> None:
    """Under the run's own policy, whatever the comparison before it has loaded."""
    words = ["guard.measure_untuned=true", "guard.measure_policies=true", "guard.tune_epochs=1", "guard.tune_lr=1e-2"]
    stage = run.stage(*words, f"eval.guard_judge={wanted}")
    steps: list[str] = []
    phase = SimpleNamespace(step=lambda done, total, part: steps.append(part))
    record: Any = SimpleNamespace(phase=lambda *_: nullcontext(phase))
    prepare = Preparation(stage.config, World(OneRank(), CPU, exact=True), record, run.store)
    found = prepare.filter(run.data)
    assert found.judge is not None and found.judge.on_progress is None
    assert found.tuning is run.data.guard_tally
    assert set(steps) == {"guard fine-tuning", "guard scoring"}
    got = found.judge.judge_exchanges(EXCHANGES)
    both = {
        tuned: stage.model.judge(run.data, tuned=tuned, policy="square").judge_exchanges(EXCHANGES)
        for tuned in (True, False)
    }
    assert both[True] != both[False] and got == both[wanted == "tuned"]
    assert list(found.compared) == ["untuned", "untuned, policy llama_guard_3"]
    assert found.filtered.judged[1] == run.run("guard.tune_epochs=1", "guard.tune_lr=1e-2").judged[1]
    assert found.filtered.judged[1] != found.compared["untuned"].judged[1]
