"""Training under ZeRO-2 against the plain loop: the same batches, draws and optimizer, sums in another order."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from fedsim.base.artefacts import ArtefactStore
from fedsim.base.errors import RunError
from fedsim.config import load_config
from fedsim.config.lora import LoraSettings
from fedsim.data.chat import TokenRow, assistant_turn, user_turn
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.model.load import load_model
from fedsim.parallel.world import process_world
from fedsim.run.prepare import prepare_data
from fedsim.safety.filter_stage import FilterStage
from fedsim.train.loop import StepSettings, Trainer, TrainingPlan
from fedsim.train.objectives import SftObjective
from fedsim.train.zero import ZeroTrainer
from fedsim.train.zero_config import zero_settings

SMALL = Path(__file__).parent / "small.yaml"
ZERO = ["guard.deepspeed=zero2", "parallel.exact=false", "local.micro_batch_size=2", "guard.tune_batch_size=7"]
BATCH_SIZES = [7, 5, 1, 7]  # 4, 3, 1 and 4 micro-batches of two rows: on 2 and 3 ranks some have none

# Relative L2 distance of the adapter's change over four steps between ZeRO-2 on 1 to 3 ranks and the plain loop on
# one; only the grouping of floating-point sums differs. Measured (DeepSpeed 0.19.8, torch 2.13): at most 6e-7.
TOLERANCE = 1e-4


def train(kind: str, lr: float, dtype: str = "float32") -> dict[str, Any]:
    """Four steps from an adapter that is not zero, on all ranks of the world."""
    config = load_config(None, [*ZERO, f"guard.tune_lr={lr}"])
    with process_world(exact=False, threads=1, timeout_s=60, device="cpu") as world, _Captured() as captured:
        lora = LoraSettings(4, 8.0, 0.1, ("q_proj", "v_proj"))
        loaded = load_model("embedded", lora, dtype=dtype, attention="sdpa", device=world.device)
        flat = FlatAdapter(loaded.model)
        start = flat.initial(0) + 0.01 * torch.sin(torch.arange(flat.size, dtype=torch.float32))
        flat.load(start)

        def row(i: int) -> TokenRow:
            reply = assistant_turn("Yes, do it. " * (1 + i % 3) ** 2)
            return loaded.chat.training_row([user_turn(f"May I fly kite {i}?"), reply], 200)

        rows = [row(i) for i in range(sum(BATCH_SIZES))]
        starts = [sum(BATCH_SIZES[:i]) for i in range(len(BATCH_SIZES))]
        batches = [rows[begin : begin + size] for begin, size in zip(starts, BATCH_SIZES, strict=True)]
        plan = TrainingPlan(batches, lambda t: lr * (1 - t / len(batches)), ("test",), what="test")
        settings = StepSettings(2, 1.0, 0.0, seed=3)
        trainer = (
            Trainer(loaded.base, flat, settings)
            if kind == "plain"
            else ZeroTrainer(loaded.base, flat, settings, zero_settings(config, world.size))
        )
        world.traffic.pop()
        try:
            with _Handed() as handed:
                stats = trainer.run(plan, SftObjective(), world.everyone())
        except RunError as error:
            return {"error": str(error)}
        parameters = dict(loaded.model.named_parameters())
        held = torch.cat([parameters[slot.name].detach().flatten() for slot in flat.slots])
        return {
            "change": (flat.copy() - start).double().numpy(),
            "model": (held - start).double().numpy(),
            "is_view": all(parameters[s.name].data_ptr() == flat.values[s.start :].data_ptr() for s in flat.slots),
            "dtypes": sorted({str(parameter.dtype) for parameter in parameters.values()}),
            "losses": stats.losses,
            "num_tokens": stats.num_tokens,
            "counted": world.traffic.pop(),
            "handed": handed.num_bytes,
            "size": flat.size,
            "printed": captured.text(),
        }


class _Handed:
    """Bytes that anyone in this process hands to reductions and gatherings, seen where torch takes them."""

    def __enter__(self) -> _Handed:
        self.num_bytes = 0
        self._kept = {name: getattr(dist, name) for name in dir(dist) if re.match("all_|reduce|gather", name)}
        for name, function in self._kept.items():
            setattr(dist, name, self._seeing(name, function))
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self._kept.items():
            setattr(dist, name, function)

    def _seeing(self, name: str, function: Any) -> Any:
        def seeing(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in [*args, *kwargs.values()] if isinstance(value, torch.Tensor)]
            self.num_bytes += tensors[-1].nbytes  # what comes in is named before what goes out
            return function(*args, **kwargs)

        return seeing


class _Captured:
    """What this process prints, libraries' handlers included."""

    def __enter__(self) -> _Captured:
        self._file = tempfile.TemporaryFile()
        self._kept = [os.dup(1), os.dup(2)]
        for target in (1, 2):
            os.dup2(self._file.fileno(), target)
        return self

    def __exit__(self, *_: object) -> None:
        for target, kept in zip((1, 2), self._kept, strict=True):
            os.dup2(kept, target)
            os.close(kept)

    def text(self) -> str:
        sys.stdout.flush()
        self._file.seek(0)
        return self._file.read().decode()


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.fixture(scope="module")
def trained(pool: Any) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Results by rank: the plain loop on one rank, ZeRO-2 on 1 to 3. The workers are the same, world after world."""
    cases = [("plain", 1), ("zero", 1), ("zero", 2), ("zero", 3)]
    return dict(zip(cases, pool.run_all([(size, train, kind, 5e-3) for kind, size in cases]), strict=True))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_zero2_equals_the_plain_loop(trained: Any, size: int) -> None:
    (plain,), ranks = trained["plain", 1], trained["zero", size]
    for rank in ranks:
        assert np.array_equal(rank["change"], ranks[0]["change"]), "all ranks hold the same adapter"
        assert rank["losses"] == pytest.approx(plain["losses"], rel=1e-5)
        assert rank["num_tokens"] == plain["num_tokens"]
    measured = distance(ranks[0]["change"], plain["change"])
    print(f"{size} ranks: relative L2 {measured:.1e}")
    assert measured < TOLERANCE


@pytest.mark.parametrize("size", [1, 2, 3])
def test_what_deepspeed_sends_is_counted(trained: Any, size: int) -> None:
    """All but scalars: DeepSpeed's norms and flags, three of up to 8 bytes a step."""
    for rank in trained["zero", size]:
        if size == 1:
            assert rank["counted"] == 0
        else:
            assert 0 <= rank["handed"] - rank["counted"] <= 24 * len(BATCH_SIZES)
            assert rank["counted"] > 4 * rank["size"] * len(BATCH_SIZES)


