"""Blocks leave a model whole: what is left is the network that would have been written without them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_compress import (
    CompressionError,
    RemovalPlan,
    Targets,
    load_compressed,
    measure,
    plan_removal,
    remove_channels_,
    save_compressed,
)
from tests.support.oracles import assert_same_state, snapshot
from tests.support.residual import NETWORKS, Decoder, Transformer, network


def gone(plan: RemovalPlan) -> dict[str, str]:
    return {row.layers[0]: row.block for row in plan.rows if row.block}


def whole_blocks(name: str, **options: Any) -> tuple[nn.Module, Tensor, RemovalPlan]:
    """A network, and a plan by which only blocks leave it."""
    model, x = network(name)
    return model, x, plan_removal(model, x, macs=0.5, blocks=True, min_layer_channels=1.0, **options)


def without(model: nn.Module, blocks: dict[str, str]) -> nn.Module:
    """A network in whose code these blocks don't stand."""
    twin = copy.deepcopy(model)
    for path, kind in blocks.items():
        module = twin.get_submodule(path)
        if kind == "zero":
            zero = isinstance(module, nn.Sequential)
            module.forward = lambda *args, zero=zero, **kwargs: (
                torch.zeros_like(args[0]) if zero else (torch.zeros_like([*args, *kwargs.values()][0]), None)
            )
        else:
            module.forward = (lambda x, *_, **__: (x,)) if isinstance(twin, Decoder) else (lambda x, *_, **__: x)
    return twin


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_left_computes_what_a_network_without_the_blocks_computes(name: str) -> None:
    model, x, plan = whole_blocks(name)
    expected = without(model, gone(plan))(x)
    assert gone(plan)
    remove_channels_(model, plan)
    assert torch.allclose(model(x), expected, atol=1e-6)
    for path in gone(plan):
        assert all(parameter.numel() == 0 for parameter in model.get_submodule(path).parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_plan_counts_what_is_left(name: str) -> None:
    model, x, plan = whole_blocks(name)
    remove_channels_(model, plan)
    found = measure(model, x)
    assert (plan.after.params, plan.after.macs) == (found.parameters, found.macs)
    assert plan.after.params < plan.before.params and plan.after.macs < plan.before.macs


def tiny(model: nn.Sequential, *blocks: int) -> nn.Sequential:
    """Blocks that add next to nothing to their inputs."""
    for number in blocks:
        model[1][number].norm2.weight.data.mul_(1e-4)
    return model


def test_the_blocks_that_change_the_outputs_least_leave_and_channels_make_up_the_rest() -> None:
    model, x = network("basic")
    plan = plan_removal(tiny(model, 1), x, macs=0.5, blocks=True)
    assert gone(plan) == {"1.1": "identity"}
    assert plan.after.macs / plan.before.macs == pytest.approx(0.5, abs=0.01)
    assert any(row.after < row.before for row in plan.rows if not row.block)
    assert not any(name.startswith("1.1.") for row in plan.rows if not row.block for name in row.layers[:1])


def test_channels_in_a_block_that_leaves_count_for_nothing() -> None:
    model, x = network("decoder")
    for number in (0, 2):
        for parameter in model.layers[number].mlp.parameters():
            parameter.data.mul_(1e-4)
    plan = plan_removal(model, x, macs=0.5, blocks=True)
    assert {"layers.0.mlp", "layers.2.mlp"} <= set(gone(plan))
    assert all(list(plan.kept[f"layers.{number}.mlp.2.weight"]) == [0] for number in (0, 2))
    assert not any("layers.0.mlp.0" in row.layers for row in plan.rows)


def test_without_blocks_nothing_leaves_whole() -> None:
    model, x = network("basic")
    assert not gone(plan_removal(tiny(model, 1), x, macs=0.5))


def test_a_block_that_matters_more_than_channels_stays() -> None:
    model, x = network("basic")
    for block in model[1]:
        block.norm2.weight.data.mul_(10.0)
    for layer in (model[1][0].conv1, model[1][1].conv1, model[1][2].conv1):
        layer.weight.data[4:] *= 1e-4
    for block in model[1]:
        block.norm1.weight.data[4:] *= 1e-4
    assert not gone(plan_removal(model, x, macs=0.8, blocks=True, round_to=1))


def test_the_plan_says_so() -> None:
    model, x = network("decoder")
    for number in (0, 2):
        model.layers[number].mlp[2].weight.data.mul_(1e-4)
        model.layers[number].mlp[2].bias.data.mul_(1e-4)
    text = str(plan_removal(model, x, macs=0.7, blocks=True, min_layer_channels=1.0))
    assert "leaves whole: `layers.{0,2}.mlp`: zeros take its place" in text.splitlines()


@pytest.mark.parametrize("name", ["basic", "post-norm", "decoder"])
def test_a_file_restores_the_blocks_that_left(name: str, tmp_path: Path) -> None:
    model, x, plan = whole_blocks(name)
    remove_channels_(model, plan)
    for number in range(2):
        save_compressed(model, str(tmp_path / "small.ckpt"))
        again = load_compressed(str(tmp_path / "small.ckpt"), network(name)[0])
        assert torch.equal(again(x), model(x))
        assert_same_state(snapshot(again), snapshot(model))
        if not number:  # and so do those that leave later
            remove_channels_(model, plan_removal(model, x, macs=0.6, blocks=True))


def test_a_plain_state_dict_doesnt_tell_how_a_block_left(tmp_path: Path) -> None:
    model, _, plan = whole_blocks("basic")
    remove_channels_(model, plan)
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    fresh = network("basic")[0]
    before = snapshot(fresh)
    with pytest.raises(CompressionError, match=r"must tell how 1\.\d\.conv1.weight lost channels"):
        load_compressed(str(tmp_path / "plain.pt"), fresh)
    assert_same_state(before, snapshot(fresh))


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "RMSprop", "Adafactor", "LBFGS"])
def test_training_goes_on(kind: str) -> None:
    options = {"SGD": {"lr": 0.01, "momentum": 0.9}}.get(kind, {"lr": 0.01})
    model, x, plan = whole_blocks("basic")
    optimizer = getattr(torch.optim, kind)(model.train().parameters(), **options)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(step)
    remove_channels_(model, plan, optimizer)
    left = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for _ in range(2):
        optimizer.step(step)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, left[name])}
    assert moved == {name for name, parameter in left.items() if parameter.numel()}
    for parameter, state in optimizer.state.items():
        if not parameter.numel():
            assert all(
                value.numel() <= 1 or not value.shape[0] for value in state.values() if isinstance(value, Tensor)
            )


