"""Which parameters of a layer are weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_compress.modules.layer_weights import (
    NO_WEIGHT,
    UNSURE,
    holds_list_of,
    lies_in_a_list,
    magnitude,
    named_weights,
    own_parameters,
    why_no_weight,
)


class Experts(nn.Module):
    """Matrices in stacks and lists, of names that torch doesn't use."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.zeros(4, 3, 5))
        self.shift = nn.Parameter(torch.zeros(4, 5))
        self.scale = nn.Parameter(torch.zeros(5))
        self.some_bias = nn.Parameter(torch.zeros(4, 5))
        self.tokens = nn.Parameter(torch.zeros(1, 1, 5))
        self.matrices = nn.ParameterList([torch.zeros(2, 2)])


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(2, 2), ["weight"]),
        (nn.LSTM(2, 2), ["weight_ih_l0", "weight_hh_l0"]),
        (nn.MultiheadAttention(2, 1), ["in_proj_weight"]),
        (nn.LazyLinear(2), ["weight"]),
        (nn.BatchNorm1d(2), []),
        (parametrizations.weight_norm(nn.Linear(2, 2)), ["parametrizations.weight.original1"]),
        (parametrizations.spectral_norm(nn.Linear(2, 2)), ["parametrizations.weight.original"]),
        (parametrizations.orthogonal(nn.Linear(2, 2)), []),
    ],
)
def test_names_tell_in_torchs_own_layers(layer: nn.Module, expected: list[str]) -> None:
    assert list(named_weights(layer)) == expected
    names = {name for name, _ in own_parameters(layer)}
    assert names.issuperset(expected)


def test_shapes_tell_in_other_layers() -> None:
    layer = Experts()
    names = [name for name, _ in own_parameters(layer)]
    assert names == ["stack", "shift", "scale", "some_bias", "tokens", "matrices.0"]
    why = {name: why_no_weight(layer, name) for name in names}
    assert why["stack"] == why["matrices.0"] == "" and why["shift"].startswith(UNSURE)
    assert why["scale"] == why["tokens"] == NO_WEIGHT[1] and why["some_bias"] == NO_WEIGHT[0]
    assert why_no_weight(nn.LayerNorm(2), "weight") == NO_WEIGHT[0]
    orthogonal = parametrizations.orthogonal(nn.Linear(2, 2))
    assert "a parametrization computes the weight" in why_no_weight(orthogonal, "parametrizations.weight.original")


def test_parameters_in_lists_are_of_the_layer_around_them() -> None:
    layer = Experts()
    layers = dict(layer.named_modules())
    assert lies_in_a_list("matrices", layers) and not lies_in_a_list("", layers)
    assert holds_list_of(layer, "matrices.0", (nn.ParameterList,)) and not holds_list_of(layer, "stack", (nn.Module,))


def test_a_direction_has_its_magnitudes() -> None:
    layer = parametrizations.weight_norm(nn.Linear(2, 2))
    name = "parametrizations.weight.original1"
    found = magnitude(layer, f"net.{name}", name)
    assert found is not None and found[0] == "net.parametrizations.weight.original0"
    assert found[1] is dict(own_parameters(layer))[found[0].removeprefix("net.")]
    assert magnitude(nn.Linear(2, 2), "weight", "weight") is None
