"""How far did a metric fall between two models on the same data, and how far may it have fallen in truth?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_Z = 1.6448536269514722
"""The 95 % quantile of the normal distribution."""


def student_t(degrees: int) -> float:
    """Return the 95 % quantile of Student's t, by its expansion in ``1 / degrees``, within half a percent.

    Example:
        >>> [round(student_t(degrees), 2) for degrees in (1, 2, 5, 30)]
        [6.31, 2.92, 2.01, 1.7]
    """
    if degrees == 1:
        return math.tan(0.45 * math.pi)
    if degrees == 2:
        return 0.9 * math.sqrt(2 / (1 - 0.9**2))
    z, n = _Z, degrees
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


@dataclass(frozen=True)
class Group:
    """Holds the metric of a model on a part of the data.

    Attributes:
        samples: in the part.
        value: of the metric.
    """

    samples: int
    value: float


@dataclass(frozen=True)
class Fall:
    """Says how far a metric fell between two models, measured on the same groups of samples.

    With ``d_g`` the fall in group g of ``n_g`` samples, ``N`` samples in ``G`` groups, and ``u`` what a single sample
    can change::

        D  = sum n_g d_g / N
        s  = sqrt(G / (G - 1) * sum n_g^2 (d_g - D)^2) / N
        bound = D + c + sqrt(c^2 + t^2 s^2),    c = t^2 u / (2 N)

    where ``t`` is the 95 % quantile of Student's t with ``G - 1`` degrees of freedom. By ``c`` the bound is more than
    0 even where no sample changed: that so few did is no proof that none would.

    Attributes:
        before: the metric of the first model.
        after: that of the second.
        fall: ``D``, above 0 where it got worse.
        error: ``s``, the standard error of the fall.
        samples: ``N``.
        quantile: ``t``.
        unit: ``u``.

    Example:
        >>> floats, int8 = [Group(50, 0.9), Group(50, 0.8)], [Group(50, 0.88), Group(50, 0.8)]
        >>> fall = Fall.between(floats, int8, "max", unit=0.0)
        >>> round(fall.fall, 4), round(fall.error, 4), round(fall.bound, 4)
        (0.01, 0.01, 0.0731)

    References:
        Wilson, "Probable inference, the law of succession, and statistical inference", 1927, for the bound of a share,
        of which this is the form for any paired difference.
    """

    before: float
    after: float
    fall: float
    error: float
    samples: int
    quantile: float
    unit: float

    @classmethod
    def between(cls, before: Sequence[Group], after: Sequence[Group], mode: str, unit: float) -> Fall:
        """Compare the metric of two models on the same groups; ``mode`` is ``max`` where more is better."""
        sizes = [group.samples for group in before]
        samples = sum(sizes)
        sign = 1.0 if mode == "max" else -1.0
        falls = [sign * (first.value - second.value) for first, second in zip(before, after, strict=True)]
        fall = _mean(sizes, falls)
        spread = sum((size * (value - fall)) ** 2 for size, value in zip(sizes, falls, strict=True))
        error = math.sqrt(len(sizes) / (len(sizes) - 1) * spread) / samples
        first, second = (_mean(sizes, [group.value for group in groups]) for groups in (before, after))
        return cls(first, second, fall, error, samples, student_t(len(sizes) - 1), unit)

    def __str__(self) -> str:
        said = f"a fall of {self.fall:.4f}, at most {self.bound:.4f} with 95 % confidence ({self.samples:,} samples)"
        return said.replace("-0.0000", "0.0000")

    @property
    def bound(self) -> float:
        """What the fall is below with 95 % confidence."""
        c = self.quantile**2 * self.unit / (2 * self.samples)
        return self.fall + c + math.sqrt(c**2 + (self.quantile * self.error) ** 2)

    def needed(self, max_drop: float) -> int | None:
        """Return of how many such samples `bound` would be ``max_drop``; None where no number is enough.

        That is ``t^2 (N s^2 + u m) / m^2`` with ``m = max_drop - D``.

        Example:
            >>> Fall(0.9, 0.9, 0.0, 0.0, samples=40, quantile=1.7, unit=1.0).needed(0.01)
            289
        """
        margin = max_drop - self.fall
        if not margin > 0:  # nor is it where a metric isn't a number
            return None
        variance = self.samples * self.error**2
        return math.ceil(round(self.quantile**2 * (variance + self.unit * margin) / margin**2, 6))


def unit_of(groups: Sequence[Group]) -> float:
    """Return what one sample is taken to be able to change of a metric: 1, or its largest value where that is more.

    Example:
        >>> unit_of([Group(8, 0.5)]), unit_of([Group(8, 97.5), Group(8, 95.0)])
        (1.0, 97.5)
    """
    return max([1.0, *(abs(group.value) for group in groups if math.isfinite(group.value))])


def _mean(sizes: Sequence[int], values: Sequence[float]) -> float:
    return sum(size * value for size, value in zip(sizes, values, strict=True)) / sum(sizes)
