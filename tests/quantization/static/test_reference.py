"""The reference form against the formula of int8 computed by hand, in numpy, from the codes and roundings of a file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from lightning_compress import StaticInt8, quantize, save_compressed
from lightning_compress.modules.routing import form_of
from lightning_compress.quantization.convert import convert_prepared_, record_of
from lightning_compress.quantization.layers.int8_weight import Int8Weight
from lightning_compress.quantization.static.graphs import int8_layers
from lightning_compress.quantization.static.reference import reference
from lightning_compress.quantization.static.rounding import Rounding
from lightning_compress.quantization.static.signature import Signature
from lightning_compress.quantization.static.trace import trace
from lightning_compress.quantization.static.traced import Traced
from lightning_compress.quantization.static.unit import Unit
from tests.quantization.prepared import prepare_for_training_
from tests.quantization.static.children import child
from tests.support.zoo import Row, row

PLAIN = StaticInt8(equalize=False, smooth=False)


def calibrated(model: nn.Module, *inputs: Tensor) -> Traced:
    """A unit that has seen a batch."""
    form = Traced(Unit("", Signature(inputs, {})), PLAIN, training=False).build_(model.eval())
    form.calibrating = True
    with torch.no_grad():
        form.run(False, list(inputs))
    form.calibrating = False
    return form


def reference_of(model: nn.Module, *inputs: Tensor) -> tuple[Any, list[Rounding]]:
    """The reference form of a model that has seen a batch, with the codes nearest to its weights, and its roundings."""
    form = calibrated(model, *inputs)
    roundings = form.roundings()
    return reference(form.trace.graph, roundings, {}), roundings


# By hand.


def round_(x: np.ndarray, rounding: Rounding) -> np.ndarray:
    codes = np.clip(np.rint(x / rounding.scale) + rounding.zero_point, rounding.low, rounding.high)
    return (codes - rounding.zero_point) * rounding.scale


def round_weight(weight: Tensor) -> np.ndarray:
    values = weight.detach().double().numpy()
    scale = np.maximum(np.abs(values).reshape(len(values), -1).max(1), 1e-12) / 127
    scale = scale.reshape(-1, *[1] * (values.ndim - 1))
    return np.rint(values / scale) * scale


def numpy_of(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def assert_near(got: Tensor, expected: np.ndarray, share: float = 0.02) -> None:
    """All but a few elements are equal to float32's precision; a code that lay between two moves the rest a little."""
    off = np.abs(numpy_of(got) - expected) / (expected.max() - expected.min())
    assert (off > 1e-5).mean() <= share and off.max() < 0.02


def test_an_mlp() -> None:
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(32, 8)
    form, (first, second) = reference_of(model, x)
    assert (first.low, first.high) == (0, 255)
    hidden = round_(numpy_of(x), first) @ round_weight(model[0].weight).T + numpy_of(model[0].bias)
    hidden = round_(np.maximum(hidden, 0), second)
    assert_near(form(x)[0], hidden @ round_weight(model[2].weight).T + numpy_of(model[2].bias))


def norm_(norm: Any) -> Any:
    """Give it statistics of its own, and gains that are negative, zero and tiny."""
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.5, -2.0, 0.0, 1e-4, -0.3, 1.0]))
        norm.bias.normal_(), norm.running_mean.normal_(), norm.running_var.uniform_(0.1, 4.0)
    return norm


@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_with_batchnorm_and_relu(bias: bool) -> None:
    # 1x1, which is a product of matrices by hand. The weight is rounded as it is, and then scaled by γ / σ.
    conv, norm, head = nn.Conv2d(3, 6, 1, bias=bias), norm_(nn.BatchNorm2d(6, eps=0.01)), nn.Conv2d(6, 4, 1)
    x = torch.randn(4, 3, 5, 5)
    form, (first, second) = reference_of(nn.Sequential(conv, norm, nn.ReLU(), head), x)
    assert "batch_norm" not in form.code
    rows = numpy_of(x.movedim(1, -1).reshape(-1, 3))
    hidden = round_(rows, first) @ round_weight(conv.weight)[..., 0, 0].T
    hidden = hidden + (numpy_of(conv.bias) if conv.bias is not None else 0.0) - numpy_of(norm.running_mean)
    hidden = hidden * numpy_of(norm.weight) / np.sqrt(numpy_of(norm.running_var) + 0.01) + numpy_of(norm.bias)
    hidden = round_(np.maximum(hidden, 0), second)
    expected = hidden @ round_weight(head.weight)[..., 0, 0].T + numpy_of(head.bias)
    assert_near(form(x)[0].movedim(1, -1).reshape(-1, 4), expected)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 1, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x)
        return self.c((self.b(first) + first).relu())


