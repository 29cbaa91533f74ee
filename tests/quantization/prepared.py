"""What tests look at in prepared and int8 modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn


def fake_quantizers(module: nn.Module) -> dict[str, nn.Module]:
    from torch.ao.quantization import FakeQuantizeBase

    return {path: inner for path, inner in module.named_modules() if isinstance(inner, FakeQuantizeBase)}


def int8_layers(module: nn.Module) -> list[str]:
    """Paths of the layers that hold int8 weights."""
    found = []
    for path, inner in module.named_modules():
        weight = getattr(inner, "weight", None)
        if callable(weight) and getattr(weight(), "dtype", None) == torch.qint8:
            found.append(path)
    return found


class At(Callback):
    """Calls back at a hook, with (trainer, module)."""

    def __init__(self, **hooks: Callable[[L.Trainer, Any], Any]) -> None:
        for name, function in hooks.items():
            setattr(self, name, lambda trainer, module, *_, function=function, **__: function(trainer, module))
