"""Means and paired differences over seeds and items, with intervals that count both as draws.

An arm's outcomes are a table ``[num_seeds, num_items]``: every seed meets the same items, so that
seeds and items are crossed, and a mean varies with both. Resampling seeds and items independently
("pigeonhole bootstrap", Owen 2007, Annals of Applied Statistics 1) estimates that variance, but
with three seeds its own draws are few and it counts the interaction three times. This module takes
the closed form that it aims at, the variance components of a two-way table (Cornfield and Tukey
1956), with Student's t at Satterthwaite's degrees of freedom (1946).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

import numpy as np

from fedsim.base.errors import DataError
from fedsim.evaluate.intervals import near_an_end

POWER: Final = 0.8
"""Chance that :func:`detectable`'s difference is seen."""


@dataclass(frozen=True)
class Effect:
    """A mean, or a mean difference.

    Attributes:
        mean: over seeds and items.
        low: lower end of the 95 % interval; −inf (and ``high`` inf) where there is only one
            outcome.
        high: its upper end.
        num_seeds: rows of the table; with one, only items count as draws.
        num_items: columns of the table; with one, only seeds do.
    """

    mean: float
    low: float
    high: float
    num_seeds: int
    num_items: int

    @property
    def sign(self) -> int:
        """+1 or −1 where the interval leaves out 0; else 0."""
        return (self.low > 0) - (self.high < 0)

    def shown(self, digits: int, sign: str = "") -> str:
        """``+1.2 [+0.3, +2.1]``, or only the mean where there is no interval.

        Args:
            sign: a format's sign option.
        """
        form = f"{sign}.{digits}f"
        if math.isinf(self.low):
            return f"{self.mean:{form}} (one outcome)"
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"


def estimate(sample: np.ndarray, bounds: tuple[float, float] | None = None) -> Effect:
    """Mean of an arm with its 95 % interval.

    Args:
        sample: ``[num_seeds, num_items]``, finite.
        bounds: ends of the scale, which no interval leaves. Near an end of a rate's scale (one that
            begins at 0) the interval also holds Wilson's for as many items as there are: what
            hardly varies does not say how far it could.

    Raises:
        DataError: the table is empty or holds NaN or infinity.
    """
    found = _effect(_checked(sample))
    if bounds is None or math.isinf(found.low):
        return found
    low, high = max(found.low, bounds[0]), min(found.high, bounds[1])
    if bounds[0] == 0 and found.num_items > 1:  # a rate, not points
        low, high = near_an_end(found.mean, low, high, bounds[1], found.num_items)
    return Effect(found.mean, low, high, found.num_seeds, found.num_items)


def difference(
    treated: np.ndarray,
    control: np.ndarray,
    bounds: tuple[float, float] | None = None,
) -> Effect:
    """Mean of ``treated − control``, paired by seed and item, with its 95 % interval.

    Args:
        treated: ``[num_seeds, num_items]``.
        control: the same seeds and items.
        bounds: ends of the scale of both; no difference exceeds its width.

    Raises:
        DataError: the tables do not pair, or as of :func:`estimate`.
    """
    found = _effect(_paired(treated, control))
    if bounds is None or math.isinf(found.low):
        return found
    width = bounds[1] - bounds[0]
    return replace(found, low=max(found.low, -width), high=min(found.high, width))


def detectable(treated: np.ndarray, control: np.ndarray) -> float | None:
    """Smallest true difference that is seen at the 5 % level with 80 % power.

    It is ``(t(0.975) + t(0.8)) · standard error`` of the paired difference; None where the data do
    not vary.
    """
    error, df = _standard_error(_paired(treated, control))
    if error <= 0:
        return None
    return (t_quantile(0.975, df) + t_quantile(POWER, df)) * error


def shown_detectable(smallest: float | None, digits: int, bounds: tuple[float, float]) -> str:
    """:func:`detectable` in words: a number, ``more than the scale``, or "" for None.

    Args:
        bounds: ends of the figure's scale.
    """
    if smallest is None:
        return ""
    if smallest > bounds[1] - bounds[0]:
        return "more than the scale"
    return f"{smallest:.{digits}f}"


