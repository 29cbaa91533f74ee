"""How do the steps of a LightningModule run on a copy, so that nothing is logged, saved or moved?"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn

from lightning_compress.modules.copying import copy_module

_SILENT = ("log", "log_dict", "print", "manual_backward", "toggle_optimizer", "untoggle_optimizer", "clip_gradients")
_READ = ("optimizers", "lr_schedulers")


def make_probe(
    trainer: pl.Trainer, pl_module: pl.LightningModule, shared: Collection[nn.Parameter] | Mapping[int, Any] = ()
) -> pl.LightningModule:
    """Make a deep copy whose steps can be run without a trace: it logs nothing, and its metrics are its own."""
    probe = copy_module(pl_module, shared)
    silence_(probe, trainer)
    return probe


def silence_(probe: pl.LightningModule, trainer: pl.Trainer) -> None:
    """Let the steps of a copy log nowhere, and see a Trainer that they can't write to."""
    silent = _silent_trainer(trainer, probe)
    for module in probe.modules():
        if "_trainer" in vars(module):
            vars(module).update(dict.fromkeys(_SILENT, _nothing))
            vars(module).update({name: _OriginalReader(trainer, name) for name in _READ})
            module.__dict__["_trainer"] = silent


def is_silent(module: pl.LightningModule) -> bool:
    """Whether a module is such a copy: what it would only log need not be computed."""
    trainer = vars(module).get("_trainer")
    return trainer is not None and "_probe" in vars(trainer)


def unsilence_(probe: pl.LightningModule) -> None:
    """Let a copy that is handed on log again; it belongs to no Trainer."""
    for module in probe.modules():
        if "_trainer" in vars(module):
            for name in (*_SILENT, *_READ):
                del vars(module)[name]
            module.__dict__["_trainer"] = None


def _silent_trainer(trainer: pl.Trainer, probe: pl.LightningModule) -> pl.Trainer:
    """Make the Trainer that a step of ``probe`` sees: what is set on it stays there, and no logger is the real one."""
    silent = copy.copy(trainer)
    silent.__class__ = _silent_kind(type(trainer))  # type: ignore[arg-type]
    silent.__dict__["_probe"] = weakref.ref(probe)
    silent.loggers = silent_loggers(trainer)
    connector = silent._logger_connector = copy.copy(trainer._logger_connector)
    for name in ("_progress_bar_metrics", "_logged_metrics", "_callback_metrics"):
        setattr(connector, name, dict(getattr(connector, name)))
    return silent


def silent_loggers(trainer: pl.Trainer) -> list[Any]:
    """Return as many loggers as a Trainer has, which do nothing."""
    return [DummyLogger() for _ in trainer.loggers]


@cache
def _silent_kind(kind: type[pl.Trainer]) -> type[pl.Trainer]:
    def probe(silent: Any) -> Any:
        return vars(silent)["_probe"]()

    hidden = {"lightning_module": property(probe), "model": property(probe), "save_checkpoint": _nothing}
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, **hidden})


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Log, print or save nothing."""


class _ReadOnly:
    """An optimizer or a scheduler of the original, which a step of a copy may read and not move."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    zero_grad = step

    def toggle_model(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        """Nothing."""
        return nullcontext()


class _OriginalReader:
    """``optimizers()`` or ``lr_schedulers()`` of the original; a copy of a copy asks the same Trainer."""

    def __init__(self, trainer: pl.Trainer, name: str) -> None:
        self.trainer, self.name = trainer, name

    def __deepcopy__(self, memo: Any) -> _OriginalReader:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = getattr(self.trainer.lightning_module, self.name)(*args, **kwargs)
        return [_ReadOnly(item) for item in found] if isinstance(found, list) else found and _ReadOnly(found)
