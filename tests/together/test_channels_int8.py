"""A cut network in int8 is the int8 form of the network with zeros in the place of what was cut."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_compress import plan_removal, quantize, remove_channels_
from lightning_compress.modules.paths import named_tensors
from tests.support.wide import WIDE
from tests.support.zoo import Row, row

ROWS = [row(name) for name in ("mlp", "conv_bn_relu", "residual", "concat")]
LARGE = [wide for wide in WIDE if wide.name in ("resnet", "vgg", "inception")]


def zeroed(model: nn.Module, kept: dict[str, dict[int, torch.Tensor]]) -> nn.Module:
    """A copy with zeros in all that leaves: in what makes the channels and in what reads them. By hand, an oracle."""
    twin = copy.deepcopy(model)
    for name, dims in kept.items():
        tensor = named_tensors(twin)[name].data
        for dim, indices in dims.items():
            gone = sorted(set(range(tensor.shape[dim])) - set(indices.tolist()))
            tensor.transpose(0, dim)[gone] = 0
    return twin


@pytest.mark.parametrize("network", [*ROWS, *(pytest.param(row, marks=pytest.mark.slow) for row in LARGE)], ids=str)
def test_int8_after_a_cut_is_within_one_output_step(network: Row) -> None:
    model = network.build().eval()
    (x,), _ = network.inputs()
    plan = plan_removal(model, x, channels=0.5, importance="random", round_to=1)
    whole = zeroed(model, plan.kept)
    remove_channels_(model, plan)
    assert sum(map(torch.Tensor.numel, model.parameters())) < sum(map(torch.Tensor.numel, whole.parameters()))
    with torch.no_grad():
        float_output = model(x)
        got, wanted = (quantize(net, "int8_static", [x])(x) for net in (model, whole))
    step = (float_output.max() - float_output.min()) / 255
    assert (got - wanted).abs().max() <= 1.01 * step
