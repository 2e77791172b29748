"""Rows without anything to learn: a federation that holds them trains as if they were not there, bit for bit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.base.errors import ConfigError, DataError
from fedsim.base.ranks import OneRank
from fedsim.config import load_config
from fedsim.data.chat import ChatFormat
from fedsim.data.square import SquareRow
from fedsim.federation.algorithms import ServerState, build_algorithm
from fedsim.federation.participation import sample_cohort
from fedsim.model.load import check_model_dir, load_chat
from fedsim.parallel.world import World
from fedsim.record.metrics import Row, decided, read_rows
from fedsim.report import finish
from fedsim.run.local_rows import check_local_rows, local_rows
from fedsim.run.resident import Resident, assemble
from fedsim.run.simulation import Simulation

SMALL = Path(__file__).parents[1] / "distributed" / "small.yaml"
BRIEF = ["guard.kind=none", "cai.iterations=0", "eval.every=0", "eval.limit=1", "eval.advbench=", "eval.mt_bench=",
         "eval.xstest=", "eval.helpful=", "eval.hhh=", "eval.guard_judge=none", "federation.num_rounds=2",
         "local.max_length=48"]  # fmt: skip
LONG = "Tell me about the red kite over the green hill near the lake. " * 6


def row(number: int, prompt: str = "", response: str = "It flies at the park.", weight: float = 1.0) -> SquareRow:
    text = prompt or f"Where does kite {number} fly?"
    return SquareRow(number, text, response, number % 2 == 0, ("objective",), "kites", weight)


def spoiled(shard: list[SquareRow]) -> list[SquareRow]:
    """The shard with one unusable row of every kind among its rows."""
    bad = [row(900, prompt=LONG), row(901, response=" \n"), row(902, weight=0.0)]
    return [bad[0], *shard[:1], bad[1], *shard[1:], bad[2]]


@pytest.fixture()
def assembled(tmp_path: Path) -> Callable[..., Resident]:
    """``assembled(shards, *overrides)``: the embedded model and clients that hold these rows."""

    def made(shards: list[list[SquareRow]], *overrides: str) -> Resident:
        config = load_config(SMALL, [*BRIEF, f"federation.num_clients={len(shards)}", *overrides])
        return assemble(config, World(OneRank(), torch.device("cpu"), exact=True), shards, tmp_path / "state")

    return made


def rounds(federation: Resident, count: int = 2) -> tuple[ServerState, list[Any]]:
    """The state after some rounds, and each round's reports."""
    state, reports = federation.start(0), []
    for round_idx in range(count):
        steps = federation.attendance(round_idx).steps
        work = federation.cohorts.train(steps, round_idx, state, [1e-4])
        result = federation.cohorts.reduce(work, state, [1e-4])
        state = federation.step(state, result.aggregated.sums)
        reports.append(result.aggregated.clients)
    return state, reports


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold", "fedadam", "centralised"])
def test_unusable_rows_change_no_bit(assembled: Callable[..., Resident], algorithm: str) -> None:
    """Two clients of 5 and 2 usable rows, and three unusable ones each: delta, loss, weight and mean are the same."""
    usable = [[row(i) for i in range(5)], [row(10), row(11, weight=0.5)]]
    words = [f"federation.algorithm={algorithm}", "federation.clients_per_round=2"]
    clean, mixed = assembled(usable, *words), assembled([spoiled(shard) for shard in usable], *words)
    assert mixed.rows.tally.dropped == {"no_targets": 2, "empty_reply": 2, "no_weight": 2}
    assert (clean.rows.tally.num_dropped, mixed.rows.tally.num_usable, mixed.rows.num_emptied) == (0, 7, 0)
    (wanted, reports), (found, again) = rounds(clean), rounds(mixed)
    assert all(torch.equal(vector, found.named()[name]) for name, vector in wanted.named().items())
    assert not torch.equal(found.adapter, clean.start(0).adapter)
    assert again == reports
    weights = {"centralised": [6.5], "fedadam": [1.0, 1.0]}.get(algorithm, [5.0, 1.5])
    assert [report.weight for report in again[0]] == weights


