"""Each importance against numpy: the channels that stay are those that the formula names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from lightning_compress import ChannelPruning, CompressionError, RemovalPlan, Window, plan_removal
from lightning_compress.channels.planning.importance import Importance, UnitWeights
from tests.support.oracles import same_random_state

X = torch.ones(2, 3, 6, 6)


class Net(nn.Module):
    """A group of its own (`c`), and one that a sum makes (`a` and `d`)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 9, 3, padding=1), nn.BatchNorm2d(9)
        self.c, self.e = nn.Conv2d(9, 11, 3, padding=1), nn.BatchNorm2d(11)
        self.d = nn.Conv2d(11, 9, 1)
        self.o = nn.Conv2d(9, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.b(self.a(x)).relu()
        return self.o(x + self.d(self.e(self.c(x)).relu()))


def net(seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Net()
        for parameter in model.parameters():
            parameter.data.normal_()
            parameter.grad = torch.randn_like(parameter)
    return model


def weights(model: nn.Module, *names: str) -> list[np.ndarray]:
    return [model.get_parameter(name).detach().double().numpy() for name in names]


def sums(weight: np.ndarray, dim: int, power: int) -> np.ndarray:
    return (np.abs(weight) ** power).sum(tuple(axis for axis in range(weight.ndim) if axis != dim))


def magnitude(power: int) -> Callable[[nn.Module], list[np.ndarray]]:
    def scores(model: nn.Module) -> list[np.ndarray]:
        a, c, d, o = weights(model, "a.weight", "c.weight", "d.weight", "o.weight")
        summed = np.mean([sums(a, 0, power), sums(c, 1, power), sums(d, 0, power), sums(o, 1, power)], axis=0)
        return [summed, np.mean([sums(c, 0, power), sums(d, 1, power)], axis=0)]

    return scores


def batchnorm(model: nn.Module) -> list[np.ndarray]:
    return [np.abs(scale) for scale in weights(model, "b.weight", "e.weight")]


def fpgm(model: nn.Module) -> list[np.ndarray]:
    def distances(weight: np.ndarray) -> np.ndarray:
        rows = weight.reshape(len(weight), -1)
        return np.array([sum(np.sqrt(((row - other) ** 2).sum()) for other in rows) for row in rows])

    a, c, d = weights(model, "a.weight", "c.weight", "d.weight")
    return [np.mean([distances(a), distances(d)], axis=0), distances(c)]


def taylor(model: nn.Module) -> list[np.ndarray]:
    def changes(*names: str) -> np.ndarray:
        total = 0.0
        for name in names:
            parameter = model.get_parameter(name)
            product = (parameter * parameter.grad).detach().double().numpy()
            total = total + product.reshape(len(product), -1).sum(1)
        return np.asarray(total) ** 2

    return [
        changes("a.weight", "a.bias", "b.weight", "b.bias", "d.weight", "d.bias"),
        changes("c.weight", "c.bias", "e.weight", "e.bias"),
    ]


ORACLES = {"l1": magnitude(1), "l2": magnitude(2), "batchnorm": batchnorm, "fpgm": fpgm, "taylor": taylor}


def stays(plan: RemovalPlan) -> list[list[int]]:
    whole = {"a.weight": 9, "c.weight": 11}
    return [plan.kept.get(name, {}).get(0, torch.arange(size)).tolist() for name, size in whole.items()]


def largest(scores: np.ndarray, count: int) -> list[int]:
    return sorted(np.argsort(scores)[len(scores) - count :].tolist())


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("importance", ORACLES)
def test_per_layer_the_most_important_stay(importance: str, seed: int) -> None:
    model = net(seed)
    plan = plan_removal(model, X, channels=0.5, scope="layer", importance=importance)
    indices = stays(plan)
    assert 4 <= len(indices[0]) <= 5 and 5 <= len(indices[1]) <= 6
    expected = [largest(scores, len(stay)) for scores, stay in zip(ORACLES[importance](model), indices, strict=True)]
    assert indices == expected


@pytest.mark.parametrize("importance", ORACLES)
def test_all_layers_together_scores_are_compared_over_their_mean(importance: str) -> None:
    model = net(5)
    plan = plan_removal(model, X, channels=0.6, importance=importance)
    scores = [scores_of_group / scores_of_group.mean() for scores_of_group in ORACLES[importance](model)]
    least = sorted(
        (score, group, unit)
        for group, scores_of_group in enumerate(scores)
        for unit, score in enumerate(scores_of_group)
    )
    left = [set(range(9)), set(range(11))]
    for _, group, unit in least[: 20 - sum(map(len, stays(plan)))]:
        if len(left[group]) > 2:  # the least that may stay of 9 and 11
            left[group].remove(unit)
    assert sum(map(len, left)) == 12
    assert stays(plan) == [sorted(units) for units in left]


@pytest.mark.parametrize("importance", ["l1", "l2", "fpgm", "batchnorm"])
def test_the_scale_of_a_layer_does_not_matter(importance: str) -> None:
    model, other = net(), net()
    for name in ("c.weight", "e.weight"):
        other.get_parameter(name).data.mul_(16.0)
    if importance in ("l1", "l2"):  # `c.weight` belongs to both groups there: scale all of the second group's
        other = net()
        for parameter in other.parameters():
            parameter.data.mul_(16.0)
    plans = [plan_removal(network, X, channels=0.5, importance=importance) for network in (model, other)]
    assert stays(plans[0]) == stays(plans[1]) != [list(range(9)), list(range(11))]


def _random(seed: int, model_seed: int = 0) -> Sequence[list[int]]:
    return stays(plan_removal(net(model_seed), X, channels=0.5, importance="random", seed=seed))


def test_random_follows_its_seed_alone() -> None:
    with same_random_state():
        first = _random(3)
    torch.rand(7)
    assert _random(3) == first == _random(3, model_seed=1)
    assert len({str(_random(seed)) for seed in range(4)}) > 2


def test_taylor_needs_gradients_and_leaves_them() -> None:
    model = net()
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    plan_removal(model, X, channels=0.5, importance="taylor")
    assert all(torch.equal(parameter.grad, before[name]) for name, parameter in model.named_parameters())


def test_layers_without_a_batchnorm_are_as_important_as_the_mean() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1))
    scales = torch.tensor([1.0, 5.0, 1.0, 5.0, 1.0, 5.0, 1.0, 5.0])  # over their mean: 1/3 and 5/3
    model[1].weight.data.copy_(scales)
    plan = plan_removal(model, X, channels=0.875, importance="batchnorm")
    stays = plan.kept["0.weight"][0].tolist()
    assert len(stays) == 6 and {1, 3, 5, 7} < set(stays)
    assert "2.weight" not in plan.kept or 0 not in plan.kept["2.weight"]


