"""The soak: its rule on made-up series, a real run that is flat until a leak is planted, and mistakes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fedsim.base.errors import RunError
from fedsim.study.bench_rows import Percentiles, Row, StageResult
from tools import client_scale, running, soak
from tools.growth import DISK, FILES, FLAT, GROWS, HANDLES, MEMORY, UNDECIDED, judge
from tools.watching import Sample, kind_of, watch

MIB = 2**20
LEAK_FROM = 12
LEAKY = f"""
import os, runpy, sys
from fedsim.record.checkpoint import CheckpointStore
from fedsim.federation.client_state import ClientStateStore
held, save, drop = [], CheckpointStore.save, ClientStateStore.drop_unused
def leaking_save(self, checkpoint):
    if checkpoint.round_idx + 1 >= {LEAK_FROM}:
        held.append(open(os.devnull))
    save(self, checkpoint)
def leaking_drop(self, indices):
    if len(held) == 0:
        drop(self, indices)
CheckpointStore.save, ClientStateStore.drop_unused = leaking_save, leaking_drop
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def samples(rounds: int, **each: float) -> list[Sample]:
    """Two looks at each round, the second a little higher; ``each`` is what a round adds."""
    grown = {name: each.get(name, 0.0) for name in ("resident", "handles", "files", "kept", "logs")}
    found = []
    for r in range(1, rounds + 1):
        for more in (0, 1):
            resident = {"rank 0": int(400 * MIB + r * grown["resident"] + more * MIB), "W&B's worker": 100 * MIB}
            handles = {"rank 0": int(6 + r * grown["handles"]) + more}
            files, kept = int(20 + r * grown["files"]) + more, int(10_000 + r * grown["kept"]) + 100 * more
            found.append(Sample(r, resident, handles, files, kept, int(r * grown["logs"]), 7 * r))
    return found


def verdicts(found: list[Sample], warm_up: int = 5) -> dict[str, str]:
    return {f"{g.quantity} {g.owner}".strip(): g.verdict for g in judge(found, 1, warm_up).growths}


def test_a_run_that_holds_what_it_held_is_flat_whatever_its_transients() -> None:
    seen = judge(samples(60, logs=500.0), 1, 5)
    assert {g.verdict for g in seen.growths} == {FLAT}
    assert (seen.rounds, seen.log_bytes, seen.evaluation_bytes) == (54, 500.0, 7.0)
    assert seen.worst(MEMORY).level in (100 * MIB, 400 * MIB)


@pytest.mark.parametrize(
    ("leak", "named"),
    [
        ({"resident": 0.02 * MIB}, f"{MEMORY} rank 0"),
        ({"handles": 0.1}, f"{HANDLES} rank 0"),
        ({"files": 0.1}, FILES),
        ({"kept": 1000.0}, DISK),
    ],
)
def test_a_leak_is_found_and_named(leak: dict[str, float], named: str) -> None:
    found = verdicts(samples(120, **leak))
    assert found.pop(named) == GROWS and set(found.values()) == {FLAT}


