"""Runs in which clients fail, drop out or are slow: what the round computes, what is counted, and when a run ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedsim.base.errors import ConfigError, RunError
from fedsim.base.journal import in_words
from fedsim.base.ranks import OneRank
from fedsim.config import load_config
from fedsim.federation.algorithms import ADAPTER
from fedsim.federation.attendance import bernoulli, straggler_steps
from fedsim.federation.failures import ClientFailure
from fedsim.federation.participation import sample_cohort
from fedsim.federation.scaffold import CONTROL
from fedsim.parallel.world import World
from fedsim.record.metrics import Row, read_rows
from fedsim.report import finish
from fedsim.run import cohort as cohort_module
from fedsim.run.cohort import agreed_checksums
from fedsim.run.simulation import Simulation

SMALL = Path(__file__).parent / "distributed" / "small.yaml"
BRIEF = ["guard.kind=none", "cai.iterations=0", "eval.every=0", "eval.limit=1", "eval.advbench=", "eval.mt_bench=",
         "eval.xstest=", "eval.helpful=", "eval.guard_judge=none", "federation.num_rounds=2"]  # fmt: skip
SKIP = "failures.on_client_error=skip"
SCAFFOLD = "federation.algorithm=scaffold"
RAISES, IS_NAN = 2, 4


def spoil(shards: list[list[Any]]) -> None:
    """Make client 2's training raise (a token that the model does not have) and client 4's loss NaN."""
    row = shards[RAISES][0]
    shards[RAISES][0] = dataclasses.replace(row, input_ids=np.full_like(row.input_ids, 10**6))
    shards[IS_NAN][0] = dataclasses.replace(shards[IS_NAN][0], weight=float("nan"))


@dataclasses.dataclass
class Run:
    """A simulation, and what it had in hand."""

    simulation: Simulation
    federation: Any
    said: list[str]

    def rounds(self) -> list[Row]:
        rows = read_rows(self.simulation.record.metrics_file)
        return [row for row in rows if row["stage"] == "round"]

    def state(self) -> Any:
        checkpoint = self.simulation.record.checkpoints.load(lambda text: None)
        assert checkpoint is not None
        return checkpoint


Make = Callable[..., Run]


@pytest.fixture()
def run(square_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """``run(*overrides, change=spoil, after=..., fails=False)``: a brief run whose shards ``change`` has changed."""
    monkeypatch.setattr(finish, "write_plots", lambda *_: [])
    places = [f"data.square={square_file}", f"record.dir={tmp_path}", f"record.artefacts={tmp_path / 'artefacts'}"]

    def made(
        *overrides: str,
        change: Callable[[list[list[Any]]], object] = spoil,
        after: Callable[[Any, int], object] = lambda federation, round_idx: None,
        fails: bool = False,
    ) -> Run:
        config = load_config(SMALL, [*BRIEF, *places, *overrides])
        simulation = Simulation(config, World(OneRank(), torch.device("cpu"), exact=True))
        found = Run(simulation, None, [])
        assembled, one_round = simulation._assemble, simulation._round

        def assemble(*arguments: Any) -> Any:
            found.federation = assembled(*arguments)
            change(found.federation.shards)
            return found.federation

        def round_then(federation: Any, round_idx: int, *rest: Any) -> Any:
            checkpoint = one_round(federation, round_idx, *rest)
            after(federation, round_idx)
            return checkpoint

        simulation._assemble = assemble  # type: ignore[method-assign]
        simulation._round = round_then  # type: ignore[method-assign]
        monkeypatch.setattr(simulation.record, "say", found.said.append)
        with pytest.raises(RunError) if fails else nullcontext():
            simulation.run()
        return found

    return made


def test_skip_leaves_failed_clients_out_of_every_sum(run: Make) -> None:
    """SCAFFOLD by hand from the survivors: x + Σ w δ / Σ w, c + Σ (c_i⁺ − c_i) / N, and no c_i for the others."""
    done = run(SKIP, SCAFFOLD)
    federation, lane, folder = done.federation, done.simulation.world.everyone(), done.simulation.record.client_state
    trainer, state = federation.cohorts.trainer, federation.start(0)
    x, c, controls = state.adapter.double(), torch.zeros_like(state.adapter).double(), {}
    for round_idx, row in enumerate(done.rounds()):
        cohort = sample_cohort(6, 5, round_idx, 0)
        good = [client for client in cohort if client not in (RAISES, IS_NAN)]
        assert 3 <= len(good) < 5
        start = dataclasses.replace(state, adapter=x.float(), vectors={CONTROL: c.float()})
        outcomes = [
            trainer.train(k, federation.shards[k], round_idx, start, controls.get(k), lane) for k in good
        ]  # fmt: skip
        total = sum(o.weight for o in outcomes)
        x = x + sum(o.weight * o.delta.double() for o in outcomes) / total
        c = c + sum(o.control_delta.double() for o in outcomes) / 6
        controls |= {o.client: o.control for o in outcomes}
        reasons = {RAISES: "raised", IS_NAN: "not finite"}
        failed = {f"client/failed_{k:03d}": reasons[k] for k in cohort if k in reasons}
        assert {n: v for n, v in row.items() if n.startswith("client/failed_")} == failed
        assert (row["client/num_trained"], row["client/num_failed"]) == (len(good), len(failed))
        assert row["client/num_failed_raised"] == (RAISES in cohort) and row["client/num_failed_norm"] == 0
        assert row["client/num_failed_not_finite"] == (IS_NAN in cohort)
        tokens = sum(o.num_tokens for o in outcomes)
        assert (row["client/num_tokens"], row["perf/tokens"]) == (tokens, tokens - len(good) * 3 * 7)
        assert {int(n[-3:]) for n in row if n.startswith("client/loss_")} == set(good)
    last = done.state()
    assert set(last.client_rounds) == set(controls)
    torch.testing.assert_close(last.state.adapter.double(), x, rtol=0, atol=1e-6)
    torch.testing.assert_close(last.state.vectors[CONTROL].double(), c, rtol=1e-4, atol=1e-3 * float(c.abs().max()))
    for client, round_idx in last.client_rounds.items():
        file = load_file(folder / f"client{client:06d}-round{round_idx + 1:06d}.safetensors")
        torch.testing.assert_close(file["control"], controls[client], rtol=1e-3, atol=1e-4)
    assert not [p for k in (RAISES, IS_NAN) for p in folder.glob(f"client{k:06d}-*")]
    said = [line for line in done.said if " failed (" in line]
    assert any(line.startswith("client 2 failed (raised) on rank 0: IndexError") for line in said)
    assert any("client 4 failed (not finite) on rank 0: client 4, round" in line for line in said)
    summary = (done.simulation.record.folder / "summary.md").read_text(encoding="utf-8")
    rounds = ", ".join(str(i + 1) for i in range(2) if RAISES in sample_cohort(6, 5, i, 0))
    assert f"| {RAISES} | raised | {rounds} |" in summary


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"^client 2 failed \(raised\): IndexError.* \(1 more client\(s\) failed\); set "
             r"failures\.on_client_error=skip"),
        ([SKIP, "failures.min_clients=5"], r"^client 2 .*; 3 client\(s\) delivered an update, fewer than "
                                           r"failures\.min_clients=5"),
    ],
)  # fmt: skip
def test_a_run_ends_with_the_cause_and_the_round_does_not_count(
    run: Make, tmp_path: Path, overrides: list[str], message: str
) -> None:
    assert {RAISES, IS_NAN} <= set(sample_cohort(6, 5, 0, 0))
    with pytest.raises(RunError, match=message) as caught:
        run(SCAFFOLD, *overrides)
    assert in_words(caught.value.place) == "rank 0, local training, round 1, client 2"
    assert not (tmp_path / "small" / "checkpoints").exists()


def test_an_update_beyond_the_bound_is_left_out(run: Make) -> None:
    """The bound lies between the norms of a round's updates: those above it fail, the others make the mean."""
    plain = run("federation.num_rounds=1", "name=plain", change=len)
    federation, lane = plain.federation, plain.simulation.world.everyone()
    start, cohort = federation.start(0), sample_cohort(6, 5, 0, 0)
    train = federation.cohorts.trainer.train
    deltas = {k: train(k, federation.shards[k], 0, start, None, lane).delta.double() for k in cohort}
    norms = {k: float(delta.norm()) for k, delta in deltas.items()}
    low, high = sorted(norms.values())[2:4]
    bound = (low + high) / 2
    done = run(SKIP, "federation.num_rounds=1", f"failures.max_update_norm={bound}", change=len)
    (row,) = done.rounds()
    over = {k for k in cohort if norms[k] > bound}
    assert {int(n[-3:]) for n, v in row.items() if n.startswith("client/failed_") and v == "norm"} == over
    assert len(over) == 2 == row["client/num_failed_norm"]
    rows = {k: len(federation.shards[k]) for k in cohort if k not in over}
    mean = sum(n * deltas[k] for k, n in rows.items()) / sum(rows.values())
    torch.testing.assert_close(done.state().state.adapter.double(), start.adapter.double() + mean, rtol=0, atol=1e-7)


