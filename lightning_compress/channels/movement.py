"""Rules of operators that only move elements about: views, slices, concatenations, look-ups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_compress.channels.tracer import BUFFER, MADE, PARAMETER, Tracer, compressed, spread, varying

VIEWS = {"view", "_unsafe_view", "_reshape_alias"}
PARTS = {"slice", "split", "split_with_sizes"}


def move(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Elements go elsewhere: so do their labels, by the very same operator."""
    tensor, *rest = args
    outs = list(out) if isinstance(out, (tuple, list)) else [out]
    found: list[list[Tensor]] = [[] for _ in outs]
    name = func._schema.name.rpartition("::")[2].rstrip("_")
    if any(isinstance(leaf, Tensor) for leaf in rest):
        return tracer.unknown(func, args, kwargs, out)
    functional = getattr(torch.ops.aten, name)
    for factor in tracer.labels(tensor):
        moved = functional(factor.expand(tensor.shape).contiguous(), *rest, **_without_format(kwargs))
        moved = list(moved) if isinstance(moved, (tuple, list)) else [moved]
        if name in PARTS:
            given = _given(func, args, kwargs)
            if (size := factor.shape[given.get("dim", 0)]) > 1:
                take_parts(tracer, factor, given.get("dim", 0), _places(given, size), tied=name == "split")
        for one, part in zip(found, moved, strict=True):
            part = compressed(part)
            if name in VIEWS:
                part = _split_width(tracer, factor, part, rest[0])
            one.append(part)
    if name in ("expand", "repeat"):
        found[0] += tracer.made(out, _copied(tensor, out))
    for leaf, factors in zip(outs, found, strict=True):
        tracer.set(leaf, one_width(tracer, leaf, factors) if name in VIEWS else tuple(factors))
        if name in VIEWS or name == "expand":
            tracer.note_written(tensor.shape, tracer.labels(tensor), (leaf, tracer.labels(leaf)))


def _without_format(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != "memory_format"}


def _copied(tensor: Tensor, out: Tensor) -> list[int]:
    """The dimensions along which a tensor is the same, such as one key head for many query heads; not the batch."""
    missing = out.dim() - tensor.dim()
    return [dim for dim in range(1, out.dim()) if dim < missing or tensor.shape[dim - missing] == 1]


