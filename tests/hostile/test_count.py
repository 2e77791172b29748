"""At least 1,000 generated cases of hostile input are tried in every run."""

from __future__ import annotations

import re
from pathlib import Path


def test_at_least_a_thousand_cases() -> None:
    files = sorted(Path(__file__).parent.glob("test_*.py"))
    numbers = {file.stem: sum(map(int, re.findall(r"^@cases\((\d+)\)", file.read_text(), re.M))) for file in files}
    assert sum(numbers.values()) >= 1000, numbers
