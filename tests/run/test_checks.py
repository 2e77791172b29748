"""Mistakes that are found before anything is computed, and the plan that ``--check`` prints."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from fedsim.attention.choice import Choice
from fedsim.base.errors import ConfigError, DataError, FedsimError, ModelError, Problems, RunError
from fedsim.base.launching import line_of
from fedsim.base.ranks import OneRank
from fedsim.config import Config, load_config
from fedsim.data.chat import ChatFormat
from fedsim.data.square import SquareRow
from fedsim.data.usable import Tally
from fedsim.model import quantised
from fedsim.model.shape import ModelShape
from fedsim.parallel.device import Placement, Seat
from fedsim.parallel.world import World
from fedsim.record.folders import DiskRoom, check_disk
from fedsim.run import checks
from fedsim.run.checks import RESERVE, Preflight, check_world_size, models_in_use
from fedsim.run.checks import preflight as run_preflight
from fedsim.run.memory import Need
from fedsim.run.needs import GENERATION, memory_needs
from fedsim.run.plan import plan_text, work
from fedsim.run.preparation import Inputs
from fedsim.run.simulation import Simulation
from fedsim.world import square_rows

SMALL = Path(__file__).parents[1] / "distributed" / "small.yaml"


def world() -> World:
    return World(OneRank(), torch.device("cpu"), exact=True)


def config(*overrides: str) -> Config:
    return load_config(SMALL, ["eval.guard_judge=none", *overrides])


def error(*overrides: str) -> FedsimError:
    """The one error of a configuration's checks."""
    with pytest.raises(FedsimError) as caught:
        run_preflight(config(*overrides), world())
    assert "\n" not in str(caught.value), "an error is one line"
    return caught.value


@pytest.fixture()
def model(tmp_path: Path, make_llama: Callable[..., LlamaForCausalLM], llama3_bytes_chat: ChatFormat) -> Path:
    """A whole model directory that a test may spoil."""
    folder = tmp_path / "model"
    make_llama(max_position_embeddings=2048).save_pretrained(str(folder))
    llama3_bytes_chat.tokenizer.save_pretrained(str(folder))
    return folder


def test_a_sound_configuration_passes(model: Path) -> None:
    found = run_preflight(config(f"model.path={model}"), world())
    assert set(found.shapes) == {"model", "guard"}
    assert [need.stage for need in found.needs] == [
        *("guard fine-tuning", "guard scoring", "local training", "CAI (DPO)", "generation")
    ]
    plain = run_preflight(config(f"model.path={model}", "guard.kind=none", "cai.iterations=0"), world())
    assert set(plain.shapes) == {"model"} and len(plain.needs) == 2


@pytest.mark.parametrize("role", ["model", "guard"])
@pytest.mark.parametrize(
    ("missing", "words"),
    [("model.safetensors", "weights"), ("tokenizer.json", "tokenizer"), ("config.json", "config.json")],
)
def test_an_incomplete_model_directory(model: Path, role: str, missing: str, words: str) -> None:
    (model / missing).unlink()
    found = error(f"{role}.path={model}")
    assert isinstance(found, ModelError)
    assert all(part in str(found) for part in (f"{role}.path", str(model), words))


def test_a_tokenizer_without_a_chat_template(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    found = error(f"model.path={model}")
    assert isinstance(found, ModelError) and "chat template" in str(found) and "chat_template.jinja" in str(found)


@pytest.mark.parametrize("text", ["{", '{"version": "1.0"}', ""])
def test_a_damaged_tokenizer(model: Path, text: str) -> None:
    (model / "tokenizer.json").write_text(text)
    found = error(f"guard.path={model}")
    assert isinstance(found, ModelError) and "guard.path" in str(found) and "tokenizer" in str(found)


@pytest.mark.parametrize("role", ["model", "guard"])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"intermediate_size": 96}, "tensors of the shapes that config.json asks for"),
        ({"num_hidden_layers": 3}, "such as model.layers.2."),
        ({"num_attention_heads": 0, "head_dim": None}, "its config.json cannot be loaded"),
        ({"num_hidden_layers": "two"}, "its config.json cannot be loaded"),
        ({"vocab_size": 100}, "config.json describes no causal language model"),
    ],
)
def test_a_configuration_that_does_not_fit_is_blamed_itself(
    model: Path, role: str, settings: dict[str, Any], words: str
) -> None:
    known = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(known | settings))
    found = error(f"{role}.path={model}")
    assert isinstance(found, ModelError)
    assert f"{role}.path=" in str(found) and words in str(found) and "tokenizer" not in str(found)


