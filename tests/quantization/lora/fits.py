"""Fits with adapters, and what the tests look at."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    Callback,
)
from torch import Tensor, nn

from lightning_compress.modules.paths import modules_of
from lightning_compress.modules.routing import form_of
from tests.support import fits
from tests.support.modules import Classifier


class Adapted:
    """What an adapted layer computes with: a packed `weight`, its own tensors, `scaling` and `dropout`."""

    def __init__(self, layer: Any) -> None:
        form: Any = form_of(layer)
        self.weight, self.scaling, self.dropout = form.weights["weight"], form.scaling, form.dropout
        self.bias, self.lora_A, self.lora_B = layer.bias, layer.lora_A, layer.lora_B


def adapted_layers(module: nn.Module) -> dict[str, Adapted]:
    """What each adapted layer computes with, by its path."""
    return {path: Adapted(inner) for path, inner in modules_of(module).items() if "lora_A" in inner._parameters}


def adapters(module: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}.{name}": value
        for path, layer in adapted_layers(module).items()
        for name, value in (("A", layer.lora_A), ("B", layer.lora_B))
    }


class At(Callback):
    """Calls back at a hook, with (trainer, module)."""

    def __init__(self, **hooks: Callable[[L.Trainer, Any], Any]) -> None:
        for name, function in hooks.items():
            setattr(self, name, lambda trainer, module, *_, function=function, **__: function(trainer, module))


SHORT = {"limit_val_batches": 1, "num_sanity_val_steps": 0}


fit = partial(fits.fit, **SHORT)


class Net(Classifier):
    """Runs any network on the vectors of `TinyData`."""

    def __init__(self, net: nn.Module, lr: float = 0.05) -> None:
        L.LightningModule.__init__(self)
        self.net = net
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip((16, *widths[:-1]), widths, strict=True):
        layers += [nn.Linear(before, after), nn.GELU()]
    return nn.Sequential(*layers[:-1])


# Optimizers of every kind.


class Held(Callback):
    """Notes which parameters the optimizers hold while they train, and what state they have at the end."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        self.groups = [
            [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
            for optimizer in trainer.optimizers
        ]

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        self.states = {names[id(p)] for optimizer in trainer.optimizers for p in optimizer.state}

    @property
    def names(self) -> set[str]:
        return {name for groups in self.groups for group in groups for name in group}


BOTH = {"body.lora_A", "body.lora_B"}


# Modules that make or load their weights late.


class LoadsInSetup(Classifier):
    def setup(self, stage: str) -> None:
        self.stages = [*getattr(self, "stages", []), stage]
        if stage == "fit" and len(self.stages) == 1:
            with torch.random.fork_rng():
                torch.manual_seed(77)
                self.load_state_dict(Classifier().state_dict())
