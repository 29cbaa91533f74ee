"""Units are outputs, whatever the layer's layout: what reads a pruned unit reads zeros."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_compress import ChannelPruning, ScheduledPruning, Steps, Targets, Window, prune_
from tests.pruning.silent import rough
from tests.support.modules import quiet_trainer


class Experts(nn.Module):
    """A stack (experts, out, in), all of whose outputs are laid side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.up_bias = nn.Parameter(torch.randn(3, 8, 6)), nn.Parameter(torch.randn(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.einsum("nd,eod->neo", x, self.up) + self.up_bias).flatten(1)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W, self.b = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.W, self.b)


class Last(nn.Module):
    """The outputs of a recurrent layer alone."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


IMAGES, ROWS, STEPS = torch.randn(4, 6, 5, 5), torch.randn(4, 6), torch.randn(4, 7, 6)
IDS = torch.randint(9, (4, 5))
LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor, int]] = {
    "convolution": (lambda: nn.Conv2d(6, 10, 3), IMAGES, 1),
    "transposed convolution": (lambda: nn.ConvTranspose2d(6, 10, 3), IMAGES, 1),
    "grouped": (lambda: nn.Conv2d(6, 10, 3, groups=2), IMAGES, 1),
    "grouped transposed": (lambda: nn.ConvTranspose2d(6, 10, 3, stride=2, groups=2), IMAGES, 1),
    "depthwise transposed": (lambda: nn.ConvTranspose2d(6, 12, 3, groups=6, bias=False), IMAGES, 1),
    "transposed in one dimension": (lambda: nn.ConvTranspose1d(6, 10, 3), IMAGES[..., 0], 1),
    "linear": (lambda: nn.Linear(6, 10), ROWS, 1),
    "embedding": (lambda: nn.Embedding(9, 10), IDS, 2),
    "lstm": (lambda: Last(nn.LSTM(6, 10, batch_first=True)), STEPS, 2),
    "gru of two layers, both ways": (lambda: Last(nn.GRU(6, 10, 2, batch_first=True, bidirectional=True)), STEPS, 2),
    "rnn without bias": (lambda: Last(nn.RNN(6, 10, batch_first=True, bias=False)), STEPS, 2),
    "stack of experts": (Experts, ROWS, 1),
    "of the user's own": (Own, ROWS, 1),
}


@pytest.mark.parametrize("method", ["ln_structured", "random_structured", "tests.pruning.rules.LastRows"])
@pytest.mark.parametrize("name", LAYERS)
def test_half_of_the_outputs_are_zero(name: str, method: str) -> None:
    make, inputs, dim = LAYERS[name]
    torch.manual_seed(0)
    model = nn.Sequential(rough(make()))
    types = [*(type(layer) for layer in model.modules() if next(layer.parameters(recurse=False), None) is not None)]
    masks = prune_(model, 0.5, method, "layer", Targets(types=types), inputs=(inputs,))
    with torch.no_grad():
        silent = (model(inputs) == 0).movedim(dim, 0).flatten(1).all(1)
    assert int(silent.sum()) == len(silent) // 2
    zeros, total = sum(int((~mask).sum()) for mask in masks.values()), sum(mask.numel() for mask in masks.values())
    assert zeros == total / 2


def test_in_one_budget_over_a_u_net_all_pruned_filters_are_silent() -> None:
    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.mid = nn.Conv2d(6, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
            self.up, self.norm, self.out = nn.ConvTranspose2d(8, 4, 2, 2), nn.GroupNorm(2, 4), nn.Conv2d(10, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(self.mid(self.down(x).relu()).relu())
            return self.out(torch.cat([x, self.norm(y)], dim=1))

    model, seen = rough(UNet()), dict[str, Tensor]()
    image = torch.randn(2, 6, 8, 8)
    prune_(model, 0.5, "ln_structured", "global", Targets(exclude=["out"]), inputs=image, overrides={"up": 0.5})
    for name in ("down", "mid", "norm"):
        model.get_submodule(name).register_forward_hook(lambda _, __, y, name=name: seen.update({name: y}))
    with torch.no_grad():
        model(image)
    silent = {name: int((y == 0).movedim(1, 0).flatten(1).all(1).sum()) for name, y in seen.items()}
    gone = {name: int((model.get_submodule(name).weight == 0).flatten(1).all(1).sum()) for name in ("down", "mid")}
    assert silent == {**gone, "norm": 2} and silent["down"] + silent["mid"] > 4


def test_dim_1_are_inputs_whatever_the_layout() -> None:
    model = nn.Sequential(nn.Conv2d(6, 8, 3), nn.ConvTranspose2d(8, 4, 3))
    first, second = prune_(model, 0.5, "ln_structured", "layer", dim=1).values()
    assert int((~first).movedim(1, 0).flatten(1).all(1).sum()) == 3
    assert int((~second).flatten(1).all(1).sum()) == 4
    assert all(layer.bias.all() for layer in model)


class Turned(nn.Module):
    """A linear layer whose weight is (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def test_a_layer_of_ones_own_may_be_the_other_way_round() -> None:
    model, targets = nn.Sequential(Turned(), nn.LayerNorm(8)), Targets(types=[Turned])
    rough(model)
    prune_(model, 0.5, "ln_structured", targets=targets, inputs=ROWS, dim=1)
    assert int((model(ROWS) == 0).all(0).sum()) == 4
    with pytest.warns(UserWarning, match=r"those of `0\.weight` behind its layer, whose outputs aren't along `dim`"):
        prune_(nn.Sequential(Turned(), nn.LayerNorm(8)), 0.5, "ln_structured", targets=targets, inputs=ROWS)


class Net(L.LightningModule):
    def __init__(self, way: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.way = way
        self.up, self.norm, self.out = nn.ConvTranspose2d(6, 8, 2, 2), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.way(self.norm(self.up(x))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(list(IMAGES), batch_size=2)


def test_a_fit_and_channels_that_leave_keep_units_whole() -> None:
    module = rough(Net())
    pruning = ScheduledPruning("ln_structured", 0.5, "layer", targets=Targets(include=["up"]), window=Window(0.1, 0.5))
    channels = ChannelPruning(channels=0.75, window=Window(0.7, 0.8))
    quiet_trainer(max_epochs=10, callbacks=[pruning, channels]).fit(module)
    with torch.no_grad():
        seen = module.norm(module.up(IMAGES))
    silent = (seen == 0).movedim(1, 0).flatten(1).all(1)
    assert seen.shape[1] == 6 and int(silent.sum()) == 3
    assert torch.equal((module.up.weight == 0).movedim(1, 0).flatten(1).all(1), silent)


def test_what_units_are_heard_behind_is_said_once_however_often_channels_leave() -> None:
    pruning = ScheduledPruning("ln_structured", 0.5, "layer", targets=Targets(include=["up"]), window=Window(0.1, 0.5))
    channels = ChannelPruning(channels=0.5, schedule=Steps([0.0, 0.5, 1.0], [0.3, 0.6, 1.0]), window=Window(0.6, 0.9))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quiet_trainer(max_epochs=10, callbacks=[pruning, channels]).fit(rough(Net(torch.sigmoid)))
    assert sum("may still put out a constant" in str(message.message) for message in seen) == 1
