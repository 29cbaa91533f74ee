"""What stands behind pruned units, whoever wrote it: they are silent behind it, or a warning names it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress import ScheduledPruning, Targets, Window, prune_
from tests.pruning.silent import IMAGES, Net, assert_silent, forward, gone_rows, rough
from tests.support.modules import quiet_trainer
from tests.support.wide import WIDE
from tests.support.zoo import Row


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g, self.b = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))


class OwnNorm(Affine):
    def forward(self, x: Tensor) -> Tensor:
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-6).sqrt()
        return self.g[:, None, None] * x + self.b[:, None, None]


class FunctionalLayerNorm(Affine):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.permute(0, 2, 3, 1), (8,), self.g, self.b).permute(0, 3, 1, 2)


class FunctionalBatchNorm(Affine):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, self.g, self.b, self.training)


class ResponseNorm(Affine):
    """Global response normalisation, which adds what it was given."""

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(dim=(2, 3), keepdim=True)
        return self.g.view(1, 8, 1, 1) * x * (size / size.mean(1, keepdim=True)) + self.b.view(1, 8, 1, 1) + x


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


class Between(Net):
    """`between` stands where `silent.Net` has a BatchNorm; it is a module or a function."""

    def __init__(self, between: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.bn = between  # type: ignore[assignment]
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.after(self.middle(x))
        return self.head(self.next(self.seen).mean((2, 3)))


SILENT: dict[str, Callable[[], nn.Module]] = {
    "group norm": lambda: Between(nn.GroupNorm(2, 8)),
    "layer norm over all": lambda: Between(nn.LayerNorm((8, 4, 4))),
    "instance norm": lambda: Between(nn.InstanceNorm2d(8, affine=True)),
    "functional layer norm": lambda: Between(FunctionalLayerNorm()),
    "functional batch norm": lambda: Between(FunctionalBatchNorm()),
    "norm of one's own": lambda: Between(OwnNorm()),
    "response norm of one's own": lambda: Between(ResponseNorm()),
    "functional activation before the norm": lambda: Between(nn.Sequential(nn.LeakyReLU(inplace=True), OwnNorm())),
    "swish by hand": lambda: Between(nn.BatchNorm2d(8), lambda x: x * torch.sigmoid(x)),
    "shuffled channels": lambda: Between(nn.Sequential(nn.ChannelShuffle(2), nn.GroupNorm(4, 8))),
    "resized": lambda: Between(nn.Sequential(nn.Upsample(scale_factor=2), nn.AvgPool2d(2), nn.BatchNorm2d(8))),
    "two in a row": lambda: Between(nn.Sequential(nn.BatchNorm2d(8), nn.Tanh(), nn.GroupNorm(4, 8))),
}

SAID: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "group norm without scale": (lambda: Between(nn.GroupNorm(2, 8, affine=False)), r"`bn` \(native_group_norm\)"),
    "hidden by the sign": (lambda: Between(nn.GroupNorm(2, 8, affine=False), F.relu), r"`bn` \(native_group_norm\)"),
    "centred": (lambda: Between(Centred()), r"`bn` \(sub\)"),
    "sigmoid": (lambda: Between(nn.Identity(), nn.Sigmoid()), r"`after` \(sigmoid\)"),
    "functional softplus": (lambda: Between(nn.BatchNorm2d(8), F.softplus), r"the module's own \(softplus\)"),
    "elu and one": (lambda: Between(nn.Identity(), lambda x: F.elu(x) + 1), r"the module's own \(add\)"),
    "softmax": (lambda: Between(nn.Identity(), nn.Softmax(1)), r"`after` \(softmax\)"),
    "gates": (lambda: Between(nn.Identity(), lambda x: F.glu(torch.cat([x, x.flip(1)], 1), 1)), r"\(sigmoid\)"),
}


def told(prune: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        prune()
    return [str(warning.message) for warning in seen if "may still put out a constant" in str(warning.message)]


def by_function(model: nn.Module) -> list[str]:
    return told(lambda: prune_(model, 0.5, "ln_structured", "layer", Targets(include=["conv"]), inputs=IMAGES))


def by_fit(model: nn.Module) -> list[str]:
    pruning = ScheduledPruning(
        "ln_structured", 0.5, "layer", targets=Targets(include=["conv"]), window=Window(0.2, 0.8)
    )
    return told(lambda: quiet_trainer(max_epochs=2, callbacks=[pruning]).fit(model))


def silent_channels(model: Any) -> Tensor:
    with torch.no_grad():
        model.eval()(IMAGES)
    return (model.seen == 0).movedim(1, 0).flatten(1).all(1)


@pytest.mark.parametrize("prune", [by_function, by_fit])
@pytest.mark.parametrize("name", SILENT)
def test_units_are_silent_behind(name: str, prune: Callable[[nn.Module], list[str]]) -> None:
    torch.manual_seed(0)
    model = rough(SILENT[name]())
    assert prune(model) == []
    silent = silent_channels(model)
    assert int(silent.sum()) == 4
    with torch.no_grad():
        for parameter in model.bn.parameters():
            assert parameter.numel() != 8 or parameter.any()  # the others go on


@pytest.mark.parametrize("prune", [by_function, by_fit])
@pytest.mark.parametrize("name", SAID)
def test_what_units_are_heard_behind_is_said_once(name: str, prune: Callable[[nn.Module], list[str]]) -> None:
    make, place = SAID[name]
    torch.manual_seed(0)
    [message] = prune(rough(make()))
    assert re.search(rf"those of `conv\.weight` behind .*{place}", message)


class Dense(nn.Module):
    """Norms over concatenations: each layer has a stretch of their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(9)
        self.second, self.last, self.out = nn.Conv2d(9, 4, 3, padding=1), nn.GroupNorm(1, 13), nn.Conv2d(13, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.first(x)], 1)
        x = torch.cat([x, self.second(self.norm(x).tanh())], 1)
        return self.out(self.last(x).tanh())


