"""Budgets: overrides and caps hold, and the total stays exact to one weight."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compress import CompressionError, Linear, ScheduledPruning, Targets, Window, prune_
from lightning_compress.pruning.budget import SparsityBudget
from lightning_compress.pruning.recipe import find_method
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import assert_same_state, count_zeros, hooks, snapshot


class Net(nn.Module):
    """Containers, so that patterns have something to match: 4 layers of 64, 128, 128 and 32 weights."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.stem = nn.Linear(8, 8)
        self.layer1 = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Linear(16, 8), nn.ReLU())
        self.head = nn.Linear(8, 4)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer2(self.layer1(self.stem(x))))


LAYERS = ("stem", "layer1.0", "layer2.0", "head")
SIZES = {"stem": 64, "layer1.0": 128, "layer2.0": 128, "head": 32}


def zeros(model: nn.Module) -> dict[str, int]:
    return {name: count_zeros([model.get_submodule(name).weight])[0] for name in LAYERS}


OVERRIDES: dict[str, tuple[dict[str, float], dict[str, float]]] = {
    "one layer": ({"stem": 0.25}, {"stem": 0.25}),
    "a layer that stays dense": ({"stem": 0.0}, {"stem": 0.0}),
    "a container": ({"layer2": 0.875}, {"layer2.0": 0.875}),
    "a pattern": ({"layer*": 0.75}, {"layer1.0": 0.75, "layer2.0": 0.75}),
    "the last match wins": ({"layer*": 0.75, "layer2": 0.0}, {"layer1.0": 0.75, "layer2.0": 0.0}),
    "the last match wins, the other way round": ({"layer2": 0.0, "layer*": 0.75}, {"layer1.0": 0.75, "layer2.0": 0.75}),
    "everything, then two": (
        {"*": 0.5, "head": 0.25, "stem": 0.75},
        {**dict.fromkeys(LAYERS, 0.5), "head": 0.25, "stem": 0.75},
    ),
}


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("name", OVERRIDES)
def test_overrides(name: str, scope: Any) -> None:
    overrides, expected = OVERRIDES[name]
    total = sum(SIZES.values())
    sparsity = 0.6 if expected.get("layer2.0") else 0.5
    if len(expected) == len(SIZES):
        sparsity = sum(expected[layer] * SIZES[layer] for layer in LAYERS) / total
    model = Net()
    prune_(model, sparsity, scope=scope, overrides=overrides)
    found = zeros(model)
    for layer, fraction in expected.items():
        assert found[layer] == round(fraction * SIZES[layer]), layer
    if scope == "global":
        assert sum(found.values()) == round(sparsity * total)
    else:
        assert all(found[layer] == round(sparsity * SIZES[layer]) for layer in LAYERS if layer not in expected)


def test_the_layers_without_an_override_are_ranked_together() -> None:
    model = Net()
    before = snapshot(model)
    prune_(model, 0.5, method="magnitude", overrides={"stem": 0.0})
    rest = [before[f"{layer}.weight"].abs().flatten() for layer in LAYERS[1:]]
    threshold = sorted(torch.cat(rest).tolist())[176 - 1]
    for layer in LAYERS[1:]:
        expected = before[f"{layer}.weight"].abs() > threshold
        assert torch.equal(model.get_submodule(layer).weight != 0, expected), layer


def test_the_weights_of_an_override_are_the_smallest_of_its_layer() -> None:
    model = Net()
    before = model.layer1[0].weight.detach().clone()
    prune_(model, 0.5, overrides={"layer1": 0.25})
    gone = model.layer1[0].weight == 0
    assert before[gone].abs().max() < before[~gone].abs().min()


@pytest.mark.parametrize(("pattern", "near"), [("layer1.1.conv", "layer1.0"), ("stemm", "stem"), ("haed", "head")])
def test_an_override_that_matches_nothing_names_the_nearest(pattern: str, near: str) -> None:
    model = Net()
    before = snapshot(model)
    message = rf"`overrides` must match layers that are targeted\. Received: overrides='{pattern}'\. Nearest: .*{near}"
    with pytest.raises(CompressionError, match=message):
        prune_(model, 0.5, overrides={"stem": 0.1, pattern: 0.2})
    assert_same_state(before, model)


def test_an_override_of_a_layer_that_is_not_targeted_is_an_error() -> None:
    with pytest.raises(CompressionError, match="`overrides` must match layers that are targeted"):
        prune_(Net(), 0.5, targets=Targets(exclude=["stem"]), overrides={"stem": 0.1})


