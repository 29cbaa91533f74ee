"""How was a run set? Its Trainer, its callbacks and its classes, as YAML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_compress.callback import CompressionCallback
from lightning_compress.report.yaml_text import as_yaml
from lightning_compress.settings import path_of

_TRAINER = ("max_epochs", "max_steps", "precision", "num_devices", "accumulate_grad_batches", "gradient_clip_val")
_UNSET = (None, -1)


def run_settings(trainer: Any, callbacks: Sequence[CompressionCallback]) -> str:
    """Return the settings of a run as YAML: those that differ from the defaults, and callbacks of this package alone.

    Args:
        trainer: whose settings count; of its module and datamodule the classes are named, since hyperparameters are the
            user's own.
        callbacks: those of this package.
    """
    values = {name: getattr(trainer, name, None) for name in _TRAINER}
    own = [
        {"class_path": path_of(type(callback))}
        | ({"init_args": given} if (given := callback.report_settings()) else {})
        for callback in callbacks
    ]
    run: dict[str, Any] = {
        "trainer": {
            **{name: value for name, value in values.items() if value not in _UNSET},
            "accelerator": trainer.strategy.root_device.type,
            "callbacks": own,
        },
        "model": {"class_path": path_of(type(trainer.lightning_module))},
    }
    if (datamodule := getattr(trainer, "datamodule", None)) is not None:
        run["data"] = {"class_path": path_of(type(datamodule))}
    return as_yaml(run, depth=4)
