"""How a tensor lies in memory changes nothing of what can go."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress import plan_removal, remove_channels_

LAST = torch.channels_last
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def net(*middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5)
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), *middle, *head)


def permuted(model: nn.Module) -> nn.Module:
    for layer in (model[0], model[2]):
        layer.weight.data = layer.weight.data.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    return model


WAYS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "model and inputs": (lambda: net().to(memory_format=LAST), X.to(memory_format=LAST)),
    "model": (lambda: net().to(memory_format=LAST), X),
    "inputs": (net, X.to(memory_format=LAST)),
    "weights of another order": (lambda: permuted(net()), X),
    "inputs with gaps": (net, X.repeat(1, 1, 2, 2)[:, :, ::2, ::2]),
    "in between": (lambda: net(Apply(lambda x: x.contiguous(memory_format=LAST))), X),
    "by strides": (lambda: net(Apply(lambda x: x.as_strided(x.shape, x.stride()))), X),
    "copied into strides": (lambda: net(Apply(lambda x: torch.empty_strided(x.shape, x.stride()).copy_(x))), X),
    "gated": (lambda: net(Apply(lambda x: x * F.adaptive_avg_pool2d(x, 1).sigmoid())), X.to(memory_format=LAST)),
}


@pytest.mark.parametrize("way", WAYS)
def test_all_widths_but_the_outputs_can_go(way: str) -> None:
    build, x = WAYS[way]
    model = build()
    formats = [layer.weight.is_contiguous(memory_format=LAST) for layer in (model[0], model[2])]
    plan = plan_removal(model, x, macs=0.5)
    assert plan.fixed == {str(len(model) - 1): "an output"}
    remove_channels_(model, plan)
    assert model[2].out_channels < 64 and model(x).shape == (2, 5)
    assert formats == [layer.weight.is_contiguous(memory_format=LAST) for layer in (model[0], model[2])]


def test_windows_take_the_channels_of_what_they_read() -> None:
    model = net(Apply(lambda x: x.unfold(2, 3, 1).mean(-1)))
    plan = plan_removal(model, X, macs=0.5)
    assert list(plan.fixed.values()) == ["an output"]


def test_volumes_stay_channels_last() -> None:
    model = nn.Sequential(nn.Conv3d(3, 32, 3), nn.ReLU(), nn.Conv3d(32, 4, 3), nn.AdaptiveAvgPool3d(1))
    model, x = model.to(memory_format=torch.channels_last_3d), torch.randn(2, 3, 6, 6, 6)
    remove_channels_(model, plan_removal(model, x, macs=0.5))
    assert model[0].out_channels < 32 and model[0].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert model(x).shape == (2, 4, 1, 1, 1)