@pytest.mark.parametrize("cap", [0.8, 0.81, 0.999])
def test_no_layer_lies_above_the_cap_and_the_total_is_exact(cap: float) -> None:
    model = Net()
    with torch.no_grad():
        model.stem.weight.mul_(1e-3)
        model.head.weight.mul_(1e-2)
    prune_(model, 0.7, method="magnitude", max_layer_sparsity=cap)
    found = zeros(model)
    assert sum(found.values()) == round(0.7 * 352)
    for layer, count in found.items():
        assert count <= cap * SIZES[layer], layer
    # The cap bites: without it these two would be empty.
    assert found["stem"] == math.floor(cap * 64) and found["head"] == math.floor(cap * 32)
    free = Net()
    free.load_state_dict(Net().state_dict())
    with torch.no_grad():
        free.stem.weight.mul_(1e-3)
        free.head.weight.mul_(1e-2)
    prune_(free, 0.7, method="magnitude")
    assert zeros(free)["stem"] == 64 and zeros(free)["head"] == 32


def test_a_cap_that_is_the_sparsity_itself_can_be_met() -> None:
    # 0.29 * 100 is a hair below 29.
    for hundredths in range(1, 100):
        model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
        prune_(model, hundredths / 100, max_layer_sparsity=hundredths / 100)
        assert [count_zeros([layer.weight])[0] for layer in model] == [hundredths, hundredths]


def test_an_override_may_exceed_the_cap() -> None:
    model = Net()
    prune_(model, 0.5, overrides={"head": 0.9375}, max_layer_sparsity=0.55)
    found = zeros(model)
    assert found["head"] == 30 and sum(found.values()) == 176
    assert all(found[layer] <= 0.55 * SIZES[layer] for layer in LAYERS[:3])


INFEASIBLE: dict[str, dict[str, Any]] = {
    "dense layers": {"sparsity": 0.9, "overrides": {"layer*": 0.0}},
    "overrides above the budget": {"sparsity": 0.1, "overrides": {"layer*": 0.9}},
    "a cap below the sparsity": {"sparsity": 0.9, "max_layer_sparsity": 0.8},
    "both": {"sparsity": 0.8, "overrides": {"layer1": 0.1}, "max_layer_sparsity": 0.85},
    "all overridden": {"sparsity": 0.5, "overrides": {"*": 0.6}},
}


@pytest.mark.parametrize("name", INFEASIBLE)
def test_what_cannot_be_met_is_an_error_that_changes_nothing(name: str) -> None:
    arguments = INFEASIBLE[name]
    model = Net()
    before = snapshot(model)
    with pytest.raises(CompressionError, match="`sparsity` must be within reach of the layers that share it.*Change"):
        prune_(model, **arguments)
    assert_same_state(before, model)


def test_what_cannot_be_met_stops_a_fit_before_anything_changes() -> None:
    module = Classifier()
    before = snapshot(module)
    pruning = ScheduledPruning(sparsity=0.9, overrides={"body": 0.0})
    with pytest.raises(CompressionError, match="within reach"):
        quiet_trainer(callbacks=[pruning]).fit(module, TinyData())
    with pytest.raises(CompressionError, match="`overrides` must match.*Nearest: body"):
        quiet_trainer(callbacks=[ScheduledPruning(sparsity=0.9, overrides={"bdy": 0.0})]).fit(module, TinyData())
    assert_same_state(before, module)
    assert hooks(module) == []


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "fraction of one": ({"overrides": {"stem": 1.0}}, r"`overrides` must hold fractions in \[0, 1\)"),
    "below zero": ({"overrides": {"stem": -0.1}}, "`overrides` must hold"),
    "nan": ({"overrides": {"stem": math.nan}}, "`overrides` must hold"),
    "cap of zero": ({"max_layer_sparsity": 0.0}, r"`max_layer_sparsity` must lie in \(0, 1\]"),
    "cap above one": ({"max_layer_sparsity": 1.1}, "`max_layer_sparsity` must lie"),
    "cap with layers": ({"scope": "layer", "max_layer_sparsity": 0.9}, "left out with scope='layer'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_budgets_are_refused_in_the_constructor(name: str) -> None:
    arguments, message = BAD[name]
    with pytest.raises(CompressionError, match=message):
        ScheduledPruning(sparsity=0.5, **arguments)


Case = tuple[dict[str, Tensor], SparsityBudget, dict[str, float]]


def ones(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}


@st.composite
def budgets(draw: st.DrawFn) -> Case:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    shapes = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5))
    weights = {}
    for i, shape in enumerate(shapes):
        weight = torch.randn(shape, generator=generator) * draw(st.sampled_from([1.0, 1e-3, 100.0]))
        weights[f"layer{i}"] = weight.round() if draw(st.booleans()) else weight  # rounded ones tie
    fractions = st.integers(0, 99).map(lambda hundredths: hundredths / 100)
    own = {name: draw(fractions) for name in weights if draw(st.booleans())}
    cap = draw(st.one_of(st.just(1.0), st.integers(1, 100).map(lambda hundredths: hundredths / 100)))
    total = sum(weight.numel() for weight in weights.values())
    taken = sum(round(own[name] * weights[name].numel()) for name in own)
    room = sum(math.floor(Fraction(str(cap)) * weight.numel()) for name, weight in weights.items() if name not in own)
    goal = draw(st.integers(taken, taken + room))
    sparsity = goal / total
    assume(sparsity < 1.0 and round(sparsity * total) == goal)
    return weights, SparsityBudget(sparsity, overrides=own, max_layer_sparsity=cap), own


