"""Smoothing behind LayerNorm, and what both gain in int8."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compress import PostTrainingQuantization, StaticInt8, quantize
from lightning_compress.quantization.static.equalize import Moved, equalize_, smooth_
from lightning_compress.quantization.static.signature import Signature
from lightning_compress.quantization.static.trace import trace
from tests.quantization.static.traces import drawn_, geometric_mean, relative, spread_, traced
from tests.support.modules import ZooModule, quiet_trainer
from tests.support.oracles import assert_same_state, differing, snapshot
from tests.support.zoo import ZOO, Row, row

# SmoothQuant.


class Block(nn.Module):
    """A LayerNorm that three layers read, and one that a residual reads too."""

    def __init__(self, also: bool = False) -> None:
        super().__init__()
        self.norm, self.q, self.k, self.v = nn.LayerNorm(16), *(nn.Linear(16, 16) for _ in range(3))
        self.also = also

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        y = torch.tanh(self.q(x)) * torch.sigmoid(self.k(x)) + self.v(x)
        return x + y if self.also else y


@cache
def traced_block() -> tuple[Any, Any]:
    model = Block()
    return model, traced(model, torch.randn(4, 5, 16))


@settings(max_examples=30)
@given(seed=st.integers(0, 2**16), outlier=st.floats(1.0, 100.0))
def test_the_scales_behind_a_layernorm_are_smoothquants(seed: int, outlier: float) -> None:
    model, graph = traced_block()
    drawn_(model, seed)
    x = torch.randn(4, 5, 16)
    with torch.no_grad():
        model.norm.weight[3] *= outlier
        model.norm.bias.normal_()
    gamma, beta = (parameter.detach().numpy().copy() for parameter in model.norm.parameters())
    weights = [layer.weight.detach().numpy().copy() for layer in (model.q, model.k, model.v)]
    biases = [layer.bias.detach().clone() for layer in (model.q, model.k, model.v)]
    expected = model(x)
    mean, variance = x.numpy().mean(-1, keepdims=True), x.numpy().var(-1, keepdims=True)
    activations = (x.numpy() - mean) / np.sqrt(variance + model.norm.eps) * gamma + beta
    largest = np.abs(activations.reshape(-1, 16)).max(0)
    s = largest**0.5 / np.abs(np.concatenate(weights)).max(0) ** 0.5  # equation 4, one for all that read it
    s /= geometric_mean(s)
    smooth_(graph, set(), [x], Moved())
    for got, want in ((model.norm.weight, gamma / s), (model.norm.bias, beta / s)):
        np.testing.assert_allclose(got.detach().numpy(), want, rtol=1e-4, atol=1e-6)
    for layer, weight, bias in zip((model.q, model.k, model.v), weights, biases, strict=True):
        np.testing.assert_allclose(layer.weight.detach().numpy(), weight * s, rtol=1e-4)
        assert torch.equal(layer.bias, bias)
    assert relative(expected, graph(x)[0]) < 1e-4


class OtherReader(nn.Module):
    """A LayerNorm that something else than a linear layer reads."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        shape = (5, 16) if kind == "two dimensions" else 16
        self.norm, self.a, self.b = (
            nn.LayerNorm(shape, elementwise_affine=kind != "plain"),
            nn.Linear(16, 16),
            nn.Linear(16, 16),
        )
        if kind == "tied":
            self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.kind == "activation between":
            return self.a(y.relu())
        if self.kind == "twice":
            return self.a(self.norm(self.a(y)))
        if self.kind == "matrix":
            return self.a(y) + y @ y.transpose(1, 2) @ x
        if self.kind == "tied":
            return self.b(x) + self.a(y)
        if self.kind == "transposed":
            return self.a(self.b(x) + y.mean(1, keepdim=True))
        return self.a(y)


KINDS = ["activation between", "twice", "matrix", "tied", "transposed", "plain", "two dimensions"]


@pytest.mark.parametrize("kind", ["residual", *KINDS])
def test_a_layernorm_that_others_read_is_left(kind: str) -> None:
    torch.manual_seed(0)
    model = Block(also=True) if kind == "residual" else OtherReader(kind)
    with torch.no_grad():
        if kind != "plain":
            model.norm.weight[..., 3] *= 20
    before, x = snapshot(model.eval()), torch.randn(4, 5, 16)
    smooth_(traced(model, x), set(), [x], Moved())
    assert_same_state(before, model)


