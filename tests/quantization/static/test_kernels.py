"""Int8 kernels compute what the reference form does, without floats in between."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

from lightning_compress.quantization.layers.int8_weight import Int8Weight
from lightning_compress.quantization.numerics.int8 import needs_reduced_range
from lightning_compress.quantization.static import int8_layer
from lightning_compress.quantization.static.graphs import LAYERS
from lightning_compress.quantization.static.int8_layer import NOTHING, Codes, Int8Layer, PostOp, decode, encode
from lightning_compress.quantization.static.kernels import lower, wrong
from lightning_compress.quantization.static.placement import TARGETS
from lightning_compress.quantization.static.rounding import rounded
from tests.quantization.static.forms import reference_form
from tests.quantization.static.traces import spread_
from tests.support.zoo import ZOO, Row, floats

aten = torch.ops.aten
VNNI = pytest.mark.skipif(needs_reduced_range("onednn"), reason="without VNNI no kernel is right")


@pytest.mark.parametrize(
    ("scale", "zero_point", "low", "high"), [(0.5, 3, 0, 255), (0.3, -7, -128, 127), (1.0, 5, 0, 127)]
)
def test_codes_are_those_that_rounding_gives(scale: float, zero_point: int, low: int, high: int) -> None:
    x = torch.cat([torch.linspace(-90, 90, 1001), torch.arange(-20, 20) * scale / 2])
    codes = Codes(scale, zero_point, low, high).unsigned()
    got = encode(x, codes.scale, codes.zero_point, codes.low, codes.high)
    shift = codes.low - low
    expected = np.clip(np.rint(x.numpy() * np.float32(1 / scale)) + zero_point, low, high) + shift
    assert got.dtype == torch.uint8 and np.array_equal(got.numpy(), expected)
    assert torch.equal(decode(got, codes.scale, codes.zero_point), rounded(x, scale, zero_point, low, high))


@dataclass
class Case:
    operator: Any
    weight: tuple[int, ...]
    x: tuple[int, ...]
    options: tuple[Any, ...] = ()
    post_op: PostOp = NOTHING
    output: Codes | None = None
    adds: bool = False


WIDE = Codes(4.0, 120, 0, 255)
CASES = {
    "linear": Case(aten.linear.default, (5, 64), (3, 7, 64)),
    "linear_gelu": Case(aten.linear.default, (33, 64), (6, 64), post_op=("gelu", [], "tanh")),
    "linear_codes": Case(aten.linear.default, (16, 64), (9, 64), post_op=("swish", [], ""), output=WIDE),
    "conv1d": Case(aten.conv1d.default, (8, 6, 5), (2, 6, 40), ([2], [3], [2], 1), ("relu", [], ""), WIDE),
    "conv2d": Case(aten.conv2d.default, (32, 16, 3, 3), (2, 16, 9, 7), ([2, 1], [1, 0], [1, 1], 1)),
    "one_number": Case(aten.conv2d.default, (8, 4, 3, 3), (1, 4, 9, 9), ([2], [1], [1], 1), ("relu", [], ""), WIDE),
    "grouped": Case(aten.conv2d.default, (12, 2, 3, 3), (2, 8, 6, 6), ([1], [1], [2], 4), ("hardtanh", [0.0, 6.0], "")),
    "depthwise": Case(aten.conv2d.default, (16, 1, 3, 3), (2, 16, 6, 6), ([1], [1], [1], 16), ("hardswish", [], "")),
    "narrow": Case(aten.conv2d.default, (8, 8, 1, 1), (2, 8, 5, 5), ([1], [0], [1], 1), output=Codes(2.0, 60, 1, 127)),
    "conv3d": Case(aten.conv3d.default, (8, 4, 2, 3, 3), (2, 4, 5, 6, 7), ([1], [1], [1], 1), output=WIDE),
    "added": Case(
        aten.conv2d.default, (8, 8, 3, 3), (2, 8, 6, 6), ([1], [1], [1], 1), ("relu", [], ""), WIDE, adds=True
    ),
}
FUNCTIONS = {
    **{"none": lambda y: y, "relu": functional.relu, "gelu": lambda y: functional.gelu(y, approximate="tanh")},
    **{"swish": functional.silu, "hardswish": functional.hardswish, "hardtanh": functional.relu6},
}


def layer_of(case: Case) -> tuple[Int8Layer, list[Any]]:
    """The layer, and codes and a bias that are drawn."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, case.weight, generator=generator).to(torch.int8)
    scale = torch.rand(case.weight[0], generator=generator) * 0.2 - 0.1  # of a BatchNorm that turned signs
    weight = Int8Weight(torch.empty(case.weight), codes, scale)
    inputs = [Codes(0.05, 37, 0, 255), *[Codes(3.0, 90, 0, 255)] * case.adds]
    layer = Int8Layer("a", case.operator, case.options, weight, inputs, case.post_op, case.output)
    x = torch.randint(256, case.x, generator=generator).to(torch.uint8)
    bias = torch.randn(case.weight[0], generator=generator)
    other = torch.randint(256, layer.plain(x).shape, generator=generator).to(torch.uint8)
    return layer, [x, bias, *[other] * case.adds]


