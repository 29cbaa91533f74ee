"""Tensors that modules keep beside their parameters: what a cut leaves of them, and what is computed anew, fits."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress import load_compressed, plan_removal, remove_channels_, save_compressed
from lightning_compress.channels.cutting.cut import zero_

X, LONGER = torch.randn(2, 5, 8), torch.randn(2, 7, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(8, 32), nn.Linear(32, 64), nn.Linear(64, 3)
        self.table: Any = None

    def inside(self, y: Tensor) -> Tensor:
        return y

    def weight(self) -> Tensor:
        return self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.inside(self.a(x))
        return self.c(F.linear(y.relu(), self.weight(), self.b.bias).relu())


class Table(Net):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.randn(20, 32)

    def inside(self, y: Tensor) -> Tensor:
        return y + self.table[: y.shape[1]]


class Nested(Net):
    def __init__(self) -> None:
        super().__init__()
        self.table = {"scale": torch.rand(32), "shift": [(torch.randn(1, 1, 32),)]}

    def inside(self, y: Tensor) -> Tensor:
        return y * self.table["scale"] + self.table["shift"][0][0]


class Folded(Net):
    def weight(self) -> Tensor:
        if self.training:
            self.table = None
            return self.b.weight * 2
        if self.table is None:
            self.table = self.b.weight * 2
        return self.table


class FoldedByMode(Net):
    def train(self, mode: bool = True) -> FoldedByMode:
        super().train(mode)
        self.table = None if mode else (self.b.weight * 2).detach()
        return self

    def weight(self) -> Tensor:
        return self.b.weight * 2 if self.training else self.table


class Property(Net):
    @functools.cached_property
    def doubled(self) -> Tensor:
        return (self.b.weight * 2).detach()

    def weight(self) -> Tensor:
        return self.doubled


class Remembered(Net):
    @functools.lru_cache(maxsize=8)  # noqa: B019
    def doubled(self) -> Tensor:
        return (self.b.weight * 2).detach()

    def weight(self) -> Tensor:
        return self.doubled()


class Missing:
    """Stands for a package that isn't installed, as some projects have it beside their modules."""

    def __getattr__(self, name: str) -> Any:
        raise ImportError(name) if name == "__func__" else AttributeError(name)


missing = Missing()


@functools.lru_cache(maxsize=8)
def doubled(layer: nn.Linear) -> Tensor:
    return (layer.weight * 2).detach()


class RememberedAside(Net):
    def weight(self) -> Tensor:
        return doubled(self.b)


class History(Net):
    """Keeps what went through, and goes on from there, as with keys and values."""

    def inside(self, y: Tensor) -> Tensor:
        whole = y if self.table is None else torch.cat([self.table, y], 1)
        self.table = whole[:, -3:].detach()
        return whole[:, -y.shape[1] :] + whole.mean(1, keepdim=True)


class Heads(Net):
    """Biases of each head by the length, emptied by each change of mode."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.heads = {}, 4
        self.bias = nn.Parameter(torch.randn(4, 20))
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def train(self, mode: bool = True) -> Heads:
        self.table = {}
        return super().train(mode)

    def inside(self, y: Tensor) -> Tensor:
        batch, length, _ = y.shape
        bias = self.bias[:, :length] * 1 if self.training else self.table.setdefault(length, self.bias[:, :length] * 1)
        q, k, v = self.qkv(y).view(batch, length, 3, -1, 8).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) + bias[:, None]
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


KINDS = [Table, Nested, Folded, FoldedByMode, Property, Remembered, RememberedAside, History, Heads]


def run(model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        return [model(x) for x in (X, LONGER, X)]


@pytest.mark.parametrize("filled", ["before", "between", "in inference mode", "never"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_goes_with_the_channels(kind: type[Net], filled: str) -> None:
    model = kind().train().eval()
    with torch.inference_mode(filled == "in inference mode"):
        if filled in ("before", "in inference mode"):
            run(model)
    plan = plan_removal(model, X, macs=0.5)
    if filled == "between":
        run(model)
    assert list(plan.fixed) == ["c"]
    zeroed = copy.deepcopy(model)
    with torch.inference_mode(filled == "in inference mode"):
        zero_(zeroed, plan.kept)
    remove_channels_(model, plan)
    for output, expected in zip(run(model), run(zeroed), strict=True):
        torch.testing.assert_close(output, expected)
    if filled != "in inference mode":  # such tensors can't be trained with anyway
        model.train()(X).sum().backward()
        run(model.eval())


@pytest.mark.parametrize("kind", [Folded, Heads])
def test_what_was_computed_with_a_graph_is_let_go_of_it(kind: type[Net]) -> None:
    model = kind().eval()
    model(X)
    remove_channels_(model, plan_removal(model, X, macs=0.5))
    model(X).sum().backward()
    assert model.c.weight.grad is not None


def test_places_that_the_example_does_not_reach_stay() -> None:
    class Places(Net):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Parameter(torch.randn(32, 20))

        def inside(self, y: Tensor) -> Tensor:
            return y + self.places[:, : y.shape[1]].t()

    model = Places()
    remove_channels_(model, plan_removal(model, X, channels=0.5))
    assert model.places.shape == (16, 20)


def test_what_is_computed_anew_must_fit_too() -> None:
    class Lazy(Net):
        width = 32

        def inside(self, y: Tensor) -> Tensor:
            if self.table is None or len(self.table) < y.shape[1]:
                self.table = torch.linspace(0, 1, y.shape[1])[:, None] * torch.linspace(1, 2, self.width)
            return y + self.table[: y.shape[1]]

    model = Lazy().eval()
    run(model)
    plan = plan_removal(model, X, macs=0.5)
    assert "a" in plan.fixed  # a longer table than the one at hand would have the old width
    remove_channels_(model, plan)
    run(model)
    assert model(torch.randn(1, 30, 8)).shape == (1, 30, 3)


@pytest.mark.parametrize("kind", [Table, Nested, FoldedByMode])
def test_a_fresh_module_takes_them_from_a_file(kind: type[Net], tmp_path: Path) -> None:
    model = kind().train().eval()
    remove_channels_(model, plan_removal(model, X, macs=0.5))
    save_compressed(model, tmp_path / "model.ckpt")
    fresh = kind().train().eval()
    load_compressed(tmp_path / "model.ckpt", fresh)
    for output, expected in zip(run(fresh), run(model), strict=True):
        torch.testing.assert_close(output, expected)
    whole = kind().train().eval()
    save_compressed(whole, tmp_path / "whole.ckpt")
    load_compressed(tmp_path / "whole.ckpt", fresh)
    for output, expected in zip(run(fresh), run(whole), strict=True):
        torch.testing.assert_close(output, expected)
