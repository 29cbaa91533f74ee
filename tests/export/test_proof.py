"""A file that computes something else is refused, and the layer where it begins is named."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compress import CompressionError, export, quantize
from lightning_compress.export import lowering
from lightning_compress.export.proof import compared
from lightning_compress.quantization.numerics.operators import ROUNDED, STORED

pytest.importorskip("onnxruntime")


@functools.cache
def small() -> nn.Module:
    """Two branches, the first of which begins with `left`."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.head = nn.Linear(6, 7), nn.Linear(6, 8), nn.Linear(15, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.left(x), self.right(x)], 1).relu())

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return quantize(Branches().eval(), calibration=[torch.randn(64, 6)])


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def test_the_first_layer_that_differs_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = lowering.PLAIN[STORED]

    def wrong(codes: Tensor, scale: Tensor) -> Tensor:
        return right(codes, scale * 1.5 if codes.shape == (8, 6) else scale)

    monkeypatch.setitem(lowering.PLAIN, STORED, wrong)
    with pytest.raises(CompressionError, match=r"part first at `right` \(linear\)"):
        export(small(), X, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_rounding_with_another_zero_point_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = lowering.PLAIN[ROUNDED]

    def wrong(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
        return right(x, scale, zero_point + 20, low, high)

    monkeypatch.setitem(lowering.PLAIN, ROUNDED, wrong)
    with pytest.raises(CompressionError, match="must compute what the model computes"):
        export(small(), X, tmp_path / "m.onnx")


class Noisy(nn.Module):
    """Draws noise in evaluation too."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * torch.randn_like(x)


def test_noise_is_no_rounding(tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match="must give the same again"):
        export(Noisy(), torch.randn(4, 8, 64), tmp_path / "m.onnx")


@given(st.floats(0.0, 0.5), st.integers(0, 9))
def test_differences_within_the_slack_pass_and_others_fail(share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    expected = torch.randn(50, 8, generator=generator)
    slack = 0.04 * expected.abs().max().item()
    off = torch.zeros(50, 8)
    off[3, 2] = share * slack * 4
    failure = compared(expected, expected + off, slack).failure
    assert bool(failure) == (share * 4 > 1.0 + 1e-6) or share == pytest.approx(0.25)


def test_the_class_may_differ_only_where_two_are_as_near() -> None:
    expected = torch.tensor([[1.0, 0.0, 5.0], [1.0, 0.999, -8.0]])
    near = torch.tensor([[1.0, 0.0, 5.0], [0.999, 1.0, -8.0]])
    assert not compared(expected, near, 0.01).failure
    assert compared(expected, near, 0.01).same == 1
    far = torch.tensor([[1.0, 0.0, 5.0], [-8.0, 1.0, 1.0]])
    assert compared(expected, far, 0.01).failure


@pytest.mark.parametrize(
    ("expected", "got", "words"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), "shape"),
        (torch.ones(2), torch.tensor([1.0, torch.nan]), "infinite or no numbers"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "integers are others"),
        (torch.tensor([1.0, -1.0] * 50), torch.tensor([1.0, -1.0] * 49 + [-1.0, 1.0]), "difference"),
    ],
)
def test_what_no_rounding_explains_fails(expected: Tensor, got: Tensor, words: str) -> None:
    assert words in compared(expected, got, 0.0).failure


def test_infinite_values_in_the_same_places_agree() -> None:
    values = torch.tensor([1.0, -torch.inf, torch.nan])
    assert not compared(values, values.clone(), 0.0).failure


def test_a_trace_that_computes_something_else_is_told_from_a_file_that_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    verb = importlib.import_module("lightning_compress.export.export")
    lower = verb.lower_

    def broken(program: Any, target: str) -> None:
        lower(program, target)
        scales = program.graph.graph.find_nodes(op="call_function", target=STORED)[0].args[1].target
        setattr(program.graph, scales, 1.5 * getattr(program.graph, scales))

    monkeypatch.setattr(verb, "lower_", broken)
    with pytest.raises(CompressionError, match="the trace isn't what the model computes"):
        export(small(), X, tmp_path / "m.onnx")
