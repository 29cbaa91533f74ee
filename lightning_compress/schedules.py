"""How much: schedules are pure functions from progress in [0, 1] to a value.

A schedule knows neither Trainer nor steps: a `Window` turns the Trainer's position into progress, and the caller
decides what the value means (a sparsity, a weight).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_compress.errors import invalid, is_number


class Schedule(ABC):
    """Base of all schedules: tells which value holds at which progress.

    A subclass implements `fraction`, which must map 1 to 1, so that every schedule ends at exactly the final value.
    """

    @abstractmethod
    def fraction(self, progress: float) -> float:
        """Return the fraction of the way to the final value that is done at ``progress`` in [0, 1]."""

    def value(self, progress: float, final: float, initial: float = 0.0) -> float:
        """Return ``initial + (final - initial) * fraction(progress)``, at the end exactly ``final``.

        Args:
            progress: how much of the window is over; below 0 counts as 0, above 1 as 1.
            final: the value at progress 1.
            initial: the value where the fraction is 0.

        Example:
            >>> Linear().value(0.25, final=0.8)
            0.2
        """
        if progress >= 1.0:
            return final
        return initial + (final - initial) * self.fraction(max(progress, 0.0))


@dataclass(frozen=True)
class OneShot(Schedule):
    """Reaches the final value at once, when the window starts: ``f(p) = 1``.

    Example:
        >>> OneShot().fraction(0.0)
        1.0
    """

    def fraction(self, progress: float) -> float:
        return 1.0


@dataclass(frozen=True)
class Linear(Schedule):
    """Moves at constant speed: ``f(p) = p``.

    Example:
        >>> Linear().fraction(0.5)
        0.5
    """

    def fraction(self, progress: float) -> float:
        return progress


@dataclass(frozen=True)
class Cosine(Schedule):
    """Moves slowly at both ends, along half a cosine wave: ``f(p) = (1 - cos(pi p)) / 2``.

    Example:
        >>> round(Cosine().fraction(0.5), 6)
        0.5
    """

    def fraction(self, progress: float) -> float:
        return (1.0 - math.cos(math.pi * progress)) / 2.0


@dataclass(frozen=True)
class Exponential(Schedule):
    """Moves fast first and then saturates: ``f(p) = (1 - exp(-rate p)) / (1 - exp(-rate))``.

    Args:
        rate: how sharply it saturates, above 0; 0 would be `Linear`.

    Raises:
        CompressionError: ``rate`` isn't a finite number above 0.

    Example:
        >>> round(Exponential(rate=3.0).fraction(0.5), 3)
        0.818
    """

    rate: float = 3.0

    def __post_init__(self) -> None:
        if not (is_number(self.rate) and self.rate > 0):
            raise invalid("rate", "be a finite number above 0", self.rate, "For constant speed use Linear.")

    def fraction(self, progress: float) -> float:
        return math.expm1(-self.rate * progress) / math.expm1(-self.rate)


@dataclass(frozen=True)
class Polynomial(Schedule):
    """Moves fast first and slowly at the end: ``f(p) = 1 - (1 - p)^power``.

    Args:
        power: above 0; 3 is usual for gradual pruning.

    Raises:
        CompressionError: ``power`` isn't a finite number above 0.

    Example:
        >>> Polynomial(power=3.0).fraction(0.5)
        0.875

    References:
        Zhu and Gupta, "To prune, or not to prune", 2017 (arXiv:1710.01878), equation 1.
    """

    power: float = 3.0

    def __post_init__(self) -> None:
        if not (is_number(self.power) and self.power > 0):
            raise invalid("power", "be a finite number above 0", self.power)

    def fraction(self, progress: float) -> float:
        return float(1.0 - (1.0 - progress) ** self.power)


@dataclass(frozen=True)
class Steps(Schedule):
    """Moves in steps: from each of ``points`` on, the value of ``fractions`` with the same index holds.

    Args:
        points: progress at each step, rising, in [0, 1].
        fractions: the fraction of the way that is done from each point on; the last must be 1.

    Raises:
        CompressionError: ``points`` don't rise or leave [0, 1], ``fractions`` leave [0, 1], are more or fewer than
            ``points``, or don't end with 1.

    Example:
        >>> Steps(points=[0.0, 0.5], fractions=[0.5, 1.0]).fraction(0.3)
        0.5
    """

    points: list[float] = field(default_factory=lambda: [0.0, 0.5, 1.0])
    fractions: list[float] = field(default_factory=lambda: [1 / 3, 2 / 3, 1.0])

    def __post_init__(self) -> None:
        for name in ("points", "fractions"):
            values = getattr(self, name)
            if not isinstance(values, Sequence) or not all(map(is_number, values)):
                raise invalid(name, "be a list of numbers", values)
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
