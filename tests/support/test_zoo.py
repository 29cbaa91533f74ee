"""The zoo's own tests: a row that doesn't do what its notes say protects nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.support.data import DigitsData, TinyData, keyword_loader
from tests.support.modules import (
    Classifier,
    KeywordClassifier,
    ManualClassifier,
    ZooModule,
    float_leaves,
    quiet_trainer,
)
from tests.support.oracles import (
    assert_different_state,
    assert_float_keys,
    assert_same_state,
    count_zeros,
    hooks,
    same_random_state,
    snapshot,
)
from tests.support.zoo import ZOO, Row, row


def test_names_are_unique() -> None:
    names = [row.name for row in ZOO]
    assert len(names) == len(set(names)) == 19


@pytest.mark.parametrize("row", ZOO, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_forward(row: Row, training: bool) -> None:
    with same_random_state():
        model = row.build().train(training)
        args, kwargs = row.inputs()
    leaves = list(float_leaves(model(*args, **kwargs)))
    assert leaves
    assert all(leaf.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("row", ZOO, ids=str)
def test_same_seed_same_network_and_batch(row: Row) -> None:
    assert_same_state(row.build(), row.build())
    assert_different_state(row.build(), row.build(seed=1))
    assert_same_state(row.inputs(), row.inputs())
    assert_different_state(row.inputs(), row.inputs(seed=1))


@pytest.mark.parametrize("row", ZOO, ids=str)
def test_every_parameter_trains(row: Row) -> None:
    module = ZooModule(row)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    trainer = quiet_trainer(max_steps=2)
    trainer.fit(module)
    assert trainer.global_step == 2
    still = [name for name, parameter in module.named_parameters() if torch.equal(parameter, before[name])]
    assert still == []
    assert "test_loss" in trainer.test(module, verbose=False)[0]


def test_rows_are_what_they_say() -> None:
    tied, shared = row("tied").build(), row("shared").build()
    assert tied.lm_head.weight is tied.embedding.weight
    assert shared.first is shared.again
    assert isinstance(row("auxiliary_head").build()(*row("auxiliary_head").inputs()[0]), tuple)
    assert row("int_weight").build()[1].weight == 3
    assert isinstance(row("dict").build()(*row("dict").inputs()[0]), dict)
    dropout = row("functional_dropout").build()
    x = row("functional_dropout").inputs()[0][0]
    assert not torch.equal(dropout(x), dropout(x))
    assert torch.equal(dropout.eval()(x), dropout(x))


@pytest.mark.parametrize("make", [Classifier, ManualClassifier])
def test_classifiers_learn(make: type[Classifier]) -> None:
    module, data = make(), TinyData()
    untrained = quiet_trainer().validate(module, data, verbose=False)[0]["val_acc"]
    quiet_trainer(max_epochs=10).fit(module, data)
    assert quiet_trainer().validate(module, data, verbose=False)[0]["val_acc"] > untrained + 0.2


def test_digits() -> None:
    module, data = Classifier(features=64, classes=10), DigitsData()
    quiet_trainer(max_epochs=3).fit(module, data)
    assert quiet_trainer().test(module, data, verbose=False)[0]["test_acc"] > 0.9
    assert [len(part) for part in (data.train, data.val, data.test)] == [1077, 360, 360]


def test_keyword_classifier_trains() -> None:
    module = KeywordClassifier()
    before = snapshot(module)
    quiet_trainer().fit(module, keyword_loader(), keyword_loader())
    assert_different_state(before, module)


def test_same_state_names_the_tensor() -> None:
    model, other = row("mlp").build(), row("mlp").build()
    with torch.no_grad():
        other[2].weight[3, 1] += 1
    with pytest.raises(AssertionError, match=r"1 of 6 differ:\n  2\.weight: values differ by up to 1"):
        assert_same_state(model, other)
    with pytest.raises(AssertionError, match=r"b\.0: only in the first"):
        assert_same_state({"a": 1, "b": [2]}, {"a": 1})
    with pytest.raises(AssertionError, match=r"x: torch.float32 \(2,\) != torch.float32 \(1,\)"):
        assert_same_state({"x": torch.zeros(2)}, {"x": torch.zeros(1)})
    with pytest.raises(AssertionError, match="x: values differ"):
        assert_same_state({"x": torch.tensor(0.0)}, {"x": torch.tensor(-0.0)})
    assert_same_state({"x": torch.tensor(float("nan"))}, {"x": torch.tensor(float("nan"))})
    with pytest.raises(AssertionError, match="All 6 are the same"):
        assert_different_state(model, row("mlp").build())


def test_snapshot_is_a_copy() -> None:
    model = row("mlp").build()
    before = snapshot(model)
    with torch.no_grad():
        model[0].bias += 1
    assert_different_state(before, model)


@pytest.mark.parametrize("draw", ["random.random()", "np.random.rand()", "torch.rand(1)"])
def test_random_state_is_watched(draw: str) -> None:
    import random

    import numpy as np

    names = {"random": random, "np": np, "torch": torch}
    eval(draw, names)  # the first draw after seeding changes more than later ones do
    with pytest.raises(AssertionError, match="Drawn from the global generator"), same_random_state():
        eval(draw, names)


def test_zeros_count_each_tensor_once() -> None:
    weight = torch.tensor([[0.0, 1.0], [-0.0, 2.0]])
    assert count_zeros([weight, weight, torch.zeros(3)]) == (5, 7)


def test_float_keys() -> None:
    model = row("mlp").build()
    assert_float_keys({"state_dict": row("mlp").build().state_dict()}, model)
    for changed in (torch.zeros(3), model[0].bias.double()):
        with pytest.raises(AssertionError, match=r"changed: \['0.bias'\]"):
            assert_float_keys({"state_dict": {**model.state_dict(), "0.bias": changed}}, model)
    wrong = {"0.weight_orig": torch.zeros(1), "0.bias": torch.zeros(3)}
    with pytest.raises(
        AssertionError, match=r"missing: \['0.weight', .*surplus: \['0.weight_orig'\]; changed: \['0.bias'\]"
    ):
        assert_float_keys({"state_dict": wrong}, model)


def test_hooks_are_seen() -> None:
    model = nn.Sequential(nn.Linear(1, 1))
    assert hooks(model) == []
    handle = model[0].register_forward_pre_hook(lambda module, args: None)
    model.register_load_state_dict_pre_hook(lambda *args: None)
    assert hooks(model) == ["<root>: _load_state_dict_pre_hooks", "0: _forward_pre_hooks"]
    handle.remove()
    assert hooks(model) == ["<root>: _load_state_dict_pre_hooks"]
