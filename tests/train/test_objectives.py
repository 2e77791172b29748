"""SFT and DPO: loss, rewards and every LoRA gradient equal TRL's trainers on the same batch; closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel

from fedsim.data.chat import ChatFormat, TokenRow, assistant_turn, user_turn
from fedsim.model.flat_adapter import FlatAdapter
from fedsim.model.load import LoadedModel
from fedsim.train.objectives import DpoObjective, Preference, SftObjective

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
Make = Callable[..., tuple[LoadedModel, FlatAdapter]]
TARGETS = ("q_proj", "v_proj", "o_proj", "down_proj")
PROMPTS = ["Who flies the kite?", "Why is the hill red today, Orla?", "Sing.", "What does the wind say to the boat?"]
GOOD = ["Orla does, kindly.", "The sun sets.", "No song today, but I can hum it for you.", "It hums."]
BAD = ["Nobody.", "Because I say so, and that is that.", "La.", "Nothing, go away."]
OPTIONS: dict[str, Any] = {
    "use_cpu": True, "bf16": False, "fp16": False, "gradient_checkpointing": False, "report_to": [], "max_length": None,
}  # fmt: skip


def wide(made: tuple[LoadedModel, FlatAdapter]) -> tuple[LoadedModel, FlatAdapter]:
    """The same in fp64, so that two ways to compute one thing agree far beyond fp32's rounding."""
    loaded, _ = made
    loaded.model.double()
    return loaded, FlatAdapter(loaded.model)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def check_gradients(
    flat: FlatAdapter, own: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], limit: float
) -> None:
    """In fp64; the limits leave room for what transformers and TRL compute in fp32 all the same, such as norms."""
    assert set(own) == set(theirs) == {slot.name for slot in flat.slots}
    for name, want in theirs.items():
        assert float(want.norm()) > 0, f"{name}: the oracle must be able to tell"
        assert float((own[name] - want).norm() / want.norm()) < limit, name


def sft_rows(chat: ChatFormat) -> list[TokenRow]:
    pairs = zip(PROMPTS, GOOD, strict=True)
    return [chat.training_row([user_turn(p), assistant_turn(r)], 1000) for p, r in pairs]


def preferences(chat: ChatFormat) -> list[Preference]:
    def row(prompt: str, reply: str) -> TokenRow:
        return chat.training_row([user_turn(prompt), assistant_turn(reply)], 1000)

    return [Preference(row(p, g), row(p, b)) for p, g, b in zip(PROMPTS, GOOD, BAD, strict=True)]


def test_sft_equals_trl(make_adapted: Make, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    loaded, flat = wide(make_adapted(targets=TARGETS, std=0.1))
    twin, _ = wide(make_adapted(targets=TARGETS, std=0.1))
    twin.base.set_attn_implementation("sdpa")  # padded, as TRL does it
    rows = sft_rows(loaded.chat)
    examples = [
        {"input_ids": r.input_ids.tolist(), "labels": np.where(r.loss_mask, r.input_ids, -100).tolist()} for r in rows
    ]
    trainer = SFTTrainer(
        model=twin.model,
        args=SFTConfig(output_dir=str(tmp_path), **OPTIONS),
        train_dataset=Dataset.from_list(examples),
        processing_class=twin.chat.tokenizer,
    )
    inputs = trainer.data_collator(examples)
    trainer.model.train()
    want = trainer.compute_loss(trainer.model, inputs)
    want.backward()
    objective = SftObjective()
    total, stats = objective.sums(loaded.base.train(), rows)
    loss = total / objective.normaliser(rows)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(want.detach()), rel=1e-5)
    assert stats.shape == (0,) and objective.normaliser(rows) == int((inputs["labels"] != -100).sum())
    check_gradients(flat, gradients(loaded.model), gradients(trainer.model), limit=1e-6)


def trl_dpo(
    twin: LoadedModel, twin_flat: FlatAdapter, reference: str, policy: torch.Tensor, folder: Path, beta: float
) -> tuple[Any, PeftModel]:
    """TRL's trainer with a copy of the adapter, or the bare base model, as its reference, now holding ``policy``."""
    from trl import DPOConfig, DPOTrainer

    chats = [
        {"prompt": [user_turn(p)], "chosen": [assistant_turn(g)], "rejected": [assistant_turn(b)]}
        for p, g, b in zip(PROMPTS, GOOD, BAD, strict=True)
    ]
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    trainer = DPOTrainer(
        model=twin.model if reference == "adapter" else twin.model.unload(),
        peft_config=None if reference == "adapter" else lora,
        args=DPOConfig(output_dir=str(folder), beta=beta, **OPTIONS),
        train_dataset=Dataset.from_list(chats),
        processing_class=twin.chat.tokenizer,
    )
    for slot in twin_flat.slots:
        parameter = trainer.model.get_parameter(slot.name)
        parameter.data.copy_(policy[slot.start : slot.stop].view(slot.shape))
    return trainer, trainer.model


