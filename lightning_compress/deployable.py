"""Which module serves? A plain copy of the one that was trained: what only helped in training is gone."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_compress.distillation.learner import Learner
from lightning_compress.modules.copying import copy_module
from lightning_compress.structure.change import changes, is_converted
from lightning_compress.structure.checkpoint import detach
from lightning_compress.structure.hyperparameters import drop_hooks_


def deployable(model: nn.Module, trainer: Any = None) -> nn.Module:
    """Make the plain module that serves; ``model`` is left as it is.

    It has no hooks of this package, no distillation adapters and no teacher; of a module that distils it is the
    student. What is prepared for quantization is converted, and low-rank adapters are merged into float weights. Masked
    weights are zeros, removed channels stay away, and what is converted already no longer knows its float form.

    Args:
        model: any module, compressed or not. Modes and devices are kept.
        trainer: in a fit, the Trainer of ``model``: where it averages weights, these serve.

    Returns:
        A copy; `save_compressed` saves it.

    Raises:
        CompressionError: the module can't be copied, or not be converted yet.

    Example:
        >>> import torch
        >>> from lightning_compress import quantize
        >>> int8 = quantize(nn.Sequential(nn.Linear(8, 4)), "int8_dynamic")
        >>> copied = deployable(int8)
        >>> copied is int8, copied(torch.ones(1, 8)).equal(int8(torch.ones(1, 8)))
        (False, True)
    """
    served: Any = model if trainer is None else _average(trainer, model)
    plain = served.export_student() if isinstance(served, Learner) else copy_module(served)
    drop_helpers_(plain)
    for change in reversed(changes()):
        change.finish_(plain)
        change.forget_(plain)
    detach(plain)
    return plain


def drop_helpers_(model: nn.Module) -> None:
    """Take out what helps in training alone: hooks of this package, and modules that are ``training_only``."""
    for module in list(model.modules()):
        drop_hooks_(module)
        for name, child in module.named_children():
            if getattr(child, "training_only", False):
                module._modules[name] = nn.Module()


def _average(trainer: Any, model: nn.Module) -> nn.Module:
    """Return the averaged copy of a fit's module that will replace it; the module itself where it is the average."""
    # While a fit validates, and when it has ended, Lightning has the average in the module itself.
    for callback in trainer.callbacks if trainer.training and not is_converted(model) else ():
        average = getattr(callback, "_average_model", None)
        if isinstance(average, AveragedModel) and average.n_averaged > 0:
            return average.module
        if isinstance(average, nn.Module) and getattr(callback, "n_averaged", None):
            return average
    return model