def test_a_tokenizer_of_a_larger_model(model: Path, make_llama: Callable[..., LlamaForCausalLM]) -> None:
    make_llama(vocab_size=257, pad_token_id=None, max_position_embeddings=2048).save_pretrained(str(model))
    found = error(f"model.path={model}")
    assert isinstance(found, ModelError) and "the model has 257 embeddings" in str(found)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "compressed-tensors", "config_groups": {}},
        {"quant_method": "torchao", "quant_type": "int8_weight_only"},
        {"quant_method": "mxfp4"},
        {"quant_method": "unheard_of"},
        {},
    ],
)
def test_quantised_weights_that_cannot_be_used_here(model: Path, settings: dict[str, Any]) -> None:
    known = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(known | {"quantization_config": settings}))
    method = settings.get("quant_method", "unknown")
    for key in ("model.path", "guard.path"):
        found = error(f"{key}={model}")
        assert isinstance(found, ModelError) and f"{key}=" in str(found)
        assert f"weights are quantised (quant_method={method!r}" in str(found)
        assert "without quantisation" in str(found)


def test_quantised_weights_without_an_adapter_may_be_of_any_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a judge no layer is trained."""
    quantiser = SimpleNamespace(is_trainable=True)
    monkeypatch.setattr(quantised, "get_hf_quantizer", lambda *_: (quantiser, None, None))
    config = LlamaConfig(quantization_config={"quant_method": "gptq", "bits": 4})
    quantised.check_quantised(config, trains=False)
    with pytest.raises(ModelError, match="in a form that LoRA cannot be trained on here"):
        quantised.check_quantised(config, trains=True)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    quantised.check_quantised(config, trains=True)


def test_shards_without_an_index(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    found = error(f"model.path={model}")
    assert isinstance(found, ModelError) and "such as model-00001-of-00001.safetensors" in str(found)
    assert "download the index too" in str(found)


def test_an_index_of_other_shards(model: Path) -> None:
    shard = model / "model-00001-of-00001.safetensors"
    (model / "model.safetensors").rename(shard)
    with safe_open(str(shard), "pt") as file:
        places = dict.fromkeys(file.keys(), shard.name)
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    run_preflight(config(f"model.path={model}"), world())
    index.write_text(json.dumps({"weight_map": places | {"model.layers.9.kite": shard.name}}))
    found = error(f"model.path={model}")
    assert isinstance(found, ModelError) and "names 1 of" in str(found) and "model.layers.9.kite" in str(found)


@pytest.mark.parametrize(
    ("content", "package", "other"),
    [(b"\n\x0e\n\x05<unk>\x15\x00", "sentencepiece", "tiktoken"), (b"IQ== 0\nIg== 1\n", "tiktoken", "sentencepiece")],
)
def test_a_tokenizer_whose_reader_is_not_installed(model: Path, content: bytes, package: str, other: str) -> None:
    """transformers would ask for tiktoken, whatever the file holds."""
    (model / "tokenizer.json").unlink()
    (model / "tokenizer.model").write_bytes(content)
    found = error(f"guard.path={model}")
    assert isinstance(found, ModelError) and f"pip install {package}" in str(found) and other not in str(found)
    assert "tokenizer.json" in str(found)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_type": "gptj", "n_layer": 2, "n_head": 4, "n_embd": 32}, "GPTJForCausalLM: its layers choose their"),
        ({"model_type": "falcon"}, "FalconForCausalLM: its layers choose their attention themselves"),
        ({"model_type": "mamba"}, "MambaForCausalLM: carries state"),
        ({"model_type": "musicgen"}, "its config.json cannot be loaded"),
        ({"model_type": "deepseek_v32"}, "index_topk=2048: fedsim knows no attention to chosen positions"),
    ],
)
def test_an_architecture_that_does_not_fit_is_refused_in_words(
    model: Path, settings: dict[str, Any], words: str
) -> None:
    (model / "model.safetensors").unlink()
    save_file({"kite": torch.zeros(1)}, str(model / "model.safetensors"))
    (model / "config.json").write_text(json.dumps({"vocab_size": 261, "hidden_size": 32} | settings))
    with pytest.raises(FedsimError) as caught:
        run_preflight(config(f"model.path={model}"), world())
    assert words in str(caught.value) and "fedsim_" not in str(caught.value)


def test_every_mistake_is_found_at_once(tmp_path: Path, model: Path) -> None:
    """Of models, folders, constitution and data; one line each, and one status."""
    (model / "chat_template.jinja").unlink()
    wrong = [f"model.path={model}", f"guard.path={tmp_path / 'none'}", f"data.square={tmp_path / 'rows.json'}",
             f"eval.advbench={tmp_path / 'a.csv'}", f"eval.hhh={tmp_path / 'h.jsonl'}", "cai.constitution=kites",
             f"record.dir={tmp_path / 'runs'}", f"record.artefacts={tmp_path / 'artefacts'}"]  # fmt: skip
    with pytest.raises(Problems) as caught:
        Simulation(config(*wrong), world()).check()
    lines = line_of(caught.value).splitlines()
    for words in ("chat template", "'none'", "rows.json", "a.csv", "h.jsonl", "cai.constitution='kites'"):
        assert len([line for line in lines if words in line or words.strip("'") in line]) == 1, words
    assert len(lines) == 6 and all(line.startswith("error: ") for line in lines) and caught.value.status == 2
    with pytest.raises(Problems) as again:
        Simulation(config(*wrong), world()).run()
    assert line_of(again.value) == line_of(caught.value), "a run says the same before its first stage"
    assert pickle.loads(pickle.dumps(caught.value)).errors[1].args == caught.value.errors[1].args


def test_a_model_that_could_not_be_tried_is_loaded_before_the_first_stage(
    checked: Callable[..., Simulation], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "try_model", lambda folder, attention, key: key != "model.path")
    simulation = checked()
    assert "Warning: model.path: no small LlamaForCausalLM could be made to try it" in capsys.readouterr().out
    loaded: list[str] = []
    monkeypatch.setattr("fedsim.run.preparation.load_base", lambda path, key, **_: loaded.append(key))

    def filtered(*_: Any) -> None:
        raise RunError("the filter's turn")

    monkeypatch.setattr(simulation.preparation, "filter", filtered)
    with pytest.raises(RunError, match="the filter's turn"):
        simulation.run()
    assert loaded == ["model.path"]


def test_an_attention_that_needs_cuda() -> None:
    found = error("model.attention=flash_attention_2")
    assert isinstance(found, ModelError) and "model.attention='flash_attention_2': runs only on CUDA" in str(found)


@pytest.mark.parametrize("key", ["record.dir", "record.artefacts"])
@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_is_a_file(tmp_path: Path, key: str, place: str) -> None:
    (tmp_path / "file").write_text("")
    found = error(f"{key}={tmp_path / place}")
    assert isinstance(found, ConfigError)
    assert f"{key}=" in str(found) and "cannot be made or written" in str(found)


@pytest.mark.parametrize("key", ["record.dir", "record.artefacts"])
def test_a_folder_that_may_not_be_written(tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and real(path, mode))
    found = error(f"{key}={tmp_path / 'deep' / 'folder'}")
    assert isinstance(found, ConfigError) and f"{key}=" in str(found) and f"{tmp_path} may not be written" in str(found)


@pytest.mark.parametrize("folder", [".", "deep/folder"])
def test_a_name_that_is_too_long(tmp_path: Path, folder: str) -> None:
    assert "File name too long" in str(error(f"record.dir={tmp_path / folder}", f"name={'n' * 300}"))


def test_safe_and_unsafe_that_begin_alike(
    model: Path, make_bytes_chat: Callable[..., ChatFormat], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import normalizers

    chat = make_bytes_chat()
    chat.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("unsafe", "sad")
    chat.tokenizer.save_pretrained(str(model))
    found = error(f"guard.path={model}")
    assert isinstance(found, ModelError)
    assert all(part in str(found) for part in ("'safe'", "'unsafe'", "same token", "another guard"))
    run_preflight(config(f"guard.path={model}", "guard.kind=oracle"), world())  # no guard model, no complaint


def test_guard_prompts_that_cannot_fit_the_length(model: Path) -> None:
    found = error(f"guard.path={model}", "guard.max_length=400")  # a byte a token: the instruction alone is longer
    assert isinstance(found, ConfigError) and "guard.max_length=400" in str(found)


def test_a_constitution_is_read_before_training(tmp_path: Path) -> None:
    path = tmp_path / "constitution.json"
    path.write_text('{"constitutions": [{"critic": "c"}]}')
    found = error(f"cai.constitution={path}")
    assert isinstance(found, DataError) and str(path) in str(found) and "'revision'" in str(found)


@pytest.mark.parametrize(
    ("overrides", "most"),
    [
        ((), 20),  # 5 clients of 4 micro-batches (7 rows in twos)
        (("federation.clients_per_round=1",), 4),
        (("parallel.wide_lanes=false",), 5),
        (("federation.algorithm=centralised",), 4),
        (("federation.algorithm=local", "local.micro_batch_size=7"), 1),
    ],
)
def test_every_rank_must_have_a_part(overrides: tuple[str, ...], most: int) -> None:
    made = config(*overrides)
    check_world_size(made, most)
    with pytest.raises(ConfigError, match=rf"{most + 1} processes: must be <= {most}\b.*start fewer"):
        check_world_size(made, most + 1)


def test_a_model_larger_than_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "free_memory", lambda device, num_ranks: 1_000_000)
    found = error("model.dtype=float32")
    assert isinstance(found, ConfigError)
    assert all(part in str(found) for part in ("'embedded'", "1.66 MiB", "976.56 KiB", "fewer processes"))


@pytest.mark.parametrize(
    ("overrides", "together"),
    [
        ((), [["guard"], ["model"]]),
        (("guard.kind=oracle",), [["model"]]),
        (("eval.guard_judge=tuned",), [["model", "guard"]]),
        (("guard.kind=oracle", "eval.guard_judge=untuned"), [["model", "guard"]]),
        (("judge.kind=local", "judge.path=embedded"), [["guard"], ["model", "judge"]]),
        (("eval.guard_judge=tuned", "judge.kind=local", "judge.path=embedded"), [["model", "guard", "judge"]]),
    ],
)
def test_models_that_are_loaded_together_must_fit_together(
    overrides: tuple[str, ...], together: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "check_judge", lambda config: None)
    assert checks.loaded_together(config(*overrides)) == together
    most = max(map(len, together)) * 435_552 * 4
    monkeypatch.setattr(checks, "free_memory", lambda device, num_ranks: most)
    run_preflight(config(*overrides), world())
    monkeypatch.setattr(checks, "free_memory", lambda device, num_ranks: most - 1)
    found = str(error(*overrides))
    assert [f"{role}.path='embedded'" in found for role in max(together, key=len)] == [True] * max(map(len, together))


def needs(*overrides: str, num_ranks: int = 1) -> dict[str, int]:
    shape = ModelShape("Toy", 1000, 10, torch.float32, 0, 0, 0, 0, 0, 4096, Choice("sdpa", "asked for"), 0, 0, 0, 0)
    made = config("local.batch_size=7", "local.micro_batch_size=2", "cai.batch_size=6", *overrides)
    shapes = {role: shape for role in models_in_use(made)}
    return {need.stage: need.num_bytes for need in memory_needs(made, shapes, num_ranks)}


WEIGHTS, VECTOR = 4000, 40


@pytest.mark.parametrize(
    ("overrides", "num_ranks", "vectors"),
    [
        ((), 1, 4 + 4 + 1 + 5),  # AdamW's four, four micro-batches, the global adapter, five deltas
        (("parallel.exact=false",), 1, 4 + 1 + 1 + 5),  # one sum of gradients
        ((), 5, 4 + 4 + 1 + 1),
        (("parallel.wide_lanes=false",), 2, 4 + 4 + 1 + 3),
        (("federation.algorithm=scaffold",), 1, 4 + 4 + 2 + 2 * 5 + 1),  # the server's control; changes of c_i, one c_i
        (("federation.algorithm=fedadam",), 1, 4 + 4 + 3 + 5),
        (("federation.algorithm=local",), 1, 4 + 4 + 1 + 1),
    ],
)
def test_vectors_of_local_training(overrides: tuple[str, ...], num_ranks: int, vectors: int) -> None:
    assert needs(*overrides, num_ranks=num_ranks)["local training"] == WEIGHTS + vectors * VECTOR


def test_a_cohort_s_gathered_deltas_are_counted(tmp_path: Path) -> None:
    """For a rule that wants them on every rank, for attackers as many as there can be; control variates double them."""
    file = tmp_path / "mine.py"
    file.write_text("from fedsim import FedAvg\nclass Robust(FedAvg):\n    wants = 'updates'\n")
    rule, attack = f"federation.algorithm={file}:Robust", f"attacks=[{{kind: {file}:A, share: 0.33}}]"
    for num_ranks in (1, 5):
        alone = needs(num_ranks=num_ranks)["local training"]
        assert needs(rule, num_ranks=num_ranks)["local training"] == alone + 5 * VECTOR
        assert needs(attack, num_ranks=num_ranks)["local training"] == alone + 2 * VECTOR
        assert needs(attack, "attacks.0.share=0.9", num_ranks=num_ranks)["local training"] == alone + 5 * VECTOR
    scaffold = needs("federation.algorithm=scaffold")["local training"]
    assert needs("federation.algorithm=scaffold", attack)["local training"] == scaffold + 2 * 2 * VECTOR


def test_models_beside_a_stage_are_counted() -> None:
    """Sizes are such that a stage needs weights and vectors alone."""
    judge = ("judge.kind=local", "judge.path=embedded")
    standing = 5 * VECTOR
    alone = needs(*judge)
    assert alone["generation"] == WEIGHTS + standing
    assert alone["judging"] == 2 * WEIGHTS + standing
    assert alone["guard scoring"] == WEIGHTS + 2 * VECTOR
    assert alone["guard fine-tuning"] == WEIGHTS + (4 + 3) * VECTOR
    guard = WEIGHTS + 2 * VECTOR
    beside = needs(*judge, "eval.guard_judge=tuned")
    assert beside["guard fine-tuning"] == alone["guard fine-tuning"], "the model comes later"
    assert beside["guard scoring"] == guard + WEIGHTS + standing
    for stage in ("local training", "CAI (DPO)", "generation", "judging"):
        assert beside[stage] == alone[stage] + guard, stage
    assert "guard fine-tuning" not in needs("guard.kind=oracle", "eval.guard_judge=untuned")


@pytest.fixture()
def checked(tmp_path: Path) -> Callable[..., Simulation]:
    """``checked(*overrides)``: a simulation on a small SQuARe file, made and checked."""

    def made(*overrides: str) -> Simulation:
        rows = square_rows()[:150]
        (tmp_path / "square.json").write_text(json.dumps(rows), encoding="utf-8")
        places = [f"data.square={tmp_path / 'square.json'}", f"record.dir={tmp_path / 'runs'}"]
        simulation = Simulation(config(*places, f"record.artefacts={tmp_path / 'artefacts'}", *overrides), world())
        simulation.check()
        return simulation

    return made


def test_a_check_prints_the_plan_and_leaves_no_run(
    checked: Callable[..., Simulation], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    checked("eval.every=2", "eval.hhh=")
    shown = capsys.readouterr()
    for words in (
        "1 epochs of 16 rows",
        "60 rows by llama_guard, unsafe ones: drop",
        "12 rows of three turns",
        "3 rounds of 5 client(s), 3 steps of 7 rows each: 315 rows in all",
        "3 x 2 iterations of 4 rows",
        "5 times 5 AdvBench, 5 MT-Bench",  # pretrained, rounds 2 and 3 before and after CAI
        "LlamaForCausalLM, 435,552 weights in float32",
        "attention: sdpa (auto)",
        "clients            local rows: 0 of 60 dropped",
        "guard fine-tuning  guard rows: 0 of 16 dropped",
        "CAI                CAI rows: 0 of 12 dropped",
    ):
        assert words in shown.out, shown.out
    assert "checked: nothing was trained" in shown.err
    assert not (tmp_path / "runs").exists()


class Second(OneRank):
    """A rank that prints nothing."""

    is_main = False


def test_one_rank_prints_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = [f"record.dir={tmp_path / 'runs'}", f"record.artefacts={tmp_path / 'artefacts'}"]
    (tmp_path / "square.json").write_text(json.dumps(square_rows()[:150]), encoding="utf-8")
    made = config(*places, f"data.square={tmp_path / 'square.json'}", "guard.kind=none", "eval.guard_judge=none")
    Simulation(made, World(Second(), torch.device("cpu"), exact=True)).check()
    assert capsys.readouterr().out == ""


def test_a_stage_that_may_not_fit_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "free_memory", lambda device, num_ranks: 4_000_000)
    made = config()
    found = run_preflight(made, world())
    row = SquareRow(0, "Who flies the kite?", "Orla does.", False, (), "")
    data: Any = SimpleNamespace(shards=[[row]] * 6, guard_rows=[row], cai_rows=[row], guard_tally=Tally(1))
    suite: Any = SimpleNamespace(counts=lambda: {})
    text = plan_text(made, Inputs(data, suite, {}), found, 1)
    assert [f"Warning: {warning}" for warning in found.warnings()] == text.splitlines()[
        -2 * len(found.warnings()) + 1 :: 2
    ]
    assert len(found.warnings()) == 1 + sum(need.num_bytes > 4_000_000 for need in found.needs) > 1
    assert "Warning: for 3.81 MiB: does not fit: " in text, "the weights alone are more"
    (line,) = [line for line in text.splitlines() if line.startswith("Warning: generation")]
    assert "may not fit into 3.81 MiB" in line and "eval.batch_size" in line


@pytest.mark.parametrize(
    ("words", "is_said"),
    [(["eval.mt_bench=q.jsonl"], True), (["eval.mt_bench=q.jsonl", "judge.kind=openai"], False), ([], False)],
)
def test_the_plan_says_that_mt_bench_will_not_be_rated(words: list[str], is_said: bool) -> None:
    data: Any = SimpleNamespace(shards=[[1]], guard_rows=[1], cai_rows=[1])
    suite: Any = SimpleNamespace(counts=lambda: {})
    assert ("MT-Bench" in work(load_config(None, words), data, suite)) == is_said


def test_a_warning_comes_with_the_first_byte_too_much() -> None:
    needs = [Need("a", 100, "k.a"), Need("b", 101, "k.b")]
    found = Preflight({}, needs, [200, 100], DiskRoom(0, 0, 0, Path()))
    (line,) = found.warnings()
    assert line.startswith("b may not fit into") and line.endswith("lower k.b")


def test_spare_memory_is_what_stages_beside_generation_leave() -> None:
    """On the rank with least, less a reserve; never negative."""
    room, gib = DiskRoom(0, 0, 0, Path()), 1 << 30
    needs = [Need("local training", 30 * gib, "k"), Need(GENERATION, 70 * gib, "k"), Need("CAI (DPO)", 60 * gib, "k")]
    assert Preflight({}, needs, [90 * gib, 80 * gib], room).spare_bytes == 20 * gib - RESERVE > 0
    assert Preflight({}, needs, [90 * gib, 60 * gib], room).spare_bytes == 0


def test_the_plan_of_the_papers_round_on_4_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 clients on 4 ranks: four alone, the fifth shared, 1.25 client times and nobody idle."""
    from fedsim.run.plan import lanes

    made = load_config(None, ["local.batch_size=16", "local.micro_batch_size=4"])
    assert lanes(made, 4)["clients of a round"] == "4 on one process each, 1 shared by 4 processes"
    assert lanes(made, 4)["a round takes"].startswith("1.25 client times, 0.0 % idle")
    assert lanes(made, 1)["a round takes"].startswith("5 client times, 0.0 % idle")


