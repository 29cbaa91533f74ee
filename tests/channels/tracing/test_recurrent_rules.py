"""Layers of torch's with a forward of their own around torch's, as those of forecasting libraries have."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import plan_removal, remove_channels_
from lightning_compress.channels.cutting.cut import zero_
from tests.support.oracles import assert_same_state


class Lengths(nn.LSTM):
    def forward(self, x: Tensor, hx: Any = None, lengths: Any = None, sort: bool = True) -> Any:
        if lengths is None:
            return super().forward(x, hx)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=sort)
        output, state = super().forward(packed, hx)
        return nn.utils.rnn.pad_packed_sequence(output, batch_first=True)[0], state


class Renamed(nn.LSTM):
    def forward(self, *, sequence: Tensor, state: Any = None) -> Any:
        return super().forward(sequence, state)


class Alone(nn.LSTM):
    def forward(self, x: Tensor) -> Any:
        return {"output": super().forward(x)[0]}


class Flipped(nn.LSTM):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x)[0].flip(-1), None


class Swapped(nn.LSTM):
    def forward(self, hx: Any, x: Tensor) -> Any:
        return super().forward(x, hx)


class Star(nn.LSTM):
    def forward(self, *args: Any) -> Any:
        return super().forward(*args)


class Scaled(nn.LSTM):
    """With weights of its own before torch's."""

    def __init__(self, *sizes: int, **options: bool) -> None:
        super().__init__(*sizes, **options)
        self.scale = nn.Parameter(torch.ones(sizes[0]))

    def forward(self, lengths: Tensor, x: Tensor) -> Any:
        packed = nn.utils.rnn.pack_padded_sequence(x * self.scale, lengths, batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(super().forward(packed)[0], batch_first=True)[0]


class Net(nn.Module):
    def __init__(self, kind: type[nn.LSTM], call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Linear(6, 16)
        self.rnn = kind(16, 12, batch_first=True)
        self.after = nn.Linear(12, 3)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.call(self.rnn, self.before(x).relu()))


X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


def plain(rnn: Any, x: Tensor) -> Tensor:
    return rnn(x)[0]


FOLLOWED: dict[str, tuple[type[nn.LSTM], Callable[[Any, Tensor], Tensor]]] = {
    "lengths": (Lengths, lambda rnn, x: rnn(x, lengths=None)[0]),
    "packed inside": (Lengths, lambda rnn, x: rnn(x, None, torch.tensor([5, 5]), sort=False)[0]),
    "other keywords": (Renamed, lambda rnn, x: rnn(sequence=x, state=None)[0]),
    "a dict": (Alone, lambda rnn, x: rnn(x)["output"]),
    "torch's, by keyword": (nn.LSTM, lambda rnn, x: rnn(input=x)[0]),
    "another first argument": (Swapped, lambda rnn, x: rnn(None, x)[0]),
    "any arguments": (Star, plain),
    "another order": (Flipped, lambda rnn, x: rnn(x)[0].flip(-1)),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_forward_that_calls_torchs_loses_the_same_channels(name: str) -> None:
    reference, model = Net(nn.LSTM, plain), Net(*FOLLOWED[name])
    remove_channels_(reference, plan_removal(reference, X, channels=0.5, round_to=1))
    remove_channels_(model, plan_removal(model, X, channels=0.5, round_to=1))
    assert model.rnn.hidden_size < 12 and model.before.out_features < 16
    assert_same_state(reference, model)
    torch.testing.assert_close(model(X), reference(X))


def test_weights_of_a_subclass_are_cut_with_torchs() -> None:
    model = Net(Scaled, lambda rnn, x: rnn(torch.tensor([5, 3]), x))
    plan = plan_removal(model, X, channels=0.5, round_to=1)
    zeroed = copy.deepcopy(model)
    zero_(zeroed, plan.kept)
    remove_channels_(model, plan)
    assert model.rnn.hidden_size < 12 and len(model.rnn.scale) == model.before.out_features < 16
    torch.testing.assert_close(model(X), zeroed(X))


class Cell(nn.GRUCell):
    def forward(self, step: int, x: Tensor, hx: Tensor | None = None) -> Tensor:
        return super().forward(x, hx)


def test_a_cell_with_another_signature_loses_the_channels_of_torchs() -> None:
    def steps(call: Callable[..., Tensor], x: Tensor) -> Tensor:
        state = None
        for step in range(x.shape[1]):
            state = call(step, x[:, step], state)
        assert state is not None
        return state

    def net(kind: type[nn.GRUCell]) -> nn.Module:
        made = Net(nn.LSTM, lambda rnn, x: steps(rnn if kind is Cell else lambda _, *args: rnn(*args), x))
        made.rnn = kind(16, 12)  # type: ignore[assignment]
        return made

    torch.manual_seed(0)
    reference, model = net(nn.GRUCell), net(Cell)
    model.load_state_dict(reference.state_dict())
    for network in (reference, model):
        remove_channels_(network, plan_removal(network, X, channels=0.5, round_to=1))
    assert model.rnn.hidden_size < 12
    assert_same_state(reference, model)
    torch.testing.assert_close(model(X), reference(X))


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


def test_attention_with_another_signature_loses_heads_and_can_be_pickled() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), SelfAttention(32, 4, batch_first=True), nn.Linear(32, 3))
    plan = plan_removal(model, X, macs=0.5)
    zeroed = copy.deepcopy(model)
    zero_(zeroed, plan.kept)
    remove_channels_(model, plan)
    assert model[1].num_heads < 4 and model[0].out_features < 32
    torch.testing.assert_close(model(X), zeroed(X))
    assert isinstance(model[1], SelfAttention)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(X), model(X))
    torch.testing.assert_close(copy.deepcopy(model)(X), model(X))
