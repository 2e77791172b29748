"""Rates, means and slopes with their counts and 95 % intervals; nothing is reported without them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from statistics import NormalDist
from typing import Final

Z_95: Final = NormalDist().inv_cdf(0.975)
"""1.95996…, the two-sided 95 % point of the normal distribution."""


FEW: Final = 5.0
"""Below so many expected successes or failures a rate's interval is not taken from its spread
alone.
"""


@dataclass(frozen=True)
class Rate:
    """A share of counted things, ``successes`` of ``total`` (at least 1), with Wilson's 95 % score
    interval.

    Wilson's interval (Wilson 1927) stays inside [0, 1] and is honest at 0 % and 100 %, where safety
    rates live.
    """

    successes: int
    total: int

    def __post_init__(self) -> None:
        assert 0 <= self.successes <= self.total and self.total > 0, f"not a rate: {self.successes} of {self.total}"

    @classmethod
    def of(cls, flags: Sequence[bool]) -> Rate:
        """How many of ``flags`` are true."""
        return cls(sum(flags), len(flags))

    @property
    def value(self) -> float:
        """The share, 0 to 1."""
        return self.successes / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the 95 % interval, 0 to 1."""
        return wilson(self.value, self.total)

    @property
    def percent(self) -> float:
        """The share in percent."""
        return 100 * self.value

    @property
    def percent_interval(self) -> tuple[float, float]:
        """Lower and upper end of the 95 % interval in percent."""
        low, high = self.interval
        return 100 * low, 100 * high

    def __str__(self) -> str:
        low, high = self.percent_interval
        return f"{self.percent:.1f} % [{low:.1f}, {high:.1f}] of {self.total}"


def wilson(share: float, total: float) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share of ``total`` draws; the share may be a mean over
    seeds, and so any.
    """
    n, p, zz = total, share, Z_95 * Z_95
    centre = (p + zz / (2 * n)) / (1 + zz / n)
    half = Z_95 * math.sqrt(p * (1 - p) / n + zz / (4 * n * n)) / (1 + zz / n)
    low = 0.0 if p == 0 else max(0.0, centre - half)
    high = 1.0 if p == 1 else min(1.0, centre + half)
    return low, high


def near_an_end(
    mean: float,
    low: float,
    high: float,
    top: float,
    total: float,
) -> tuple[float, float]:
    """A rate's interval, kept on its scale; below :data:`FEW` successes or failures it also holds
    Wilson's.

    What hardly varies does not say how far it could.

    Args:
        mean: 0 to ``top``.
        top: upper end of the scale, such as 100 for percent.
        total: draws behind the rate.
    """
    share = min(max(mean / top, 0.0), 1.0)
    low, high = max(low, 0.0), min(high, top)
    if min(share, 1 - share) * total < FEW:
        least, most = wilson(share, total)
        low, high = min(low, top * least), max(high, top * most)
    return low, high


@dataclass(frozen=True)
class Mean:
    """The mean of ``count`` (at least 1) values with Student's 95 % t interval.

    Attributes:
        value: arithmetic mean.
        low: lower end of the interval; equal to ``value`` when there is one value only, which
            allows no interval.
        high: upper end.
        count: number of values.
    """

    value: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Mean of ``values`` and mean ± t(0.975, n − 1) · s / √n, with s the sample standard
        deviation.
        """
        n = len(values)
        assert n > 0, "a mean needs a value"
        mean = math.fsum(values) / n
        if n == 1:
            return cls(mean, mean, mean, 1)
        deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
        half = t_95(n - 1) * deviation / math.sqrt(n)
        return cls(mean, mean - half, mean + half, n)

    @classmethod
    def of_groups(cls, groups: Sequence[Sequence[float]]) -> Mean:
        """Mean of all values of ``groups`` (one or more each), whose interval takes only the groups
        as independent.

        The value is a ratio of two sums over groups, Σ values / Σ sizes, and its variance the ratio
        estimator's by linearisation (Cochran 1977, section 6.3), with groups − 1 degrees of
        freedom. Groups of one size give :meth:`of` of their means. ``count`` is the number of
        groups.
        """
        n, num_values = len(groups), sum(len(group) for group in groups)
        assert n > 0 and all(groups), "a mean needs a value in each group"
        mean = math.fsum(value for group in groups for value in group) / num_values
        if n == 1:
            return cls(mean, mean, mean, 1)
        residuals = [math.fsum(value - mean for value in group) for group in groups]
        half = t_95(n - 1) * math.sqrt(n / (n - 1) * math.fsum(r * r for r in residuals)) / num_values
        return cls(mean, mean - half, mean + half, n)


@dataclass(frozen=True)
class Slope:
    """How much a series grows from one value to the next, by least squares, with Student's 95 % t
    interval.

    Attributes:
        value: growth a step.
        low: lower end of the interval.
        high: upper end.
        count: number of values.
    """

    value: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float], num_blocks: int = 10) -> Slope:
        """The slope over the means of ``num_blocks`` blocks, as long as one another but for one
        value, with blocks − 2 degrees of freedom.

        Neighbours in a series depend on each other, which would make an interval over single values
        too narrow; blocks hardly do. Fewer values than blocks are blocks of one.

        Args:
            values: at least 3.
        """
        n, blocks = len(values), min(num_blocks, len(values))
        assert blocks >= 3, "a slope with an interval needs three values"
        ends = [i * n // blocks for i in range(blocks + 1)]
        # So that what stands still has a slope of exactly 0.
        from_first = [value - values[0] for value in values]
        means = [math.fsum(from_first[a:b]) / (b - a) for a, b in pairwise(ends)]
        middles = [(a + b) / 2 for a, b in pairwise(ends)]
        centre, level = math.fsum(middles) / blocks, math.fsum(means) / blocks
        places = [middle - centre for middle in middles]
        spread = math.fsum(x * x for x in places)
        slope = math.fsum(x * y for x, y in zip(places, means, strict=True)) / spread
        residuals = [y - level - slope * x for x, y in zip(places, means, strict=True)]
        half = t_95(blocks - 2) * math.sqrt(
            math.fsum(r * r for r in residuals) / (blocks - 2) / spread,
        )
        return cls(slope, slope - half, slope + half, n)


@lru_cache(maxsize=256)
def t_95(freedom: int) -> float:
    """The two-sided 95 % point of Student's t with ``freedom`` ≥ 1 degrees of freedom (2.228 for
    10).

    Found by bisection of :func:`_t_mass` to the last bit that doubles resolve.
    """
    low, high = 0.0, 16.0
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return middle
        if _t_mass(middle, freedom) < 0.95:
            low = middle
        else:
            high = middle


def _t_mass(t: float, freedom: int) -> float:
    """P(−t < T < t) for whole degrees of freedom (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    cos, sin = math.cos(angle), math.sin(angle)
    odd = freedom % 2
    term = cos if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= cos * cos * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sin * total) if odd else sin * total
