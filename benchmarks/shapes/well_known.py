"""Networks with the shapes of well-known ones, and random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def block(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act: Any = nn.ReLU) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([act()] if act else []))


class Residual(nn.Module):
    def __init__(self, body: nn.Module, skip: nn.Module, end: nn.Module) -> None:
        super().__init__()
        self.body, self.skip, self.end = body, skip, end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.body(x) + self.skip(x))


def resnet18() -> nn.Module:
    parts: list[nn.Module] = [block(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    for inputs, outputs, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)):
        skip = block(inputs, outputs, 1, stride, act=None) if stride > 1 else nn.Identity()
        for start, by, way in ((inputs, stride, skip), (outputs, 1, nn.Identity())):
            body = nn.Sequential(block(start, outputs, 3, by), block(outputs, outputs, 3, act=None))
            parts.append(Residual(body, way, nn.ReLU()))
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def mobilenet_v2() -> nn.Module:
    act, inputs, parts = nn.ReLU6, 32, [block(3, 32, 3, 2, act=nn.ReLU6)]
    rows = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expand, outputs, repeats, first in rows:
        for stride in (first, *[1] * (repeats - 1)):
            wide = expand * inputs
            body = [block(inputs, wide, 1, act=act)] if expand > 1 else []
            body += [block(wide, wide, 3, stride, wide, act), block(wide, outputs, 1, act=None)]
            whole = nn.Sequential(*body)
            joined = inputs == outputs and stride == 1
            parts.append(Residual(whole, nn.Identity(), nn.Identity()) if joined else whole)
            inputs = outputs
    parts += [block(inputs, 1280, 1, act=act), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)]
    return nn.Sequential(*parts)


def conv1d() -> nn.Module:
    """M5 of Dai et al., 2016, for a second of sound at 16 kHz."""
    parts: list[nn.Module] = []
    for inputs, outputs, kernel, stride in ((1, 128, 80, 4), (128, 128, 3, 1), (128, 256, 3, 1), (256, 512, 3, 1)):
        conv = nn.Conv1d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        parts += [conv, nn.BatchNorm1d(outputs), nn.ReLU(), nn.MaxPool1d(4)]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(512, 35))


class Encoder(nn.Module):
    """A layer of BERT-base."""

    def __init__(self, width: int = 768, heads: int = 12) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        x = self.norm1(x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
        return self.norm2(x + self.feed(x))


class Bert(nn.Module):
    def __init__(self, layers: int, width: int = 768) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(30522, width), nn.Parameter(torch.randn(128, width))
        self.norm, self.layers = nn.LayerNorm(width), nn.Sequential(*(Encoder(width) for _ in range(layers)))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(self.norm(self.embed(tokens) + self.position))


NETWORKS = {"resnet18": resnet18, "mobilenet_v2": mobilenet_v2, "conv1d": conv1d, "bert": Bert}
