"""A quantized model's tree is the user's: names, identity, modes, copies, moves; and its layers are still layers."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.nn.utils.parametrizations import weight_norm

from lightning_compress import (
    CompressionError,
    StaticInt8,
    WeightOnly,
    load_compressed,
    quantize,
    save_compressed,
)
from lightning_compress.modules.routing import form_of
from lightning_compress.quantization.convert import convert_prepared_, record_of, revert_
from tests.quantization.networks import Net, Sequence, trained_net
from tests.quantization.prepared import prepare_for_training_


@pytest.fixture
def x() -> Tensor:
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net(x: Tensor) -> Net:
    return trained_net(x)


def names(model: nn.Module) -> list[list[str]]:
    return [
        [name for name, _ in found]
        for found in (model.named_modules(), model.named_parameters(), model.named_buffers())
    ]


def flat_cosine(one: Tensor, other: Tensor) -> float:
    return cosine_similarity(one.detach().flatten(), other.detach().flatten(), dim=0).item()


@pytest.mark.parametrize("scheme", [StaticInt8(), WeightOnly(4, 4)], ids=["int8", "int4"])
def test_a_prepared_tree_names_what_the_user_built(net: Net, x: Tensor, scheme: Any) -> None:
    before, keys, tensors = names(net), list(net.state_dict()), list(net.parameters())
    prepare_for_training_(net, x, scheme)
    assert names(net) == before and list(net.state_dict()) == keys
    assert list(map(id, net.parameters())) == list(map(id, tensors))
    assert [list(part.state_dict()) for part in net.children()] == [
        list(part.state_dict()) for part in Net().children()
    ]
    assert isinstance(net, Net) and type(net).__name__ == "Net"


@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic", "int4_weight_only", "nf4"])
def test_a_converted_tree_names_what_the_user_built(net: Net, x: Tensor, scheme: str) -> None:
    before, keys = names(net), set(net.state_dict())
    quantized = quantize(net, scheme, calibration=[x])
    assert names(quantized) == before
    state = quantized.state_dict()
    coded = {key for key in keys if not state[key].is_floating_point() and "num_batches" not in key}
    assert coded and keys <= set(state)
    assert all(any(key.startswith(f"{code}_") for code in coded) for key in set(state) - keys)
    assert all(type(value) is Tensor and not value.is_quantized for value in state.values())


def test_a_converted_layer_is_still_a_layer(net: Net, x: Tensor) -> None:
    quantized = quantize(net, StaticInt8(), calibration=[x])
    state, floats = quantized.state_dict(), quantize(net, StaticInt8(equalize=False, smooth=False), calibration=[x])
    for name in ("conv1", "conv2", "twice"):
        codes, scale = state[f"{name}.weight"], state[f"{name}.weight_scale"]
        assert codes.dtype == torch.int8 and codes.abs().max() <= 127 and scale.shape == (len(codes),)
        own, layer = getattr(net, name), getattr(floats, name)
        assert isinstance(layer, type(own)) and layer.weight.dtype == torch.float32
        assert flat_cosine(layer.weight, own.weight) > 0.9995
        with pytest.raises(CompressionError, match="must be left as it is"):
            layer.weight.data.mul_(2.0)
        with pytest.raises(CompressionError, match="must be left as it is"):
            layer.weight = nn.Parameter(own.weight.detach().clone())
    assert quantized.twice.in_features == 8 and quantized.conv1.bias is None
    assert quantized.get_parameter("twice.weight").shape == (8, 8) and isinstance(quantized.table, nn.Parameter)
    assert flat_cosine(floats.table, net.table) > 0.9995
    assert flat_cosine(quantized(x), net(x)) > 0.995


@pytest.mark.parametrize("scheme", [StaticInt8(), StaticInt8(equalize=False, smooth=False)], ids=["moved", "unmoved"])
def test_layers_that_are_called_alone_compute_what_they_computed(net: Net, x: Tensor, scheme: Any) -> None:
    quantized, seen = quantize(net, scheme, calibration=[x]), {}
    for name, layer in net.named_children():

        def see(_: Any, args: Any, output: Tensor, name: str = name) -> None:
            seen.setdefault(name, (args[0], output))

        layer.register_forward_hook(see)
    net(x)
    for name, (given, expected) in seen.items():
        assert flat_cosine(getattr(quantized, name)(given), expected) > 0.9995, name
    assert flat_cosine(quantized.features(x), net.features(x)) > 0.9995


def test_files_are_plain_and_bit_equal(net: Net, x: Tensor, tmp_path: Any) -> None:
    quantized = quantize(net, StaticInt8(), calibration=[x])
    with torch.compiler.set_stance("force_eager"):
        expected = quantized(x)
        save_compressed(quantized, str(tmp_path / "int8.ckpt"))
        loaded = load_compressed(str(tmp_path / "int8.ckpt"), Net())
        assert torch.equal(loaded(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(quantized))(x), expected)
        assert torch.equal(copy.deepcopy(quantized)(x), expected)
        other = quantize(Net().eval(), StaticInt8(), calibration=[x])
        assert not torch.equal(other(x), expected)
    floats = sum(tensor.numel() * tensor.element_size() for tensor in net.state_dict().values())
    assert sum(tensor.numel() * tensor.element_size() for tensor in quantized.state_dict().values()) < 0.5 * floats


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_holds_no_float_weight(net: Net, x: Tensor, strict: bool) -> None:
    quantized = quantize(net, StaticInt8(), calibration=[x])
    program = torch.export.export(quantized, (x,), strict=strict)
    held = {**program.state_dict, **program.constants}
    shapes = {parameter.shape for parameter in net.parameters() if parameter.dim() > 1}
    found = [key for key, value in held.items() if isinstance(value, Tensor) and value.shape in shapes]
    assert len(found) == 4 and all(held[key].dtype == torch.int8 for key in found)
    with torch.compiler.set_stance("force_eager"):
        assert flat_cosine(program.module()(x), quantized(x)) > 0.999


@pytest.mark.filterwarnings("ignore:While compiling")
def test_an_exported_program_takes_batches_of_any_size(net: Net, x: Tensor) -> None:
    quantized = quantize(net, StaticInt8(), calibration=[x])
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    with torch.compiler.set_stance("force_eager"):
        expected = quantized(x[:3])
    for strict in (False, True, False, True):  # an export leaves nothing behind that the next one stumbles over
        program = torch.export.export(quantized, (x,), dynamic_shapes=shapes, strict=strict)
        with torch.compiler.set_stance("force_eager"):
            assert flat_cosine(program.module()(x[:3]), expected) > 0.999


class Delegating(nn.Module):
    """Gives the attributes of what it wraps for its own, as wrappers often do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.inner(x).relu())