def test_a_disk_that_is_too_small(monkeypatch: pytest.MonkeyPatch, checked: Callable[..., Simulation]) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match=r"record\.dir=.*1000 bytes are free.*another disk"):
        checked("federation.algorithm=scaffold")
    with pytest.raises(ConfigError, match=r"record\.dir=.*1000 bytes are free"):
        run_preflight(config(), world())


def test_what_a_run_keeps_on_its_disk(tmp_path: Path) -> None:
    """Checkpoints of x (and c), one more than are kept; of 6 clients the newest c_i, and 5 more for each checkpoint."""

    def room(*overrides: str) -> DiskRoom:
        return check_disk(
            config(f"record.dir={tmp_path}", "federation.num_rounds=9", "record.keep_checkpoints=3", *overrides), 10, 5
        )

    assert room().needed == 40 * (4 + 1)
    assert room("federation.algorithm=scaffold").needed == 40 * (2 * 4 + 1 + 6 + 5 * 3)
    assert room("federation.num_rounds=2").needed == 40 * (2 + 1)
    assert room().there == 0


def test_a_resumed_run_does_not_need_its_space_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config(f"record.dir={tmp_path}")
    needed = check_disk(made, 1000, 5).needed
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 500))
    with pytest.raises(ConfigError, match="free space"):
        check_disk(made, 1000, 5)
    file = tmp_path / "small" / "checkpoints" / "round-000001" / "state.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(bytes(500))
    assert check_disk(made, 1000, 5).there == 500


