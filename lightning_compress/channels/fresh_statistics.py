"""BatchNorm after a cut: running statistics of the wider network are forgotten as fast as new ones come."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_LAST = 100


class FreshStatistics:
    """Lets every BatchNorm average over the batches since the last cut, until that is what its momentum does anyway.

    In the ``k``-th batch after a cut the momentum is ``max(momentum, 1 / k)``, so ``running = mean of batches 1..k``;
    with the usual momentum of 0.1 that is over after ten batches.

    Attributes:
        batches: since the last cut; None before the first.

    Example:
        >>> import torch
        >>> norm, fresh = nn.BatchNorm1d(1), FreshStatistics()
        >>> fresh.restart()
        >>> with torch.no_grad():
        ...     for value in (2.0, 4.0):
        ...         fresh.begin_(norm)
        ...         _ = norm(torch.full((2, 1), value))
        ...         fresh.end_()
        >>> norm.running_mean, norm.momentum
        (tensor([3.]), 0.1)
    """

    def __init__(self) -> None:
        self.batches: int | None = None
        self._changed: list[tuple[_BatchNorm, float]] = []

    def restart(self) -> None:
        """Channels have left."""
        self.batches = 0

    def begin_(self, model: nn.Module) -> None:
        """Before a batch: set the momentum for it."""
        if self.batches is None or self.batches >= _LAST:
            return
        wanted = 1.0 / (self.batches + 1)
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.training and (module.momentum or 1.0) < wanted:
                assert module.momentum is not None
                self._changed.append((module, module.momentum))
                module.momentum = wanted

    def end_(self) -> None:
        """After a batch, or when a fit breaks off: momenta are what they were."""
        if self.batches is not None:
            self.batches += 1
        for module, momentum in self._changed:
            module.momentum = momentum
        self._changed = []
