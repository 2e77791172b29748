"""The table of drivers and builds, the message that uses it, and the page that prints it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.parallel.drivers import (
    BUILDS,
    INDEX,
    SMALLEST_DRIVER,
    fitting_build,
    installed_driver,
    needed_driver,
    no_gpu_message,
    table,
)

ROOT = Path(__file__).resolve().parents[2]
PROPRIETARY = """NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024
GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)
"""
OPEN = """NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder@U22)
GCC version:  gcc version 13.3.0
"""


@pytest.mark.parametrize(
    ("text", "version"), [(PROPRIETARY, "535.183.01"), (OPEN, "580.65.06"), ("nothing\n", None), (None, None)]
)
def test_the_installed_driver_is_read(tmp_path: Path, text: str | None, version: str | None) -> None:
    file = tmp_path / "version"
    if text is not None:
        file.write_text(text)
    assert installed_driver(file) == version


@pytest.mark.parametrize(
    ("driver", "tag"),
    [("580.65.06", "cu130"), ("595.1", "cu130"), ("1000.1", "cu130"), ("579.99", "cu126"), ("570.124.06", "cu126"),
     ("535.183.01", "cu126"), ("525.60.13", "cu126"), ("524.99", None), ("470.256.02", None)],
)  # fmt: skip
def test_the_build_that_fits_a_driver(driver: str, tag: str | None) -> None:
    build = fitting_build(driver)
    assert (build.tag if build is not None else None) == tag


@given(st.integers(300, 999))
def test_the_build_is_the_newest_that_the_driver_runs(branch: int) -> None:
    build = fitting_build(f"{branch}.10")
    can = [b for b in BUILDS if SMALLEST_DRIVER[int(b.cuda.split(".")[0])] <= branch]
    assert build == (max(can, key=lambda b: float(b.cuda)) if can else None)


def test_tags_and_addresses_follow_from_the_cuda_version() -> None:
    for build in BUILDS:
        assert build.tag == "cu" + build.cuda.replace(".", "") and build.index == f"{INDEX}/{build.tag}"
        assert build.driver == needed_driver(build.cuda)
    assert needed_driver("99.0") is None


def message(**changed: str | None) -> str:
    facts = {"wanted": "auto", "torch_version": "2.13.0+cu130", "cuda": "13.0", "driver": "580.65.06",
             "visible": None, "torch_says": ""}  # fmt: skip
    return no_gpu_message(**(facts | changed))  # type: ignore[arg-type]


def test_an_old_driver_gets_the_driver_that_is_needed_and_the_index_that_fits() -> None:
    text = message(driver="535.183.01", torch_says="The NVIDIA driver on your system\nis too old (found 12020).")
    for part in ("driver 535.183.01 is too old", "torch 2.13.0+cu130", "needs driver 580 or newer", "is too old (found",
                 "TORCH_INDEX=https://download.pytorch.org/whl/cu126", "torch==2.13.0 --index-url",
                 "parallel.device=cpu"):  # fmt: skip
        assert part in text
    assert "\n" not in text


def test_a_driver_that_is_too_old_for_every_build_is_to_be_updated() -> None:
    text = message(driver="470.256.02")
    assert "update the driver, no torch that fedsim runs on has a build for it" in text and "TORCH_INDEX" not in text


def test_a_driver_that_would_do_points_at_what_hides_the_gpus() -> None:
    text = message(visible="", torch_says="No CUDA GPUs are available")
    assert "CUDA_VISIBLE_DEVICES=''" in text and "nvidia-smi -L" in text and "--gpus all" in text
    assert "too old" not in text and "TORCH_INDEX" not in text and "No CUDA GPUs are available" in text


def test_a_cuda_build_without_a_driver_and_a_cpu_build_with_one() -> None:
    assert "no NVIDIA driver is loaded" in message(driver=None) and "580 or newer" in message(driver=None)
    text = message(torch_version="2.13.0+cpu", cuda=None, driver="535.1")
    assert "built without CUDA" in text and "TORCH_INDEX=https://download.pytorch.org/whl/cu126" in text
    text = message(torch_version="2.13.0+cpu", cuda=None, driver=None, wanted="cuda")
    assert text.startswith("parallel.device=cuda: torch 2.13.0+cpu is built without CUDA, and no NVIDIA driver")


versions = st.one_of(st.none(), st.builds("{}.{}".format, st.integers(400, 700), st.integers(0, 99)))


@given(versions, st.sampled_from([None, "11.8", "12.6", "13.0", "14.0"]), st.sampled_from(["auto", "cuda"]), st.text())
def test_every_message_is_one_line_with_a_way_out(driver: str | None, cuda: str | None, wanted: str, said: str) -> None:
    text = message(driver=driver, cuda=cuda, wanted=wanted, torch_says=said)
    assert text.startswith(f"parallel.device={wanted}: ") and "parallel.device=cpu" in text
    assert len(text.splitlines()) == 1
    for build in BUILDS:  # never a build that the driver does not run
        if build.index in text:
            assert driver is not None and int(driver.split(".")[0]) >= build.driver


def test_the_page_prints_this_table() -> None:
    assert table() in (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
