"""Training goes on: what optimizers remember is cut with the parameters, as a small model made by hand shows."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress import RemovalPlan, Targets, plan_removal, remove_channels_
from tests.support.oracles import assert_same_state, snapshot

SHAPES = {"0": (12, 6), "2": (10, 12), "4": (3, 10)}


def mlp(hidden: tuple[int, int] = (12, 10)) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Linear(6, hidden[0]), nn.Tanh(), nn.Linear(*hidden), nn.Tanh(), nn.Linear(hidden[1], 3))
        )


def step_(model: nn.Module, optimizer: Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 6, generator=generator)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def sliced(tensor: Any, size: torch.Size, kept: dict[int, Tensor]) -> Any:
    """The slices of a piece of state that lies along a parameter of `size`, by numpy."""
    if not isinstance(tensor, Tensor) or tensor.dim() != len(size):
        return copy.deepcopy(tensor)
    value = tensor.detach().numpy()
    for dim, indices in kept.items():
        value = value if value.shape[dim] != size[dim] else np.take(value, indices.numpy(), axis=dim)
    return torch.from_numpy(np.array(value))


def by_hand(model: nn.Module, optimizer: Optimizer, plan: RemovalPlan, make: Any) -> tuple[nn.Module, Optimizer]:
    """A narrow model and its optimizer, built from nothing but shapes, weights and state."""
    twin = mlp((len(plan.kept["0.weight"][0]), len(plan.kept["2.weight"][0])))
    other = make(twin.parameters())
    with torch.no_grad():
        for (name, parameter), (_, wide) in zip(twin.named_parameters(), model.named_parameters(), strict=True):
            indices = dict(plan.kept.get(name, {}))
            parameter.copy_(sliced(wide, wide.shape, indices))
            if wide in optimizer.state:
                other.state[parameter] = {
                    key: sliced(value, wide.shape, indices) for key, value in optimizer.state[wide].items()
                }
    return twin, other


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd_foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True),
    "sgd_fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "sgd_without_momentum": lambda p: torch.optim.SGD(p, 0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "adam_foreach": lambda p: torch.optim.Adam(p, 0.01, foreach=True),
    "adam_fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "adamw_amsgrad": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "adamw_amsgrad_fused": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.05),
    "adagrad_foreach": lambda p: torch.optim.Adagrad(p, 0.05, foreach=True),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adamax": lambda p: torch.optim.Adamax(p),
    "nadam": lambda p: torch.optim.NAdam(p),
    "radam": lambda p: torch.optim.RAdam(p),
    "asgd": lambda p: torch.optim.ASGD(p),
    "rprop": lambda p: torch.optim.Rprop(p),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.05),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_next_steps_are_those_of_a_narrow_model_made_by_hand(name: str) -> None:
    model = mlp()
    optimizer = OPTIMIZERS[name](model.parameters())
    for seed in range(3):
        step_(model, optimizer, seed)
    plan = plan_removal(model, torch.zeros(1, 6), channels=0.5, importance="random")
    twin, other = by_hand(model, optimizer, plan, OPTIMIZERS[name])
    remove_channels_(model, plan, [optimizer])
    assert model[2].weight.shape == twin[2].weight.shape != (10, 12)
    for seed in (7, 8):
        step_(model, optimizer, seed)
        step_(twin, other, seed)
        assert_same_state(model, twin)
        assert_same_state(optimizer.state_dict()["state"], other.state_dict()["state"])


def test_without_its_moments_the_next_step_differs() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for seed in range(3):
        step_(model, optimizer, seed)
    plan = plan_removal(model, torch.zeros(1, 6), channels=0.5)
    twin, _ = by_hand(model, optimizer, plan, torch.optim.Adam)
    fresh = torch.optim.Adam(twin.parameters(), 0.01)
    remove_channels_(model, plan, [optimizer])
    step_(model, optimizer, 7)
    step_(twin, fresh, 7)
    assert (model[0].weight - twin[0].weight).abs().max() > 1e-4


def test_several_optimizers_and_parameter_groups() -> None:
    model = mlp()
    first = torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].weight}], 0.2, 0.9)
    second = torch.optim.Adam([model[2].bias, *model[4].parameters()])
    step_(model, first, 0)
    step_(model, second, 0)
    before = {name: first.state[p] or second.state[p] for name, p in model.named_parameters()}
    before = {name: {key: leaf.clone() for key, leaf in state.items()} for name, state in before.items()}
    sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
    plan = plan_removal(model, torch.zeros(1, 6), channels=0.5)
    remove_channels_(model, plan, [first, second])
    for name, parameter in model.named_parameters():
        state = first.state.get(parameter) or second.state[parameter]
        expected = {key: sliced(leaf, sizes[name], dict(plan.kept.get(name, {}))) for key, leaf in before[name].items()}
        assert_same_state(dict(state), expected)
    assert [group["lr"] for group in first.param_groups] == [0.1, 0.2]


def test_optimizers_that_never_stepped() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    remove_channels_(model, plan_removal(model, torch.zeros(1, 6), channels=0.5), [optimizer])
    assert not optimizer.state
    step_(model, optimizer, 0)
    assert optimizer.state[model[0].weight]["exp_avg"].shape == model[0].weight.shape


@pytest.mark.parametrize("include", [None, ["2"]], ids=["all", "all_but_the_first"])
def test_lbfgs_starts_anew(include: list[str] | None) -> None:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(torch.ones(4, 6)).square().sum()
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    plan = plan_removal(model, torch.zeros(1, 6), channels=0.5, targets=Targets(include=include))
    remove_channels_(model, plan, [optimizer])
    before = closure()
    optimizer.step(closure)
    assert closure() < before


@pytest.mark.parametrize(
    "wrong", [lambda o: o, lambda o: None, lambda o: [o, None]], ids=["not_a_list", "none", "list_with_none"]
)
def test_what_is_no_list_of_optimizers_is_refused_or_understood(wrong: Any) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    step_(model, optimizer, 0)
    plan = plan_removal(model, torch.zeros(1, 6), channels=0.5)
    before = snapshot(model)
    try:
        remove_channels_(model, plan, wrong(optimizer))
    except Exception:
        assert_same_state(before, model)
    else:
        step_(model, optimizer, 1)
