"""Rules of operators that multiply by weights: matrix products, convolutions, attention, look-ups in tables."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from lightning_compress.channels.tracing.tracer import Tracer, leaves, name_of, spread, unknown


def product(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """A matrix product: the contracted width ends, the others go on. A bias comes first in its operators."""
    *bias, left, right = args[: 3 if name_of(func).startswith(("addmm", "baddbmm")) else 2]
    inner = tracer.same((left, -1), (right, -2))
    rank = out.dim()
    batch = tracer.same((left, 0), (right, 0)) if rank == 3 else None
    rows, columns = tracer.along(left, -2), tracer.along(right, -1)
    if tracer.is_weight(right):
        # A product of two weights: in `x @ (a @ b).T`, as layers write it, the second is the first to be applied.
        made = inner if tracer.is_weight(left) else columns
        tracer.outer += [] if made is None else [made]
    elif tracer.is_weight(left) and rows is not None:
        tracer.outer.append(rows)
    factors = spread(batch, 0, rank) + spread(rows, -2, rank) + spread(columns, -1, rank)
    tracer.costs(out.numel() * left.shape[-1], inner, rows, columns, batch)
    if bias:
        factors = tracer.meet([(tuple(out.shape), factors), tracer.operand(bias[0], rank)])
    tracer.set(out, factors)


def grouped_product(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """A matrix product in which each block of rows has a weight of its own, as of experts: their number stays."""
    left, right = args[:2]
    if (left.dim(), right.dim()) != (2, 3):
        return unknown(tracer, func, args, kwargs, out)
    for labels in (tracer.along(left, 0), tracer.along(right, 0)):
        tracer.sets.freeze(labels, f"the number of weights that take turns, in {tracer.where()}")
    inner, columns = tracer.same((left, -1), (right, -2)), tracer.along(right, -1)
    tracer.outer += [] if columns is None else [columns]
    tracer.costs(out.numel() * left.shape[-1], inner, columns)
    tracer.set(out, spread(columns, -1, 2))


def convolution(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Each group of outputs sees its group of inputs."""
    x, weight, bias, groups = args[0], args[1], args[2], args[8]
    transposed = bool(args[6])
    ins, outs = (0, 1) if transposed else (1, 0)
    batched = x.dim() == weight.dim()
    channel = 1 if batched else 0
    for dim in range(2, weight.dim()):
        tracer.sets.freeze(tracer.along(weight, dim), "the kernel's size")
    macs = (x.numel() if transposed else out.numel()) * weight[0].numel()
    if groups == 1:
        inner = tracer.same((x, channel), (weight, ins))
        outer = tracer.along(weight, outs)
        widths = [inner, outer]
    else:
        outer, widths = _grouped(tracer, x, channel, weight, groups, transposed)
    batch = tracer.along(x, 0) if batched else None  # heads may lie there
    tracer.costs(macs, batch, *widths)
    if outer is not None:
        tracer.outer.append(outer)
    if outer is not None and bias is not None:
        biases = tracer.along(bias, 0)
        if biases is None:
            tracer.sets.freeze(outer, "a bias of fixed size")
        else:
            tracer.sets.union(outer, biases)
    tracer.set(out, (*spread(batch, 0, out.dim()), *spread(outer, channel, out.dim())))