def test_a_residual_sum_has_codes_on_both_sides_and_behind() -> None:
    model, x = Residual(), torch.randn(4, 3, 5, 5)
    form, roundings = reference_of(model, x)
    entry, first, second, total = roundings
    rows = numpy_of(x.movedim(1, -1).reshape(-1, 3))
    weights = [round_weight(layer.weight)[..., 0, 0].T for layer in (model.a, model.b, model.c)]
    a = round_(round_(rows, entry) @ weights[0], first)
    b = round_(a @ weights[1], second)
    expected = round_(np.maximum(a + b, 0), total) @ weights[2]
    assert_near(form(x)[0].movedim(1, -1).reshape(-1, 3), expected)


class Twice(nn.Module):
    """A layer that is called twice, and a weight of the module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.own = nn.Linear(8, 8), nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.shared(self.shared(x).relu()), self.own)


def test_a_layer_that_is_called_twice_has_one_weight_and_two_roundings() -> None:
    model, x = Twice(), torch.randn(32, 8)
    form, (first, second, third) = reference_of(model, x)
    weight, bias = round_weight(model.shared.weight).T, numpy_of(model.shared.bias)
    hidden = round_(np.maximum(round_(numpy_of(x), first) @ weight + bias, 0), second)
    expected = round_(hidden @ weight + bias, third) @ round_weight(model.own).T
    assert_near(form(x)[0], expected)


def test_a_weight_that_is_computed_is_rounded_as_it_comes_out() -> None:
    model, x = nn.Sequential(weight_norm(nn.Linear(8, 4))), torch.randn(32, 8)
    form, (first,) = reference_of(model, x)
    expected = round_(numpy_of(x), first) @ round_weight(model[0].weight).T + numpy_of(model[0].bias)
    assert_near(form(x)[0], expected)


# Codes, and what becomes of a BatchNorm.


def test_codes_that_are_given_are_used_whatever_the_weights_are() -> None:
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(32, 8)
    form = calibrated(model, x)
    codes = Int8Weight.nearest(torch.randn(4, 8), False)
    (rounding,) = form.roundings()
    got = reference(form.trace.graph, [rounding], {"0": codes})(x)[0]
    assert_near(got, round_(numpy_of(x), rounding) @ numpy_of(codes()).T + numpy_of(model[0].bias))


class TwoNorms(nn.Module):
    """A convolution with another BatchNorm behind each of its calls, one of which turns signs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding="same", bias=False)
        self.norms = nn.ModuleList([norm_(nn.BatchNorm2d(6)) for _ in range(2)])
        self.out = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.norms
        return self.out(second(self.conv(first(self.conv(x)).relu())) + x)


class Sequences(nn.Module):
    """A linear layer whose BatchNorm reads another dimension, and a convolution that is read beside its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 5), norm_(nn.BatchNorm1d(6))
        self.conv, self.beside, self.out = nn.Conv1d(6, 6, 1), norm_(nn.BatchNorm1d(6)), nn.Conv1d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.norm(self.linear(x)).relu())
        return self.out(self.beside(y) + y)


NORMS = {"two norms": (TwoNorms, (4, 6, 5, 5), 0), "not folded": (Sequences, (4, 6, 8), 2)}


@pytest.mark.parametrize("name", NORMS)
def test_folding_changes_nothing(name: str) -> None:
    make, shape, unfolded = NORMS[name]
    model, x = make(), torch.randn(shape)
    form = calibrated(model, x)
    folded = reference(form.trace.graph, form.roundings(), {})
    for found in (folded, reference(form.trace.graph, [], {})):
        assert found.code.count("batch_norm.default") == unfolded
    # The same with rounded weights, by the prepared form, which folds nothing.
    rounded, layers = copy.deepcopy(model), int8_layers(form.trace.graph).values()
    with torch.no_grad():
        for path in layers:
            rounded.get_submodule(path).weight.copy_(torch.from_numpy(round_weight(model.get_submodule(path).weight)))
    twin = Traced(form.unit, PLAIN, training=False).build_(rounded.eval())
    twin.load_extra_(form.extra_state())
    twin.rounds = True
    assert_near(folded(x)[0], numpy_of(twin.run(False, [x])), share=0.05)


def trained(row: Row) -> tuple[nn.Module, nn.Module]:
    """A row's model in prepared form after two steps, and in int8."""
    model, (args, kwargs) = row.build(), row.inputs(0)
    prepare_for_training_(model, args[0], PLAIN)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(2):
        model.train()(*args, **kwargs).square().mean().backward()
        optimizer.step()
    int8 = copy.deepcopy(model)
    convert_prepared_(int8.eval())
    return model.eval(), int8


