"""Rules of normalisation layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_compress.channels.tracing.factors import spread
from lightning_compress.channels.tracing.tracer import Tracer


def batch_norm(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Channel by channel."""
    x = args[0]
    others = [tensor for tensor in args[1:5] if isinstance(tensor, Tensor)]
    across = [factor for factor in tracer.labels(x) if factor.shape[1] == 1]
    for factor in across:  # a weight that is standardized so
        tracer.atoms.span(factor, f"a norm spans it, in {tracer.where()}", lasting=tracer.atoms.in_weights)
    labels = tracer.same((x, 1), *((tensor, 0) for tensor in others))
    if labels is not None:
        tracer.note_size(x.shape[1], labels)
    tracer.set(out[0], (*across, *(() if labels is None else (spread(x.shape[1], labels, 1, x.dim()),))))


def layer_norm(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Each channel's value depends on all."""
    x, shape, *affine = args[:4]
    out = out[0] if isinstance(out, tuple) else out
    if len(shape) > 1 or not isinstance(affine[0], Tensor):
        tracer.pin(x, f"a norm over several dimensions, or without weights of its own, in {tracer.where()}")
        return None
    others = [tensor for tensor in affine if isinstance(tensor, Tensor)]
    kept = [factor for factor in tracer.labels(x) if factor.shape[-1] == 1]
    labels = tracer.same((x, -1), *((tensor, 0) for tensor in others))
    if labels is not None:
        tracer.atoms.span(labels, f"a norm spans it, in {tracer.where()}")
        kept.append(spread(x.shape[-1], labels, x.dim() - 1, x.dim()))
    tracer.set(out, tuple(kept))


def group_norm(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Each channel's value depends on all of its group; groups stay as long as each other."""
    x, weight, bias, groups = args[0], args[1], args[2], args[6]
    others = [tensor for tensor in (weight, bias) if tensor is not None]
    labels = tracer.same((x, 1), *((tensor, 0) for tensor in others))
    if labels is None:
        return
    if groups == x.shape[1]:
        tracer.atoms.pin(labels, f"as many groups as channels, in {tracer.where()}")
    tracer.atoms.span(labels, f"a norm spans it, in {tracer.where()}")
    tracer.note_size(x.shape[1], labels)
    blocks = labels.view(groups, -1)
    tracer.atoms.tie(blocks, blocks[:1])
    tracer.set(out[0], (spread(x.shape[1], labels, 1, x.dim()),))
