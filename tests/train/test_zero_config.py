"""DeepSpeed's settings: what fedsim fills in, and what contradicts it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from fedsim.base.errors import ConfigError
from fedsim.config import Config, load_config
from fedsim.train.zero_config import SHIPPED, zero_settings

ROOT = Path(__file__).parents[2]


def config(path: Path | str, *overrides: str) -> Config:
    words = ["parallel.exact=false", "guard.tune_batch_size=16", "local.micro_batch_size=3", "guard.tune_lr=2e-4"]
    return load_config(None, [f"guard.deepspeed={path}", *words, *overrides])


@pytest.fixture()
def write(tmp_path: Path) -> Any:
    def made(content: Any) -> Path:
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return made


def test_the_shipped_file_is_whole_and_plain() -> None:
    content = json.loads((ROOT / "configs" / "deepspeed" / "zero2.json").read_text())
    assert "auto" not in json.dumps(content)
    assert content["zero_optimization"]["stage"] == 2 and content["optimizer"]["params"]["torch_adam"] is True
    assert (SHIPPED / "zero2.json").is_file()
    by_path = zero_settings(config(ROOT / "configs" / "deepspeed" / "zero2.json"), 2)
    assert by_path == zero_settings(config("zero2"), 2)
    for name, value in content.items():
        assert by_path[name] == value or name == "optimizer"


@pytest.mark.parametrize(("ranks", "passes"), [(1, 6), (2, 3), (3, 2), (4, 2), (6, 1), (8, 1)])
def test_rows_become_passes(ranks: int, passes: int) -> None:
    """16 rows are 6 micro-batches of up to 3."""
    settings = zero_settings(config("zero2"), ranks)
    assert settings["train_micro_batch_size_per_gpu"] == 3
    assert settings["gradient_accumulation_steps"] == passes
    assert "train_batch_size" not in settings, "DeepSpeed would ask that ranks × passes × 3 is 16"
    assert settings["optimizer"]["params"]["lr"] == 2e-4


def test_an_empty_file_and_one_full_of_auto_say_the_same(write: Any) -> None:
    names = ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"]
    auto = {name: "auto" for name in names} | {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "eps": "auto"}}}
    empty = zero_settings(config(write({})), 2)
    assert zero_settings(config(write(auto)), 2) == empty
    assert empty["zero_optimization"] == {"stage": 2} and empty["bf16"] == empty["fp16"] == {"enabled": False}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train_batch_size": 32}, r"train_batch_size=32 contradicts 16.*guard\.tune_batch_size"),
        ({"train_micro_batch_size_per_gpu": 4}, r"_per_gpu=4 contradicts 3.*local\.micro_batch_size"),
        ({"gradient_accumulation_steps": 2}, r"steps=2 contradicts 3.*tune_batch_size=16.*processes \(2\)"),
        ({"gradient_clipping": 0.5}, r"gradient_clipping=0\.5 contradicts 1\.0"),
        ({"optimizer": {"type": "Lamb"}}, r"optimizer\.type='Lamb' contradicts 'AdamW'"),
        ({"optimizer": {"params": {"lr": 1e-3}}}, r"optimizer\.params\.lr=0\.001 contradicts 0\.0002.*guard\.tune_lr"),
        ({"optimizer": {"params": {"betas": [0.9, 0.95]}}}, r"optimizer\.params\.betas"),
        ({"optimizer": []}, r"optimizer must be an object"),
        ({"zero_optimization": {"stage": 3}}, r"zero_optimization\.stage=3 contradicts 2"),
        ({"bf16": {"enabled": True}}, r"bf16\.enabled=True contradicts False.*fp32"),
        ({"scheduler": {"type": "WarmupLR"}}, r"scheduler=.*contradicts None.*tune_lr"),
        ({"wandb": {"enabled": True}}, r"wandb is not a key that the file may have; remove it"),
        ({"tensorboard": {"enabled": True}}, r"tensorboard is not a key"),
        ({"csv_monitor": {"enabled": True}}, r"csv_monitor is not a key"),
        ({"communication_data_type": "fp16"}, r"communication_data_type is not a key"),
        ({"wall_clock_breakdown": True}, r"wall_clock_breakdown is not a key"),
        ({"steps_per_print": 1}, r"steps_per_print is not a key"),
        ({"zero_optimisation": {}}, r"zero_optimisation is not a key.*did you mean zero_optimization\?"),
        ({"zero_optimization": {"reduce_bucket_sise": 1}}, r"did you mean zero_optimization\.reduce_bucket_size\?"),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, r"zero_optimization\.zero_quantized_gradients is"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, r"zero_optimization\.offload_optimizer is"),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, r"reduce_bucket_size=-1: .*greater than 0"),
        ({"zero_optimization": {"overlap_comm": "maybe"}}, r"zero_optimization\.overlap_comm='maybe': "),
        ({"zero_optimization": 2}, r"zero_optimization must be an object, is 2"),
        ({"optimizer": {"params": {"amsgrad": True}}}, r"optimizer\.params\.amsgrad is not a key"),
        ({"optimizer": {"params": 3}}, r"optimizer\.params must be an object"),
        ("[1]", r"must be a JSON object, is a list"),
        ("{", r"is not valid JSON"),
    ],
)
def test_what_cannot_be_used_is_named(write: Any, content: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"guard\.deepspeed=.*{message}"):
        zero_settings(config(write(content)), 2)


def test_a_missing_file_names_those_that_ship() -> None:
    with pytest.raises(ConfigError, match=r"guard\.deepspeed='zero9'.*cannot be read.*\(zero2\)"):
        zero_settings(config("zero9"), 1)


def test_the_users_own_keys_reach_deepspeed(write: Any) -> None:
    own = {"overlap_comm": True, "reduce_bucket_size": 1000, "allgather_bucket_size": "auto"}
    settings = zero_settings(config(write({"zero_optimization": own})), 2)
    assert settings["zero_optimization"] == {**own, "stage": 2}


@pytest.mark.parametrize("name", ["xyz", "xpu", "mps"])
def test_an_accelerator_that_the_run_does_not_use_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", name)
    with pytest.raises(ConfigError, match=rf"DS_ACCELERATOR='{name}': the run computes on c.*; unset this variable"):
        zero_settings(config("zero2"), 1)


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed; pip install fedsim\[deepspeed\]"):
        zero_settings(config("zero2"), 1)


def test_exact_mode_refuses_deepspeed() -> None:
    with pytest.raises(ConfigError, match=r"guard\.deepspeed='zero2'.*parallel\.exact=false"):
        config("zero2", "parallel.exact=true")