def test_what_cannot_be_told_is_not_called_flat() -> None:
    """Memory that jumps by 8 MiB from one half of the run to the other, and back: wide intervals."""
    jumps = [
        replace(s, resident={"rank 0": 400 * MIB + (8 * MIB if ((s.number - 1) // 12) % 3 == 1 else 0)})
        for s in samples(60)
    ]
    assert verdicts(jumps)[f"{MEMORY} rank 0"] == UNDECIDED
    with pytest.raises(RunError, match=r"^2 round\(s\) .* warm-up of 5: a growth needs three"):
        judge(samples(8), 1, 5)


def test_the_warm_up_and_the_last_round_do_not_count() -> None:
    made = {**dict.fromkeys(range(1, 6), -19), 30: 90}
    loaded = [replace(s, files=s.files + made.get(s.number, 0)) for s in samples(30)]
    assert verdicts(loaded)[FILES] == FLAT
    assert verdicts(loaded, warm_up=0)[FILES] != FLAT
    assert verdicts([*loaded, *(replace(s, number=31) for s in samples(1))])[FILES] != FLAT


def test_files_that_grow_on_purpose_are_known_and_all_others_are_judged() -> None:
    kinds = {name: kind_of(Path(name)) for name in (
        "metrics.jsonl", "wandb/offline-run-1/run-1.wandb", "logs/rank-0.jsonl", "items/a.csv", "answers/b.jsonl",
        "checkpoints/round-000001/state.safetensors", "client_state/client000001-round000001.safetensors", "new.bin",
    )}  # fmt: skip
    assert [*kinds.values()] == ["logs", "logs", "logs", "evaluations", "evaluations", "", "", ""]


@pytest.mark.deep
def test_a_real_run_is_flat_until_a_leak_is_planted(tmp_path: Path) -> None:
    """Twelve rounds through launch/run.py's own code, then ten in which checkpoints and descriptors stay behind."""
    leaky = tmp_path / "leaky.py"
    leaky.write_text(LEAKY)
    brief = ["federation.num_rounds=22", "local.steps=1", "cai.max_new_tokens=32", "eval.every=0", "eval.advbench=",
             "eval.hhh=", "eval.mt_bench=", "eval.xstest=", "eval.helpful=", "wandb.mode=off"]  # fmt: skip
    places = [f"record.dir={tmp_path}", f"record.artefacts={tmp_path / 'artefacts'}"]
    command = running.command(1, running.run_words([], [*soak.SMALL, *brief, *places]))
    heard: list[int] = []
    with (tmp_path / "log").open("wb") as log:
        status, seen = watch(
            [command[0], str(leaky), *command[1:]], tmp_path / "soak", log, environment=running.environment(),
            limit_s=300.0, interval_s=0.01, say=heard.append,
        )  # fmt: skip
    assert status == 0, (tmp_path / "log").read_text()[-2000:]
    assert heard == list(range(1, 23)) and {name for s in seen for name in s.resident} == {"rank 0"}
    healthy = judge([s for s in seen if s.number <= LEAK_FROM], 1, 3)
    for quantity in (HANDLES, FILES, DISK):
        assert healthy.worst(quantity).verdict == FLAT, healthy.worst(quantity)
    leaking = judge([s for s in seen if s.number >= LEAK_FROM], 1, 0)
    assert {leaking.worst(quantity).verdict for quantity in (HANDLES, FILES, DISK)} == {GROWS}
    assert leaking.worst(HANDLES).slope.value == pytest.approx(100, rel=0.2), "one descriptor a round"


def test_a_run_that_fails_or_hangs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = running.run_words([], soak.SMALL)
    for script, limit_s, said in (
        ("import sys; sys.exit('no luck')", 30.0, r"run of 1 process\(es\) ended with status 1: no luck"),
        ("import time; time.sleep(60)", 0.3, "took longer than --limit-s 0.3"),
    ):
        monkeypatch.setattr(running, "command", lambda count, words, script=script: [sys.executable, "-c", script])
        with pytest.raises(RunError, match=said):
            soak.soak(1, words, tmp_path, 5, limit_s)


def test_rows_table_and_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [replace(judge(samples(60, **leak), count, 5), num_ranks=count)
             for count, leak in ((1, {}), (4, {"files": 1.0}))]  # fmt: skip
    rows = [row for each in found for row in soak.rows_of(each)]
    lines = soak.table(rows).markdown().splitlines()
    assert lines[0] == "| growth in 100 rounds [95 %] | 1 process(es) | 4 process(es) |"
    assert "| resident memory of a rank (limit 1.00 MiB) | 400 MiB, +0.00 [0.00, 0.00], flat |" in lines[2]
    assert any("files in the run directory (limit 1)" in line and "+100.00 [100.00, 100.00], grows" in line
               for line in lines)  # fmt: skip
    assert not any("launcher" in line for line in lines), "what was not there has no line"
    facts = running.facts()
    figures = {"save_s": 0.003, "check_s": 1.0, "clear_s": 0.002, "read_peak_bytes": 0.0, "check_peak_bytes": 2.0**20}
    state = Row(client_scale.NAME, "x", "float32", {"clients": 1000, "numbers": 256}, Percentiles(1e-3, 1e-3, 1e-3),
                figures=figures)  # fmt: skip
    monkeypatch.setattr(running.newest_rows, "__defaults__", (tmp_path,))
    for name, these in ((soak.NAME, rows), (client_scale.NAME, [state])):
        StageResult(name, facts, [], these).write(tmp_path / "a-cpu" / running.FOLDER / f"{name}.json")
    text = soak.page()
    assert "over 54 rounds" in text and "1,000 clients, 256 numbers (1.00 KiB)" in text
    assert text.count("Measured on 20") == 2 and "grew by 1.00 MiB at most" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nproc", "0"], "--nproc 0: must be numbers >= 1"),
        (["a.yaml", "b.yaml"], "one config file at most"),
        (["local.steps=0"], "local.steps"),
        (["--warm-up", "x"], "--warm-up"),
    ],
)
def test_mistakes_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["soak.py", *arguments])
    assert soak.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
