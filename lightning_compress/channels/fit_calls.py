"""Says how a LightningModule is called in a fit, by itself and by other callbacks, and cuts all of these."""

from __future__ import annotations

import copy
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from lightning_compress.callback import CompressionCallback, compression_callbacks, rebuild_ddp
from lightning_compress.channels.planning.plan import RemovalPlan
from lightning_compress.channels.remove_channels import cut_together_
from lightning_compress.channels.tracing.deterministic import deterministic
from lightning_compress.channels.tracing.groups import Run
from lightning_compress.channels.tracing.verify import Subject
from lightning_compress.errors import CompressionError, in_a_line
from lightning_compress.modules.calls import samples_in
from lightning_compress.modules.copying import copy_tensors
from lightning_compress.modules.outputs import outputs_of_calls
from lightning_compress.probe import shape_feed
from lightning_compress.silent_copy import make_probe
from lightning_compress.structure.listener import averaged_copies

ADAPTERS = "_adapters"
"""Under this name, with a number, a copy of the module holds the layers that another callback trains on its outputs."""


def adapters_of(trainer: Any, pl_module: Any) -> dict[str, CompressionCallback]:
    """Return callbacks that train layers on the module's outputs, by the name of these layers in its copies."""
    callbacks = enumerate(compression_callbacks(trainer))
    return {f"{ADAPTERS}{number}": callback for number, callback in callbacks if callback.serves(pl_module)}


class FitCalls:
    """Holds a batch, and the ways to run a copy of the module on it.

    Attributes:
        module: a copy of the module that holds the layers of other callbacks too.
        runs: its forward, its training step, and what other callbacks make of it; those that work.
        own: its training step, or where that doesn't work its forward.
    """

    def __init__(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._probe = partial(make_probe, trainer)
        self.module = self._probe(pl_module)
        self._batch, self._batch_idx = batch, batch_idx
        self._modes = {name: module.training for name, module in pl_module.named_modules()}
        self._feed = shape_feed(trainer, self.module, "validation", train=False)
        self.runs = list[Run]()
        if pl_module.automatic_optimization:
            try:
                with deterministic():
                    self._step(self._probe(self.module))
                self.runs.append(self._step)
            except Exception as error:  # it is the user's, and evaluation may do
                self._feed.failures["training_step"] = in_a_line(error)
        with suppress(CompressionError) if self.runs else nullcontext(), deterministic():
            self._feed.choose(self._probe(self.module), iter([batch]))
            del self._feed.ways[1:]  # a cut that one fails with isn't to be tried with another
            self.runs.insert(0, self._evaluate)
        self.own = self.runs[-1]
        for name, callback in adapters_of(trainer, pl_module).items():
            self.module.add_module(name, copy.deepcopy(callback.trained_layers))
            compare: Any = partial(self._compare, callback, name, self.runs[-1])
            compare.reason = "a distillation loss holds it against the teacher"
            self.runs.append(compare)

    @property
    def subject(self) -> Subject:
        return Subject(self.module, self.runs, self._probe, samples_in(self._batch))

    def _evaluate(self, twin: Any) -> Any:
        twin.eval()
        # What a step returns tells nothing of the layers that have come before it.
        return outputs_of_calls(twin, lambda: self._feed(twin, self._batch))

    def _step(self, twin: Any) -> Any:
        for name, module in twin.named_modules():
            module.training = self._modes.get(name, True)
        return twin.training_step(copy_tensors(self._batch), self._batch_idx)

    @staticmethod
    def _compare(callback: Any, name: str, run: Run, twin: Any) -> Any:
        return callback.compared(twin, getattr(twin, name), run)


def without_adapters(plan: RemovalPlan) -> RemovalPlan:
    """Return what a plan says of the module itself."""
    kept = {name: dims for name, dims in plan.kept.items() if not name.startswith(ADAPTERS)}
    fixed = {layer: reason for layer, reason in plan.fixed.items() if not layer.startswith(ADAPTERS)}
    return replace(plan, kept=kept, fixed=fixed)


def cut_fit_(trainer: Any, pl_module: Any, plan: RemovalPlan) -> list[str]:
    """Cut a module in a fit, and all that has its tensors; returns optimizers whose state for these starts anew."""
    layers = {name: callback.trained_layers for name, callback in adapters_of(trainer, pl_module).items()}
    cut, anew = cut_together_(pl_module, plan, trainer.optimizers, averaged_copies(trainer), layers)
    for callback in compression_callbacks(trainer):
        callback.on_channels_removed(trainer, pl_module, cut)
    if plan.kept:
        rebuild_ddp(trainer, pl_module)
    return anew
