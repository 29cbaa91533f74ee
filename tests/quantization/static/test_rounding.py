"""Rounding to 8 bits against torch's own fake quantization, and when ranges move."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_compress.quantization.layers.int8_weight import Int8Weight
from lightning_compress.quantization.numerics.int8 import StaticInt8
from lightning_compress.quantization.static.rounding import (
    AVERAGING_CONSTANT,
    ActivationQuantizer,
    WeightQuantizer,
    rounded,
)
from lightning_compress.quantization.static.traced import reduce_ranges_, traced_units
from tests.quantization.prepared import prepare_for_training_
from tests.support.oracles import snapshot

KINDS = {"uint8": (0, 255, False), "int8": (-128, 127, False), "symmetric": (-128, 127, True)}


def quantizer(kind: str, *seen: Tensor, observer: str = "minmax") -> ActivationQuantizer:
    """One that has seen these activations."""
    found = ActivationQuantizer(*KINDS[kind], observer)
    found.observes = True
    for x in seen:
        found(x)
    found.observes = False
    return found


def affine(kind: str, least: float, largest: float) -> tuple[float, int]:
    """Scale and zero point of a range, from the formulas."""
    low, high, symmetric = KINDS[kind]
    least, largest = min(least, 0.0), max(largest, 0.0)
    if symmetric:
        return max(-least, largest) / high, 0
    scale = (largest - least) / (high - low)
    return scale, low - round(least / scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_activations_are_rounded_as_torch_fake_quantizes_them(kind: str, shift: float) -> None:
    seen = torch.randn(64, 16) + shift
    found, (scale, zero_point) = quantizer(kind, seen), affine(kind, seen.min().item(), seen.max().item())
    # Some of these values lie beyond the range that was seen.
    x, other = ((3 * torch.randn(64, 16) + shift).requires_grad_() for _ in range(2))
    other.data.copy_(x.detach())
    expected = torch.fake_quantize_per_tensor_affine(other, scale, zero_point, *KINDS[kind][:2])
    got = found(x)
    torch.testing.assert_close(got, expected)
    slope = torch.randn(64, 16)
    got.backward(slope), expected.backward(slope)
    assert x.grad is not None and (x.grad == 0).any() and (x.grad != 0).any()
    torch.testing.assert_close(x.grad, other.grad)
    rounding = found.rounding("node", ("user",))
    assert (rounding.after, rounding.users) == ("node", ("user",))
    assert (rounding.low, rounding.high) == KINDS[kind][:2]
    assert rounding.scale == pytest.approx(scale) and rounding.zero_point == zero_point
    torch.testing.assert_close(rounded(x, rounding.scale, zero_point, *KINDS[kind][:2]), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_has_a_code_of_its_own(kind: str) -> None:
    for seen in (torch.tensor([2.0, 3.1]), torch.tensor([-3.1, -2.0]), torch.tensor([-0.3, 7.77])):
        assert quantizer(kind, seen)(torch.zeros(3)).tolist() == [0.0] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_always_zero_and_what_was_never_seen_stay_finite(kind: str) -> None:
    assert quantizer(kind, torch.zeros(4))(torch.zeros(4)).tolist() == [0.0] * 4
    assert quantizer(kind)(torch.zeros(4)).tolist() == [0.0] * 4
    empty = quantizer(kind, torch.zeros(0, 3), torch.tensor([-1.0, 2.0]))
    assert empty(torch.zeros(0, 3)).shape == (0, 3)
    assert (empty.min_val.item(), empty.max_val.item()) == (-1.0, 2.0)


@pytest.mark.parametrize(
    ("value", "finite"), [(1.0, True), (torch.nan, False), (torch.inf, False), (-torch.inf, False)]
)
def test_a_range_that_holds_no_number_is_found(value: float, finite: bool) -> None:
    assert quantizer("uint8").is_finite()
    assert quantizer("uint8", torch.tensor([0.5, value])).is_finite() is finite


def test_extremes_and_moving_averages_of_batches() -> None:
    seen = [torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 1.0]), torch.tensor([0.0, 6.0])]
    widest = quantizer("uint8", *seen)
    assert (widest.min_val.item(), widest.max_val.item()) == (-3.0, 6.0)
    low, high = -1.0, 2.0
    for x in seen[1:]:
        low += AVERAGING_CONSTANT * (x.min().item() - low)
        high += AVERAGING_CONSTANT * (x.max().item() - high)
    average = quantizer("uint8", *seen, observer="moving_average")
    assert average.min_val.item() == pytest.approx(low) and average.max_val.item() == pytest.approx(high)


def error(x: Tensor, kind: str, least: float, largest: float) -> float:
    scale, zero_point = affine(kind, least, largest)
    return (rounded(x, scale, zero_point, *KINDS[kind][:2]) - x).square().mean().item()


SEEN = {
    "an outlier": lambda: torch.cat([torch.randn(200_000), torch.tensor([30.0])]),
    "positive": lambda: torch.randn(200_000).relu() ** 3,
    "negative": lambda: -(torch.randn(200_000).exp()),
    "uniform": lambda: torch.rand(200_000) - 0.3,
    "sparse": lambda: torch.cat([torch.zeros(200_000), torch.tensor([1.0, 0.3, -0.2])]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SEEN)
def test_a_histogram_finds_the_range_of_least_squared_error(name: str, kind: str) -> None:
    x = SEEN[name]()
    found = quantizer(kind, *x[torch.randperm(len(x))].chunk(3), observer="histogram").rounding("", None)
    got = (rounded(x, found.scale, found.zero_point, found.low, found.high) - x).square().mean().item()
    ends = (
        [share * x.min().item() for share in np.linspace(0.02, 1, 24)],
        [share * x.max().item() for share in np.linspace(0.02, 1, 24)],
    )
    least = min(error(x, kind, low, high) for low, high in itertools.product(*ends))
    assert got <= 1.1 * least + 1e-9
    if name == "an outlier":
        assert got < 0.8 * error(x, kind, x.min().item(), x.max().item())


def test_a_histogram_of_nothing_and_of_what_is_no_number() -> None:
    assert quantizer("uint8", torch.zeros(4), observer="histogram")(torch.zeros(4)).tolist() == [0.0] * 4
    assert quantizer("uint8", observer="histogram")(torch.zeros(4)).tolist() == [0.0] * 4
    assert not quantizer("uint8", torch.tensor([1.0, torch.nan]), observer="histogram").is_finite()
    assert not quantizer("uint8", torch.tensor([1.0, torch.inf]), observer="histogram").is_finite()


SHAPES = [(8, 5), (8, 3, 3), (8, 3, 2, 2), (8, 2, 2, 2, 2)]


@pytest.mark.parametrize("largest", [127, 63])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_are_rounded_as_torch_fake_quantizes_channels(shape: tuple[int, ...], largest: int) -> None:
    weight = (torch.randn(shape) * torch.logspace(-3, 3, 8).view(-1, *[1] * (len(shape) - 1))).requires_grad_()
    with torch.no_grad():
        weight[2] = 0.0  # a channel that was cut
    other = weight.detach().clone().requires_grad_()
    scale = other.detach().flatten(1).abs().amax(1).clamp_min(1e-12) / largest
    zeros = torch.zeros(8, dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(other, scale, zeros, 0, -largest, largest)
    got = WeightQuantizer(largest)(weight)
    torch.testing.assert_close(got, expected)
    assert torch.equal(got, Int8Weight.nearest(weight, largest == 63)())  # what is trained is what is stored
    slope = torch.randn(shape)
    got.backward(slope), expected.backward(slope)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, other.grad)


def fold(weight: Tensor, norm: Any) -> Tensor:
    ratio = norm.weight / (norm.running_var + norm.eps).sqrt()
    return weight * ratio.view(-1, *[1] * (weight.dim() - 1))


def test_rounding_weights_before_a_batchnorm_is_rounding_folded_ones() -> None:
    norm = nn.BatchNorm2d(8).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -1.0, 0.0, 3.0, -0.2, 1e-3, 50.0, -7.0]))
        norm.running_var.uniform_(0.1, 4.0)
    weight, folded = torch.randn(8, 3, 3, 3), WeightQuantizer(127)
    torch.testing.assert_close(folded(fold(weight, norm)), fold(WeightQuantizer(127)(weight), norm))
    assert not torch.equal(folded(fold(weight, norm)), fold(weight, norm))


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def prepared(x: Tensor) -> nn.Sequential:
    model = net()
    prepare_for_training_(model, x, StaticInt8())
    return model


def test_ranges_move_in_training_alone() -> None:
    x = torch.randn(4, 3, 8, 8)
    model = prepared(x)
    [form] = traced_units(model)
    model.train()(x)
    ranges = snapshot(form.extra_state())
    assert len(ranges) > 2 and all(value.isfinite() for value in ranges.values())
    model.eval()
    model(100 * x)
    assert snapshot(form.extra_state()) == ranges
    model.train()
    form.observers_frozen = True
    model(100 * x)
    assert snapshot(form.extra_state()) == ranges
    form.observers_frozen = False
    model(100 * x)
    moved = snapshot(form.extra_state())
    assert all(moved[name] != ranges[name] or ranges[name] == 0 for name in ranges)


def test_a_range_that_is_frozen_before_it_was_seen_rounds_to_finite_numbers() -> None:
    x = torch.randn(4, 3, 8, 8)
    model = prepared(x).eval()
    assert model(x).isfinite().all()


def test_processes_get_the_widest_of_their_ranges() -> None:
    models = [prepared(torch.randn(4, 3, 8, 8)) for _ in range(2)]
    for model, factor in zip(models, (1.0, 5.0), strict=True):
        model.train()(factor * torch.randn(4, 3, 8, 8))
    given: list[Tensor] = []
    for model in models:
        reduce_ranges_(model, lambda ends: given.append(ends) or ends)  # type: ignore[func-returns-value]
    ranges = [snapshot(traced_units(model)[0].extra_state()) for model in models]
    largest = torch.maximum(*given)
    for model in models:
        reduce_ranges_(model, lambda ends: largest)
    for model in models:
        for name, value in traced_units(model)[0].extra_state().items():
            widest = min if name.endswith("min_val") else max
            assert value == widest(ranges[0][name], ranges[1][name]), name
    assert any(ranges[0][name] != ranges[1][name] for name in ranges[0])


def test_without_a_prepared_unit_processes_have_nothing_to_say() -> None:
    def reduce(ends: Tensor) -> Tensor:
        raise AssertionError("it would wait for others")

    reduce_ranges_(net(), reduce)
