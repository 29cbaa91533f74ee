"""Defines the demo's two networks: a large one that reads letters well, and a small one that is to read as well."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.digits.networks import Residual, conv_bn


class Teacher(nn.Module):
    """Three residual blocks, 8 convolutions."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 5, 2, 2, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.features = nn.Sequential(
            Residual(width, width), Residual(width, 2 * width, stride=2), Residual(2 * width, 4 * width, stride=2)
        )
        self.head = nn.Linear(4 * width, 26)
        self.to(memory_format=torch.channels_last)  # in which convolutions train a third faster here

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(self.stem(x)).mean((2, 3)))


class Student(nn.Module):
    """Three convolutions, each of which becomes one int8 kernel together with its BatchNorm and ReLU."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(*conv_bn(1, width, stride=2), nn.ReLU()),
            *(*conv_bn(width, 2 * width, stride=2), nn.ReLU()),
            *(*conv_bn(2 * width, 4 * width, stride=2), nn.ReLU()),
        )
        self.head = nn.Linear(4 * width * 16, 26)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.features(x), 1))
