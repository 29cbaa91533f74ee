"""The rule of views that are written as strides: labels lie in memory as the elements do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_compress.channels.tracing.tracer import Tracer


def strided(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Each element of the view has the labels of the place in memory that it reads."""
    x: Tensor = args[0]
    if out is x:  # in place only the strides of dimensions with one place change, as where a map is pooled to a point
        return None
    start = out.storage_offset() - x.storage_offset()
    last = sum((size - 1) * stride for size, stride in zip(out.shape, out.stride(), strict=True))
    dense = torch.ops.aten.is_non_overlapping_and_dense(x)
    if not dense or start < 0 or start + last >= x.numel():
        return tracer.unknown(func, args, kwargs, out)
    moved = []
    for factor in tracer.labels(x):
        memory = torch.empty(x.numel(), dtype=factor.dtype)
        memory.as_strided(x.shape, x.stride()).copy_(factor.expand(x.shape))
        moved.append(memory.as_strided(out.shape, out.stride(), start))
    tracer.set(out, tuple(moved))
