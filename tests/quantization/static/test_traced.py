"""Preparing changes nothing but rounding: modes, BatchNorm, dropout and gradients are those of the user's modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress import StaticInt8, quantize
from lightning_compress.modules.call_log import record_calls
from lightning_compress.quantization.convert import convert_prepared_, prepare_, record_of
from lightning_compress.quantization.plan import make_plan
from lightning_compress.quantization.static.traced import traced_units
from tests.quantization.prepared import prepare_for_training_
from tests.quantization.test_quantize import agreement
from tests.support.modules import float_leaves
from tests.support.zoo import ZOO, Row


def prepared(model: nn.Module, x: Tensor, *, rounds: bool = False) -> nn.Module:
    """The model, prepared for training as one unit."""
    modes = [inner.training for inner in model.modules()]
    prepare_for_training_(model, x, StaticInt8())
    for inner, mode in zip(model.modules(), modes, strict=True):
        inner.training = mode
    [form] = traced_units(model)
    form.rounds = rounds
    return model


def twins(model: nn.Module, x: Tensor) -> tuple[nn.Module, nn.Module]:
    """The float model, and one of the same values that is prepared and doesn't round."""
    return copy.deepcopy(model), prepared(model, x)


def step(model: nn.Module, x: Tensor, autocast: bool = False) -> list[Tensor]:
    """Outputs, gradients and buffers of a call, with the same draws."""
    torch.manual_seed(0)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(x)
    output.square().mean().backward()
    return [output.detach(), *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]


def assert_same_step(pair: tuple[nn.Module, nn.Module], x: Tensor) -> None:
    expected, got = (step(model, x) for model in pair)
    assert len(expected) == len(got) > 2
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("row", ZOO, ids=str)
def test_without_rounding_a_prepared_model_is_the_model(row: Row) -> None:
    model = row.build().train()
    twin, (args, kwargs) = copy.deepcopy(model), row.inputs(0)
    parameters = list(map(id, model.parameters()))
    log = record_calls(copy.deepcopy(model).eval(), lambda: None)
    with torch.no_grad():
        log = record_calls(model.eval(), lambda: model(*args, **kwargs))
    plan = make_plan(model, log, StaticInt8(), None, {}, training=True)
    prepare_(model, plan.describe(), plan.traces)
    forms = traced_units(model)
    assert forms and list(map(id, model.parameters())) == parameters
    for form in forms:
        form.rounds = False
    args, kwargs = row.inputs(1)
    for mode in (True, False, True):
        found = []
        for net in (twin.train(mode), model.train(mode)):
            torch.manual_seed(1)
            net.zero_grad()
            outputs = list(float_leaves(net(*args, **kwargs)))
            sum(output.square().sum() for output in outputs).backward()  # type: ignore[union-attr]
            gradients = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
            found.append([*outputs, *gradients, *net.buffers()])
        assert len(found[0]) == len(found[1])
        for expected, got in zip(*found, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def norm_net(**options: Any) -> nn.Sequential:
    norm = nn.BatchNorm2d(4, **options)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 + 1


# BatchNorm.


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.3, "eps": 0.05},
        {"momentum": None},
        {"affine": False},
        {"track_running_stats": False},
    ],
    ids=str,
)
def test_batchnorm_computes_as_the_users(options: dict[str, Any], x: Tensor) -> None:
    pair = twins(norm_net(**options), x)
    for mode in (True, True, False, True, False):
        for model in pair:
            model.train(mode)
        assert_same_step(pair, x)


def test_momentum_and_eps_that_change_later_hold(x: Tensor) -> None:
    pair = twins(norm_net(momentum=0.3, eps=0.05), x)
    before = pair[1][1].running_mean.clone()
    for model in pair:
        model[1].momentum, model[1].eps = 0.9, 0.7
        model.train()
    assert_same_step(pair, x)
    assert not torch.equal(pair[1][1].running_mean, before)
    for model in pair:
        model.eval()
    assert_same_step(pair, x)


def test_a_frozen_batchnorm_stays_frozen_until_it_is_thawed(x: Tensor) -> None:
    model = norm_net().train()
    model[1].eval()
    pair = twins(model, x)
    assert not pair[1][1].training
    before = copy.deepcopy(pair[1][1].state_dict())
    assert_same_step(pair, x)
    assert all(torch.equal(before[name], value) for name, value in pair[1][1].state_dict().items())
    for net in pair:
        net.train()
    assert_same_step(pair, x)
    assert not torch.equal(before["running_mean"], pair[1][1].running_mean)


def test_batches_are_counted_in_training_alone(x: Tensor) -> None:
    model = prepared(norm_net(), x)
    counts = []
    for mode in (True, False, False, True):
        model.train(mode)(x)
        counts.append(int(model[1].num_batches_tracked))
    assert counts == [1, 1, 1, 2]


class Halves(nn.BatchNorm2d):
    """Normalizes each half of a batch by its own statistics in training, as if in two processes."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        return torch.cat([super(Halves, self).forward(half) for half in x.chunk(2)])


def test_a_batchnorm_of_the_users_normalizes_as_it_does(x: Tensor) -> None:
    model = norm_net()
    model[1] = Halves(4)
    pair = twins(model, x)
    for mode in (True, False):
        for net in pair:
            net.train(mode)
        assert_same_step(pair, x)
    assert int(pair[1][1].num_batches_tracked) == 2


class Doubled(nn.BatchNorm2d):
    """Computes something else than a BatchNorm in evaluation, too."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("training", [False, True])
