"""Rates, means and slopes with their counts and 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, pairwise
from statistics import NormalDist
from typing import Final

Z_95: Final = NormalDist().inv_cdf(0.975)
"""1.95996…, the two-sided 95 % point of the normal distribution."""


FEW: Final = 5.0
"""Expected successes or failures below which a rate's spread does not suffice for an interval."""


@dataclass(frozen=True)
class Rate:
    """A share of counted things with Wilson's 95 % score interval.

    Wilson's interval (Wilson 1927) is inside [0, 1] and covers the truth also near 0 % and 100 %,
    where safety rates usually are.

    Attributes:
        successes: 0 to ``total``.
        total: at least 1.
    """

    successes: int
    total: int

    def __post_init__(self) -> None:
        is_rate = 0 <= self.successes <= self.total and self.total > 0
        assert is_rate, f"not a rate: {self.successes} of {self.total}"

    @classmethod
    def of(cls, flags: Sequence[bool]) -> Rate:
        """Count the true ones of ``flags``."""
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
    """Compute Wilson's 95 % score interval of a share of ``total`` draws (Wilson 1927).

    Args:
        share: 0 to 1; not necessarily a whole number of draws, as a mean over seeds is none.
        total: above 0.
    """
    # Symbols as in the paper: n draws, share p, z².
    n, p, zz = total, share, Z_95 * Z_95
    centre = (p + zz / (2 * n)) / (1 + zz / n)
    half = Z_95 * math.sqrt(p * (1 - p) / n + zz / (4 * n * n)) / (1 + zz / n)
    low, high = max(0.0, centre - half), min(1.0, centre + half)

    # The formula gives exactly 0 and 1 here, but for rounding.
    if p == 0:
        low = 0.0
    if p == 1:
        high = 1.0
    return low, high


def near_an_end(
    mean: float,
    low: float,
    high: float,
    top: float,
    total: float,
) -> tuple[float, float]:
    """Cut a rate's interval to its scale and widen it near an end of the scale.

    Below :data:`FEW` expected successes or failures the result includes Wilson's interval: values
    that hardly vary show too small a spread.

    Args:
        mean: 0 to ``top``.
        low: lower end of the interval.
        high: upper end.
        top: upper end of the scale, such as 100 for percent.
        total: draws behind the rate.
    """
    # The interval on the scale, and the share from 0 to 1.
    share = min(max(mean / top, 0.0), 1.0)
    low, high = max(low, 0.0), min(high, top)
    # Near an end: the union with Wilson's interval.
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
        """Compute the mean and mean ± t(0.975, n − 1) · s / √n.

        Here s is the sample standard deviation.

        Args:
            values: at least one.
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
        """Compute the mean of all values; its interval takes only the groups as independent.

        The value is a ratio of two sums over groups, Σ values / Σ sizes, and its variance the ratio
        estimator's by linearisation (Cochran 1977, section 6.3), with groups − 1 degrees of
        freedom. Groups of one size give :meth:`of` of their means. ``count`` is the number of
        groups.

        Args:
            groups: at least one, each of at least one value.
        """
        n, num_values = len(groups), sum(len(group) for group in groups)
        assert n > 0 and all(groups), "a mean needs a value in each group"
        mean = math.fsum(chain.from_iterable(groups)) / num_values
        if n == 1:
            return cls(mean, mean, mean, 1)

        # Residual of a group: sum of its values − size · mean.
        squares = []
        for group in groups:
            residual = math.fsum(value - mean for value in group)
            squares.append(residual * residual)
        half = t_95(n - 1) * math.sqrt(n / (n - 1) * math.fsum(squares)) / num_values
        return cls(mean, mean - half, mean + half, n)


@dataclass(frozen=True)
class Slope:
    """Growth of a series from one value to the next, by least squares, with Student's interval.

    Attributes:
        value: growth per step.
        low: lower end of the 95 % interval.
        high: upper end.
        count: number of values.
    """

    value: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float], num_blocks: int = 10) -> Slope:
        """Fit the slope over the means of blocks of values.

        The interval has blocks − 2 degrees of freedom. Neighbours in a series depend on each other,
        which would make an interval over single values too narrow; blocks hardly do.

        Args:
            values: at least 3.
            num_blocks: blocks, whose lengths differ by at most one value. Fewer values than blocks
                are blocks of one value.
        """
        n, blocks = len(values), min(num_blocks, len(values))
        assert blocks >= 3, "a slope with an interval needs three values"
        # Ends of the blocks, as places in the series.
        ends = [i * n // blocks for i in range(blocks + 1)]

        # Differences from the first value: a constant series has a slope of exactly 0.
        from_first = [value - values[0] for value in values]
        means = [math.fsum(from_first[a:b]) / (b - a) for a, b in pairwise(ends)]
        middles = [(a + b) / 2 for a, b in pairwise(ends)]

        # Least squares over (middle, mean) of the blocks.
        centre, level = math.fsum(middles) / blocks, math.fsum(means) / blocks
        places = [middle - centre for middle in middles]
        spread = math.fsum(x * x for x in places)
        slope = math.fsum(x * y for x, y in zip(places, means, strict=True)) / spread

        # Student's interval from the residuals.
        residuals = [y - level - slope * x for x, y in zip(places, means, strict=True)]
        variance = math.fsum(r * r for r in residuals) / (blocks - 2) / spread
        half = t_95(blocks - 2) * math.sqrt(variance)
        return cls(slope, slope - half, slope + half, n)


@lru_cache(maxsize=256)
def t_95(freedom: int) -> float:
    """Compute the two-sided 95 % point of Student's t, such as 2.228 for 10 degrees of freedom.

    It is found by bisection of :func:`_t_mass` to the last bit that doubles resolve.

    Args:
        freedom: degrees of freedom, at least 1.
    """
    # The point is between 0 and 16: it is 12.7 for one degree of freedom, and falls.
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
    """Compute P(−t < T < t) for whole degrees of freedom.

    See Abramowitz & Stegun, 26.7.3 (odd) and 26.7.4 (even).
    """
    angle = math.atan(t / math.sqrt(freedom))
    cos, sin = math.cos(angle), math.sin(angle)
    odd = freedom % 2
    # The sum in brackets: cos · (1 + 2/3 · cos² + …) if odd, else 1 + 1/2 · cos² + …
    term = 1.0
    if odd:
        term = cos
    total = 0.0
    if freedom > 1:
        total = term
    for k in range(2 + odd, freedom - 1, 2):
        term *= cos * cos * (k - 1) / k
        total += term
    if odd:
        return 2 / math.pi * (angle + sin * total)
    return sin * total
