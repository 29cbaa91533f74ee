"""What is handed over in evaluation mode trains, unless it is frozen on purpose."""

from __future__ import annotations

from torch import nn

from lightning_compress.modules.training_mode import has_frozen, restore_given_, train_given_, wake_


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Linear(2, 2), nn.Dropout()).eval(),
        nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Dropout()).eval(),
        nn.BatchNorm1d(2).eval(),
    )


def trained(model: nn.Module) -> set[int]:
    return {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model]


def test_the_largest_parts_that_train_are_switched_and_put_back() -> None:
    model = net()
    assert train_given_(model, trained(model)) == ["0"]
    assert modes(model) == [True, False, False] and model[0][1].training
    restore_given_(model)
    assert modes(model) == [False, False, False] and not model[0][1].training
    assert train_given_(net(), set()) == []


def test_a_model_that_is_given_in_evaluation_as_a_whole_keeps_its_frozen_parts() -> None:
    model = net().eval()
    assert train_given_(model, trained(model)) == [""]
    assert model.training and modes(model) == [True, False, True] and not model[1][1].training


def test_what_is_thawed_later_wakes_then() -> None:
    model = net()
    train_given_(model, trained(model))
    assert has_frozen(model) and wake_(model, trained(model)) == []
    model[1].requires_grad_(True)
    assert wake_(model, trained(model)) == ["1"] and not has_frozen(model)
    assert modes(model) == [True, True, False] and model[1][1].training
    restore_given_(model)
    assert modes(model) == [False, False, False]


def test_a_train_of_the_users_own_has_a_say() -> None:
    class Stays(nn.Sequential):
        def train(self, mode: bool = True) -> nn.Module:
            super().train(mode)
            self[1].eval()
            return self

    model = Stays(nn.Linear(2, 2).eval(), nn.Linear(2, 2).eval())
    assert train_given_(model, trained(model)) == ["0"]
    assert modes(model) == [True, False]
