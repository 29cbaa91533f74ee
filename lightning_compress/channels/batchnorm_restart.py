"""Restarts the running statistics of norms after a cut: those of the wider network are forgotten.

Those that move by themselves get a higher momentum for a while. Those that can't (a norm in evaluation mode or frozen,
whoever did that; momentum 0) describe inputs that are gone, so they are estimated anew where the cut changed what
reaches the norm; their modes and momenta stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from lightning_compress.channels.tracing.deterministic import deterministic
from lightning_compress.modules.paths import modules_of
from lightning_compress.modules.resizing import KeptIndices

_STATISTICS = ("running_mean", "running_var")
_LAST = 100
_PASSES = 10
"""Batches from which statistics that can't move are estimated: as many as count with the usual momentum."""
_USUAL = 0.1
_SAME = 1e-3
"""Where what reaches a norm differs by less of its standard deviation, the cut hasn't changed it."""


class RestartState(TypedDict):
    """What a checkpoint holds of a `BatchNormRestart`."""

    batches: int | None
    norms: list[str]


class BatchNormRestart:
    """Lets every norm average over the batches since the last cut, until that is what its momentum does anyway.

    The first batch is the one on which the cut was planned. In the ``k``-th one the momentum is ``max(momentum, 1 /
    k)``, so ``running = mean of batches 1..k``; with the usual momentum of 0.1 that is over after ten batches.

    Attributes:
        batches: since the last cut, with the one on which it was planned; None before the first.
        norms: paths of the norms whose inputs a cut has changed.

    Example:
        >>> norm, restart = nn.BatchNorm1d(1), BatchNormRestart()
        >>> restart.batches = 0
        >>> with torch.no_grad():
        ...     for value in (2.0, 4.0):
        ...         restart.begin_(norm)
        ...         _ = norm(torch.full((2, 1), value))
        ...         restart.end_(norm)
        >>> norm.running_mean, norm.momentum
        (tensor([3.]), 0.1)
    """

    def __init__(self) -> None:
        self.batches: int | None = None
        self.norms: list[str] = []
        self._momenta: dict[int, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold: plain data."""
        return {"batches": self.batches, "norms": self.norms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.batches, self.norms = state["batches"], list(state["norms"])

    def restart_(
        self,
        models: Iterable[nn.Module],
        probe: nn.Module,
        run: Callable[[nn.Module], Any],
        before: Mapping[str, Tensor],
        kept: Mapping[str, KeptIndices],
    ) -> None:
        """Estimate the statistics of the norms behind removed channels, in one step of a copy of the narrower module.

        What `input_moments` saw ``before`` of the wider module in the same step tells which norms these are.
        """
        changed = set[str]()

        def see(path: str, norm: nn.Module, now: Tensor) -> None:
            indices = kept.get(f"{path}.running_mean".lstrip("."), {}).get(0)
            wide = before.get(path)
            if wide is None or _differ(wide if indices is None else wide[:, indices.to(wide.device)], now):
                _move_(norm, now, 1.0)
                changed.add(path)

        _watch(probe, run, see)
        self.batches, self.norms = 1, sorted(changed | set(self.norms))
        _copy_(probe, models, changed)

    def awaits_pass(self, model: nn.Module) -> bool:
        """Whether a copy must run this batch too, for norms that don't update their statistics themselves."""
        return self.batches is not None and self.batches < _PASSES and bool(self._still(model))

    def follow_(self, models: Iterable[nn.Module], probe: nn.Module, run: Callable[[nn.Module], Any]) -> None:
        """Average one more batch into the statistics of norms that don't update them themselves."""
        assert self.batches is not None
        still, weight = self._still(probe), 1.0 / (self.batches + 1)
        _watch(probe, run, lambda path, norm, now: _move_(norm, now, weight) if path in still else None)
        _copy_(probe, models, still)

    def _still(self, model: nn.Module) -> set[str]:
        norms = _norms(model)
        return {path for path in self.norms if path in norms and not _follows(norms[path])}

    def begin_(self, model: nn.Module) -> None:
        """Set each norm's momentum for the coming batch."""
        if self.batches is None or self.batches >= _LAST:
            return
        wanted = 1.0 / (self.batches + 1)
        norms = _norms(model)
        changed = {id(norms[path].running_mean) for path in self.norms if path in norms}
        for module in model.modules():
            # Momentum 0 is a way to freeze: what no cut has changed stays.
            if isinstance(module, _NormBase) and _follows(module) and module.momentum is not None:
                held = id(module.running_mean)
                if module.momentum < wanted and (module.momentum > 0 or held in changed):
                    self._momenta[held] = module.momentum
                    # One that stands still afterwards had better end near the weights' last values.
                    module.momentum = wanted if module.momentum > 0 else max(wanted, _USUAL)

    def end_(self, model: nn.Module) -> None:
        """Restore each norm's momentum after a batch, or when a fit breaks off."""
        if self.batches is not None:
            self.batches += 1
        for module in model.modules():
            if isinstance(module, _NormBase) and id(module.running_mean) in self._momenta:
                module.momentum = self._momenta[id(module.running_mean)]
        self._momenta = {}


def input_moments(model: nn.Module, run: Callable[[nn.Module], Any]) -> dict[str, Tensor]:
    """Return mean and variance ``(2, channels)`` of the input of each norm with running statistics in one run."""
    found: dict[str, Tensor] = {}
    _watch(model, run, lambda path, norm, now: found.update({path: now}))
    return found


def _norms(model: nn.Module) -> dict[str, Any]:
    """Return what keeps running statistics, by clean path: torch's norms, and frozen ones of other libraries."""
    return {
        path: module
        for path, module in modules_of(model).items()
        if all(isinstance(module._buffers.get(name), Tensor) for name in _STATISTICS)
    }


def _follows(norm: Any) -> bool:
    """Whether a norm updates its statistics in training, unless its momentum is 0."""
    return isinstance(norm, _NormBase) and norm.training and norm.track_running_stats


def _watch(model: nn.Module, run: Callable[[nn.Module], Any], see: Callable[[str, nn.Module, Tensor], Any]) -> None:
    """Run once, and call ``see(path, norm, moments)`` with the moments of each norm's first input."""
    seen = set[str]()

    def enter(path: str, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        moments = _moments(norm, next(iter((*args, *kwargs.values()))))
        if path not in seen and moments is not None:
            seen.add(path)
            see(path, norm, moments)

    with ExitStack() as hooks, deterministic(), torch.compiler.set_stance("force_eager"):
        for path, norm in _norms(model).items():
            hooks.enter_context(norm.register_forward_pre_hook(partial(enter, path), with_kwargs=True))
        run(model)


def _moments(norm: Any, x: Tensor) -> Tensor | None:
    x = x.detach().float()
    if isinstance(norm, _InstanceNorm):
        x = x if x.dim() == norm._get_no_batch_dim() + 1 else x[None]
        var, mean = torch.var_mean(x.flatten(2), 2)
        return torch.stack((mean.mean(0), var.mean(0)))
    if x.dim() < 2 or x.shape[1] != len(norm.running_mean):
        return None
    values = x.transpose(0, 1).flatten(1)
    if values.shape[1] == 1:  # one value has no variance
        return torch.stack((values[:, 0], norm.running_var.float()))
    var, mean = torch.var_mean(values, 1)
    return torch.stack((mean, var))


def _differ(before: Tensor, now: Tensor) -> bool:
    (mean, std), (new_mean, new_std) = ((mean, var.sqrt()) for mean, var in (before, now))
    scale = std + std.mean()  # a channel that is always 0 differs by rounding
    return bool((torch.fmax((mean - new_mean).abs(), (std - new_std).abs()) > _SAME * scale).any())


@torch.no_grad()
def _move_(norm: Any, moments: Tensor, weight: float) -> None:
    for name, value in zip(_STATISTICS, moments, strict=True):
        buffer = norm._buffers[name]
        buffer.lerp_(value.to(buffer.dtype), weight)


@torch.no_grad()
def _copy_(probe: nn.Module, models: Iterable[nn.Module], paths: set[str]) -> None:
    source = _norms(probe)
    for model in models:
        for path, norm in _norms(model).items():
            if path not in paths:
                continue
            for name in _STATISTICS:
                norm._buffers[name].copy_(source[path]._buffers[name])
            if getattr(norm, "momentum", 0.0) is None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.fill_(1)  # by which such a norm takes the mean over all batches
