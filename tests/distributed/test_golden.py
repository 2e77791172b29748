"""The demo gives the bits that are recorded for it, on 1 and 2 processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.golden import platform, recorded, run_demo


@pytest.mark.deep
def test_the_demo_is_the_recorded_one_on_1_and_2_processes(tmp_path: Path) -> None:
    one, two = (run_demo(tmp_path / str(num_ranks), num_ranks) for num_ranks in (1, 2))
    assert one == two
    wanted = recorded("demo")
    if wanted is None:
        pytest.skip(f"1 and 2 processes agree; no digests are recorded for {platform()}")
    assert one == wanted