def test_a_damaged_control_variate_is_its_clients_failure_and_stays(run: Make) -> None:
    """Its file is torn after the first round: the client fails in the second, and its newest c_i is the first's."""
    both = sorted(set(sample_cohort(6, 5, 0, 0)) & set(sample_cohort(6, 5, 1, 0)))
    victim = both[0]

    def tear(federation: Any, round_idx: int) -> None:
        if round_idx == 0:
            path = federation.controls.folder / f"client{victim:06d}-round000001.safetensors"
            path.write_bytes(path.read_bytes()[:100])

    done = run(SKIP, SCAFFOLD, change=len, after=tear)
    first, second = done.rounds()
    assert first["client/num_failed"] == 0 and second["client/num_failed"] == 1
    assert second[f"client/failed_{victim:03d}"] == "raised"
    assert any("control variate of client" in line and line.startswith(f"client {victim} ") for line in done.said)
    rounds = done.federation.controls.index
    assert rounds[victim] == 0 and all(rounds[k] == 1 for k in sample_cohort(6, 5, 1, 0) if k != victim)


def test_what_another_member_saw_counts_here_too(run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A member that fails after the last step: this rank holds the client's outcome, and must not use it."""

    def spoil_first(shards: list[list[Any]]) -> None:
        shards[0] = [dataclasses.replace(row, weight=float("inf")) for row in shards[0]]

    alone = run(SKIP, SCAFFOLD, "federation.num_rounds=1", "name=alone", change=spoil_first)
    gather = OneRank.gather
    seen = ClientFailure(0, "not finite", 0, "seen by another member")

    def told(ranks: Any, value: Any) -> list[Any]:
        return [*gather(ranks, value), *([([seen], {})] if value == ([], {}) else [])]

    monkeypatch.setattr(OneRank, "gather", told)
    done = run(SKIP, SCAFFOLD, "federation.num_rounds=1", change=len)
    (row,), (want,) = done.rounds(), alone.rounds()
    assert row["client/num_trained"] == 4 and row["client/failed_000"] == "not finite"
    assert {n: v for n, v in row.items() if n.startswith(("client/", "global/"))} == {
        n: v for n, v in want.items() if n.startswith(("client/", "global/"))
    }
    assert not list(done.simulation.record.client_state.glob("client000000-*"))


@pytest.mark.parametrize("policy", ["partial", "drop"])
def test_drop_outs_and_stragglers_are_counted_as_they_were_drawn(
    run: Make, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: dict[int, Any] = {}
    plan_round = cohort_module.plan_round
    monkeypatch.setattr(
        cohort_module,
        "plan_round",
        lambda tokens, *rest, **named: (planned.update({len(planned): tokens}), plan_round(tokens, *rest, **named))[1],
    )
    overrides = ["failures.dropout_rate=0.3", "failures.straggler_rate=0.5", f"failures.stragglers={policy}"]
    done = run(*overrides, "federation.num_rounds=4", change=len)
    total, plans = 0, iter(planned.values())
    for round_idx, row in enumerate(done.rounds()):
        cohort = sample_cohort(6, 5, round_idx, 0)
        here = [k for k in cohort if not bernoulli(0.3, 0, "drop out", round_idx, k)]
        slow = {k: straggler_steps(3, round_idx, k, 0) for k in here if bernoulli(0.5, 0, "straggle", round_idx, k)}
        trained = {k: slow.get(k, 3) for k in here if policy == "partial" or k not in slow}
        assert row["client/num_dropped_out"] == 5 - len(here) and row["client/num_stragglers"] == len(slow)
        assert {n: v for n, v in row.items() if "/steps_" in n} == {f"client/steps_{k:03d}": v for k, v in slow.items()}
        assert row["client/num_trained"] == len(trained)
        trainer, shards = done.federation.cohorts.trainer, done.federation.shards
        work = {k: trainer.num_tokens(k, shards[k], round_idx, steps) for k, steps in trained.items()}
        tokens = sum(work.values())
        if trained:
            assert next(plans) == work
            inputs = tokens - 7 * sum(trained.values())  # a row's last token is only a target
            assert (row["client/num_tokens"], row["perf/tokens"]) == (tokens, inputs)
            assert row["client/num_rows"] == sum(len(shards[k]) for k in trained), "partial updates count in full"
        total += len(slow)
    summary = (done.simulation.record.folder / "summary.md").read_text(encoding="utf-8")
    assert total > 2 and f"- simulated stragglers: {total} over all rounds" in summary


@pytest.mark.parametrize("why", ["drop outs", "failures"])
def test_a_round_without_any_update_says_so_and_changes_nothing(run: Make, why: str) -> None:
    def all_nan(shards: list[list[Any]]) -> None:
        shards[:] = [[dataclasses.replace(r, weight=float("inf")) for r in rows] for rows in shards]

    words = [SKIP, SCAFFOLD, "failures.min_clients=0"] if why == "failures" else [SCAFFOLD, "failures.dropout_rate=0.9"]
    done = run(*words, "federation.num_rounds=3", change=all_nan if why == "failures" else len, fails=why == "failures")
    rounds = done.rounds()
    idle = [row for row in rounds if row["client/num_trained"] == 0]
    assert len(idle) == (3 if why == "failures" else 2)
    assert all("client/loss" not in row for row in idle)
    assert done.said.count("no client delivered an update: the global adapter stays as it is") == len(idle)
    start = done.federation.start(0)
    before = [agreed_checksums(start, OneRank())[ADAPTER], *(row["global/checksum"] for row in rounds)]
    for row, earlier in zip(rounds, before, strict=False):
        assert (row["global/checksum"] == earlier) == (row in idle)
    state = done.state().state
    assert state.num_steps == 3 - len(idle)
    if why == "failures":
        assert torch.equal(state.adapter, start.adapter)
        assert not state.vectors[CONTROL].any() and not list(done.federation.controls.folder.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["failures.dropout_rate=0.999999"],
         r"no client trains in any of the 2 round.*: of 10 drawn 10 dropped out \(failures\.dropout_rate=0\.999999\)"),
        (["failures.straggler_rate=1", "failures.stragglers=drop"],
         r"of 10 drawn 10 left out as stragglers \(failures\.straggler_rate=1, stragglers=drop\)"),
    ],
)  # fmt: skip
def test_a_run_in_which_no_client_can_ever_train_is_refused(run: Make, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(*words, change=len)


def test_a_run_whose_clients_all_failed_does_not_finish(run: Make) -> None:
    """It would report the pretrained model's figures as a trained model's; resumed, it says the same again."""

    def all_nan(shards: list[list[Any]]) -> None:
        shards[:] = [[dataclasses.replace(r, weight=float("nan")) for r in rows] for rows in shards]

    for _ in range(2):
        with pytest.raises(RunError, match=r"no client delivered an update in any of the 2 round\(s\)"):
            run(SKIP, "failures.min_clients=0", change=all_nan)
