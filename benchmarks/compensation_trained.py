"""Trains the two networks of `compensation.py` that no package brings, on digits of 28 by 28 pixels, to convergence.

Each takes a few minutes of one thread, once: the weights go to the folder of the environment variable
COMPENSATION_CACHE, or to the temporary one.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from defaults_networks import Layer
from defaults_rows import digits
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10


class Residual(nn.Module):
    """Two convolutions beside their input; where channels double, the image shrinks."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        stride = 1 if into == out else 2
        self.conv1, self.norm1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.short = (
            nn.Identity()
            if into == out
            else nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(y)) + self.short(x)).relu()


def residual_network() -> nn.Module:
    """Twelve blocks, four to each of the widths 16, 32 and 64."""
    widths = [16, *(width for width in (16, 32, 64) for _ in range(4))]
    blocks = [Residual(into, out) for into, out in itertools.pairwise(widths)]
    stem = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))


class Patches(nn.Module):
    """Twelve pre-norm blocks over an image's sixteen patches of 7 by 7."""

    def __init__(self, width: int = 96, heads: int = 4, blocks: int = 12) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(49, width), nn.Parameter(0.02 * torch.randn(16, width))
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        patches = x.unflatten(3, (4, 7)).unflatten(2, (4, 7)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return self.head(self.norm(self.layers(self.embed(patches) + self.place)).mean(1))


def moved(images: Tensor, degrees: float, pixels: float, generator: torch.Generator, least: float = 0.0) -> Tensor:
    """Images turned by ``least`` to ``degrees`` either way and shifted by up to ``pixels``, at 28 by 28."""

    def drawn(low: float, high: float) -> Tensor:
        sign = 2.0 * torch.randint(2, (len(images),), generator=generator) - 1
        return sign * (low + (high - low) * torch.rand(len(images), generator=generator))

    angle, shift = drawn(least, degrees) * math.pi / 180, pixels * 2 / 28
    turn = torch.stack([angle.cos(), -angle.sin(), drawn(0, shift), angle.sin(), angle.cos(), drawn(0, shift)], 1)
    large = functional.interpolate(images, size=28, mode="bilinear", align_corners=False)
    grid = functional.affine_grid(turn.view(-1, 2, 3), list(large.shape), align_corners=False)
    return functional.grid_sample(large, grid, align_corners=False)


@functools.cache
def train_digits(copies: int = 1) -> tuple[Tensor, Tensor]:
    """The training half's images, slightly moved, with their labels; more ``copies`` are moved otherwise."""
    images, labels = digits(0)[0].tensors
    generator = torch.Generator().manual_seed(1)
    return torch.cat([moved(images, 12, 2, generator) for _ in range(copies)]), labels.repeat(copies)


@functools.cache
def test_digits(degrees: float = 12, least: float = 0.0) -> tuple[Tensor, Tensor]:
    """Digits that nothing was trained on, moved as those of training, or turned further."""
    images, labels = digits(0)[1].tensors
    return moved(images, degrees, 2, torch.Generator().manual_seed(2), least), labels


def _train(make: Callable[[], nn.Module], epochs: int, rate: float) -> nn.Module:
    """AdamW with a warm-up and a cosine, every epoch on digits moved anew."""
    images, labels = digits(0)[0].tensors
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = make().train()
    generator, batch = torch.Generator().manual_seed(0), 50
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=0.02)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.15)
    for _ in range(epochs):
        seen = moved(images, 12, 2, generator)
        for picked in torch.randperm(len(images), generator=generator).split(batch):
            optimizer.zero_grad()
            functional.cross_entropy(network(seen[picked]), labels[picked], label_smoothing=0.05).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
    return network.eval()


def trained(name: str, make: Callable[[], nn.Module], epochs: int, rate: float) -> nn.Module:
    """The network with the weights of the cached file, which is written where it's missing."""
    folder = Path(os.environ.get("COMPENSATION_CACHE", tempfile.gettempdir()))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"compensation-{name}-{epochs}.pt"
    if not path.exists():
        torch.save(_train(make, epochs, rate).state_dict(), path)
    network = make()
    network.load_state_dict(torch.load(path, weights_only=True))
    return network.eval()


def trained_residual() -> nn.Module:
    return trained("residual", residual_network, epochs=24, rate=4e-3)


def trained_transformer() -> nn.Module:
    return trained("transformer", Patches, epochs=70, rate=1e-3)
