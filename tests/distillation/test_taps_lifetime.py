"""Taps: the right tensor, fresh each step, from any module and its copies."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.distillation import Taps, find_layer
from lightning_compress.errors import CompressionError
from tests.distillation.nets import ConvNet, hooks


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.taps = ConvNet(), Taps(["head"])
        self.taps.attach(self.net)


@pytest.fixture
def net() -> ConvNet:
    return ConvNet().eval()


def test_a_tap_keeps_what_the_layer_put_out_before_an_inplace_relu(net: ConvNet) -> None:
    # PT#95617: the tensor itself is rewritten by the ReLU that follows.
    taps, x = Taps(["features.1"]), torch.randn(2, 1, 8, 8)
    expected = net.features[1](net.features[0](x)).detach().clone()
    taps.attach(net)
    with taps.listen():
        net(x)
        assert torch.equal(taps["features.1"], expected) and (expected < 0).any()
        taps["features.1"].sum().backward()  # the graph is whole in spite of the in-place operation
    assert net.features[0].weight.grad is not None


def test_taps_are_fresh_each_step_and_leave_no_graph(net: ConvNet) -> None:
    taps = Taps(["head", "head"])
    taps.attach(net)
    assert len(taps) == 1 and hooks(net) == 1
    tensors = []
    for value in (0.0, 1.0):
        with taps.listen():
            y = net(torch.full((1, 1, 8, 8), value))
            assert torch.equal(taps["head"], y)
            tensors.append(weakref.ref(taps["head"]))
    del y
    gc.collect()
    assert [ref() for ref in tensors] == [None, None]
    net(torch.zeros(1, 1, 8, 8))
    with taps.listen(), pytest.raises(CompressionError, match="calls in its forward"):
        taps["head"]
    taps.detach(net)
    assert hooks(net) == 0


def test_the_last_of_two_calls_wins_and_no_input_is_needed(net: ConvNet) -> None:
    taps = Taps(["head"])
    taps.attach(net)
    (hook,) = net.head._forward_hooks.values()
    with taps.listen():
        net(torch.zeros(1, 1, 8, 8))
        assert hook(net.head, (), torch.ones(1, 4)) is None
        assert torch.equal(taps["head"], torch.ones(1, 4))


def test_tracing_a_tapped_model_sees_no_tap(net: ConvNet) -> None:
    taps = Taps(["features", "head"])
    taps.attach(net)
    with taps.listen():
        graph = torch.fx.symbolic_trace(net)
        with pytest.raises(CompressionError):
            taps["head"]
    assert "clone" not in graph.code


def test_a_deep_copy_has_working_taps_of_its_own_and_no_graph() -> None:
    holder = Holder()
    with holder.taps.listen():
        holder.net(torch.zeros(2, 1, 8, 8))
        twin = copy.deepcopy(holder)  # a kept non-leaf tensor would raise here
        again = pickle.loads(pickle.dumps(holder))
        before = holder.taps["head"].clone()
        for other in (twin, again):
            with other.taps.listen():
                y = other.net(torch.ones(3, 1, 8, 8))
                assert torch.equal(other.taps["head"], y)
            other.taps.detach(other.net)
            assert hooks(other.net) == 0
        assert torch.equal(holder.taps["head"], before)
    assert hooks(holder.net) == 1


@pytest.mark.parametrize(
    ("layer", "remedy"), [("features.9", "Nearest: features.2"), ("heads", "Nearest: head"), ("", "Known")]
)
def test_a_mistyped_layer_names_the_nearest_and_registers_nothing(net: ConvNet, layer: str, remedy: str) -> None:
    taps = Taps(["head", layer], "student_layer")
    with pytest.raises(CompressionError, match=rf"`student_layer` must name a layer of the ConvNet.*{remedy}"):
        taps.attach(net)
    assert hooks(net) == 0


def test_compiled_submodules_go_by_their_plain_names(net: ConvNet) -> None:
    plain = net.features[1]
    net.features = torch.compile(net.features, backend="eager")
    assert find_layer(net, "features.1") is plain
    assert find_layer(net, "features") is net.features


@pytest.mark.parametrize("whole", [True, False])
def test_taps_of_compiled_models_fire_again_after_detach_and_attach(net: ConvNet, whole: bool) -> None:
    # PT#117758: hooks registered after the first compiled call never fire.
    layer = net.features[0]
    if whole:
        net = torch.compile(net, backend="aot_eager")
    else:
        net.features = torch.compile(net.features, backend="aot_eager")
    taps = Taps(["features.0"])
    for value in (1.0, 2.0):
        x = torch.full((2, 1, 8, 8), value)
        net(x)
        taps.attach(net)
        for scale in (1.0, 3.0):
            with taps.listen():
                net(scale * x)
                torch.testing.assert_close(taps["features.0"], layer(scale * x))
        taps.detach(net)


def test_the_hidden_states_of_recurrent_layers_come_first_in_their_tuple() -> None:
    net, taps = nn.Sequential(nn.LSTM(3, 5, batch_first=True)), Taps(["0"])
    taps.attach(net)
    with taps.listen():
        hidden, _ = net(torch.randn(2, 4, 3))
        assert torch.equal(taps["0"], hidden)


def test_a_layer_without_a_tensor_is_refused() -> None:
    class Dict(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"x": x}

    net, taps = nn.Sequential(Dict()), Taps(["0"])
    taps.attach(net)
    with (
        taps.listen(),
        pytest.raises(CompressionError, match=r"Layer `0` must have a tensor there.*Received: dict with x.*0:output.x"),
    ):
        net(torch.ones(1))