def test_channels_that_are_never_seen_or_read_keep_their_scale() -> None:
    model, x = Block().eval(), torch.randn(4, 5, 16)
    with torch.no_grad():
        model.norm.weight[2], model.norm.bias[2] = 0, 0
        for layer in (model.q, model.k, model.v):
            layer.weight[:, 5] = 0
    expected, graph = model(x), traced(model, x)
    smooth_(graph, set(), [x], Moved())
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert relative(expected, graph(x)[0]) < 1e-4


# The float function over the zoo.


@pytest.mark.parametrize("row", ZOO, ids=str)
def test_over_the_zoo_the_float_function_stays(row: Row) -> None:
    model = spread_(row.build(), low=0.3, high=3.0).eval()
    args, kwargs = row.inputs(0)
    signature = Signature(args, kwargs)
    graph = trace(model, signature).graph
    inputs = signature.tensors(args, kwargs)
    assert inputs is not None
    expected, *_ = graph(*inputs)
    relu6 = equalize_(graph, set(), False, Moved())
    smooth_(graph, set(), inputs, Moved())
    got, *_ = graph(*inputs)
    assert relu6 == []
    assert relative(expected, got) < 1e-4


# What it gains, in true int8 against float.


def test_two_layernorms_are_smoothed_both() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4)).eval()
    x = torch.randn(64, 16)
    expected, before = model(x), snapshot(model)
    assert relative(expected, quantize(model, calibration=[x]).eval()(x)) < 0.1
    graph = traced(model, x)
    smooth_(graph, set(), [x], Moved())
    assert {"0.weight", "1.weight", "2.weight", "3.weight"} <= set(differing(before, model))
    assert relative(expected, graph(x)[0]) < 1e-4


def hard_cnn() -> nn.Module:
    """Channel scales that are log-uniform in [0.1, 10] between its layers, undone by the next: int8 loses the small."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.ReLU(),
        nn.Conv2d(32, 32, 1), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for first, second in ((0, 2), (2, 4), (4, 6), (6, 10)):
            s = torch.empty(len(model[first].weight)).uniform_(np.log(0.1), np.log(10)).exp()
            model[first].weight *= s.view(-1, *[1] * (model[first].weight.dim() - 1))
            model[first].bias *= s
            if second == 2:
                model[second].weight /= s.view(-1, 1, 1, 1)
            else:
                model[second].weight /= s.view(1, -1, *[1] * (model[second].weight.dim() - 2))
    return model


def hard_transformer(depth: int = 1) -> nn.Module:
    torch.manual_seed(0)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(F.relu(self.up(self.norm(x))))

    last = [nn.LayerNorm(64), nn.Linear(64, 16)] if depth > 1 else []
    model = nn.Sequential(*(Layer() for _ in range(depth)), *last).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight[[5, 33]] *= 20
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.in_features == 64:
                module.weight[:, [5, 33]] /= 20  # as training leaves it: all channels matter alike
    return model


@pytest.mark.parametrize(
    ("make", "shape", "without", "gain"),
    [
        (hard_cnn, (3, 12, 12), {"equalize": False}, 2.0),
        (hard_transformer, (10, 64), {"smooth": False}, 1.5),
        (lambda: hard_transformer(3), (10, 64), {"smooth": False}, 1.5),
    ],
    ids=["equalize", "smooth", "smooth three layers"],
)
def test_a_model_that_is_hard_for_int8_gains(make: Any, shape: Any, without: Any, gain: float) -> None:
    model = make()
    calibration, x = [torch.randn(16, *shape) for _ in range(4)], torch.randn(64, *shape)
    before, expected = snapshot(model), model(x)
    errors = []
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        for scheme in (StaticInt8(), StaticInt8(**without)):
            int8 = quantize(model, scheme, calibration=calibration)
            errors.append(relative(expected, int8(x)))
    assert_same_state(before, model)
    assert errors[0] * gain < errors[1], errors
    assert errors[0] < 0.1


def test_in_a_trainer_the_float_weights_come_back() -> None:
    module = ZooModule(row("depthwise"))
    spread_(module.net, low=0.3, high=3.0)
    before = snapshot(module)
    kept = PostTrainingQuantization(keep=True)
    trainer = quiet_trainer(callbacks=[kept])
    trainer.test(module, verbose=False)
    again = copy.deepcopy(kept)
    trainer = quiet_trainer(callbacks=[again], max_steps=0)
    trainer.fit(module)
    assert_same_state(before, module)
