"""Elapsed times as arithmetic: the paper's own, scaling laws, a projection by hand, and what is missing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.base.errors import ConfigError
from fedsim.model.cost import Effort
from fedsim.study import costs
from fedsim.study.costs import Machine, Measured, Piece, machine, projected, report, run_table, stages

WORK = {
    "local_step": Effort(flops=100e12),
    "cai_iteration": Effort(flops=400e12),
    "tuning_step": Effort(flops=200e12),
    "guard_row": Effort(flops=2e12),
    "conversation": Effort(flops=1e12, num_bytes=40e9),
    "aggregation": Effort(num_bytes=1e9),
    "correction": Effort(num_bytes=2e9),
}
PIECES = {name: Piece(0.5, 0.5) for name in WORK if name != "tuning_step"}
MEASURED = Measured("CPU", "tiny", projects=False, stamp="a test", pieces=PIECES)
TARGET = Machine("4 x T", 4, 200e12, 2e12)


def test_the_papers_own_arithmetic() -> None:
    """One step of 1.344 s after another, and 3.84 s an iteration of four GPUs."""
    found = stages({"local_step": 1.344, "aggregation": 0.0, "cai_iteration": 3.84}, 1, None)
    minutes = {name: found[name].seconds for name in ("fedavg", "cai", "cai_round", "cai_epoch")}
    expected = {"fedavg": 140.0, "cai": 160.0, "cai_round": 3.2, "cai_epoch": 80.0}
    assert {name: value / 60 for name, value in minutes.items() if value is not None} == pytest.approx(expected)
    stated = costs.published_stages()
    assert stated["table_1"].seconds == pytest.approx(60 * (4 * (140 + 230 + 160) + 60 + 20))
    assert costs.device_hours(stated, 4, filter_count=1) == pytest.approx((4 * 2180 + 20) / 60)
    assert stated["writing"].seconds is None


def test_five_clients_on_four_gpus_take_31_25_steps_and_a_measured_lane_more() -> None:
    assert 25 * costs.client_times(4, None) == pytest.approx(31.25)
    assert costs.client_times(4, 0.3) == pytest.approx(1.3)
    assert costs.client_times(1, 0.3) == 5.0
    assert costs.shared_step(4, None) == 0.25 and costs.shared_step(4, 0.3) == pytest.approx(0.3)
    assert costs.shared_step(1, 0.3) == 1.0


def test_a_projection_by_hand() -> None:
    units = projected(MEASURED, WORK, TARGET)
    assert units["local_step"] == pytest.approx(1.0), "100 TFLOP at half of 200 TFLOP/s"
    assert units["conversation"] == pytest.approx(0.04), "bound by 40 GB at half of 2 TB/s"
    assert units["tuning_step"] == pytest.approx(2.0), "at the local step's fraction"
    found = stages(units, 4, None)
    seconds = {name: line.seconds for name, line in found.items()}
    expected = {
        "fedavg": 50 * (31.25 * 1.0 + 0.001),
        "scaffold": 50 * (31.25 * 1.002 + 0.001),
        "cai": 50 * 50 * 4.0 / 4,
        "cai_round": 50.0,
        "cai_epoch": 1250.0,
        "guard_tuning": 6250 * 2.0 / 4,
        "guard_1000_rows": 20.0,
        "writing": 20_000 * 0.04 / 4,
    }
    whole = 4 * (expected["fedavg"] + expected["scaffold"] + expected["cai"]) + 3125 + 20 * 20.0 / 4 + 200
    assert seconds == pytest.approx({**expected, "table_1": whole})
    assert costs.device_hours(found, 4, filter_count=4) == pytest.approx(4 * whole / 3600)
    assert "31.2" not in found["fedavg"].formula and "25 steps x 1.25 client times x 1 s" in found["fedavg"].formula


@given(factor=st.floats(0.1, 10), fraction=st.floats(0.01, 1.0))
def test_time_goes_as_one_over_peak_and_one_over_fraction(factor: float, fraction: float) -> None:
    measured = replace(MEASURED, pieces={name: Piece(1.0, fraction) for name in PIECES})
    faster = replace(TARGET, flops=factor * TARGET.flops, bytes_per_s=factor * TARGET.bytes_per_s)
    slow, fast, whole = (
        stages(projected(m, WORK, t), 4, 0.3)
        for m, t in (
            (measured, TARGET),
            (measured, faster),
            (replace(MEASURED, pieces={name: Piece(1.0, 1.0) for name in PIECES}), TARGET),
        )
    )
    for name, line in slow.items():
        assert line.seconds == pytest.approx(factor * (fast[name].seconds or 0))
        assert line.seconds == pytest.approx((whole[name].seconds or 0) / fraction)


def test_rows_of_a_gpu_at_8b_scale_by_the_ratio_of_peaks_and_lose_range_and_warning() -> None:
    """Measured on a machine like the target, a step takes there what it took here."""
    here = Piece(0.8, TARGET.floor_s(WORK["local_step"]) / 0.8)
    measured = replace(MEASURED, device="NVIDIA T", projects=True, pieces={"local_step": here})
    assert projected(measured, WORK, TARGET)["local_step"] == pytest.approx(0.8)
    gpu, cpu = (report(m, WORK, [TARGET], "no GPU row is committed") for m in (measured, MEASURED))
    assert "not measured" not in gpu.table().head[3] and "arithmetic" not in gpu.caption
    assert "arithmetic, not measured" in cpu.table().head[3]
    assert "arithmetic, not measured: no GPU row is committed" in cpu.caption
    assert cpu.table().head[2].startswith("1 x CPU, tiny: measured")
    assert cpu.table().rows[6][3] == "52 min 05 s [43 min 24 s to 1 h 26 min]"


@pytest.mark.parametrize(
    ("missing", "lost"),
    [
        ("local_step", {"fedavg", "scaffold", "guard_tuning", "table_1"}),
        ("correction", {"scaffold", "table_1"}),
        ("cai_iteration", {"cai", "cai_round", "cai_epoch", "table_1"}),
        ("guard_row", {"guard_1000_rows", "table_1"}),
        ("conversation", {"writing", "table_1"}),
    ],
)
def test_what_has_no_row_is_not_measured(missing: str, lost: set[str]) -> None:
    measured = replace(MEASURED, pieces={name: piece for name, piece in PIECES.items() if name != missing})
    found = stages(projected(measured, WORK, TARGET), 4, None)
    assert {name for name, line in found.items() if line.seconds is None} == lost
    cells = {row[0]: row[3] for row in report(measured, WORK, [TARGET], "a test").table().rows}
    assert all(cells[costs.TITLES[name]].startswith("not measured") for name in lost)
    assert cells["– device-hours"] == "not measured"


def test_machines_have_the_data_sheets_figures_and_unknown_ones_are_named() -> None:
    found = machine("4xA100-SXM4-80GB")
    assert (found.name, found.count, found.flops) == ("4 x A100-SXM4-80GB", 4, 312e12)
    assert found.bytes_per_s == pytest.approx(2.039e12)
    assert machine("4xH200").flops == 989.5e12
    for wrong in ("4xB200", "H200", "0xH200", "-1xH200", ""):
        with pytest.raises(ConfigError, match=r"known GPU.*4xH200, .*4xA100-SXM4-80GB") as error:
            machine(wrong)
        assert "\n" not in str(error.value)


def test_a_runs_phases_add_up_without_nested_ones() -> None:
    rows = [
        {"round": 0, "stage": "prepare", "time/filter_s": 1.0, "time/evaluate_s": 2.0},
        {"round": 1, "stage": "round", "time/train_s": 5.0, "time/train/step_s": 4.0, "time/evaluate_s": 2.0},
    ]
    table = run_table({"a": rows, "b": []})
    assert table.rows == [
        ["filter", "1 s", "not measured"],
        ["evaluate", "4 s", "not measured"],
        ["train", "5 s", "not measured"],
        ["all phases", "10 s", "not measured"],
        ["– evaluation's share", "40 %", "not measured"],
    ]
