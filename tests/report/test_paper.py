"""The published figures agree with what the paper's own text says about them (arXiv 2502.16691)."""

from __future__ import annotations

import pytest

from fedsim.report import paper
from fedsim.report.paper import (
    COSTS,
    RED_SHARE,
    TABLE_1,
    TABLE_2,
    GuardRow,
    SafetyRow,
    arm_name,
    method_name,
    paper_row,
)

# §6.2 and §6.3 state differences between Table 1's rows: (aggregation, from, to) → AdvBench, HHH, MT-Bench.
STATED = [
    ("fedavg", "pretrained", "FL", -27.1, -10.7, -4.1),
    ("scaffold", "pretrained", "FL", -26.9, -10.5, -3.9),
    ("fedavg", "FL", "FL + filter", 8.7, 2.5, None),
    ("scaffold", "FL", "FL + filter", 6.1, 5.1, None),
    ("fedavg", "FL", "FL + CAI", 23.7, 8.0, 3.1),
    ("scaffold", "FL", "FL + CAI", 23.8, 13.1, 3.0),
    ("fedavg", "FL + CAI", "FL + filter + CAI", 0.1, 6.4, 0.3),
    ("scaffold", "FL + CAI", "FL + filter + CAI", 0.6, 1.3, -0.1),
]


@pytest.mark.parametrize(("aggregation", "start", "end", "advbench", "hhh", "mt_bench"), STATED)
def test_table_1_gives_the_differences_that_the_text_states(
    aggregation: str, start: str, end: str, advbench: float, hhh: float, mt_bench: float | None
) -> None:
    table = TABLE_1["fedavg" if aggregation == "fedavg" else "scaffold"]
    before, after = table[start], table[end]
    assert after.advbench_harmless - before.advbench_harmless == pytest.approx(advbench)
    assert after.hhh_accuracy - before.hhh_accuracy == pytest.approx(hhh)
    if mt_bench is not None:
        assert after.mt_bench - before.mt_bench == pytest.approx(mt_bench)


def test_both_aggregations_start_from_one_pretrained_model() -> None:
    assert TABLE_1["fedavg"]["pretrained"] == TABLE_1["scaffold"]["pretrained"] == SafetyRow(99.6, 60.0, 6.8)


@pytest.mark.parametrize("name", list(TABLE_2))
def test_table_2_hmean_follows_from_precision_and_recall(name: str) -> None:
    row = TABLE_2[name]
    assert 2 * row.precision * row.recall / (row.precision + row.recall) == pytest.approx(row.hmean, abs=0.05)


@pytest.mark.parametrize(("name", "implied"), [("Llama Guard 3", 70.1), ("fine-tuned Llama Guard 3", 75.2)])
def test_table_2_accuracy_at_the_sets_red_share(name: str, implied: float) -> None:
    """The fine-tuned row's accuracy is printed as 75.5; its precision and recall give 75.2."""
    row = TABLE_2[name]
    caught = RED_SHARE * row.recall
    false_alarms = caught * (100 / row.precision - 1)
    accuracy = caught + 100 * (1 - RED_SHARE) - false_alarms
    assert accuracy == pytest.approx(implied, abs=0.05)
    assert row.accuracy == pytest.approx(implied, abs=0.35)


def test_cai_costs_agree_with_each_other() -> None:
    """1,250 iterations are an epoch of 20,000 rows at 16; 50 of them cost 96 % less; 50 rounds make 160 minutes."""
    assert COSTS["cai_epoch"].minutes / (20_000 / 16) * 50 == pytest.approx(COSTS["cai_round"].minutes)
    assert 1 - COSTS["cai_round"].minutes / COSTS["cai_epoch"].minutes == pytest.approx(0.96)
    assert COSTS["cai_round"].minutes * 50 == pytest.approx(COSTS["cai"].minutes)


def test_arm_names_and_rows() -> None:
    assert arm_name("fedavg", method_name(filtered=True, cai=True)) == "FedAvg, FL + filter + CAI"
    assert arm_name("scaffold", method_name(filtered=False, cai=False)) == "SCAFFOLD, FL"
    assert paper_row("scaffold", "FL + filter") == SafetyRow(78.8, 54.6, 2.7)
    assert paper_row("fedprox", "FL + filter") is None
    assert paper_row("scaffold", "FL + oracle filter") is None


@pytest.mark.parametrize(
    ("row", "fedavg", "scaffold"),
    [  # typed from Table 1 of the paper (arXiv 2502.16691v1), rows 1 to 5: AdvBench, HHH, MT-Bench
        ("pretrained", (99.6, 60.0, 6.8), (99.6, 60.0, 6.8)),
        ("FL", (72.5, 49.3, 2.7), (72.7, 49.5, 2.9)),
        ("FL + filter", (81.2, 51.8, 2.4), (78.8, 54.6, 2.7)),
        ("FL + CAI", (96.2, 57.3, 5.8), (96.5, 62.6, 5.9)),
        ("FL + filter + CAI", (96.3, 63.7, 6.1), (97.1, 63.9, 5.8)),
    ],
)
def test_table_1_is_the_papers(row: str, fedavg: tuple[float, ...], scaffold: tuple[float, ...]) -> None:
    assert TABLE_1["fedavg"][row] == SafetyRow(*fedavg) and TABLE_1["scaffold"][row] == SafetyRow(*scaffold)
    assert len(TABLE_1["fedavg"]) == len(TABLE_1["scaffold"]) == 5


def test_table_2_is_the_papers() -> None:
    """Typed from Table 2: accuracy, precision, recall, Hmean."""
    assert TABLE_2["Llama Guard 3"] == GuardRow(70.1, 90.6, 0.5, 1.0)
    assert TABLE_2["fine-tuned Llama Guard 3"] == GuardRow(75.5, 56.7, 73.7, 64.1)


def test_costs_and_counts_are_the_papers() -> None:
    """§4.2, §5.2 and §6.1: minutes and GPUs; items; schedule."""
    stated = {name: (cost.minutes, cost.num_gpus) for name, cost in COSTS.items()}
    assert stated == {
        "fedavg": (140, 4),
        "scaffold": (230, 4),
        "cai": (160, 4),
        "cai_round": (3.2, 4),
        "cai_epoch": (80, 4),
        "guard_tuning": (60, 4),
        "guard_1000_rows": (1, 1),
    }
    assert (paper.NUM_ADVBENCH, paper.NUM_HHH, paper.NUM_MT_BENCH) == (520, 438, 80)
    assert (paper.NUM_CLIENTS, paper.NUM_ROUNDS, paper.CLIENTS_PER_ROUND, paper.LOCAL_STEPS) == (20, 50, 5, 25)
    assert (paper.BATCH_SIZE, paper.CAI_ITERATIONS, paper.NUM_CAI_ROWS) == (16, 50, 20_000)
