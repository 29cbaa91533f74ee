"""The base of callbacks that act when a checkpoint is written or read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import nn
from torch.optim.swa_utils import AveragedModel


class CheckpointListener:
    """Base of callbacks that act when a checkpoint of their module is written or read.

    Attributes:
        kept_with_weights: whether the weights mean nothing without the callback's state, so that a checkpoint of
            weights alone holds it too.
    """

    kept_with_weights: ClassVar[bool] = False

    @property
    def state_key(self) -> str:
        """Names the callback in a checkpoint."""
        raise NotImplementedError

    def sync_(self, trainer: Any, pl_module: Any) -> None:
        """Bring the module and its averaged copies in line, before they are validated or saved."""

    def check_entry(self, entry: Mapping[str, Any], stage: str) -> None:
        """Raise if a checkpoint with our ``entry`` can't be loaded for this stage; nothing is changed yet."""

    def check_state(self, state: Any) -> None:
        """Raise if what a checkpoint holds of the callback can't be taken; nothing is changed yet."""

    def state_dict(self) -> dict[str, Any]:
        """Return the callback's state as plain data."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state that a checkpoint held."""


def listeners(module: Any) -> dict[str, CheckpointListener]:
    """Return the listeners of a module's Trainer, by their keys.

    They are found anew each time: a hook that held them would copy them with the module.
    """
    trainer = getattr(module, "_trainer", None)
    callbacks = trainer.callbacks if trainer is not None else ()
    return {callback.state_key: callback for callback in callbacks if isinstance(callback, CheckpointListener)}


def averaged_copies(trainer: Any) -> Iterator[nn.Module]:
    """Yield the averaged copies that callbacks hold (`WeightAveraging`, SWA): every change is made to them too."""
    for callback in trainer.callbacks:
        average = getattr(callback, "_average_model", None)
        if isinstance(average, nn.Module):
            yield average.module if isinstance(average, AveragedModel) else average