def in_float64(layer: Int8Layer, case: Case, x: Tensor, bias: Tensor, other: Tensor | None = None) -> Tensor:
    weight: Any = layer.weight
    values = weight.codes.double() * weight.scale.double().view(-1, *[1] * (len(case.weight) - 1))
    y = case.operator((x.double() - 37) * 0.05, values, bias.double(), *case.options)
    y = FUNCTIONS[case.post_op[0]](y if other is None else y + (other.double() - 90) * 3.0)
    if case.output is None:
        return y  # type: ignore[no-any-return]
    codes = torch.round(y / case.output.scale) + case.output.zero_point
    return codes.clamp(case.output.low, case.output.high)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("by", ["kernel", "plain"])
def test_a_kernel_computes_what_its_layer_does(name: str, by: str) -> None:
    case = CASES[name]
    layer, tensors = layer_of(case)
    before = [tensor.clone() for tensor in tensors]
    expected = in_float64(layer, case, *tensors)
    with torch.no_grad():
        got = layer(*tensors) if by == "kernel" else layer.plain(*tensors)
    assert all(map(torch.equal, tensors, before))  # what is added to is read elsewhere too
    assert got.shape == expected.shape and got.dtype == (torch.float32 if case.output is None else torch.uint8)
    difference = (got.double() - expected).abs()
    if case.output is None:
        assert difference.max() <= 1e-5 * expected.abs().max()
    else:  # sums that lie on a border between two codes
        assert difference.max() <= 1 and difference.mean() < 0.01 and expected.unique().numel() > 20


@VNNI
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_layer_has_a_right_kernel(name: str) -> None:
    assert layer_of(CASES[name])[0].wrong() == ""


# Whole graphs.


def run(graph: nn.Module, tensors: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        outputs: tuple[Tensor, ...] = graph(*tensors)
    return [output.float() for output in outputs]


def kernels_in(graph: nn.Module) -> list[Int8Layer]:
    return [layer for layer in graph.modules() if isinstance(layer, Int8Layer)]


def float_layers(graph: GraphModule) -> list[str]:
    """The convolutions and linear layers that compute in float with a weight in int8."""
    weights = [name for name, module in graph.named_children() if isinstance(module, Int8Weight)]
    return [node.name for node in graph.graph.nodes if node.target in LAYERS and str(node.args[1].target) in weights]


def far(expected: Tensor, got: Tensor) -> float:
    return float((got - expected).norm() / expected.norm().clamp_min(1e-12))


def video() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 4, 2), nn.SiLU(), nn.MaxPool3d(2)),
        *(nn.Conv3d(4, 4, 1), nn.ReLU6(), nn.Flatten(), nn.Linear(32, 3)),
    )


def audio() -> nn.Module:
    first = (nn.Conv1d(1, 8, 9, 2, 4), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(3, 2, 1))
    return nn.Sequential(*first, Residual1d(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 3))


class Residual1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(8, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.b(self.a(x).relu()) + x).relu()  # type: ignore[no-any-return]


class Broadcast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) + self.b(x.mean((2, 3), keepdim=True)))  # type: ignore[no-any-return]


