"""Finds the range of an activation that rounding to 8 bits changes least, of a histogram of its values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BINS = 2048
_RANGES = 128
"""So many shares of each end of what was seen are tried."""


class Histogram:
    """Counts values, but for zeros, which every range has a code for."""

    def __init__(self) -> None:
        self.low = self.high = 0.0
        self.counts = torch.zeros(_BINS, dtype=torch.float64)

    def observe(self, x: Tensor) -> None:
        """Count the values of a batch; those before move to bins of the range of both."""
        x = x[x != 0].float()
        low, high = (min(self.low, float(x.min())), max(self.high, float(x.max()))) if x.numel() else (0.0, 0.0)
        if low < high and math.isfinite(high - low):
            counts = torch.histc(x, _BINS, low, high).double().cpu()
            places = ((self._values() - low) / (high - low) * _BINS).long().clamp_(0, _BINS - 1)
            self.counts = counts.index_add_(0, places, self.counts)
            self.low, self.high = low, high

    def _values(self) -> Tensor:
        """Return the middles of the bins."""
        return self.low + (torch.arange(_BINS, dtype=torch.float64) + 0.5) * ((self.high - self.low) / _BINS)

    def range(self, steps: int, symmetric: bool) -> tuple[float, float]:
        """Return the range of least squared error ``sum max(l - x, 0)^2 + max(x - h, 0)^2 + ((h - l) / steps)^2 / 12``.

        A value inside of a range of ``steps`` is off by a uniform error, one outside of it by the way to its end.
        """
        low, high = (self.low, self.high) if not symmetric else (-(end := max(-self.low, self.high)), end)
        shares, values = torch.linspace(1 / _RANGES, 1, _RANGES, dtype=torch.float64)[:, None], self._values()
        below = ((low * shares - values).clamp_(min=0).square_() * self.counts).sum(1)
        above = ((values - high * shares).clamp_(min=0).square_() * self.counts).sum(1)
        errors = below[:, None] + above + self.counts.sum() * ((high * shares.T - low * shares) / steps).square() / 12
        best = (int(errors.diagonal().argmin()),) * 2 if symmetric else divmod(int(errors.argmin()), _RANGES)
        return low * float(shares[best[0]]), high * float(shares[best[1]])
