"""Layers of torch whose class the user has given another forward: nothing is fitted to what they don't compute."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from lightning_compress import GPTQ, NoEffectWarning, plan_removal, prune_, quantize, remove_channels_
from lightning_compress.compensation.in_order import Visits
from lightning_compress.compensation.runner import Runner, layers_of_


class SamePadded(nn.Conv1d):
    """Pads by itself, as networks ported from TensorFlow do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.pad(x, [1, 1]))


class Standardized(nn.Linear):
    """Multiplies with another matrix than its weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(1, keepdim=True)
        return functional.linear(x, weight / weight.std(1, keepdim=True), self.bias)


class Cast(nn.Linear):
    """Computes what its matrix does, only longer."""

    def forward(self, given: Tensor) -> Tensor:
        return functional.linear(given.float(), self.weight.float(), None) + self.bias


class WithLengths(nn.LSTM):
    def forward(self, x: Tensor, lengths: Any = None) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = SamePadded(4, 12, 3)
        self.states = WithLengths(12, 16, batch_first=True)
        self.attention = SelfAttention(16, 2, batch_first=True)
        self.standard = Standardized(16, 20)
        self.cast = Cast(20, 20)
        self.normed = weight_norm(Standardized(20, 16))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.states(self.conv(x).relu().transpose(1, 2), lengths=None)
        h = self.standard(self.attention(h)).relu()
        return self.head(self.normed(self.cast(h).relu()).relu().mean(1))


def batches() -> list[Tensor]:
    return list(torch.randn(80, 4, 9, generator=torch.Generator().manual_seed(1)).split(16))


def test_only_what_computes_its_matrix_is_visited() -> None:
    model = Model().eval()
    runner = Runner(model)
    visits = Visits(runner, runner, batches()[:1], layers_of_(runner.twin()))
    assert visits.order == ["cast", "head"]


def test_pruning_takes_magnitudes_there() -> None:
    model = Model().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match="went by magnitude"):
        prune_(model, 0.5, "least_squares", calibration=batches())
    zeros = sum(int((value == 0).sum()) for name, value in model.state_dict().items() if "weight" in name)
    assert zeros > 0
    for name in ("conv.weight", "standard.weight"):
        stays = model.state_dict()[name] != 0
        assert torch.equal(model.state_dict()[name][stays], before[name][stays])
    assert not torch.equal(model.head.weight[model.head.weight != 0], before["head.weight"][model.head.weight != 0])


def test_channels_leave_and_what_can_be_fitted_is() -> None:
    model = Model().eval()
    whole = torch.cat([model(x) for x in batches()]).detach()
    plan = plan_removal(model, macs=0.6, calibration=batches())
    found = remove_channels_(model, plan, calibration=batches())
    assert found is not None and {*found.fitted, *found.refused} <= {"cast", "head"}
    assert torch.cat([model(x) for x in batches()]).shape == whole.shape


class Mapped(nn.Module):
    """Calls two layers for one sample at a time, by `torch.vmap`, and the last one for all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.vmap(lambda row: self.second(self.first(row).relu()).relu())(x))


class Ragged(Mapped):
    """Calls two layers with samples of several lengths in one nested tensor."""

    def forward(self, x: Tensor) -> Tensor:
        samples = torch.nested.nested_tensor(
            [row[: 1 + number % 2] for number, row in enumerate(x)], layout=torch.jagged
        )
        hidden = self.second(self.first(samples).relu()).relu()
        return self.last(hidden.to_padded_tensor(0.0).mean(1))


@pytest.mark.parametrize("kind, shape", [(Mapped, (8, 6)), (Ragged, (8, 2, 6))])
def test_layers_whose_inputs_cannot_be_read_go_by_magnitude_or_to_the_nearest(
    kind: Any, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(shape) for _ in range(6)]
    model, reference = kind(), kind()
    with pytest.warns(NoEffectWarning, match=re.escape("`first.weight`, `second.weight` went by magnitude")):
        prune_(model, 0.5, "least_squares", scope="layer", calibration=batches)
    assert [int((layer.weight == 0).sum()) for layer in model.children()] == [24, 32, 8]
    quantized = quantize(reference, GPTQ(bits=8, group_size=None), calibration=batches)
    torch.testing.assert_close(quantized(batches[0]), reference(batches[0]), atol=0.05, rtol=0.05)
