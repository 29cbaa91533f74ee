"""What `method` may be: a name, or the import path of a method of torch's kind or of a criterion."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lightning_compress import CompressionError, Linear, ScheduledPruning, Window, prune_
from lightning_compress.cli import main
from lightning_compress.pruning.recipe import TORCH_METHODS, find_method
from tests.contracts.test_yaml import configure, only
from tests.pruning import rules
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import assert_same_state, count_zeros, same_random_state, snapshot

OWN = "tests.pruning.rules."


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("l1_unstructurd", "`method` must be a pruning rule.*Nearest: l1_unstructured"),
        ("no.such.module.Rule", "`method` must be a pruning rule or the import path.*No module named"),
        ("torch.nn.utils.prune.NoSuch", "no attribute 'NoSuch'"),
        ("torch.nn.Linear", "subclass of torch.nn.utils.prune.BasePruningMethod"),
        ("torch.nn.utils.prune.global_unstructured", "subclass of"),
        ("torch.nn.utils.prune.BasePruningMethod", "PRUNING_TYPE|abstract"),
        ("", "`method` must be a pruning rule"),
        (0.8, r"`method` must be a pruning rule.*Received: method=0\.8\. Is it the sparsity\? Write sparsity=0\.8,"),
        ("0.8", r"Write sparsity=0\.8, a fraction"),
        (80, r"Write sparsity=0\.8, a fraction"),
        (True, r"Write sparsity=\.\.\., a fraction"),
        (prune.L1Unstructured, r"Write method='torch\.nn\.utils\.prune\.L1Unstructured'\."),
        (rules.squares, r"Write method='tests\.pruning\.rules\.squares'\."),
        ("tests.pruning.rules.two", "a criterion.*of \\(weight\\), or of \\(weight, gradient, last score\\)"),
        (prune.LnStructured(0.5, 2), r"Write method='torch\.nn\.utils\.prune\.LnStructured'\."),
    ],
)
def test_methods_that_are_none(method: Any, message: str) -> None:
    # P10: messages name the real argument and list what is near.
    with pytest.raises(CompressionError, match=message):
        find_method(method)


def test_all_five_rules_of_torch_have_names() -> None:
    classes = {
        cls for cls in vars(prune).values() if isinstance(cls, type) and issubclass(cls, prune.BasePruningMethod)
    } - {prune.BasePruningMethod, prune.PruningContainer, prune.Identity}
    assert set(TORCH_METHODS.values()) == classes
    assert len(classes) == 5


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))


@pytest.mark.parametrize("arguments", [{"sparsity": 0.7}, {"sparsity": 0.7, "scope": "layer"}, {"n_m": "1:4"}])
def test_a_criterion_of_the_users_ranks_as_ours_does(arguments: dict[str, Any]) -> None:
    assert_same_state(
        prune_(network(), method="magnitude", **arguments), prune_(network(), method=OWN + "squares", **arguments)
    )


def test_a_signed_criterion_of_the_users_takes_the_most_negative() -> None:
    model = network()
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters() if "weight" in name}
    threshold = sorted(torch.cat([weight.flatten() for weight in weights.values()]).tolist())[47]
    masks = prune_(model, 0.5, OWN + "VALUES")
    for name, mask in masks.items():
        assert torch.equal(mask, weights[name] > threshold)


def test_a_criterion_of_the_users_may_need_gradients() -> None:
    model = network()
    with pytest.raises(CompressionError, match="must have seen gradients"):
        prune_(model, 0.5, OWN + "products")
    model(torch.randn(3, 8)).square().sum().backward()
    products = [(layer.weight * layer.weight.grad).abs() for layer in model]
    threshold = sorted(torch.cat([product.flatten() for product in products]).tolist())[47]
    masks = prune_(model, 0.5, OWN + "products")
    for mask, product in zip(masks.values(), products, strict=True):
        assert torch.equal(mask, product > threshold)


@pytest.mark.parametrize("regrow", [False, True])
@pytest.mark.parametrize("name", ["squares", "VALUES", "products"])
def test_a_fit_by_a_criterion_of_the_users_is_exact(name: str, regrow: bool) -> None:
    module = Classifier()
    pruning = ScheduledPruning(OWN + name, 0.77, schedule=Linear(), window=Window(0.1, 0.8), regrow=regrow)
    quiet_trainer(max_epochs=2, limit_val_batches=0, callbacks=[pruning]).fit(module, TinyData())
    assert count_zeros([module.body.weight, module.head.weight]) == (round(0.77 * 640), 640)


def test_a_criterion_of_the_users_from_yaml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    settings = {"method": OWN + "products", "sparsity": 0.5, "window": {"start": 0.1, "end": 0.8}}
    main(["fit", *configure([{"class_path": "ScheduledPruning", "init_args": settings}])])
    assert only(ScheduledPruning).method == OWN + "products"
    assert sum(int((~mask).sum()) for mask in only(ScheduledPruning).masks.values()) == 320


def test_what_a_criterion_of_the_users_draws_is_not_of_the_global_generators() -> None:
    with same_random_state():
        first, second = (prune_(network_of_ones(), 0.5, OWN + "noise", seed=3) for _ in range(2))
    assert_same_state(first, second)
    other = prune_(network_of_ones(), 0.5, OWN + "noise", seed=4)
    assert not torch.equal(first["0.weight"], other["0.weight"])


def test_what_a_criterion_of_the_users_draws_from_python_and_numpy_is_put_back() -> None:
    with same_random_state():
        prune_(network_of_ones(), 0.5, OWN + "noise_of_all")


def network_of_ones() -> nn.Sequential:
    layer = nn.utils.skip_init(nn.Linear, 8, 8)
    nn.init.ones_(layer.weight)
    nn.init.ones_(layer.bias)
    return nn.Sequential(layer)


@pytest.mark.parametrize(
    ("name", "received"),
    [("total", "torch.float32 of shape ()"), ("signs", "torch.bool of shape (8, 8)"), ("nothing", "None")],
)
def test_scores_that_do_not_fit_the_weight_are_an_error_that_changes_nothing(name: str, received: str) -> None:
    model = network()
    before = snapshot(model)
    message = f"`method` must be a criterion that gives a floating-point tensor .*{re.escape(f'Received: {received}')}"
    with same_random_state(), pytest.raises(CompressionError, match=message):
        prune_(model, 0.5, OWN + name)
    assert_same_state(before, model)