def test_norms_over_concatenations_lose_the_channels_of_pruned_units_alone() -> None:
    model = rough(Dense())
    masks = prune_(model, 0.5, "ln_structured", "layer", Targets(exclude=["out"]), inputs=IMAGES)
    gone = {name: ~mask.flatten(1).any(1) for name, mask in masks.items()}
    own = torch.zeros(3, dtype=torch.bool)
    for norm, expected in (
        (model.norm, torch.cat([own, gone["first.weight"]])),
        (model.last, torch.cat([own, gone["first.weight"], gone["second.weight"]])),
    ):
        assert torch.equal(norm.weight == 0, expected) and torch.equal(norm.bias == 0, expected)


class Stream(nn.Module):
    """Positions and a residual stream: what is added there is no shift of units."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.position = nn.Conv2d(3, 8, 3, 3), nn.Parameter(torch.randn(1, 4, 8))
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return x + self.down(F.gelu(self.up(self.norm(x))))


def test_positions_and_the_norm_of_a_residual_stream_stay() -> None:
    model = rough(Stream())
    prune_(model, 0.5, "ln_structured", "layer", inputs=IMAGES)
    assert model.position.all() and model.norm.weight.all() and model.norm.bias.all()
    assert all(int((layer.bias == 0).sum()) == len(layer.bias) // 2 for layer in (model.patch, model.up, model.down))


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module, read: Callable[[Any], Tensor], way: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rnn, self.norm, self.out = layer, nn.LayerNorm(12), nn.Linear(12, 2)
        self.read, self.way = read, way

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, 0].mT
        self.seen = self.way(self.norm(self.read(self.rnn(x[:, 0] if isinstance(self.rnn, nn.GRUCell) else x))))
        return self.out(self.seen)


RECURRENT: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Tensor], str]] = {
    "both ways": (
        lambda: nn.LSTM(3, 6, 2, batch_first=True, bidirectional=True),
        lambda y: y[0][:, -1],
        "_l1.*reverse",
    ),
    "last state": (lambda: nn.LSTM(3, 12, 2, batch_first=True), lambda y: y[1][0][-1], "_l1"),
    "cell": (lambda: nn.GRUCell(3, 12), lambda y: y, ""),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_units_are_silent_behind_a_norm_and_heard_behind_a_sigmoid(name: str) -> None:
    make, read, told_of = RECURRENT[name]
    model, targets = rough(Recurrent(make(), read, torch.tanh)), Targets(include=["rnn"])
    prune_(model, 0.5, "ln_structured", "layer", targets, inputs=IMAGES)
    model.eval()(IMAGES)
    assert int((model.seen == 0).all(0).sum()) == 6
    with pytest.warns(UserWarning, match=rf"`rnn\.weight_ih{told_of}.*` behind .* \(sigmoid\)"):
        loud = rough(Recurrent(make(), read, torch.sigmoid))
        prune_(loud, 0.5, "ln_structured", "layer", targets, inputs=IMAGES)


HEARD = {"mobilenet_v3": "hardsigmoid", "glu": "sigmoid", "two_outputs": "sigmoid"}


@pytest.mark.parametrize("row", WIDE, ids=str)
def test_of_thirty_architectures_only_those_with_gates_are_heard(row: Row) -> None:
    args, kwargs = row.inputs()
    model = row.build()
    messages = told(lambda: prune_(model, 0.5, "ln_structured", "layer", inputs=kwargs if kwargs else args))
    assert len(messages) == (row.name in HEARD)
    assert all(HEARD[row.name] in message for message in messages)


def test_values_and_random_state_of_the_model_stay() -> None:
    model = rough(Between(nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(8))))
    before, state = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    masks = prune_(model, 0.5, "ln_structured", "layer", Targets(include=["conv"]), inputs=IMAGES)
    assert torch.equal(state, torch.get_rng_state())
    stays = masks["conv.weight"].flatten(1).any(1)
    for name, tensor in model.state_dict().items():
        same = torch.equal(tensor, before[name]) if "running" in name or "next" in name or "head" in name else True
        assert same and (tensor.dim() == 0 or len(tensor) != 8 or torch.equal(tensor[stays], before[name][stays])), name


CONV, NEXT = (3, 8, 3), (8, 4, 3)

ROADS: dict[str, Callable[[], list[nn.Module]]] = {
    "a nested sequential": lambda: [nn.Sequential(nn.Conv2d(*CONV)), nn.BatchNorm2d(8)],
    "two norms in a row": lambda: [nn.Conv2d(*CONV), nn.BatchNorm2d(8), nn.BatchNorm2d(8)],
    "a norm without scale and shift": lambda: [nn.Conv2d(*CONV), nn.BatchNorm2d(8, affine=False)],
    "dropout and pooling between": lambda: [nn.Conv2d(*CONV), nn.Dropout2d(), nn.AvgPool2d(2, 1), nn.BatchNorm2d(8)],
}


@pytest.mark.parametrize("with_inputs", [False, True])
@pytest.mark.parametrize("road", ROADS)
def test_on_other_roads_to_a_norm_units_are_silent_or_a_warning_says_so(road: str, with_inputs: bool) -> None:
    model = rough(nn.Sequential(*ROADS[road](), nn.Tanh(), nn.Conv2d(*NEXT)))
    [conv] = [module for module in model.modules() if isinstance(module, nn.Conv2d) and module.in_channels == 3]
    inputs = IMAGES if with_inputs else None
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        prune_(model, 0.5, "ln_structured", "layer", Targets(include=["0"]), inputs=inputs)
    if not any("may still put out a constant" in str(warning.message) for warning in told):
        assert_silent(model, gone_rows(conv.weight), model[-1].weight, run=forward)


def test_a_flattened_map_before_the_norm() -> None:
    flat = [nn.Conv2d(3, 8, 3), nn.Flatten(), nn.BatchNorm1d(8 * 16), nn.Tanh(), nn.Linear(8 * 16, 4)]
    model = rough(nn.Sequential(*flat))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        prune_(model, 0.5, "ln_structured", "layer", Targets(include=["0"]), inputs=IMAGES)
    if not any("may still put out a constant" in str(warning.message) for warning in told):
        gone = gone_rows(model[0].weight).repeat_interleave(16)
        assert_silent(model, gone, model[4].weight, run=forward)


@pytest.mark.parametrize(("positions", "way"), [(5, "in sequence"), (5, "by a run"), (8, "by a run")])
def test_a_norm_over_positions_is_not_one_of_units(positions: int, way: str) -> None:
    # A linear layer's units lie last in (N, positions, units); BatchNorm1d normalises the middle.
    model = rough(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(positions), nn.Tanh(), nn.Linear(8, 4)))
    inputs = torch.randn(3, positions, 6) if way == "by a run" else None
    with pytest.warns(UserWarning, match=r"may still put out a constant: .*`1`"):
        prune_(model, 0.5, "ln_structured", "layer", Targets(include=["0"]), inputs=inputs)
    assert int(gone_rows(model[0].weight).sum()) == 4
    assert model[1].weight.all() and model[1].bias.all()
