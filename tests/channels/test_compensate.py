"""Layers behind removed channels are fitted to what the whole model puts out."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import (
    CompressionError,
    RemovalPlan,
    load_compressed,
    plan_removal,
    remove_channels_,
    save_compressed,
)
from lightning_compress.channels.compensate import Compensation, fitted_narrow, last_fit, take_fits_
from lightning_compress.channels.cutting.cut import cut_
from lightning_compress.compensation.runner import Runner
from tests.support.oracles import assert_same_state, hooks, same_random_state, snapshot


def twice(*layers: nn.Module) -> nn.Sequential:
    """Each unit of the first layer, and all that belongs to it, is there twice: the second one is a multiple."""
    torch.manual_seed(0)
    return nn.Sequential(*layers)


def linear(bias: bool = True) -> tuple[nn.Module, Tensor]:
    model = twice(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4, bias=bias))
    for parameter in model[0].parameters():
        parameter.data[8:] = 3.0 * parameter.data[:8]  # ReLU keeps factors
    return model, torch.randn(200, 6)


def convolutional() -> tuple[nn.Module, Tensor]:
    model = twice(
        nn.Conv2d(2, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3, bias=False), nn.BatchNorm2d(4)
    )
    norm: Any = model[1]
    norm.running_var.uniform_(0.5, 2.0)
    model[4].running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr, operator]
    for tensor in (*model[0].parameters(), *norm.parameters(), norm.running_mean, norm.running_var):
        tensor.data[8:] = tensor.data[:8]
    norm.weight.data[8:] *= 3.0
    norm.bias.data[8:] *= 3.0
    return model.eval(), torch.randn(60, 2, 8, 8)


def attention() -> tuple[nn.Module, Tensor]:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(16, 4, batch_first=True)
            weights, biases = self.attend.in_proj_weight.data, self.attend.in_proj_bias.data
            for third in (*weights.chunk(3), *biases.chunk(3)):
                third[8:] = third[:8]

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attend(x, x, x, need_weights=False)[0]

    torch.manual_seed(0)
    return Attend().eval(), torch.randn(60, 5, 16)


def first_half(model: nn.Module, plan: RemovalPlan) -> RemovalPlan:
    """The plan that takes the second one of each pair."""

    def first(name: str, dim: int) -> Tensor:
        size = plan.shapes[name][dim]
        thirds = range(3) if "in_proj" in name else range(1)
        part = size // len(thirds)
        return torch.cat([torch.arange(part // 2) + third * part for third in thirds])

    return replace(plan, kept={name: {dim: first(name, dim) for dim in dims} for name, dims in plan.kept.items()})


@pytest.mark.parametrize(
    "make",
    [linear, lambda: linear(bias=False), convolutional, attention],
    ids=["linear", "without a bias", "convolutions", "heads"],
)
@torch.no_grad()
def test_what_is_there_twice_is_made_up_for(make: Any):
    model, x = make()
    expected = model(x)
    plan = first_half(model, plan_removal(model, x[:2], channels=0.5, round_to=1))
    plain, fitted = copy.deepcopy(model), copy.deepcopy(model)
    remove_channels_(plain, plan)
    compensation = remove_channels_(fitted, plan, calibration=x.split(20))
    errors = [float((narrow(x) - expected).square().sum()) for narrow in (plain, fitted)]
    assert errors[1] < 0.1 * errors[0], errors
    assert compensation is not None and len(compensation.fitted) == 1 and compensation.refused == ()
    assert compensation.after.cosine > compensation.before.cosine


def test_outputs_of_the_calibrations_kind_come_nearer_through_several_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    mixing = torch.randn(3, 6)
    x, others = (torch.randn(count, 3) @ mixing for count in (500, 300))
    plan = plan_removal(model, x[:2], macs=0.4, round_to=1)
    plain, fitted = copy.deepcopy(model), copy.deepcopy(model)
    remove_channels_(plain, plan)
    remove_channels_(fitted, plan, calibration=x.split(50))
    expected = model(others)
    assert (fitted(others) - expected).square().sum() < 0.25 * (plain(others) - expected).square().sum()


def test_a_fit_that_ruins_what_is_held_out_is_refused_and_leaves_the_plain_cut():
    """Units that are alike on what is fitted to, and opposite on what is held out."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 4))
    weight = model[0].weight.data
    weight[:4, 3:] = 0.0
    weight[4:] = weight[:4].roll(3, 1)
    u = torch.randn(200, 3)
    x = torch.cat([u, u], 1)
    x[160:, 3:] *= -1
    plan = first_half(model, plan_removal(model, x[:2], channels=0.5, round_to=1))
    plain = copy.deepcopy(model)
    remove_channels_(plain, plan)
    compensation = remove_channels_(model, plan, calibration=x.split(20))
    assert compensation is not None and compensation.refused == ("1",) and compensation.fitted == ()
    assert_same_state(snapshot(model), snapshot(plain))
    assert compensation.before == compensation.after


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "`calibration` must give at least one batch"),
        (torch.ones(4, 6), "`calibration` must be batches. Received: calibration='Tensor'"),
        ([torch.full((20, 6), float("nan"))], "`calibration` must be finite"),
        ([torch.ones(20, 5)], "shapes cannot be multiplied"),
        ([torch.ones(4, 6)], "`calibration` must give two batches, or a batch of five samples"),
    ],
    ids=["empty", "a tensor", "NaN", "another width", "nothing to hold out"],
)
def test_an_error_leaves_model_and_optimizer_as_they_were(calibration: Any, message: str):
    model, x = linear()
    optimizer = torch.optim.Adam(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    plan = plan_removal(model, x[:2], channels=0.5)
    before, remembered, hooked = snapshot(model), copy.deepcopy(optimizer.state_dict()), hooks(model)
    with pytest.raises((CompressionError, RuntimeError), match=message):
        remove_channels_(model, plan, optimizer, calibration=calibration)
    assert_same_state(snapshot(model), before)
    assert_same_state(snapshot(optimizer.state_dict()), snapshot(remembered))
    assert hooks(model) == hooked


def test_it_works_in_inference_mode_and_draws_from_no_global_generator():
    model, x = linear()
    expected = model(x)
    with torch.inference_mode(), same_random_state():
        plan = plan_removal(model, channels=0.5, round_to=1, calibration=x.split(20))
        remove_channels_(model, plan, calibration=x.split(20))
    assert (model(x) - expected).square().mean() < 1e-2 * expected.var()
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_outputs_may_be_filtered_and_batches_may_be_lists_of_images():
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.boxes = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)

        def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
            found = [self.boxes(self.body(image[None]).relu()).flatten(2)[0] for image in images]
            return [{"boxes": boxes[:, boxes[0] > 0]} for boxes in found]

    torch.manual_seed(0)
    model = Detector().eval()
    batches = [([torch.randn(3, 8, 8), torch.randn(3, 9, 7)],) for _ in range(6)]
    plan = plan_removal(model, macs=0.5, round_to=1, calibration=batches)
    compensation = remove_channels_(model, plan, calibration=batches)
    assert compensation is not None and {*compensation.fitted, *compensation.refused} == {"boxes"}