def test_a_mean_of_two_clients_weighs_usable_rows_alone(assembled: Callable[..., Resident]) -> None:
    """x + Σ n_i · delta_i / Σ n_i by hand, with n the usable rows: 5 and 2 of 8 and 5."""
    federation = assembled([spoiled([row(i) for i in range(5)]), spoiled([row(10), row(11)])],
                           "federation.clients_per_round=2")  # fmt: skip
    start, lane = federation.start(0), federation.cohorts.world.everyone()
    train = federation.cohorts.trainer.train
    outcomes = [train(client, federation.shards[client], 0, start, None, lane) for client in (0, 1)]
    mean = (5 * outcomes[0].delta.double() + 2 * outcomes[1].delta.double()) / 7
    state, (reports,) = rounds(federation, 1)
    torch.testing.assert_close(state.adapter.double(), start.adapter.double() + mean, rtol=0, atol=1e-7)
    assert [(r.num_rows, r.weight, r.loss) for r in reports] == [
        (5, 5.0, outcomes[0].loss),
        (2, 2.0, outcomes[1].loss),
    ]


def test_a_client_without_a_usable_row_sits_out(assembled: Callable[..., Resident]) -> None:
    federation = assembled([[row(0)], spoiled([]), []], "federation.clients_per_round=3")
    assert federation.rows.num_emptied == 1
    attendance = federation.attendance(0)
    assert (list(attendance.steps), list(attendance.sat_out)) == ([0], [1, 2])


def local(shards: list[list[SquareRow]], *overrides: str, check: bool = False) -> Any:
    """What :func:`local_rows` or its early check makes of these shards, with the embedded model's tokenizer."""
    config = load_config(SMALL, [*BRIEF, f"federation.num_clients={len(shards)}", *overrides])
    who = build_algorithm(config.federation, config.server_optimizer).participation(config.federation, config.seed)
    chat = load_chat(check_model_dir("embedded", "model.path"), "model.path")
    return (check_local_rows if check else local_rows)(config, who, chat, shards)


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize(
    ("shards", "words", "message"),
    [
        ([[row(0, prompt=LONG), row(1, prompt=LONG)], [row(2, response="")]], ["federation.clients_per_round=2"],
         r"local rows: none of the 3 can be trained on \(2 whose prompt fills local\.max_length=48, 1 with an empty "
         r"reply\); raise local\.max_length, give rows that have replies"),
        ([[row(0, weight=0.0)]], ["federation.clients_per_round=1"], r"1 of weight 0\); raise guard\.red_weight"),
        ([[row(0)], [row(1, prompt=LONG)]],
         ["federation.algorithm=local", "federation.local_client=1", "federation.clients_per_round=1"],
         r"no client trains in any of the 2 round\(s\): of 2 drawn 2 without usable rows .*local_client"),
        ([[row(0, prompt=LONG)], [row(1, response=" ")]],
         ["federation.algorithm=centralised", "federation.clients_per_round=1"],
         r"local rows: none of the 2 can be trained on"),
    ],
)  # fmt: skip
def test_nothing_to_learn_is_an_error(
    shards: list[list[SquareRow]], words: list[str], message: str, check: bool
) -> None:
    with pytest.raises(ConfigError, match=message):
        local(shards, *words, check=check)


def test_a_client_that_is_never_drawn_cannot_be_the_only_one(assembled: Callable[..., Resident]) -> None:
    """One of four clients has rows, and neither of the two rounds draws it."""
    shards = [[] for _ in range(4)]
    words = ["federation.clients_per_round=1", "seed=1"]
    found = local([[row(i)] for i in range(4)], *words)
    assert len(found.shards) == 4
    drawn = {sample_cohort(4, 1, round_idx, 1)[0] for round_idx in range(2)}
    never = next(client for client in range(4) if client not in drawn)
    shards[never] = [row(never)]
    message = r"no client trains in any of the 2 round\(s\): of 2 drawn 2 without usable rows"
    with pytest.raises(ConfigError, match=message):
        local(shards, *words)
    with pytest.raises(DataError, match="no client has rows left"):
        local([[] for _ in range(4)], *words, check=True)


