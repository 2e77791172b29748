"""docs/config.md holds every key of the schema with its default, and is current."""

from __future__ import annotations

import re
from pathlib import Path

from fedsim.config import Config, to_flat
from fedsim.config.page import help_text, page, sections

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "config.md"


def test_the_committed_page_is_that_of_the_schema() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: fedsim config --markdown > docs/config.md"


def test_every_key_has_one_row_and_one_line_of_help() -> None:
    keys = list(to_flat(Config()))
    assert re.findall(r"^\| `([a-z_.0-9]+)`", page(), flags=re.MULTILINE) == keys
    assert re.findall(r"^  ([a-z_.0-9]+) = ", help_text(), flags=re.MULTILINE) == keys
    assert [info.name for _, infos in sections() for info in infos] == keys


def test_a_row_has_default_meaning_unit_and_rule() -> None:
    rows = page().splitlines()
    assert "| `federation.num_rounds` | `50` | rounds | whole number >= 1 and <= 1e+06 |" in rows
    assert "| `parallel.timeout_s` | `1800.0` | a collective that waits longer than this ends the run | " \
        "number > 0 and <= 1e+08, s |" in rows  # fmt: skip
    (device,) = (row for row in rows if row.startswith("| `parallel.device`"))
    assert device.endswith("| `auto`, `cuda`, `cpu` |")


def test_every_key_that_a_page_names_exists() -> None:
    """Words like ``guard.threshold`` and ``guard.kind=none`` of README.md and docs/, in prose and in commands."""
    keys = {info.name for _, infos in sections() for info in infos}
    groups = {key.partition(".")[0] for key in keys if "." in key}
    word = re.compile(rf"(?<![\w./-])(?:{'|'.join(groups)})\.(?!yaml|json|md|py)[a-z_0-9]+\b(?![/.(-])")
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        named = set(word.findall(path.read_text(encoding="utf-8")))
        assert named <= keys, f"{path}: names {sorted(named - keys)}, which are no configuration keys"
