"""The door: what a configuration names, with options that are checked; and what a user's mistake is told as."""

from __future__ import annotations

import errno
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from fedsim.base.artefacts import file_digest
from fedsim.base.errors import ConfigError, DataError, RunError
from fedsim.base.user_code import calling
from fedsim.config import AttackConfig, Config, from_flat, load_config, to_flat, to_nested
from fedsim.data.square import SquareRow
from fedsim.extend import KINDS, build, check_name, load, source_file, title
from fedsim.federation.algorithms import ClientOutcome, FedAvg, ServerState, Updates
from fedsim.federation.attacks import build_attacks
from fedsim.record.groups import settings_of
from fedsim.record.sameness import compare
from fedsim.report.paper import arm_of
from fedsim.run.checks import check_code

CODE = """
from dataclasses import replace
from fedsim import Algorithm, Attack, FedAvg, Guard, Verdict


class Plain(FedAvg):
    def __init__(self, rate: float, *, warm: int = 3):
        self.rate, self.warm = rate, warm


class Unfinished(Algorithm):
    pass


class Scaled(Attack):
    def __init__(self, scale=2.0):
        self.scale = scale

    def outcome(self, outcome, state, rng, colluders):
        return replace(outcome, delta=outcome.delta * self.scale + float(rng.random()))


class Poison(Attack):
    def rows(self, client, rows, rng):
        return rows[::-1]


class Idle(Attack):
    pass


class Short(Guard):
    def judge(self, rows):
        return [Verdict(len(row.response) > 3, 0.5) for row in rows]


def half(rows, num_clients, rng, *, share=0.5):
    return [[] for _ in range(num_clients)]


def one_argument(rows):
    return []


def polite(reply, word="please"):
    return word in reply


NOT_A_CLASS = 3
"""


@pytest.fixture()
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my.py"
    path.write_text(CODE, encoding="utf-8")
    return path


def test_every_name_of_fedsims_own_is_found_and_of_its_kind() -> None:
    for key, kind in KINDS.items():
        for name in kind.own:
            if kind.own_key:
                with pytest.raises(ConfigError, match=f"is fedsim's own; set eval.{name}"):
                    check_name(key, name)
            else:
                check_name(key, name)
            if (key, name) != ("eval.advbench_phrases", "strict_world"):  # wants the prompt too
                assert (load(key, name).__doc__ or "").strip()


