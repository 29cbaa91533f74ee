"""Equalization: the float function stays, the ranges of each pair of layers become alike."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compress import CompressionError, StaticInt8, Targets, load_compressed, quantize, save_compressed
from lightning_compress.quantization.convert import record_of
from lightning_compress.quantization.static.equalize import Moved, adjust_, equalize_, pairs, widen_
from tests.quantization.static.traces import drawn_, geometric_mean, relative, spread_, traced
from tests.support.oracles import assert_same_state, differing, snapshot


def names(model: nn.Module, graph: Any, kept: Any = ()) -> list[tuple[str, str]]:
    """The pairs by their paths, but for those across ReLU6."""
    paths = {id(tensor): name.removesuffix(".weight") for name, tensor in model.named_parameters()}
    found = [pair for pair in pairs(graph, set(kept)) if not pair.relu6]
    return [(paths[id(pair.first.weight)], paths[id(pair.second.weight)]) for pair in found]


def ranges(first: Any, norm: Any, second: Any, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """(r1, r2) for each channel between two layers, one number at a time."""
    w1, w2 = first.weight.detach().numpy().astype(np.float64), second.weight.detach().numpy().astype(np.float64)
    channels = len(w1)
    if norm is not None:
        factor = norm.weight.detach().numpy() / np.sqrt(norm.running_var.numpy().astype(np.float64) + norm.eps)
        w1 = w1 * factor.reshape(-1, *[1] * (w1.ndim - 1))
    r1, r2 = np.zeros(channels), np.zeros(channels)
    outputs, width = len(w2) // groups, channels // groups
    positions = w2.shape[1] // width  # what a flatten in between made of one channel
    for channel in range(channels):
        r1[channel] = np.abs(w1[channel]).max()
        group, place = divmod(channel, width)
        block = w2[group * outputs : (group + 1) * outputs, place * positions : (place + 1) * positions]
        r2[channel] = np.abs(block).max()
    return r1, r2


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(x, 1)


IMAGE = (3, 4, 8, 8)


# Name: the chain, the shape of its input, and what lies at which index of it: pairs of (first, norm, second, groups).
CHAINS: dict[str, tuple[Any, tuple[int, ...], list[tuple[int, int | None, int, int]]]] = {
    "linear": (lambda: [nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)], (5, 8), [(0, None, 2, 1)]),
    "linear in 3d": (lambda: [nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)], (5, 7, 8), [(0, None, 2, 1)]),
    "linear bn": (
        lambda: [nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)],
        (5, 8),
        [(0, 1, 3, 1)],
    ),
    "conv": (lambda: [nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3)], IMAGE, [(0, None, 2, 1)]),
    "conv without bias": (
        lambda: [nn.Conv2d(4, 6, 3, bias=False), nn.LeakyReLU(0.1), nn.Conv2d(6, 5, 3, bias=False)],
        IMAGE,
        [(0, None, 2, 1)],
    ),
    "conv bn": (
        lambda: [nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3)],
        IMAGE,
        [(0, 1, 3, 1)],
    ),
    "three": (
        lambda: [nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 8, 1), nn.ReLU(), nn.Conv2d(8, 5, 1)],
        IMAGE,
        [(0, None, 2, 1), (2, None, 4, 1)],
    ),
    "depthwise": (
        lambda: [nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1)],
        IMAGE,
        [(0, None, 2, 6), (2, 3, 4, 1)],
    ),
    "multiplied depthwise": (
        lambda: [nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 12, 3, groups=6), nn.ReLU(), nn.Conv2d(12, 5, 1)],
        IMAGE,
        [(0, None, 2, 6), (2, None, 4, 1)],
    ),
    "grouped": (
        lambda: [nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4)],
        IMAGE,
        [(0, None, 2, 4)],
    ),
    "pooling": (
        lambda: [nn.Conv2d(4, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(), nn.AvgPool2d(2), nn.Conv2d(6, 5, 1)],
        IMAGE,
        [(0, None, 5, 1)],
    ),
    "flatten": (
        lambda: [nn.Conv2d(4, 6, 5), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)],
        IMAGE,
        [(0, None, 3, 1)],
    ),
    "functional flatten": (lambda: [nn.Conv2d(4, 6, 5), nn.ReLU(), Flat(), nn.Linear(96, 3)], IMAGE, [(0, None, 3, 1)]),
    "mean": (lambda: [nn.Conv2d(4, 6, 5), nn.ReLU(), Mean(), nn.Linear(6, 3)], IMAGE, [(0, None, 3, 1)]),
    "global pooling": (
        lambda: [nn.Conv2d(4, 6, 5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.ReLU(), nn.Linear(6, 3)],
        IMAGE,
        [(0, None, 5, 1)],
    ),
    "1d": (
        lambda: [nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.PReLU(), nn.MaxPool1d(2), nn.Conv1d(6, 5, 2)],
        (3, 4, 9),
        [(0, 1, 4, 1)],
    ),
    "padded by values": (
        lambda: [nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1, padding_mode="reflect")],
        IMAGE,
        [(0, None, 2, 1)],
    ),
    "3d": (
        lambda: [nn.Conv3d(2, 6, 2), nn.BatchNorm3d(6), nn.ReLU(), nn.Conv3d(6, 5, 2)],
        (2, 2, 4, 4, 4),
        [(0, 1, 3, 1)],
    ),
}


@cache
def traced_chain(name: str) -> tuple[Any, Any]:
    make, shape, _ = CHAINS[name]
    model = nn.Sequential(*make()).double()
    return model, traced(model, torch.randn(*shape, dtype=torch.double))


@settings(max_examples=30)
@given(name=st.sampled_from(sorted(CHAINS)), seed=st.integers(0, 2**16))
def test_the_function_stays_and_the_ranges_of_each_pair_become_alike(name: str, seed: int) -> None:
    _, shape, expected = CHAINS[name]
    model, graph = traced_chain(name)
    spread_(drawn_(model, seed), seed)
    x = torch.randn(*shape, dtype=torch.double)
    float_output = model(x)
    assert names(model, graph) == [(str(first), str(second)) for first, _, second, _ in expected]
    equalize_(graph, set(), False, Moved())
    assert relative(float_output, graph(x)[0]) < 1e-4
    for first, norm, second, groups in expected:
        r1, r2 = ranges(model[first], None if norm is None else model[norm], model[second], groups)
        ratio = r1 / r2
        np.testing.assert_allclose(ratio, np.full_like(ratio, geometric_mean(ratio)), rtol=0.05)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**16), scale=st.floats(1e-6, 1e6))
def test_the_scales_are_the_papers(seed: int, scale: float) -> None:
    # Nagel et al., equation 11: s_i = sqrt(r1 r2) / r2, but for what the channels share.
    model, graph = traced_chain("linear")
    drawn_(model, seed)
    with torch.no_grad():
        model[0].weight *= scale
    w1, b1, w2, b2 = (parameter.detach().numpy().copy() for parameter in model.parameters())
    equalize_(graph, set(), False, Moved())
    s = np.sqrt(np.abs(w1).max(1) * np.abs(w2).max(0)) / np.abs(w2).max(0)
    s = np.clip(s / geometric_mean(s), 1e-4, 1e4)
    for got, want in zip(model.parameters(), (w1 / s[:, None], b1 / s, w2 * s, b2), strict=True):
        np.testing.assert_allclose(got.detach().numpy(), want, rtol=2e-2, atol=1e-30)


def test_dead_channels_stay_finite() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 1)).eval()
    with torch.no_grad():
        model[0].weight[0] = 0  # pruned
        model[1].weight[1] = 0
        model[3].weight[:, 2] = 0
        model[1].running_var[3] = 0
    x = torch.randn(*IMAGE)
    expected = model(x)
    graph = traced(model, x)
    equalize_(graph, set(), False, Moved())
    assert relative(expected, graph(x)[0]) < 1e-4
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


# What is no pair.


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.c((x + self.b(x)).relu())


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.cat([self.a(x), self.b(x)], 1).relu())


class Returned(nn.Module):
    """The inner activation is an output too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.a(x).relu()
        return x, self.b(x)


