"""Activations that work in place in float: their int8 kernels can't, and needn't say so at each call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress import load_compressed, quantize, save_compressed
from tests.quantization.test_quantize import agreement


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.leaky_relu(self.body(x), 0.2, True))


class Twice(Functional):
    """Reads what the activation has overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.activation = nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        return self.head(self.activation(hidden) + hidden)


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2, inplace=True), nn.Linear(16, 3))


@pytest.mark.parametrize("make", [sequential, Functional, Twice])
def test_a_leaky_relu_in_place_is_quiet_and_right(
    make: Callable[[], nn.Module], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model, x = make().eval(), torch.randn(64, 8)
    int8 = quantize(model, calibration=[x])
    save_compressed(int8, str(tmp_path / "int8.ckpt"))
    again = load_compressed(str(tmp_path / "int8.ckpt"), make()).eval()
    assert torch.equal(again(x), int8(x))
    assert agreement(model(x), int8(x)) > 0.99
    assert "inplace" not in capfd.readouterr().err