def test_a_container_with_too_little_shared_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Docker's 64 MiB; NCCL wants more."""
    for num_mib, warns in ((64, True), (1023, True), (1024, False), (8192, False)):
        found = SimpleNamespace(f_frsize=4096, f_blocks=num_mib * 256)
        monkeypatch.setattr(os, "statvfs", lambda folder, found=found: found)
        assert ("--shm-size=8g" in checks.shared_memory_warning()) is warns, num_mib
    monkeypatch.undo()
    assert "is missing" in checks.shared_memory_warning("/no/such/folder")
    needs = [Need("a", 100, "k.a")]
    (line,) = Preflight({}, needs, [200], DiskRoom(0, 0, 0, Path()), shared_memory="/dev/shm has 64 MiB").warnings()
    assert line == "/dev/shm has 64 MiB"


def test_memory_is_shared_with_the_processes_on_the_same_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def free(device: torch.device, sharing: int) -> int:
        asked.append(sharing)
        return 10**12

    monkeypatch.setattr(checks, "free_memory", free)
    for gpus, sharing in ((("a", "b", "c", "d"), 1), (("a", "a", "b", "a"), 3), (("",) * 4, 4)):
        placed = world()
        placed.placement = Placement(tuple(Seat("cuda" if gpu else "cpu", gpu) for gpu in gpus))
        run_preflight(config("guard.kind=none"), placed)
        assert asked.pop() == sharing


@pytest.mark.parametrize(("file", "device"), [("demo", "cpu"), ("table1", "cpu"), ("paper/base", "auto")])
def test_the_embedded_world_runs_on_the_cpu_and_the_papers_on_gpus(file: str, device: str) -> None:
    assert load_config(SMALL.parents[2] / "configs" / f"{file}.yaml").parallel.device == device
    assert Config().parallel.device == "auto"
