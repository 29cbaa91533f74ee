"""Runs a file in the place of a module through a test, so that the user's own metrics are measured of the file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.export.nest import described
from lightning_compress.export.runtime_module import RuntimeModule
from lightning_compress.export.step_calls import feed_of_test_step, log_of, part_path, untested, why_not_tested
from lightning_compress.messages import named
from lightning_compress.modules.isolation import isolated_evaluation
from lightning_compress.modules.outputs import flatten
from lightning_compress.modules.paths import is_below, modules_of
from lightning_compress.probe import Feed
from lightning_compress.silent_copy import make_probe
from lightning_compress.twin import Twin


class FileTwin:
    """Runs each batch of a test through a silent copy too, in which a file computes for the module at a path.

    The module isn't swapped: its attributes stay, and its instance's ``forward`` runs the file.

    Args:
        trainer: that tests.
        model: the LightningModule that it tests.
        path: of the exported module; see `part_path`.
        file: of it.
        batch: the first of the test.

    Raises:
        CompressionError: ``test_step`` doesn't call the module, or calls layers in it without it, so that what is
            measured wouldn't be the file. For the first batch this is found out before the test, on the copy.
    """

    def __init__(self, trainer: Any, model: Any, path: str, file: RuntimeModule, batch: Any) -> None:
        probe = make_probe(trainer, model).eval()
        feed = feed_of_test_step(trainer)
        if reason := why_not_tested(probe, log_of(probe, feed, batch), path):
            raise untested(reason)
        self._path = part_path(probe, path)
        module = modules_of(probe)[self._path]
        self._route = _Route(file, _output_of(probe, module, feed, batch))
        self._strays: list[str] = []
        for inner, layer in modules_of(probe).items():
            if is_below(inner, self._path) and any(True for _ in layer.parameters()):
                layer.register_forward_pre_hook(lambda *_, inner=inner: self._strays.append(inner))
        vars(module)["forward"] = self._route
        self._twin = Twin(probe, "test", f"{file.runtime}/", model.log)

    def step(self, trainer: Any, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Run a batch.

        Raises:
            CompressionError: it didn't run in the file, or not all of it.
        """
        before = self._route.runs
        with torch.compiler.set_stance("force_eager"):
            self._twin.step(trainer, batch, batch_idx, dataloader_idx)
        if self._strays:
            raise untested(f"calls {named(self._strays)} from outside of {named([self._path])} too, in a later batch")
        if self._route.runs == before:
            raise untested(f"never calls {named([self._path])} in batch {batch_idx}")

    def call(self, hook: str) -> None:
        """Call a hook of the test."""
        self._twin.call(hook)


def _output_of(probe: nn.Module, module: nn.Module, feed: Feed, batch: Any) -> Any:
    """Return what a module gives in a step."""
    outputs: list[Any] = []
    with isolated_evaluation(probe), module.register_forward_hook(lambda *call: outputs.append(call[-1])):
        feed(probe, batch)
    return outputs[0]


class _Route:
    """The forward of a module that a file computes; outputs come in containers of the classes that the model's have."""

    def __init__(self, file: RuntimeModule, output: Any) -> None:
        self.runs = 0
        self._file = file
        tensors, self._structure = flatten(output)
        held: list[Tensor] = []
        described(output, held)
        places = {id(tensor): place for place, tensor in enumerate(held)}
        self._order = [places[id(tensor)] for tensor in tensors]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.runs += 1
        tensors: list[Tensor] = []
        described(self._file(*args, **kwargs), tensors)
        return self._structure.rebuild([tensors[place] for place in self._order])
