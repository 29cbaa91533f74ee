"""What a trace holds: the module's own tensors, what its operators compute, and nothing of the exporter's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress import CompressionError, StaticInt8, load_compressed, quantize, save_compressed
from lightning_compress.quantization.convert import record_of
from lightning_compress.quantization.static.graphs import aten
from lightning_compress.quantization.static.signature import Signature
from lightning_compress.quantization.static.trace import Trace, trace
from lightning_compress.quantization.static.traced import traced_units
from tests.quantization.prepared import prepare_for_training_
from tests.quantization.test_quantize import agreement
from tests.support.oracles import assert_same_state, hooks, same_random_state, snapshot
from tests.support.zoo import row


def traced(model: nn.Module, *inputs: Any, training: bool = False, **options: Any) -> Trace:
    return trace(model, Signature(inputs, {}), training=training, **options)


def operators(found: Trace) -> list[Any]:
    return [node.target for node in found.graph.graph.nodes if node.op == "call_function"]


# The tree that is traced.


def conv_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


@pytest.mark.parametrize("training", [False, True])
def test_a_trace_reads_the_modules_own_tensors_by_their_paths(training: bool) -> None:
    model, x = conv_net(), torch.randn(4, 3, 8, 8)
    found = traced(model, x, training=training)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    read = {**dict(found.graph.named_parameters()), **dict(found.graph.named_buffers())}
    assert read.keys() == own.keys() - {"1.num_batches_tracked"}
    assert all(read[name] is own[name] for name in read)
    assert found.names == frozenset(read)
    owners = {
        node.target: [*node.meta["nn_module_stack"].values()][-1][0]
        for node in found.graph.graph.nodes
        if node.op == "call_function"
    }
    assert owners[aten.conv2d.default] == "0" and owners[aten.linear.default] == "4"


@pytest.mark.parametrize("training", [False, True])
def test_tracing_changes_nothing_and_draws_nothing(training: bool) -> None:
    model = nn.Sequential(conv_net(), nn.Dropout(0.5))
    model[0][1].eval()
    model[0][2].register_forward_hook(lambda *_: None)
    state, modes = snapshot(model), [inner.training for inner in model.modules()]
    had, attributes = hooks(model), [set(vars(inner)) for inner in model.modules()]
    x = torch.randn(4, 3, 8, 8)
    with same_random_state():
        traced(model, x, training=training, hooked=["0.2"])
    assert_same_state(state, model)
    assert [inner.training for inner in model.modules()] == modes
    assert hooks(model) == had and [set(vars(inner)) for inner in model.modules()] == attributes
    assert not any(parameter.grad is not None for parameter in model.parameters())


class Literal(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"out": (x * torch.tensor([1.0, 2.0]), None), "count": 3}


def test_literals_are_constants_and_outputs_have_their_containers() -> None:
    found = traced(Literal(), torch.ones(2, 2))
    [constant] = found.names
    assert constant == "constant_0"
    outputs = found.graph(torch.ones(2, 2))
    assert len(outputs) == 1
    got = found.structure.rebuild(outputs)
    assert got["count"] == 3 and got["out"][1] is None and got["out"][0].tolist() == [[1.0, 2.0]] * 2


def test_a_trace_is_moved_onto_a_copy() -> None:
    model, x = conv_net().eval(), torch.randn(4, 3, 8, 8)
    found, twin = traced(model, x), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2.0)
    moved = found.onto(twin)
    torch.testing.assert_close(moved.graph(x)[0], twin(x))
    torch.testing.assert_close(found.graph(x)[0], model(x))
    assert {id(tensor) for tensor in moved.graph.parameters()} == {id(tensor) for tensor in twin.parameters()}


# Sizes.


@pytest.mark.parametrize("first", [1, 4])
@pytest.mark.parametrize("name", ["conv_bn_relu", "attention", "lstm", "grouped"])
def test_batches_of_any_size_whatever_the_first_was(name: str, first: int) -> None:
    model = row(name).build().eval()
    x = torch.cat([row(name).inputs(0)[0][0]] * 2)
    found = traced(model, x[:first])
    for size in (1, 2, 5, 7):
        found.check([x[:size]])
        torch.testing.assert_close(found.graph(x[:size])[0], model(x[:size]))


def test_images_of_any_size() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    found = traced(model, torch.randn(4, 3, 8, 8))
    for size in ((1, 3, 8, 8), (2, 3, 13, 9), (4, 3, 32, 32)):
        x = torch.randn(size)
        found.check([x])
        torch.testing.assert_close(found.graph(x)[0], model(x))


def test_sizes_whose_formulas_are_long_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    # Torch simplifies the formulas of a window transformer for minutes.
    monkeypatch.setattr("lightning_compress.quantization.static.trace._LONGEST", 2)
    model = nn.Sequential(*(nn.Conv1d(3, 3, 3, 2) for _ in range(3))).eval()
    found = traced(model, torch.randn(4, 3, 50))
    for size in (1, 7):
        x = torch.randn(size, 3, 50)
        found.check([x])
        torch.testing.assert_close(found.graph(x)[0], model(x))
    with pytest.raises(CompressionError, match="sizes that its trace allows"):
        found.check([torch.randn(4, 3, 60)])


class Places(nn.Module):
    """Adds a table of eight places, which a sequence of one place would take all."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Parameter(torch.randn(8, 16)), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.table)


