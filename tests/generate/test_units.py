"""Units of generation: all rows once, the longest first, and none that waits for a slot where there need not be one."""

from __future__ import annotations

import pytest

from fedsim.generate.units import MOST_UNITS, generation_units


@pytest.mark.parametrize(
    ("num_rows", "sizes"),
    [
        (0, []),
        (3, [3]),
        (11, [3, 4, 4]),
        (32, [4] * 8),
        (33, [3, 4, 4, 3, 4, 4, 3, 4, 4]),
        (4 * 17, [4] * 15 + [8]),
        (4 * 48, [12] * 16),
    ],
)
def test_units_are_fixed_by_length(num_rows: int, sizes: list[int]) -> None:
    """Of batch size 4: as many units as batches, but sixteen at most, of rows in descending order of length."""
    lengths = [1 + 7 * i % 13 for i in range(num_rows)]
    units = generation_units(lengths, 4)
    assert sorted(i for unit in units for i in unit) == list(range(num_rows))
    assert [len(unit) for unit in units] == sizes
    ordered = [(-lengths[i], i) for unit in units for i in unit]
    assert ordered == sorted(ordered)


@pytest.mark.parametrize("num_rows", [1, 63, 64, 65, 438, 450, 520, 1023, 1025, 1100, 5400])
def test_rows_that_all_run_to_the_limit_take_the_fewest_batches(num_rows: int) -> None:
    """A unit decodes as many batches one after the other as its rows need of 64 slots; together no more than all do."""
    units = generation_units([5] * num_rows, 64)
    waves = [-(-len(unit) // 64) for unit in units]
    assert sum(waves) == -(-num_rows // 64) and len(units) == min(sum(waves), MOST_UNITS)
    assert max(waves) - min(waves) <= 1
