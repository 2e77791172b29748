"""Model directories and adapters, damaged in any way: a model that computes, or one error that names key and file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fedsim.base.errors import ModelError
from fedsim.config.lora import LoraSettings
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.model.load import check_model_dir, load_chat, load_model
from fedsim.model.shape import model_shape
from tests.hostile.conftest import JUNK, as_json, cases, damaged, misshapen, result

LORA = LoraSettings(2, 4.0, 0.0, ("q_proj",))
CPU = torch.device("cpu")
KEY = "guard.path"


def use(folder: Path) -> None:
    """What a run does with a model directory: look before, then load; a model that passes computes numbers."""
    same: dict[str, Any] = {"dtype": "float32", "attention": "auto", "device": CPU, "key": KEY}

    def check() -> bool:
        found = check_model_dir(str(folder), KEY)
        model_shape(found, LORA, **same)
        load_chat(found, KEY)
        return True

    if result(check, KEY, str(folder)) is None:
        return
    loaded = result(lambda: load_model(str(folder), LORA, **same), KEY, str(folder))
    if loaded is not None:
        ids = loaded.chat.encode("kite")[:4]
        assert torch.isfinite(loaded.base(input_ids=torch.tensor([ids])).logits).all()


@pytest.fixture(scope="module")
def spoiled(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bytes | None], Path]:
    """A copy of the model in which one file has another content, or is missing."""
    folder = tmp_path_factory.mktemp("spoiled") / "model"

    def make(name: str, content: bytes | None) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(llama_dir, folder)
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content)
        return folder

    return make


Spoiled = Callable[[str, bytes | None], Path]
FILES = ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"]


def test_the_whole_directory_is_used(spoiled: Spoiled, llama_dir: Path) -> None:
    assert set(FILES) <= {path.name for path in llama_dir.iterdir()}
    use(spoiled("config.json", (llama_dir / "config.json").read_bytes()))


@cases(60)
@given(name=st.sampled_from([*FILES, "model.safetensors"]), data=st.data())
def test_a_damaged_file(spoiled: Spoiled, llama_dir: Path, name: str, data: st.DataObject) -> None:
    use(spoiled(name, data.draw(st.one_of(st.none(), damaged((llama_dir / name).read_bytes())))))


@cases(60)
@given(data=st.data())
def test_a_configuration_of_junk(spoiled: Spoiled, llama_dir: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["config.json", "config.json", "tokenizer_config.json", "generation_config.json"]))
    use(spoiled(name, as_json(data.draw(misshapen(json.loads((llama_dir / name).read_bytes()))))))


MAPS = st.one_of(JUNK, st.dictionaries(st.text(max_size=3), JUNK, min_size=1))


@cases(30)
@given(content=st.one_of(JUNK, MAPS.map(lambda files: {"weight_map": files})))
def test_an_index_of_junk(spoiled: Spoiled, content: Any) -> None:
    use(spoiled("model.safetensors.index.json", as_json(content)))


TEMPLATES = [
    "{{ 1 / 0 }}",
    "{{ messages[9].content }}",
    "{{ messages.x.y }}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{% for m in messages",
    "{{ messages | nothing }}",
    "{{ 'x' * (10 ** 4) }}",
    "{{ messages[0].content + 3 }}",
    "",
    "{{ raise_exception('no') }}",
    "{% include 'x' %}",
    "{{ range(10 ** 9) | list }}",
    "\0\ufeff",
    "{{ messages[0]['content'][::-1] }}",
]


@pytest.mark.parametrize("number", range(len(TEMPLATES)))
def test_a_template_that_is_none_or_does_something_else(spoiled: Spoiled, number: int) -> None:
    use(spoiled("chat_template.jinja", TEMPLATES[number].encode()))


@pytest.fixture(scope="module")
def adapter(make_adapted: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[FlatAdapter, Path]:
    _, flat = make_adapted(std=0.1)
    folder = tmp_path_factory.mktemp("adapter")
    flat.save(folder, flat.copy())
    return flat, folder


@cases(100)
@given(data=st.data())
def test_a_damaged_adapter(adapter: tuple[FlatAdapter, Path], tmp_path: Path, data: st.DataObject) -> None:
    flat, folder = adapter
    whole = folder / "adapter_model.safetensors"
    path = tmp_path / whole.name
    tensors = load_file(str(whole))
    name = data.draw(st.sampled_from(sorted(tensors)))
    kind = data.draw(st.sampled_from(["bytes", "bytes", "type", "shape", "lacking", "nan"]))
    if kind == "bytes":
        path.write_bytes(data.draw(damaged(whole.read_bytes())))
    else:
        types = st.sampled_from([torch.int8, torch.int64, torch.bool, torch.complex64, torch.float64, torch.bfloat16])
        tensor = tensors.pop(name)
        tensors |= {
            "type": {name: tensor.to(data.draw(types))},
            "shape": {name: tensor.flatten()},
            "lacking": {},
            "nan": {name: tensor.fill_(data.draw(st.sampled_from([float("nan"), float("inf")])))},
        }[kind]
        save_file(tensors, str(path))
    found = result(lambda: flat.read(tmp_path), str(path))
    if found is not None:
        assert found.shape == (flat.size,) and found.dtype == torch.float32 and torch.isfinite(found).all()
        assert kind == "bytes" or torch.allclose(found, flat.values, rtol=1e-2, atol=1e-2)


def test_an_adapter_that_is_not_there(adapter: tuple[FlatAdapter, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors: cannot be read"):
        adapter[0].read(tmp_path)
