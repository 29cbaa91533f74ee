"""Recurrent layers with a forward of their own, as those of forecasting libraries have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import plan_removal, remove_channels_
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
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_forward_that_calls_torchs_loses_the_same_channels(name: str) -> None:
    reference, model = Net(nn.LSTM, plain), Net(*FOLLOWED[name])
    remove_channels_(reference, plan_removal(reference, X, channels=0.5, round_to=1))
    remove_channels_(model, plan_removal(model, X, channels=0.5, round_to=1))
    assert model.rnn.hidden_size < 12 and model.before.out_features < 16
    assert_same_state(reference, model)
    torch.testing.assert_close(model(X), reference(X))


@pytest.mark.parametrize(
    ("kind", "call"),
    [(Flipped, plain), (Swapped, lambda rnn, x: rnn(None, x)[0]), (Star, plain)],
    ids=["another order", "another first argument", "any arguments"],
)
def test_what_cant_be_followed_stays_whole(kind: type[nn.LSTM], call: Callable[[Any, Tensor], Tensor]) -> None:
    class Longer(Net):
        def __init__(self) -> None:
            super().__init__(kind, call)
            self.first = nn.Linear(6, 20)
            self.second = nn.Linear(20, 6)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.second(self.first(x).relu()))

    model = Longer()
    plan = plan_removal(model, X, channels=0.5, round_to=1)
    assert "rnn" in plan.fixed and not any(name.startswith("rnn.") and 0 in dims for name, dims in plan.kept.items())
    remove_channels_(model, plan)
    assert model(X).shape == (2, 5, 3) and model.rnn.hidden_size == 12 and model.first.out_features < 20
