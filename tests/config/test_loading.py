"""Configuration: what is read, in which order, and the one error that a wrong key or value gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.base.errors import ConfigError
from fedsim.config import Config, describe, from_flat, help_text, load_config, to_flat, to_nested

CONFIGS = Path(__file__).parents[2] / "configs"


def error(*overrides: str, path: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value), "an error is one line"
    return str(caught.value)


def test_defaults_and_overrides_in_order() -> None:
    assert load_config(None) == Config()
    config = load_config(None, ["seed=3", "federation.num_rounds=8", "seed=4", "parallel.exact=false"])
    assert (config.seed, config.federation.num_rounds, config.parallel.exact) == (4, 8, False)
    assert config.local == Config().local


def test_off_means_off_though_yaml_reads_false(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("wandb:\n  mode: off\n")
    assert load_config(tmp_path / "run.yaml").wandb.mode == "off"
    assert load_config(None, ["wandb.mode=off"]).wandb.mode == "off"
    with pytest.raises(ConfigError, match=r"guard\.kind='off': must be one of none"):
        load_config(None, ["guard.kind=off"])


@pytest.mark.parametrize(
    "word", ["2025-11-23", "2025-11-23 10:00:00", "yes", "No", "off", "true", "010", "1.10", "0x1F", "1_000", "12:30",
             ".inf", "1e5"]
)  # fmt: skip
def test_a_text_key_takes_the_word_that_was_written(tmp_path: Path, word: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"name: {word}\nwandb: {{group: {word}}}\nbase: base.yaml\n")
    (tmp_path / "base.yaml").write_text(f"judge.model: {word}\n")
    found = load_config(path)
    assert (found.name, found.wandb.group, found.judge.model) == (word, word, word)
    typed = load_config(None, [f"name={word}", f"wandb.group={word}"])
    assert (typed.name, typed.wandb.group) == (word, word)
    path.write_text(yaml.safe_dump(to_nested(found)))
    assert load_config(path) == found


def test_a_text_key_in_a_file_may_not_be_left_out_half(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name:\n")
    assert "name=None: must be text" in error(path=path)
    path.write_text("seed: 2025-11-23\n")
    assert "seed='2025-11-23': must be a whole number" in error(path=path)
    assert "seed='2025-11-23': must be a whole number" in error("seed=2025-11-23")


def test_the_papers_settings_are_the_defaults() -> None:
    config = Config()
    assert (config.federation.num_clients, config.federation.clients_per_round, config.federation.num_rounds) == (
        20,
        5,
        50,
    )
    assert (config.local.steps, config.local.batch_size, config.local.lr, config.local.lr_min) == (25, 16, 5e-5, 1e-6)
    assert (config.model.lora_r, config.model.lora_alpha, config.model.lora_dropout) == (32, 64.0, 0.05)
    assert config.model.lora_targets == ["q_proj", "v_proj"]
    assert (config.local.weight_decay, config.local.max_grad_norm, config.local.max_length) == (0.0, 1.0, 512)
    assert (config.cai.temperature, config.cai.beta, config.eval.temperature) == (1.0, 0.1, 0.7)
    assert (config.guard.lora_r, config.guard.lora_alpha, config.guard.tune_lr, config.guard.tune_epochs) == (
        16,
        32.0,
        1e-4,
        5,
    )


@pytest.mark.parametrize(
    ("override", "value"),
    [("local.lr=5e-5", 5e-5), ("local.lr=5.0E-05", 5e-5), ("local.lr=1", 1.0), ("local.lr=.5", 0.5),
     ("federation.num_rounds=8.0", 8), ("name=2024", "2024"), ("name=010", "010"), ("name=1.10", "1.10"),
     ("name=a=b", "a=b"), ("eval.advbench=", ""), ("parallel.exact=true", True), ("data.square= x.json", "x.json"),
     ("model.lora_targets=[q_proj, o_proj]", ["q_proj", "o_proj"])],
)  # fmt: skip
def test_values_are_read_as_their_types(override: str, value: object) -> None:
    name = override.partition("=")[0]
    found = to_flat(load_config(None, [override]))[name]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("federation.num_round=8", ["federation.num_round=8:", "is not a configuration key", "federation.num_rounds"]),
        ("num_rounds=8", ["num_rounds=8:", "nearest key is federation.num_rounds"]),
        ("locall.lr=1", ["locall.lr=1:", "nearest key is local.lr"]),
        ("zzzzqqqq=1", ["zzzzqqqq=1:", "no key is close", "--help"]),
        ("federation=3", ["federation=3: is a group of keys", "federation.algorithm"]),
        ("seed", ["override 'seed'", "key=value"]),
        ("seed=[1", ["seed='[1'", "not valid YAML"]),
        ("federation.num_rounds=many", ["federation.num_rounds='many'", "a whole number", ">= 1"]),
        ("federation.num_rounds=2.5", ["federation.num_rounds=2.5", "a whole number"]),
        ("federation.num_rounds=true", ["federation.num_rounds=True", "a whole number"]),
        ("federation.num_rounds=0", ["federation.num_rounds=0", ">= 1"]),
        ("federation.num_rounds=", ["federation.num_rounds=''", "a whole number"]),
        ("local.lr=fast", ["local.lr='fast'", "a number", "> 0"]),
        ("local.lr=0", ["local.lr=0.0", "> 0"]),
        ("local.lr=-1e-5", ["local.lr=-1e-05", "> 0"]),
        ("local.lr=nan", ["local.lr='nan'", "a number"]),
        ("local.lr=.nan", ["local.lr=nan", "> 0"]),
        ("local.lr=inf", ["local.lr=inf", "finite"]),
        ("local.lr=true", ["local.lr=True", "a number"]),
        ("model.lora_dropout=1", ["model.lora_dropout=1.0", ">= 0 and < 1"]),
        ("guard.tpr=1.01", ["guard.tpr=1.01", ">= 0 and <= 1"]),
        ("parallel.exact=1", ["parallel.exact=1", "true or false"]),
        ("parallel.exact=yes please", ["parallel.exact='yes please'", "true or false"]),
        ("name=", ["name=''", "name of a directory"]),
        ("name=a/b", ["name='a/b'", "name of a directory"]),
        ("name=..", ["name='..'", "name of a directory"]),
        ("local.lr_min=1", ["local.lr_min=1.0", "<= local.lr (5e-05)"]),
        ("local.lr=1e-7", ["local.lr_min=1e-06", "<= local.lr (1e-07)"]),
        ("name=artefacts", ["name='artefacts'", "record.artefacts='runs/artefacts'"]),
        (
            "federation.algorithm=fedavgg",
            ["federation.algorithm='fedavgg'", "fedavg, fedprox, fedavgm", "did you mean fedavg?"],
        ),
        ("federation.algorithm=xyz", ["must be one of fedavg, fedprox, fedavgm, fedadagrad"]),
        ("model.lora_targets=q_proj", ["model.lora_targets='q_proj'", "a list of names, such as [q_proj, v_proj]"]),
        ("model.lora_targets=[]", ["model.lora_targets=[]", "a list of names"]),
        ("model.lora_targets=[1]", ["model.lora_targets=[1]", "a list of names"]),
        ("federation.clients_per_round=21", ["federation.clients_per_round=21", "<= federation.num_clients (20)"]),
    ],
)
def test_a_wrong_key_or_value_is_one_error_that_names_it(override: str, words: list[str]) -> None:
    text = error(override)
    assert not [w for w in words if w not in text], text


def test_a_run_may_not_lie_on_the_shared_artefacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    for artefacts in (f"{tmp_path}/x/../run", "./run/", str(tmp_path / "link" / "run")):
        text = error("name=run", f"record.dir={tmp_path}", f"record.artefacts={artefacts}")
        assert "name='run'" in text and "record.artefacts" in text
    load_config(None, ["name=artefacts", f"record.dir={tmp_path}"])


def test_keys_that_need_each_other() -> None:
    text = error("guard.kind=llama_guard", "data.guard_rows=0")
    assert "guard.tune_epochs" in text and "data.guard_rows" in text
    load_config(None, ["guard.kind=llama_guard", "data.guard_rows=0", "guard.tune_epochs=0"])
    load_config(None, ["guard.kind=oracle", "data.guard_rows=0"])
    text = error("cai.iterations=1", "data.cai_rows=0", "data.guard_rows=0")
    assert "cai.iterations" in text and "data.cai_rows" in text
    load_config(None, ["cai.iterations=1", "data.cai_rows=0"])
    assert "guard.refusal" in error("guard.action=refuse", "guard.refusal=' '")
    load_config(None, ["guard.action=drop", "guard.refusal=''"])


def test_a_file_builds_on_its_base(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "root.yaml").write_text("seed: 1\nlocal: {lr: 5e-5, steps: 3}\n")
    (tmp_path / "middle.yaml").write_text("base: root.yaml\nlocal: {steps: 4}\nfederation.num_rounds: 9\n")
    (tmp_path / "sub" / "leaf.yaml").write_text("base: ../middle.yaml\nname: leaf\n")
    config = load_config(tmp_path / "sub" / "leaf.yaml", ["local.steps=5"])
    assert (config.name, config.seed, config.local.lr, config.local.steps) == ("leaf", 1, 5e-5, 5)
    assert config.federation.num_rounds == 9
    assert load_config(tmp_path / "middle.yaml").local.steps == 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: self.yaml", ["refer to each other in a circle"]),
        ("base: 3", ["base=3", "must be the path"]),
        ("base: gone.yaml", ["gone.yaml", "cannot be read"]),
        ("- 1\n- 2", ["must be a mapping", "list"]),
        ("a: [1", ["is not valid YAML"]),
        ("a: 1\n b: 2", ["is not valid YAML"]),
        ("local:\n  stepz: 3", ["local.stepz", "local.steps"]),
        ("local: 3", ["local=3: is a group of keys"]),
        ("local:\n  steps: {a: 1}", ["local.steps.a"]),
        ("seed: 1\nlocal: {steps: 1}\nseed: 2", ["seed", "twice"]),
        ("local: {steps: 1}\nlocal: {lr: 1}", ["local", "twice"]),
        ("local: {steps: 1}\nlocal.steps: 2", ["local.steps", "twice"]),
    ],
)
def test_a_wrong_file_is_one_error(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "self.yaml"
    path.write_text(text)
    found = error(path=path)
    assert not [w for w in words if w not in found], found


def test_unreadable_files(tmp_path: Path) -> None:
    assert "cannot be read" in error(path=tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff\xfe")
    assert "is not valid YAML" in error(path=tmp_path / "latin.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(tmp_path / "empty.yaml") == Config()


@settings(max_examples=40, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "seed": st.integers(0, 2**40),
            "local.lr": st.floats(1e-6, 1e3),
            "name": st.text(
                st.characters(min_codepoint=0x30, max_codepoint=0x2FF, categories=["L", "N", "P", "S"]), min_size=1
            ),
            "parallel.exact": st.booleans(),
            "model.lora_targets": st.lists(st.text("abc_", min_size=1), min_size=1),
        }
    )
)
def test_nested_and_flat_forms_give_the_same_config(flat: dict[str, object]) -> None:
    config = from_flat(flat)
    assert from_flat(to_flat(config)) == config
    assert {k: to_flat(config)[k] for k in flat} == flat


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = load_config(None, ["local.lr=1e-7", "local.lr_min=0", "name=010", "eval.hhh=", "seed=5"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_nested(config), sort_keys=False))
    assert load_config(path) == config


RUNS = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "sweeps")  # tests/study has those


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.name)
def test_shipped_configs_load(path: Path) -> None:
    assert isinstance(load_config(path), Config)


def test_help_lists_every_key_once_with_default_meaning_and_unit() -> None:
    text = help_text()
    blocks = dict(zip(*[iter(line.strip() for line in text.splitlines() if line.startswith(" "))] * 2, strict=True))
    infos = describe()
    assert [block.partition(" = ")[0] for block in blocks] == [info.name for info in infos] == list(to_flat(Config()))
    for (head, body), info in zip(blocks.items(), infos, strict=True):
        assert yaml.safe_load(head.partition(" = ")[2]) == info.default or head.endswith(f"= {info.default}")
        assert info.meaning and info.meaning in body
        assert info.unit in body and info.rule in body and info.type_name in body
    assert len({info.meaning for info in infos}) > 0.9 * len(infos)
