"""What is left computes what the whole model computes with zeros in the place of what went."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from lightning_compress import Targets, plan_removal, remove_channels_
from tests.channels.cuts import NAMES, PLANS, REFUSED, cut, inexact, inputs_of, off, plan_of, refusal, row_of, run
from tests.support.oracles import assert_different_state, assert_same_state, snapshot

SOME = ["residual", "weight_norm", "tied", "lstm", "wide-densenet", "wide-bigru", "wide-mha"]


@pytest.mark.parametrize(("name", "setting"), PLANS)
def test_outputs_equal_those_with_zeros(name: str, setting: int) -> None:
    model, plan, _ = plan_of(name, setting)
    inputs = inputs_of(name)
    assert inexact(model, plan, inputs) < 1e-5
    if name != "functional_dropout":  # has no dropout that could be turned off
        assert inexact(model, plan, inputs, training=True) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_planning_changes_nothing(name: str) -> None:
    _, _, changed = plan_of(name, 0)
    assert changed == []


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_parameters_stay(name: str) -> None:
    whole, plan, _ = plan_of(name, 0)
    model = copy.deepcopy(whole)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    keys = list(model.state_dict())
    remove_channels_(model, plan)
    assert list(model.state_dict()) == keys
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[key] is parameter for key, parameter in parameters.items())
    assert any(after[key].shape != parameter.shape for key, parameter in whole.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_widths_that_are_inputs_or_outputs_stay(name: str) -> None:
    assert "an output" in refusal(row_of(name).build(), inputs_of(name), macs=0.5)


@pytest.mark.parametrize("name", SOME)
def test_cut_models_cut_again(name: str) -> None:
    model, plan, _ = plan_of(name, 0)
    inputs = inputs_of(name)
    once = cut(model, plan)
    again = plan_removal(once, inputs, macs=0.6, importance="random", seed=7)
    assert inexact(once, again, inputs) < 1e-5
    assert inexact(once, again, inputs, training=True) < 1e-5


@pytest.mark.parametrize("name", SOME)
def test_cut_models_can_be_copied_and_saved(name: str) -> None:
    model, plan, _ = plan_of(name, 0)
    inputs = inputs_of(name)
    small = cut(model, plan)
    expected = run(small, inputs)
    other = cut(row_of(name).build(seed=1), plan)
    assert_different_state(other, small)
    other.load_state_dict(small.state_dict())
    twins = [copy.deepcopy(small), other]
    if "weight_norm" not in name:  # torch refuses to pickle parametrized modules
        twins.append(pickle.loads(pickle.dumps(small)))
    for twin in twins:
        assert_same_state(twin, small)
        assert_same_state(run(twin, inputs), expected)
    file = io.BytesIO()
    torch.save(small.state_dict(), file)
    file.seek(0)
    assert_same_state(torch.load(file, weights_only=True), small.state_dict())


@pytest.mark.parametrize("name", SOME)
def test_cut_models_train(name: str) -> None:
    model, plan, _ = plan_of(name, 0)
    inputs = inputs_of(name)
    small = cut(model, plan).train()
    optimizer = torch.optim.SGD(small.parameters(), lr=1e-3, momentum=0.9)
    before = snapshot(small)
    for _ in range(2):
        out = small(**inputs) if isinstance(inputs, dict) else small(*inputs)
        optimizer.zero_grad()
        out.square().mean().backward()
        assert all(
            parameter.grad is None or parameter.grad.shape == parameter.shape for parameter in small.parameters()
        )
        optimizer.step()
    assert_different_state(before, small)


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 14, 3), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(14 * 16, 18), nn.Tanh(), nn.Linear(18, 5)),
        ).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.bfloat16, 0.02)], ids=str)
def test_other_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    model, x = network(dtype), torch.randn(4, 3, 8, 8, dtype=dtype)
    plan = plan_removal(model, x, macs=0.5)
    assert {layer for row in plan.rows if row.after < row.before for layer in row.layers} == {"0", "3", "6"}
    assert inexact(model, plan, (x,)) < tolerance
    assert {parameter.dtype for parameter in cut(model, plan).parameters()} == {dtype}


def test_channels_last_stays() -> None:
    model, x = network().to(memory_format=torch.channels_last), torch.randn(4, 3, 8, 8)
    plan = plan_removal(model, x, macs=0.5)
    small = cut(model, plan)
    assert small[3].weight.shape[1] < 12
    assert small[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert not small[3].weight.is_contiguous()
    assert off(run(small, (x,)), run(cut(network(), plan), (x,))) < 1e-6


def test_gradients_are_cut_with_their_parameters() -> None:
    model, x = network(), torch.randn(4, 3, 8, 8)
    model(x).square().sum().backward()
    plan = plan_removal(model, x, macs=0.5)
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    remove_channels_(model, plan)
    for name, parameter in model.named_parameters():
        expected = before[name].numpy()
        for dim, kept in plan.kept.get(name, {}).items():
            expected = expected.take(kept.tolist(), axis=dim)
        assert_same_state(parameter.grad, torch.from_numpy(expected))


@pytest.mark.parametrize("old", [False, True], ids=["parametrization", "hook"])
def test_both_forms_of_weight_norm(old: bool) -> None:
    def norm(layer: nn.Module) -> nn.Module:
        if not old:
            return nn.utils.parametrizations.weight_norm(layer)
        with pytest.warns(FutureWarning, match="weight_norm"):
            return nn.utils.weight_norm(layer)

    model = nn.Sequential(
        *(norm(nn.Conv1d(3, 12, 3)), nn.ELU(), norm(nn.ConvTranspose1d(12, 10, 4, stride=2)), nn.ELU()),
        *(norm(nn.Conv1d(10, 10, 3, groups=10)), nn.ELU(), norm(nn.Conv1d(10, 4, 1))),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("_g", "original0")):
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    x = torch.randn(2, 3, 20)
    plan = plan_removal(model, x, macs=0.5, importance="random")
    gone = {row.layers[0] for row in plan.rows if row.after < row.before}
    # The layers' own weights, as they are computed: what stays of each must be what it was.
    model.eval()(x)
    before = [model[place].weight.detach().clone() for place in (0, 2, 4, 6)]
    remove_channels_(model, plan)
    model.eval()(x)
    assert gone == {"0", "2"}
    first = [index for index in range(12) if index in _stays(plan, "0", old)]
    second = [index for index in range(10) if index in _stays(plan, "4", old)]
    expected = [before[0][first], before[1][first][:, second], before[2][second], before[3][:, second]]
    for place, weight in zip((0, 2, 4, 6), expected, strict=True):
        torch.testing.assert_close(model[place].weight.detach(), weight)


def _stays(plan: Any, layer: str, old: bool) -> set[int]:
    return set(plan.kept[f"{layer}.weight_v" if old else f"{layer}.parametrizations.weight.original1"][0].tolist())


def test_tied_weights_stay_tied() -> None:
    model, plan, _ = plan_of("tied", 0)
    small = cut(model, plan)
    assert small.lm_head.weight is small.embedding.weight
    assert small.lm_head.in_features == small.embedding.embedding_dim == small.embedding.weight.shape[1] < 16


def test_named_spanned_widths_are_cut_and_marked() -> None:
    model = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3))
    x = torch.randn(4, 6)
    assert plan_removal(model, x, channels=0.5).fixed["0"].startswith("a norm spans it, in `1`")
    plan = plan_removal(model, x, channels=0.5, targets=Targets(include=["0", "1"]))
    [only] = plan.rows
    assert (only.layers, only.before, only.after) == (("0",), 12, 6)
    assert "(approximate: a norm spans it, in `1`)" in str(plan)
    assert cut(model, plan)[1].normalized_shape == (6,)
    assert "`1`" in refusal(model, x, channels=0.5, targets=Targets(include=["[01]"]))


@pytest.mark.slow
def test_compiled_submodules() -> None:
    model, x = network().eval(), torch.randn(4, 3, 8, 8)
    plain = plan_removal(model, x, macs=0.5)
    model[3] = torch.compile(model[3], backend="eager")
    with torch.no_grad():
        model(x)
    plan = plan_removal(model, x, macs=0.5)
    assert_same_state(plan.kept, plain.kept)
    expected = run(cut(network(), plain), (x,))
    remove_channels_(model, plan)
    with torch.no_grad():
        assert off([model(x)], expected) < 1e-5
