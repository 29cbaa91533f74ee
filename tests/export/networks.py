"""Small quantized networks, and programs of them as a target takes them."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from lightning_compress import StaticInt8, quantize
from lightning_compress.export.export import lower_
from lightning_compress.export.formats import FORMATS
from lightning_compress.export.program import Program, trace_program


class Residual(nn.Module):
    """Has a sum of two branches, a pool and a last layer that gives floats."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(width, 8, 3, padding=1) for width in (3, 8, 8))
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x).relu())
        return self.head((self.b(self.a(x).relu()) + x).relu().mean((2, 3)))


class Words(nn.Module):
    """Has linear layers for tokens, one of them called twice, and one before an activation that stays float."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.twice, self.gate, self.head = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.twice(self.twice(self.norm(x)).relu())
        mean = y.mean(1)
        return self.head(mean * self.gate(mean).relu())


SHAPES = {Residual: (4, 3, 8, 8), Words: (4, 3, 8)}


@cache
def program_for(kind: type[nn.Module], target: str, rounded_for: str = "") -> Program:
    """A network's program for a target, quantized for it or for another one; writers leave it as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = kind().eval(), torch.randn(SHAPES[kind])
    int8 = quantize(model, StaticInt8(target=rounded_for or FORMATS[target].activations), calibration=[x])
    program = trace_program(int8, (x,), {}, True, {})
    lower_(program, target)
    return program
