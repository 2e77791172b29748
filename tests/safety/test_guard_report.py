"""The guard's CSV files: every line is what the pure functions give, and no text of a row is in them."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsim.data.square import SquareRow
from fedsim.evaluate.confusion import GuardMetrics, Verdict
from fedsim.safety.filtering import Action, Filtered, filter_shards
from fedsim.safety.guard_curves import GRID, best_threshold
from fedsim.safety.guard_report import write_tables

THRESHOLD = 0.42
Table = list[dict[str, str]]


@pytest.fixture()
def found(make_row: Callable[..., SquareRow]) -> Filtered:
    """Two clients of six rows each, the second without a red one; probabilities from 0.05 to 0.6."""
    tags = {True: ("unethical", "predictive"), False: ("objective",)}
    rows = [make_row(i, i in (0, 2, 5), tags[i in (0, 2, 5)] if i != 11 else ()) for i in range(12)]
    verdicts = [Verdict.at(THRESHOLD, 0.05 * (1 + (7 * i) % 12)) for i in range(12)]
    return filter_shards([rows[:6], rows[6:]], [verdicts[:6], verdicts[6:]], Action("downweight", red_weight=0.5))


@pytest.fixture()
def tables(tmp_path: Path, found: Filtered) -> dict[str, Table]:
    dropped = filter_shards(found.given, found.verdicts, Action())
    write_tables(tmp_path / "guard", {"untuned": dropped, "fine-tuned": found}, THRESHOLD)
    read = {}
    for path in (tmp_path / "guard").iterdir():
        assert "kite" not in path.read_text(encoding="utf-8").lower(), "rows are about kites"
        with path.open(encoding="utf-8", newline="") as stream:
            read[path.stem] = list(csv.DictReader(stream))
    return read


def test_files_and_points(tables: dict[str, Table]) -> None:
    assert set(tables) == {"sweep", "calibration", "categories", "clients"}
    for table in tables.values():
        assert list(dict.fromkeys(line["point"] for line in table)) == ["untuned", "fine-tuned"]
        own, other = (
            [{**line, "point": ""} for line in table if line["point"] == p] for p in ("untuned", "fine-tuned")
        )
        assert (own == other) == (table is not tables["clients"]), "the action shows in the clients' table alone"


def test_the_sweep_holds_the_grid_the_run_s_threshold_and_the_best(tables: dict[str, Table], found: Filtered) -> None:
    lines = [line for line in tables["sweep"] if line["point"] == "untuned"]
    rows, verdicts = found.judged
    red, probs = [row.red for row in rows], [v.unsafe_prob for v in verdicts]
    best = best_threshold(red, probs)
    assert [float(line["threshold"]) for line in lines] == [*sorted([*GRID, THRESHOLD]), best]
    marks = {line["which"]: float(line["threshold"]) for line in lines if line["which"]}
    assert marks == {"of the run": THRESHOLD, "best Hmean on these rows": best}
    for line in lines:
        counts = GuardMetrics.of(red, [Verdict.at(float(line["threshold"]), p) for p in probs])
        assert [int(line[name]) for name in ("num_rows", "num_red", "num_unsafe", "num_caught")] == [
            counts.num_rows, counts.num_red, counts.num_unsafe, counts.num_caught,
        ]  # fmt: skip
        shares = {"accuracy": counts.accuracy, "precision": counts.precision, "recall": counts.recall,
                  "hmean": counts.hmean, "fpr": counts.fpr, "dropped_share": counts.unsafe_share,
                  "red_share_after": counts.red_share_after}  # fmt: skip
        for name, share in shares.items():
            assert line[name] == ("" if share is None else str(100.0 * share))


def test_categories_and_clients(tables: dict[str, Table], found: Filtered) -> None:
    lines = {(line["label"], line["category"]): line for line in tables["categories"] if line["point"] == "untuned"}
    assert list(lines) == [
        ("red", "predictive"), ("red", "unethical"), ("acceptable", "(none)"), ("acceptable", "objective"),
    ]  # fmt: skip
    total = found.total
    red = lines["red", "unethical"]
    assert (int(red["num_unsafe"]), int(red["num_rows"])) == (total.num_caught, total.num_red)
    assert float(red["unsafe_share"]) == pytest.approx(100 * total.num_caught / total.num_red)
    assert float(red["low"]) < float(red["unsafe_share"]) < float(red["high"])
    mine = [line for line in tables["clients"] if line["point"] == "fine-tuned"]
    assert [line["client"] for line in mine] == ["0", "1"]
    for line, counts, shard in zip(mine, found.clients, found.shards, strict=True):
        assert int(line["num_kept_rows"]) == 6 and int(line["num_unsafe"]) == counts.num_unsafe > 0
        assert float(line["kept_weight"]) == 6 - 0.5 * counts.num_unsafe == sum(row.weight for row in shard)
    assert float(mine[1]["red_share_after"]) == 0 and mine[1]["num_red"] == "0"
    caught = found.clients[0].num_caught
    assert caught > 0 and float(mine[0]["red_share_after"]) == pytest.approx(
        100 * (3 - caught / 2) / float(mine[0]["kept_weight"])
    )


def test_calibration_has_every_bin(tables: dict[str, Table]) -> None:
    lines = [line for line in tables["calibration"] if line["point"] == "untuned"]
    assert len(lines) == 15 and sum(int(line["num_rows"]) for line in lines) == 12
    empty = [line for line in lines if line["num_rows"] == "0"]
    assert empty and all(line["confidence"] == line["accuracy"] == "" for line in empty)
    assert all(float(line["low"]) * 100 < float(line["confidence"]) for line in lines if line["confidence"])