Make = Callable[..., Simulation]


@pytest.fixture()
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """``make(*overrides, num_bad=6)``: a run on 30 rows, of which so many are unusable, without plots."""
    monkeypatch.setattr(finish, "write_plots", lambda *_: [])

    def made(*overrides: str, num_bad: int = 6) -> Simulation:
        entries = []
        for i in range(30):
            kind = i % 2 if i < num_bad else None
            entries.append(
                {
                    "question": "연?", "question_en": LONG + str(i) if kind == 0 else f"Where does kite {i} fly?",
                    "response": "빨강", "response_en": "" if kind == 1 else f"It flies at the park, {i}.",
                    "acceptable?": i % 2, "category": [], "question_category": "",
                }
            )  # fmt: skip
        path = tmp_path / "square.json"
        path.write_text(json.dumps(entries), encoding="utf-8")
        places = [f"data.square={path}", f"record.dir={tmp_path}", f"record.artefacts={tmp_path / 'artefacts'}"]
        sizes = ["data.federated_rows=30", "data.guard_rows=0", "data.cai_rows=0", "data.federated_red_share=0.5",
                 "federation.num_rounds=3", "federation.num_clients=6", "federation.clients_per_round=6"]  # fmt: skip
        config = load_config(SMALL, [*BRIEF, *places, *sizes, *overrides])
        return Simulation(config, World(OneRank(), torch.device("cpu"), exact=True))

    return made


def rows_of(simulation: Simulation, stage: str) -> list[Row]:
    return [found for found in read_rows(simulation.record.metrics_file) if found["stage"] == stage]


def test_a_run_counts_what_it_drops(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    simulation = make()
    simulation.run()
    (kept,) = rows_of(simulation, "filter")
    counted = {"num_kept_rows": 30, "num_usable_rows": 24, "num_dropped_no_targets": 3, "num_dropped_empty_reply": 3,
               "num_dropped_no_weight": 0, "num_cut_rows": 0}  # fmt: skip
    assert {name: kept[f"client/{name}"] for name in counted} == counted
    assert all(found["client/num_rows"] == 24 for found in rows_of(simulation, "round"))
    said = " ".join(capsys.readouterr().err.split())
    assert ("local rows: 6 of 30 dropped, 20 % (3 whose prompt fills local.max_length=48, 3 with an empty reply)"
            in said)  # fmt: skip
    summary = (simulation.record.folder / "summary.md").read_text(encoding="utf-8")
    why = "3 whose prompt fills local.max_length, 3 with an empty reply"
    assert f"| clients' rows, after the filter | {why} | 30 | 6 | 20.0 | 0 |" in summary


@pytest.mark.deep
def test_a_run_that_drops_rows_is_resumed_to_the_same_end(make: Make) -> None:
    straight = make("name=straight")
    straight.run()

    def stop(round_idx: int) -> None:
        if round_idx == 0:
            raise KeyboardInterrupt

    stopped = make("name=stopped")
    counts = stopped.record.counts
    stopped.record.counts = lambda round_idx: (counts(round_idx), stop(round_idx))  # type: ignore
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    again = make("name=stopped")
    again.run()
    adapters = [(run.record.folder / "adapter" / "adapter_model.safetensors").read_bytes() for run in (again, straight)]
    assert adapters[0] == adapters[1]
    assert [decided(found) for found in rows_of(again, "round")] == [decided(r) for r in rows_of(straight, "round")]


@pytest.mark.parametrize("start", ["run", "check"])
def test_rows_that_are_all_unusable_end_a_run_before_its_first_stage(make: Make, start: str) -> None:
    """Before the guard's hour: nothing is filtered, no model is loaded, no manifest is written."""
    simulation = make("guard.kind=oracle", num_bad=30)
    phases: list[str] = []
    phase = simulation.record.phase
    simulation.record.phase = lambda name, *rest: (phases.append(name), phase(name, *rest))[1]  # type: ignore
    with pytest.raises(ConfigError, match=r"local rows: none of the 30 .*15 whose prompt fills local\.max_length=48"):
        getattr(simulation, start)()
    assert phases == ["data"] and not (simulation.record.folder / "manifest.json").exists()


def test_a_filter_that_leaves_only_unusable_rows_is_an_error(make: Make) -> None:
    """The first 30 rows' red half is whole, the other half has no targets; the oracle drops the red ones."""
    simulation = make("guard.kind=oracle", num_bad=0)
    prepare = simulation.preparation
    read = prepare.read

    def spoil() -> Any:
        inputs = read()
        shards = [
            [dataclasses.replace(r, response="") if not r.red else r for r in shard] for shard in inputs.data.shards
        ]
        return dataclasses.replace(inputs, data=dataclasses.replace(inputs.data, shards=shards))

    prepare.read = spoil  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"local rows: none of the 15 can be trained on \(15 with an empty reply\)"):
        simulation.run()


