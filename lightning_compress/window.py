"""When: turns a Trainer's position into the progress of a window.

The position is the number of training batches that made an optimizer step, never ``global_step``, which counts the
steps of several optimizers several times.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import lightning.pytorch as pl

from lightning_compress.errors import CompressionError, invalid, is_count, is_number

Unit = Literal["fit", "epoch", "step"]


@dataclass(frozen=True)
class Window:
    """Says in which part of a fit a technique acts.

    Args:
        start: where it begins, in ``unit``.
        end: where it ends; None is the end of the fit.
        unit: ``fit`` (fraction of all optimizer steps), ``epoch`` or ``step`` (optimizer steps).
        every_n_steps: within the window, act at every n-th optimizer step; the end always acts.

    Raises:
        CompressionError: the window is empty or leaves the range of its unit.

    Example:
        >>> Window(start=0.1, end=0.75).bounds(total=200, per_epoch=20)
        Bounds(start=20, end=150)
        >>> Window(start=2, unit="epoch").bounds(total=200, per_epoch=20)
        Bounds(start=40, end=200)
    """

    start: float = 0.0
    end: float | None = None
    unit: Unit = "fit"
    every_n_steps: int = 1

    def __post_init__(self) -> None:
        if self.unit not in ("fit", "epoch", "step"):
            raise invalid("unit", "be 'fit', 'epoch' or 'step'", self.unit)
        if not (is_number(self.start) and self.start >= 0):
            raise invalid("start", "be at least 0", self.start)
        if self.end is not None and not (is_number(self.end) and self.end > self.start):
            raise invalid("end", f"lie after start={self.start}, or the window is empty", self.end)
        if self.unit == "fit" and (self.start >= 1 or (self.end is not None and self.end > 1)):
            name = "start" if self.start >= 1 else "end"
            remedy = "For absolute bounds use unit='step' or unit='epoch'."
            raise invalid(name, "lie in [0, 1] for unit='fit'", getattr(self, name), remedy)
        if not is_count(self.every_n_steps):
            raise invalid("every_n_steps", "be at least 1", self.every_n_steps)

    def bounds(self, total: float, per_epoch: float) -> Bounds:
        """Return the window in optimizer steps: ``floor(start)`` to ``ceil(end)``, so it is never empty.

        Args:
            total: optimizer steps of the whole fit; inf if unknown.
            per_epoch: optimizer steps of one epoch; inf if unknown.

        Raises:
            CompressionError: the unit needs a length that is unknown, or the fit ends before the window begins.
        """
        scale = {"fit": total, "epoch": per_epoch, "step": 1.0}[self.unit]
        if math.isinf(scale):
            raise CompressionError(
                f"`window` with unit={self.unit!r} must have a fit of known length. Received: a train loader without "
                "length or a Trainer without max_epochs and max_steps. Use Window(start, end, unit='step')."
            )
        end = total if self.end is None else self.end * scale
        if math.isinf(end):
            raise CompressionError(
                "`window` must have an end where the fit's length is unknown. Received: end=None. "
                "Use Window(start, end, unit='step')."
            )
        # Rounded first, as 0.7 * 10 is a hair above 7.
        bounds = Bounds(math.floor(round(self.start * scale, 6)), math.ceil(round(end, 6)))
        if bounds.start >= bounds.end or bounds.start >= total:
            raise CompressionError(
                f"`window` must begin before the fit ends. Received: start at optimizer step {bounds.start}, "
                f"end at {bounds.end}, in a fit of {total:g} optimizer steps."
            )
        return bounds


@dataclass(frozen=True)
class Bounds:
    """Holds a window's absolute bounds in optimizer steps, which are fixed once, when the fit starts."""

    start: int
    end: int

    def progress(self, step: int) -> float | None:
        """Return the progress in [0, 1] after ``step`` optimizer steps; None before the window.

        Example:
            >>> bounds = Bounds(20, 150)
            >>> bounds.progress(19), bounds.progress(85), bounds.progress(200)
            (None, 0.5, 1.0)
        """
        if step < self.start:
            return None
        return min((step - self.start) / (self.end - self.start), 1.0)

    def is_due(self, step: int, every_n_steps: int) -> bool:
        """Tell whether to act after ``step`` optimizer steps: at the start, at every n-th step and at the end."""
        inside = self.start <= step <= self.end
        return inside and ((step - self.start) % every_n_steps == 0 or step == self.end)

    def last_due(self, step: int, every_n_steps: int) -> int | None:
        """Return the last step up to ``step`` at which to act; None if there is none.

        Example:
            >>> [Bounds(20, 45).last_due(step, 10) for step in (19, 20, 39, 46)]
            [None, 20, 30, 45]
        """
        if step < self.start:
            return None
        return self.end if step >= self.end else step - (step - self.start) % every_n_steps


@dataclass(frozen=True)
class Pace:
    """Says how a window's progress goes on after it was held: what is left of it takes what is left of the time.

    Args:
        at: the progress of time when it was last held.
        done: the progress that was made by then.

    Example:
        >>> Pace().progress(0.6), Pace(at=0.5, done=0.25).progress(0.5), Pace(at=0.5, done=0.25).progress(0.75)
        (0.6, 0.25, 0.625)
    """

    at: float = 0.0
    done: float = 0.0

    def progress(self, time: float) -> float:
        """Return the progress at a ``time`` in [0, 1]; at 1 it is 1, unless it is held then."""
        if time <= self.at:
            return self.done
        return 1.0 if time >= 1.0 else self.done + (1.0 - self.done) * (time - self.at) / (1.0 - self.at)


def fit_length(trainer: pl.Trainer) -> tuple[float, float]:
    """Count the batches that will make an optimizer step, in the rest of this fit and in an epoch; inf where unknown.

    The rest is the whole fit, unless the Trainer goes on from an earlier fit or from a checkpoint that knew nothing of
    the window. The extra epoch in which stochastic weight averaging renews BatchNorm statistics makes no steps.
    """
    batches = trainer.num_training_batches
    epochs = _epochs(trainer)
    accumulate = _accumulation(trainer)
    first = trainer.current_epoch
    per_epoch = _steps(batches, accumulate(first))
    ahead = range(first, first if math.isinf(epochs) else int(epochs))
    total = math.inf if math.isinf(epochs) else sum(_steps(batches, accumulate(epoch)) for epoch in ahead)
    if trainer.max_steps != -1:
        # max_steps counts the steps of every optimizer; with manual optimization each normally makes one a batch.
        manual = not trainer.lightning_module.automatic_optimization
        steps = trainer.max_steps - trainer.global_step
        total = min(total, math.ceil(steps / max(len(trainer.optimizers) if manual else 1, 1)))
    return total, per_epoch


def _steps(batches: float, accumulate: int) -> float:
    return math.ceil(batches / accumulate) if math.isfinite(batches) else math.inf


def _accumulation(trainer: pl.Trainer) -> Callable[[int], int]:
    """Return the function from an epoch to the number of batches that its optimizer steps accumulate."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if hasattr(callback, "get_accumulate_grad_batches"):  # GradientAccumulationScheduler, of either package
            return callback.get_accumulate_grad_batches  # type: ignore[no-any-return]
    return lambda epoch: trainer.accumulate_grad_batches


def _epochs(trainer: pl.Trainer) -> float:
    epochs = trainer.max_epochs
    if epochs is None or epochs == -1:
        return math.inf
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if hasattr(callback, "swa_end") and isinstance(getattr(callback, "_max_epochs", None), int):
            epochs = min(epochs, callback._max_epochs)
    return epochs
