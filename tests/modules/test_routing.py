"""A module's forward is routed into another form, and comes back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import CompressionError
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
