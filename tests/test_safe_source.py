"""No way in the source to run code from data, read pickled files, start a shell, or reach the network unasked.

The rules are on the syntax tree, so that a comment or a test cannot break them. What is allowed is named with its file.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(p for part in ("fedsim", "launch", "tools", "kernels") for p in (ROOT / part).rglob("*.py"))

CODE: Final = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "runpy", "code"}
NETWORK: Final = {
    "socket", "requests", "httpx", "httpx2", "urllib3", "aiohttp", "huggingface_hub", "ftplib", "smtplib", "xmlrpc",
    "http", "openai", "wandb", "urllib.request",
}  # fmt: skip
ALLOWED: Final = {
    # Messages between a run's own processes, whose connections stay on this machine.
    ("fedsim/parallel/world.py", "pickle"),
    ("fedsim/evaluate/judge_client.py", "openai"),  # judge.kind=openai asks for it
    ("fedsim/evaluate/judge_http.py", "openai"),  # the HTTP client beneath it
    ("fedsim/evaluate/judge_http.py", "httpx2"),
    ("fedsim/evaluate/judge_replies.py", "openai"),  # the type of its errors
    ("fedsim/record/wandb_worker.py", "wandb"),  # wandb.mode=online asks for it; offline it writes files
    ("tools/chaos/sessions.py", "runpy"),  # starts launch/run.py in the process that will be killed
    ("tools/chaos/sessions.py", "socket"),  # asks the kernel for a free port
}
BUILTINS: Final = {"eval", "exec", "compile", "__import__"}
METHODS: Final = {
    "torch.load", "pickle.load", "pickle.Unpickler", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load",
    "yaml.load_all", "numpy.fromfile", "pandas.read_pickle", "torch.hub.load", "torch.jit.load",
    "PeftModel.from_pretrained", "importlib.import_module", "loader.exec_module",
    "util.spec_from_file_location",
}  # fmt: skip
TOOLS: Final = {"importlib.import_module", "loader.exec_module", "util.spec_from_file_location"}
"""Allowed in tools/, whose benchmark and GPU check load their own parts by name, and in the one place that loads what a
configuration names as a user's own code."""
DOOR: Final = "fedsim/base/user_code.py"
OFF: Final = {"shell", "trust_remote_code", "allow_pickle"}
HUB: Final = {"AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"}


