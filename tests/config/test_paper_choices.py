"""docs/paper-choices.md holds every key of configs/paper that decides a figure, with its value."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from fedsim.config import load_config, to_flat
from fedsim.record.groups import decides

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "paper-choices.md").read_text(encoding="utf-8")
ARMS = sorted(path for path in (ROOT / "configs" / "paper").glob("*.yaml") if path.name != "base.yaml")
SCHEMA = to_flat(load_config(None))


def stated() -> dict[str, list[Any]]:
    """Key → the values that the tables give it, of which ``a/b`` has two."""
    found: dict[str, list[Any]] = {}
    for line in PAGE.splitlines():
        if not line.startswith("| "):
            continue
        for key, text in re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)?)=([^`]*)`", line):
            assert key not in found, f"{key} stands in two lines"
            found[key] = [yaml.safe_load(part) for part in text.split("/")]
    return found


def without_effect() -> set[str]:
    """Keys that the page's last section names."""
    last = PAGE.split("## Without effect")[1]
    return set(re.findall(r"`([a-z_]+\.[a-z_0-9]+)`", last))


def as_read(value: Any) -> Any:
    """A value as a YAML file gives it."""
    return yaml.safe_load(yaml.safe_dump(value))


def test_every_value_is_the_configurations() -> None:
    configs = [to_flat(load_config(path)) for path in ARMS]
    assert len(configs) == 8
    for key, values in stated().items():
        used = [config[key] for config in configs]
        expected = [type(used[0])(value) if isinstance(used[0], float) else value for value in values]
        wrong = [value for value in used if as_read(value) not in expected]
        assert not wrong, f"docs/paper-choices.md says {key}={values}, configs/paper has {wrong[0]!r}"
        missing = [value for value in expected if value not in [as_read(value) for value in used]]
        assert not missing, f"docs/paper-choices.md says {key}={values}, no arm has {missing[0]!r}"


def test_every_key_that_decides_a_figure_has_its_line() -> None:
    tables, last = set(stated()), without_effect()
    assert not tables & last and (tables | last) <= set(SCHEMA), "a key is on the page twice, or is none"
    missing = sorted(key for key in SCHEMA if decides(key) and key not in tables | last)
    assert not missing, f"add to docs/paper-choices.md what the paper says of {', '.join(missing)}, and our choice"


def test_the_configurations_point_to_the_page_and_say_what_they_lack() -> None:
    for path in [*ARMS, ROOT / "configs" / "paper" / "base.yaml"]:
        comments = "\n".join(line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
        assert "MT-Bench" in comments and "judge." in comments, f"{path}: says nothing about a judge"
        assert path.name != "base.yaml" or "docs/paper-choices.md" in comments
