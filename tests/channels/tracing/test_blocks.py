"""Which modules are residual blocks, in the forms that people write them in, and which only look so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.channels.planning.budget import Sizes
from lightning_compress.channels.tracing.blocks import NONE_FOUND, find_blocks
from lightning_compress.channels.tracing.find_groups import find_groups
from lightning_compress.channels.tracing.groups import DependencyGroups
from lightning_compress.channels.tracing.verify import Subject
from tests.channels.idioms import Net, linear
from tests.support.residual import NETWORKS, LayerScale, RMSNorm, network

X = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))


def traced(model: nn.Module, *inputs: Tensor) -> DependencyGroups:
    subject = Subject(model, [lambda twin: twin.eval()(*inputs)], samples=len(inputs[0]))
    return find_blocks(subject, find_groups(subject))


def blocks(model: nn.Module, *inputs: Tensor) -> dict[str, str]:
    return {group.name: group.skip[0] for group in traced(model, *inputs).all if group.skip}


EXPECTED: dict[str, dict[str, str]] = {
    "basic": {f"1.{n}": "identity" for n in range(3)},
    "convnext": {f"1.{n}": "identity" for n in range(3)},
    "inverted": {f"1.{n}": "identity" for n in range(3)},
    "post-norm": {
        key: kind
        for n in range(3)
        for key, kind in {f"encoder.layers.{n}": "identity", f"encoder.layers.{n}.self_attn": "zero"}.items()
    },
    "decoder": {
        key: kind
        for n in range(3)
        for key, kind in {f"layers.{n}": "identity", f"layers.{n}.attention": "zero", f"layers.{n}.mlp": "zero"}.items()
    },
}
EXPECTED["pre-norm"] = EXPECTED["post-norm"]


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_as_people_write_them(name: str) -> None:
    model, x = network(name)
    assert blocks(model, x) == EXPECTED[name]


def test_without_a_block_the_macs_and_parameters_are_those_of_a_network_without_it() -> None:
    model, x = network("basic")
    shorter = nn.Sequential(model[0], model[1][1:], *model[2:])
    groups, whole = traced(model, x), Sizes(traced(shorter, x))
    every = [torch.ones(group.size, dtype=torch.bool) for group in groups.all]
    first = next(number for number, group in enumerate(groups.all) if group.skip)
    without = [torch.zeros_like(mask) if number == first else mask for number, mask in enumerate(every)]
    rest = [torch.ones(group.size, dtype=torch.bool) for group in traced(shorter, x).all]
    assert groups.all[first].name == "1.0"
    for cost in ("macs", "params", "channels"):
        assert getattr(Sizes(groups), cost)(without) == getattr(whole, cost)(rest) < getattr(Sizes(groups), cost)(every)


class Around(nn.Module):
    """A module's output, and what is done with it."""

    def __init__(self, block: nn.Module, use: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.embed, self.block, self.head, self.use = linear(8, 16), block, linear(16, 3), use
        self.layers = nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.use(self, self.embed(x)))


def mlp() -> nn.Module:
    return nn.Sequential(linear(16, 32), nn.ReLU(), linear(32, 16))


LIKE: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "added to the input": (lambda: Around(mlp(), lambda s, x: x + s.block(x)), {"block": "zero"}),
    "in place": (lambda: Around(mlp(), lambda s, x: s.block(x).add_(x)), {"block": "zero"}),
    "behind a norm": (
        lambda: Around(mlp(), lambda s, x: x + s.block(s.layers["norm"](x)), norm=nn.LayerNorm(16)),
        {"block": "zero"},
    ),
    "behind a norm of the user's own": (
        lambda: Around(mlp(), lambda s, x: x + s.block(s.layers["norm"](x)), norm=RMSNorm(16)),
        {"block": "zero"},
    ),
    "a norm and a scale after it": (
        lambda: Around(
            mlp(),
            lambda s, x: x + 0.5 * s.layers["scale"](s.layers["norm"](s.block(x))),
            norm=nn.LayerNorm(16),
            scale=LayerScale(16),
        ),
        {"block": "zero"},
    ),
    "in windows": (
        lambda: Around(mlp(), lambda s, x: x + s.block(x.roll(1, 1).view(-1, 3, 16)).view(x.shape).roll(-1, 1)),
        {"block": "zero"},
    ),
    "called twice": (lambda: Around(mlp(), lambda s, x: (y := x + s.block(x)) + s.block(y)), {"block": "zero"}),
    "by name": (
        lambda: Around(Net(lambda s, x: x + s.a(x).relu(), a=linear(16, 16)), lambda s, x: s.block(x)),
        {"block": "identity"},
    ),
    "called once added and once not": (lambda: Around(mlp(), lambda s, x: s.block(x + s.block(x))), {}),
    "not added": (lambda: Around(mlp(), lambda s, x: s.block(x)), {}),
    "added to something else": (
        lambda: Around(mlp(), lambda s, x: s.layers["other"](x) + s.block(x), other=linear(16, 16)),
        {},
    ),
    "the end of a branch": (
        lambda: Around(linear(16, 16), lambda s, x: x + s.block(s.layers["first"](x).relu()), first=linear(16, 16)),
        {},
    ),
    "a gate": (lambda: Around(mlp(), lambda s, x: x * s.block(x).sigmoid()), {}),
    "another shape": (lambda: Around(linear(16, 8), lambda s, x: x + s.block(x).repeat(1, 1, 2)), {}),
    "nothing in it": (lambda: Around(nn.Dropout(), lambda s, x: x + s.block(x)), {}),
}


@pytest.mark.parametrize("case", LIKE)
def test_what_is_a_block_and_what_isnt(case: str) -> None:
    build, expected = LIKE[case]
    assert blocks(build(), X) == expected


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = linear(16, 32), linear(32, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.down(self.up(x).relu())
        return x + y, y.mean()


def test_a_block_that_gives_back_more_stays_with_the_reason() -> None:
    groups = traced(Around(Two(), lambda s, x: s.block(x)[0]), X)
    assert groups.fixed["block"] == "a residual block that gives back more than one tensor"
    assert not any(group.skip for group in groups.all)


def test_where_there_is_none_that_is_said() -> None:
    assert traced(Around(mlp(), lambda s, x: s.block(x)), X).fixed["Around"] == NONE_FOUND


def test_tensors_that_others_use_too_dont_leave_with_a_block() -> None:
    model = Around(mlp(), lambda s, x: s.layers["tied"](x) + x + s.block(x), tied=linear(16, 32))
    model.layers["tied"].weight = model.block[0].weight
    model.use = lambda s, x: x + s.block(x) + s.layers["tied"](x).view(*x.shape, 2).mean(-1)
    [block] = [group for group in traced(model, X).all if group.skip and group.name == "block"]
    assert {member.name for member in block.members} == {"block.0.bias", "block.2.weight", "block.2.bias"}