def verdict(effect: Effect, sign: int) -> str:
    """Verdict on the claim that a difference has ``sign`` (+1 or −1); one seed decides nothing."""
    if effect.sign == 0 or effect.num_seeds == 1:
        return "cannot tell"
    return "reproduced" if effect.sign == sign else "contradicted"


@lru_cache
def t_quantile(p: float, df: float) -> float:
    """Quantile of Student's t with ``df`` ≥ 1, to 2e-4 of its size for p up to 0.975.

    With ``t = √df · tan θ`` the density in θ is proportional to ``cos(θ)^(df − 1)`` on a finite
    range.
    """
    assert 0 < p < 1 and df >= 1, f"no quantile: p={p}, df={df}"
    df = min(df, 1e6)  # from there on it is the normal's

    # Trapezoidal rule for the distribution function on a grid of angles, then its inverse.
    reach = min(math.pi / 2, 40 / math.sqrt(df))
    theta = np.linspace(-reach, reach, 40_001)
    density = np.cos(theta) ** (df - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(math.sqrt(df) * math.tan(np.interp(p, mass / mass[-1], theta)))


def _effect(table: np.ndarray) -> Effect:
    mean = float(table.mean())
    error, df = _standard_error(table)
    half = 0.0  # of the interval's width
    if error > 0:
        half = t_quantile(0.975, df) * error
    elif table.shape[1] == 1:  # one score, or the same from every seed: its spread is unknown
        half = math.inf
    return Effect(mean, mean - half, mean + half, *table.shape)


def _standard_error(table: np.ndarray) -> tuple[float, float]:
    """Standard error of the mean, and its degrees of freedom (at least 1).

    With mean squares of seeds, items and their interaction, the variance of the mean is
    ``(MS_seeds + MS_items − MS_interaction) / (num_seeds · num_items)``, and never taken for less
    than each of the two main parts by itself, which are what remains if one of the two does not
    vary.
    """
    num_seeds, num_items = table.shape
    total = num_seeds * num_items
    mean = table.mean()

    # Mean squares of the seeds' and the items' means: deviations [num_seeds], [num_items].
    rows, columns = table.mean(axis=1) - mean, table.mean(axis=0) - mean
    ms_seeds = num_items * float((rows**2).sum()) / max(num_seeds - 1, 1)
    ms_items = num_seeds * float((columns**2).sum()) / max(num_items - 1, 1)
    if num_seeds == 1 or num_items == 1:
        return math.sqrt((ms_seeds + ms_items) / total), max(total - 1.0, 1.0)

    # Mean square of the interaction: [num_seeds, num_items].
    df_both = (num_seeds - 1) * (num_items - 1)
    residual = table - mean - rows[:, None] - columns[None, :]
    ms_both = float((residual**2).sum()) / df_both
    variance = max(ms_seeds + ms_items - ms_both, ms_seeds, ms_items)

    # Satterthwaite's degrees of freedom.
    spread = ms_seeds**2 / (num_seeds - 1) + ms_items**2 / (num_items - 1) + ms_both**2 / df_both
    df = float(num_seeds - 1)
    if spread > 0:
        df = max(variance**2 / spread, 1.0)
    return math.sqrt(variance / total), df


def _paired(treated: np.ndarray, control: np.ndarray) -> np.ndarray:
    if treated.shape != control.shape:
        raise DataError(
            f"two arms of {treated.shape} and {control.shape} seeds and items do not pair; run the "
            "same seeds on the same benchmark files"
        )
    return _checked(treated) - _checked(control)


def _checked(sample: np.ndarray) -> np.ndarray:
    table = np.asarray(sample, dtype=np.float64)
    if table.ndim != 2 or table.size == 0 or not np.isfinite(table).all():
        raise DataError(
            f"outcomes of shape {table.shape}: must be a finite table of seeds and items; run the arm again",
        )
    return table