@torch.no_grad()
def test_behind_a_norm_mean_and_spread_are_what_they_were():
    model, x = convolutional()
    second: Any = model[4]
    second.running_var, second.running_mean = torch.var_mean(model[:4](x[:48]), (0, 2, 3))
    plan = first_half(model, plan_removal(model, x[:2], channels=0.5, round_to=1))
    plain, fitted = copy.deepcopy(model), copy.deepcopy(model)
    remove_channels_(plain, plan)
    remove_channels_(fitted, plan, calibration=[x])
    moments = [torch.var_mean(module(x[:48]), (0, 2, 3)) for module in (model, fitted, plain)]
    for of_whole, of_fitted, of_plain in zip(*moments, strict=True):
        torch.testing.assert_close(of_fitted, of_whole, atol=0.02, rtol=0.02)
        assert (of_plain - of_whole).abs().max() > 0.1


def test_averaged_copies_move_as_the_model_does():
    model, x = linear()
    average = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter += 0.1
    plan = plan_removal(model, x[:2], channels=0.5, round_to=1)
    fits, compensation = fitted_narrow(Runner(model), plan, x.split(20), "a test")
    for module in (model, average):
        cut_(module, plan.kept, plan.numbers)
    apart = [a.data - b.data for a, b in zip(average.parameters(), model.parameters(), strict=True)]
    before = [parameter.data.clone() for parameter in model.parameters()]
    take_fits_(model, fits, compensation, [average])
    assert not torch.equal(model[2].weight, before[2])
    for a, b, difference in zip(average.parameters(), model.parameters(), apart, strict=True):
        torch.testing.assert_close(a.data - b.data, difference)
    assert last_fit(model) == compensation and last_fit(average) is None


def test_what_was_fitted_is_plain_data_in_the_file_and_comes_back(tmp_path: Any):
    model, x = linear()
    whole = copy.deepcopy(model)
    plan = plan_removal(model, x[:2], channels=0.5, round_to=1)
    compensation = remove_channels_(model, plan, calibration=x.split(20))
    save_compressed(model, tmp_path / "small.ckpt")
    torch.load(tmp_path / "small.ckpt", weights_only=True)
    loaded = load_compressed(tmp_path / "small.ckpt", whole)
    assert torch.equal(loaded(x), model(x))
    assert last_fit(loaded) == compensation == Compensation.from_plain(compensation.to_plain())  # type: ignore[union-attr]
    assert compensation.samples == 160 and compensation.held_out == 40  # type: ignore[union-attr]
    assert "160 samples of `calibration`; on 40 others" in str(compensation)
