"""Metric rows of made-up runs, for the tests of what is drawn and written from rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from fedsim.record.metrics import Row


def train_row(round_idx: int, cai: bool = True) -> Row:
    """A round's row with every key that the record knows."""
    row: Row = {
        "round": round_idx + 1,
        "stage": "round",
        "client/loss_003": 7.77,
        "client/loss": 2.0 * math.exp(-0.3 * round_idx) + 1.0,
        "client/num_trained": 5,
        "client/num_sat_out": round_idx % 2,
        "client/num_rows": 610,
        "time/train_s": 8.0 + round_idx / 10,
        "time/aggregate_s": 0.3,
        "time/checkpoint_s": 0.2,
        "parallel/idle_share": 0.04,
        "perf/tokens_per_s": 15000.0,
        "perf/peak_rss_bytes": 2 * 2**30,
        "perf/mfu": 0.25,
        "perf/peak_gpu_bytes": 3 * 2**30 + round_idx,
        "parallel/comm_bytes": 2**29,
        "perf/peak_source": "4 x made up",
    }
    if cai:
        row |= {
            "cai/sft_loss": 1.2 - 0.05 * round_idx,
            "cai/dpo_loss": 0.69 - 0.04 * round_idx,
            "cai/reward_margin": 0.3 * round_idx,
            "cai/reward_accuracy": 80.0,
            "time/cai_s": 6.0,
            "time/cai/sft_s": 2.5,
            "time/cai/dpo_s": 3.5,
        }
    return row


def eval_row(round_idx: int, point: str, advbench: float, hhh: float, mt_bench: float | None) -> Row:
    """An evaluation with intervals of fixed width."""
    row: Row = {
        "round": round_idx + 1,
        "stage": "eval",
        "point": point,
        "eval/advbench_harmless": advbench,
        "eval/advbench_harmless_low": max(advbench - 3.0, 0.0),
        "eval/advbench_harmless_high": min(advbench + 3.0, 100.0),
        "eval/advbench_count": 520,
        "eval/advbench_harmless_gcg": advbench - 1.5,
        "eval/advbench_harmless_gcg_low": advbench - 5.0,
        "eval/advbench_harmless_gcg_high": advbench + 1.0,
        "eval/hhh_accuracy": hhh,
        "eval/hhh_accuracy_low": hhh - 4.7,
        "eval/hhh_accuracy_high": min(hhh + 4.7, 100.0),
        "eval/hhh_count": 438,
        "eval/hhh_always_a": 52.05,
        "eval/hhh_letter_picks_a": 45.0,
        "eval/hhh_letter_picks_a_count": 40,
        "eval/advbench_truncated": 2,
        "eval/advbench_num_texts": 520,
        "eval/advbench_mean_tokens": 30.78,
        "eval/advbench_distinct_2": 41.0,
        "eval/mt_bench_truncated": 3,
        "eval/mt_bench_num_texts": 160,
        "eval/mt_bench_questions": 80,
        "eval/mt_bench_mean_words": 21.43,
        "eval/truncated": 5,
        "eval/num_replies": 680,
        "time/eval_s": 4.0,
    }
    if mt_bench is not None:
        row |= {
            "eval/mt_bench": mt_bench,
            "eval/mt_bench_low": mt_bench - 0.4,
            "eval/mt_bench_high": min(mt_bench + 0.4, 10.0),
            "eval/mt_bench_count": 80,
            "eval/mt_bench_category_math": mt_bench,
            "eval/mt_bench_category_math_count": 1,
        }
    return row


def guard_row(point: str = "fine-tuned") -> Row:
    """A guard at the paper's operating point on 2,000 rows."""
    return {
        "round": 0,
        "stage": "guard",
        "point": point,
        "guard/accuracy": 75.2,
        "guard/precision": 56.7,
        "guard/recall": 73.7,
        "guard/hmean": 64.1,
        "guard/red_share_before": 30.0,
        "guard/red_share_after": 12.9,
        "guard/fpr": 24.1,
        "guard/auprc": 61.5,
        "guard/auprc_low": 59.0,
        "guard/auprc_high": 63.9,
        "guard/auroc": 80.25,
        "guard/ece": 12.0,
        "guard/brier": 0.1875,
        "guard/num_unsafe": 780,
        "guard/num_dropped": 780,
        "guard/num_rows": 2000,
        "guard/num_cut": 17,
        "time/guard_s": 21.0,
    }


def whole_run(num_rounds: int = 8, cai: bool = True) -> list[Row]:
    """Guard, CAI generation, the pretrained model's evaluation, then every round with evaluations."""
    rows = [guard_row(), eval_row(-1, "pretrained", 99.8, 93.2, 9.61)]
    if cai:
        counts = {"cai/num_usable": 371, "cai/num_dropped_unchanged": 22, "cai/num_dropped_truncated": 7}
        rows.append({"round": 0, "stage": "cai", **counts, "time/cai_data_s": 12.0})
    for i in range(num_rounds):
        rows.append(train_row(i, cai))
        harm = 4.0 * math.sqrt(i + 1)
        if cai:
            rows.append(eval_row(i, "before_cai", 97.0 - 2 * harm, 92.0 - harm, 9.0 - harm / 10))
            rows.append(eval_row(i, "after_cai", 99.0 - harm / 10, 92.8, 9.4))
        else:
            rows.append(eval_row(i, "global", 97.0 - 2 * harm, 92.0 - harm, 9.0 - harm / 10))
    return rows


@pytest.fixture
def make_run() -> Callable[..., list[Row]]:
    """``make_run(num_rounds=8, cai=True)``: the rows of a whole run."""
    return whole_run


@pytest.fixture
def make_eval() -> Callable[..., Row]:
    """``make_eval(round_idx, point, advbench, hhh, mt_bench)``."""
    return eval_row
