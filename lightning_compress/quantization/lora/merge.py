"""`merge_adapters`: a plain float model from one with adapters."""

from __future__ import annotations

from lightning_compress.errors import CompressionError
from lightning_compress.modules.copying import copy_module
from lightning_compress.quantization import convert
from lightning_compress.structure.checkpoint import detach
from lightning_compress.structure.files import Model


def merge_adapters(model: Model) -> Model:
    """A plain float copy of a model that `QLoRA` trained, with ``W + (alpha / rank) B A`` in each adapted layer.

    Args:
        model: with adapters; it is left as it is.

    Returns:
        A copy of plain float layers, with the keys that the model had before adapters came.

    Raises:
        CompressionError: the model has no adapters.
    """
    if convert.form_of(model) != "adapted":
        raise CompressionError(
            f"`model` must have adapters. Received: one that is {convert.form_of(model)}. Fit it with QLoRA first."
        )
    twin = copy_module(model)
    convert.revert_(twin, "float")
    detach(twin)
    return twin
