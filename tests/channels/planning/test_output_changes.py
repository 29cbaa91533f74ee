"""What the outputs lose without a unit, against finite differences of the whole network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_compress import CompressionError, plan_removal
from lightning_compress.channels.planning.output_changes import output_changes
from lightning_compress.channels.tracing.find_groups import find_groups
from lightning_compress.channels.tracing.groups import Group
from lightning_compress.channels.tracing.verify import Subject
from lightning_compress.compensation.runner import Runner
from tests.support.oracles import assert_same_state, hooks, same_random_state, snapshot


class Net(nn.Module):
    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._forward = forward
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.running_mean)
                nn.init.uniform_(layer.running_var, 0.5, 2.0)
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


NETS: dict[str, Any] = {
    "linear": (lambda: Net(lambda m, x: m.b(m.a(x).tanh()), a=nn.Linear(4, 6), b=nn.Linear(6, 3)), (4, 4)),
    "tokens": (lambda: Net(lambda m, x: m.b(m.a(x).tanh()), a=nn.Linear(4, 6), b=nn.Linear(6, 3)), (3, 5, 4)),
    "convolutions": (
        lambda: Net(
            lambda m, x: m.c(m.b(m.n(m.a(x)).tanh()).tanh().flatten(1)),
            a=nn.Conv2d(2, 6, 3, padding=1), n=nn.BatchNorm2d(6), b=nn.Conv2d(6, 4, 3, stride=2), c=nn.Linear(16, 3),
        ),
        (3, 2, 6, 6),
    ),
    "groups": (
        lambda: Net(
            lambda m, x: m.c(m.b(m.a(x).tanh()).tanh()).mean((2, 3)),
            a=nn.Conv2d(2, 8, 1), b=nn.Conv2d(8, 12, 3, groups=4), c=nn.Conv2d(12, 3, 1),
        ),
        (3, 2, 5, 5),
    ),
    "transposed": (
        lambda: Net(
            lambda m, x: m.c(m.b(m.a(x).tanh()).tanh()),
            a=nn.Conv2d(2, 6, 1), b=nn.ConvTranspose2d(6, 4, 3, stride=2), c=nn.Conv2d(4, 2, 1),
        ),
        (2, 2, 3, 3),
    ),
    "a sum": (
        lambda: Net(
            lambda m, x: m.c((y := m.a(x)) + m.b(y.tanh()).tanh()),
            a=nn.Linear(4, 5), b=nn.Linear(5, 5), c=nn.Linear(5, 3),
        ),
        (4, 4),
    ),
    "twice": (
        lambda: Net(lambda m, x: m.b(m.a(x).tanh()) + m.b(m.a(-2 * x).tanh()), a=nn.Linear(4, 6), b=nn.Linear(6, 3)),
        (4, 4),
    ),
    "heads": (
        lambda: Net(
            lambda m, x: m.b(m.a(x, x, x)[0]), a=nn.MultiheadAttention(8, 4, batch_first=True), b=nn.Linear(8, 2)
        ),
        (3, 5, 8),
    ),
    "lstm": (
        lambda: Net(lambda m, x: m.b(m.a(x)[0]), a=nn.LSTM(4, 6, 2, batch_first=True), b=nn.Linear(6, 3)),
        (3, 5, 4),
    ),
    "gru": (
        lambda: Net(
            lambda m, x: m.b(m.a(x)[0]), a=nn.GRU(4, 6, bidirectional=True, batch_first=True), b=nn.Linear(12, 3)
        ),
        (3, 5, 4),
    ),
    "several outputs": (
        lambda: Net(
            lambda m, x: {"a": m.b(y := m.a(x).tanh()), "n": 3, "b": (m.c(y) * 40,)},
            a=nn.Linear(4, 6), b=nn.Linear(6, 3), c=nn.Linear(6, 1),
        ),
        (4, 4),
    ),
}  # fmt: skip


def tensors(output: Any) -> list[Tensor]:
    if isinstance(output, dict | tuple | list):
        parts = output.values() if isinstance(output, dict) else output
        return [tensor for part in parts for tensor in tensors(part)]
    return [output] if isinstance(output, Tensor) else []


def expected(model: nn.Module, group: Group, x: Tensor) -> np.ndarray:
    """``||dy/dg||^2`` for a factor g on all weights that read a unit, y over its standard deviation."""
    model, x = copy.deepcopy(model).double(), x.double()
    model.requires_grad_(False)
    spreads = [output.std() for output in tensors(model(x))]

    def outputs(gates: Tensor) -> list[Tensor]:
        weights = dict(model.named_parameters())
        for member in group.members:
            if not member.makes:
                factor = torch.where(member.units >= 0, gates[member.units.clamp_min(0)], 1.0)
                shape = [-1 if dim == member.dim else 1 for dim in range(weights[member.name].dim())]
                weights[member.name] = weights[member.name] * factor.view(shape)
        return tensors(functional_call(model, weights, (x,)))

    found = []
    for unit in range(group.size):
        step = torch.zeros(group.size, dtype=torch.float64)
        step[unit] = 1e-4
        pairs = zip(outputs(1 + step), outputs(1 - step), spreads, strict=True)
        found.append(sum(float(((up - down) / 2e-4 / spread).square().sum()) for up, down, spread in pairs))
    return np.array(found)


def groups_of(model: nn.Module, x: Tensor) -> tuple[Group, ...]:
    return find_groups(Subject(model, [lambda twin: twin(x)], samples=len(x))).all


@pytest.mark.parametrize("name", NETS)
def test_it_is_the_squared_derivative_of_the_outputs_by_what_reads_the_unit(name: str):
    torch.manual_seed(0)
    build, shape = NETS[name]
    model, x = build(), torch.randn(shape)
    groups = groups_of(model, x)
    assert groups
    repeats = 400
    scores = output_changes(Runner(model), groups, [x] * repeats)
    assert set(scores) == {group.name for group in groups}
    for group in groups:
        np.testing.assert_allclose(scores[group.name] / repeats, expected(model, group, x), rtol=0.35, atol=1e-8)
    # All units together are many draws: a factor would show.
    totals = [sum(float(scores[group.name].sum()) for group in groups) / repeats,
              sum(float(expected(model, group, x).sum()) for group in groups)]  # fmt: skip
    assert totals[0] == pytest.approx(totals[1], rel=0.12)


def test_long_batches_are_measured_in_pieces_of_their_samples_and_batches_add_up():
    torch.manual_seed(0)
    build, _ = NETS["linear"]
    model, x = build(), torch.randn(40, 4)
    (group,) = groups_of(model, x)
    one = output_changes(Runner(model), [group], [x] * 60)[group.name]
    several = output_changes(Runner(model), [group], list(x.split(4)) * 60)[group.name]
    np.testing.assert_allclose(one, several, rtol=0.35)


def test_the_same_seed_draws_the_same_and_nothing_is_touched():
    torch.manual_seed(0)
    build, shape = NETS["convolutions"]
    model, x = build().train(), torch.randn(shape)
    groups = groups_of(model, x)
    before, hooked = snapshot(model), hooks(model)
    with same_random_state():
        first, again, other = (output_changes(Runner(model), groups, [x], seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in first)
    assert_same_state(snapshot(model), before)
    assert hooks(model) == hooked and model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_measures_without_gradients_around_it_and_where_weights_are_frozen(mode: Any):
    torch.manual_seed(0)
    build, shape = NETS["linear"]
    model, x = build(), torch.randn(shape)
    (group,) = groups_of(model, x)
    expected = output_changes(Runner(model), [group], [x])[group.name]
    with mode():
        assert torch.equal(output_changes(Runner(model), [group], [x])[group.name], expected)
    model.requires_grad_(False)
    torch.testing.assert_close(output_changes(Runner(model), [group], [x])[group.name], expected)
    assert expected.any()


def test_units_that_the_outputs_do_not_depend_on_are_worth_nothing_and_leave_first():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    model[0].weight.data[::2] *= 100.0  # what magnitude would keep
    model[2].weight.data[:, ::2] *= 1e-4
    batches = [torch.randn(16, 4) for _ in range(3)]
    plan = plan_removal(model, channels=0.5, round_to=1, calibration=batches)
    assert plan.kept["0.weight"][0].tolist() == [1, 3, 5, 7]


def test_without_calibration_it_is_refused():
    with pytest.raises(CompressionError, match="`calibration` must be given for importance='outputs'"):
        plan_removal(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), torch.ones(1, 4), macs=0.5, importance="outputs")
