"""Guesses which width may shrink where one is split, or several are flattened into one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_compress.channels.tracing.disjoint_sets import BUFFER, MADE, PARAMETER
from lightning_compress.channels.tracing.tracer import Tracer, first_along, spread, varying


def take_parts(tracer: Tracer, factor: Tensor, dim: int, parts: Sequence[Sequence[int]], certain: bool = False) -> None:
    """Note that parts of a width, by their places, are taken; equal parts that make up all of it stay equal.

    Unless that is ``certain`` it is a guess, as their lengths may have been written apart.
    """
    labels = first_along(factor, dim)
    ends = sorted({end for part in parts if part for end in (part[0], part[-1] + 1)} - {0, len(labels)})
    tracer.note_written(factor.shape, spread(labels, dim, factor.dim()), ends=ends)
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
        alike = {places: taken for places, taken in known.items() if len(places) == len(part)}
        key = f"{tracer.path}:{len(labels)} by {len(part)}"
        if len(alike) * len(part) == len(labels) == len({place for places in alike for place in places}):
            tracer.splits.setdefault(key, []).append(labels)
            if certain or tracer.choices.get(key, 0) % 2 == 0:
                tracer.sets.union(torch.stack([*alike.values()]), known[part])


def one_width(tracer: Tracer, tensor: Tensor, factors: list[Tensor]) -> tuple[Tensor, ...]:
    """Choose the one width that can shrink where several are flattened into one dimension."""
    for dim in range(tensor.dim()):
        here = [factor for factor in factors if factor.shape[dim] > 1]
        if len(here) > 1:
            order = _in_order(tracer, here, dim)
            chosen = order[0]
            able = [factor for factor in order if tracer.sets.origin(factor) != BUFFER]
            if len(able) > 1:
                key = f"{tracer.path}:{list(tensor.shape)} holds {len(here)}"
                tracer.splits.setdefault(key, []).append(torch.cat([factor.flatten() for factor in able]))
                chosen = able[tracer.choices.get(key, 0) % len(able)]
            for factor in here:
                if factor is not chosen:
                    tracer.sets.freeze(factor, f"another width shares its dimension, in {tracer.where()}")
            factors = [factor for factor in factors if factor is chosen or factor.shape[dim] == 1]
    return tuple(factors)


def _in_order(tracer: Tracer, factors: list[Tensor], dim: int) -> list[Tensor]:
    """Order widths: those of parameters first, outer ones before inner ones; of heads that share keys, the more."""
    labels = [first_along(factor, dim) for factor in factors]
    origins = [tracer.sets.origin(factor) for factor in factors]
    counts = [len(along.unique()) for along in labels]
    most = max((count for count, origin in zip(counts, origins, strict=True) if origin == PARAMETER), default=0)
    ranks = [
        (-1 if origin == MADE and count > most else origin, -int((along != along[0]).nonzero()[0]))
        for along, count, origin in zip(labels, counts, origins, strict=True)
    ]
    return [factors[place] for place in sorted(range(len(factors)), key=ranks.__getitem__)]


def split_width(tracer: Tracer, before: Tensor, after: Tensor, sizes: Any) -> Tensor:
    """Choose the one dimension that can shrink where a view splits a width into several."""
    if len(varying(after)) > len(varying(before)):
        key = f"{tracer.path}:{list(after.shape)}"
        dims = varying(after)
        options = _split_options(tracer, after, list(sizes))
        keep = options[tracer.choices.get(key, 0) % len(options)]
        if tracer.sets.origin(before) == PARAMETER:
            tracer.splits.setdefault(key, []).append(after.flatten())
        flat = after
        for dim in dims:
            if dim not in keep:
                first = flat.narrow(dim, 0, 1)
                tracer.sets.union(flat, first)
                flat = first
        after = flat
    for dim in varying(after):
        if dim < len(sizes) and sizes[dim] > 1:
            tracer.note_size(int(sizes[dim]), first_along(after, dim))
    return after


def _split_options(tracer: Tracer, after: Tensor, sizes: list[int]) -> list[tuple[int, ...]]:
    """Return the dimensions that may go on telling channels apart, the likeliest first."""
    dims = varying(after)
    numbers = tracer.numbers.get(tracer.path, set())
    options: list[tuple[int, ...]] = []
    # Blocks whose number is an attribute of the module, as of heads; what lies inside a block stays whole.
    blocks = [place for place, dim in enumerate(dims[:-1]) if len(first_along(after, dim).unique()) in numbers]
    options += [dims[: place + 1] for place in reversed(blocks)]
    options += [(dims[place],) for place in reversed(blocks)]  # such as queries, keys and values alike
    options += [(dim,) for dim in dims if sizes[dim] == -1]
    options += [dims[:1], dims[:-1], dims[-1:]]
    return list(dict.fromkeys(options))
