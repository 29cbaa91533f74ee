"""Where was a metric before compression began, and how far below is it now?"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Baseline:
    """Follows a metric from validation to validation, and remembers where it was.

    Before compression begins the baseline is an exponential average of what validations gave::

        b_1 = v_1,    b_n = smoothing * b_(n-1) + (1 - smoothing) * v_n

    Args:
        mode: ``max`` where more is better, or ``min``.
        max_drop: what is too much, in the metric's own unit.
        smoothing: in [0, 1); 0 takes the last value.
        given: the baseline, where it is fixed.

    Attributes:
        value: the baseline; None where nothing is known yet.
        last: what the last validation gave.
        begun: whether compression has begun, so that the baseline stays.
        held: whether the metric is too far below.

    Example:
        >>> baseline = Baseline("max", 0.01, 0.5)
        >>> baseline.see(0.90), baseline.see(0.94)
        (False, False)
        >>> baseline.begun = True
        >>> round(baseline.value, 2), baseline.see(0.90), baseline.held, baseline.see(0.915), baseline.held
        (0.92, True, True, True, False)
    """

    mode: str
    max_drop: float
    smoothing: float
    given: float | None = None
    value: float | None = None
    last: float | None = None
    begun: bool = False
    held: bool = False

    def __post_init__(self) -> None:
        self.value = self.given

    def see(self, value: float) -> bool:
        """Take what a validation gave; return whether ``held`` is another now."""
        self.last, before = value, self.held
        if not self.begun:
            if self.given is not None:
                return False
            self.value = value if self.value is None else self.smoothing * self.value + (1 - self.smoothing) * value
            return False
        self.held = not self.fall <= self.max_drop  # that of a metric that isn't a number neither
        return self.held != before

    @property
    def fall(self) -> float:
        """How far below the baseline the last validation was."""
        if self.value is None or self.last is None:
            return 0.0
        return (self.value - self.last) * (1.0 if self.mode == "max" else -1.0)
