"""The list of proved CUDA paths: whole entries, each with its committed row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest
import torch

from fedsim import proved

ROOT = Path(__file__).resolve().parents[1]
ENTRY = {
    "path": "accumulate_triton",
    "device": "NVIDIA H200",
    "torch": torch.__version__,
    "date": "2026-01-31",
    "commit": "0123abc",
    "max_relative_error": 0.0,
    "row": "tools/bench/results/aggregation.json",
}


@pytest.fixture()
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A list to write instead of the project's."""
    monkeypatch.setattr(proved, "LIST", tmp_path / "proved.json")
    proved.proofs.cache_clear()
    yield tmp_path / "proved.json"
    proved.proofs.cache_clear()


def test_a_path_is_proved_by_its_own_entry_alone(listed: Path) -> None:
    listed.write_text(json.dumps([ENTRY]))
    assert proved.is_proved("accumulate_triton")
    assert not proved.is_proved("varlen")
    assert proved.proofs() == (proved.Proof(**ENTRY),)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seen", "here", "proved_here"),
    [("2.11.0+cu130", "2.11.1", True), ("2.11.0", "2.13.0+cpu", False), ("2.1.0", "2.11.0", False)],
)
def test_a_proof_is_of_its_torch_release(
    listed: Path, monkeypatch: pytest.MonkeyPatch, seen: str, here: str, proved_here: bool
) -> None:
    listed.write_text(json.dumps([{**ENTRY, "torch": seen}]))
    monkeypatch.setattr(torch, "__version__", here)
    assert proved.is_proved("accumulate_triton") is proved_here


def test_nothing_is_proved_by_an_empty_list(listed: Path) -> None:
    listed.write_text("[]")
    assert not proved.is_proved("accumulate_triton")


def test_an_entry_with_a_missing_field_is_refused(listed: Path) -> None:
    listed.write_text(json.dumps([{k: v for k, v in ENTRY.items() if k != "row"}]))
    with pytest.raises(TypeError, match="row"):
        proved.is_proved("accumulate_triton")


def test_every_entry_of_the_project_has_its_row() -> None:
    for proof in proved.proofs():
        assert (ROOT / proof.row).is_file() and proof.row.startswith("tools/bench/results/"), proof
        assert date.fromisoformat(proof.date) and proof.max_relative_error >= 0 and proof.device and proof.torch, proof
