"""The round loop on one process: what a round computes, clients without rows, and runs that cannot go on."""

from __future__ import annotations

import gc
import itertools
import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim.base.errors import CheckpointError, ConfigError, DataError, FedsimError, RunError
from fedsim.base.ranks import OneRank
from fedsim.config import load_config
from fedsim.federation.algorithms import ServerState
from fedsim.federation.participation import sample_cohort
from fedsim.parallel.world import World
from fedsim.record.metrics import Row, decided, read_rows
from fedsim.report import finish
from fedsim.run.simulation import Simulation
from fedsim.world import square_rows

SMALL = Path(__file__).parents[1] / "distributed" / "small.yaml"
BRIEF = ["guard.kind=none", "cai.iterations=0", "eval.every=0", "eval.limit=1", "eval.advbench=", "eval.mt_bench=",
         "eval.xstest=", "eval.helpful=", "eval.guard_judge=none", "local.steps=2", "local.batch_size=4"]  # fmt: skip
Make = Callable[..., Simulation]


@pytest.fixture()
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """``make(num_red, num_acceptable, *overrides)``: a brief run on a SQuARe file of so many rows, without plots."""
    monkeypatch.setattr(finish, "write_plots", lambda *_: [])

    def made(num_red: int, num_acceptable: int, *overrides: str) -> Simulation:
        rows = square_rows()
        red = [row for row in rows if row["acceptable?"] == 0][:num_red]
        acceptable = [row for row in rows if row["acceptable?"] == 1][:num_acceptable]
        path = tmp_path / "square.json"
        path.write_text(json.dumps(red + acceptable), encoding="utf-8")
        places = [f"data.square={path}", f"record.dir={tmp_path}", f"record.artefacts={tmp_path / 'artefacts'}"]
        config = load_config(SMALL, [*BRIEF, *places, *overrides])
        return Simulation(config, World(OneRank(), torch.device("cpu"), exact=True))

    return made


def rows_of(simulation: Simulation, stage: str) -> list[Row]:
    """The metric rows of a stage."""
    return [row for row in read_rows(simulation.record.metrics_file) if row["stage"] == stage]


def final_state(simulation: Simulation) -> ServerState:
    """The server's state in the last checkpoint."""
    checkpoint = simulation.record.checkpoints.load(lambda text: None)
    assert checkpoint is not None
    return checkpoint.state


def final_adapter(simulation: Simulation) -> torch.Tensor:
    """The adapter of the last checkpoint."""
    return final_state(simulation).adapter


def watched(simulation: Simulation) -> list[Any]:
    """A list that will hold the federation once the run has assembled it."""
    found: list[Any] = []
    assembled = simulation._assemble

    def assemble(*arguments: Any) -> Any:
        found.append(assembled(*arguments))
        return found[0]

    simulation._assemble = assemble  # type: ignore[method-assign]
    return found


# One row a client, so that a red row is a client whose rows are all filtered.
ONE_ROW_EACH = ["data.federated_rows=6", "data.guard_rows=0", "data.cai_rows=0", "guard.kind=oracle",
                "federation.clients_per_round=6", "federation.num_rounds=2"]  # fmt: skip


