"""What do a LightningModule's own steps call, and which of its steps takes a batch?

Values matter to calibration, whose batches go through a `data_feed`. Shapes matter where calls are observed: to
`observe_steps`, and to `example_calls` for what is measured.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError, in_a_line
from lightning_compress.modules.call_log import count_inputs, record_calls
from lightning_compress.modules.calls import Call, Forward, calibration_step, run_example
from lightning_compress.modules.copying import copy_batch
from lightning_compress.modules.isolation import (
    evaluation_mode,
    isolated_evaluation,
    isolated_random_state,
    isolated_state,
)
from lightning_compress.modules.paths import clean_name
from lightning_compress.silent_copy import make_probe, silence_
from lightning_compress.structure.change import is_converted, to_float_

Observation = TypeVar("Observation")
Way = Callable[[Any, Any], Any]

_FED = "_fed"
"""Where a copy counts the batches that went through its steps, by stage; what is counted has had its start hooks."""


def is_own(owner: Any, method: str) -> bool:
    """Whether a module or datamodule has a method that isn't Lightning's own, under either name of the package."""
    function: Any = getattr(owner, method, None)
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    home = getattr(function, "__module__", None) or ""
    return function is not None and not home.startswith(("lightning.pytorch.", "pytorch_lightning."))


def to_module(trainer: pl.Trainer, probe: pl.LightningModule, batch: Any) -> Any:
    """Make of a loader's batch what steps get, by Lightning's hooks of batches: the datamodule's or else the copy's."""
    datamodule = getattr(trainer, "datamodule", None)

    def call(hook: str, *args: Any) -> Any:
        owner = datamodule if datamodule is not None and is_own(datamodule, hook) else probe
        return getattr(owner, hook)(*args, 0)

    batch = call("on_before_batch_transfer", trainer.precision_plugin.convert_input(batch))
    return call("on_after_batch_transfer", call("transfer_batch_to_device", batch, probe.device))


@dataclass(frozen=True)
class Step:
    """A step of a module's evaluation as a way of batches, with the hooks of the module that come before it."""

    stage: str
    """``test``, ``validation`` or ``predict``."""

    @property
    def __name__(self) -> str:
        return f"{self.stage}_step"

    def __call__(self, module: Any, batch: Any) -> Any:
        fed = module.__dict__.setdefault(_FED, {})
        if self.stage not in fed:
            getattr(module, f"on_{self.stage}_start")()
            getattr(module, f"on_{self.stage}_epoch_start")()
        index = fed[self.stage] = fed.get(self.stage, -1) + 1
        _call(getattr(module, f"on_{self.stage}_batch_start"), batch, index)
        return _call(getattr(module, self.__name__), batch, index)


def _call(method: Callable[..., Any], batch: Any, index: int) -> Any:
    """Call as Lightning does: with the batch's index if there is room, and a loader's where it is asked for by name."""
    parameters = inspect.signature(method).parameters
    takes_any = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters.values())
    args = (batch, index) if len(parameters) > 1 or takes_any else (batch,)
    return method(*args, **({"dataloader_idx": 0} if "dataloader_idx" in parameters else {}))


class Feed:
    """A way of batches through a module and its copies; where it fails on one, the next is tried.

    Args:
        trainer: that runs the module.
        ways: in the order in which they are tried.
        remedy: what to do where none works.

    Attributes:
        failures: the ways that were given up, and why.
    """

    def __init__(self, trainer: pl.Trainer, ways: Sequence[Way], remedy: str) -> None:
        self.ways = list(ways)
        self.remedy = remedy
        self.failures: dict[str, str] = {}
        self._context: Callable[[], AbstractContextManager[Any]] = trainer.precision_plugin.forward_context

    def __call__(self, module: nn.Module, batch: Any) -> Any:
        """Run a batch by the first way that works; a quantized module by the one that was chosen for the float one."""
        if is_converted(module):
            return self._run(self.ways[0], module, batch)
        failures = dict(self.failures)
        for way in self.ways:
            try:
                return self._run(way, module, batch)
            except Exception as error:  # of code of the user's
                failures[way.__name__] = in_a_line(error)
        raise self._no_way(failures)

    def _run(self, way: Way, module: nn.Module, batch: Any) -> Any:
        with self._context():
            return way(module, copy_batch(batch))  # a step may change or empty what it is given

    def others(self) -> list[Way]:
        """Return the ways of a batch behind the one that was chosen."""
        return [partial(self._run, way) for way in self.ways[1:]]

    def choose(self, module: nn.Module, batches: Iterator[Any]) -> Iterator[Any]:
        """Choose the first way that brings a batch to the layers; return the batches, such a batch first.

        Raises:
            CompressionError: there is no such way; each is named with what was wrong.
        """
        taken: list[Any] = []

        def from_the_start() -> Iterator[Any]:
            yield from list(taken)
            for batch in batches:
                taken.append(batch)
                yield batch

        for number, way in enumerate(self.ways):
            reason = "it calls no layer"
            try:
                for place, batch in enumerate(from_the_start()):
                    if reason := self._why_not(way, module, batch):
                        continue
                    self.ways = self.ways[number:]
                    return chain([taken.pop(place)], taken, batches)
            except Exception as error:
                reason = in_a_line(error)
            self.failures[way.__name__] = reason
        if taken or not self.ways:
            raise self._no_way(self.failures)
        return iter(())

    def _why_not(self, way: Way, module: nn.Module, batch: Any) -> str:
        """Say why a way that runs is none for a batch; empty if it is one."""
        with isolated_evaluation(module):
            reached = count_inputs(module, lambda: self._run(way, module, batch))
        if not reached:
            return "it calls no layer"
        if isinstance(way, Step) and isinstance(batch, Tensor) and batch.dim():
            # A step that takes the first of what it is given gets the first sample, where a loader gives inputs alone.
            twice = torch.cat([batch, batch])
            with isolated_evaluation(module):
                if count_inputs(module, lambda: self._run(way, module, twice)) == reached:
                    raise CompressionError("it reads one sample of each batch, which is a single tensor")
        return ""

    def _no_way(self, failures: Mapping[str, str]) -> CompressionError:
        tried = "; ".join(f"`{name}`: {reason.rstrip('.')}" for name, reason in failures.items())
        return CompressionError(f"The module must run one batch. Received: {tried}. {self.remedy}")

    def __str__(self) -> str:
        tried = "".join(f"; not by `{name}` ({reason})" for name, reason in self.failures.items())
        return f"batches go through `{self.ways[0].__name__}`{tried}"


