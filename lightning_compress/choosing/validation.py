"""The user's own metric of a copy of a module, on groups of validation batches."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_compress.calibration import loader_of
from lightning_compress.choosing.paired import Group
from lightning_compress.errors import CompressionError, invalid, nearest
from lightning_compress.modules.copying import copy_module
from lightning_compress.modules.isolation import isolated_random_state
from lightning_compress.modules.paths import device_of
from lightning_compress.probe import is_own
from lightning_compress.report.evaluations import in_silence, own_iterator, validating_trainer
from lightning_compress.report.inputs import batch_size_of
from lightning_compress.silent_copy import unsilence_

_GROUPS = 32
"""So many groups tell the noise nearly as well as single batches, and are fewer runs."""
_READY = ("prepare_data", "setup", "teardown")
"""What a module or datamodule that is running isn't asked for again."""


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
        trainer: of the module; its loggers, callbacks and counters stay as they were.
        pl_module: the module.
        monitor: the name of the metric.

    Attributes:
        count: evaluations so far, each a pass over the validation data.
    """

    def __init__(self, trainer: Any, pl_module: Any, monitor: str) -> None:
        self.trainer, self.monitor, self.count = trainer, monitor, 0
        self.loaders = validation_loaders(trainer, pl_module)

    def __call__(self, model: Any) -> list[Group]:
        """Return the metric of ``model`` by group; the first process decides for all.

        Raises:
            CompressionError: validation doesn't log such a metric.
        """
        self.count += 1
        with isolated_random_state(seed=0), in_silence(), isolated_random_state(loaders=self.loaders):
            groups = list(self._groups(_pinned(copy_module(model, list(model.parameters())))))
        found: list[Group] = self.trainer.strategy.broadcast(groups)
        return found

    def _groups(self, model: Any) -> Iterator[Group]:
        own, known = validating_trainer(self.trainer, device_of(model)), set[str]()
        own.limit_val_batches = 1.0  # the parts are limited already
        leaves, spec = tree_flatten(getattr(self.loaders, "iterables", self.loaders))
        loaders = [_Parts(own_iterator(leaf), self.trainer.limit_val_batches) for leaf in leaves]
        lengths, found = [loader.length for loader in loaders if loader.length is not None], False
        groups = min(_GROUPS, max(lengths, default=0))
        for _ in range(groups) if lengths else iter(int, 1):
            for loader in loaders:
                loader.begin(groups)
            parts = tree_unflatten(loaders, spec)
            if type(self.loaders).__name__ == "CombinedLoader":
                parts = type(self.loaders)(parts, self.loaders._mode)
            own.validate(model, **self._source(parts), verbose=False)
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

    def _source(self, parts: Any) -> dict[str, Any]:
        """Return what hands the parts on by the hooks of batches of a datamodule, where there is one."""
        if (datamodule := self.trainer.datamodule) is None:
            return {"dataloaders": parts}
        twin = _twin(datamodule)
        twin.val_dataloader = lambda: parts
        return {"datamodule": twin}


def _twin(datamodule: Any) -> Any:
    """Return a datamodule with the same attributes, that another Trainer can be given; it is ready."""
    kind: Any = type(datamodule)
    twin = kind.__new__(kind)
    vars(twin).update({**vars(datamodule), "trainer": None})
    vars(twin).update(dict.fromkeys(_READY, lambda *_, **__: None))
    return twin


class _Parts:
    """Hands out the batches of a loader part by part, in one iteration over it.

    Attributes:
        length: batches in all; None where the loader doesn't say.
        samples: of the part that was handed out last.
    """

    def __init__(self, loader: Any, limit: float) -> None:
        try:
            length = len(loader)
            self.length: int | None = min(length, limit) if isinstance(limit, int) else int(length * limit)
        except TypeError:
            self.length = None
        self._batches: Iterator[Any] = islice(iter(loader), self.length if self.length is not None else _most(limit))
        self._part, self.samples = 0, 0

    def begin(self, groups: int) -> None:
        """Go on to the next part, one of so many in all."""
        self._part, self._of, self.samples = self._part + 1, groups, 0

    def __iter__(self) -> Iterator[Any]:
        size = 1
        if self.length is not None:
            ends = (part * self.length // self._of for part in (self._part - 1, self._part))
            size = -next(ends) + next(ends)
        for batch in islice(self._batches, size):
            self.samples += _size(batch)
            yield batch


def _most(limit: float) -> int | None:
    return limit if isinstance(limit, int) else None


def _size(batch: Any) -> int:
    try:
        return batch_size_of(batch)
    except CompressionError:
        return 1


def _pinned(model: Any) -> Any:
    """Let a copy log, and stay as it is and where it is.

    Its ``setup`` has been called, and may build layers anew; and kernels are made anew whenever a model is moved, even
    to where it is.
    """
    if any("log" in vars(module) for module in model.modules()):
        unsilence_(model)
    vars(model).update(dict.fromkeys(_READY, lambda *_, **__: None), _apply=lambda *_, **__: model)
    return model