def test_a_batchnorm_that_computes_something_else_in_evaluation_is_right_in_int8(training: bool, x: Tensor) -> None:
    model = norm_net()
    model[1] = Doubled(4)
    with torch.no_grad():
        model[1].bias.uniform_(-3, 3)
    floats = copy.deepcopy(model).eval()
    if training:
        prepare_for_training_(model, x, StaticInt8())
        for _ in range(3):
            model.train()(x)
        floats.load_state_dict(model.state_dict())
        convert_prepared_(model.eval())
    else:
        model = quantize(model, calibration=[x])
    expected, got = floats(x), model.eval()(x)
    assert (got - expected).norm() < 0.05 * expected.norm()


# Dropout.


class Drops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop, self.head = nn.Linear(16, 64), nn.Dropout(0.9), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.drop(self.body(x).relu()), 0.2, self.training))


def test_dropout_keeps_its_probability_after_modes_were_switched() -> None:
    x = torch.randn(32, 16)
    pair = twins(Drops(), x)
    for mode in (True, False, True, False, True):
        for model in pair:
            model.train(mode)
        assert_same_step(pair, x)


@pytest.mark.parametrize("drops", [True, False])
def test_dropout_has_a_mode_of_its_own(drops: bool) -> None:
    x = torch.randn(32, 16)
    pair = twins(Drops(), x)
    for model in pair:
        model.train(not drops)
        model.drop.train(drops)
    assert_same_step(pair, x)
    assert torch.equal(pair[1](x), pair[1](x)) is not drops or not drops


def test_dropout_stays_off_in_int8_whatever_the_mode() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32, eps=0.1), nn.ReLU(), nn.Dropout(0.9), nn.Linear(32, 4))
    x = torch.randn(64, 16)
    for _ in range(3):
        model(x)
    int8 = quantize(model, calibration=[x])
    assert agreement(model.eval()(x), int8.eval()(x)) > 0.99
    assert torch.equal(int8.eval()(x), int8.train()(x))


class DropPath(nn.Module):
    """Drops the branch of whole samples while it trains, as stochastic depth does."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * torch.empty(len(x), 1, 1, 1).bernoulli_(0.5) / 0.5


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.drop, self.head = DropPath(), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.drop(self.norm(self.branch(x))))


def test_stochastic_depth_trains_in_one_unit_and_is_gone_in_int8(x: Tensor) -> None:
    pair = twins(Deep(), x)
    for mode in (True, False, True):
        for model in pair:
            model.train(mode)
        assert_same_step(pair, x)
    assert not torch.equal(pair[1](x), pair[1](x))
    [form] = traced_units(pair[1])
    rounded = {place.after for place in form.places}
    assert {"conv2d", "batch_norm", "add"} <= rounded  # as if nothing were dropped between branch and sum
    convert_prepared_(pair[1].eval())
    assert torch.equal(pair[1](x), pair[1].train()(x))


# Code that depends on the mode.


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.head(x * 2 if self.training else x)


def test_code_that_depends_on_the_mode_is_told_of_where_it_trains() -> None:
    x = torch.randn(8, 16)
    model = Branches()
    prepare_for_training_(model, x, StaticInt8())
    record = record_of(model) or {}
    assert record["floats"] == {"": "not as a whole: its traced form computes something else in evaluation"}
    assert [unit["path"] for unit in record["units"]] == ["body", "head"]
    assert [unit["path"] for unit in (record_of(quantize(Branches(), calibration=[x])) or {})["units"]] == [""]


# One activation that is called twice, and mixed precision.


class Block(nn.Module):
    """A residual block whose one ReLU is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.relu(self.bn1(self.conv1(x)))
        return self.head(self.relu(self.bn2(self.conv2(inner)) + x))


def test_an_activation_that_is_called_twice_is_quantized_both_times(x: Tensor) -> None:
    model = Block()
    float_model, form_model = twins(model, x)
    assert (record_of(form_model) or {})["floats"] == {}
    [form] = traced_units(form_model)
    nodes = {node.name: node for node in form.trace.graph.graph.nodes}
    rounded = [place.after for place in form.places if "relu" in str(nodes[place.after].target)]
    assert len(rounded) == 2
    for mode in (True, False):
        float_model.train(mode), form_model.train(mode)
        assert_same_step((float_model, form_model), x)


@pytest.mark.parametrize("mode", [True, False])
def test_under_autocast_a_unit_computes_in_float32(mode: bool, x: Tensor) -> None:
    model = prepared(norm_net(), x, rounds=True).train(mode)
    twin = copy.deepcopy(model)
    expected, got = step(twin, x), step(model, x, autocast=True)
    for a, b in zip(expected, got, strict=True):
        assert b.dtype == a.dtype
        torch.testing.assert_close(b, a)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x.bfloat16()).dtype == torch.float32


CASES: dict[str, Callable[[], nn.Module]] = {"plain": norm_net, "residual": Block}


@pytest.mark.parametrize("name", CASES)
def test_a_copy_has_tensors_and_ranges_of_its_own(name: str, x: Tensor) -> None:
    model = prepared(CASES[name](), x, rounds=True).train()
    model(x)
    twin = copy.deepcopy(model)
    before = model.eval()(x)
    assert torch.equal(twin.eval()(x), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(3.0)
    twin.train()(5 * x)
    assert torch.equal(model(x), before)
    assert not torch.equal(twin.eval()(x), before)
