"""Runs that leave no trace: every way in which a forward can change its module or draw random numbers."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_compress.modules.isolation import (
    evaluation_mode,
    isolated_evaluation,
    isolated_inference,
    isolated_random_state,
    isolated_state,
    restore_modes_,
    restored_on_error,
    training_modes,
)
from lightning_compress.modules.routing import Form, form_of, route_
from tests.support.oracles import assert_same_state, same_random_state


class Restless(nn.Module):
    """A forward that changes everything that it can reach, and draws from every generator."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout, self.norm = nn.Linear(3, 3), nn.Dropout(), nn.BatchNorm1d(3)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("grown", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("unset", None)
        self.calls, self.state, self.gone = 0, torch.zeros(2), "here"
        self.by_name: dict[str, Any] = {"last": [0]}
        self.outputs: list[Any] = [self.state]
        self.recent = deque([1, 2], maxlen=2)

    def forward(self, x: Tensor) -> Tensor:
        assert self.outputs[0] is self.state  # copies know each other as the originals do
        self.steps += 1
        self.grown.resize_(4).fill_(1)
        self.replaced = self.replaced + 1
        self.register_buffer("late", torch.ones(1))
        self.unset = torch.ones(1)
        self.dropout.training, self.norm.training = True, not self.norm.training
        self.calls += 1
        self.cache = self.linear(x)
        self.add_module("child", nn.Linear(1, 1))
        vars(self).pop("gone", None)
        return self.cache + torch.rand(()) + random.random() + np.random.rand()


class Hoarder(Restless):
    """It also changes containers and tensors in place."""

    def forward(self, x: Tensor) -> Tensor:
        self.state += 1
        self.outputs.append(1)
        self.by_name["last"].append(1)
        self.by_name["new"] = 1
        self.recent.append(3)
        return super().forward(x)


def seen(model: nn.Module) -> Any:
    """All that can be asked of a model, with the identity of what it holds."""
    holds = {
        (name, key): (id(value), repr(value))
        for name, module in model.named_modules()
        for key, value in (*vars(module).items(), *module._buffers.items(), *module._modules.items())
    }
    return holds, {name: module.training for name, module in model.named_modules()}, list(model.state_dict())


KEEPERS: dict[str, tuple[type[Restless], Callable[[nn.Module], AbstractContextManager[Any]]]] = {
    "inference": (Restless, isolated_inference),
    "evaluation": (Hoarder, isolated_evaluation),
    "state": (Hoarder, lambda model: isolated_state(model.modules())),
}


@pytest.mark.parametrize("keeper", KEEPERS)
@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
def test_nothing_of_the_model_is_changed(keeper: str, fails: bool) -> None:
    kind, isolated = KEEPERS[keeper]
    model = kind()
    model.norm.eval()
    before, values = seen(model), {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        try:
            with torch.random.fork_rng(), isolated(model):
                model(torch.ones(2, 3))
                assert model.calls == 1 and seen(model) != before
                if fails:
                    raise KeyError
        except KeyError:
            assert fails
        assert seen(model) == before
        assert_same_state(model.state_dict(), values)


@pytest.mark.parametrize(
    "isolated", [isolated_inference, isolated_evaluation, lambda _: isolated_random_state()], ids=lambda f: f.__name__
)
def test_no_generator_is_moved(isolated: Callable[[nn.Module], AbstractContextManager[None]]) -> None:
    model = Restless()
    with same_random_state(), isolated(model):
        drawn = model(torch.ones(2, 3)).clone()
    with isolated(model):
        assert torch.equal(model(torch.ones(2, 3)), drawn)
    model(torch.ones(2, 3))
    assert not torch.equal(model(torch.ones(2, 3)), drawn)


def test_a_seed_makes_every_generator_draw_the_same() -> None:
    def draws() -> tuple[float, float, float]:
        return torch.rand(()).item(), random.random(), np.random.rand()

    with same_random_state(), isolated_random_state(seed=2**40 + 1):
        first = draws()
    with isolated_random_state(seed=2**40 + 1):
        assert draws() == first
    assert draws() != first != draws()
    with isolated_random_state(seed=1):
        expected = torch.rand(3)
    assert torch.rand(3, generator=torch.Generator().manual_seed(1)).equal(expected)


@pytest.mark.parametrize(("cuda", "started", "seeded"), [(True, False, []), (True, True, [1]), (False, False, [1])])
def test_cuda_that_has_not_started_remembers_no_seed(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, started: bool, seeded: list[int]
) -> None:
    later: list[int] = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: started)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(started))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    monkeypatch.setattr(torch, "manual_seed", later.append)
    with isolated_random_state(seed=1):
        drawn = torch.rand(3)
    assert later == seeded and drawn.equal(torch.rand(3, generator=torch.Generator().manual_seed(1)))