def test_a_client_without_rows_sits_out_and_is_counted(make: Make) -> None:
    simulation = make(2, 4, *ONE_ROW_EACH, f"data.federated_red_share={1 / 3}")
    simulation.run()
    (kept,) = rows_of(simulation, "filter")
    assert kept["client/num_kept_rows"] == 4
    assert kept["guard/num_empty_clients"] == 2
    assert kept["guard/recall"] == kept["guard/precision"] == 100.0
    rounds = rows_of(simulation, "round")
    assert len(rounds) == 2
    for row in rounds:
        assert (row["client/num_trained"], row["client/num_sat_out"]) == (4, 2)
        assert row["client/num_rows"] == 4
        assert sum(name.startswith("client/loss_") for name in row) == 4
    assert (simulation.record.folder / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold", "fedadam"])
def test_a_round_without_any_client_leaves_everything_as_it_is(make: Make, algorithm: str) -> None:
    """One client of six has a row, and one a round is drawn: the other rounds change no vector."""
    overrides = [f"data.federated_red_share={5 / 6}", f"federation.algorithm={algorithm}"]
    one = ["federation.clients_per_round=1", "federation.num_rounds=8"]
    simulation = make(5, 1, *ONE_ROW_EACH, *overrides, *one)
    simulation.run()
    rows = rows_of(simulation, "round")
    assert {row["client/num_trained"] for row in rows[1:]} == {0, 1}
    for before, after in itertools.pairwise(rows):
        sums = [{n: v for n, v in row.items() if n.endswith("checksum")} for row in (before, after)]
        assert (sums[0] == sums[1]) == (after["client/num_trained"] == 0)


def test_a_federation_that_can_never_train_is_an_error(make: Make) -> None:
    with pytest.raises(DataError, match=r"no client has rows left to train on after the filter; weaken or drop"):
        make(6, 0, *ONE_ROW_EACH, "data.federated_red_share=1.0").run()


def test_a_resumed_session_keeps_its_preparation_out_of_the_rounds(make: Make) -> None:
    overrides = ["guard.kind=noisy_oracle", "federation.num_rounds=2", "record.keep_checkpoints=2"]
    make(40, 60, *overrides).run()
    again = make(40, 60, *overrides)
    shutil.rmtree(again.record.checkpoints.folder / "round-000002")
    again.run()
    (prepared,), (resumed,) = rows_of(again, "prepare"), rows_of(again, "resume")
    assert prepared["round"] == 0 and resumed["round"] == 1
    once = {"time/data_s", "time/filter_s", "time/load_s"}
    assert once <= prepared.keys() and once <= resumed.keys()
    assert all(not once & row.keys() for row in rows_of(again, "round"))


def test_a_round_is_the_row_weighted_mean_of_its_clients(make: Make) -> None:
    """FedAvg by hand: each client of the cohort trained alone from the start, then x + Σ n_i · delta_i / Σ n_i."""
    simulation = make(40, 60, "guard.kind=noisy_oracle", "federation.num_rounds=1")
    found = watched(simulation)
    simulation.run()
    federation = found[0]
    (row,) = rows_of(simulation, "round")
    cohort = sorted(int(name.rpartition("_")[2]) for name in row if name.startswith("client/loss_"))
    assert len(cohort) == 5
    assert len({len(federation.shards[c]) for c in cohort}) > 1  # the weights differ
    start = federation.start(simulation.config.seed)
    lane = simulation.world.everyone()
    outcomes = [federation.cohorts.trainer.train(c, federation.shards[c], 0, start, None, lane) for c in cohort]
    weights = [float(len(federation.shards[c])) for c in cohort]
    mean = sum(w * o.delta.double() for w, o in zip(weights, outcomes, strict=True)) / sum(weights)
    assert float(mean.norm()) > 0.1
    torch.testing.assert_close(final_adapter(simulation).double(), start.adapter.double() + mean, rtol=0, atol=1e-7)
    by_hand = sum(w * o.loss for w, o in zip(weights, outcomes, strict=True)) / sum(weights)
    assert row["client/loss"] == pytest.approx(by_hand, rel=1e-12)


ONE_CLIENT = ["federation.num_clients=1", "federation.clients_per_round=1", "federation.num_rounds=2"]


def test_a_federation_of_one_client_is_local_and_centralised_training(make: Make, tmp_path: Path) -> None:
    """FedAvg with a cohort of one, that client alone, and its rows in one place: one and the same, bit for bit."""
    adapters, rows = [], []
    for algorithm in ("fedavg", "local", "centralised"):
        simulation = make(40, 60, *ONE_CLIENT, f"federation.algorithm={algorithm}", f"name={algorithm}")
        simulation.run()
        adapters.append(final_adapter(simulation))
        rows.append([decided(row) for row in rows_of(simulation, "round")])
    assert torch.equal(adapters[0], adapters[1]) and torch.equal(adapters[0], adapters[2])
    assert rows[0] == rows[1] == rows[2] and len(rows[0]) == 2
    assert rows[0][0]["client/num_trained"] == 1 and rows[0][0]["client/num_rows"] == 60


def test_local_training_is_one_clients_own(make: Make) -> None:
    """Only the client trains, in every round on from where it stood; the server takes its adapter."""
    simulation = make(40, 60, "federation.algorithm=local", "federation.local_client=4", "federation.num_rounds=2")
    found = watched(simulation)
    simulation.run()
    federation = found[0]
    state, lane = federation.start(simulation.config.seed), simulation.world.everyone()
    rows = rows_of(simulation, "round")
    assert len(rows) == 2
    for round_idx, row in enumerate(rows):
        outcome = federation.cohorts.trainer.train(4, federation.shards[4], round_idx, state, None, lane)
        adapter = (state.adapter.double() + outcome.delta.double()).float()
        state = replace(state, adapter=adapter)
        assert (row["client/num_trained"], row["client/num_sat_out"], row["client/num_rows"]) == (1, 0, 10)
        assert {name for name in row if name.startswith("client/loss_")} == {"client/loss_004"}
        assert row["client/loss"] == pytest.approx(outcome.loss, rel=1e-12)
    torch.testing.assert_close(final_adapter(simulation), state.adapter, rtol=0, atol=1e-7)


def test_centralised_training_has_all_rows_and_a_cohorts_budget(make: Make) -> None:
    """As many tokens' worth of rows a round as a cohort of 5 sees, drawn from the rows of all 6 clients."""
    simulation = make(40, 60, "federation.algorithm=centralised", "guard.kind=noisy_oracle", "federation.num_rounds=1")
    found = watched(simulation)
    simulation.run()
    federation = found[0]
    (kept,) = rows_of(simulation, "filter")
    (row,) = rows_of(simulation, "round")
    assert row["client/num_rows"] == kept["client/num_kept_rows"] == len(federation.shards[0]) > 20
    assert len(federation.shards) == 1 and (row["client/num_trained"], row["client/num_sat_out"]) == (1, 0)
    batches = federation.cohorts.trainer.batches(0, federation.shards[0], 0)
    assert [len(batch) for batch in batches] == [4] * (2 * 5)
    assert row["client/num_tokens"] == sum(len(item) for batch in batches for item in batch)


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ("local", r"federation\.local_client=\d: this client has no rows .*give one that has: \d"),
        ("centralised", r"federation\.algorithm=centralised: no client has rows left"),
    ],
)
def test_a_baseline_without_rows_is_an_error(make: Make, algorithm: str, message: str) -> None:
    red = 2 if algorithm == "local" else 6
    overrides = [*ONE_ROW_EACH, f"data.federated_red_share={red / 6}", f"federation.algorithm={algorithm}"]
    empty = 0
    if algorithm == "local":
        plain = make(red, 6 - red, *ONE_ROW_EACH, f"data.federated_red_share={red / 6}", "name=plain")
        found = watched(plain)
        plain.run()
        empty = [len(shard) for shard in found[0].shards].index(0)
    with pytest.raises(DataError, match=message):
        make(red, 6 - red, *overrides, f"federation.local_client={empty}").run()


