"""Weights and temperatures that change while the student learns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypedDict

from lightning_compress.distillation.losses.base import DistillationLoss
from lightning_compress.errors import invalid, nearest
from lightning_compress.schedules import Linear, Schedule
from lightning_compress.window import Bounds, Window

TASK = "task"


@dataclass(frozen=True)
class Ramp:
    """Moves one number of a loss over a window, from ``initial`` to the value that the loss itself has.

    Before the window ``initial`` holds, after it the loss's own value. To stop distilling at 80 % of the fit:
    ``SoftTarget(weight=0.0)`` with ``Ramp("soft_target", initial=0.75, schedule=OneShot(), window=Window(0.8))``.

    Args:
        loss: Name of the loss as in the log, an `fnmatch` pattern; ``task`` is the task loss, which has a ``weight``.
        number: Which of its numbers: ``weight``, ``temperature``, ...
        initial: The value before the window.
        schedule: The curve from there to the loss's own value; None: `Linear`.
        window: When the number moves.

    Raises:
        CompressionError: In the module or callback, if no loss has that name or number, or the value is out of range.

    Example:
        >>> ramp = Ramp("soft_target", "temperature", initial=8.0, window=Window(0.0, 0.5))
        >>> ramp.value(final=2.0, progress=0.25)
        6.5
    """

    loss: str
    number: str = "weight"
    initial: float = 0.0
    schedule: Schedule | None = None
    window: Window = field(default_factory=Window)

    def value(self, final: float, progress: float | None) -> float:
        """Return the number at ``progress`` in the window; a progress of None is before the window."""
        if progress is None:
            return self.initial
        return (self.schedule or Linear()).value(progress, final, self.initial)


class ClockState(TypedDict):
    """What a checkpoint holds of a `Clock`."""

    step: int
    bounds: list[tuple[int, int]] | None


class Clock:
    """How far the ramps are in their windows: counts optimizer steps; bounds are fixed when training starts.

    Example:
        >>> clock = Clock([Ramp("task", window=Window(0.0, 0.5))])
        >>> clock.start(total=100, per_epoch=10)
        >>> clock.step = 25
        >>> clock.weight("task", 1.0)
        0.5
    """

    def __init__(self, ramps: Sequence[Ramp]) -> None:
        self.ramps = list(ramps)
        self.reset()

    def reset(self) -> None:
        """Forget an earlier fit."""
        self.step = 0
        self.bounds: list[Bounds] | None = None

    def start(self, total: float, per_epoch: float) -> None:
        """Fix the bounds, unless a checkpoint brought them, in a fit of ``total`` optimizer steps."""
        if self.bounds is None:
            self.bounds = [ramp.window.bounds(total, per_epoch) for ramp in self.ramps]

    def loss(self, name: str, loss: DistillationLoss) -> DistillationLoss:
        """Return the loss that was requested as ``name`` with the numbers that it has now; before a fit its own."""
        now = {ramp.number: ramp.value(getattr(loss, ramp.number), progress) for ramp, progress in self._now(name)}
        return dataclasses.replace(loss, **now) if now else loss  # type: ignore[type-var]

    def weight(self, name: str, final: float) -> float:
        """Return the weight that a term without a loss has now."""
        for ramp, progress in self._now(name):
            final = ramp.value(final, progress)
        return final

    def _now(self, name: str) -> list[tuple[Ramp, float | None]]:
        pairs = zip(self.ramps, self.bounds or [], strict=False)
        return [(ramp, at.progress(self.step)) for ramp, at in pairs if fnmatchcase(name, ramp.loss)]

    def state_dict(self) -> dict[str, Any]:
        bounds = None if self.bounds is None else [[bounds.start, bounds.end] for bounds in self.bounds]
        return {"step": self.step, "bounds": bounds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]
        self.bounds = None if state["bounds"] is None else [Bounds(*pair) for pair in state["bounds"]]


def check_ramps(ramps: Sequence[Ramp], losses: Mapping[str, DistillationLoss]) -> None:
    """Raise if a ramp moves no number, or moves one out of its range."""
    if not isinstance(ramps, Sequence):
        raise invalid("ramps", "be a list of Ramp", ramps)
    for index, ramp in enumerate(ramps):
        if not isinstance(ramp, Ramp):
            raise invalid("ramps", "be a list of Ramp", ramp, 'Such as [Ramp("soft_target", initial=0.0)].')
        hit = {name: loss for name, loss in losses.items() if fnmatchcase(name, ramp.loss)}
        task = fnmatchcase(TASK, ramp.loss)
        moved = [*hit, *([TASK] if task else [])]
        if not hit and not task:
            raise invalid("loss", "name a loss for a ramp", ramp.loss, nearest(ramp.loss, [*losses, TASK]))
        for loss in hit.values():
            fields: tuple[Any, ...] = dataclasses.fields(loss) if dataclasses.is_dataclass(loss) else ()
            known = [field.name for field in fields if field.type in ("float", float)]
            if ramp.number not in known:
                raise invalid("number", f"name a number of {ramp.loss}", ramp.number, nearest(ramp.number, known))
            dataclasses.replace(loss, **{ramp.number: ramp.initial})  # type: ignore[type-var]
        earlier = [other for other in ramps[:index] if other.number == ramp.number]
        both = next((name for name in moved if any(fnmatchcase(name, other.loss) for other in earlier)), None)
        if both is not None:
            raise invalid("ramps", f"move the {ramp.number} of {both} once", [other.loss for other in (*earlier, ramp)])
        if task and ramp.number != "weight":
            raise invalid("number", "be 'weight' for the task", ramp.number)
