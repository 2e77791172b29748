"""The parts of ``python -m tools.gpu check`` as tests: ``pytest -m gpu`` on a machine with a GPU, about 7 minutes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools.gpu.calls import CALLS

ROOT = Path(__file__).parents[2]


@pytest.mark.gpu
@pytest.mark.parametrize("part", CALLS["check"].parts)
def test_a_part_of_the_check_is_right_on_this_gpu(part: str, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch has no GPU here")
    words = ["-m", "tools.gpu", "check", "--parts", part, "--out", str(tmp_path)]
    ended = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