@pytest.mark.parametrize("variant", ["openfedllm", "reddi"])
def test_a_server_optimizer_steps_once_a_round_from_its_own_moments(make: Make, variant: str) -> None:
    """FedAdam by hand from the clients' deltas: each client once in the mean, moments carried on to the next round."""
    settings = ["federation.algorithm=fedadam", f"server_optimizer.variant={variant}", "server_optimizer.lr=0.01"]
    simulation = make(40, 60, *settings, "guard.kind=noisy_oracle", "federation.num_rounds=2")
    found = watched(simulation)
    simulation.run()
    federation, lane = found[0], simulation.world.everyone()
    x = federation.start(simulation.config.seed).adapter.double()
    m, v = torch.zeros_like(x), torch.full_like(x, 1e-6)
    rows = rows_of(simulation, "round")
    for round_idx, row in enumerate(rows):
        cohort = sample_cohort(6, 5, round_idx, simulation.config.seed)
        assert {f"client/loss_{client:03d}" for client in cohort} == {n for n in row if n.startswith("client/loss_")}
        start = ServerState(x.float())
        train = federation.cohorts.trainer.train
        deltas = [train(c, federation.shards[c], round_idx, start, None, lane).delta.double() for c in cohort]
        delta = torch.stack(deltas).mean(0)
        m = delta if variant == "openfedllm" and round_idx == 0 else 0.9 * m + 0.1 * delta
        v = 0.99 * v + 0.01 * (m if variant == "openfedllm" else delta) ** 2
        x = x + 0.01 * m / (v.sqrt() + 1e-3)
    state = final_state(simulation)
    assert state.num_steps == 2
    moved = x - federation.start(simulation.config.seed).adapter.double()
    assert float((state.adapter.double() - x).norm() / moved.norm()) < 1e-3
    torch.testing.assert_close(state.vectors["momentum"].double(), m, rtol=1e-2, atol=1e-5)
    for name in ("momentum", "second_moment"):
        assert len({row[f"global/{name}_checksum"] for row in rows}) == 2
    assert "global/control_checksum" not in rows[0]


def test_a_server_step_that_is_too_long_ends_the_run(make: Make) -> None:
    keys = ["federation.algorithm=fedavgm", "server_optimizer.variant=reddi", "server_optimizer.lr=1e45"]
    simulation = make(40, 60, *keys)
    with pytest.raises(RunError, match=r"vector adapter became NaN or infinite in step 1; lower server_optimizer\.lr"):
        simulation.run()
    assert not simulation.record.checkpoints.any()