class Branch(nn.Module):
    """Layers whose weights are computed, or that know their sizes."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers:
            y = layer(y)
            y = y[0] if isinstance(y, tuple) else y.relu()
        return x + y


def parametrized(wrap: Callable[..., nn.Module], **options: Any) -> Callable[[], nn.Module]:
    return lambda: Branch(*(wrap(nn.Linear(*widths), **options) for widths in ((16, 32), (32, 16))))


BRANCHES: dict[str, Callable[[], nn.Module]] = {
    "weight norm": parametrized(parametrizations.weight_norm),
    "weight norm of the whole": parametrized(parametrizations.weight_norm, dim=None),
    "spectral norm": parametrized(parametrizations.spectral_norm),
    "lstm": lambda: Branch(nn.LSTM(16, 8, bidirectional=True, batch_first=True)),
    "gru": lambda: Branch(nn.GRU(16, 16, batch_first=True), nn.Linear(16, 16)),
    "depthwise": lambda: Branch(nn.Conv1d(6, 6, 3, padding=1, groups=6), nn.GroupNorm(2, 6)),
}


@pytest.mark.parametrize("kind", BRANCHES)
def test_layers_of_every_kind_leave_with_a_block(kind: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(8, 16), *(BRANCHES[kind]() for _ in range(3)), nn.Linear(16, 2))

    model, x = build(), torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        plan = plan_removal(model, x, params=0.7, blocks=True, min_layer_channels=1.0)
        assert gone(plan)
        remove_channels_(model, plan, optimizer)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    save_compressed(model, str(tmp_path / "small.ckpt"))
    again = load_compressed(str(tmp_path / "small.ckpt"), build())
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_a_block_that_is_compiled_leaves() -> None:
    models = network("decoder")[0], network("decoder")[0]
    x = network("decoder")[1]
    for layer in models[1].layers:
        layer.mlp = torch.compile(layer.mlp, backend="eager")
    for model in models:
        remove_channels_(model, plan_removal(model, x, macs=0.6, blocks=True))
    with torch.no_grad():
        assert torch.equal(models[1](x), models[0](x))
    assert not models[1].get_submodule("layers.1.mlp._orig_mod.0").weight.numel()


def test_where_channels_cant_make_up_the_rest_the_nearest_number_of_blocks_leaves() -> None:
    model = nn.Sequential(*(Branch(nn.Linear(8, 8)) for _ in range(4)))
    for budget, left in ((0.6, 2), (0.7, 1), (0.8, 1)):
        plan = plan_removal(model, torch.randn(4, 8), macs=budget, blocks=True)
        assert len(gone(plan)) == left and "The budget is missed" in plan.missed


def test_targets_hold_for_blocks_too() -> None:
    model, x = network("basic")
    tiny(model, 0, 1, 2)
    options = {"macs": 0.5, "blocks": True, "min_layer_channels": 1.0}
    for targets, left in (
        (Targets(exclude=["1.0", "1.1.conv1"]), {"1.2"}),
        (Targets(include=["1.1"]), {"1.1"}),
    ):
        assert set(gone(plan_removal(model, x, targets=targets, **options))) == left
    model[1][0].conv1.weight.requires_grad_(False)
    plan = plan_removal(model, x, **options)
    assert "1.0" not in gone(plan) and plan.fixed["1.0"] == "frozen"


def test_where_there_are_no_blocks_channels_leave_and_that_is_said() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    plan = plan_removal(model, torch.ones(1, 8), macs=0.5, blocks=True)
    assert plan.after.macs == plan.before.macs / 2
    assert "no module gives back a tensor of the shape that it takes" in str(plan)


def test_where_there_is_neither_that_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(CompressionError, match="no module gives back a tensor of the shape that it takes"):
        plan_removal(model, torch.ones(1, 8), macs=0.5, blocks=True)
    with pytest.raises(CompressionError, match="`blocks` must be True or False"):
        plan_removal(model, torch.ones(1, 8), macs=0.5, blocks=1)


class Checked(nn.Module):
    """Code that needs its block: it reads a weight of it, of a shape that it knows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 16), nn.Linear(16, 2)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        if self.training:
            return self.head(x) + self.blocks[0][0].weight[0, 0]
        return self.head(x)


