"""From a file to shards: what every rank gets, what the user is told, and what is read again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.base.artefacts import ArtefactStore
from fedsim.base.errors import DataError
from fedsim.base.ranks import OneRank
from fedsim.config import Config, DataConfig, load_config
from fedsim.data import splits
from fedsim.data.prepared import PreparedData
from fedsim.run.prepare import embedded_sizes, prepare_data


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


def test_rows_without_a_question_or_a_reply_are_counted(tmp_path: Path) -> None:
    """A guard learns nothing about a reply that is not there; CAI still takes the questions of such rows."""
    path = write_file(tmp_path)
    rows = json.loads(path.read_text(encoding="utf-8"))
    for i, row in enumerate(rows):
        row["response_en"] = "" if i % 5 == 0 else row["response_en"]
        row["question_en"] = " " if i == 7 else row["question_en"]
    path.write_text(json.dumps(rows), encoding="utf-8")
    data = prepare(tmp_path, config(path, "data.cai_rows=0", "data.guard_rows=30"))
    left = data.guard_tally
    assert (left.num_rows, left.num_usable) == (30, len(data.guard_rows)) and left.num_dropped > 0
    assert left.dropped == {"empty_reply": sum(not row.response for row in data.cai_rows)}
    assert all(row.response for row in data.guard_rows) and len(data.cai_rows) == 30
    assert data.notes[1] == "1 rows were dropped: their question is blank"
    percent = f"{100 * left.dropped_share:.2g}"
    count = left.num_dropped
    assert data.notes[-1] == f"guard rows: {count} of 30 dropped, {percent} % ({count} with an empty reply)"


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


def embedded(*words: str) -> Config:
    return load_config(None, ["federation.num_clients=200", *words])


def test_the_embedded_corpus_grows_with_the_splits(tmp_path: Path) -> None:
    words = ["data.federated_rows=4000", "data.guard_rows=1000", "data.cai_rows=400"]  # 1,900 red, 3,500 acceptable
    assert embedded_sizes(embedded(*words).data) == (2000, 3500)
    data = prepare(tmp_path, embedded(*words))
    assert data.source.name == "square-2000-3500.json" and sum(map(len, data.shards)) == 4000
    assert (len(data.guard_rows), len(data.cai_rows)) == (1000, 400)
    smaller = prepare(tmp_path, embedded("data.federated_rows=2000"))
    assert smaller.source.name == "square.json" and smaller.source.parent != data.source.parent


def test_the_embedded_corpus_has_questions_to_spare_where_they_stay_together(tmp_path: Path) -> None:
    words = ["data.federated_rows=3000", "data.guard_rows=2800", "data.cai_rows=0", "data.federated_red_share=0.5"]
    words += ["data.group_by_question=true", "seed=3"]  # with this seed 2,900 rows of each label do not do
    data = prepare(tmp_path, embedded(*words))
    assert (sum(map(len, data.shards)), len(data.guard_rows)) == (3000, 2800)
    clients, guard = {row.prompt for shard in data.shards for row in shard}, {row.prompt for row in data.guard_rows}
    assert not clients & guard, f"{len(clients & guard)} questions are in two splits"


def test_the_embedded_corpus_ends_where_its_questions_do(tmp_path: Path) -> None:
    words = ["data.federated_rows=10000", "data.guard_rows=0", "data.cai_rows=0"]
    with pytest.raises(DataError, match=r"questions for 6,400 rows, .* 3,000 red and 7,000 .*data\.federated_rows"):
        prepare(tmp_path, embedded(*words))
    made = embedded(*words, "data.fit=true")
    assert sum(embedded_sizes(made.data)) in (6399, 6400)
    data = prepare(tmp_path, made)
    assert 5500 < sum(map(len, data.shards)) <= 6400 and any("shrunk" in note for note in data.notes)


@given(st.integers(1, 6000), st.floats(0, 1), st.integers(0, 3000), st.floats(0, 1), st.booleans())
def test_sizes_of_the_embedded_corpus_cover_what_is_asked(
    federated: int, share: float, guard: int, other: float, grouped: bool
) -> None:
    made = DataConfig(federated_rows=federated, federated_red_share=share, guard_rows=guard, guard_red_share=other,
                      cai_rows=0, group_by_question=grouped)  # fmt: skip
    demands = [splits.Demand.of("f", federated, share), splits.Demand.of("g", guard, other)]
    try:
        found = embedded_sizes(made)
    except DataError:
        least = sum(max(a, t) for a, t in zip(asked(demands), (2000, 2800), strict=True))
        assert least > (6400 * 50 // 51 if grouped else 6400)
        fitted = embedded_sizes(replace(made, fit=True))
        assert 6398 <= sum(fitted) <= 6400
        return
    assert sum(found) <= 6400
    assert all(f >= max(a, t) for f, a, t in zip(found, asked(demands), (2000, 2800), strict=True))


def asked(demands: list[splits.Demand]) -> tuple[int, int]:
    return sum(d.num_red for d in demands), sum(d.num_acceptable for d in demands)