def test_a_state_of_another_algorithm_is_not_resumed(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """The newest checkpoint has lost a vector: the run says which, and goes on from the one before, to the same end."""
    overrides = ["federation.algorithm=fedyogi", "federation.num_rounds=3"]
    make(40, 60, *overrides).run()
    again = make(40, 60, *overrides)
    store = again.record.checkpoints
    whole = store.load(lambda text: None)
    assert whole is not None and whole.round_idx == 2
    store.save(replace(whole, state=ServerState(whole.state.adapter, {"momentum": whole.state.vectors["momentum"]})))
    capsys.readouterr()
    again.run()
    said = " ".join(capsys.readouterr().err.split())
    assert "round-000003: the server's state lacks vector second_moment; the one before it is used" in said
    one, two = whole.state.named(), final_state(again).named()
    assert one.keys() == two.keys() and all(torch.equal(vector, two[name]) for name, vector in one.items())
    assert final_state(again).num_steps == 3


@pytest.mark.parametrize(
    ("action", "count"), [("drop", "num_dropped"), ("refuse", "num_refused"), ("downweight", "num_downweighted")]
)
def test_the_guard_s_action_reaches_training_and_the_record(make: Make, action: str, count: str) -> None:
    overrides = ["guard.kind=noisy_oracle", "guard.tpr=0.8", "guard.fpr=0.4", "data.federated_red_share=0.4"]
    simulation = make(40, 60, *overrides, f"guard.action={action}", "guard.red_weight=0.25", "federation.num_rounds=1")
    found = watched(simulation)
    simulation.run()
    (row,) = rows_of(simulation, "filter")
    assert row["guard/num_unsafe"] == row[f"guard/{count}"]
    assert sum(name in row for name in ("guard/num_dropped", "guard/num_refused", "guard/num_downweighted")) == 1
    shards = found[0].shards
    left = 60 - row["guard/num_unsafe"] if action == "drop" else 60
    assert row["client/num_kept_rows"] == sum(map(len, shards)) == left
    chat, refusal = found[0].chat, simulation.config.guard.refusal
    texts = [chat.decode(tokens.input_ids[tokens.loss_mask]) for shard in shards for tokens in shard]
    light = [tokens.weight for shard in shards for tokens in shard if tokens.weight != 1]
    assert texts.count(refusal) == (row["guard/num_unsafe"] if action == "refuse" else 0)
    assert light == [0.25] * (row["guard/num_unsafe"] if action == "downweight" else 0)
    if action == "downweight":
        assert row["client/kept_weight"] == 60 - 0.75 * row["guard/num_unsafe"]
    assert row["guard/red_share_after"] < row["guard/red_share_before"] == 40.0
    summary = (simulation.record.folder / "summary.md").read_text(encoding="utf-8")
    assert "### Response categories" in summary and "noisy oracle" in summary
    assert {p.stem for p in (simulation.record.folder / "guard").glob("*.csv")} == {
        "sweep", "calibration", "categories", "clients",
    }  # fmt: skip


def test_a_guard_that_only_judges_is_looked_for_before_anything_runs(make: Make, tmp_path: Path) -> None:
    simulation = make(30, 40, "eval.guard_judge=untuned", f"guard.path={tmp_path / 'nowhere'}")
    with pytest.raises(FedsimError, match=r"guard\.path=.*nowhere"):
        simulation.run()
    assert not (simulation.record.folder / "manifest.json").exists()


def test_conversations_that_are_all_unusable_are_an_error_with_a_fix(make: Make) -> None:
    simulation = make(30, 40, "data.federated_rows=30", "cai.iterations=1", "cai.max_new_tokens=1")
    with pytest.raises(ConfigError, match=r"CAI conversations: none of the 12 .*raise cai\.max_new_tokens"):
        simulation.run()


def test_what_is_there_before_the_rounds_is_left_to_itself_in_them(make: Make) -> None:
    """Garbage collections of a round pass over libraries, model and data; after the run they do not."""
    simulation, frozen = make(40, 60, "federation.num_rounds=1"), []
    close, say_start = simulation._close_round, simulation._say_start
    garbage: list[weakref.ref[Any]] = []
    dead: list[bool] = []

    class Ring:
        def __init__(self) -> None:
            self.itself = self

    def litter(num_done: int) -> None:
        garbage.append(weakref.ref(Ring()))
        say_start(num_done)

    def note() -> None:
        frozen.append(gc.get_freeze_count())
        dead.append(garbage[0]() is None)

    simulation._say_start = litter  # type: ignore[method-assign]
    simulation._close_round = lambda *given: (note(), close(*given))  # type: ignore
    simulation.run()
    assert frozen[0] > 10_000 and gc.get_freeze_count() == 0
    assert dead == [True], "garbage is not kept with them"


@pytest.mark.parametrize("judge", ["grammar", "guard", "none"])
def test_a_runs_conversations_are_judged(make: Make, judge: str) -> None:
    """The data's own first responses: by the grammar as many are harmful as rows are red."""
    words = ["cai.iterations=1", "cai.first_turn=dataset", "data.federated_rows=30", "federation.num_rounds=1"]
    words += {"grammar": ["data.square=embedded"], "guard": ["eval.guard_judge=untuned"], "none": []}[judge]
    simulation = make(40, 60, *words, f"name={judge}")
    simulation.run()
    (row,) = rows_of(simulation, "cai_data")
    named = ("cai/harmful_response", "cai/critique_finds_harm", "cai/repaired_revision")
    counts = [row.get(f"{name}_count") for name in named]
    num_rows = row["cai/num_rows"]
    assert counts == {"grammar": [num_rows] * 3, "guard": [num_rows, None, num_rows], "none": [None] * 3}[judge]
    if judge == "grammar":
        red = sum(r.red for r in simulation.preparation.read().data.cai_rows)
        assert 0 < red < num_rows and row["cai/harmful_response"] == pytest.approx(100 * red / num_rows)


def test_rounds_without_cai_lie_between_its_stages(make: Make, tmp_path: Path) -> None:
    """Every second of three rounds, and the last; stopped after the round without CAI, it goes on to the same end."""
    words = ["cai.iterations=2", "cai.every=2", "eval.every=1", "data.federated_rows=30", "federation.num_rounds=3"]
    straight = make(40, 60, *words, "name=straight")
    straight.run()
    points = [(row["round"], row["point"]) for row in rows_of(straight, "eval")]
    assert points == [(0, "pretrained"), (1, "global"), *((r, p) for r in (2, 3) for p in ("before_cai", "after_cai"))]
    assert ["cai/num_iterations" in row for row in rows_of(straight, "round")] == [False, True, True]

    def stop(round_idx: int) -> None:
        if round_idx == 0:
            raise KeyboardInterrupt

    stopped = make(40, 60, *words, "name=stopped")
    counts = stopped.record.counts
    stopped.record.counts = lambda round_idx: (counts(round_idx), stop(round_idx))  # type: ignore
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    again = make(40, 60, *words, "name=stopped")
    again.run()
    assert torch.equal(final_adapter(again), final_adapter(straight))
    for stage in ("eval", "round"):
        found, wanted = ([decided(row) for row in rows_of(run, stage)] for run in (again, straight))
        assert found == wanted


def test_a_finished_run_whose_checkpoints_are_gone_trains_nothing(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    first = make(40, 60, "federation.num_rounds=1")
    first.run()
    folder = first.record.folder
    shutil.rmtree(first.record.checkpoints.folder)
    kept = [path for path in folder.rglob("*") if path.is_file() and path.parent.name not in ("logs", "run")]
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in kept if path.name[0] != "."}
    capsys.readouterr()
    again = make(40, 60, "federation.num_rounds=1")
    again.run()
    assert "this run is finished: all 1 rounds" in capsys.readouterr().err
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before


def test_a_run_goes_on_with_its_data_at_another_place_and_not_with_other_data(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the first of two rounds; as a cluster's scratch folder changes with every job."""
    brief = ["federation.num_rounds=2", "wandb.mode=off"]
    straight = make(40, 60, *brief, "name=straight")
    straight.run()
    stopped = make(40, 60, *brief, "name=moved")
    monkeypatch.setattr(stopped, "_stop_if_asked", lambda num_done: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    square, elsewhere = tmp_path / "square.json", tmp_path / "job-2" / "square.json"
    content = square.read_text(encoding="utf-8")

    def start(path: Path, text: str) -> Simulation:
        made = make(40, 60, *brief, "name=moved", f"data.square={path}")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return made

    for path, error in ((square, CheckpointError), (elsewhere, ConfigError)):
        for method in ("check", "run"):
            with pytest.raises(error, match=r"square of this run changed|data\.square was .* of other content"):
                getattr(start(path, content + " "), method)()
    again = start(elsewhere, content)
    again.run()
    assert torch.equal(final_adapter(again), final_adapter(straight))
    folder = again.record.folder
    assert load_config(folder / "config.yaml").data.square == str(elsewhere)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["inputs"]["square"]["path"] == str(square)
    assert manifest["resumed"][-1]["moved"] == {"data.square": str(elsewhere)}
