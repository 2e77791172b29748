"""What must hold over a whole run: nobody writes to a base model, and a long run needs no more than a short one."""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim.base.ranks import OneRank
from fedsim.config import load_config
from fedsim.model.load import LoadedModel, load_model
from fedsim.parallel.world import World
from fedsim.report import finish
from fedsim.run import resident
from fedsim.run.simulation import Simulation
from fedsim.safety import guard_model

SMALL = Path(__file__).parent / "distributed" / "small.yaml"
MIB = 2**20


@pytest.fixture()
def places(square_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides that keep a run inside the test's folder, without plots and W&B."""
    monkeypatch.setattr(finish, "write_plots", lambda *_: [])
    return [
        f"data.square={square_file}",
        f"record.dir={tmp_path}",
        f"record.artefacts={tmp_path / 'artefacts'}",
        "wandb.mode=off",
    ]


def simulation(overrides: list[str]) -> Simulation:
    return Simulation(load_config(SMALL, overrides), World(OneRank(), torch.device("cpu"), exact=True))


def digest(model: torch.nn.Module) -> str:
    """Of all weights and buffers but LoRA's."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if "lora_" not in name:
            found.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def test_no_stage_writes_to_a_base_model(places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guard fine-tuning and scoring, local training, CAI, generation and scoring, in three rounds."""
    loaded: list[tuple[LoadedModel, str]] = []

    def watched(*arguments: Any, **named: Any) -> LoadedModel:
        model = load_model(*arguments, **named)
        loaded.append((model, digest(model.base)))
        return model

    monkeypatch.setattr(resident, "load_model", watched)
    monkeypatch.setattr(guard_model, "load_model", watched)
    brief = ["federation.num_rounds=3", "eval.limit=2", "eval.every=1", "eval.max_new_tokens=4", "local.steps=2",
             "guard.kind=llama_guard", "eval.guard_judge=tuned", "guard.tune_epochs=0.5"]  # fmt: skip
    simulation([*places, *brief]).run()
    assert len(loaded) == 2, "the guard and the federated model"
    for model, before in loaded:
        assert any(parameter.abs().sum() > 0 for name, parameter in model.model.named_parameters() if "lora_B" in name)
        assert digest(model.base) == before
        weight = model.base.get_input_embeddings().weight
        with torch.no_grad():
            weight[3, 1] = torch.nextafter(weight[3, 1], torch.tensor(9.0))
        assert digest(model.base) != before, "one bit would be noticed"


@dataclass(frozen=True)
class Census:
    """What this process holds."""

    resident: int
    files: int
    tensors: int

    @classmethod
    def take(cls) -> Census:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        tensors = sum(issubclass(type(held), torch.Tensor) for held in gc.get_objects())
        return cls(pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")), tensors)

    def grown(self, later: Census, num_rounds: int) -> set[str]:
        """What has grown in so many rounds; the allocator may keep a quarter of a MiB a round."""
        found = {name for name in ("files", "tensors") if getattr(later, name) > getattr(self, name)}
        return found | ({"resident"} if later.resident - self.resident > num_rounds * MIB // 4 else set())


class Watched(Simulation):
    """Takes a census after chosen rounds, and does something else after every round."""

    chosen: tuple[int, ...] = ()
    after: Callable[[int], object] = staticmethod(lambda round_idx: None)

    def _round(self, federation: Any, round_idx: int, *rest: Any) -> Any:
        found = super()._round(federation, round_idx, *rest)
        self.after(round_idx)
        if round_idx + 1 in self.chosen:
            self.censuses = [*getattr(self, "censuses", []), Census.take()]
        return found


def grown(places: list[str], first: int, last: int, after: Callable[[int], object] = lambda _: None) -> set[str]:
    """What a very small run with CAI and evaluations holds more of after round ``last`` than after ``first``."""
    brief = [f"federation.num_rounds={last}", "local.steps=1", "local.batch_size=2", "local.micro_batch_size=2",
             "federation.clients_per_round=1", "cai.iterations=1", "cai.batch_size=2", "eval.every=5", "eval.limit=1",
             "eval.max_new_tokens=4", "eval.guard_judge=none", "guard.kind=none", "cai.max_new_tokens=32"]  # fmt: skip
    run = Watched(load_config(SMALL, [*places, *brief]), World(OneRank(), torch.device("cpu"), exact=True))
    run.chosen, run.after = (first, last), after
    run.run()
    before, later = run.censuses
    return before.grown(later, last - first)


@pytest.mark.deep
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_fifty_rounds_need_no_more_than_ten(places: list[str]) -> None:
    assert grown(places, 10, 50) == set()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_leaks_are_noticed(places: list[str], tmp_path: Path) -> None:
    with ExitStack() as files:
        kept: list[object] = []

        def leak(_: int) -> None:
            files.enter_context((tmp_path / "leak").open("w"))
            kept.extend([b"\1" * 128 * MIB, torch.zeros(1)])  # more than earlier tests have given back

        assert grown(places, 2, 7, leak) == {"resident", "files", "tensors"}
