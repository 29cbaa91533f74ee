"""The user's own metric of a copy of a module, on groups of validation batches; and as a function on a module."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_compress.calibration import loader_of
from lightning_compress.choosing.evaluations import Evaluation
from lightning_compress.choosing.paired import Group
from lightning_compress.errors import CompressionError, invalid, nearest
from lightning_compress.modules.copying import copy_module, copy_tensors
from lightning_compress.modules.isolation import isolated_random_state
from lightning_compress.modules.paths import device_of
from lightning_compress.probe import is_own
from lightning_compress.report.evaluations import in_silence, own_iterator, validating_trainer
from lightning_compress.report.inputs import batch_size_of
from lightning_compress.silent_copy import unsilence_

GROUPS = 32
"""So many groups tell the noise nearly as well as single batches, and are fewer runs."""


def validation_loaders(trainer: Any, pl_module: Any) -> Any:
    """Return what a validation of this Trainer reads; never test data.

    Raises:
        CompressionError: there is none, as in a test of bare loaders.
    """
    loops = {"fit": trainer.fit_loop.epoch_loop.val_loop, "validate": trainer.validate_loop}
    if (loop := loops.get(trainer.state.fn)) is not None and loop._data_source.is_defined():
        return loop._data_source.dataloader()
    for source in (trainer.datamodule, pl_module):
        if source is not None and is_own(source, "val_dataloader"):
            return loader_of(source, "val_dataloader")
    raise CompressionError(
        "`val_dataloader` must be there to guard a metric. Received: no validation data; test data decide nothing. "
        "Pass a datamodule, or define `val_dataloader()` on the module: model.val_dataloader = lambda: val_loader"
    )


class Validation:
    """Runs the validation loop of a module on copies of it, group of batches by group of batches.

    Each group is a run of its own, so that the metric's value on it is known whatever way it is logged: by
    ``validation_step`` or when the epoch ends, as a number or as a metric object.

    Args:
        trainer: as which it validates; its loggers, callbacks and counters stay as they were.
        loaders: of the validation data.
        monitor: the name of the metric.
        datamodule: whose hooks of batches are called; None where there is none.
        groups: of batches, at most.
        device: of copies that may have to be set up; None where models are ready and stay where they are.

    Attributes:
        count: evaluations so far, each a pass over the validation data.
    """

    def __init__(
        self,
        trainer: Any,
        loaders: Any,
        monitor: str,
        datamodule: Any = None,
        groups: int = GROUPS,
        device: torch.device | None = None,
    ) -> None:
        self.trainer, self.loaders, self.monitor, self.datamodule = trainer, loaders, monitor, datamodule
        self.groups, self.device, self.count = groups, device, 0

    def __call__(self, model: Any) -> list[Group]:
        """Return the metric of ``model`` by group; the first process decides for all.

        Raises:
            CompressionError: validation doesn't log such a metric.
        """
        self.count += 1
        with isolated_random_state(seed=0), in_silence(), isolated_random_state(loaders=self.loaders):
            groups = list(self._groups(self._copy(model)))
        found: list[Group] = self.trainer.strategy.broadcast(groups)
        return found

    def _copy(self, model: Any) -> Any:
        """Return a copy that can log, and stays as it is and where it is: kernels are made anew by any move."""
        shared = list(model.parameters()) if self.device is None else []
        twin = copy_module(model, shared)
        setup = _nothing if self.device is None else partial(_set_up_, twin.to(self.device))
        if any("log" in vars(module) for module in twin.modules()):
            unsilence_(twin)
        vars(twin).update(setup=setup, prepare_data=_nothing, teardown=_nothing, _apply=lambda *_, **__: twin)
        return twin

    def _groups(self, model: Any) -> Iterator[Group]:
        own, known = validating_trainer(self.trainer, device_of(model)), set[str]()
        own.limit_val_batches = 1.0  # the parts are limited already
        leaves, spec = tree_flatten(getattr(self.loaders, "iterables", self.loaders))
        loaders = [_Parts(own_iterator(leaf), self.trainer.limit_val_batches) for leaf in leaves]
        lengths, found = [loader.length for loader in loaders if loader.length is not None], False
        groups = min(self.groups, max(lengths, default=self.groups))
        for _ in range(groups) if lengths or groups == 1 else iter(int, 1):
            for loader in loaders:
                loader.begin(groups)
            parts = tree_unflatten(loaders, spec)
            if type(self.loaders).__name__ == "CombinedLoader":
                parts = type(self.loaders)(parts, self.loaders._mode)
            datamodule = None if self.datamodule is None else _twin(self.datamodule, parts)
            own.validate(model, None if datamodule else parts, datamodule=datamodule, verbose=False)
            known |= set(own.callback_metrics)
            samples = sum(loader.samples for loader in loaders)
            if samples and self.monitor in own.callback_metrics:
                found = True
                yield Group(samples, float(own.callback_metrics[self.monitor]))
            elif not samples and all(loader.length is None for loader in loaders):
                break
        if not found:
            remedy = nearest(self.monitor, sorted(known))
            raise invalid("monitor", "be a metric that validation logs", self.monitor, remedy)


class ValidationMetric:
    """Evaluates a LightningModule by its own validation: the ``evaluate`` of `sensitivity` and `search`.

    It is what a validation logs of a copy of the module, without callbacks, loggers and progress bar, in a process. The
    validation data are run in groups of batches: by their values drops get a standard error. A metric that isn't a mean
    over samples, such as an F1, is the mean of its values on the groups; with ``groups=1`` it is that of all data.

    Args:
        trainer: as which it is validated.
        datamodule: of the validation data; a validation loader serves too, or None where the module has its own.
        monitor: the name of the metric that the module logs.
        groups: of batches, at most.

    Raises:
        CompressionError: when it is called, for a metric that the validation doesn't log; the nearest are named.

    Example:
        >>> from lightning_compress import sensitivity
        >>> # sensitivity(model, ValidationMetric(trainer, datamodule, "val_acc"), datamodule.train_dataloader())
    """

    def __init__(self, trainer: pl.Trainer, datamodule: Any, monitor: str, groups: int = GROUPS) -> None:
        if type(groups) is not int or groups < 1:
            raise invalid("groups", "be a whole number, at least 1", groups)
        self.trainer, self.datamodule, self.monitor, self.groups = trainer, datamodule, monitor, groups

    def __call__(self, module: pl.LightningModule) -> Evaluation:
        """Return the metric of a module, or of a changed copy of it."""
        if not isinstance(module, nn.Module) or not hasattr(module, "validation_step"):
            raise invalid("model", "be a LightningModule for a ValidationMetric", type(module).__name__)
        source: Any = module if self.datamodule is None else self.datamodule
        if not hasattr(source, "val_dataloader"):
            loaders, datamodule = source, None
        else:
            source.prepare_data()
            loaders, datamodule = loader_of(source, "val_dataloader", "validate"), self.datamodule
        device = self.trainer.strategy.root_device
        return Evaluation.of(Validation(self.trainer, loaders, self.monitor, datamodule, self.groups, device)(module))


def _twin(datamodule: Any, parts: Any) -> Any:
    """Return a datamodule with the same attributes and hooks, that hands parts to another Trainer; it is ready."""
    kind: Any = type(datamodule)
    twin = kind.__new__(kind)
    vars(twin).update({**vars(datamodule), "trainer": None, "val_dataloader": lambda: parts})
    vars(twin).update(dict.fromkeys(("prepare_data", "setup", "teardown"), _nothing))
    return twin


def _set_up_(model: Any, stage: str) -> None:
    """Set a copy up, once; layers that it has, and their values, stay as they are."""
    modules, state = dict(model._modules), copy_tensors(model.state_dict())
    vars(model)["setup"] = _nothing
    type(model).setup(model, stage)
    model._modules.update(modules)
    model.load_state_dict(state, strict=False)


def _nothing(*_: Any, **__: Any) -> None:
    """What a module or datamodule that is ready isn't asked for again."""


class _Parts:
    """Hands out the batches of a loader part by part, in one iteration over it.

    Attributes:
        length: batches in all; None where the loader doesn't say.
        samples: of the part that was handed out last.
    """

    def __init__(self, loader: Any, limit: float) -> None:
        most = limit if isinstance(limit, int) else None
        try:
            self.length: int | None = int(len(loader) * limit) if most is None else min(len(loader), most)
        except TypeError:
            self.length = None
        self._batches: Iterator[Any] = islice(iter(loader), most if self.length is None else self.length)
        self._part, self.samples = 0, 0

    def begin(self, groups: int) -> None:
        """Go on to the next part, one of so many in all."""
        self._part, self._of, self.samples = self._part + 1, groups, 0

    def __iter__(self) -> Iterator[Any]:
        size = 1 if self._of > 1 else None
        if self.length is not None:
            size = self._part * self.length // self._of - (self._part - 1) * self.length // self._of
        for batch in islice(self._batches, size):
            self.samples += _size(batch)
            yield batch


def _size(batch: Any) -> int:
    try:
        return batch_size_of(batch)
    except CompressionError:
        return 1
