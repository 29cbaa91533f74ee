"""HOW MUCH: schedules, pure functions from progress in [0, 1] to a value.

A schedule knows neither Trainer nor steps: a `Window` turns the Trainer's position into progress, and
what the value means (a sparsity, a weight) is the caller's.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from lightning_compress.errors import invalid


class Schedule(ABC):
    """Base of all schedules: `value` at progress ``p``, as a fraction of the way to the final value.

    A subclass implements `fraction`, which must map 0 to its start and 1 to 1, so that every schedule
    ends at exactly the final value.
    """

    @abstractmethod
    def fraction(self, progress: float) -> float:
        """The fraction of the final value that is reached at ``progress`` in [0, 1]."""

    def value(self, progress: float, final: float, initial: float = 0.0) -> float:
        """The scheduled value: ``initial + (final - initial) * fraction(progress)``; exactly ``final`` at 1.

        Example:
            >>> Linear().value(0.25, final=0.8)
            0.2
        """
        if progress >= 1.0:
            return final
        return initial + (final - initial) * self.fraction(max(progress, 0.0))


@dataclass(frozen=True)
class OneShot(Schedule):
    """The final value at once, when the window starts: ``f(p) = 1``.

    Example:
        >>> OneShot().fraction(0.0)
        1.0
    """

    def fraction(self, progress: float) -> float:
        return 1.0


@dataclass(frozen=True)
class Linear(Schedule):
    """At constant speed: ``f(p) = p``.

    Example:
        >>> Linear().fraction(0.5)
        0.5
    """

    def fraction(self, progress: float) -> float:
        return progress


@dataclass(frozen=True)
class Cosine(Schedule):
    """Slow, fast, slow: ``f(p) = (1 - cos(pi p)) / 2`` (half a cosine wave).

    Example:
        >>> round(Cosine().fraction(0.5), 6)
        0.5
    """

    def fraction(self, progress: float) -> float:
        return (1.0 - math.cos(math.pi * progress)) / 2.0


@dataclass(frozen=True)
class Exponential(Schedule):
    """Fast first, saturating: ``f(p) = (1 - exp(-rate p)) / (1 - exp(-rate))``.

    Args:
        rate: how sharply it saturates, above 0; 0 would be `Linear`.

    Example:
        >>> round(Exponential(rate=3.0).fraction(0.5), 3)
        0.818
    """

    rate: float = 3.0

    def __post_init__(self) -> None:
        if not (self.rate > 0 and math.isfinite(self.rate)):
            raise invalid("rate", "be a finite number above 0", self.rate, "For constant speed use Linear.")

    def fraction(self, progress: float) -> float:
        return math.expm1(-self.rate * progress) / math.expm1(-self.rate)


@dataclass(frozen=True)
class Polynomial(Schedule):
    """Fast first, slow at the end: ``f(p) = 1 - (1 - p)^power``; power 3 is the usual gradual pruning.

    Args:
        power: above 0.

    Example:
        >>> Polynomial(power=3.0).fraction(0.5)
        0.875

    References:
        Zhu and Gupta, "To prune, or not to prune", 2017 (arXiv:1710.01878), equation 1.
    """

    power: float = 3.0

    def __post_init__(self) -> None:
        if not (self.power > 0 and math.isfinite(self.power)):
            raise invalid("power", "be a finite number above 0", self.power)

    def fraction(self, progress: float) -> float:
        return float(1.0 - (1.0 - progress) ** self.power)


@dataclass(frozen=True)
class Steps(Schedule):
    """A staircase: at each of ``points`` (progress) the fraction of ``fractions`` with the same index holds.

    Args:
        points: rising progress values in [0, 1].
        fractions: as many values; the last must be 1, so that the final value is reached.

    Example:
        >>> Steps(points=[0.0, 0.5], fractions=[0.5, 1.0]).fraction(0.3)
        0.5
    """

    points: list[float] = field(default_factory=lambda: [0.0, 0.5, 1.0])
    fractions: list[float] = field(default_factory=lambda: [1 / 3, 2 / 3, 1.0])

    def __post_init__(self) -> None:
        points = list(self.points)
        if not points or points != sorted(set(points)) or points[0] < 0 or points[-1] > 1:
            raise invalid("points", "be strictly rising and lie in [0, 1]", self.points)
        if not all(0 <= fraction <= 1 for fraction in self.fractions):
            raise invalid("fractions", "lie in [0, 1]", self.fractions)
        if len(self.fractions) != len(points) or self.fractions[-1] != 1.0:
            raise invalid("fractions", "have one value for each point and end with 1.0", self.fractions)

    def fraction(self, progress: float) -> float:
        reached = [fraction for point, fraction in zip(self.points, self.fractions, strict=True) if progress >= point]
        return reached[-1] if reached else 0.0