def test_a_guard_set_without_replies_is_refused_at_the_check(make: Make, tmp_path: Path) -> None:
    sizes = ["data.federated_rows=20", "data.guard_rows=10", "data.guard_red_share=0.5", "guard.kind=llama_guard"]
    simulation = make(*sizes, num_bad=0)
    path = tmp_path / "square.json"
    entries = json.loads(path.read_text(encoding="utf-8"))
    blank = {row.row_id for row in simulation.preparation.read().data.guard_rows}
    for i in blank:
        entries[i]["response_en"] = " "
    path.write_text(json.dumps(entries), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"guard rows: none of the 10 can be trained on \(10 with an empty reply\)"):
        make_again(simulation).check()


def make_again(simulation: Simulation) -> Simulation:
    """The same run in another object."""
    return Simulation(simulation.config, simulation.world)


def test_prompts_that_fill_cais_rows_are_refused_at_the_check(make: Make) -> None:
    words = ["data.federated_rows=20", "data.cai_rows=10", "data.cai_red_share=0.5", "cai.iterations=1",
             "cai.max_length=16"]  # fmt: skip
    with pytest.raises(ConfigError, match=r"CAI rows: none of the 10 .*10 whose prompt fills cai\.max_length=16"):
        make(*words, num_bad=0).check()


def test_learning_that_moves_no_bit_is_an_error(make: Make) -> None:
    """AdamW's step of 1e-50 rounds to nothing in fp32."""
    with pytest.raises(Exception, match=r"bit for bit the one before the first of 3 round\(s\).*raise local\.lr"):
        make("local.lr=1e-50", "local.lr_min=0").run()


def test_a_run_says_how_its_clients_rows_were_joined(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clients' rows are the same on every rank; an evaluation's are shared out, and must not be counted."""
    plain = ChatFormat.continuation

    def joined(chat: ChatFormat, prompt: Any, whole: str) -> tuple[np.ndarray, np.ndarray]:
        before, behind = plain(chat, prompt, whole)
        return before[:-1], np.concatenate([before[-1:], behind])

    monkeypatch.setattr(ChatFormat, "continuation", joined)
    simulation = make(num_bad=0)
    said: list[str] = []
    simulation.record.say = said.append  # type: ignore[method-assign, assignment]
    filtered: Any = SimpleNamespace(shards=simulation.preparation.read().data.shards)
    federation = simulation._assemble(filtered)
    assert federation.rows.tally.num_rows == 30 and [text for text in said if text.startswith("30 row(s)")]
