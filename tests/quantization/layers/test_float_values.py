"""Code that reads the weight of a quantized layer gets what the layer computes with, and can't change it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress import NF4, CompressionError, DynamicInt8, QLoRA, WeightOnly, merge_adapters, quantize
from lightning_compress.quantization.numerics.scheme import Scheme
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer

SCHEMES: list[Scheme] = [WeightOnly(8), WeightOnly(3, 5, symmetric=False), NF4(8), DynamicInt8(per_token=True)]


def quantized(scheme: Scheme) -> tuple[Any, Any]:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4, bias=False)).eval()
    return model, quantize(model, scheme, overrides={"1": scheme}).eval()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_values_that_are_read_are_those_that_are_computed_with(scheme: Scheme) -> None:
    model, few = quantized(scheme)
    twins: list[Any] = [few, copy.deepcopy(few), pickle.loads(pickle.dumps(few))]
    for twin in twins:
        assert twin[0].weight.shape == (8, 16) and twin[0].weight.dtype == torch.float32 and twin[1].bias is None
        x = torch.eye(16)  # each output column is a column of the weight
        torch.testing.assert_close(twin[0](x), F.linear(x, twin[0].weight, twin[0].bias), rtol=0.0, atol=2e-2)
        assert torch.equal(twin[0].weight, twins[0][0].weight)
    # They are nothing that the module holds.
    assert not any(value.is_floating_point() for _, value in few.named_parameters() if value.dim() > 1)
    assert isinstance(model[0].weight, nn.Parameter)


def zeroed(weight: Tensor) -> None:
    weight[0] = 0.0


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.mul_(2.0),
        lambda weight: weight.data.clamp_(-0.1, 0.1),
        lambda weight: weight.detach().T.zero_(),
        lambda weight: setattr(weight, "data", torch.zeros(8, 16)),
        zeroed,
        nn.init.zeros_,
    ],
)
def test_a_change_that_would_be_lost_is_an_error(change: Callable[[Tensor], Any]) -> None:
    _, few = quantized(WeightOnly(8))
    layer = few[0]
    before = layer.weight.clone()
    with pytest.raises(CompressionError, match="must be left as it is. Received: a change to its float values"):
        change(layer.weight)
    assert torch.equal(layer.weight, before)
    layer.weight.clone().mul_(2.0)  # what was copied is the reader's own


def test_the_weight_of_an_adapted_layer_has_the_adapters_in_it_and_passes_gradients_to_them() -> None:
    module = Classifier()
    quiet_trainer(callbacks=[QLoRA(rank=2)]).fit(module, TinyData())
    assert torch.equal(module.body.weight, merge_adapters(module).body.weight)
    module.body.weight.square().sum().backward()
    gradients = [value.grad for name, value in module.named_parameters() if "lora_" in name]
    assert len(gradients) == 2 and all(gradient.any() for gradient in gradients)
    assert type(merge_adapters(module).body) is nn.Linear
