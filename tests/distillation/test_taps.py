"""Taps of inputs, outputs and parts of them, by path; and that they see what was there, not what became of it."""

from __future__ import annotations

import copy
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import FeatureMSE
from lightning_compress.distillation import DistillationModule, Taps
from lightning_compress.distillation.taps import Spot, parse
from lightning_compress.errors import CompressionError
from tests.distillation.nets import ConvNet, loader, trainer
from tests.support.oracles import hooks

# The module can validate; these runs have nothing to validate on.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning")
Named = namedtuple("Named", ["first", "second"])


@dataclass
class Outputs:
    logits: Tensor
    hidden: Any


class Layer(nn.Module):
    """Takes and gives everything that layers take and give."""

    def forward(self, x: Tensor, more: tuple[Tensor, Tensor], *, scale: Tensor, mode: str = "plain") -> Any:
        hidden = [x * scale, {"deep": more[1] + 1}]
        return {
            "object": Outputs(x, hidden),
            "named": Named(x - 1, x - 2),
            "tuple": (None, x + 5, [x + 6]),
            7: x + 7,
            "x.y": x,
        }


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()

    def forward(self, x: Tensor, *, scale: Tensor) -> Any:
        return self.layer(x, (x + 1, x + 2), scale=scale)


X, SCALE = torch.arange(6.0).reshape(2, 3), torch.tensor(3.0)
PATHS = {
    "layer:input": X,
    "layer:input.0": X,
    "layer:input.1.1": X + 2,
    "layer:input.1.-1": X + 2,
    "layer:input.scale": SCALE,
    "layer:output.object.logits": X,
    "layer:output.object.hidden.0": X * 3,
    "layer:output.object.hidden.1.deep": X + 3,
    "layer:output.named.second": X - 2,
    "layer:output.named.0": X - 1,
    "layer:output.tuple.1": X + 5,
    "layer:output.tuple.-1.0": X + 6,
    "layer:output.7": X + 7,
    ":output.named.first": X - 1,
    ":input": X,
    ":input.scale": SCALE,
}


def test_each_path_finds_its_tensor() -> None:
    model, taps = Model(), Taps(PATHS)
    taps.attach(model)
    with taps.listen():
        model(X, scale=SCALE)
        for path, expected in PATHS.items():
            assert torch.equal(taps[path], expected), path
    taps.detach(model)
    assert hooks(model) == []
    assert not model.layer._forward_pre_hooks_with_kwargs


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("layer:input.2", "`layer:input.2` must have `2` there"),
        ("layer:input.mode", "must have `mode` there"),
        ("layer:output.tuple.9", "must have `9` there. Received: tuple of 3"),
        ("layer:output.object.hiden", "must have `hiden` there. Received: Outputs"),
        ("layer:output.object", "must have a tensor there.*Received: Outputs"),
        ("layer:output.tuple", "must have a tensor there.*Received: tuple of 3"),
        ("layer:output.object.hidden.1", "Received: dict with deep"),
        ("layer", "Received: dict with object, named, tuple, 7, x.y.*Name a part of it"),
        ("layer:output.7.0.0.0", "must have `0` there|must have a tensor"),
    ],
)
def test_what_is_not_there_is_named(path: str, message: str) -> None:
    model, taps = Model(), Taps([path])
    taps.attach(model)
    with taps.listen(), pytest.raises(CompressionError, match=message):
        model(X, scale=SCALE)
    taps.detach(model)
    assert hooks(model) == []


@pytest.mark.parametrize("path", ["layer:outputs", "layer:", "layer:in.0", ":"])
def test_a_side_that_is_neither_is_refused(path: str) -> None:
    with pytest.raises(CompressionError, match="`student_layer` must have `input` or `output` after the colon"):
        Taps([path], "student_layer")


def test_paths_are_read() -> None:
    assert parse("a.b") == Spot("a.b") == parse("a.b:output")
    assert parse(":input.x.0") == Spot("", "input", ("x", "0"))


