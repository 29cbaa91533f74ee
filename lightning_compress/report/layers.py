"""What became of each layer: its bytes before and after, paired by name, and in words."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from lightning_compress.report.render import factor, on_one_line
from lightning_compress.report.storage import LayerMeasurement

_MOST_LAYERS = 18
_LONGEST_NAME = 30


class LayerPair(NamedTuple):
    """A layer before and after; None where it isn't."""

    name: str
    before: LayerMeasurement | None
    after: LayerMeasurement | None


def paired(before: Sequence[LayerMeasurement], after: Sequence[LayerMeasurement]) -> list[LayerPair]:
    """Pair the layers of two models by name, in the model's order."""
    old, new = ({layer.name: layer for layer in layers} for layers in (before, after))
    return [LayerPair(name, old.get(name), new.get(name)) for name in dict.fromkeys([*old, *new])]


def largest(pairs: Sequence[LayerPair], most: int = _MOST_LAYERS) -> list[LayerPair]:
    """Keep the largest pairs in the model's order, and add the rest up as one."""
    by_size = sorted(pairs, key=lambda pair: -max(size_of(pair.before), size_of(pair.after)))
    shown = {pair.name for pair in (by_size if len(pairs) <= most else by_size[: most - 1])}
    kept = [pair for pair in pairs if pair.name in shown]
    if rest := [pair for pair in pairs if pair.name not in shown]:
        before, after = ([layer for layer in side if layer] for side in zip(*(pair[1:] for pair in rest), strict=True))
        kept.append(LayerPair(f"{len(rest)} others", _total(before), _total(after)))
    return kept


def _total(layers: Sequence[LayerMeasurement]) -> LayerMeasurement:
    return LayerMeasurement(
        name="",
        type="",
        parameters=sum(layer.parameters for layer in layers),
        nonzeros=sum(layer.nonzeros for layer in layers),
        size_bytes=sum(layer.size_bytes for layer in layers),
        dtype=layers[0].dtype if len({layer.dtype for layer in layers}) == 1 else "mixed",
    )


def size_of(layer: LayerMeasurement | None) -> int:
    """Return the bytes of a layer; of one that isn't there, 0."""
    return layer.size_bytes if layer else 0


def saved(pair: LayerPair) -> str:
    """Say what became of the bytes of a layer."""
    before, after = size_of(pair.before), size_of(pair.after)
    if pair.after is None or before > after == 0:
        return "gone"
    if before == 0 < after:
        return "new"
    if abs(before - after) <= 0.01 * after:
        return "same"
    return f"{factor(before / after)}x" if before > after else f"{factor(after / before)}x larger"


def became(pair: LayerPair) -> str:
    """Say what became of a layer: of its bytes, its type and its zeros."""
    parts, layer = [saved(pair)], pair.after
    if layer is None or parts == ["gone"]:
        return "gone"
    if layer.dtype not in ("float32", "mixed"):
        parts.append(layer.dtype)
    return ", ".join([*parts, f"{zeros(layer)}% zeros"] if zeros(layer) >= 1 else parts)


def zeros(layer: LayerMeasurement | None) -> int:
    """Return how many per cent of a layer are zero, rounded down: only a layer without a weight is all zeros."""
    return math.floor(100 * (1 - layer.nonzeros / layer.parameters)) if layer and layer.parameters else 0


def bits_of(dtype: str) -> int | None:
    """Return the bits of a value by the name of its type; None where the name has none.

    Example:
        >>> [bits_of(name) for name in ("float32", "qint8", "4 bits", "mixed")]
        [32, 8, 4, None]
    """
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else None


def short_name(name: str, longest: int = _LONGEST_NAME) -> str:
    """Shorten a name so that it fits beside a picture."""
    name = on_one_line(name)
    # The end of a layer's name tells layers apart, the beginning is what they share.
    return name if len(name) <= longest else "…" + name[-(longest - 1) :]