OWN = [
    Row("broadcast", Broadcast, floats(2, 3, 5, 5)),
    Row("video", video, floats(2, 2, 7, 7, 7)),
    Row("audio", audio, floats(2, 1, 64)),
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("row", [*ZOO, *OWN], ids=str)
def test_all_int8_layers_of_a_form_get_kernels_that_give_the_same(row: Row, target: str) -> None:
    args, kwargs = row.inputs()
    form, tensors = reference_form(spread_(row.build(), low=0.5, high=2.0), *args, target=target, **kwargs)
    lowered = lower(form)
    assert len(kernels_in(lowered)) == len(float_layers(form)) > 0
    assert not float_layers(lowered)
    for expected, got in zip(run(form, tensors), run(lowered, tensors), strict=True):
        assert far(expected, got) < 0.01


class Moving(nn.Module):
    """Pads, pools, splits and joins between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(4, 4, 3)
        self.d, self.e = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.Linear(288, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(functional.pad(x, (1, 2, 1, 2)))
        left, right = self.b(functional.pad(y, (1, 1, 1, 1))).chunk(2, 1)
        y = torch.cat([self.c(left), right[..., 1:-1, 1:-1]], 1)
        y = self.d(functional.interpolate(y, scale_factor=2.0))
        y = functional.max_pool2d(y, 7, 6, 2, ceil_mode=True).flip(-1).relu()
        return self.e(y.view(2, -1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("target", [name for name, target in TARGETS.items() if target.outputs])
def test_what_only_moves_numbers_moves_codes(target: str) -> None:
    torch.manual_seed(0)
    form, tensors = reference_form(Moving(), torch.randn(2, 3, 16, 16), target=target)
    lowered = lower(form)
    decoded = [node for node in lowered.graph.nodes if node.target is decode]
    assert all(user.op == "output" for node in decoded for user in node.users)
    assert sum(node.target is encode for node in lowered.graph.nodes) == 1
    assert far(*run(form, tensors), *run(lowered, tensors)) < 1e-3


@pytest.mark.parametrize("pool", [nn.MaxPool3d(2), nn.MaxPool3d(3, 2, 1, ceil_mode=True)], ids=["2", "3"])
def test_videos_of_any_size_are_pooled_in_codes(pool: nn.Module) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), nn.ReLU(), pool, nn.Conv3d(8, 4, 3))
    form, tensors = reference_form(module, torch.randn(2, 3, 8, 12, 12))
    lowered = lower(form)
    assert not float_layers(lowered)
    assert far(*run(form, tensors), *run(lowered, tensors)) < 1e-3


class Sums(nn.Module):
    """Branches that are added as they leave a convolution; one is read again afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        z = (self.b(y) + y).relu()
        z = self.c(z) + z
        return self.last(torch.cat([z + y, y], 1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("target", TARGETS)
def test_a_kernel_adds_a_branch_that_others_read_too(target: str) -> None:
    torch.manual_seed(0)
    form, tensors = reference_form(Sums(), torch.randn(2, 8, 6, 6), target=target)
    lowered = lower(form)
    # TensorRT rounds the first sum for the convolution alone.
    assert sum(layer.other is not None for layer in kernels_in(lowered)) == (1 if target == "tensorrt" else 2)
    assert sum(layer.other is not None for layer in kernels_in(lower(form, additions=False))) == 0
    assert far(*run(form, tensors), *run(lowered, tensors)) < 0.02


def small() -> tuple[GraphModule, GraphModule, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    form, tensors = reference_form(model, torch.randn(2, 3, 8, 8))
    return form, lower(form), tensors


class Broken:
    """oneDNN, but for what its convolutions give."""

    def __init__(self, error: str = "") -> None:
        self.error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.ops.onednn, name)

    @property
    def qconv_pointwise(self) -> Broken:
        return self

    def default(self, *args: Any) -> Tensor:
        if self.error:
            raise RuntimeError(self.error)
        y: Tensor = torch.ops.onednn.qconv_pointwise(*args)
        return y + 2 if y.dtype == torch.uint8 else y


@pytest.mark.parametrize(("error", "reason"), [("", "computes something else"), ("no such\nprimitive", "no such")])
def test_a_kernel_that_is_wrong_or_missing_is_named_and_not_used(
    monkeypatch: pytest.MonkeyPatch, error: str, reason: str
) -> None:
    form, lowered, tensors = small()
    monkeypatch.setattr(int8_layer, "onednn", Broken(error))
    found = wrong(lowered)
    assert "0" in found and reason in found["0"] and "\n" not in found["0"]
    assert far(*run(form, tensors), *run(lowered, tensors)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["SSE41", "AVX2"])
def test_sums_that_overflow_are_found(isa: str) -> None:
    script = """
import torch
from tests.quantization.static.test_kernels import far, run, small, wrong
form, lowered, tensors = small()
assert set(wrong(lowered)) == {"0", "4"}, wrong(lowered)
assert far(*run(form, tensors), *run(lowered, tensors)) < 1e-5
"""
    # Such CPUs multiply pairs of 8 bits into sums of 16.
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, cwd=Path(__file__).parents[3])


def test_any_batch_in_any_mode_and_thread() -> None:
    form, lowered, tensors = small()
    lowered = copy.deepcopy(lowered)
    with torch.inference_mode():
        lowered(*tensors)
    for size in (1, 5, 0):
        x = torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(size))
        with ThreadPoolExecutor(2) as pool:
            for got in pool.map(lambda x: run(copy.deepcopy(lowered), [x])[0], [x, x]):
                assert torch.allclose(run(form, [x])[0], got, atol=0.02)


def test_a_copy_has_codes_of_its_own_that_may_change() -> None:
    _, lowered, tensors = small()
    before = run(lowered, tensors)[0]
    twin, other = copy.deepcopy(lowered), copy.deepcopy(lowered)
    assert torch.equal(run(other, tensors)[0], before)
    for layer in kernels_in(twin):  # before its first call
        layer.weight.codes.zero_()  # type: ignore[operator, union-attr]
    after = run(twin, tensors)[0]
    assert torch.equal(run(lowered, tensors)[0], before)
    assert torch.allclose(after, after[:1].expand_as(after)) and not torch.allclose(after, before)
