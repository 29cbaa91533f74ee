"""Builds the small networks of `defaults.py`, all for images of 8 by 8 pixels."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional


def mlp(norm: bool) -> nn.Module:
    """64-128-64 on 28 by 28 pixels, as people have it from MNIST."""
    sizes = (784, 64, 128, 64)
    layers: list[nn.Module] = [nn.Upsample(size=28, mode="bilinear"), nn.Flatten()]
    for into, out in itertools.pairwise(sizes):
        layers += [nn.Linear(into, out), *([nn.BatchNorm1d(out)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def _conv(into: int, out: int, norm: bool, groups: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(into, out, 3, padding=1, groups=groups), *([nn.BatchNorm2d(out)] if norm else []), nn.ReLU()]


def cnn(norm: bool) -> nn.Module:
    """Three convolutions, 32-32-64."""
    return nn.Sequential(
        *_conv(1, 32, norm),
        *_conv(32, 32, norm),
        nn.MaxPool2d(2),
        *_conv(32, 64, norm),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


class Block(nn.Module):
    """An inverted residual: wide, depthwise, narrow."""

    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def mobile() -> nn.Module:
    """A stem, a pool and three inverted residuals."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU6(),
        nn.MaxPool2d(2),
        *(Block(32, 96) for _ in range(3)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


class Layer(nn.Module):
    """A transformer's layer, written out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (
            layer(y).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Two layers over an image's eight rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(8, 48), nn.Parameter(0.02 * torch.randn(8, 48))
        self.layers = nn.Sequential(Layer(48, 4), Layer(48, 4))
        self.norm, self.head = nn.LayerNorm(48), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.embed(x.squeeze(1)) + self.place)).mean(1))


class Recurrent(nn.Module):
    """A GRU over an image's rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gru, self.head = nn.Linear(8, 32), nn.GRU(32, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(functional.relu(self.embed(x.squeeze(1))))[0][:, -1])
