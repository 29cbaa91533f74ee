"""What is held of a model's runs gives what a whole run gives, whatever has changed in between."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from lightning_compress.compensation import replay
from lightning_compress.compensation.hold_out import HoldOut
from lightning_compress.compensation.runner import Runner


class InPlace(nn.Module):
    """Changes what its layers put out in place, and calls one of them twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Conv1d(3, 4, 3, padding=1), nn.Conv1d(4, 4, 1), nn.Linear(4, 2)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu_(self.norm(self.first(x.unflatten(1, (3, -1)))))
        x = self.second(x)
        x += self.second(x.clone())
        return self.last(x.mean(2))


class Borrowing(nn.Module):
    """Multiplies with a layer's weight without a call of the layer, before it calls it."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(12, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.linear(self.first(x).tanh(), self.last.weight.mean().expand(6, 6))
        return self.last(self.second(x).tanh())


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.attention = nn.Linear(3, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.recurrent, self.last = nn.GRU(8, 5, batch_first=True), weight_norm(nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.unflatten(1, (-1, 3)))
        x = self.layer(x + self.attention(x, x, x)[0])
        return self.last(self.recurrent(x)[1][0])


class Drawing(nn.Module):
    """Draws in evaluation, and remembers what it saw."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(12, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.first(x))
        x = self.second(self.seen[-1] + torch.randn_like(self.seen[-1]))
        return self.last(x) * len(self.seen)


class Differentiating(nn.Module):
    """Puts out a derivative by its input, as networks of energies do."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(12, 6), nn.Linear(6, 1)

    @torch.enable_grad()
    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.last(self.first(x).tanh()).sum(), x)[0]


class Mapping(nn.Module):
    """Is written for one sample, and mapped over a batch."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(12, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda row: self.last(self.first(row).tanh()))(x)


MODELS: list[Callable[[], nn.Module]] = [InPlace, Borrowing, Attending, Drawing, Differentiating, Mapping]


def twice(make: Callable[[], nn.Module]) -> tuple[list[Tensor], Callable[[list[Tensor]], None]]:
    """The tensors of a model, and what checks the error of a replay against that of a whole run, once some changed."""
    torch.manual_seed(0)
    model, batches = make(), [torch.randn(5, 12), torch.randn(3, 12)]
    reference, fitted = Runner(make()), Runner(model)
    held, whole = (HoldOut(reference, fitted, batches) for _ in range(2))
    state = torch.get_rng_state()

    def check(changed: list[Tensor]) -> None:
        for tensor in changed:
            tensor.data.mul_(0.5).add_(0.1)
        torch.set_rng_state(state)
        found = held.error(changed)
        torch.set_rng_state(state)
        assert found == whole.error() > 0

    return [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())], check


@pytest.mark.parametrize("make", MODELS)
def test_what_follows_a_changed_tensor_is_computed_anew(make: Callable[[], nn.Module]):
    tensors, check = twice(make)
    for tensor in tensors:
        check([])
        check([tensor])


@pytest.mark.parametrize("make", MODELS)
@settings(max_examples=20)
@given(data=st.data())
def test_errors_are_those_of_whole_runs(make: Callable[[], nn.Module], data: st.DataObject):
    tensors, check = twice(make)
    for places in data.draw(st.lists(st.sets(st.integers(0, len(tensors) - 1), max_size=2), min_size=2, max_size=5)):
        check([tensors[place] for place in sorted(places)])


def test_what_comes_before_a_change_is_computed_once(monkeypatch: pytest.MonkeyPatch):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    held = HoldOut(Runner(model), Runner(model), [torch.randn(6, 4)])
    calls: list[int] = []
    linear = functional.linear

    def count(*args: Tensor) -> Tensor:
        calls.append(1)
        return linear(*args)

    monkeypatch.setattr(functional, "linear", count)

    def number(changed: list[Tensor] | None) -> int:
        calls.clear()
        held.error(changed)
        return len(calls)

    weights = [layer.weight for layer in model]
    assert [number(None), number([weights[2]]), number([weights[2]]), number([weights[3]])] == [5, 5, 3, 3]
    assert [number([weights[4]]), number([]), number([]), number([weights[0]]), number([])] == [2, 1, 0, 5, 5]
    assert [number([]), number(None), number([])] == [0, 5, 5]
    monkeypatch.setattr(replay, "MOST_BYTES", 2 * 6 * 4 * 4)
    assert [number([]), number([]), number([])] == [0, 3, 3]
