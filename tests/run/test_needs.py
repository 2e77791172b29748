"""Tokens of training passes derived from memory: the largest that fit, within their bounds, and where they are used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim.base.ranks import OneRank
from fedsim.config import Config, load_config
from fedsim.parallel.world import World
from fedsim.report import finish
from fedsim.run import checks
from fedsim.run.memory import PASS_SHARE, usable_memory
from fedsim.run.needs import DPO, LOCAL, TUNING, memory_needs, tokens_of_passes, training_stages
from fedsim.run.simulation import Simulation
from fedsim.train.loop import Trainer
from tests.run.test_memory import BIG

GIB = 2**30
ROOT = Path(__file__).parents[2]
PAPER = ROOT / "configs" / "paper" / "fedavg-filter-cai.yaml"
SMALL = Path(__file__).parents[1] / "distributed" / "small.yaml"
SHAPES = {"model": BIG, "guard": BIG}


def paper(*words: str) -> Config:
    return load_config(PAPER, words)


def tokens(config: Config, size_gib: float, usable_gib: float | None = None) -> dict[str, int]:
    usable = PASS_SHARE * size_gib if usable_gib is None else usable_gib
    return tokens_of_passes(config, SHAPES, 4, free_bytes=int(size_gib * GIB), usable_bytes=int(usable * GIB))


def by_stage(config: Config, pass_tokens: dict[str, int]) -> dict[str, int]:
    return {need.stage: need.num_bytes for need in memory_needs(config, SHAPES, 4, pass_tokens)}


@pytest.mark.parametrize("size", [48, 80, 96, 141])
def test_a_pass_takes_as_many_tokens_as_fit_up_to_a_batch(size: int) -> None:
    """One token more would not fit, or is more than a batch of the longest rows has: 16 · 512, 1,024 and 2 · 1,024."""
    config = paper()
    found, free, usable = tokens(config, size), size * GIB, PASS_SHARE * size * GIB
    assert list(found) == [TUNING, LOCAL, DPO]
    for stage in training_stages(config, SHAPES, 4):
        assert stage.batch_tokens == {LOCAL: 8192, TUNING: 16384, DPO: 32768}[stage.name]
        count = found[stage.name]
        limit = usable if count > stage.micro_tokens else free
        assert stage.need(count).num_bytes <= limit
        assert count in (stage.micro_tokens, stage.batch_tokens) or stage.need(count + 1).num_bytes > limit


def test_of_the_paper_on_80_gb_a_local_step_is_one_pass() -> None:
    """16 · 512 tokens at 6.0 MB are 49 GB beside 16 of weights; four of the guard's and DPO's longest rows fit too."""
    found = tokens(paper(), 80)
    assert found[LOCAL] == 16 * 512
    assert 4 * 1024 < found[TUNING] < 16 * 1024 and 4 * 2 * 1024 < found[DPO] < 16 * 2 * 1024


def test_short_memory_makes_smaller_passes() -> None:
    """In 40 GB a micro-batch of DPO's longest pairs does not fit; of usual pairs as many go together as do."""
    config = paper()
    found = tokens(config, 40, 30)
    (dpo,) = [stage for stage in training_stages(config, SHAPES, 4) if stage.name == DPO]
    assert found[DPO] < dpo.micro_tokens
    assert dpo.need(found[DPO]).num_bytes <= 40 * GIB < dpo.need(found[DPO] + 1).num_bytes
    assert by_stage(config, found)[DPO] == by_stage(config, {})[DPO], "the bound is that of the longest micro-batch"
    assert tokens(config, 1) == {TUNING: 1, LOCAL: 1, DPO: 1}, "each micro-batch has a pass of its own"


def test_more_memory_never_makes_smaller_passes() -> None:
    config, before = paper(), {TUNING: 0, LOCAL: 0, DPO: 0}
    for size in range(10, 160, 10):
        found = tokens(config, size)
        assert all(found[name] >= before[name] for name in before)
        before = found


def test_exact_mode_the_cpu_and_deepspeed_keep_what_is_configured() -> None:
    assert tokens(paper("parallel.exact=true"), 80) == {}
    assert tokens(paper(), 80, 0) == {} and usable_memory(torch.device("cpu"), 1) == 0
    deepspeed = paper("guard.deepspeed=configs/deepspeed/zero2.json")
    assert tokens(deepspeed, 80).keys() == {LOCAL, DPO}


def test_what_passes_may_take_is_a_share_of_the_whole_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some hundred MiB that a context takes change nothing; another job's 30 GiB do."""
    device = torch.device("cuda", 0)
    for free, want in ((79.4, 64), (70, 64), (50, 50)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (int(free * GIB), 80 * GIB))
        assert usable_memory(device, 1) == want * GIB and usable_memory(device, 4) == want * GIB // 4


@pytest.fixture()
def run(tmp_path: Path, square_file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``run(exact)``: a short run where a GPU's memory is reported; its plans' pass_tokens, manifest and log."""
    monkeypatch.setattr(finish, "write_plots", lambda *_: [])
    monkeypatch.setattr(checks, "usable_memory", lambda device, sharing: GIB)
    seen: dict[str, int] = {}
    original = Trainer.run

    def spy(trainer: Trainer, plan: Any, *rest: Any) -> Any:
        seen[plan.what.split(",")[0]] = plan.pass_tokens
        return original(trainer, plan, *rest)

    monkeypatch.setattr(Trainer, "run", spy)

    def made(exact: bool) -> tuple[dict[str, int], dict[str, Any], str]:
        places = [f"data.square={square_file}", f"record.dir={tmp_path}", f"record.artefacts={tmp_path / 'artefacts'}"]
        words = ["federation.num_rounds=1", "federation.clients_per_round=1", "eval.limit=1", "eval.every=0",
                 "guard.tune_batch_size=2", "local.steps=1", f"parallel.exact={str(exact).lower()}"]  # fmt: skip
        config = load_config(SMALL, [*places, *words])
        simulation = Simulation(config, World(OneRank(), torch.device("cpu"), exact=exact))
        simulation.run()
        folder = simulation.record.folder
        (log,) = (folder / "logs").iterdir()
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return seen, manifest, log.read_text(encoding="utf-8")

    yield made


@pytest.mark.parametrize("exact", [False, True])
def test_a_run_takes_and_reports_them(run: Any, exact: bool) -> None:
    """A batch a pass: 2 guard rows of 1,024 tokens, 7 rows of 512, 4 pairs of 2 · 1,024; DPO's reference counts too."""
    seen, manifest, log = run(exact)
    want = {} if exact else {TUNING: 2 * 1024, LOCAL: 7 * 512, DPO: 4 * 2 * 1024}
    assert manifest["pass_tokens"] == want
    assert ("passes of local training: up to 3,584 tokens" in log) == (not exact)
    tuning, local, dpo = (want.get(name, 0) for name in (TUNING, LOCAL, DPO))
    (client,) = (name for name in seen if name.startswith("client"))
    assert seen == {"guard fine-tuning": tuning, client: local, "CAI (SFT)": dpo, "CAI (DPO)": 2 * dpo}