def data_feed(trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> Feed:
    """Return the way of data through a copy of a module, as its own evaluation feeds it.

    That is ``calibration_step(batch)`` where there is one; else ``test_step``, ``validation_step`` or ``predict_step``;
    else ``forward``. The step of ``stage`` comes first. The module's steps can be run: see `make_probe`.
    """
    remedy = (
        "Define `calibration_step(batch)` on the module, which runs a batch as the module is used, or "
        "`calibration_dataloader()` with batches that one of these takes."
    )
    ways = _evaluation(module, stage)
    return Feed(trainer, ways if calibration_step in ways else [*ways, Forward()], remedy)


def shape_feed(trainer: pl.Trainer, module: pl.LightningModule, stage: str, *, train: bool) -> Feed:
    """Return the way of a batch, as in `data_feed`, through a copy of a module where shapes matter and values don't.

    With ``train`` the ``training_step`` is a way too; one that optimizes by itself comes last.
    """
    ways = _evaluation(module, stage)
    trains: list[Way] = [training_step] if train and is_own(module, "training_step") else []
    if module.automatic_optimization:
        ways += trains
    if getattr(module, "example_input_array", None) is not None:
        ways.append(example_input_array)
    remedy = "Set `example_input_array`, or define `calibration_step(batch)` on the module."
    # A step that optimizes by itself may do without its optimizers, and run.
    return Feed(trainer, [*ways, Forward(), *([] if module.automatic_optimization else trains)], remedy)


def _evaluation(module: Any, stage: str) -> list[Way]:
    if getattr(module, "calibration_step", None) is not None:
        return [calibration_step]
    stages = dict.fromkeys((stage, "test", "validation", "predict"))
    return [Step(stage) for stage in stages if is_own(module, f"{stage}_step")]


def training_step(module: Any, batch: Any) -> Any:
    """Run a batch through a module that is only trained."""
    return _call(module.training_step, batch, 0)


def example_input_array(module: nn.Module, batch: Any) -> Any:
    """Run a module without a batch."""
    return run_example(module)


def observe_steps(
    trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, observe: Callable[..., Observation]
) -> list[Observation]:
    """Return what ``observe(module, run)`` gives for the module's training step, its evaluation and its forward.

    All run on a deep copy that is float, and under a random state of their own, so that nothing is left behind.

    Raises:
        CompressionError: none of them runs.
    """
    probe = make_probe(trainer, pl_module)
    to_float_(probe)
    feed = shape_feed(trainer, probe, "validation", train=not probe.automatic_optimization)
    observed = list[Observation]()
    with isolated_random_state(), trainer.precision_plugin.train_step_context():
        if pl_module.automatic_optimization:
            try:
                observed.append(observe(probe, lambda: probe.training_step(copy_batch(batch), batch_idx)))
            except Exception as error:  # it is the user's, and evaluation may do
                feed.failures["training_step"] = in_a_line(error)
        # Forward need not be what the steps call.
        forwards = [Feed(trainer, [Forward()], feed.remedy)] if len(feed.ways) > 1 else []
        for evaluation in (feed, *forwards):
            with evaluation_mode(probe), nullcontext() if not observed else suppress(CompressionError):
                evaluation.choose(probe, iter([batch]))  # what fails calls nothing that is to be seen
                observed.append(observe(probe, partial(evaluation, probe, batch)))
    return observed


def example_calls(trainer: pl.Trainer, module: pl.LightningModule, batch: Any, stage: str) -> dict[str, Call]:
    """Return the calls of a module, for their shapes, by the paths of what a step calls (``""`` is ``forward``).

    A step of the module's own makes them on ``batch``, that of ``stage`` first; else ``forward`` on the
    ``example_input_array``, which alone is left where the batch is None, else on the batch. No trace is left.

    Raises:
        CompressionError: nothing runs.
    """
    feed = shape_feed(trainer, module, stage, train=True)
    if trainer.world_size > 1:  # a step may wait for ranks that don't run it
        feed.ways = [way for way in feed.ways if way is example_input_array or isinstance(way, Forward)]
    if batch is None:
        feed.ways = [way for way in feed.ways if way is example_input_array]
        feed.failures["training_step"] = "no batch was seen"
    with isolated_state(module.modules()):
        silence_(module, trainer)
        feed.choose(module, iter([batch]))
        with isolated_evaluation(module):
            log = record_calls(module, lambda: feed(module, batch))
    layers = {clean_name(path): layer for path, layer in module.named_modules()}
    called = [path for path, callers in log.callers.items() if None in callers]
    if "" in called:
        called = [""]
    return {path: log.inputs[path] for path in called if any(True for _ in layers[path].parameters())}