def _grouped(
    tracer: Tracer, x: Tensor, channel: int, weight: Tensor, groups: int, transposed: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the output's labels of a grouped convolution, and the widths that its cost is proportional to."""
    inputs = tracer.along(x, channel)
    per_in = x.shape[channel] // groups
    # A grouped weight is (out, in / groups), transposed (in, out / groups).
    whole, part = tracer.along(weight, 0), tracer.along(weight, 1)
    per_out = weight.shape[1] if transposed else weight.shape[0] // groups
    if inputs is None:
        for labels in (whole, part):
            tracer.sets.freeze(labels, f"groups of a fixed input in {tracer.where()}")
        return None, []
    if whole is None or (part is None and weight.shape[1] > 1):
        tracer.sets.freeze(inputs, f"grouped weights that are computed, in {tracer.where()}")
        return None, []
    if groups >= per_in:
        # Whole groups go, with all their inputs and outputs.
        blocks = inputs.view(groups, per_in)
        tracer.sets.union(blocks, blocks[:, :1])
        tracer.sets.union(whole.view(groups, -1), blocks[:, :1])
        tracer.sets.freeze(part, "inputs or outputs within a group")
        tracer.note_size(groups, blocks[:, 0])
        return (blocks[:, 0].repeat_interleave(per_out) if transposed else whole), [blocks[:, 0]]
    # The same places go in every group.
    blocks = inputs.view(groups, per_in)
    tracer.sets.union(blocks, blocks[:1])
    outer = part if transposed else whole
    other = whole if transposed else part
    if other is not None:
        other = other.view(groups, per_in) if transposed else other
        tracer.sets.union(other, blocks)
    if outer is None:
        return None, [blocks[0]]
    if transposed:
        return outer.repeat(groups), [blocks[0], outer]
    outs = outer.view(groups, per_out)
    tracer.sets.union(outs, outs[:1])
    return outer, [blocks[0], outs[0]]


def attention(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Scaled dot products: heads go together, and with grouped queries all of a group's."""
    query, key, value = args[:3]
    out = out[0] if isinstance(out, tuple) else out
    if (inner := tracer.same((query, -1), (key, -1))) is not None:
        tracer.sets.span(inner, f"attention's scale hangs on it, in {tracer.where()}")
    heads = _heads(tracer, query, key, value) if query.dim() == 4 else None
    for mask in leaves((args[3:], kwargs)):
        if heads is None or mask.dim() != 4 or mask.shape[1] == 1:
            continue
        if (in_mask := tracer.along(mask, 1)) is not None:
            tracer.sets.union(heads, in_mask)
        elif mask.stride(1):
            tracer.sets.freeze(heads, f"a mask with a part for each head, in {tracer.where()}")
    macs = math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    tracer.costs(macs, heads)
    tracer.set(out, spread(heads, 1, out.dim()) + spread(tracer.along(value, -1), -1, out.dim()))


def _heads(tracer: Tracer, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
    """Return the labels of heads. Where several share a key, whole groups can go, or the same heads of each."""
    heads, shared = tracer.along(query, 1), tracer.same((key, 1), (value, 1))
    groups = key.shape[1]
    if heads is None or (shared is None and groups > 1):
        for labels in (heads, shared):
            tracer.sets.freeze(labels, f"it meets a fixed number of heads in {tracer.where()}")
        return heads
    blocks = heads.view(groups, -1)
    within = blocks.shape[1] > groups  # the finer way first
    if shared is not None and blocks.shape[1] > 1:
        name = f"{tracer.path}:{len(heads)} heads share {groups} keys"
        tracer.splits.setdefault(name, []).append(heads)
        within ^= bool(tracer.choices.get(name, 0) % 2)
    if within:
        tracer.sets.union(blocks, blocks[:1])
        tracer.sets.freeze(shared, f"keys that several heads share, in {tracer.where()}")
    elif shared is not None:
        tracer.sets.union(blocks, shared[:, None])
    return heads


def weight_norm(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """A direction and its magnitudes: the magnitudes are set anew when inputs go, so that weights stay."""
    direction, magnitude, dim = (*args, 0)[:3]
    if magnitude.dim():
        tracer.same((direction, dim), (magnitude, dim))
    for leaf in out:
        if leaf.shape == direction.shape:
            tracer.set(leaf, tracer.labels(direction))


def embedding(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Rows are looked up."""
    weight = args[0]
    out = out[0] if isinstance(out, tuple) else out
    tracer.sets.freeze(tracer.along(weight, 0), "the rows of an embedding")
    tracer.set(out, spread(tracer.along(weight, 1), -1, out.dim()))