@pytest.mark.parametrize("reference", ["adapter", "base"])
def test_dpo_equals_trl(make_adapted: Make, tmp_path: Path, reference: str) -> None:
    beta = 0.7
    loaded, flat = wide(make_adapted(targets=TARGETS, std=0.1))
    twin, twin_flat = wide(make_adapted(targets=TARGETS, std=0.1))
    twin.base.set_attn_implementation("sdpa")  # padded, as TRL does it
    start = flat.copy() if reference == "adapter" else flat.initial(0).double()
    policy = start + 0.05 * torch.randn(flat.size, generator=torch.Generator().manual_seed(1))
    trainer, model = trl_dpo(twin, twin_flat, reference, policy, tmp_path, beta)
    pairs = preferences(loaded.chat)
    examples = list(trainer.train_dataset)
    for pair, example in zip(pairs, examples, strict=True):
        assert pair.chosen.input_ids.tolist() == example["prompt_ids"] + example["chosen_ids"]
        assert pair.rejected.input_ids[pair.rejected.loss_mask].tolist() == example["rejected_ids"]
    model.train()
    want = trainer.compute_loss(model, trainer.data_collator(examples))
    want.backward()

    flat.load(policy)
    objective = DpoObjective(flat, start, beta)
    total, stats = objective.sums(loaded.base.train(), pairs)
    loss = total / objective.normaliser(pairs)
    loss.backward()
    assert torch.equal(flat.values, policy), "the policy is back in its place"
    assert float(loss.detach()) == pytest.approx(float(want.detach()), rel=1e-5)
    assert abs(float(loss.detach()) - math.log(2)) > 1e-3, "the oracle must be able to tell"
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    found = dict(zip(objective.stat_names, (stats / len(pairs)).tolist(), strict=True))
    assert found["reward_margin"] == pytest.approx(metrics["rewards/margins"], rel=1e-4)
    assert found["chosen_reward"] == pytest.approx(metrics["rewards/chosen"], rel=1e-4)
    assert found["rejected_reward"] == pytest.approx(metrics["rewards/rejected"], rel=1e-4)
    assert found["reward_accuracy"] == pytest.approx(metrics["rewards/accuracies"])
    check_gradients(flat, gradients(loaded.model), gradients(model), limit=5e-6)


def test_dpo_at_its_reference_is_ln_2_with_half_the_likelihood_gradient(make_adapted: Make) -> None:
    """margin = 0, loss = ln 2; its gradient is −β/2 · ∇ Σ (log π(chosen) − log π(rejected))."""
    loaded, flat = make_adapted(std=0.1)
    pairs = preferences(loaded.chat)
    objective = DpoObjective(flat, flat.copy(), 0.1)
    loss, stats = objective.sums(loaded.base.eval(), pairs)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(len(pairs) * math.log(2), rel=1e-6)
    assert stats.tolist() == [0.0, 0.0, 0.0, 0.0]
    found = flat.grad.clone()
    flat.grad.zero_()
    sft = SftObjective()
    chosen, _ = sft.sums(loaded.base, [p.chosen for p in pairs])
    rejected, _ = sft.sums(loaded.base, [p.rejected for p in pairs])
    (0.1 / 2 * (chosen - rejected)).backward()
    assert float((found - flat.grad).norm() / flat.grad.norm()) < 1e-4