def test_a_file_a_module_and_their_options(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = build("federation.algorithm", f"{file}:Plain", {"rate": 0.5})
    assert (found.rate, found.warm) == (0.5, 3) and title("federation.algorithm", f"{file}:Plain") == "Plain"
    (file.parent / "mine_too.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(file.parent))
    other = build("federation.algorithm", "mine_too:Plain", {"rate": 1, "warm": 2})
    assert (other.rate, other.warm) == (1, 2)
    assert source_file("federation.algorithm", f"{file}:Plain") == file
    assert source_file("federation.algorithm", "mine_too:Plain") == file.parent / "mine_too.py"
    assert source_file("federation.algorithm", "fedavg") is None
    assert build("eval.advbench_phrases", f"{file}:polite", {"word": "kite"})("a kite") is True


def test_a_file_that_was_changed_is_loaded_again_and_one_that_was_not_is_not(file: Path) -> None:
    first = load("guard.kind", f"{file}:Short")
    assert load("guard.kind", f"{file}:Short") is first
    file.write_text(CODE.replace("> 3", "> 9"), encoding="utf-8")  # as long, and in the same second
    assert load("guard.kind", f"{file}:Short") is not first
    row = SquareRow(0, "", "12345", False, (), "")
    assert [one().judge([row])[0].unsafe for one in (first, load("guard.kind", f"{file}:Short"))] == [True, False]
    assert not list(file.parent.glob("__pycache__"))


@pytest.mark.parametrize(
    ("key", "name", "options", "words"),
    [
        ("federation.algorithm", "{}:Plan", {}, "has no Plan; did you mean Plain?"),
        ("federation.algorithm", "{}:Plain", {}, "options.rate: .* needs this option; set federation.options.rate="),
        ("federation.algorithm", "{}:Plain", {"rate": 1, "worm": 2}, "worm=2: .*takes rate, warm; did you mean warm"),
        ("federation.algorithm", "{}:Short", {}, "must be a class that derives from fedsim.Algorithm, is <class"),
        ("federation.algorithm", "{}:NOT_A_CLASS", {}, "must be a class that derives from fedsim.Algorithm, is 3"),
        ("federation.algorithm", "{}:Unfinished", {}, "TypeError: Can't instantiate abstract class Unfinished"),
        ("federation.algorithm", "no_such_module_here:Plain", {}, "there is no module no_such_module_here; put"),
        ("federation.algorithm", "/nowhere/my.py:Plain", {}, "/nowhere/my.py cannot be read"),
        ("guard.kind", "{}:Plain", {"rate": 1}, "must be a class that derives from fedsim.Guard"),
        ("federation.partition", "{}:Plain", {}, r"must be a function of \(rows, num_clients, rng\)"),
        ("federation.partition", "{}:one_argument", {}, r"the arguments \(rows, num_clients, rng\), takes \(rows\)"),
        ("federation.partition", "{}:half", {"shore": 1}, "federation.partition_options.shore=1: .*mean share?"),
        ("federation.partition", "{}:half", {"rng": 1}, "federation.partition_options.rng=1: .*it takes share"),
    ],
)  # fmt: skip
def test_mistakes_name_value_rule_and_fix(file: Path, key: str, name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        build(key, name.format(file), options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import no_such_module_here", "my.py, line 1, in <module>: ModuleNotFoundError: No module named"),
        ("x = (", "my.py, line 1: SyntaxError"),
        ("import sys\nsys.exit(3)", "my.py, line 2, in <module>: SystemExit: 3"),
        ("raise RuntimeError('a\\nb')", "my.py, line 1, in <module>: RuntimeError: a b"),
    ],
)
@pytest.mark.parametrize("as_module", [False, True])
def test_a_file_that_cannot_be_imported(
    file: Path, text: str, words: str, as_module: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(text)
    monkeypatch.syspath_prepend(str(file.parent))
    monkeypatch.delitem(sys.modules, "my", raising=False)
    with pytest.raises(ConfigError, match=words) as error:
        load("federation.algorithm", "my:Plain" if as_module else f"{file}:Plain")
    assert "\n" not in str(error.value)
    assert not [name for name in sys.modules if name.startswith("fedsim_extension_") and sys.modules[name] is None]


def test_texts_that_code_was_handed_are_in_no_message_but_one_that_it_means_to_show(file: Path) -> None:
    file.write_text(
        "from fedsim import Guard\nfrom fedsim.base.errors import DataError\n\nclass Bad(Guard):\n"
        "    def judge(self, rows):\n        if rows == 'told':\n            raise DataError('row 3 has no tag')\n"
        "        raise KeyError(rows)\n"
    )
    guard = build("guard.kind", f"{file}:Bad", {})
    with (
        pytest.raises(RunError, match=r"^guard: .*my.py, line 8, in judge: KeyError$") as error,
        calling("guard", quiet=True),
    ):
        guard.judge("the secret row")
    assert error.value.__cause__ is None and error.value.__suppress_context__
    with pytest.raises(DataError, match="row 3 has no tag"), calling("guard", quiet=True):
        guard.judge("told")
    with pytest.raises(ZeroDivisionError), calling("fedsim's own bug"):
        print(1 / 0)


@pytest.mark.parametrize("quiet", [False, True])
def test_what_is_no_fault_of_the_code_passes_through_it(file: Path, quiet: bool) -> None:
    """Memory, a full disk, and a process that is lost while the code waits in one of fedsim's collectives."""
    file.write_text(
        "from fedsim import Guard\n\nclass Calls(Guard):\n    def judge(self, rows):\n        return rows()\n"
    )
    guard = build("guard.kind", f"{file}:Calls", {})
    collective: dict[str, Any] = {}
    source = "def all_gather():\n    raise RuntimeError('Connection closed by peer')\n"
    exec(compile(source, "/site-packages/torch/distributed/distributed_c10d.py", "exec"), collective)

    def raising(error: BaseException) -> Any:
        def call() -> None:
            raise error

        return call

    for call, kind in (
        (raising(MemoryError()), MemoryError),
        (raising(torch.OutOfMemoryError("CUDA out of memory")), torch.OutOfMemoryError),
        (raising(OSError(errno.ENOSPC, "no space")), OSError),
        (collective["all_gather"], RuntimeError),
    ):
        with pytest.raises(kind), calling("guard", quiet=quiet):
            guard.judge(call)
    with pytest.raises(RunError, match="in judge: FileNotFoundError"), calling("guard", quiet=quiet):
        guard.judge(raising(FileNotFoundError("words.txt")))


def test_a_message_from_a_file_that_the_code_imports_is_left_out_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The class itself lies in another file of its package, and calls a third; that one is hashed and named."""
    package = tmp_path / "door_package"
    package.mkdir()
    (package / "__init__.py").write_text("from door_package.guards import Strict\n")
    (package / "guards.py").write_text(
        "from fedsim import Guard\nfrom door_package.helper import look\n\n"
        "class Strict(Guard):\n    def judge(self, rows):\n        return look(rows)\n"
    )
    (package / "helper.py").write_text("def look(rows):\n    raise KeyError(rows)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    name = "door_package:Strict"
    assert source_file("guard.kind", name) == package / "guards.py"
    guard = build("guard.kind", name, {})
    with pytest.raises(RunError, match=r"guards.py, line 6, in judge: KeyError$"), calling("guard", quiet=True):
        guard.judge("the secret row")
    helper = sys.modules["door_package.helper"]
    with pytest.raises(RunError, match=r"helper.py, line 2: KeyError$"), calling("guard", quiet=True):
        helper.look("the secret row")


def test_a_function_must_be_python_s() -> None:
    for name in ("os:system", "builtins:len", "operator:itemgetter"):
        with pytest.raises(ConfigError, match=r"must be a function of \(reply\), is"):
            load("eval.advbench_phrases", name)


def test_nothing_is_loaded_when_a_configuration_is_read(file: Path, tmp_path: Path) -> None:
    file.write_text("raise AssertionError('loaded')")
    words = [f"federation.algorithm={file}:A", f"guard.kind={file}:B", f"federation.partition={file}:c",
             f"eval.advbench_phrases={file}:d", f"attacks=[{{kind: {file}:E, share: 0.5}}]", f"judge.kind={file}:F",
             f"eval.benchmarks=[{{kind: {file}:G, path: x}}]", f"record.dir={tmp_path}", "name=run"]  # fmt: skip
    config = load_config(None, words)
    assert arm_of(to_flat(config)) == "A, FL + B filter under 50 % E"
    assert title("judge.kind", config.judge.kind, to_flat(config)) == "F"
    assert config.eval.advbench_rule == "d" and from_flat(to_flat(config)) == config
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(to_nested(config)))
    assert not compare(tmp_path / "run", config).changed
    settings_of(to_flat(config), {"inputs": {}, "models": {}})
    with pytest.raises(Exception, match="AssertionError: loaded"):
        check_code(config)


def test_code_that_was_moved_is_the_same_and_other_content_is_not(file: Path, tmp_path: Path) -> None:
    def made(path: Path) -> Config:
        attack = f"attacks=[{{kind: {path}:Scaled, share: 0.5}}]"
        return load_config(None, [f"federation.algorithm={path}:Plain", attack, f"record.dir={tmp_path}"])

    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(to_nested(made(file))))
    entry = {"path": "", "num_bytes": 0, "sha256": file_digest(file)}
    roles = ("code of federation.algorithm", "code of attacks.0.kind")
    manifest = {"inputs": dict.fromkeys(roles, entry), "models": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    moved = tmp_path / "moved.py"
    file.rename(moved)
    found = compare(folder, made(moved))
    assert not found.changed and len(found.moved) == 2
    moved.write_text(CODE + "\n")
    assert len(compare(folder, made(moved)).changed) == 2
    same, other = (settings_of(to_flat(made(path)), manifest) for path in (file, moved))
    assert same == other, "groups go by the digests of their manifests"
    changed = {"inputs": {role: {**entry, "sha256": "0"} for role in roles}, "models": {}}
    assert settings_of(to_flat(made(file)), changed) != same


# ---- attacks -----------------------------------------------------------------------------------------------------


def attacked(file: Path, *attacks: tuple[str, float], num_clients: int = 20, seed: int = 3) -> list[Any]:
    settings = [AttackConfig(kind=f"{file}:{name}", share=share) for name, share in attacks]
    return build_attacks(settings, num_clients, seed)


def test_attackers_are_drawn_once_nested_in_larger_shares_and_disjoint(file: Path) -> None:
    small, large = (attacked(file, ("Scaled", share))[0].clients for share in (0.2, 0.5))
    assert (len(small), len(large)) == (4, 10) and set(small) < set(large)
    assert attacked(file, ("Scaled", 0.2), seed=4)[0].clients != small == attacked(file, ("Scaled", 0.2))[0].clients
    first, second = attacked(file, ("Scaled", 0.5), ("Poison", 0.5))
    assert sorted([*first.clients, *second.clients]) == list(range(20))


def test_an_attack_is_on_in_its_rounds(file: Path) -> None:
    settings = AttackConfig(kind=f"{file}:Scaled", share=1.0, from_round=3, until_round=4)
    (active,) = build_attacks([settings], 4, 0)
    assert [bool(active.in_round(round_idx, [0, 1])) for round_idx in range(6)] == [
        False,
        False,
        True,
        True,
        False,
        False,
    ]
    with pytest.raises(ConfigError, match=r"changes rows once for the whole run; leave attacks.0.from_round at 1"):
        build_attacks([AttackConfig(kind=f"{file}:Poison", share=1.0, from_round=2)], 4, 0)
    with pytest.raises(ConfigError, match="must override rows or outcome"):
        attacked(file, ("Idle", 1.0))


def outcome(client: int) -> ClientOutcome:
    return ClientOutcome(client, 3, 3.0, torch.ones(4), None, None, 0.5, 0.6, 10, 0.1)


def test_a_hooks_draws_belong_to_round_and_client(file: Path) -> None:
    (active,) = attacked(file, ("Scaled", 1.0))
    state = ServerState(torch.zeros(4))
    near = Updates((1,), torch.ones(1, 4), torch.ones(1, dtype=torch.float64), None, 20)
    found = [
        active.changed_outcome(outcome(c), r, state, near).delta[0].item() for c, r in ((1, 0), (2, 0), (1, 1), (1, 0))
    ]
    assert len(set(found)) == 3 and found[0] == found[3]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return None", "must return this client's ClientOutcome"),
        ("return replace(outcome, client=9)", "must return this client's ClientOutcome"),
        ("return replace(outcome, delta=outcome.delta[:2])", "must keep the shape and type of delta"),
        ("return replace(outcome, delta=outcome.delta.double())", "must keep the shape and type of delta"),
        ("return replace(outcome, delta=None)", "must keep the shape and type of delta"),
        ("return replace(outcome, control_delta=outcome.delta)", "must keep the shape and type of control_delta"),
        ("return outcome / 2", r"my.py, line 6, in outcome: TypeError"),
        ("return replace(outcome, weight=float('nan'))", "must keep weight finite and >= 0, is nan"),
        ("return replace(outcome, weight=-1.0)", "must keep weight finite and >= 0, is -1.0"),
    ],
)
def test_what_an_attack_returns_is_checked(file: Path, body: str, words: str) -> None:
    file.write_text(
        "from dataclasses import replace\nfrom fedsim import Attack\n\nclass Bad(Attack):\n"
        f"    def outcome(self, outcome, state, rng, colluders):\n        {body}\n"
    )
    (active,) = attacked(file, ("Bad", 1.0))
    near = Updates((1,), torch.ones(1, 4), torch.ones(1, dtype=torch.float64), None, 20)
    with pytest.raises((ConfigError, RunError), match=words):
        active.changed_outcome(outcome(1), 0, ServerState(torch.zeros(4)), near)


def test_no_hook_sees_what_another_one_wrote_into_the_colluders(file: Path) -> None:
    file.write_text(
        "from dataclasses import replace\nfrom fedsim import Attack\n\nclass Writes(Attack):\n"
        "    def outcome(self, outcome, state, rng, colluders):\n        colluders.deltas.add_(1)\n"
        "        return replace(outcome, delta=colluders.deltas[0])\n"
    )
    (active,) = attacked(file, ("Writes", 1.0))
    near = Updates((1,), torch.ones(1, 4), torch.ones(1, dtype=torch.float64), None, 20)
    found = [active.changed_outcome(outcome(1), 0, ServerState(torch.zeros(4)), near).delta for _ in range(2)]
    assert torch.equal(found[0], torch.full((4,), 2.0)) and torch.equal(*found)


def test_changed_rows_must_be_rows(file: Path) -> None:
    file.write_text(
        "from fedsim import Attack\n\nclass Bad(Attack):\n    def rows(self, client, rows, rng):\n        return [3]\n"
    )
    with pytest.raises(ConfigError, match="rows must return SquareRow objects, not int"):
        attacked(file, ("Bad", 1.0))[0].changed_rows(0, [])


# ---- options and attacks as configuration keys -------------------------------------------------------------------


def test_options_are_values_of_any_form_and_numbers_in_text_are_numbers() -> None:
    words = ["federation.algorithm=my.py:A", "federation.options={lr: 5e-5, names: [a, b], deep: {loud: true}}",
             "federation.options.lr=1e-3", "federation.options.deep.loud=false"]  # fmt: skip
    found = load_config(None, words).federation.options
    assert found == {"lr": 1e-3, "names": ["a", "b"], "deep": {"loud": False}}
    assert np.isclose(found["lr"], 0.001)


def test_an_options_mapping_of_a_file_takes_the_place_of_its_bases(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("federation: {algorithm: 'my.py:A', options: {a: 1, b: 2}}\n")
    (tmp_path / "own.yaml").write_text("base: base.yaml\nfederation.options: {c: 010}\n")
    assert load_config(tmp_path / "own.yaml", ["federation.options.d=x"]).federation.options == {"c": 8, "d": "x"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["federation.options=3"], "federation.options=3: must be a mapping"),
        (["federation.options={a b: 1}"], "must be a mapping of names"),
        (["federation.options={a: 2024-01-02}"], "federation.options.a=.*must be a number, a text"),
        (["federation.options={password: hunter}"], "no secret may be in a configuration"),
        (["federation.options={a: .nan}"], "federation.options.a=nan: must be a finite number"),
        (['federation.options={a: "x\\0"}'], "must not hold control characters"),
        (
            ["federation.options.a.b.c=1", "federation.options.a.b=2", "federation.options.a.b.c=3"],
            "there is no such part",
        ),
        (["attacks=3"], "must be a list of attacks"),
        (["attacks=[3]"], "must be a list of attacks"),
        (["attacks=[{share: 0.5}]"], "attacks.0: needs attacks.0.kind"),
        (["attacks=[{kind: my.py:A}]"], "attacks.0: needs attacks.0.share"),
        (["attacks=[{kind: sign_flip, share: 0.5}]"], "attacks.0.kind='sign_flip': must be module:Name"),
        (["attacks=[{kind: my.py:A, share: 0.5, shore: 1}]"], "attacks.0.shore=1: .*nearest key is attacks.0.share"),
        (["attacks=[{kind: my.py:A, share: 0}]"], "attacks.0.share=0.0: must be > 0 and <= 1"),
        (["attacks=[{kind: my.py:A, share: 0.01}]"], "attacks.0.share=0.01: is no client of federation.num_clients=20"),
        (["attacks=[{kind: my.py:A, share: 0.5, from_round: 3, until_round: 2}]"], "until_round=2: must be >="),
        (["attacks=[{kind: my.py:A, share: 0.5, from_round: 60}]"], "from_round=60: must be <= federation.num_rounds"),
        (["attacks=[{kind: my.py:A, share: 0.6}, {kind: my.py:A, share: 0.6}]"], "have 24 attackers together"),
        (["attacks=[{kind: my.py:A, share: 0.5}]", "federation.algorithm=local"], "has no cohort to attack"),
        (["attacks.0.share=0.5"], "there is no such part of attacks"),
    ],
)
def test_mistakes_in_options_and_attacks(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config(None, words)


def test_a_part_of_an_attack_can_be_set_for_a_sweep() -> None:
    attack = "attacks=[{kind: my.py:A, share: 0.1, options: {scale: 1}}]"
    found = load_config(None, [attack, "attacks.0.share=0.4", "attacks.0.options.scale=9"]).attacks
    assert found == [AttackConfig(kind="my.py:A", share=0.4, options={"scale": 9})]


def test_a_guard_model_takes_no_options() -> None:
    with pytest.raises(ConfigError, match=r"guard.options: guard.kind=llama_guard takes none"):
        check_code(load_config(None, ["guard.kind=llama_guard", "guard.options={a: 1}"]))


def test_a_class_without_a_file_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one of a notebook's cell, whose module is ``__main__``."""
    module = types.ModuleType("cell")
    module.Mine = type("Mine", (FedAvg,), {"__module__": "cell"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cell", module)
    with pytest.raises(ConfigError, match=r"'cell:Mine': cell has no source file; put the code into a file$"):
        load("federation.algorithm", "cell:Mine")