def test_a_block_that_some_run_needs_stays_with_the_reason() -> None:
    model = Checked()
    for block in model.blocks:
        block[2].weight.data.mul_(1e-4)
    plan = plan_removal(model, torch.randn(4, 8), macs=0.5, blocks=True, min_layer_channels=1.0)
    assert gone(plan) == {"blocks.1": "zero"} or not gone(plan)
    assert plan.fixed["blocks.0"].startswith("its code needs all of them, without some the model stops (IndexError")


def test_blocks_only() -> None:
    model = Transformer(True, depth=4).eval()
    plan = plan_removal(
        model, torch.randn(4, 6, 8), params=0.6, blocks=True, targets=Targets(include=["encoder.layers.*"]),
        overrides={"*": 1.0},
    )  # fmt: skip
    assert gone(plan) and all(row.after == row.before for row in plan.rows if not row.block)


@pytest.mark.parametrize(
    "name", ["basic", *(pytest.param(name, marks=pytest.mark.slow) for name in ("pre-norm", "decoder"))]
)
def test_layers_behind_channels_are_fitted_where_blocks_have_left_too(name: str) -> None:
    model, x = network(name)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(16, *x.shape[1:], generator=generator) for _ in range(4)]
    left = 0
    for budget in (0.35, 0.5):
        plan = plan_removal(model, macs=budget, blocks=True, calibration=batches, overrides={"*": 0.75})
        left += len(gone(plan))
        compensation = remove_channels_(model, plan, calibration=batches)
        assert compensation is not None and compensation.samples and left
    assert all(parameter.isfinite().all() for parameter in model.parameters())
