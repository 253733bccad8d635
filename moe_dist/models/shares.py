"""Shares of counts, free of the rounding of floats: 0.07 of 100 is 7, but 0.07 * 100 is 7.000000000000001."""

from __future__ import annotations

import math
from fractions import Fraction


def written(value: float) -> Fraction:
    """The number that a person wrote, with a denominator of at most 10^9: 1.2 is 6/5, and 0.1 + 0.2 is 3/10."""
    return Fraction(str(value)).limit_denominator(10**9)


def ceil_share(share: float, count: int) -> int:
    """The least whole number that is not below `share` of `count`."""
    return math.ceil(written(share) * count)
