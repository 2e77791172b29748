"""Model directories that nobody vouches for: no code of theirs runs, and each ends in one typed error."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim.base.errors import ModelError
from fedsim.model.load import check_model_dir, load_base, load_chat, read_config
from fedsim.model.shape import model_shape

CPU = torch.device("cpu")


class Touch:
    """Unpickling one makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.fixture()
def marker(tmp_path: Path) -> Path:
    """The file that foreign code would make."""
    return tmp_path / "ran"


@pytest.fixture()
def folder(tmp_path: Path, llama_dir: Path) -> Path:
    """A whole model directory to be spoilt."""
    shutil.copytree(llama_dir, tmp_path / "model")
    return tmp_path / "model"


def edit(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def load(folder: Path) -> object:
    """As a run does."""
    return load_base(str(folder), dtype="float32", attention="sdpa", device=CPU, key="model.path")


def put_code(folder: Path, marker: Path) -> None:
    """A module as directories with code of their own have it."""
    (folder / "own.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import LlamaConfig as C, LlamaForCausalLM as M, PreTrainedTokenizerFast as T\n",
        encoding="utf-8",
    )


@pytest.mark.parametrize("model_type", ["llama", "unheard_of"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_its_own_is_refused(folder: Path, marker: Path, file: str, model_type: str) -> None:
    put_code(folder, marker)
    edit(folder / "config.json", model_type=model_type)
    classes = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoTokenizer": ["own.T", "own.T"]}
    edit(folder / file, auto_map=classes)
    with pytest.raises(ModelError, match=rf"model\.path: .*{file} asks for code of its own \(auto_map\)") as error:
        load(folder)
    assert "\n" not in str(error.value) and not marker.exists()


def test_even_unchecked_no_code_is_run_and_nobody_is_asked(folder: Path, marker: Path) -> None:
    """The second line of defence: transformers itself is told; by default it asks on the terminal and waits."""
    put_code(folder, marker)
    classes = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoTokenizer": ["own.T", "own.T"]}
    edit(folder / "config.json", auto_map=classes, model_type="unheard_of")
    edit(folder / "tokenizer_config.json", auto_map=classes, tokenizer_class="T")
    began = time.monotonic()
    with pytest.raises(ModelError):
        read_config(folder, "model.path")
    with pytest.raises(ModelError):
        model_shape(folder, None, dtype="float32", attention="sdpa", device=CPU, key="model.path")
    with pytest.raises(ModelError):
        load_chat(folder, "model.path")
    assert time.monotonic() - began < 10 and not marker.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_weights_that_are_only_pickled_are_refused(folder: Path, marker: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Touch(marker)))
    with pytest.raises(ModelError, match=rf"weights are there only as pickle \({name}\).*\*\.safetensors"):
        load(folder)
    assert not marker.exists()


def test_pickles_beside_safetensors_are_not_looked_at(folder: Path, marker: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "adapter_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Touch(marker)))
    load(folder)
    assert not marker.exists()


def test_an_adapter_that_names_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    """transformers would put the adapter into the model, or load the one that adapter_config.json names."""
    settings = {"base_model_name_or_path": str(tmp_path / "elsewhere"), "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(ModelError, match=r"is an adapter \(adapter_config\.json\), which names another model"):
        load(folder)


def test_an_attention_kernel_of_the_hub_is_not_fetched(folder: Path) -> None:
    """The configuration may name one; what computes attention is model.attention's choice alone."""
    edit(folder / "config.json", attn_implementation="nobody/kernel", _attn_implementation="nobody/kernel")
    load(folder)


TEMPLATES = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class by item": "{{ ''['__class__']['__mro__'] }}",
    "class by filter": "{{ (['']|map(attribute='__class__')|first).__mro__ }}",
    "globals by filter": "{{ (lipsum|attr('__globals__'))['os'].system('touch MARKER') }}",
    "globals of a function": "{{ raise_exception.__globals__['os'].system('touch MARKER') }}",
    "globals of a class": "{{ cycler.__init__.__globals__.os.popen('touch MARKER').read() }}",
    "globals of lipsum": "{{ lipsum.__globals__['os'].system('touch MARKER') }}",
    "builtins": "{{ namespace.__init__.__globals__['__builtins__']['open']('MARKER', 'w') }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}{{ messages.__class__.__init__.__globals__ }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import '/etc/passwd' as a %}",
    "data is not changed": "{{ messages.append(1) }}",
    "division": "{{ 1 // 0 }}",
    "too long": "{% for i in range(10 ** 9) %}a{% endfor %}",
    "too deep": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "bad type": "{{ 'a' + 1 }}",
    "bad call": "{{ messages() }}",
    "refusal": "{{ raise_exception('no\nroles') }}",
    "syntax": "{% for %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_cannot_run_code(folder: Path, marker: Path, name: str) -> None:
    """transformers renders in jinja2's immutable sandbox; what that refuses and whatever else fails is one error."""
    text = TEMPLATES[name].replace("MARKER", str(marker))
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=r"chat template of .* cannot write a conversation") as error:
        load_chat(folder, "model.path")
    assert "\n" not in str(error.value) and not marker.exists()


def test_several_templates_without_a_default_are_one_error(folder: Path) -> None:
    edit(
        folder / "tokenizer_config.json", chat_template=[{"name": "a", "template": "x"}, {"name": "b", "template": "y"}]
    )
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ModelError, match=r"several chat templates, and none is its default"):
        load_chat(folder, "model.path")


def test_the_checks_before_a_run_make_them_too(folder: Path) -> None:
    edit(folder / "config.json", auto_map={"AutoConfig": "own.C"})
    for key in ("model.path", "guard.path"):
        with pytest.raises(ModelError, match=rf"{key}: .*auto_map"):
            check_model_dir(str(folder), key)
