"""The table of public data: every key exists, and the SHA-256 are those of the files that the readers were run on."""

from __future__ import annotations

import re
from pathlib import Path

from fedsim.base.artefacts import file_digest
from fedsim.config import describe
from fedsim.evaluate.sources import SOURCES, known_file
from tools.sources_page import page


def test_every_key_takes_a_path_and_every_hash_is_whole() -> None:
    keys = {info.name for info in describe()}
    assert {source.key for source in SOURCES} <= keys
    assert all(re.fullmatch(r"[0-9a-f]{64}", source.sha256) for source in SOURCES if source.sha256)
    hashes = [source.sha256 for source in SOURCES if source.sha256]
    assert len(set(hashes)) == len(hashes)
    assert all(source.rows for source in SOURCES if source.sha256)


def test_a_known_file_is_named_and_another_is_not() -> None:
    assert known_file(SOURCES[1].sha256) == "AdvBench (arXiv 2307.15043)"
    assert known_file("0" * 64) is None and known_file("") is None


def test_the_real_files_have_the_hashes_of_the_table(real_data: Path) -> None:
    """All but HHH's, which is not among the files that tests may expect."""
    found = {known_file(file_digest(path)) for path in real_data.rglob("*") if path.is_file()} - {None}
    assert found == {source.name for source in SOURCES if source.sha256 and source.key != "eval.hhh"}


def test_the_table_has_a_row_for_each_source() -> None:
    shown = page()
    assert all(f"`{source.key}`" in shown and source.place in shown for source in SOURCES)
