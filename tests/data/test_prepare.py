"""From a file to shards: what every rank gets, what the user is told, and what is read again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedsim.artefacts import ArtefactStore
from fedsim.config import Config, load_config
from fedsim.data.prepare import PreparedData, prepare_data
from fedsim.errors import DataError
from fedsim.ranks import OneRank


def write_file(folder: Path, num: int = 60, bad: int = 0) -> Path:
    path = folder / "square.json"
    rows = [
        {
            "question": f"연 {i}?", "question_en": f"Kite {i}?", "response": f"빨강 {i}", "response_en": f"Red {i}",
            "acceptable?": "?" if i < bad else i % 2, "category": ["objective"], "question_category": "kites",
        }
        for i in range(num)
    ]  # fmt: skip
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def config(path: Path | str, *more: str) -> Config:
    sizes = ["data.federated_rows=20", "data.guard_rows=10", "data.cai_rows=6", "federation.num_clients=4",
             "federation.clients_per_round=2"]  # fmt: skip
    return load_config(None, [f"data.square={path}", *sizes, *more])


def prepare(folder: Path, made: Config, log: list[str] | None = None) -> PreparedData:
    ranks = OneRank()
    return prepare_data(
        made, ArtefactStore(folder / "artefacts", ranks, (log if log is not None else []).append), ranks
    )


def test_rows_reach_their_places(tmp_path: Path) -> None:
    data = prepare(tmp_path, config(write_file(tmp_path)))
    assert [len(s) for s in data.shards] == [5] * 4
    assert sum(r.red for s in data.shards for r in s) == 6
    assert (len(data.guard_rows), len(data.cai_rows)) == (10, 6)
    parts = (
        [r.row_id for s in data.shards for r in s],
        [r.row_id for r in data.guard_rows],
        [r.row_id for r in data.cai_rows],
    )
    assert len({i for part in parts for i in part}) == 36, "disjoint"
    for row in data.guard_rows:
        assert row.prompt == f"Kite {row.row_id}?" and row.red == (row.row_id % 2 == 0)
    assert data.notes[0] == "square.json: 60 rows, 30 red and 30 acceptable"
    assert data.notes[-1] == "splits: federated 20, guard 10, cai 6; left over: 16 red, 8 acceptable"


def test_without_cai_rows_cai_takes_the_guards_questions(tmp_path: Path) -> None:
    data = prepare(tmp_path, config(write_file(tmp_path), "data.cai_rows=0"))
    assert data.cai_rows == data.guard_rows


def test_the_user_hears_of_dropped_rows_and_smaller_splits(tmp_path: Path) -> None:
    path = write_file(tmp_path, num=30, bad=3)
    with pytest.raises(DataError, match="rows short"):
        prepare(tmp_path, config(path))
    notes = prepare(tmp_path, config(path, "data.fit=true")).notes
    assert notes[0] == "square.json: 27 rows, 13 red and 14 acceptable"
    assert notes[1] == "3 rows were dropped: their label is neither 0 nor 1"
    assert "shrunk to 63.6%" in notes[2]


def test_read_once_and_again_after_a_change(tmp_path: Path) -> None:
    log: list[str] = []
    path = write_file(tmp_path)
    first = prepare(tmp_path, config(path), log)
    again = prepare(tmp_path, config(path), log)
    assert again == first
    korean = prepare(tmp_path, config(path, "data.language=ko"), log)
    assert korean.guard_rows[0].prompt.startswith("연")
    prepare(tmp_path, config(write_file(tmp_path, num=61)), log)
    assert [line.partition(" ")[2].partition(" ")[0] for line in log] == ["written", "reused", "written", "written"]


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: cannot be read"):
        prepare(tmp_path, config(tmp_path / "none.json"))


def test_the_embedded_world_is_the_default(tmp_path: Path) -> None:
    data = prepare(tmp_path, Config())
    assert len(data.shards) == 20 and {len(s) for s in data.shards} == {100}
    assert {sum(r.red for r in s) for s in data.shards} == {30}
    assert len(data.guard_rows) == 2000 and len(data.cai_rows) == 400
