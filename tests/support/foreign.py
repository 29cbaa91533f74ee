"""Networks as other people write them: layers that aren't torch's own, and outputs that aren't tensors.

What they have in common is that their quantized forms are hard to write into a file and to rebuild from it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from tests.support.zoo import Row, floats, ids


class FunctionalLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, bias=self.bias)


class PaddedConv(nn.Conv2d):
    """Pads as other frameworks do, as pretrained networks ported from them need."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class StandardizedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        std, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (std + 1e-5), self.bias, self.stride, self.padding)


class EqualizedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.in_features**-0.5, self.bias)


class AdaptedLinear(nn.Linear):
    """A low-rank adapter written by hand."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down = nn.Parameter(torch.randn(2, inputs) * 0.1)
        self.up = nn.Parameter(torch.randn(outputs, 2) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.up @ self.down, self.bias)


def subclasses() -> nn.Module:
    return nn.Sequential(
        PaddedConv(3, 8, 2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding="same"),
        nn.ReLU(),
        nn.Flatten(),
        FunctionalLinear(512, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )


def computed_weights() -> nn.Module:
    return nn.Sequential(
        StandardizedConv(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        EqualizedLinear(8, 16),
        nn.ReLU(),
        AdaptedLinear(16, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )


def parametrized() -> nn.Module:
    return nn.Sequential(
        weight_norm(nn.Conv2d(3, 8, 3, padding=1)),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        spectral_norm(nn.Linear(8, 16)),
        nn.ReLU(),
        nn.Linear(16, 4),
    )


class OwnParameters(nn.Module):
    """No layer of torch at all: matrices of its own, one of them multiplied, in a list and by a wrapped function."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(16, 16) * 0.2)
        self.rest = nn.ParameterList([torch.randn(16, 16) * 0.2 for _ in range(2)])
        self.mixed = nn.Parameter(torch.randn(16, 16) * 0.2)
        self.last = nn.Parameter(torch.randn(4, 16) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.first).relu()
        for weight in self.rest:
            x = F.linear(x, weight).relu()
        return mixed(x @ self.mixed, self.last)


def mixed(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight) if x.shape[0] else x


torch.fx.wrap("mixed")


class Reading(nn.Module):
    """Reads weights of layers that it calls too: their types, their values, parts of them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(16, 16)
        self.qkv = nn.Linear(16, 48, bias=False)
        self.bias = nn.Parameter(torch.randn(16) * 0.1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x.to(self.body.weight.dtype)).view(-1, 5, self.body.weight.shape[0])
        x = F.linear(x.relu(), self.body.weight)
        bias = torch.cat([self.bias, torch.zeros(16), self.bias])
        query, key, value = F.linear(x, self.qkv.weight, bias).chunk(3, -1)
        x = (query @ key.transpose(1, 2)).mul(0.1).softmax(-1) @ value
        return self.head(x.mean(1))


class Window(nn.Module):
    """A block with tables, masks and caches: a buffer that is viewed, literals, and what the first call makes."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.table = nn.Parameter(torch.randn(9, 1))
        self.gamma = nn.Parameter(torch.full((1, 16), 0.5))
        places = torch.arange(5)
        self.register_buffer("index", places[:, None] - places + 4)
        self.register_buffer("mask", torch.ones(5, 5, dtype=torch.bool).tril(), persistent=False)
        self.cache: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = torch.linspace(-1, 1, 16)
        query, key, value = self.qkv(x + self.cache).chunk(3, -1)
        bias = self.table[self.index.view(-1)].view(5, 5)
        scores = query @ key.transpose(1, 2) / 4 + bias
        mixed = scores.masked_fill(~self.mask, -1e4).softmax(-1) @ value
        return x + self.gamma * self.proj(mixed * torch.tensor([0.5, 2.0] * 8))


class Windows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Window(), Window()])
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Integers(nn.Module):
    """Computes with ids and places before it looks them up, and adds integers to floats."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(20, 16), nn.Embedding(10, 16)
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.cat([ids, ids], 1)[:, :5].clamp(max=4) * 2 + 1
        x = self.words(ids.view(-1)).view(-1, 5, 16) + self.places(places.transpose(0, 1).transpose(0, 1))
        return self.head(self.body(x + torch.arange(16) / 8 + torch.arange(16)).relu().mean(1))


class Numbers(nn.Module):
    """Makes numbers of its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 4)
        self.register_buffer("temperature", torch.rand(()) + 0.5)
        self.register_buffer("clipped", torch.rand(()) < 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x) / float(self.temperature)
        return self.head(x.clamp(-1, 1) if self.clipped else x.relu())


class SharedActivations(nn.Module):
    """A residual block whose ReLU and pooling are called in several places, with a sum in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.norm, self.other = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.relu, self.pool, self.drop = nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Dropout(0.1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.relu(self.stem(x))
        y = self.drop(self.other(self.b(self.relu(self.norm(self.a(x))))))
        y += x
        y = self.pool(self.relu(y))
        return [self.head(y), self.head(self.pool(F.relu(y)))]  # a head that is shared over levels


class Pair(NamedTuple):
    logits: Tensor
    other: Tensor | None = None


@dataclass
class Result:
    logits: Tensor
    hidden: Any = None
    name: str = "result"


class Named(OrderedDict[str, Tensor]):
    """As several libraries have it: a mapping whose items are attributes too."""

    def __init__(self, **items: Tensor) -> None:
        super().__init__(**items)
        self.__dict__.update(items)


class Outputs(nn.Module):
    """Gives its outputs in a container."""

    def __init__(self, contain: Any) -> None:
        super().__init__()
        self.contain = contain
        self.body, self.head = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Any:
        hidden = self.body(x).relu()
        return self.contain(self.head(hidden), hidden)


_IMAGES, _VECTORS, _SEQUENCES = floats(4, 3, 8, 8), floats(4, 16), floats(4, 5, 16)
CONTAINERS = {
    "ordered_dict": lambda out, hidden: OrderedDict(out=out, aux=(hidden, None, 3)),
    "dataclass": lambda out, hidden: Result(out, {"hidden": Pair(hidden)}),
    "mapping": lambda out, hidden: Named(logits=out, hidden=hidden),
}

FOREIGN: tuple[Row, ...] = (
    Row("subclasses", subclasses, _IMAGES, "layers with a forward of their own"),
    Row("computed_weights", computed_weights, _IMAGES, "weights that a forward computes"),
    Row("parametrized", parametrized, _IMAGES, "weights that parametrizations compute"),
    Row("own_parameters", OwnParameters, _VECTORS, "parameters without a layer; a function that fx doesn't see into"),
    Row("reading", Reading, _SEQUENCES, "layers that are called and read"),
    Row("windows", Windows, _SEQUENCES, "constants, masks, caches"),
    Row("shared_activations", SharedActivations, _IMAGES, "modules without weights that are called twice"),
    Row("integers", Integers, ids, "arithmetic on integers"),
    Row("numbers", Numbers, _VECTORS, "code depends on buffers"),
    *(Row(name, partial(Outputs, make), _VECTORS, "outputs in containers") for name, make in CONTAINERS.items()),
)


def foreign(name: str) -> Row:
    """The row called `name`."""
    return next(row for row in FOREIGN if row.name == name)