@pytest.mark.parametrize("name", ["mlp", "conv_bn_relu", "residual", "depthwise", "concat", "shared", "weight_norm"])
def test_what_was_trained_is_what_is_computed(name: str) -> None:
    prepared, int8 = trained(row(name))
    (x,), _ = row(name).inputs(3)
    form: Any = form_of(int8)
    assert (record_of(int8) or {})["form"] == "converted"
    int8(x)  # makes its forms
    assert_near(form._reference(x)[0], numpy_of(prepared(x)), share=0.1)
    assert_near(int8(x), numpy_of(prepared(x)), share=1.0)


def test_a_graph_is_left_as_it_is() -> None:
    model, x = TwoNorms(), torch.randn(4, 6, 5, 5)
    form = calibrated(model, x)
    code, expected = form.trace.graph.code, form.trace.graph(x)[0]
    reference(form.trace.graph, form.roundings(), {})
    assert form.trace.graph.code == code and torch.equal(form.trace.graph(x)[0], expected)
    assert {id(tensor) for tensor in form.trace.graph.parameters()} == {id(tensor) for tensor in model.parameters()}


@pytest.mark.parametrize("reduced", [False, True])
def test_codes_of_computed_weights_have_7_bits_where_asked(reduced: bool) -> None:
    model, x = nn.Sequential(weight_norm(nn.Linear(8, 4))), torch.randn(32, 8)
    graph = trace(model.eval(), Signature((x,), {})).graph
    form = reference(graph, [], {}, reduced=reduced)
    [weight] = [inner for inner in form.modules() if isinstance(inner, Int8Weight)]
    assert weight.codes.abs().max() == (63 if reduced else 127)


def test_what_stays_float_is_not_rounded() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), torch.randn(32, 8)
    graph = trace(model.eval(), Signature((x,), {})).graph
    form = reference(graph, [], {}, floats=["0"])
    expected = functional.linear(model[0](x), Int8Weight.nearest(model[1].weight, False)(), model[1].bias)
    torch.testing.assert_close(form(x)[0], expected)


# Where nothing of upstream is left.

WITHOUT_UPSTREAM = """
import sys, torch
for name in [name for name in sys.modules if name.startswith("torch.ao")]:
    del sys.modules[name]
del torch.ao

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("torch.ao", "torchao")):
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
from torch import nn
from lightning_compress import load_compressed, quantize
from tests.support.zoo import row
model = load_compressed(sys.argv[1], row("conv_bn_relu").build())
inputs, expected = torch.load(sys.argv[2])
torch.testing.assert_close(model(inputs), expected)
for strict in (True, False):
    exported = torch.export.export(model, (inputs,), strict=strict).module()
    torch.testing.assert_close(exported(inputs), expected, rtol=1e-2, atol=1e-3)
again = quantize(row("conv_bn_relu").build(), calibration=[inputs])
assert torch.equal(again(inputs), expected)
assert not [name for name in sys.modules if name.startswith(("torch.ao", "torchao"))]
"""


@pytest.mark.slow  # a file is read and computed so in test_tree.py
def test_static_int8_needs_no_upstream(tmp_path: Path) -> None:
    (x,), _ = row("conv_bn_relu").inputs(0)
    int8 = quantize(row("conv_bn_relu").build(), calibration=[x])
    save_compressed(int8, str(tmp_path / "int8.ckpt"))
    torch.save((x, int8(x)), tmp_path / "outputs.pt")
    run = child(WITHOUT_UPSTREAM, str(tmp_path / "int8.ckpt"), str(tmp_path / "outputs.pt"))
    assert run.returncode == 0, run.stderr
