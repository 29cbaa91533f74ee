"""Runs a twin of a module through the steps of a test, so that one test has the metrics of both."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from lightning_compress.modules.copying import copy_batch
from lightning_compress.modules.isolation import isolated_random_state

FLOAT = "float/"
"""Comes before the names of the metrics of a float twin."""


class Twin:
    """Runs each batch of a stage through a silent copy of a module too, which logs by ``log`` under other names.

    Args:
        module: the copy; see `make_probe`.
        stage: ``test`` or ``validation``.
        prefix: comes before the names of its metrics.
        log: of the module itself.
    """

    def __init__(self, module: Any, stage: str, prefix: str, log: Callable[..., None]) -> None:
        self.module = module
        self._stage = stage
        self._prefix = prefix
        self._log = log
        module.__dict__["log"] = self._forward
        module.__dict__["log_dict"] = self._forward_all

    def _forward(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(value, torch.nn.Module):
            # A metric object: Lightning computes and resets it, once it has a name to tell it from the module's own.
            kwargs.setdefault("metric_attribute", f"{self._prefix}{name}")
        self._log(f"{self._prefix}{name}", value, *args, **kwargs)

    def _forward_all(self, values: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        for name, value in values.items():
            self._forward(name, value, *args, **kwargs)

    def call(self, hook: str, *args: Any) -> Any:
        """Call a hook of the stage (``start``) with as many of ``args`` as it takes; random states stay."""
        return self._call(f"on_{self._stage}_{hook}", *args)

    def _call(self, name: str, *args: Any) -> Any:
        method = getattr(self.module, name)
        parameters = inspect.signature(method).parameters.values()
        if not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
            args = args[: len(parameters)]
        with isolated_random_state():
            return method(*args)

    def step(self, trainer: Any, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Run a copy of a batch, with the hooks around it; a step sees a loader's index where there are several."""
        loop = trainer.test_loop if trainer.testing else trainer.validate_loop
        several = getattr(loop, "_is_sequential", True) and loop.num_dataloaders > 1
        indices = (batch_idx, *[dataloader_idx] * several)
        batch = copy_batch(batch)
        self.call("batch_start", batch, *indices)
        outputs = self._call(f"{self._stage}_step", batch, *indices)
        self.call("batch_end", outputs, batch, *indices)