def test_the_tolerance_tells_trainings_apart(trained: Any, pool: Any) -> None:
    (other,) = pool.run(1, train, "plain", 5.005e-3)
    assert distance(other["change"], trained["plain", 1][0]["change"]) > TOLERANCE


def test_the_base_keeps_its_dtype(pool: Any) -> None:
    """LoRA in fp32 on a bf16 base, as on a GPU: DeepSpeed's bf16 mode, which would round LoRA too, stays off."""
    jobs = [(2, train, kind, 5e-3, "bfloat16") for kind in ("plain", "zero")]
    plain, zero = (ranks[0] for ranks in pool.run_all(jobs))
    print(f"bf16 base: relative L2 {distance(zero['change'], plain['change']):.1e}")
    assert plain["dtypes"] == zero["dtypes"] == ["torch.bfloat16", "torch.float32"]
    assert distance(zero["change"], plain["change"]) < TOLERANCE


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_model_holds_the_result_in_its_flat_adapter(trained: Any, size: int) -> None:
    for rank in trained["zero", size]:
        assert np.array_equal(rank["model"], rank["change"]) and rank["is_view"]


@pytest.mark.parametrize("size", [1, 2])
def test_nothing_is_printed(trained: Any, size: int) -> None:
    assert [rank["printed"] for rank in trained["zero", size]] == [""] * size


def test_a_loss_that_is_not_finite_is_one_error(pool: Any) -> None:
    for rank in pool.run(2, train, "zero", 1e30):
        assert "test: the loss or gradient became NaN or infinite in step" in rank["error"]


def filtered(square_file: str, folder: str, overrides: list[str]) -> dict[str, Any]:
    """A fine-tuned guard's verdicts on the clients' rows, and the artefacts that it left."""
    config = load_config(SMALL, [f"data.square={square_file}", "parallel.exact=false", *overrides])
    log: list[str] = []
    with process_world(exact=False, threads=1, timeout_s=60, device="cpu") as world:
        store = ArtefactStore(Path(folder), world.ranks, log.append)
        data = prepare_data(config, store, world.ranks)
        stage = FilterStage(config, world.ranks, world.everyone(), world.device, store, {}, lambda *_: None)
        verdicts = stage._model_verdicts(data, tuned=True, policy="square")
    adapter = next(line.rpartition("/")[2] for line in log if line.startswith("guard-adapter: written"))
    return {"probs": [v.unsafe_prob for shard in verdicts for v in shard], "adapter": adapter}


def test_the_guards_artefact_names_deepspeed_and_the_number_of_ranks(
    pool: Any, square_file: Path, tmp_path: Path
) -> None:
    """One store: each run must tune for itself, and judge alike."""
    runs = [
        pool.run(size, filtered, str(square_file), str(tmp_path), overrides)[0]
        for size, overrides in ((1, []), (3, ["guard.deepspeed=zero2"]), (4, ["guard.deepspeed=zero2"]))
    ]
    assert len({run["adapter"] for run in runs}) == 3
    assert runs[1]["probs"] == pytest.approx(runs[0]["probs"], abs=1e-3)
    assert runs[2]["probs"] == pytest.approx(runs[0]["probs"], abs=1e-3)
