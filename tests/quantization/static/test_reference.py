"""A converted graph in plain numbers: read, put into one that is built anew, and computed without upstream."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import convert_to_reference_fx
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm
from torch.utils import _pytree as pytree

from lightning_compress.quantization.layers.int8_weight import Int8Weight
from lightning_compress.quantization.numerics.int8 import StaticInt8
from lightning_compress.quantization.static.flows import fx, pt2e
from lightning_compress.quantization.static.flows.flow import Rounding, Signature, canonical
from lightning_compress.quantization.static.flows.pt2e_trace import Exported
from lightning_compress.quantization.static.reference import reference
from tests.quantization.static.flows.children import child
from tests.quantization.static.traces import spread_
from tests.support.zoo import ZOO, Row, floats

FLOWS: dict[str, tuple[Any, bool]] = {"fx": (fx, False), "fx_trained": (fx, True), "pt2e": (pt2e, False)}


class Pieces(nn.Module):
    """A layer that is called twice, a weight of the module's own, numbers that scale and shift, fixed ranges."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8) / 3)
        self.shift = nn.Parameter(torch.randn(8))
        self.twice, self.out, self.norm = nn.Linear(8, 8), nn.Linear(8, 3), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Any:
        y = functional.linear(x, self.weight) + self.shift
        y = self.norm(self.twice(self.twice(y).relu())) + y
        return {"out": self.out(y), "gate": torch.sigmoid(y).softmax(-1), "index": y.argmax(1)}


