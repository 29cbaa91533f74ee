"""Rules of operators that only move elements about: views, slices, concatenations, look-ups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_compress.channels.tracing.disjoint_sets import FIXED
from lightning_compress.channels.tracing.splits import one_width, split_width, take_parts
from lightning_compress.channels.tracing.tracer import (
    Operand,
    Tracer,
    compressed,
    given,
    name_of,
    spread,
    unknown,
    varying,
)

VIEWS = {"view", "_unsafe_view", "_reshape_alias"}
PARTS = {"slice", "split", "split_with_sizes"}


def move(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Elements go elsewhere: so do their labels, by the very same operator."""
    tensor, *rest = args
    outs = list(out) if isinstance(out, (tuple, list)) else [out]
    found: list[list[Tensor]] = [[] for _ in outs]
    name = name_of(func).rstrip("_")
    if any(isinstance(leaf, Tensor) for leaf in rest):
        return unknown(tracer, func, args, kwargs, out)
    functional = getattr(torch.ops.aten, name)
    options = {key: value for key, value in kwargs.items() if key != "memory_format"}
    for factor in tracer.labels(tensor):
        spread_out = factor.expand(tensor.shape)  # what is the same along a dimension takes no memory
        moved = spread_out.reshape(rest[0]) if name in VIEWS else functional(spread_out, *rest, **options)
        moved = list(moved) if isinstance(moved, (tuple, list)) else [moved]
        if name in PARTS:
            named = given(func, args, kwargs)
            dim = named.get("dim", 0)
            if (size := factor.shape[dim]) > 1:
                take_parts(tracer, factor, dim, _places(named, size), certain=name == "split")
        for factors, part in zip(found, moved, strict=True):
            part = compressed(part)
            if name in VIEWS:
                part = split_width(tracer, factor, part, rest[0])
            factors.append(part)
    if name in ("expand", "repeat"):
        found[0] += tracer.made(out, _copied(tensor, out))
    for leaf, factors in zip(outs, found, strict=True):
        tracer.set(leaf, one_width(tracer, leaf, factors) if name in VIEWS else tuple(factors))
        if name in VIEWS or name == "expand":
            tracer.note_written(tensor.shape, tracer.labels(tensor), (leaf, tracer.labels(leaf)))


def _copied(tensor: Tensor, out: Tensor) -> list[int]:
    """Return dimensions along which a tensor is repeated, such as a key head for many query heads; not the batch."""
    missing = out.dim() - tensor.dim()
    return [dim for dim in range(1, out.dim()) if dim < missing or tensor.shape[dim - missing] == 1]