class ReadWeight(nn.Module):
    """A regularizer-like term reads the first layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()) + F.linear(x, self.a.weight)


class FixedKernel(nn.Module):
    """Blurs with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.register_buffer("kernel", torch.rand(4, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.conv2d(self.a(x).relu(), self.get_buffer("kernel"), groups=4))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.a(x).relu()).relu())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


class LastDimension(nn.Module):
    """A linear layer over the width of an image, which is as large as its channels are many."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 8, 1), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


class Permuted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 8, 1), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu().permute(0, 2, 3, 1))


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).transpose(1, 2))


class FlattenedLate(nn.Module):
    """Flattens positions, keeps channels: the linear layer reads positions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 64, 1), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).flatten(2))


class MeanOfChannels(nn.Module):
    def __init__(self, dimensions: Any) -> None:
        super().__init__()
        self.dimensions = dimensions
        self.a, self.b = nn.Conv2d(4, 8, 1), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).mean(self.dimensions))


class Softmax(nn.Module):
    def __init__(self, between: Any) -> None:
        super().__init__()
        self.between = between
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


class MaxOverChannels(nn.Module):
    """Pools over the last dimension, which is the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.max_pool1d(self.a(x), 2))


NO_PAIRS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "residual": (Residual, IMAGE),
    "concat": (Concat, IMAGE),
    "returned": (Returned, (3, 4)),
    "kernel of a buffer": (FixedKernel, IMAGE),
    "called twice": (Twice, (3, 4)),
    "tied": (Tied, (3, 4)),
    "last dimension": (LastDimension, IMAGE),
    "permuted": (Permuted, (3, 4, 5, 7)),
    "transposed": (Transposed, (3, 8, 8)),
    "flattened late": (FlattenedLate, IMAGE),
    "mean over one": (lambda: MeanOfChannels(3), (3, 4, 8, 8)),
    "mean over channels": (lambda: MeanOfChannels([1, 2]), (3, 4, 8, 8)),
    "sigmoid": (lambda: Softmax(torch.sigmoid), (3, 8)),
    "gelu": (lambda: Softmax(nn.GELU()), (3, 8)),
    "softmax": (lambda: Softmax(nn.Softmax(-1)), (3, 8)),
    "layer norm": (lambda: Softmax(nn.LayerNorm(8)), (3, 8)),
    "hard swish": (lambda: Softmax(nn.Hardswish()), (3, 8)),
    "clamp": (lambda: Softmax(lambda x: x.clamp(max=0.5)), (3, 8)),
    "offset": (lambda: Softmax(lambda x: x.relu() + 1), (3, 8)),
    "pooled channels": (MaxOverChannels, (3, 4, 8)),
    "relu6": (lambda: Softmax(nn.ReLU6()), (3, 8)),
    "batchnorm over steps": (lambda: Softmax(nn.BatchNorm1d(8)), (3, 8, 8)),
    "batchnorm without scale": (lambda: Softmax(nn.BatchNorm1d(8, affine=False)), (3, 8)),
    "batchnorm of the batch": (lambda: Softmax(nn.BatchNorm1d(8, track_running_stats=False)), (3, 8)),
    "batchnorm after relu": (lambda: Softmax(nn.Sequential(nn.Sigmoid(), nn.BatchNorm1d(8))), (3, 8)),
    "group norm": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 1)),
        IMAGE,
    ),
    "transposed convolution": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 8, 2), nn.ReLU(), nn.Conv2d(8, 4, 1)),
        IMAGE,
    ),
    "padded by ones": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.ConstantPad2d(1, 1.0), nn.Conv2d(8, 4, 3)),
        IMAGE,
    ),
    "pixel shuffle": (lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.PixelShuffle(2), nn.Conv2d(2, 4, 1)), IMAGE),
}


@pytest.mark.parametrize("name", NO_PAIRS)
def test_what_is_no_pair_stays_bit_identical(name: str) -> None:
    torch.manual_seed(0)
    make, shape = NO_PAIRS[name]
    model = spread_(make()).eval()
    before, x = snapshot(model), torch.randn(*shape)
    graph = traced(model, x)
    owners = [id(one) for module in model.modules() for one in module.parameters(recurse=False)]
    shared = {key for key in owners if owners.count(key) > 1}
    assert names(model, graph, shared) == []
    equalize_(graph, shared, False, Moved())
    assert_same_state(before, model)


@pytest.mark.parametrize("name", NO_PAIRS)
def test_whatever_is_taken_for_a_pair_int8_stays_close_to_float(name: str) -> None:
    # What the walk over the graph overlooks, the comparison of the outputs finds.
    torch.manual_seed(0)
    make, shape = NO_PAIRS[name]
    model, x = make().eval(), torch.randn(16, *shape[1:])
    before = snapshot(model)
    got = quantize(model, calibration=[x]).eval()(x)
    expected = model(x)
    for one, other in zip(
        expected if isinstance(expected, tuple) else (expected,), got if isinstance(got, tuple) else (got,), strict=True
    ):
        assert F.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.99
    assert_same_state(before, model)


def test_a_layer_whose_weight_others_read_is_refused_or_right() -> None:
    model, x = ReadWeight().eval(), torch.randn(16, 4)
    before = snapshot(model)
    try:
        got = quantize(model, calibration=[x]).eval()(x)
    except CompressionError as error:
        assert "reads the weights of a quantized layer" in str(error)
    else:
        assert relative(model(x), got) < 0.1
    assert_same_state(before, model)
    kept = quantize(model, calibration=[x], targets=Targets(exclude=["a"])).eval()
    assert relative(model(x), kept(x)) < 0.1


def test_parameters_that_are_kept_stay_bit_identical() -> None:
    model = spread_(nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1)))
    before, x = snapshot(model.eval()), torch.randn(*IMAGE)
    graph = traced(model, x)
    assert adjust_(graph, [x], {id(model[2].bias)}, equalize=True, smooth=True, widen=True) == ([], {})
    assert_same_state(before, model)
    adjust_(graph, [x], {id(model[4].weight)}, equalize=True, smooth=True, widen=True)
    assert set(differing(before, model)) == {"0.weight", "0.bias", "2.weight"}


def test_an_excluded_layer_and_a_tied_one_are_left_by_quantize() -> None:
    model = spread_(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))).eval()
    x = torch.randn(64, 16)
    int8 = quantize(model, calibration=[x], targets=Targets(exclude=["2"]))
    [left] = [one for one in int8.modules() if type(one) is nn.Linear and one._parameters["weight"] is not None]
    assert torch.equal(left.weight, model[2].weight) and torch.equal(left.bias, model[2].bias)


# ReLU6.


def sixes(scale: float) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 1), nn.ReLU6(), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        model[0].weight *= scale
    return model.eval()


def test_relu6_becomes_relu_only_where_the_outputs_agree() -> None:
    x = torch.randn(*IMAGE)
    for scale, widened in ((1.0, ["1", "3"]), (40.0, [])):
        model = spread_(sixes(scale), low=0.5, high=2.0)
        before, expected, graph = snapshot(model), model(x), traced(model, x)
        assert adjust_(graph, [x], set(), equalize=True, smooth=False, widen=True)[0] == widened
        widen_(graph, widened)
        assert relative(expected, graph(x)[0]) < 0.05
        if not widened:
            assert_same_state(before, model)


class Six(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x)


@pytest.mark.parametrize("make", [nn.ReLU6, lambda: nn.ReLU6(inplace=True), Six, lambda: nn.Hardtanh(0, 6)])
def test_however_relu6_is_written_it_can_become_relu(make: Any) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), make(), nn.Linear(8, 8)).eval(), 20 * torch.randn(5, 8)
    graph = traced(model, x)
    assert [pair.relu6 for pair in pairs(graph, set())] == [("1",)]
    widen_(graph, ["0", "2"])
    torch.testing.assert_close(graph(x)[0], model(x))
    widen_(graph, ["1"])
    torch.testing.assert_close(graph(x)[0], model[2](model[0](x).relu()))


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.b(self.act(self.a(x))))


@pytest.mark.parametrize(
    "make", [CalledTwice, *(lambda act=act: Softmax(act) for act in (nn.Hardtanh(0, 5), F.hardtanh))]
)
def test_a_relu6_that_is_called_twice_and_another_clamp_stay(make: Any) -> None:
    assert list(pairs(traced(make(), torch.randn(5, 8)), set())) == []


def test_widening_is_written_down_and_comes_back_from_the_record(tmp_path: Path) -> None:
    model, x = sixes(1.0), torch.randn(16, 4, 8, 8)
    with torch.no_grad():  # what two channels give is to grow, past 6
        model[0].bias[:2] = 1.5
        model[2].weight[:, 2:] /= 100
    int8 = quantize(model, calibration=[x])
    [unit] = (record_of(int8) or {})["units"]
    assert unit["widened"] == ["1", "3"]
    save_compressed(int8, tmp_path / "model.ckpt")
    loaded = load_compressed(tmp_path / "model.ckpt", sixes(1.0))
    for form in (int8, loaded):
        assert relative(model(x), form.eval()(x)) < 0.05
    assert [type(module) for module in model][1::2] == [nn.ReLU6] * 2
    left = quantize(model, StaticInt8(equalize=False), calibration=[x])
    assert (record_of(left) or {})["units"][0]["widened"] == []
