"""`wanda` and `least_squares`: against normal equations in numpy, against all masks there are, and over the zoo."""

from __future__ import annotations

import copy
import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_compress import CompressionError, prune_
from lightning_compress.compensation.guard import Samples
from lightning_compress.compensation.runner import Runner
from lightning_compress.errors import NoEffectWarning
from tests.pruning.test_n_m import groups_of
from tests.support.oracles import assert_same_state, hooks, same_random_state, snapshot
from tests.support.zoo import Row, row

RIDGE = 0.1


class Stepped(nn.Module):
    """A network whose batches are the (args, kwargs) of the zoo."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def calibration_step(self, batch: Any) -> Any:
        args, kwargs = batch
        return self.net(*args, **kwargs)


def batches(*shape: int, count: int = 10, seed: int = 0, mix: bool = True) -> list[Tensor]:
    """Batches whose features, on dimension 1, hang together and have means."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *shape, generator=generator).movedim(2, -1)
    if mix:
        x = x @ torch.randn(shape[1], shape[1], generator=generator) + torch.randn(shape[1], generator=generator)
    return list(x.movedim(-1, 2))


def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias)
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return layer


@pytest.mark.parametrize("bias", [True, False])
def test_what_stays_is_what_normal_equations_give(bias: bool) -> None:
    layer, data = linear(8, 3, bias), batches(6, 8)
    weight, offset = layer.weight.detach().double().numpy(), 0 if not bias else layer.bias.detach().double().numpy()
    samples = Samples.of(Runner(layer), data)  # the last two batches are held out, strange ones stand beside the others
    seen = torch.cat([*samples.own, *samples.strange]).double().numpy()
    x, y = seen, seen @ weight.T + offset
    if bias:
        x, y = x - x.mean(0), y - y.mean(0)
    hessian = x.T @ x
    hessian += RIDGE * hessian.trace() / 8 * np.eye(8)
    masks = prune_(layer, 0.5, "least_squares", "layer", calibration=data)
    own = torch.cat(samples.own).double().numpy()
    scores = np.abs(weight) * np.sqrt((own**2).sum(0))  # nothing before has changed, so the goal is the weight
    for place in range(3):
        stays = np.sort(scores[place].argsort()[4:])
        assert np.flatnonzero(masks["weight"][place].numpy()).tolist() == stays.tolist()
        right = (hessian @ weight[place])[stays]
        solved = np.linalg.solve(hessian[np.ix_(stays, stays)], right)
        np.testing.assert_allclose(layer.weight[place, stays].detach().numpy(), solved, rtol=2e-3, atol=1e-4)
    if bias:
        expected = (seen @ weight.T + offset).mean(0) - layer.weight.detach().double().numpy() @ seen.mean(0)
        np.testing.assert_allclose(layer.bias.detach().numpy(), expected, rtol=1e-4, atol=1e-4)


def test_the_mask_is_the_best_of_all_where_inputs_are_independent() -> None:
    scale = torch.tensor([1.0, 3.0, 0.2, 1.5, 0.7, 2.0])
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=6)))  # orthogonal, of mean zero
    layer, data = linear(6, 2), [signs * scale for _ in range(5)]
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    masks = prune_(layer, 0.5, "least_squares", "layer", calibration=data)
    x = signs * scale
    for place in range(2):
        errors = {}
        for stays in itertools.combinations(range(6), 3):
            solved = torch.linalg.lstsq(x[:, stays], x @ weight[place]).solution
            errors[stays] = float((x[:, stays] @ solved - x @ weight[place]).square().sum())
        assert tuple(masks["weight"][place].nonzero()[:, 0].tolist()) == min(errors, key=lambda stays: errors[stays])
    assert torch.allclose(layer.bias, bias, atol=1e-5)


def test_wanda_ranks_by_weight_times_norm_of_the_input_and_re_solves_nothing() -> None:
    layer, data = linear(8, 4), batches(6, 8)
    before = snapshot(layer)
    masks = prune_(layer, 0.25, "wanda", "layer", calibration=data)
    scores = before["weight"].abs() * torch.cat(data[:8]).norm(dim=0)
    for place in range(4):
        assert set(scores[place].argsort()[:2].tolist()) == set((~masks["weight"][place]).nonzero()[:, 0].tolist())
    assert torch.equal(layer.weight, before["weight"] * masks["weight"])
    assert torch.equal(layer.bias, before["bias"])


def test_later_layers_make_up_for_earlier_ones() -> None:
    model = nn.Sequential(linear(12, 16), nn.ReLU(), linear(16, 12), nn.ReLU(), linear(12, 4))
    data, other = batches(32, 12), torch.cat(batches(32, 12, seed=0)[8:])
    expected, errors = model(other).detach(), {}
    for method in ("wanda", "least_squares"):
        pruned = copy.deepcopy(model)
        prune_(pruned, 0.5, method, "layer", calibration=data)
        errors[method] = float((pruned(other).detach() - expected).square().mean())
    assert errors["least_squares"] < 0.7 * errors["wanda"]