def _places(named: Mapping[str, Any], size: int) -> list[range]:
    """Return the places along a width of this size that each part takes."""
    if "split_size" not in named and "split_sizes" not in named:
        return [range(size)[slice(named.get("start"), named.get("end"), named.get("step"))]]
    sizes = named.get("split_sizes") or [named["split_size"]] * -(-size // named["split_size"])
    return [range(size)[end - length : end] for length, end in zip(sizes, accumulate(sizes), strict=True)]


def cat(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Side by side along one dimension; in the others, channels that meet are one."""
    tensors = [tensor for tensor in args[0] if tensor.numel()]
    rank = out.dim()
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % rank
    if func._schema.name.endswith("stack"):
        operands: list[Operand] = [
            ((*tensor.shape[:dim], 1, *tensor.shape[dim:]), [f.unsqueeze(dim) for f in tracer.labels(tensor)])
            for tensor in tensors
        ]
        tracer.set(out, tracer.meet(operands))
        return
    joined = [tracer.along(tensor, dim) for tensor in tensors]
    factors = tracer.meet([_across(tracer, tensor, dim) for tensor in tensors])
    if any(labels is not None for labels in joined):
        parts = [
            torch.full((tensor.shape[dim],), FIXED) if labels is None else labels
            for tensor, labels in zip(tensors, joined, strict=True)
        ]
        factors += spread(torch.cat(parts), dim, rank)
    tracer.set(out, factors)


def _across(tracer: Tracer, tensor: Tensor, dim: int) -> Operand:
    """Return a tensor as what meets others in all dimensions but one."""
    shape = tuple(1 if place == dim % tensor.dim() else size for place, size in enumerate(tensor.shape))
    return shape, [factor for factor in tracer.labels(tensor) if factor.shape[dim] == 1]


def index(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Places are looked up: a width that they number stays, the others go on."""
    x, *rest = args
    chosen = rest[0] if isinstance(rest[0], (list, tuple)) else [None] * (rest[0] % x.dim()) + [rest[1]]
    dims = {dim for dim, places in enumerate(chosen) if places is not None}
    if any(places is not None and places.dtype == torch.bool and places.dim() > 1 for places in chosen):
        return unknown(tracer, func, args, kwargs, out)  # counts dimensions otherwise
    factors = []
    functional, on_cpu = getattr(torch.ops.aten, name_of(func)), pytree.tree_map_only(Tensor, Tensor.cpu, rest)
    for factor in tracer.labels(x):
        if dims & set(varying(factor)) and not _counted(tracer, factor, chosen):
            tracer.sets.freeze(factor, f"its places are numbered in {tracer.where()}")
        else:
            factors.append(functional(factor.expand(x.shape), *on_cpu, **kwargs))
    for places in rest:
        tracer.freeze(places, f"a number of places in {tracer.where()}")
    tracer.set(out, tuple(factors))


def _counted(tracer: Tracer, factor: Tensor, chosen: Sequence[Any]) -> bool:
    """Whether places are taken in an order that the code itself counts, which may follow; they are a part then."""
    [(dim, places), *others] = [(dim, places) for dim, places in enumerate(chosen) if places is not None]
    if others or not tracer.is_made(places) or places.dim() != 1 or places.dtype == torch.bool:
        return False
    take_parts(tracer, factor, dim, [[place % factor.shape[dim] for place in places.tolist()]])
    return True


def scatter(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Places along one dimension are numbered; in the others, channels that meet are one."""
    x, dim, _, source = args[:4]
    if not isinstance(source, Tensor) or source.dim() != x.dim():
        return unknown(tracer, func, args, kwargs, out)
    for tensor in (x, source):
        tracer.sets.freeze(tracer.along(tensor, dim), f"its places are numbered in {tracer.where()}")
    tracer.set(out, tracer.meet([_across(tracer, tensor, dim) for tensor in (x, source)]))


def sequence(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Sequences are packed or padded: their features go on."""
    x = args[0]
    for factor in tracer.labels(x):
        if set(varying(factor)) - {x.dim() - 1}:
            tracer.sets.freeze(factor, f"sequences are packed in {tracer.where()}")
    tracer.set(out[0], spread(tracer.along(x, -1), -1, out[0].dim()))


def shuffle(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Groups are interleaved; they stay as long as each other."""
    x, groups = args[:2]
    labels = tracer.along(x, 1)
    if labels is not None:
        blocks = labels.view(groups, -1)
        tracer.sets.union(blocks, blocks[:1])
        tracer.set(out, spread(blocks.t().flatten(), 1, x.dim()))


def glu(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Two halves meet."""
    x = args[0]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", -1)
    factors = []
    for factor in tracer.labels(x):
        if factor.shape[dim] > 1:
            factor, other = factor.chunk(2, dim)
            tracer.sets.union(factor, other)
        factors.append(factor)
    tracer.set(out, tuple(factors))


def pixel_shuffle(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """``r²`` channels become one."""
    x, factor = args[0], args[1]
    labels = tracer.along(x, -3)
    if labels is None:
        return
    if func._schema.name.endswith("unshuffle"):
        labels = labels.repeat_interleave(factor * factor)
    else:
        blocks = labels.view(-1, factor * factor)
        tracer.sets.union(blocks, blocks[:, :1])
        labels = blocks[:, 0]
    tracer.set(out, spread(labels, -3, out.dim()))


def strided(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Each element of the view has the labels of the place in memory that it reads."""
    x: Tensor = args[0]
    if out is x:  # in place only the strides of dimensions with one place change, as where a map is pooled to a point
        return None
    start = out.storage_offset() - x.storage_offset()
    last = sum((size - 1) * stride for size, stride in zip(out.shape, out.stride(), strict=True))
    dense = torch.ops.aten.is_non_overlapping_and_dense(x)
    if not dense or start < 0 or start + last >= x.numel():
        return unknown(tracer, func, args, kwargs, out)
    moved = []
    for factor in tracer.labels(x):
        memory = torch.empty(x.numel(), dtype=factor.dtype)
        memory.as_strided(x.shape, x.stride()).copy_(factor.expand(x.shape))
        moved.append(memory.as_strided(out.shape, out.stride(), start))
    tracer.set(out, tuple(moved))
