"""What each quantized layer changes alone is what a model changes of which that layer alone is quantized."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import StaticInt8, Targets, quantize
from lightning_compress.modules.calls import run_step
from lightning_compress.modules.isolation import evaluation_mode
from lightning_compress.quantization.alone import errors_alone
from lightning_compress.quantization.convert import record_of
from lightning_compress.quantization.quantize import quantize_
from lightning_compress.quantization.recipe import Recipe
from tests.support.oracles import assert_same_state, snapshot


class Net(nn.Module):
    """A depthwise block, attention and a head; one channel of the stem is an outlier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep, self.wide = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 1)
        self.attention, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 10)
        with torch.no_grad():
            self.stem.weight[0] *= 100

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(self.deep(self.stem(x).relu())).relu().flatten(2).transpose(1, 2)
        return self.head((x + self.attention(x, x, x)[0]).mean(1))


def networks() -> tuple[nn.Module, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return Net().eval(), [torch.randn(16, 1, 8, 8, generator=generator) for _ in range(3)]


def converted(net: nn.Module, batches: list[Tensor], scheme: Any, **overrides: Any) -> nn.Module:
    recipe = Recipe(scheme, 3, None, overrides, "auto")
    with evaluation_mode(net):
        quantize_(net, recipe, batches[0], iter(batches[1:]))
    return net


@pytest.mark.parametrize("scheme", [StaticInt8(equalize=False, smooth=False), "int8_dynamic", "int4_weight_only"])
@pytest.mark.filterwarnings("ignore:The quantized model is far")
@torch.no_grad()
def test_it_is_the_error_of_a_model_with_that_layer_alone(scheme: Any) -> None:
    net, batches = networks()
    exact, quantized = net(batches[0]), converted(copy.deepcopy(net), batches, scheme)
    before, given = snapshot(quantized), quantized(batches[0])
    found = errors_alone(quantized, batches[:1], run_step)
    assert_same_state(before, snapshot(quantized))
    assert torch.equal(given, quantized(batches[0]))
    assert len(found) >= 2
    for layer, error in found.items():
        one = quantize(net, scheme, batches, 3, targets=Targets(include=[layer]))
        expected = float((one(batches[0]) - exact).square().sum() / exact.square().sum())
        # Static int8 rounds what a layer gives, too, where another reads it; a single layer is read by none.
        assert 0.95 * expected <= error <= (5 if isinstance(scheme, StaticInt8) else 1.05) * expected, layer


def test_attention_is_one_layer_with_its_parts() -> None:
    net, batches = networks()
    found = errors_alone(converted(net, batches, "int8_static"), batches[:1], run_step)
    assert set(found) == {"stem", "deep", "wide", "attention", "head"} and min(found.values()) > 0


def test_layers_with_a_scheme_of_their_own_count_too() -> None:
    net, batches = networks()
    quantized = converted(net, batches, "int8_static", head="int4_weight_only")
    found = errors_alone(quantized, batches[:1], run_step)
    assert found["head"] == max(found.values())


@pytest.mark.filterwarnings("ignore:The quantized model is far")
def test_attention_can_be_left_in_float() -> None:
    net, batches = networks()
    record = record_of(quantize(net, "int8_static", batches, 3, targets=Targets(exclude=["attention"])))
    assert record is not None and record["floats"] == {"attention": "excluded"}
    assert not any(name.startswith("attention") for name in record["units"][0]["coded"])
