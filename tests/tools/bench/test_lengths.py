"""Drawn lengths follow the committed histogram."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tools.bench import lengths


@pytest.mark.parametrize(("part", "field"), [("prompt", "question_en"), ("reply", "response_en")])
def test_the_histogram_is_that_of_the_file(part: str, field: str, real_data: Path) -> None:
    rows = json.loads((real_data / "square" / "response_test_ood.json").read_text(encoding="utf-8"))
    assert lengths.characters(part).tolist() == sorted(len(row[field]) for row in rows)


@pytest.mark.parametrize("part", ["prompt", "reply"])
def test_the_histogram_has_480_rows_and_its_stated_mean(part: str) -> None:
    known = lengths.characters(part)
    assert len(known) == 480
    assert known.mean() == pytest.approx(json.loads(lengths.FILE.read_text())["mean_characters"][part])


def test_one_order_is_every_row_once() -> None:
    known = lengths.characters("reply")
    drawn = lengths.draw("reply", 480, float(known.mean()))
    assert sorted(drawn) == known.tolist() and drawn != known.tolist()
    assert lengths.draw("reply", 480, float(known.mean()), seed=1) != drawn


def test_training_rows_have_110_tokens_half_of_them_reply() -> None:
    rows = lengths.training_rows(960, vocab_size=100)
    assert np.mean([len(row) for row in rows]) == pytest.approx(110, abs=0.5)
    assert np.mean([row.num_targets for row in rows]) == pytest.approx(55, abs=0.5)
    assert all(row.input_ids[-1] == lengths.END and row.input_ids[:-1].min() >= lengths.FIRST_TOKEN for row in rows)
    again = lengths.training_rows(960, vocab_size=100)
    assert all((a.input_ids == b.input_ids).all() for a, b in zip(rows, again, strict=True))
