"""Files that several tests of exports read: each is written once."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress import quantize
from lightning_compress.export import ExportedModel, export


class TwoHeads(nn.Module):
    """Convolutions with BatchNorm and a residual sum; dicts in and out, and an option."""

    def __init__(self) -> None:
        super().__init__()
        self.begin = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.classes, self.place = nn.Linear(8, 5), nn.Linear(8, 2)

    def forward(self, image: Tensor, *, scale: Tensor, flag: bool = True) -> dict[str, Any]:
        features = self.begin(image)
        features = (features + self.body(features)).relu().mean((2, 3))
        return {"classes": self.classes(features), "more": (self.place(features) * scale, flag)}


def call(size: int = 4, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randn(size, 3, 12, 12, generator=generator),
        "scale": torch.rand(size, 1, generator=generator),
    }


@functools.cache
def network(scheme: str = "int8_static") -> nn.Module:
    """A network with statistics, in float or quantized."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TwoHeads()
        for seed in range(5):
            model(**call(8, seed))
    model.eval()
    return model if scheme == "float" else quantize(model, scheme, calibration=[call(8, seed) for seed in range(3)])


@functools.cache
def exported(scheme: str = "int8_static", target: str = "onnxruntime") -> ExportedModel:
    """Its file, in a folder that stays until the tests end."""
    folder = Path(tempfile.mkdtemp())
    return export(network(scheme), call(), folder / "model.onnx", target, calibration=[call(6, 9)])