def test_weights_stay_as_they_were_where_the_held_out_samples_say_so() -> None:
    # The inputs are the same in pairs where it is fitted, and the opposite where it is held out.
    layer, half = linear(8, 3), torch.randn(10, 32, 4, generator=torch.Generator().manual_seed(0))
    data = [torch.cat([part, part if number < 8 else -part], 1) for number, part in enumerate(half)]
    before = snapshot(layer)
    masks = prune_(layer, 0.5, "least_squares", calibration=data)
    assert torch.equal(layer.weight, before["weight"] * masks["weight"])
    assert torch.equal(layer.bias, before["bias"])


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize(
    "network", ["grouped", "attention", "gru", "shared", "tied", "weight_norm", "keyword_only"], ids=str
)
def test_sparsity_is_exact_over_the_zoo(network: str, scope: Any) -> None:
    zoo: Row = row(network)
    method = "least_squares" if scope == "global" else "wanda"
    model, data = Stepped(zoo.build()), [zoo.inputs(seed) for seed in range(6)]
    before, had = snapshot(model), hooks(model)
    with same_random_state():
        masks = prune_(model, 0.37, method, scope, calibration=data)
    sizes = {name: mask.numel() for name, mask in masks.items()}
    zeros = {name: int((~mask).sum()) for name, mask in masks.items()}
    if scope == "layer":
        assert zeros == {name: round(0.37 * size) for name, size in sizes.items()}
    else:
        assert sum(zeros.values()) == round(0.37 * sum(sizes.values()))
    weights = dict(model.named_parameters())
    for name, mask in masks.items():
        if "parametrizations" not in name:  # a unit that is gone keeps its direction
            assert torch.equal(weights[name] != 0, mask), name
    assert list(model.state_dict()) == list(before)
    assert hooks(model) == had
    same = {"net.again.weight": "net.first.weight"}  # the other name of one weight
    changed = {same.get(name, name) for name in before if not torch.equal(before[name], model.state_dict()[name])}
    assert all("bias" in name or name.endswith("original0") for name in changed - masks.keys())


@pytest.mark.parametrize("make", [lambda: nn.Conv1d(8, 6, 3, groups=2), lambda: nn.ConvTranspose1d(8, 6, 3)])
def test_n_m_holds_along_the_inputs(make: Any) -> None:
    layer = make()
    dim = 0 if isinstance(layer, nn.ConvTranspose1d) else 1
    masks = prune_(layer, method="least_squares", n_m="2:4", calibration=batches(4, 8, 9))
    assert {sum(group) for group in groups_of(masks["weight"], 4, dim)} == {2}
    assert torch.equal(layer.weight != 0, masks["weight"])


def test_what_is_pruned_stays_pruned_and_overrides_and_caps_hold() -> None:
    model, data = nn.Sequential(linear(16, 8), nn.ReLU(), linear(8, 8), nn.ReLU(), linear(8, 4)), batches(8, 16)
    first = prune_(model, 0.3, "wanda", calibration=data)
    masks = prune_(
        model, 0.5, "least_squares", overrides={"4": 0.25}, max_layer_sparsity=0.6, masks=first, calibration=data
    )
    zeros = [int((~mask).sum()) for mask in masks.values()]
    assert sum(zeros) == round(0.5 * 224)
    assert zeros[2] == max(8, int((~first["4.weight"]).sum()))
    assert zeros[0] <= 0.6 * 128 and zeros[1] <= 0.6 * 64
    assert not any((masks[name] & ~first[name]).any() for name in masks)


def test_layers_that_are_not_called_go_by_magnitude_and_are_named() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.pair = linear(8, 4), linear(8, 4), nn.Bilinear(4, 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.pair(self.used(x), self.used(x))

    model = Unused()
    before = snapshot(model)
    with pytest.warns(NoEffectWarning, match=re.escape("prune_: `unused.weight`, `pair.weight` went by magnitude")):
        masks = prune_(model, 0.5, "wanda", "layer", calibration=batches(8, 8))
    smallest = before["unused.weight"].abs().flatten().argsort()[:16]
    assert set((~masks["unused.weight"]).flatten().nonzero()[:, 0].tolist()) == set(smallest.tolist())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "`calibration` must be given for method='least_squares'"),
        ({"calibration": []}, "`calibration` must hold a batch"),
        ({"calibration": torch.zeros(4, 8)}, "`calibration` must be batches"),
        ({"calibration": [torch.full((4, 8), torch.nan)] * 5}, "`calibration` must be finite"),
        ({"calibration": [torch.zeros(4, 8)], "method": "lamp"}, "`calibration` must be left out with method='lamp'"),
        ({"calibration": [torch.zeros(4, 8)], "calibration_batches": 0}, "`calibration_batches` must be at least 1"),
        ({"calibration": [torch.zeros(4, 7)]}, "mat1 and mat2"),
    ],
)
def test_errors_leave_the_model_as_it_was(given: dict[str, Any], message: str) -> None:
    model = nn.Sequential(linear(8, 6), linear(6, 4))
    before = snapshot(model)
    with pytest.raises((CompressionError, RuntimeError), match=message):
        prune_(model, **{"sparsity": 0.5, "method": "least_squares", **given})
    assert_same_state(before, model)
    assert hooks(model) == []
