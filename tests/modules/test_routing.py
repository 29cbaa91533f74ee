"""A module computes in another form and comes back; meanwhile codes stand for its parameters, which can be read."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import CompressionError, quantize
from lightning_compress.modules import routing


class Doubled(routing.Form):
    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        return 2 * x


class Served(routing.Form):
    def serve(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return routing.class_of(module).forward(module, *args, **kwargs) + 1


class Halves(routing.StoredWeight):
    """Stores multiples of a half."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.hold_(codes=(2 * weight.detach()).round().to(torch.int8), scale=torch.full((), 0.5))

    def values(self) -> Tensor:
        return self.codes * vars(self)["scale"]


class Rounded(routing.Form):
    """Computes what was written, in multiples of a half."""

    def __init__(self, module: nn.Module, *names: str) -> None:
        super().__init__({name: Halves(module._parameters[name]) for name in names})

    def forward(self, module: nn.Module, *args: Any) -> Any:
        return routing.class_of(module).forward(module, *args)


def test_the_other_form_computes_and_the_tree_stays() -> None:
    model = nn.Linear(2, 2).eval()
    x, keys = torch.ones(1, 2), list(model.state_dict())
    own = model(x)
    routing.route_(model, Doubled())
    assert model(x).equal(2 * x) and list(model.modules()) == [model] and list(model.state_dict()) == keys
    assert isinstance(model, nn.Linear) and type(model).__name__ == "Linear" and routing.class_of(model) is nn.Linear
    copied = copy.deepcopy(model)
    assert routing.unroute_(copied) is None and type(copied) is nn.Linear
    assert copied(x).equal(own) and model(x).equal(2 * x)
    assert pickle.loads(pickle.dumps(model))(x).equal(2 * x)
    routing.unroute_(model)
    routing.route_(model, Served())
    assert model(x).equal(own + 1) and list(model.state_dict()) == keys


def test_parameters_that_codes_stand_for_come_back_or_are_forgotten() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2))
    linear, lstm, x = model[0], model[1], torch.ones(1, 2)
    names, parameters = list(model.state_dict()), list(model.parameters())
    before = Doubled()
    routing.route_(linear, before)
    routing.route_(linear, Rounded(linear, "weight"))
    routing.route_(lstm, Rounded(lstm, "weight_ih_l0", "weight_hh_l0"))
    assert [name for name, _ in model.named_parameters()] == names
    assert set(model.state_dict()) - set(names) == {"0.weight_scale", "1.weight_ih_l0_scale", "1.weight_hh_l0_scale"}
    assert routing.form_before(linear) is before and routing.parameters_aside(linear) == [parameters[0]]
    assert all(parameter.dtype == torch.int8 for name, parameter in model.named_parameters() if "weight" in name)
    with torch.no_grad():
        linear.bias.zero_()
    assert linear(x).mul(2).frac().count_nonzero() == 0 and linear.weight.dtype == torch.float32

    other = copy.deepcopy(model)
    assert routing.unroute_(other[0]) is not None and routing.unroute_(lstm) is None
    assert routing.unroute_(linear) is before and routing.form_of(linear) is None
    assert list(map(id, model.parameters())) == list(map(id, parameters))
    assert [id(weight) for weight in lstm._flat_weights] == [id(parameter) for parameter in parameters[2:]]

    routing.forget_aside_(other[1])
    assert routing.has_forgotten(other[1]) and not routing.parameters_aside(other[1])
    with pytest.raises(CompressionError, match="float weights of its LSTM are gone"):
        routing.unroute_(other[1])
    rounded = other[1].weight_ih_l0.clone()
    routing.settle_(other[1])
    assert type(other[1]) is nn.LSTM and other[1]._flat_weights[0].equal(rounded)
    assert not rounded.equal(lstm.weight_ih_l0)


def test_a_copy_has_what_the_users_class_copies() -> None:
    class Held(nn.Linear):
        def __getstate__(self) -> dict[str, Any]:
            return {**vars(self), "trainer": None}

    model: Any = Held(2, 2)
    model.trainer = object()
    routing.route_(model, Rounded(model, "weight"))
    copied = copy.deepcopy(model)
    assert copied.trainer is None is not model.trainer and copied(torch.ones(2)).equal(model(torch.ones(2)))


def test_its_class_makes_modules_of_the_users() -> None:
    model = nn.Linear(2, 2)
    routing.route_(model, Doubled())
    other = type(model)(2, out_features=3)
    assert type(other) is nn.Linear and other(torch.ones(2)).shape == (3,) and type(model)(2, 2).weight is not None


class Reads(nn.Module):
    """Looks at a weight, in code that can't be traced."""

    def __init__(self, read: Any) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 32), nn.Linear(32, 4)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() == 12345:
            raise ValueError("control flow")
        return self.head(self.read(self.body(x), self.body.weight))


READS: dict[str, Any] = {
    "dtype and device": lambda x, weight: x.to(weight.dtype).to(weight.device),
    "like it": lambda x, weight: x.to(weight).type_as(weight),
    "shape": lambda x, weight: x.view(-1, weight.shape[0]).reshape(-1, weight.size(0)),
    "others": lambda x, weight: x * (weight.ndim == weight.dim() == 2 and weight.is_floating_point()),
    "asks for more": lambda x, weight: x if getattr(weight, "quant_state", None) is None else None,
    "values": lambda x, weight: x * weight.square().sum(1) / torch.linalg.norm(weight),
}


@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic", "nf4"])
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_code_may_read_a_quantized_weight(read: Any, scheme: str) -> None:
    torch.manual_seed(0)
    model, x = Reads(read).eval(), torch.randn(16, 16)
    few = quantize(model, scheme, calibration=[x])
    assert few.body.weight.shape == (32, 16)
    stays_float = scheme == "int8_static" and read is READS["values"]  # what was equalized has another scale
    assert few.state_dict()["body.weight"].is_floating_point() == stays_float
    tolerance = 0.3 if scheme == "nf4" else 0.1
    torch.testing.assert_close(few(x), model(x), rtol=tolerance, atol=tolerance)
    assert torch.equal(copy.deepcopy(few)(x), few(x))


def test_a_layer_in_few_bits_can_still_be_pickled() -> None:
    model, x = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 16)
    packed = quantize(model, "int8_weight_only", calibration=[x])
    again = pickle.loads(pickle.dumps(packed))
    assert torch.equal(again(x), packed(x)) and again[0].weight.shape == (8, 16)
