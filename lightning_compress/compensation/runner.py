"""How does a batch run through copies of a model, and which of its layers can be visited on the way?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_compress.compensation.parts import linear_parts_
from lightning_compress.modules.calls import run_step
from lightning_compress.modules.copying import copy_module
from lightning_compress.modules.paths import modules_of

Run = Callable[[nn.Module, Any], Any]
Copy = Callable[[nn.Module, Mapping[int, Any]], nn.Module]


@dataclass(frozen=True)
class Runner:
    """A model, and how a batch runs through a copy of it.

    Attributes:
        model: whose parameters and statistics its copies share.
        run: runs a batch through a copy.
        copy: makes a copy that has some tensors of the model, by their `id`.
    """

    model: nn.Module
    run: Run = run_step
    copy: Copy = copy_module

    def twin(self) -> nn.Module:
        """Return a copy in evaluation mode, with the model's own parameters and statistics of norms."""
        norms = [module for module in self.model.modules() if isinstance(module, _NormBase)]
        statistics = [buffer for norm in norms for buffer in norm.buffers()]
        twin = self.copy(self.model, {id(tensor): tensor for tensor in (*self.model.parameters(), *statistics)})
        return twin.eval()


def layers_of_(model: nn.Module) -> dict[str, nn.Module]:
    """Let layers compute in parts; return what can be visited: all that is a matrix, and norms that keep statistics."""
    norms = {path: layer for path, layer in modules_of(model).items() if isinstance(layer, _NormBase)}
    return {**linear_parts_(model), **{path: norm for path, norm in norms.items() if norm.running_var is not None}}
