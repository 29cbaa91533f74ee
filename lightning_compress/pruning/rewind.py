"""Rewinding: weights and optimizer state are kept as they were at some step, and put back (lottery ticket)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from lightning_compress.errors import CompressionError
from lightning_compress.modules.paths import clean_name
from lightning_compress.modules.resizing import Cut, cut_state, with_inner
from lightning_compress.schedules import Schedule
from lightning_compress.window import Bounds, Unit, Window


@dataclass(frozen=True)
class Rewind:
    """Whenever weights were pruned, all others go back to where training was at ``to``, and train again.

    Parameters, buffers (BatchNorm statistics) and the optimizers' state go back; the learning rate keeps following the
    schedule of the whole fit. A round is the time between two prunings: give `ScheduledPruning` a `Steps` schedule or a
    window with ``every_n_steps``. The kept values are in the checkpoints of the fit, which grow by the size of weights
    and optimizer state.

    Args:
        to: the point to go back to, in ``unit``; 0 is the start of the fit. It lies before the window's start, or
            on it.
        unit: ``step`` (optimizer steps), ``epoch`` or ``fit`` (fraction of all optimizer steps).

    Raises:
        CompressionError: ``to`` is negative or leaves its unit's range.

    Example:
        >>> from lightning_compress import ScheduledPruning, Steps, Window
        >>> pruning = ScheduledPruning(
        ...     sparsity=0.9,
        ...     schedule=Steps([0.0, 0.5, 1.0], [0.5, 0.8, 1.0]),
        ...     window=Window(0.2, 0.8),
        ...     rewind=Rewind(to=1, unit="epoch"),
        ... )

    References:
        Frankle and Carbin, "The Lottery Ticket Hypothesis", 2019 (arXiv:1803.03635); Frankle et al., "Stabilizing the
        Lottery Ticket Hypothesis", 2019 (arXiv:1903.01611), for rewinding to a later step.
    """

    to: float = 0.0
    unit: Unit = "step"

    def __post_init__(self) -> None:
        Window(self.to, unit=self.unit)

    def step(self, total: float, per_epoch: float) -> int:
        """Count the optimizer steps before the point, in a fit of ``total`` of them; inf if unknown."""
        scale = {"fit": total, "epoch": per_epoch, "step": 1.0}[self.unit]
        if self.to and math.isinf(scale):
            raise CompressionError(
                f"`rewind` with unit={self.unit!r} must have a fit of known length. Received: {self}. Use unit='step'."
            )
        return round(self.to * scale) if self.to else 0


def check_rounds(step: int, bounds: Bounds, window: Window, schedule: Schedule) -> None:
    """Raise if the step to go back to lies in the window, or nothing is trained between two prunings."""
    if step > bounds.start:
        raise CompressionError(
            f"`rewind` must go back to a point before the window. Received: optimizer step {step}, and a window that "
            f"starts at step {bounds.start}. Start the window later."
        )
    amount, last = 0.0, -2
    for now in range(bounds.start, bounds.end + 1):
        value = schedule.value(bounds.progress(now) or 0.0, 1.0)
        if bounds.is_due(now, window.every_n_steps) and value > amount:
            if last == now - 1:
                raise CompressionError(
                    f"`rewind` must leave training between two prunings. Received: a schedule that prunes at steps "
                    f"{last} and {now}. Use a Steps schedule, or a window with every_n_steps."
                )
            amount, last = value, now


class RewindPoint(TypedDict):
    """Parameters and buffers by their names, and each optimizer's state by parameter, as they were, on the CPU."""

    tensors: dict[str, Tensor]
    optimizers: list[list[dict[str, Any]]]


def record_point(model: nn.Module, optimizers: Sequence[Optimizer]) -> RewindPoint:
    """Copy everything that training has changed so far: parameters, persistent buffers, the optimizers' state."""
    copies: dict[int, Tensor] = {}
    tensors = {
        name: copies.setdefault(id(tensor), tensor.detach().cpu().clone()) for name, tensor in _tensors(model).items()
    }
    states = [
        [_copied(dict(optimizer.state.get(parameter, {})), "cpu") for parameter in _parameters(optimizer)]
        for optimizer in with_inner(optimizers)
    ]
    return {"tensors": tensors, "optimizers": states}


@torch.no_grad()
def rewind_(point: RewindPoint, model: nn.Module, optimizers: Sequence[Optimizer], copies: Iterable[nn.Module]) -> None:
    """Bring model, copies and optimizers back to a point; parameters stay the same objects, learning rates stay."""
    for module in (model, *copies):
        now = _tensors(module)
        for name, tensor in point["tensors"].items():
            if name in now:
                now[name].copy_(tensor)
    for optimizer, states in zip(with_inner(optimizers), point["optimizers"], strict=True):
        for parameter, state in zip(_parameters(optimizer), states, strict=False):
            current = optimizer.state.pop(parameter, {})
            devices = {name: value.device for name, value in current.items() if isinstance(value, Tensor)}
            if state:
                optimizer.state[parameter] = {
                    name: _copied(value, devices.get(name, parameter.device)) for name, value in state.items()
                }


def cut_point(point: RewindPoint, optimizers: Sequence[Optimizer], cut: Cut) -> RewindPoint:
    """Cut a point as the model was cut meanwhile."""
    states = []
    for optimizer, held in zip(with_inner(optimizers), point["optimizers"], strict=True):
        cut_states = []
        for parameter, state in zip(_parameters(optimizer), held, strict=False):
            change = cut.changes.get(parameter)
            cut_states.append(state if change is None else cut_state(state, *change) or {})
        states.append(cut_states)
    return {"tensors": {name: cut.of(name, tensor) for name, tensor in point["tensors"].items()}, "optimizers": states}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict(keep_vars=True)
    return {clean_name(name): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _copied(state: Any, device: Any) -> Any:
    return pytree.tree_map(
        lambda leaf: leaf.detach().to(device, copy=True) if isinstance(leaf, Tensor) else copy.deepcopy(leaf), state
    )
