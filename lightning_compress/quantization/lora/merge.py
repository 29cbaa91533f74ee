"""`merge_adapters`: a plain float model from one with adapters."""

from __future__ import annotations

from lightning_compress.errors import CompressionError
from lightning_compress.modules.copying import copy_module
from lightning_compress.structure.change import is_float, recorded, to_float_
from lightning_compress.structure.checkpoint import detach
from lightning_compress.structure.files import Model


def merge_adapters(model: Model) -> Model:
    """Make a plain float copy of a model that `QLoRA` trained, with ``W + (alpha / rank) B A`` in each adapted layer.

    Args:
        model: with adapters; it is left as it is.

    Returns:
        A copy of plain float layers, with the keys that the model had before adapters came.

    Raises:
        CompressionError: the model has no adapters.
    """
    forms = [record.get("form") for change, record in recorded(model) if not change.is_float]
    if forms != ["adapted"]:
        raise CompressionError(
            f"`model` must have adapters. Received: one that is {'float' if is_float(model) else forms[0]}. Fit it "
            "with QLoRA first."
        )
    twin = copy_module(model)
    to_float_(twin)
    detach(twin)
    return twin