def name_of(node: ast.expr) -> str:
    """``torch.hub.load`` of an attribute; ``?`` for anything that is no name, such as a call's result."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def is_constant(node: ast.expr | None, value: object) -> bool:
    """Whether an argument is there and is this constant."""
    return isinstance(node, ast.Constant) and node.value is value


def imported(node: ast.AST) -> Iterator[str]:
    """Every module that an import names."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def aliases(tree: ast.Module) -> dict[str, str]:
    """``{"np": "numpy"}``: what the file calls the modules and names that it imports."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            found |= {alias.asname or alias.name: f"{prefix}{alias.name}" for alias in node.names}
    return found


def breaches(source: str, file: str) -> list[str]:
    """What in a source file breaks a rule, with its line."""
    tree = ast.parse(source)
    known = aliases(tree)
    safe_loaders = {c.name for c in ast.walk(tree) if isinstance(c, ast.ClassDef)
                    and any(name_of(base) in ("yaml.SafeLoader", "SafeLoader") for base in c.bases)}  # fmt: skip
    # mypy holds the callers to what a parameter says it is
    safe_loaders |= {a.arg for a in ast.walk(tree) if isinstance(a, ast.arg) and a.annotation is not None
                     and ast.unparse(a.annotation) == "type[yaml.SafeLoader]"}  # fmt: skip
    found = []
    for node in ast.walk(tree):
        for module in imported(node):
            for banned in sorted(CODE | NETWORK):
                if f"{module}.".startswith(f"{banned}.") and (file, banned) not in ALLOWED:
                    found.append(f"{file}:{node.lineno}: import of {module}")  # type: ignore[attr-defined]
        if isinstance(node, ast.Call):
            found += [f"{file}:{node.lineno}: {what}" for what in _of_call(node, known, safe_loaders, file)]
    return found


def _of_call(node: ast.Call, known: dict[str, str], safe_loaders: set[str], file: str) -> Iterator[str]:
    head, dot, rest = name_of(node.func).partition(".")
    called = f"{known.get(head, head)}{dot}{rest}"
    last_two = ".".join(called.split(".")[-2:])
    given = {word.arg: word.value for word in node.keywords}
    if called in BUILTINS or (METHODS & {called, last_two}) - (
        TOOLS if file.startswith("tools/") or file == DOOR else set()
    ):
        yield called
    if last_two == "yaml.load" and name_of(given.get("Loader", ast.Name(""))) not in safe_loaders:
        yield "yaml.load without a safe loader"
    for name in OFF & given.keys():
        if not is_constant(given[name], False):
            yield f"{name}={ast.unparse(given[name])}"
    owner, _, method = last_two.partition(".")
    if owner in HUB and method in ("from_pretrained", "from_config"):
        asked = {"trust_remote_code": False}
        asked |= {"local_files_only": True} if method == "from_pretrained" else {}
        asked |= {"use_safetensors": True} if last_two == "AutoModelForCausalLM.from_pretrained" else {}
        for name, value in asked.items():
            if not is_constant(given.get(name), value):
                yield f"{last_two} without {name}={value}"


def test_the_source_keeps_the_rules() -> None:
    assert len(SOURCES) > 150
    assert [line for path in SOURCES for line in breaches(path.read_text("utf-8"), str(path.relative_to(ROOT)))] == []


def test_the_one_pickle_reads_and_writes_no_file() -> None:
    """Between processes: ``dumps`` and ``loads`` of bytes that a collective has carried."""
    tree = ast.parse((ROOT / "fedsim/parallel/world.py").read_text("utf-8"))
    used = {name_of(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {name for name in used if name.startswith("pickle.")} == {"pickle.dumps", "pickle.loads"}


@pytest.mark.parametrize(("file", "module"), sorted(ALLOWED))
def test_what_is_allowed_is_needed(file: str, module: str) -> None:
    assert any(name.split(".")[0] == module for n in ast.walk(ast.parse((ROOT / file).read_text("utf-8")))
               for name in imported(n))  # fmt: skip


BAD = [
    "import pickle", "import pickle as p", "from pickle import loads", "import dill", "from joblib import load",
    "import socket", "from urllib.request import urlopen", "import urllib.request", "import openai",
    "from huggingface_hub import snapshot_download", "import torch\ntorch.load('x.bin')",
    "from torch import load\nload('x')", "import torch as t\nt.load('x', weights_only=True)", "eval('1')",
    "exec('x = 1')", "compile('1', '', 'eval')", "__import__('os')", "import os\nos.system('ls')",
    "from os import popen\npopen('ls')", "import yaml\nyaml.load('a')",
    "import yaml\nyaml.load('a', Loader=yaml.Loader)",
    "import yaml\nyaml.unsafe_load('a')", "import subprocess\nsubprocess.run('ls', shell=True)",
    "import subprocess\nsubprocess.run('ls', shell=asked)", "import numpy as np\nnp.load('x', allow_pickle=True)",
    "AutoConfig.from_pretrained('x', local_files_only=True)",
    "AutoConfig.from_pretrained('x', local_files_only=True, trust_remote_code=True)",
    "AutoTokenizer.from_pretrained('x', trust_remote_code=False)",
    "AutoModelForCausalLM.from_pretrained('x', trust_remote_code=False, local_files_only=True)",
    "AutoModelForCausalLM.from_config(c)", "from peft import PeftModel\nPeftModel.from_pretrained(m, 'x')",
    "import importlib\nimportlib.import_module(name)", "spec.loader.exec_module(module)",
    "import importlib.util\nimportlib.util.spec_from_file_location('x', 'x.py')",
]  # fmt: skip


@pytest.mark.parametrize("source", BAD)
def test_each_rule_sees_what_breaks_it(source: str) -> None:
    assert breaches(source, "fedsim/made_up.py")


@pytest.mark.parametrize(
    "source",
    [
        "import yaml\nclass L(yaml.SafeLoader): ...\nyaml.load('a', Loader=L)", "import yaml\nyaml.safe_load('a')",
        "import subprocess\nsubprocess.run(['ls'])", "from urllib.parse import urlsplit", "model.eval()",
        "made().eval()", "# eval('1')",
        "from safetensors.torch import load_file\nload_file('x')", "import json\njson.load(f)",
        "AutoConfig.from_pretrained('x', local_files_only=True, trust_remote_code=False)",
    ],
)  # fmt: skip
def test_what_is_safe_is_left_alone(source: str) -> None:
    assert breaches(source, "fedsim/made_up.py") == []
