"""A module's forward is routed into another form, and comes back; and what is left of a weight that is gone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import CompressionError, quantize
from lightning_compress.modules import routing
from lightning_compress.modules.routing import CHILD


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Served(routing.RoutedForm):
    def serve(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return type(module).forward(module, *args, **kwargs) + 1


def test_the_other_form_computes_and_the_users_keys_stay() -> None:
    model = nn.Linear(2, 2).eval()
    x, keys = torch.ones(1, 2), list(model.state_dict())
    own = model(x)
    routing.route_(model, Doubled())
    assert model(x).equal(2 * x) and not model.get_submodule(CHILD).training
    copied = copy.deepcopy(model)
    routing.unroute_(copied)
    assert copied(x).equal(own) and model(x).equal(2 * x)
    routing.unroute_(model)
    routing.route_(model, Served())
    assert model(x).equal(own + 1)
    assert [key for key in model.state_dict() if CHILD not in key] == keys


def test_what_is_set_aside_comes_back_in_its_order_or_is_forgotten() -> None:
    def converted() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.LSTM(2, 2))
        for module, used in ((model, {"0"}), (model[1], {"weight", "running_mean"}), (model[2], {"weight_ih_l0"})):
            routing.route_(module, Doubled())
            routing.set_aside_(module, frozenset(used), Doubled())
        return model

    model = converted()
    names, parameters = list(nn.Sequential(nn.Linear(2, 2))._modules), routing.parameters_aside(model)
    assert [*routing.children_aside(model)] == names and len(parameters) == 2
    assert all(parameter not in set(model.parameters()) for parameter in parameters)
    assert model[0].running_mean is None and model[0].weight.shape == (2,)
    assert {type(module) for module in routing.all_modules(model)} >= {nn.Linear}
    assert isinstance(routing.restore_aside_(model), Doubled)
    assert list(model._modules) == ["0", "1", "2"]
    for module in (model[1], model[2]):
        routing.unroute_(module)
    assert isinstance(model[1].weight, nn.Parameter) and len(model[2]._flat_weights) == 4

    model = converted()
    assert routing.is_set_aside(model) and not routing.has_forgotten(model)
    routing.forget_aside_(model)
    assert routing.has_forgotten(model) and not routing.children_aside(model)
    with pytest.raises(CompressionError, match="float weights of its Sequential are gone"):
        routing.restore_aside_(model)
    assert not routing.drop_aside_(model) and not routing.is_set_aside(model)


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
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_code_may_ask_what_a_quantized_weight_is(read: Any) -> None:
    torch.manual_seed(0)
    model, x = Reads(read).eval(), torch.randn(16, 16)
    int8 = quantize(model, calibration=[x])
    assert not isinstance(int8.body.weight, Tensor)
    torch.testing.assert_close(int8(x), model(x), rtol=0.1, atol=0.1)
    assert torch.equal(copy.deepcopy(int8)(x), int8(x))


def test_code_that_computes_with_it_is_an_error_that_says_so() -> None:
    int8 = quantize(Reads(READS["shape"]).eval(), calibration=[torch.randn(16, 16)])
    for compute in (lambda weight: weight.sum(), torch.linalg.norm):
        with pytest.raises((AttributeError, CompressionError), match=r"the `weight` of this Linear are gone"):
            compute(int8.body.weight)


def test_a_layer_in_few_bits_can_still_be_pickled() -> None:
    model, x = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 16)
    packed = quantize(model, "int8_weight_only", calibration=[x])
    again = pickle.loads(pickle.dumps(packed))
    assert torch.equal(again(x), packed(x)) and again[0].weight.shape == (8, 16)
