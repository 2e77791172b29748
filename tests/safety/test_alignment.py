"""CAI on the global adapter: one cursor over all rows, SFT before DPO, and the adapter after SFT as the reference."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim.base.errors import ConfigError
from fedsim.config import CaiConfig
from fedsim.data.chat import ChatFormat, assistant_turn, user_turn
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.model.load import LoadedModel
from fedsim.parallel.sums import Summer
from fedsim.safety.alignment import Aligner, check_prompts, preference
from fedsim.safety.cai_data import CaiRow
from fedsim.train.loop import StepSettings, Trainer, TrainingPlan
from fedsim.train.objectives import DpoObjective, SftObjective

Make = Callable[..., tuple[LoadedModel, FlatAdapter]]
SETTINGS: dict[str, Any] = {"iterations": 3, "batch_size": 2, "sft_lr": 1e-2, "dpo_lr": 1e-3, "beta": 0.5}


@dataclass
class OneLane:
    index: int = 0
    size: int = 1
    summer: Summer = field(default_factory=lambda: Summer(None, exact=True))


def cai_row(i: int) -> CaiRow:
    revised = f"Orla flies it kindly, {i}."
    return CaiRow(i, f"Who flies kite {i}?", f"Nobody {i}", "critic", "critique", "revise", revised, 0)


def aligner(made: tuple[LoadedModel, FlatAdapter], num_rows: int = 7, **changes: Any) -> Aligner:
    trainer = Trainer(made[0].base, made[1], StepSettings(2, 1.0, 0.0, 3))
    rows = [cai_row(i) for i in range(num_rows)]
    return Aligner(trainer, rows, made[0].chat, CaiConfig(**SETTINGS | changes), 3, num_rounds=100)


def test_pairs_are_prompt_revision_and_first_response(llama3_bytes_chat: ChatFormat) -> None:
    pair = preference(llama3_bytes_chat, cai_row(4), 1000)
    for row, reply in ((pair.chosen, "Orla flies it kindly, 4."), (pair.rejected, "Nobody 4")):
        want = llama3_bytes_chat.training_row([user_turn("Who flies kite 4?"), assistant_turn(reply)], 1000)
        assert row.input_ids.tolist() == want.input_ids.tolist()
        assert row.loss_mask.tolist() == want.loss_mask.tolist()


@pytest.mark.parametrize(("num_rows", "iterations", "size"), [(7, 3, 2), (12, 2, 3), (5, 4, 8), (800, 50, 16)])
def test_the_cursor_covers_every_row_once_an_epoch(
    make_adapted: Make, num_rows: int, iterations: int, size: int
) -> None:
    cai = aligner(make_adapted(), num_rows, iterations=iterations, batch_size=size)
    place = {id(pair): i for i, pair in enumerate(cai.pairs)}
    rounds = [[[place[id(p)] for p in batch] for batch in cai.batches(r)] for r in range(6)]
    assert all(len(batches) == iterations and all(len(b) == size for b in batches) for batches in rounds)
    walk = [i for batches in rounds for batch in batches for i in batch]
    for start in range(0, len(walk) - num_rows + 1, num_rows):
        assert sorted(walk[start : start + num_rows]) == list(range(num_rows))
    assert max(Counter(walk).values()) - min(Counter(walk).get(i, 0) for i in range(num_rows)) <= 1
    assert rounds[4] == [[place[id(p)] for p in batch] for batch in cai.batches(4)], "no state goes from round to round"
    epochs = [walk[s : s + num_rows] for s in range(0, len(walk) - num_rows + 1, num_rows)]
    assert len({tuple(e) for e in epochs}) > 0.8 * len(epochs), "every epoch has its own order"


def test_1250_iterations_of_16_rows_are_an_epoch_of_20000(make_adapted: Make) -> None:
    cai = aligner(make_adapted(), 2, iterations=50, batch_size=16)
    cai.pairs = [cai.pairs[0]] * 20_000
    orders: dict[int, list[int]] = {}
    walk = [cai._at(place, orders) for place in range(25 * 50 * 16)]
    assert sorted(walk) == list(range(20_000))


def test_sft_then_dpo_against_the_adapter_after_sft(make_adapted: Make) -> None:
    """The two stages recomputed by hand, each with an optimizer of its own."""
    made, twin = make_adapted(std=0.1), make_adapted(std=0.1)
    cai = aligner(made)
    steps: list[tuple[int, int]] = []
    start = torch.randn(made[1].size, generator=torch.Generator().manual_seed(0)) * 0.1
    found = cai.align(start, 2, OneLane(), lambda done, total: steps.append((done, total)))
    assert steps == [(i, 6) for i in range(1, 7)]

    loaded, flat = twin
    flat.load(start)
    batches = cai.batches(2)
    chosen = [[pair.chosen for pair in batch] for batch in batches]
    settings = StepSettings(2, 1.0, 0.0, 3)
    sft = Trainer(loaded.base, flat, settings).run(
        TrainingPlan(chosen, lambda step: 1e-2, ("cai_sft", 2)), SftObjective(), OneLane()
    )
    middle = flat.copy()
    dpo = Trainer(loaded.base, flat, settings).run(
        TrainingPlan(batches, lambda step: 1e-3, ("cai_dpo", 2)), DpoObjective(flat, middle, 0.5), OneLane()
    )
    assert torch.equal(found.adapter, flat.values) and not torch.equal(middle, flat.values)
    assert found.metrics["cai/sft_loss"] == sft.mean_loss and found.metrics["cai/dpo_loss"] == dpo.mean_loss
    assert found.metrics["cai/reward_margin"] == dpo.mean("reward_margin")
    assert found.metrics["cai/num_iterations"] == 3
    assert found.metrics["cai/num_tokens"] == sft.num_tokens + dpo.num_tokens


def test_the_first_dpo_step_has_no_margin(make_adapted: Make) -> None:
    """With the start of the round, or the base model, as the reference the margin would not be 0 after SFT."""
    made = make_adapted(std=0.1)
    start = made[1].copy()
    metrics = aligner(made, iterations=1).align(start, 0, OneLane()).metrics
    assert metrics["cai/reward_margin"] == metrics["cai/chosen_reward"] == metrics["cai/rejected_reward"] == 0.0
    assert metrics["cai/dpo_loss"] == pytest.approx(math.log(2), rel=1e-6)


def test_training_prefers_revisions(make_adapted: Make) -> None:
    made = make_adapted(std=0.1)
    metrics = (
        aligner(made, iterations=25, batch_size=7, sft_lr=1e-3, dpo_lr=5e-3).align(made[1].copy(), 0, OneLane()).metrics
    )
    assert metrics["cai/reward_margin"] > 0.05 and metrics["cai/reward_accuracy"] > 0.8
    assert metrics["cai/dpo_loss"] < math.log(2)


def test_a_round_does_not_depend_on_what_ran_before(make_adapted: Make) -> None:
    made = make_adapted(std=0.1, dropout=0.2)
    cai, start = aligner(made), made[1].copy()
    first = cai.align(start, 1, OneLane())
    cai.align(first.adapter, 2, OneLane())
    again = cai.align(start, 1, OneLane())
    assert torch.equal(first.adapter, again.adapter) and first.metrics == again.metrics
    assert torch.equal(start, make_adapted(std=0.1)[1].values), "what is given is not changed"


def test_cut_rows_are_counted(make_adapted: Make) -> None:
    made = make_adapted()
    longest = max(len(pair.chosen) for pair in aligner(made).pairs)
    assert aligner(made, max_length=longest).num_cut == 0
    assert aligner(made, max_length=longest - 1).num_cut == 7
    full = r"CAI pairs: none of the 7 .*\(7 whose prompt fills cai\.max_length=16\); raise cai\.max_length$"
    with pytest.raises(ConfigError, match=full):
        aligner(made, max_length=16)


def test_pairs_without_a_preference_are_dropped_by_reason(make_adapted: Make) -> None:
    """A prompt that fills the row, replies alike up to the cut, and replies alike as tokens: neither SFT nor DPO has
    anything to learn from the first, and DPO nothing from the others."""
    made = make_adapted()
    chat, length = made[0].chat, len(made[0].chat.prompt_ids([user_turn("Who flies kite 0?")])) + 12
    rows = [cai_row(i) for i in range(4)]
    rows[1] = dataclasses.replace(rows[1], init_prompt="Who flies? " * 20)
    rows[2] = dataclasses.replace(rows[2], init_response="Orla flies it rudely.")  # differs behind the cut
    rows[3] = dataclasses.replace(rows[3], init_response=f" {rows[3].revision_response}\n")  # the template trims
    trainer = Trainer(made[0].base, made[1], StepSettings(2, 1.0, 0.0, 3))
    cai = CaiConfig(**SETTINGS | {"max_length": length})
    found = Aligner(trainer, rows, chat, cai, 3, num_rounds=1)
    assert found.reasons == [None, "no_targets", "same_replies", "same_replies"] and len(found.pairs) == 1
    assert {id(pair) for batch in found.batches(0) for pair in batch} == {id(found.pairs[0])}
    with pytest.raises(
        ConfigError,
        match=r"none of the 2 .*\(2 whose two replies have the same tokens\); use other",
    ):
        Aligner(trainer, rows[2:], chat, cai, 3, num_rounds=1)


def test_prompts_are_looked_at_before_conversations_are_written(llama3_bytes_chat: ChatFormat) -> None:
    size = len(llama3_bytes_chat.prompt_ids([user_turn("Kite?")]))
    check_prompts(llama3_bytes_chat, ["Kite? " * 9, "Kite?"], size + 1)
    with pytest.raises(ConfigError, match=rf"CAI rows: none of the 2 .*2 whose prompt fills cai\.max_length={size}\)"):
        check_prompts(llama3_bytes_chat, ["Kite? " * 9, "Kite?"], size)


@given(st.integers(0, 9), st.integers(1, 30))
def test_stages_of_a_schedule(every: int, num_rounds: int) -> None:
    """What comes before a round is counted as it comes, and the last round always has CAI."""
    cai = CaiConfig(iterations=3, every=every)
    due = [cai.is_due(r, num_rounds) for r in range(num_rounds)]
    assert [cai.num_stages(r) for r in range(num_rounds)] == [sum(due[:r]) for r in range(num_rounds)]
    assert due[-1] and (every != 1 or all(due)) and (every != 0 or sum(due) == 1)
    assert not any(CaiConfig(iterations=0, every=every).is_due(r, num_rounds) for r in range(num_rounds))


@pytest.mark.parametrize(("num_rows", "size"), [(7, 2), (12, 3), (5, 8)])
def test_an_epoch_takes_every_row(make_adapted: Make, num_rows: int, size: int) -> None:
    cai = aligner(make_adapted(), num_rows, iterations=-1, batch_size=size)
    place = {id(pair): i for i, pair in enumerate(cai.pairs)}
    for round_idx in range(4):  # and so does every later one
        stage = [place[id(pair)] for batch in cai.batches(round_idx) for pair in batch]
        assert len(stage) == -(-num_rows // size) * size
        assert sorted(stage[:num_rows]) == list(range(num_rows))


def test_the_cursor_stands_still_in_rounds_without_cai(make_adapted: Make) -> None:
    often, seldom = (aligner(make_adapted(), 7, iterations=2, every=every, batch_size=2) for every in (1, 3))
    for stage, round_idx in enumerate((2, 5, 8)):
        places = [[[cai.pairs.index(p) for p in batch] for batch in cai.batches(r)]
                  for cai, r in ((often, stage), (seldom, round_idx))]  # fmt: skip
        assert places[0] == places[1]
