"""Configuration files and ``key=value`` words of any content: a checked configuration or one error naming a place."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedsim.base.errors import ConfigError
from fedsim.config import Config, load_config, to_flat, to_nested
from fedsim.config.loading import describe
from fedsim.config.training import FederationConfig
from tests.data.test_partition import deal
from tests.hostile.conftest import JUNK, cases, damaged, result

KEYS = [info.name for info in describe()]
DEFAULTS = to_flat(Config())
NUMBERS = [name for name, value in DEFAULTS.items() if isinstance(value, int | float) and not isinstance(value, bool)]

WHOLE = b"""\
# a run
name: kite
seed: 3
local: {lr: 5e-5, steps: 4, max_length: 128}
federation:
  algorithm: scaffold
  num_clients: 8
  clients_per_round: 2
model.lora_targets: [q_proj, 'o_proj']
guard:
  kind: oracle
  refusal: "I'm sorry.\\nNo."
eval: {hhh: '', temperature: 0.7}
wandb.tags: []
"""

LINES = [
    "a: &a [x, x, x]",
    "b: &b [*a, *a, *a]",
    "local: &x {steps: *x}",
    "local: {steps: *b}",
    "<<: *a",
    "<<: {seed: 3}",
    "seed: 1",
    "seed: 2",
    "seed: !!python/object/apply:os.system [true]",
    "seed: !!python/name:os.system",
    "seed: !!bool x",
    "seed: !!timestamp x",
    "seed: !!int ''",
    "seed: !!float x",
    "seed: !!set {a, b}",
    "seed: !!omap [a: 1]",
    "seed: !!binary '%%'",
    "name: 2024-99-99",
    "name: 2024-02-30",
    "name: 10:61:61",
    "? [seed, name]\n: 3",
    "? {seed: 3}\n: 3",
    "? |\n  seed\n: 3",
    "=: 3",
    "null: 3",
    "3: 4",
    '"seed\\0": 3',
    '"seed\\nname": 3',
    'name: "\\ud800"',
    'name: "\\0"',
    'data: {square: "a\\0b"}',
    'record.dir: "a\\nb"',
    "local.lr: .nan",
    "local.lr: -.inf",
    f"seed: {'9' * 5000}",
    f"seed: 0x{'f' * 5000}",
    f"local.lr: {'9' * 400}",
    f"seed: {'[' * 20_000}",
    f"seed: {'{a: ' * 20_000}",
    "local: [steps]",
    "local: steps",
    "local:",
    "base: .",
    "base: ''",
    'base: "\\0"',
    "--- \n...",
    "---",
    "%YAML 9.9",
    "\t",
    "name: |\n  a\n  b",
    "guard.refusal: |\n  a\n  b",
]


def check(config: Config | None) -> None:
    """A configuration that was accepted is one: right types, finite numbers, and the same when it is written down."""
    if config is None:
        return
    for name, value in to_flat(config).items():
        assert type(value) is type(DEFAULTS[name])
        assert not isinstance(value, float) or math.isfinite(value)
        assert not isinstance(value, int) or abs(value) < 2**63
        text = value if isinstance(value, str) else "".join(map(str, value)) if isinstance(value, list) else ""
        assert "\0" not in text
        text.encode()


def load(folder: Path, data: bytes) -> Config | None:
    path = folder / "hostile.yaml"
    path.write_bytes(data)
    found = result(lambda: load_config(path), *KEYS, str(folder), "is not a configuration key")
    check(found)
    if found is not None:
        path.write_text(yaml.safe_dump(to_nested(found), sort_keys=False), encoding="utf-8")
        assert load_config(path) == found
    return found


def test_the_whole_file_is_one(tmp_path: Path) -> None:
    assert load(tmp_path, WHOLE) is not None


@cases(150)
@given(data=damaged(WHOLE))
def test_a_damaged_file(tmp_path: Path, data: bytes) -> None:
    load(tmp_path, data)


@cases(150)
@given(lines=st.lists(st.sampled_from(LINES), min_size=1, max_size=4))
def test_a_file_of_traps(tmp_path: Path, lines: list[str]) -> None:
    load(tmp_path, "\n".join(lines).encode("utf-8", "surrogatepass"))


@cases(80)
@given(content=st.dictionaries(st.one_of(st.sampled_from([*KEYS, "local", "guard", "base"]), JUNK.map(str)), JUNK))
def test_a_file_of_junk(tmp_path: Path, content: dict[str, Any]) -> None:
    load(tmp_path, yaml.safe_dump(content).encode("utf-8", "surrogatepass"))


WORDS = [
    "",
    " ",
    "nan",
    ".nan",
    "inf",
    "-.inf",
    "1e400",
    "-1",
    "0",
    "5e-324",
    "1e308",
    "9" * 400,
    "9" * 5000,
    "0x" + "f" * 5000,
    str(2**63 - 1),
    str(2**63),
    "true",
    "null",
    "~",
    "~nobody-here/x",
    "[]",
    "[1, 2]",
    "[a, [b]]",
    '["\\0"]',
    "{a: 1}",
    "[" * 20_000,
    "&a [*a]",
    "*a",
    "!!python/object:os.system x",
    "!!bool x",
    "2024-99-99",
    "a\0b",
    "a\nb",
    '"a\\nb"',
    "\x1b[2J",
    "\ud800",
    "\udcff",
    "\U0001f600",
    "embedded",
    "embedded-held-out",
    "../..",
    "/",
    "x" * 5000,
    "a: b: c",
    "'",
    "%",
    "@",
    "`",
]


@cases(250)
@given(name=st.one_of(st.sampled_from(KEYS), st.text(max_size=8)), value=st.one_of(st.sampled_from(WORDS), st.text()))
def test_a_word_of_any_value(name: str, value: str) -> None:
    found = result(lambda: load_config(None, [f"{name}={value}"]), *KEYS, "override", "is not a configuration key")
    check(found)
    if found is not None:
        (changed,) = [k for k, v in to_flat(found).items() if v != DEFAULTS[k]] or [name.strip()]
        assert changed == f"{name}={value}".partition("=")[0].strip()


@pytest.mark.parametrize("key", [k for k, v in DEFAULTS.items() if isinstance(v, float)])
@pytest.mark.parametrize("value", [".nan", "nan", ".inf", "-.inf", "1e999", "9" * 400])
def test_no_number_is_nan_or_infinite(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key.replace('.', '[.]')}="):
        load_config(None, [f"{key}={value}"])


@pytest.mark.parametrize("key", ["data.square", "model.path", "guard.path", "eval.hhh", "eval.mt_bench", "eval.xstest"])
def test_a_held_out_set_that_is_not_there_is_no_path(key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}='embedded-held-out': only eval.advbench has such items"):
        load_config(None, [f"{key}=embedded-held-out"])
    assert load_config(None, ["eval.advbench=embedded-held-out", "name=embedded-held-out"]).name == "embedded-held-out"


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{c}: &{c} [{f'*{chr(ord(c) - 1)}, ' * 9}]\n" for c in "bcdefghij"),
        "".join(f"key{i}: {i}\n" for i in range(20_000)),
        f"{'x' * 200_000}: 3",
        "local: {" + ", ".join(f"k{i}: 1" for i in range(5000)) + "}",
    ],
    ids=["billion laughs", "many keys", "a long key", "a wide group"],
)
def test_no_file_takes_long(tmp_path: Path, text: str) -> None:
    began = time.monotonic()
    assert load(tmp_path, text.encode()) is None
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    "key",
    [
        *("federation.num_clients", "federation.num_rounds", "local.steps", "cai.iterations", "guard.tune_epochs"),
        *("model.lora_r", "guard.lora_r", "parallel.threads", "parallel.timeout_s", "judge.timeout_s"),
    ],
)
def test_a_count_that_no_run_could_come_to_is_refused(key: str) -> None:
    """What is laid out before a run, or handed to a clock, must be of a size that a machine has."""
    for value in ("1e12", str(2**63 - 1), str(2**63)):
        with pytest.raises(ConfigError, match=f"^{key.replace('.', '[.]')}=.*must be "):
            load_config(None, [f"{key}={value}"])


@cases(60)
@given(
    kind=st.sampled_from(["beta_red_share", "dirichlet", "quantity_skew"]),
    level=st.one_of(st.sampled_from([1e-9, 1e9, 1e-3]), st.floats(1e-9, 1e9)),
    red=st.lists(st.booleans(), min_size=6, max_size=40),
    seed=st.integers(0, 2**40),
)
def test_every_skew_that_a_key_allows_deals_out_every_row(kind: str, level: float, red: list[bool], seed: int) -> None:
    for key in ("beta_concentration", "dirichlet_alpha"):
        assert getattr(load_config(None, [f"federation.{key}={level!r}"]).federation, key) == level
    dealt = deal(red, 6, kind, seed, categories=[str(flag) for flag in red], concentration=level, alpha=level)
    assert sorted(row for shard in dealt for row in shard) == list(range(len(red))) and all(dealt)


def test_a_skew_beyond_what_can_be_drawn_is_refused() -> None:
    assert FederationConfig().partition
    for word in ("federation.beta_concentration=1e-300", "federation.dirichlet_alpha=1e308"):
        with pytest.raises(ConfigError, match=r"must be >= 1e-09 and <= 1e\+09"):
            load_config(None, [word])
