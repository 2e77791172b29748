"""What a GPU has shown right is entered once, and only if every check of the path has passed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim import proved
from fedsim.attention.backends import BACKENDS, Cached, Scores, Sdpa
from fedsim.attention.spans import Spans
from tools.bench.attention import Heads, distances
from tools.bench.proofs import Refused, enter
from tools.bench.rows import Correctness

FACTS = {"device": "NVIDIA X", "versions": {"torch": torch.__version__}, "date": "2030-01-02T03:04:05", "commit": "abc"}


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A list of proofs of its own."""
    path = tmp_path / "proved.json"
    path.write_text("[]")
    monkeypatch.setattr(proved, "LIST", path)
    proved.proofs.cache_clear()
    yield path
    proved.proofs.cache_clear()


def test_a_path_is_entered_with_its_worst_error(listed: Path) -> None:
    checks = [
        Correctness("a", 1e-3, 1e-2, proves="varlen"),
        Correctness("b", 4e-3, 1e-2, proves="varlen"),
        Correctness("c", 0.0, 1.0),
        Correctness("d", 0.0, 1.0, proves="other"),
        Correctness("e", 2.0, 1.0, proves="other"),
    ]
    assert not proved.is_proved("varlen")
    assert enter(checks, FACTS, "tools/bench/results/x/attention.json", listed) == ["varlen"]
    (entry,) = json.loads(listed.read_text())
    assert entry == {
        "path": "varlen", "device": "NVIDIA X", "torch": torch.__version__, "date": "2030-01-02", "commit": "abc",
        "max_relative_error": 4e-3, "row": "tools/bench/results/x/attention.json",
    }  # fmt: skip
    assert proved.is_proved("varlen") and not proved.is_proved("other")


def test_a_new_run_takes_the_place_of_the_old_one(listed: Path) -> None:
    for error in (1e-3, 2e-3):
        enter([Correctness("a", error, 1.0, proves="varlen")], FACTS, "r", listed)
    enter([Correctness("a", 0.0, 1.0, proves="accumulate_triton")], FACTS, "r", listed)
    found = {entry["path"]: entry["max_relative_error"] for entry in json.loads(listed.read_text())}
    assert found == {"accumulate_triton": 0.0, "varlen": 2e-3}


def test_nothing_is_entered_for_a_run_that_proves_nothing(listed: Path) -> None:
    assert enter([Correctness("a", 0.0, 1.0)], FACTS, "r", listed) == []
    assert listed.read_text() == "[]"


@pytest.mark.parametrize("commit", [None, "abc (dirty)"])
def test_a_tree_that_nobody_can_get_again_proves_nothing(listed: Path, commit: str | None) -> None:
    checks = [Correctness("a", 0.0, 1.0, proves="varlen")]
    with pytest.raises(Refused, match="varlen"):
        enter(checks, {**FACTS, "commit": commit}, "r", listed)
    assert enter([Correctness("a", 0.0, 1.0)], {**FACTS, "commit": commit}, "r", listed) == []
    assert listed.read_text() == "[]"


@pytest.mark.parametrize("fault", ["values", "gradient", "nan", "slots"])
def test_the_attention_check_sees_a_wrong_backend(fault: str) -> None:
    """Each fault shows in the case that it is in."""

    class Wrong(Sdpa):
        def spans(self, query: Any, key: Any, value: Any, spans: Spans, scores: Scores) -> torch.Tensor:
            out = super().spans(query, key, value, spans, scores)
            if fault == "values":
                return out * 1.001
            if fault == "nan":  # the gradient of keys alone
                key.register_hook(lambda grad: torch.full_like(grad, torch.nan))
            return out + 0.001 * (value.sum() - value.detach().sum()) if fault == "gradient" else out

        def slots(self, query: Any, cached: Cached, scores: Scores) -> torch.Tensor:
            off = 1 if fault == "slots" else 0
            return super().slots(query, replace(cached, lengths=(cached.lengths - off).clamp(min=1)), scores)

    heads, cpu = Heads(4, 2, 8), torch.device("cpu")
    right = distances(BACKENDS["sdpa"], heads, torch.float32, cpu)
    assert max(right.values()) < 1e-6 and len(right) == 4
    wrong = {what for what, error in distances(Wrong(), heads, torch.float32, cpu).items() if not error <= 1e-4}
    assert wrong == ({"a step of decoding"} if fault == "slots" else set(right) - {"a step of decoding"})
