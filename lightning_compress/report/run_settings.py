"""How was a run set? Its Trainer, its callbacks and its classes, as YAML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_compress.callback import CompressionCallback
from lightning_compress.report.yaml_text import as_yaml
from lightning_compress.settings import path_of

_TRAINER: tuple[tuple[str, str, Any], ...] = (
    ("max_epochs", "max_epochs", None),
    ("max_steps", "max_steps", -1),
    ("precision", "precision", "32-true"),
    ("devices", "num_devices", 1),
    ("accumulate_grad_batches", "accumulate_grad_batches", 1),
    ("gradient_clip_val", "gradient_clip_val", None),
)
"""Arguments of a Trainer, the attributes that hold them, and the values of which nothing need be said."""


def run_settings(trainer: Any, callbacks: Sequence[CompressionCallback]) -> str:
    """Return the settings of a run as YAML: those that differ from the defaults, and callbacks of this package alone.

    Args:
        trainer: whose settings count; of its module and datamodule the classes are named, since hyperparameters are the
            user's own.
        callbacks: those of this package.
    """
    values = {name: getattr(trainer, held, usual) for name, held, usual in _TRAINER}
    usual = {name: usual for name, _, usual in _TRAINER}
    own = [
        {"class_path": path_of(type(callback))}
        | ({"init_args": given} if (given := callback.report_settings()) else {})
        for callback in callbacks
    ]
    run: dict[str, Any] = {
        "trainer": {
            **{name: value for name, value in values.items() if value not in (usual[name], None)},
            "accelerator": trainer.strategy.root_device.type,
            "callbacks": own,
        },
        "model": {"class_path": path_of(type(trainer.lightning_module))},
    }
    if (datamodule := getattr(trainer, "datamodule", None)) is not None:
        run["data"] = {"class_path": path_of(type(datamodule))}
    return as_yaml(run, depth=4)