def test_an_input_is_what_it_was_before_the_layer_rewrote_it() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
    taps = Taps(["1:input", "0", "1", ":input", ":output"])
    expected = model[0](X).detach().clone()
    taps.attach(model)
    with taps.listen():
        y = model(X)
        assert torch.equal(taps["1:input"], expected) and torch.equal(taps["0"], expected) and (expected < 0).any()
        assert torch.equal(taps["1"], expected.relu()) and torch.equal(taps[":input"], X)
        (taps["1:input"].sum() + taps["1"].sum()).backward()
        y.detach().mul_(0.0)
        assert torch.equal(taps[":output"], expected.relu())
    assert torch.equal(model[0].bias.grad, 2.0 + (expected > 0).float().sum(0))


def test_recurrent_and_attention_layers_by_part() -> None:
    lstm, taps = nn.Sequential(nn.LSTM(3, 5, batch_first=True)), Taps(["0", "0:output.1.0", "0:output.1.1"])
    taps.attach(lstm)
    with taps.listen():
        hidden, (last, cell) = lstm(torch.randn(2, 4, 3))
        assert torch.equal(taps["0"], hidden) and torch.equal(taps["0:output.1.0"], last)
        assert torch.equal(taps["0:output.1.1"], cell)

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.mha(query=x, key=x, value=x + 1)[0]

    model, taps = Attends(), Taps(["mha", "mha:output.1", "mha:input.value"])
    taps.attach(model)
    with taps.listen():
        x = torch.randn(2, 3, 4)
        y = model(x)
        assert torch.equal(taps["mha"], y) and taps["mha:output.1"].shape == (2, 3, 3)
        assert torch.equal(taps["mha:input.value"], x + 1)


def test_a_missing_layer_registers_no_hook_of_either_kind() -> None:
    model, taps = Model(), Taps(["layer:input", "layer", "lair:input"])
    with pytest.raises(CompressionError, match="Nearest: layer"):
        taps.attach(model)
    assert hooks(model) == []


def test_attach_twice_registers_once_and_users_hooks_stay() -> None:
    model, taps, calls = Model(), Taps(["layer:input", "layer:output.7"]), []
    model.layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    model.layer.register_forward_hook(lambda *_: calls.append("post"))
    before = hooks(model)
    taps.attach(model)
    taps.attach(model)
    assert len([hook for hook in hooks(model) if hook.endswith(("_forward_hooks", "_forward_pre_hooks"))]) == 4
    twin = copy.deepcopy(model)
    taps.detach(model)
    model(X, scale=SCALE)
    assert hooks(model) == before and calls == ["pre", "post"]
    with taps.listen():
        twin(X, scale=SCALE)
        with pytest.raises(CompressionError):
            taps["layer:input"]  # a copy's taps are its own


@pytest.mark.parametrize("where", ["inner", "whole"])
def test_inputs_and_parts_of_compiled_models_are_fresh_each_step(where: str) -> None:
    torch.compiler.reset()
    model: Any = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)), nn.Linear(3, 2))
    paths = ["0.1:input", "1:input", "0", ":output"]
    plain = copy.deepcopy(model)
    if where == "inner":
        model[0] = torch.compile(model[0], backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    model(X)  # compiled before anyone listens
    taps, expected = Taps(paths), Taps(paths)
    for value in (1.0, -2.0):
        taps.attach(model), expected.attach(plain)
        for scale in (1.0, 3.0):
            with taps.listen(), expected.listen():
                model(value * scale * X), plain(value * scale * X)
                for path in paths:
                    torch.testing.assert_close(taps[path], expected[path])
                    assert taps[path].requires_grad
        taps.detach(model), expected.detach(plain)


def test_parts_of_whole_models_are_taught() -> None:
    class Both(ConvNet):
        def forward(self, x: Tensor) -> Any:
            hidden = self.features(x)
            return {"logits": self.head(hidden.mean((2, 3))), "maps": (hidden,)}

    losses = [FeatureMSE(":output.maps.0", ":output.maps.0"), FeatureMSE("head:input", "head:input")]
    torch.manual_seed(0)
    module = DistillationModule(Both(), Both(8), losses)
    fit = trainer()
    fit.fit(module, loader())
    assert [tuple(adapter.weight.shape) for adapter in module.adapters.values()] == [(8, 4, 1, 1), (8, 4)]
    assert hooks(module.student) == hooks(module.teacher) == []