@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic", "nf4"])
def test_a_wrapper_that_delegates_to_a_quantized_layer_is_copied_as_itself(scheme: str) -> None:
    x = torch.randn(8, 8)
    quantized = quantize(Delegating().eval(), scheme, calibration=[x])
    copied = copy.deepcopy(quantized)
    assert type(copied) is type(quantized) and torch.equal(copied(x), quantized(x))


def test_a_layer_whose_weight_is_parametrized_is_copied() -> None:
    x = torch.randn(8, 8)
    quantized = quantize(weight_norm(nn.Linear(8, 4)).eval(), "int8_static", calibration=[x])
    assert torch.equal(copy.deepcopy(quantized)(x), quantized(x))


def test_a_copied_and_a_saved_weight_are_plain_tensors(net: Net, x: Tensor, tmp_path: Path) -> None:
    quantized = quantize(net, "int8_dynamic", calibration=[x])
    weight = quantized.twice.weight
    copied = copy.deepcopy(weight)
    torch.save({"weight": weight}, tmp_path / "weight.pt")
    read = torch.load(tmp_path / "weight.pt", weights_only=True)["weight"]
    assert type(copied) is type(read) is Tensor and torch.equal(copied, weight) and torch.equal(read, weight)
    assert copied.mul_(2.0) is not None


def test_a_quantized_graph_module_is_copied() -> None:
    x = torch.randn(8, 8)
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval())
    quantized = quantize(graph, "int8_static", calibration=[x])
    assert torch.equal(copy.deepcopy(quantized)(x), quantized(x))


def test_a_prepared_model_runs_in_a_compiled_one(net: Net, x: Tensor) -> None:
    prepare_for_training_(net, x, StaticInt8())
    net.train()
    for _ in range(3):
        net(x)
    compiled, expected = torch.compile(nn.Sequential(net), backend="eager"), net.eval()(x)
    torch.testing.assert_close(compiled.eval()(x), expected)
    assert not torch.allclose(compiled.train()(x), expected)  # dropout: the mode is read at each call
    torch.testing.assert_close(torch.export.export(net.eval(), (x,)).module()(x), net(x))


def test_a_converted_model_compiles_as_a_whole(net: Net, x: Tensor) -> None:
    quantized = quantize(net, StaticInt8(), calibration=[x])
    compiled = torch.compile(quantized, fullgraph=True, backend="eager")(x)
    with torch.compiler.set_stance("force_eager"):
        assert flat_cosine(compiled, quantized(x)) > 0.999


def test_a_prepared_unit_computes_with_the_tensors_that_stand_in_the_tree(net: Net, x: Tensor) -> None:
    other, fresh = Net().eval(), copy.deepcopy(net)
    prepare_for_training_(net, x, StaticInt8())
    net(x)
    net.load_state_dict(other.state_dict(), assign=True)
    expected = copy.deepcopy(net)
    twin = copy.deepcopy(fresh)
    prepare_for_training_(twin, x, StaticInt8())
    twin.load_state_dict(other.state_dict())
    assert torch.equal(net(x), twin(x)) and torch.equal(net(x), expected(x))
    state = {name: parameter.detach() * 0.5 for name, parameter in net.named_parameters()}
    called = torch.func.functional_call(net, state, (x,))
    assert not torch.allclose(called, net(x))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(state[name])
    torch.testing.assert_close(net(x), called)
    net.to("meta")
    assert net(x.to("meta")).device.type == "meta"