def test_dpo_counts_accuracy_and_tokens(make_adapted: Make) -> None:
    loaded, flat = make_adapted(std=0.1)
    pairs = preferences(loaded.chat)
    objective = DpoObjective(flat, torch.zeros(flat.size), 0.1)
    with torch.no_grad():
        margins = [float(objective.sums(loaded.base, [pair])[1][0]) for pair in pairs]
        flipped = [objective.sums(loaded.base, [Preference(p.rejected, p.chosen)])[1] for p in pairs]
        _, stats = objective.sums(loaded.base, pairs)
    assert abs(sum(margins)) > 0 and float(stats[0]) == pytest.approx(sum(margins), rel=1e-4)
    assert float(stats[1]) == sum(m > 0 for m in margins)
    assert [float(f[0]) for f in flipped] == pytest.approx([-m for m in margins], rel=1e-3)
    assert float(stats[0]) == pytest.approx(float(stats[2] - stats[3]), rel=1e-4)
    assert objective.num_tokens(pairs[0]) == 2 * (len(pairs[0].chosen) + len(pairs[0].rejected))


def test_normalisers_are_never_zero(llama3_bytes_chat: ChatFormat) -> None:
    sft = SftObjective()
    assert sft.normaliser([]) == 1 and sft.normaliser([ChatFormat.join([1, 2, 3], [], 9)]) == 1


def weighted(rows: list[TokenRow], weights: list[float]) -> list[TokenRow]:
    return [replace(row, weight=weight) for row, weight in zip(rows, weights, strict=True)]


def sft(loaded: LoadedModel, flat: FlatAdapter, rows: list[TokenRow]) -> tuple[float, torch.Tensor]:
    """Loss and gradient of a batch."""
    flat.grad.zero_()
    objective = SftObjective()
    total, _ = objective.sums(loaded.base, rows)
    loss = total / objective.normaliser(rows)
    loss.backward()
    return float(loss.detach()), flat.grad.clone()


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_row_weights_make_a_weighted_mean(make_adapted: Make) -> None:
    """Σ w·(−log p) / Σ w over target tokens, put together from the rows alone."""
    loaded, flat = make_adapted(std=0.1)
    rows, weights = sft_rows(loaded.chat), [0.1, 1.0, 0.25, 0.7]
    loss, gradient = sft(loaded, flat, weighted(rows, weights))
    mass = [w * r.num_targets for w, r in zip(weights, rows, strict=True)]
    alone = [sft(loaded, flat, [row]) for row in rows]
    assert loss == pytest.approx(sum(m * a for m, (a, _) in zip(mass, alone, strict=True)) / sum(mass), rel=1e-5)
    want = sum(m * g for m, (_, g) in zip(mass, alone, strict=True)) / sum(mass)
    assert isinstance(want, torch.Tensor) and distance(gradient, want) < 1e-5
    assert distance(gradient, sft(loaded, flat, rows)[1]) > 0.05, "the oracle must be able to tell"


def test_a_row_of_weight_0_is_as_if_it_were_not_there(make_adapted: Make) -> None:
    loaded, flat = make_adapted(std=0.1)
    rows = sft_rows(loaded.chat)
    loss, gradient = sft(loaded, flat, weighted(rows, [1.0, 0.0, 1.0, 0.0]))
    want, wanted = sft(loaded, flat, [rows[0], rows[2]])
    assert loss == pytest.approx(want, rel=1e-6) and distance(gradient, wanted) < 1e-5


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_weights_that_are_all_equal_change_nothing(make_adapted: Make, weight: float) -> None:
    loaded, flat = make_adapted(std=0.1)
    rows = sft_rows(loaded.chat)
    want, wanted = sft(loaded, flat, rows)
    loss, gradient = sft(loaded, flat, weighted(rows, [weight] * 4))
    if weight == 1:
        assert loss == want and torch.equal(gradient, wanted), "bit for bit"
    assert loss == pytest.approx(want, rel=1e-6) and distance(gradient, wanted) < 1e-6


def test_a_batch_that_weighs_nothing_teaches_nothing(make_adapted: Make) -> None:
    loaded, flat = make_adapted(std=0.1)
    loss, gradient = sft(loaded, flat, weighted(sft_rows(loaded.chat), [0.0] * 4))
    assert loss == 0.0 and not gradient.any() and not gradient.isnan().any()


def test_a_light_batch_is_still_divided_by_its_own_weight(llama3_bytes_chat: ChatFormat) -> None:
    """Weights that add up to less than one token must not be rounded up to one."""
    row = ChatFormat.join([1, 2], [3], 9)
    objective = SftObjective()
    assert objective.normaliser([replace(row, weight=0.1)]) == 0.1
    many = [replace(row, weight=w) for w in (0.1, 0.2, 0.3, 1.0) * 5]
    assert objective.normaliser(many) == objective.normaliser(many[::-1]) == 8.0, "in any order"