def _given(func: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _places(given: Mapping[str, Any], size: int) -> list[range]:
    """The places along a width of this size that each part takes."""
    if "split_size" not in given and "split_sizes" not in given:
        return [range(size)[slice(given.get("start"), given.get("end"), given.get("step"))]]
    sizes = given.get("split_sizes") or [given["split_size"]] * -(-size // given["split_size"])
    return [range(size)[end - one : end] for one, end in zip(sizes, accumulate(sizes), strict=True)]


def take_parts(tracer: Tracer, factor: Tensor, dim: int, parts: Sequence[Sequence[int]], tied: bool = False) -> None:
    """Parts of a width are taken. Those that are as long as each other and make up all of it stay so.

    Args:
        tracer: notes the sizes that may have been written.
        factor: labels of the whole.
        dim: of the width.
        parts: the places of each.
        tied: whether that is certain; else it is a guess, as their lengths may have been written apart.
    """
    labels = _first_along(factor, dim)
    ends = sorted({end for part in parts if part for end in (part[0], part[-1] + 1)} - {0, len(labels)})
    tracer.note_written(factor.shape, (spread(len(labels), labels, dim, factor.dim()),), ends=ends)
    known = tracer.parts.setdefault(tuple(labels.tolist()), {})
    for part in parts:
        if len(part) in (0, len(labels)):
            continue
        part = tuple(part)
        known[part] = labels[list(part)]
        tracer.note_size(len(labels), labels)
        tracer.note_size(len(part), known[part])
        for end in {part[0], part[-1] + 1} - {0, len(labels)}:
            tracer.note_size(end, labels[:end])
        alike = {one: mine for one, mine in known.items() if len(one) == len(part)}
        key = f"{tracer.path}:{len(labels)} by {len(part)}"
        if len(alike) * len(part) == len(labels) == len({place for one in alike for place in one}):
            tracer.splits.setdefault(key, []).append(labels)
            if tied or tracer.choices.get(key, 0) % 2 == 0:
                tracer.atoms.tie(torch.stack([*alike.values()]), known[part])


def one_width(tracer: Tracer, tensor: Tensor, factors: list[Tensor]) -> tuple[Tensor, ...]:
    """Where several widths are flattened into one dimension only one of them can shrink: choose which."""
    for dim in range(tensor.dim()):
        here = [factor for factor in factors if factor.shape[dim] > 1]
        if len(here) > 1:
            order = _in_order(tracer, here, dim)
            chosen = order[0]
            able = [factor for factor in order if tracer.origin(factor) != BUFFER]
            if len(able) > 1:
                key = f"{tracer.path}:{list(tensor.shape)} holds {len(here)}"
                tracer.splits.setdefault(key, []).append(torch.cat([factor.flatten() for factor in able]))
                chosen = able[tracer.choices.get(key, 0) % len(able)]
            for factor in here:
                if factor is not chosen:
                    tracer.atoms.pin(factor, f"another width shares its dimension, in {tracer.where()}")
            factors = [factor for factor in factors if factor is chosen or factor.shape[dim] == 1]
    return tuple(factors)


def _in_order(tracer: Tracer, factors: list[Tensor], dim: int) -> list[Tensor]:
    """Widths of parameters first, outer ones before what lies within; but of heads that share keys, the more."""
    labels = [_first_along(factor, dim) for factor in factors]
    origins = [tracer.origin(factor) for factor in factors]
    counts = [len(one.unique()) for one in labels]
    most = max((count for count, origin in zip(counts, origins, strict=True) if origin == PARAMETER), default=0)
    ranks = [
        (-1 if origin == MADE and count > most else origin, -int((one != one[0]).nonzero()[0]))
        for one, count, origin in zip(labels, counts, origins, strict=True)
    ]
    return [factors[place] for place in sorted(range(len(factors)), key=ranks.__getitem__)]


def _first_along(factor: Tensor, dim: int) -> Tensor:
    return factor.movedim(dim, 0).reshape(factor.shape[dim], -1)[:, 0]


def _split_width(tracer: Tracer, before: Tensor, after: Tensor, sizes: Any) -> Tensor:
    """Where a view splits one width into several dimensions, only one of them can shrink: choose which."""
    if len(varying(after)) > len(varying(before)):
        key = f"{tracer.path}:{list(after.shape)}"
        dims = varying(after)
        options = _split_options(tracer, after, list(sizes))
        keep = options[tracer.choices.get(key, 0) % len(options)]
        if tracer.origin(before) == PARAMETER:
            tracer.splits.setdefault(key, []).append(after.flatten())
        flat = after
        for dim in dims:
            if dim not in keep:
                first = flat.narrow(dim, 0, 1)
                tracer.atoms.tie(flat, first)
                flat = first
        after = flat
    for dim in varying(after):
        if dim < len(sizes) and sizes[dim] > 1:
            tracer.note_size(int(sizes[dim]), _first_along(after, dim))
    return after


def _split_options(tracer: Tracer, after: Tensor, sizes: list[int]) -> list[tuple[int, ...]]:
    """The dimensions that may go on telling channels apart, the likeliest first."""
    dims = varying(after)
    numbers = tracer.numbers.get(tracer.path, set())
    options: list[tuple[int, ...]] = []
    # Blocks whose number is an attribute of the module, as of heads; what lies inside a block stays whole.
    blocks = [place for place, dim in enumerate(dims[:-1]) if len(_first_along(after, dim).unique()) in numbers]
    options += [dims[: place + 1] for place in reversed(blocks)]
    options += [(dims[place],) for place in reversed(blocks)]  # such as queries, keys and values alike
    options += [(dim,) for dim in dims if sizes[dim] == -1]
    options += [dims[:1], dims[:-1], dims[-1:]]
    return list(dict.fromkeys(options))


def cat(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Side by side along one dimension; in the others, channels that meet are one."""
    tensors = [tensor for tensor in args[0] if tensor.numel()]
    rank = out.dim()
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % rank
    if func._schema.name.endswith("stack"):
        operands = [
            ((*tensor.shape[:dim], 1, *tensor.shape[dim:]), [f.unsqueeze(dim) for f in tracer.labels(tensor)])
            for tensor in tensors
        ]
        tracer.set(out, tracer.meet(operands))
        return
    across, aside = [], list[list[Tensor]]()
    for tensor in tensors:
        mine = tracer.labels(tensor)
        across.append([factor for factor in mine if factor.shape[dim] == 1])
        here = tracer.along(tensor, dim)
        aside.append([] if here is None else [here])
    shapes = [tuple(1 if one == dim else size for one, size in enumerate(tensor.shape)) for tensor in tensors]
    factors = list(tracer.meet(list(zip(shapes, across, strict=True))))
    if any(aside):
        joined = [
            labels[0] if labels else torch.zeros(tensor.shape[dim], dtype=torch.int64)
            for tensor, labels in zip(tensors, aside, strict=True)
        ]
        factors.append(spread(out.shape[dim], torch.cat(joined), dim, rank))
    tracer.set(out, tuple(factors))


def index(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Places are looked up: a width that they number stays, the others go on."""
    x, *rest = args
    chosen = rest[0] if isinstance(rest[0], (list, tuple)) else [None] * (rest[0] % x.dim()) + [rest[1]]
    dims = {dim for dim, places in enumerate(chosen) if places is not None}
    if any(places is not None and places.dtype == torch.bool and places.dim() > 1 for places in chosen):
        return tracer.unknown(func, args, kwargs, out)  # counts dimensions otherwise
    factors = []
    functional = getattr(torch.ops.aten, func._schema.name.rpartition("::")[2])
    for factor in tracer.labels(x):
        if dims & set(varying(factor)) and not _counted(tracer, factor, chosen):
            tracer.atoms.pin(factor, f"its places are numbered in {tracer.where()}")
        else:
            factors.append(functional(factor.expand(x.shape), *pytree.tree_map(_on_cpu, rest), **kwargs))
    for places in rest:
        tracer.pin(places, f"a number of places in {tracer.where()}")
    tracer.set(out, tuple(factors))


def _counted(tracer: Tracer, factor: Tensor, chosen: Sequence[Any]) -> bool:
    """Whether places are taken in an order that the code itself counts, which may follow; they are a part then."""
    [(dim, places), *others] = [(dim, places) for dim, places in enumerate(chosen) if places is not None]
    if others or not tracer.is_made(places) or places.dim() != 1 or places.dtype == torch.bool:
        return False
    take_parts(tracer, factor, dim, [tuple(places.tolist())])
    return True


def _on_cpu(leaf: Any) -> Any:
    return leaf.cpu() if isinstance(leaf, Tensor) else leaf


def scatter(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Places along one dimension are numbered; in the others, channels that meet are one."""
    x, dim, _, source = args[:4]
    if not isinstance(source, Tensor) or source.dim() != x.dim():
        return tracer.unknown(func, args, kwargs, out)
    operands = []
    for tensor in (x, source):
        if (numbered := tracer.along(tensor, dim)) is not None:
            tracer.atoms.pin(numbered, f"its places are numbered in {tracer.where()}")
        shape = tuple(1 if one == dim % x.dim() else size for one, size in enumerate(tensor.shape))
        operands.append((shape, [factor for factor in tracer.labels(tensor) if factor.shape[dim] == 1]))
    tracer.set(out, tracer.meet(operands))


def sequence(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Sequences are packed or padded: their features go on."""
    x = args[0]
    for factor in tracer.labels(x):
        if set(varying(factor)) - {x.dim() - 1}:
            tracer.atoms.pin(factor, f"sequences are packed in {tracer.where()}")
    width = tracer.along(x, -1)
    tracer.set(out[0], () if width is None else (spread(out[0].shape[-1], width, out[0].dim() - 1, out[0].dim()),))


def shuffle(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Groups are interleaved; they stay as long as each other."""
    x, groups = args[:2]
    labels = tracer.along(x, 1)
    if labels is not None:
        blocks = labels.view(groups, -1)
        tracer.atoms.tie(blocks, blocks[:1])
        tracer.set(out, (spread(x.shape[1], blocks.t().flatten(), 1, x.dim()),))


def glu(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Two halves meet."""
    x = args[0]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", -1)
    factors = []
    for factor in tracer.labels(x):
        if factor.shape[dim] > 1:
            factor, other = factor.chunk(2, dim)
            tracer.atoms.tie(factor, other)
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
        tracer.atoms.tie(blocks, blocks[:, :1])
        labels = blocks[:, 0]
    tracer.set(out, (spread(len(labels), labels, out.dim() - 3, out.dim()),))
