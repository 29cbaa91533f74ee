"""A small network with layers that matter and others that don't, and its data."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Small(nn.Module):
    """Two convolutions, a residual linear layer and a head; ``quiet`` adds next to nothing to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.deep = nn.Conv2d(8, 16, 3, padding=1)
        self.quiet = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(self.conv(x).relu()).relu().mean((2, 3))
        out: Tensor = self.head(x + 1e-3 * self.quiet(x))
        return out


def small() -> Small:
    """The network, in evaluation mode; the same each time."""
    torch.manual_seed(0)
    return Small().eval()


def batches(count: int = 3, size: int = 16) -> list[Tensor]:
    """Images of 6 by 6 pixels."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 1, 6, 6, generator=generator) for _ in range(count)]
