"""How far off is a model of which one layer alone is quantized?"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.modules.agreement import Run, outputs_of
from lightning_compress.modules.copying import copy_module
from lightning_compress.modules.paths import is_at_or_below, module_at, modules_of
from lightning_compress.modules.routing import form_before, form_of, route_, unroute_
from lightning_compress.quantization.convert import record_of, revert_
from lightning_compress.quantization.static.errors import layers_of, round_alone_
from lightning_compress.quantization.static.traced import Traced


def errors_alone(quantized: nn.Module, batches: Sequence[Any], run: Run) -> dict[str, float]:
    """Return the error of a model's outputs that each quantized layer causes alone, all others in float.

    That is ``|y' - y|^2 / |y|^2`` of what the outermost calls give, all of them together.

    Args:
        quantized: a converted model that can be reverted; it is only read.
        batches: on which it is measured: once for each layer.
        run: runs a batch through a model.

    Returns:
        Dotted paths of the quantized modules, each with the error.
    """
    record = record_of(quantized)
    assert record is not None
    floats = copy_module(quantized, list(quantized.parameters()))
    revert_(floats, "float")
    exact = outputs_of(floats, batches, run)
    errors: dict[str, float] = {}
    for layer in record["layers"]:
        form, module = form_of(module_at(quantized, layer["path"])), module_at(floats, layer["path"])
        assert form is not None
        route_(module, copy.deepcopy(form))
        errors[layer["path"]] = _error(exact, outputs_of(floats, batches, run))
        unroute_(module)
    paths = modules_of(quantized)
    for path, module in paths.items():
        if not isinstance(form := form_before(module), Traced) or form.graph is None:
            continue
        for inner in layers_of(form):
            prepared = copy_module(quantized, list(quantized.parameters()))
            revert_(prepared, "prepared")
            unit = form_of(module_at(prepared, path))
            assert isinstance(unit, Traced)
            round_alone_(unit, inner)
            owner = f"{path}.{inner}".strip(".")
            while owner not in paths:  # a matrix of a module's own
                owner = owner.rpartition(".")[0]
            errors[owner] = max(_error(exact, outputs_of(prepared, batches, run)), errors.get(owner, 0.0))
    whole: dict[str, float] = {}
    for path, error in errors.items():  # parts of attention go with it
        holder = next(other for other in errors if is_at_or_below(path, other))
        whole[holder] = max(error, whole.get(holder, 0.0))
    return whole


def _error(exact: Sequence[Sequence[Any]], got: Sequence[Sequence[Any]]) -> float:
    off = size = 0.0
    for first, second in zip(pytree.tree_leaves(list(exact)), pytree.tree_leaves(list(got)), strict=False):
        if isinstance(first, Tensor) and first.is_floating_point() and first.shape == second.shape:
            off += (second.double() - first.double()).square().sum().item()
            size += first.double().square().sum().item()
    error = off / max(size, 1e-30)
    return math.inf if math.isnan(error) else error