def test_sounds_of_any_length() -> None:
    pools = nn.MaxPool1d(2, padding=1), nn.MaxPool1d((3,), stride=2, ceil_mode=True)
    model = nn.Sequential(nn.Conv1d(2, 8, 3), pools[0], nn.Conv1d(8, 8, 3), pools[1], nn.Conv1d(8, 4, 1)).eval()
    int8 = quantize(model, calibration=[torch.randn(4, 2, 50)])
    for length in (50, 61, 33):
        x = torch.randn(3, 2, length)
        assert agreement(model(x), int8(x)) > 0.99


def test_sizes_that_a_trace_does_not_hold_for_are_refused_by_name() -> None:
    model = Places().eval()
    int8 = quantize(model, calibration=[torch.randn(4, 8, 16)]).eval()
    assert int8(torch.randn(3, 8, 16)).shape == model(torch.randn(3, 8, 16)).shape
    with pytest.raises(CompressionError, match=r"sizes that its trace allows. Received: \[\(3, 1, 16\)\]"):
        int8(torch.randn(3, 1, 16))


# Operators in place.


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.leaky_relu(self.body(x), 0.2, True))


class Twice(Functional):
    """Reads what the activation has overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.activation = nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        return self.head(self.activation(hidden) + hidden)


class Summed(Functional):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        kept = hidden * 2
        hidden += kept
        hidden.relu_().mul_(3)
        return self.head(hidden + kept)


class Viewed(Functional):
    """Changes half of a tensor, which is read as a whole: only in place is that seen."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        hidden[:, :8].relu_()
        half = hidden.view(-1, 2, 8)
        half.mul_(2)
        return self.head(hidden)


class Masked(Functional):
    """Writes into a tensor of its own, which nothing rounds."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(16)
        mask[:8].fill_(1.0)
        return self.head(self.body(x) * mask)


class Given(Functional):
    """Changes what it was given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2))


IN_PLACE = {Functional: 0, Twice: 0, Summed: 0, Viewed: 2, Masked: 1}


@pytest.mark.parametrize("make", IN_PLACE)
def test_operators_in_place_make_new_tensors_where_nobody_sees_it(make: type[nn.Module]) -> None:
    model, x = make().eval(), torch.randn(64, 8)
    found = traced(model, x.clone())
    changing = [target for target in operators(found) if target.__name__.partition(".")[0].endswith("_")]
    assert len(changing) == IN_PLACE[make]
    given, own = x.clone(), x.clone()
    torch.testing.assert_close(found.graph(given)[0], model(own))
    torch.testing.assert_close(given, own)


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2, inplace=True), nn.Linear(16, 3))