@given(case=budgets())
@settings(max_examples=150)
def test_every_budget_that_can_be_met_is_met_exactly(case: Case) -> None:
    weights, budget, own = case
    before = snapshot(weights)
    budget.check(weights, own)
    masks = budget.grow(find_method("l1_unstructured"), weights, ones(weights), own)
    assert_same_state(before, snapshot(weights))
    pruned = {name: int((~mask).sum()) for name, mask in masks.items()}
    assert sum(pruned.values()) == round(budget.sparsity * sum(weight.numel() for weight in weights.values()))
    for name, weight in weights.items():
        if name in own:
            assert pruned[name] == round(own[name] * weight.numel())
        else:
            assert pruned[name] <= Fraction(str(budget.max_layer_sparsity)) * weight.numel()


@given(case=budgets(), fractions=st.lists(st.floats(0, 1), min_size=1, max_size=6))
@settings(max_examples=150)
def test_growing_gradually_ends_at_the_same_counts(case: Case, fractions: list[float]) -> None:
    weights, budget, own = case
    masks = ones(weights)
    for fraction in [*sorted(fractions), 1.0]:
        grown = budget.grow(find_method("l1_unstructured"), weights, masks, own, fraction)
        assert not any((grown[name] & ~masks[name]).any() for name in weights)
        masks = grown
    pruned = {name: int((~mask).sum()) for name, mask in masks.items()}
    assert all(pruned[name] == round(own[name] * weights[name].numel()) for name in own)
    assert sum(pruned.values()) == round(budget.sparsity * sum(weight.numel() for weight in weights.values()))


def test_rounding_on_the_way_takes_nothing_from_layers_that_share_no_budget() -> None:
    # Two overrides of 25 weights each are the whole budget of 50; halves round up for one and down for the sum.
    weights = {name: torch.randn(100) for name in ("a", "b", "c")}
    own = {"a": 0.25, "b": 0.25}
    budget, masks = SparsityBudget(50 / 300, overrides=own), ones(weights)
    for percent in range(101):
        masks = budget.grow(find_method("l1_unstructured"), weights, masks, own, percent / 100)
    assert [int((~mask).sum()) for mask in masks.values()] == [25, 25, 0]


@pytest.mark.parametrize(
    "arguments",
    [
        {"overrides": {"head": 0.3}},
        {"overrides": {"body": 0.6, "head": 0.0}, "sparsity": 0.48},
        {"max_layer_sparsity": 0.72},
        {"overrides": {"head": 0.25}, "max_layer_sparsity": 0.83},
        {"overrides": {"head": 0.25}, "scope": "layer"},
        {"overrides": {"head": 0.25}, "method": "random_unstructured"},
        {"overrides": {"head": 0.25}, "method": "lamp"},
        {"overrides": {"head": 0.25}, "method": "taylor"},
    ],
    ids=repr,
)
def test_a_gradual_fit_meets_its_budget_exactly(arguments: dict[str, Any]) -> None:
    arguments = {"sparsity": 0.7, "window": Window(0.1, 0.9), "schedule": Linear(), **arguments}
    module, pruning = Classifier(), ScheduledPruning(**arguments)
    quiet_trainer(max_epochs=3, limit_val_batches=0, callbacks=[pruning]).fit(module, TinyData())
    body, head = (count_zeros([layer.weight])[0] for layer in (module.body, module.head))
    own = arguments.get("overrides", {})
    if "head" in own:
        assert head == round(own["head"] * 128)
    if arguments.get("scope") == "layer":
        assert body == round(arguments["sparsity"] * 512)
    else:
        assert body + head == round(arguments["sparsity"] * 640)
    cap = arguments.get("max_layer_sparsity", 1.0)
    assert body <= cap * 512


def test_structured_overrides_take_the_nearest_number_of_units() -> None:
    model = Net()
    masks = prune_(model, 0.5, "ln_structured", overrides={"layer1": 0.25, "head": 0.0}, inputs=torch.zeros(2, 8))
    rows = {name: int((~mask.any(1)).sum()) for name, mask in masks.items()}
    assert rows["layer1.0.weight"] == 4 and rows["head.weight"] == 0
    missing = round(0.5 * 352) - 4 * 8
    shared = rows["stem.weight"] * 8 + rows["layer2.0.weight"] * 16
    assert abs(shared - missing) <= 8


def test_structured_caps_hold_in_whole_units() -> None:
    model = Net()
    with torch.no_grad():
        model.stem.weight.mul_(1e-3)
    masks = prune_(model, 0.5, "ln_structured", max_layer_sparsity=0.6, inputs=torch.zeros(2, 8))
    rows = {name: int((~mask.any(1)).sum()) for name, mask in masks.items()}
    assert rows["stem.weight"] == 4  # 4.8 units would be the cap
    for name, mask in masks.items():
        assert rows[name] <= 0.6 * len(mask), name