class TwoNorms(nn.Module):
    """A convolution with another BatchNorm behind each of its calls, one of which turns signs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norms = (
            nn.Conv2d(3, 3, 3, padding="same", bias=False),
            nn.ModuleList(map(nn.BatchNorm2d, (3, 3))),
        )
        self.out = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.norms
        return self.out(second(self.conv(first(self.conv(x)).relu())) + x)  # type: ignore[no-any-return]


class Computed(nn.Module):
    """Weights that are computed of others, of a layer with a BatchNorm too."""

    def __init__(self) -> None:
        super().__init__()
        self.a = weight_norm(nn.Conv2d(3, 4, 3))
        self.norm, self.v, self.out = nn.BatchNorm2d(4), nn.Parameter(torch.randn(5, 4)), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x)).mean((2, 3))
        return self.out(functional.linear(y, self.v / 2).relu())  # type: ignore[no-any-return]


OWN = [
    Row("pieces", Pieces, floats(4, 8)),
    Row("two_norms", TwoNorms, floats(2, 3, 8, 8)),
    Row("computed", Computed, floats(2, 3, 8, 8)),
]
ROWS = {row.name: row for row in (*ZOO, *OWN)}
NAMES = (
    *("mlp", "conv_bn_relu", "residual", "depthwise", "concat", "attention", "transformer", "lstm", "shared"),
    *("keyword_only", "dict", "inplace_relu", "weight_norm", "tied", "pieces", "two_norms", "computed"),
)


class Case:
    """One network of the zoo, prepared by one flow, and what makes an int8 graph of another with the same structure."""

    def __init__(self, name: str, flow: str, scheme: StaticInt8 | None = None) -> None:
        self.row, self.scheme = ROWS[name], scheme or StaticInt8()
        self.flow, self.training = FLOWS[flow]
        self.model = spread_(self.row.build(), low=0.5, high=2.0).train(self.training)
        self.signature = Signature(*canonical(self.model, *self.row.inputs()))
        self.graph, self.prepared = self.prepare(self.model)
        self._observe_()
        self.int8 = self.flow.convert(self.prepared, self.scheme)
        self.roundings: list[Rounding] = self.flow.roundings(self.graph, self.prepared)
        self.layers: set[str] = self.flow.int8_layers(self.prepared)
        # The weights that are parameters as they stand.
        self.weights = {path: parameter_of(self.model, path) for path in self.layers if has_parameter(self.model, path)}

    def prepare(self, model: nn.Module) -> tuple[nn.Module, nn.Module]:
        graph = self.flow.trace(model.train(self.training), self.signature).graph
        return graph, self.flow.prepare(graph, self.scheme, training=self.training).train(self.training)

    def inputs(self, seed: int) -> list[Tensor]:
        found = self.signature.tensors(*canonical(self.model, *self.row.inputs(seed)))
        assert found is not None
        return found

    def _observe_(self) -> None:
        self.flow.observe_(self.prepared, True)
        optimizer = torch.optim.SGD(self.model.parameters(), 1e-2)
        for seed in range(2):
            outputs = tensors(self.prepared(*self.inputs(seed)))
            if self.training:
                sum(out.square().mean() for out in outputs if out.requires_grad).backward()  # type: ignore[union-attr]
                optimizer.step()
        self.flow.observe_(self.prepared, False)
        self.prepared.eval()
        self.model.eval()

    def dequantized(self) -> nn.Module:
        """A copy of the model with the values that its codes stand for."""
        model = copy.deepcopy(self.model).eval()
        for path, weight in self.weights.items():
            parameter_of(model, path).data.copy_(Int8Weight.nearest(weight, self.scheme.reduced)())
        return model

    def built_anew(self) -> tuple[nn.Module, nn.Module]:
        """The prepared and the int8 graph of the values of the codes, without a batch."""
        graph, prepared = self.prepare(self.dequantized())
        self.flow.fix_(graph, prepared.eval(), self.roundings)
        return prepared, self.flow.convert(prepared, self.scheme)

    def reference(self, model: nn.Module, weights: Mapping[str, nn.Module] = MappingProxyType({})) -> nn.Module:
        graph = self.flow.trace(model.train(self.training), self.signature).graph
        computed = self.layers - self.weights.keys()
        return reference(graph, self.training, self.roundings, weights, computed, self.scheme.reduced)


def has_parameter(model: nn.Module, path: str) -> bool:
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return f"{path}.weight" in names or path in names


def parameter_of(model: nn.Module, path: str) -> Tensor:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return parameters[f"{path}.weight"] if f"{path}.weight" in parameters else parameters[path]


def tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def flipped(expected: Any, got: Any) -> float:
    """The largest share of elements that are further apart than 1e-5 of the range, over the tensors of outputs."""
    pairs = list(zip(tensors(expected), tensors(got), strict=True))
    assert pairs
    return max(float(((a - b).abs() > 1e-5 * (a.max() - a.min())).float().mean()) for a, b in pairs)


def apart(expected: Any, got: Any) -> float:
    """How far outputs are apart at most, as a share of their range: a code that lay between two moves a few of them."""
    pairs = list(zip(tensors(expected), tensors(got), strict=True))
    assert pairs
    return max(((a - b).abs().max() / (a.max() - a.min())).item() for a, b in pairs)


def uncompiled(int8: nn.Module) -> nn.Module:
    return int8.graph if isinstance(int8, Exported) else int8


def upstreams_reference(case: Case, prepared: nn.Module, int8: nn.Module) -> nn.Module:
    if case.flow is pt2e:
        return uncompiled(int8)
    return fx._convert_with(convert_to_reference_fx, prepared, case.scheme, ())


CASES = [pytest.param(name, flow, id=f"{name}-{flow}") for name in NAMES for flow in FLOWS]


@pytest.mark.parametrize(("name", "flow"), CASES)
def test_a_graph_that_is_built_anew_computes_what_was_converted(name: str, flow: str) -> None:
    case = Case(name, flow)
    graphs, inputs = [case.built_anew()[1] for _ in range(2)], case.inputs(7)
    first, second = (tensors(uncompiled(int8)(*inputs)) for int8 in graphs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert apart(uncompiled(case.int8)(*inputs), first) < 0.02


@pytest.mark.parametrize(("name", "flow"), CASES)
def test_the_reference_form_computes_what_upstreams_does(name: str, flow: str) -> None:
    case = Case(name, flow)
    expected, inputs = upstreams_reference(case, *case.built_anew()), case.inputs(7)
    assert apart(expected(*inputs), case.reference(case.dequantized())(*inputs)) < 0.02
    weights = {path: Int8Weight.nearest(weight, case.scheme.reduced) for path, weight in case.weights.items()}
    assert apart(expected(*inputs), case.reference(copy.deepcopy(case.model), weights)(*inputs)) < 0.02


@pytest.mark.parametrize("flow", ["fx", "fx_trained"])
@pytest.mark.parametrize(
    "scheme", [StaticInt8(engine="qnnpack"), StaticInt8(engine="onednn", reduce_range=True)], ids=str
)
def test_kernels_of_every_engine_have_the_layers_codes(flow: str, scheme: StaticInt8) -> None:
    case = Case("conv_bn_relu", flow, scheme)
    _, int8 = case.built_anew()
    kernels = {path: layer for path, layer in int8.named_modules() if path in case.weights}
    assert len(kernels) == len(case.weights) > 1
    for path, kernel in kernels.items():
        codes = Int8Weight.nearest(case.weights[path], scheme.reduced).codes
        assert codes.abs().max() == (63 if scheme.reduced else 127)
        # A BatchNorm that is folded into the weight may turn signs.
        assert torch.equal(kernel.weight().int_repr().abs(), codes.abs()), path


@pytest.mark.parametrize("flow", FLOWS)
def test_layers_are_named_by_their_weights_in_the_module(flow: str) -> None:
    assert Case("pieces", flow).layers == {"weight", "twice", "out"}
    assert Case("two_norms", flow).layers == {"conv", "out"}
    computed = Case("computed", flow)
    assert set(computed.weights) == {"out"}
    assert len(computed.layers) == (1 if computed.training else 3)


@pytest.mark.parametrize("flow", FLOWS)
def test_a_weight_that_something_else_reads_stays_float(flow: str) -> None:
    case = Case("tied", flow)
    (embedding,) = (module for module in case.model.modules() if isinstance(module, nn.Embedding))
    assert case.weights
    assert not any(weight is embedding.weight for weight in case.weights.values())


class Scaled(nn.Module):
    """Multiplies by numbers, which upstream's observers don't follow."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b((self.a(x) * -4.0).relu() + 3.0) * 2  # type: ignore[no-any-return]