@pytest.mark.parametrize("make", [sequential, *IN_PLACE, Given])
def test_activations_in_place_are_quiet_and_right_in_int8(
    make: Any, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model, x = make().eval(), torch.randn(64, 8)
    int8 = quantize(model, calibration=[x.clone()])
    save_compressed(int8, str(tmp_path / "int8.ckpt"))
    again = load_compressed(str(tmp_path / "int8.ckpt"), make()).eval()
    assert torch.equal(again(x.clone()), int8(x.clone()))
    assert agreement(model(x.clone()), int8(x.clone())) > 0.99
    assert "inplace" not in capfd.readouterr().err


@pytest.mark.parametrize("training", [False, True])
def test_what_is_overwritten_in_part_is_not_rounded_before(training: bool) -> None:
    model, x = Viewed(), torch.randn(64, 8)
    if training:
        prepare_for_training_(model, x, StaticInt8())
    else:
        model = quantize(model, calibration=[x])
    record = record_of(model) or {}
    assert [unit["path"] for unit in record["units"]] == ["body", "head"]
    assert record["floats"] == {"": "not as a whole: it changes in place a part of what int8 layers give or read"}


def test_calibration_leaves_batches_as_they_are() -> None:
    x = torch.randn(64, 8)
    before = x.clone()
    quantize(Given(), calibration=[x])
    assert torch.equal(x, before)


# Paddings.

PADDED: dict[str, Any] = {
    "same": lambda: (nn.Conv2d(3, 4, 3, padding="same"), (3, 8, 9)),
    "same, an even kernel": lambda: (nn.Conv2d(3, 4, (2, 4), padding="same"), (3, 8, 9)),
    "same, dilated": lambda: (nn.Conv2d(3, 4, (2, 3), padding="same", dilation=3, bias=False), (3, 8, 9)),
    "same, groups": lambda: (nn.Conv2d(4, 4, 4, padding="same", groups=2), (4, 8, 9)),
    "valid": lambda: (nn.Conv2d(3, 4, 3, padding="valid", stride=2), (3, 8, 9)),
    "same, 1d": lambda: (nn.Conv1d(3, 4, 4, padding="same"), (3, 11)),
    "same, 3d": lambda: (nn.Conv3d(3, 4, (2, 3, 4), padding="same"), (3, 5, 6, 7)),
    "reflected": lambda: (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (3, 8, 9)),
    "number": lambda: (nn.Conv2d(3, 4, 3, padding=(0, 2)), (3, 8, 9)),
}


@pytest.mark.parametrize("kind", PADDED)
def test_paddings_are_numbers(kind: str) -> None:
    conv, shape = PADDED[kind]()
    x = torch.randn(2, *shape)
    found = traced(conv.eval(), x)
    [node] = [node for node in found.graph.graph.nodes if "conv" in str(node.target)]
    assert str(node.target).endswith(".default")
    assert all(isinstance(argument, (list, int)) for argument in node.args[3:])
    torch.testing.assert_close(found.graph(x)[0], conv(x))


# Hooks, and layers that aren't looked into.


def test_hooks_of_inner_modules_see_what_they_saw() -> None:
    model, seen = conv_net().eval(), list[Tensor]()
    for inner in (model[1], model[2]):
        inner.register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(4, 3, 8, 8)
    int8 = quantize(model, calibration=[x])
    assert len((record_of(int8) or {})["units"]) == 1
    prepare_for_training_(model, x, StaticInt8())
    [form] = traced_units(model)
    form.rounds = False
    for mode in (True, False):
        twin = copy.deepcopy(model)
        seen.clear()
        output = model.train(mode)(x)
        assert [tuple(seen_output.shape) for seen_output in seen] == [(4, 4, 6, 6)] * 2
        torch.testing.assert_close(seen[1], seen[0].relu())
        torch.testing.assert_close(seen[0], twin[1].train(mode)(model[0](x)))
        torch.testing.assert_close(output, model[4](seen[1].flatten(1)))


def test_a_hook_that_changes_an_output_is_refused() -> None:
    model = conv_net()
    model[2].register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(CompressionError, match="its `2` has a forward hook that changes its output"):
        traced(model, torch.randn(4, 3, 8, 8))


class Weird(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight).relu() + self.bias


def test_an_opaque_layer_is_called_as_it_is() -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), torch.randn(5, 4)
    found = traced(model, x, opaque=["2"])
    assert "2.weight" not in found.names and "2" in found.names
    model[2].forward = lambda x: x[:, :2] * 3  # whatever form it has by now
    torch.testing.assert_close(found.graph(x)[0], model(x))
    with pytest.raises(CompressionError, match="its `2` has a scheme of its own, and is more than one operator"):
        traced(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Weird(8, 2)), x, opaque=["2"])


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) if x.sum() > 0 else self.head(-x)


def test_what_branches_on_data_stays_float_as_a_whole_with_the_reason(capfd: pytest.CaptureFixture[str]) -> None:
    int8 = quantize(Branches().eval(), calibration=[torch.randn(4, 8)])
    record = record_of(int8) or {}
    assert [unit["path"] for unit in record["units"]] == ["head"]
    assert record["floats"][""].startswith("not as a whole: torch.export can't trace its forward (")
    assert not capfd.readouterr().err