def test_a_head_is_scored_as_a_whole() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.o = nn.MultiheadAttention(12, 4, batch_first=True), nn.Linear(12, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.o(self.attention(x, x, x, need_weights=False)[0])

    torch.manual_seed(0)
    model = Block()
    projections = model.attention.in_proj_weight.detach().double().numpy().reshape(3, 4, -1)
    out = model.attention.out_proj.weight.detach().double().numpy().reshape(12, 4, 3)
    scores = ((projections**2).sum((0, 2)) + (out**2).sum((0, 2))) / 2
    plan = plan_removal(model, torch.ones(2, 5, 12), channels=0.5, scope="layer", importance="l2")
    rows = plan.kept["attention.in_proj_weight"][0].view(3, 2, 3)
    assert sorted(set((rows[0] // 3).flatten().tolist())) == largest(scores, 2)
    assert torch.equal(rows[1], rows[0] + 12) and torch.equal(rows[2], rows[0] + 24)


HERE = __name__


def last_ones(group: UnitWeights) -> Tensor:
    """A user's own: whatever comes later matters more."""
    return torch.arange(group.size)


def _gradients(group: UnitWeights) -> Tensor | None:
    found = [
        weight.sums(weight.parameter.grad.abs())
        for weight in group.weights
        if weight.member.makes and weight.parameter.grad is not None
    ]
    return sum(found) if found else None


gradients = Importance(_gradients, needs_gradients=True)


def test_a_users_own_importance_is_given_by_its_import_path() -> None:
    indices = stays(plan_removal(net(), X, channels=0.5, scope="layer", importance=f"{HERE}.last_ones"))
    assert 4 <= len(indices[0]) <= 5 <= len(indices[1]) <= 6
    assert indices == [[*range(9)][-len(indices[0]) :], [*range(11)][-len(indices[1]) :]]


def test_a_users_own_importance_may_read_gradients() -> None:
    model = net()
    plan = plan_removal(model, X, channels=0.5, scope="layer", importance=f"{HERE}.gradients")

    def scores(*names: str) -> np.ndarray:
        gradients = [model.get_parameter(name).grad.double().abs().numpy() for name in names]
        return sum(gradient.reshape(len(gradient), -1).sum(1) for gradient in gradients)

    first = scores("a.weight", "a.bias", "b.weight", "b.bias", "d.weight", "d.bias")
    second = scores("c.weight", "c.bias", "e.weight", "e.bias")
    indices = stays(plan)
    assert indices == [largest(first, len(indices[0])), largest(second, len(indices[1]))]
    for parameter in model.parameters():
        parameter.grad = None
    with pytest.raises(CompressionError, match=r"`importance='.*\.gradients'` must have gradients. Received: none"):
        plan_removal(model, X, channels=0.5, importance=f"{HERE}.gradients")
    with pytest.raises(CompressionError, match=r"`window` must start later with importance='.*\.gradients'"):
        ChannelPruning(macs=0.5, importance=f"{HERE}.gradients", window=Window(0.0, 0.3))


def test_a_users_own_importance_is_named_in_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ChannelPruning, "callback")
    config = parser.parse_string(
        f"""
        callback:
          class_path: lightning_compress.ChannelPruning
          init_args: {{macs: 0.5, importance: {HERE}.last_ones}}
        """
    )
    callback = parser.instantiate_classes(config).callback
    assert callback.recipe.importance.score.__qualname__ == "last_ones"


def of_two(group: UnitWeights, power: int) -> Tensor:
    raise AssertionError("never called")


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        ("L2", "`importance` must be the name of one, or the import path of one. Received: importance='L2'. .*: l2"),
        ("no.such.module", "No module named 'no'"),
        (f"{HERE}.no_such", "has no attribute 'no_such'"),
        (f"{HERE}.of_two", "must name a function of one argument, the group.*missing a required argument: 'power'"),
        (f"{HERE}.X", "must name a function of one argument"),
        (last_ones, r"Received: importance=<function .* Write importance='.*\.last_ones'"),
        (7, "Received: importance=7"),
    ],
)
def test_what_names_no_importance_is_refused_at_once(importance: object, message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        ChannelPruning(macs=0.5, importance=importance)
    with pytest.raises(CompressionError, match=message):
        plan_removal(nn.Linear(2, 2), torch.ones(1, 2), macs=0.5, importance=importance)


def below_zero(group: UnitWeights) -> Tensor:
    return -torch.ones(group.size)


def of_another_size(group: UnitWeights) -> Tensor:
    return torch.ones(group.size + 1)


def no_number(group: UnitWeights) -> Tensor:
    return torch.full((group.size,), torch.nan)


@pytest.mark.parametrize("name", ["below_zero", "of_another_size", "no_number"])
def test_a_users_own_importance_scores_each_unit(name: str) -> None:
    with pytest.raises(CompressionError, match="`importance` must give a score of at least 0 for each unit"):
        plan_removal(net(), X, channels=0.5, importance=f"{HERE}.{name}")