@pytest.mark.parametrize("flow", ["fx", "fx_trained"])
def test_kernels_of_a_tensor_and_a_number_clip_nothing_in_the_reference_form(
    flow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ROWS, "scaled", Row("scaled", Scaled, floats(64, 8)))
    case = Case("scaled", flow)
    inputs = case.inputs(7)
    assert flipped(case.int8(*inputs), case.reference(case.dequantized())(*inputs)) < 1e-2
    if case.training:  # calibration has seen what comes out too
        assert flipped(case.int8(*inputs), upstreams_reference(case, case.prepared, case.int8)(*inputs)) > 0.1


def test_layers_of_a_trace_are_others_around_the_same_tensors() -> None:
    model = ROWS["conv_bn_relu"].build()
    graph = fx.trace(model, Signature(*ROWS["conv_bn_relu"].inputs())).graph
    own = {id(module) for module in model.modules()}
    assert not any(id(module) in own for module in graph.modules())
    assert {id(tensor) for tensor in graph.parameters()} == {id(tensor) for tensor in model.parameters()}
    assert {id(tensor) for tensor in graph.buffers()} == {id(tensor) for tensor in model.buffers()}


def test_copies_of_exported_graphs_compile_for_themselves(recwarn: pytest.WarningsRecorder) -> None:
    int8 = Case("mlp", "pt2e").int8
    int8._compiled, int8._known = "compiled", {"shape"}
    recwarn.clear()
    twin = copy.deepcopy(int8)
    assert not recwarn.list
    assert twin._compiled is None and not twin._known and twin.graph is not int8.graph


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
from lightning_compress.quantization.static.flows.flow import Rounding, Signature, tracer
from lightning_compress.quantization.static.reference import reference
from tests.support.zoo import row
file = torch.load(sys.argv[1], weights_only=True)
model = row(file["row"]).build().eval()
model.load_state_dict(file["state"])
graph = tracer(file["flow"])(model, Signature(tuple(file["inputs"]), {}), ()).graph
form = reference(graph, False, [Rounding(*rounding) for rounding in file["roundings"]], {})
torch.testing.assert_close(form(*file["inputs"]), file["outputs"])
compiled = torch.compile(form, fullgraph=True, backend="eager")
torch.testing.assert_close(compiled(*file["inputs"]), file["outputs"])
for strict in (True, False):
    exported = torch.export.export(form, tuple(file["inputs"]), strict=strict).module()
    torch.testing.assert_close(exported(*file["inputs"]), file["outputs"])
assert not [name for name in sys.modules if name.startswith(("torch.ao", "torchao"))]
"""


@pytest.mark.slow  # a file is read and computed so in test_tree.py
@pytest.mark.parametrize("flow", ["fx", "pt2e"])
def test_the_reference_form_needs_no_upstream(flow: str, tmp_path: Path) -> None:
    case = Case("conv_bn_relu", flow)
    inputs = case.inputs(7)
    plain = {
        **{"row": "conv_bn_relu", "flow": flow, "state": case.dequantized().state_dict()},
        "roundings": [astuple(rounding) for rounding in case.roundings],
        **{"inputs": inputs, "outputs": case.reference(case.dequantized())(*inputs)},
    }
    torch.save(plain, tmp_path / "plain.pt")
    run = child(WITHOUT_UPSTREAM, str(tmp_path / "plain.pt"))
    assert run.returncode == 0, run.stderr