def test_moving_a_prepared_unit_leaves_its_buffers_shared(net: Net, x: Tensor) -> None:
    prepare_for_training_(net, x, StaticInt8())
    net.double().float().train()
    before = net.bn1.running_mean.clone()
    net(x)
    assert not torch.equal(net.bn1.running_mean, before)
    moved = net.bn1.running_mean.clone()
    net.eval()(x)
    assert torch.equal(net.bn1.running_mean, moved)


def test_what_was_moved_or_assigned_is_converted_as_it_is_now(net: Net, x: Tensor) -> None:
    prepare_for_training_(net, x, StaticInt8())
    net(x)
    state = {name: value.clone() for name, value in trained_net(x).state_dict().items()}
    state["bn1.bias"] += 2.0
    state["twice.weight"] *= -2.0
    net.double().float().load_state_dict(state, assign=True)
    net.train()
    net.dropout.eval()
    with torch.no_grad():
        for _ in range(20):
            net(x)
    expected = net.eval()(x)
    convert_prepared_(net)
    assert flat_cosine(net(x), expected) > 0.99


def test_modes_are_those_of_the_tree(net: Net, x: Tensor) -> None:
    prepare_for_training_(net, x, StaticInt8())
    net.train()
    assert not torch.equal(net(x), net(x))
    net.dropout.eval()
    net.bn1.eval()
    mean, other = net.bn1.running_mean.clone(), net.bn2.running_mean.clone()
    net(x)
    assert net.training and not net.dropout.training and not net.bn1.training
    assert torch.equal(net.bn1.running_mean, mean) and not torch.equal(net.bn2.running_mean, other)


def test_a_shallow_copy_doesnt_run_the_original(net: Net, x: Tensor) -> None:
    prepare_for_training_(net, x, StaticInt8())
    twin = copy.copy(net)
    twin.training = True
    seen = []
    net.register_forward_pre_hook(lambda *_: seen.append("original"))
    twin._forward_pre_hooks = {}
    twin(x)
    assert not seen and type(twin) is type(net)


def test_pickling_a_prepared_model_keeps_its_ranges(net: Net, x: Tensor) -> None:
    prepare_for_training_(net, x, StaticInt8())
    net.train()
    for _ in range(3):
        net(x)
    twin = pickle.loads(pickle.dumps(net.eval()))
    assert torch.equal(twin(x), net(x))
    convert_prepared_(twin)
    convert_prepared_(net)
    assert torch.equal(twin(x), net(x))
    revert_(net, "float")
    assert type(net) is Net and record_of(net) is None and form_of(net) is None


def test_a_layer_that_is_replaced_in_a_unit_is_refused(net: Net, x: Tensor) -> None:
    prepare_for_training_(net, x, StaticInt8())
    net.twice = nn.Linear(8, 8)
    with pytest.raises(CompressionError, match="another `twice`"):
        net(x)


def test_weights_that_are_loaded_later_are_computed_with(net: Net, x: Tensor) -> None:
    one, other = (quantize(model, StaticInt8(), calibration=[x]) for model in (net, Net().eval()))
    assert not torch.equal(one(x), other(x))
    ranges = form_of(other)
    other.load_state_dict(one.state_dict())
    ranges.load_extra_(form_of(one).extra_state())
    assert torch.equal(one(x), other(x))
    with torch.no_grad():
        one.norm.bias += 1.0
    assert not torch.equal(one(x), other(x))


def test_files_are_read_and_computed_where_torch_ao_is_gone(net: Net, x: Tensor, tmp_path: Any) -> None:
    torch.manual_seed(0)
    sequence, tokens = Sequence().eval(), torch.randint(20, (4, 6))
    made = {
        "net-static": (quantize(net, calibration=[x]), x),
        "net-dynamic": (quantize(net, "int8_dynamic", calibration=[x]), x),
        "net-int4": (quantize(net, WeightOnly(4, 8), calibration=[x]), x),
        "sequence-dynamic": (quantize(sequence, "int8_dynamic", calibration=[tokens]), tokens),
        "sequence-int8": (quantize(sequence, "int8_weight_only", calibration=[tokens]), tokens),
    }
    for name, (model, inputs) in made.items():
        save_compressed(model, str(tmp_path / f"{name}.ckpt"))
        torch.save((inputs,), tmp_path / f"{name}.inputs")
    command = [sys.executable, "-m", "tests.quantization.without_torch_ao", str(tmp_path), *made]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    for name, (model, inputs) in made.items():
        got = torch.load(tmp_path / f"{name}.outputs")
        if name == "net-static":
            torch.testing.assert_close(got, model(inputs), rtol=1e-5, atol=1e-5)
        else:
            assert flat_cosine(got, model(inputs)) > 0.999, name


def test_a_part_of_a_quantized_model_is_no_file_of_its_own(net: Net, x: Tensor, tmp_path: Any) -> None:
    quantized = quantize(net, StaticInt8(), calibration=[x])
    for model in (quantized.conv1, nn.Sequential(quantized)):
        with pytest.raises(CompressionError, match="`model` must be the module that was quantized"):
            save_compressed(model, str(tmp_path / "part.ckpt"))
    assert not list(tmp_path.iterdir())
