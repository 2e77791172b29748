"""The benchmark's page comes from the rows' files."""

from __future__ import annotations

import re
from pathlib import Path

from fedsim.study.bench_rows import Percentiles, Row, StageResult, Target
from tools.bench.page import NONE, page

FACTS = {
    "device": "A Processor",
    "threads": 2,
    "model": "micro",
    "versions": {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "trl": None},
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789abcdef",
}


def row(peer: str | None, peer_s: float, target: Target | None = None, name: str = "fast") -> Row:
    """One second of ours beside a peer's ``peer_s``."""
    peers = None if peer is None else Percentiles(peer_s, peer_s, peer_s)
    one = Percentiles(1.0, 1.0, 1.0)
    return Row("a", name, "float32", {}, one, 3, peer=peer, peer_seconds=peers, floor_s=0.5, target=target)


def written(folder: Path, rows: list[Row], **facts: object) -> Path:
    StageResult("a", FACTS | facts, [], rows).write(folder / "results" / "cpu" / "a.json")
    return folder / "results"


def test_the_page_has_every_row_with_and_without_a_target(tmp_path: Path) -> None:
    rows = [row("p", 2.0, Target("ratio", 1.5)), row("q", 1.2), row(None, 0.0, name="aside")]
    results = written(tmp_path, rows)
    lines = page(results).splitlines()
    assert "| a | fast | p | 1 s | 2 s | 2.00 x | 3 | – | ratio ≥ 1.5: reached | 50 % |" in lines
    assert "| a | fast | q | 1 s | 1.2 s | 1.20 x | 3 | – | – | 50 % |" in lines
    assert any("| a | aside |" in line for line in lines)


def test_the_page_names_the_strongest_peer_of_each_piece_of_work(tmp_path: Path) -> None:
    rows = [row("weak", 2.0, Target("ratio", 1.5)), row("strong", 0.9), row("middle", 1.2), row("only", 3.0, name="b")]
    text = page(written(tmp_path, rows))
    _, device, peers, every = re.split(r"^###? .*$", text, flags=re.MULTILINE)
    assert device.strip() == (
        "Measured on A Processor, 2 thread(s), micro, torch 2.13.0, transformers 5.23.0, peft 0.21.2, no TRL, "
        "2026-01-02, commit 0123456789 (a)."
    )
    assert peers.strip().splitlines()[2:] == [
        "| a | fast | strong | 1 s | 900 ms | 0.90 x |",
        "| a | b | only | 1 s | 3 s | 3.00 x |",
    ]
    assert len(every.strip().splitlines()) == 2 + len(rows)


def test_without_rows_the_page_says_so(tmp_path: Path) -> None:
    assert NONE in page(tmp_path / "none")