def test_generators_of_loaders_go_on_as_if_nobody_had_read_them() -> None:
    data = torch.utils.data.TensorDataset(torch.arange(9.0))
    by_loader, by_sampler = torch.Generator(), torch.Generator()
    sampler = torch.utils.data.RandomSampler(data, generator=by_sampler)
    loaders = {
        "a": torch.utils.data.DataLoader(data, shuffle=True, generator=by_loader),
        "b": [torch.utils.data.DataLoader(data, sampler=sampler)],
    }
    before = by_loader.get_state(), by_sampler.get_state()
    with isolated_random_state(loaders=loaders):
        assert len(list(loaders["a"])) == len(list(loaders["b"][0])) == 9
        assert not torch.equal(before[0], by_loader.get_state()) and not torch.equal(before[1], by_sampler.get_state())
    assert torch.equal(before[0], by_loader.get_state()) and torch.equal(before[1], by_sampler.get_state())


class Holder(torch.utils.data.Dataset[Tensor]):
    """A dataset, a transform or a sampler of batches that draws by a generator of its own."""

    def __init__(self, draw: Callable[[], float], generator: Any, inner: Any = None) -> None:
        self.draw, self.of_its_own, self.transform = draw, generator, inner

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[int(6 * self.draw())]] * 3)

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(self.draw())


@pytest.mark.parametrize("place", ["batch sampler", "dataset", "subset", "transform"])
@pytest.mark.parametrize("kind", [random.Random, np.random.default_rng, np.random.RandomState])
def test_generators_of_any_kind_that_loaders_hold_go_on_so_too(kind: Any, place: str) -> None:
    generator = kind(3)
    holder: Any = Holder(generator.random, generator)
    plain = Holder(lambda: 0.5, None, holder)
    if place == "batch sampler":
        loader = torch.utils.data.DataLoader(plain, batch_sampler=holder)
    else:
        chosen: Any = {"dataset": holder, "subset": torch.utils.data.Subset(holder, [0, 1, 2]), "transform": plain}
        loader = torch.utils.data.DataLoader(chosen[place])
    with isolated_random_state(loaders=loader):
        list(loader)
        holder.draw()
    assert generator.random() == kind(3).random()


def test_what_is_put_back_can_be_trained_on_even_inside_inference_mode() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), Restless())
    with torch.inference_mode(), isolated_inference(model):
        model(torch.ones(2, 3))
    with torch.inference_mode():
        made = nn.BatchNorm1d(3)  # its buffers are inference tensors
        with isolated_evaluation(made):
            assert not made(torch.zeros(2, 3)).any()
    model(torch.ones(2, 3)).sum().backward()


def test_evaluation_alone_moves_observers_and_calls_every_layer() -> None:
    class Observer(Form):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("most", torch.zeros(()))

        def forward(self, module: nn.Module, x: Tensor) -> Tensor:
            self.most.copy_(x.max())
            return x

    model = nn.Sequential(nn.Linear(2, 2))
    route_(model[0], Observer())
    observer: Any = form_of(model[0])
    with isolated_inference(model):
        assert torch.is_inference_mode_enabled() and torch.backends.mha.get_fastpath_enabled()
        model(torch.full((1, 2), 7.0))
        assert observer.most == 7
    assert observer.most == 0
    with torch.inference_mode(), isolated_evaluation(model):
        assert not torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
        assert not torch.backends.mha.get_fastpath_enabled()
        model(torch.full((1, 2), 7.0))
    assert observer.most == 7 and torch.backends.mha.get_fastpath_enabled()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_lazy_and_scripted_modules_are_run() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(), torch.jit.script(nn.Dropout()))
    for isolated in (isolated_evaluation, isolated_inference):
        with isolated(model):
            assert not model[2].training
            model(torch.ones(2, 5))
        assert model[2].training and type(model[0]) is nn.Linear
    model(torch.ones(2, 5))


def test_modes_of_what_leaves_the_tree_are_put_back() -> None:
    model = nn.Sequential(nn.Sequential(nn.Dropout(), nn.Linear(2, 2).eval()))
    inner, (dropout, linear) = model[0], model[0]
    modes = training_modes(model)
    with evaluation_mode(model):
        inner[0] = nn.Identity()
        assert not dropout.training
    inner[0] = dropout
    assert dropout.training and not linear.training and training_modes(model) == modes
    dropout.eval()
    restore_modes_(modes)
    assert dropout.training


def test_only_an_error_puts_buffers_back() -> None:
    model = nn.BatchNorm1d(3)
    mean = model.running_mean
    with pytest.raises(KeyError), restored_on_error(model):
        model(torch.ones(2, 3))
        model.running_mean = torch.ones(3)
        raise KeyError
    assert model.running_mean is mean and not mean.any() and not model.num_batches_tracked
    with restored_on_error(model):
        model(torch.ones(2, 3))
    assert model.num_batches_tracked == 1
