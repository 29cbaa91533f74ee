"""What did it bring, and what did it cost? One sentence, of what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_compress.report.metrics import chosen_metric
from lightning_compress.report.ratios import AFTER, BEFORE, TESTED, Row
from lightning_compress.report.render import factor, on_one_line

_SAME = 0.01


def judged(rows: Sequence[Row], baseline: str) -> Row | None:
    """Return the row that the verdict is about: the last model that isn't the baseline, else the last file."""
    others = [row for row in rows if row.name != baseline]
    models = [row for row in others if row.measurement.file is None and row.measurement.layers]
    return next(reversed(models or others), None)


def verdict(rows: Sequence[Row], baseline: str) -> str:
    """Say in one sentence what became smaller, what became faster or slower, and what it cost.

    Example:
        >>> from torch import nn
        >>> from lightning_compress.report import compare, measure
        >>> compared = compare({"large": measure(nn.Linear(512, 512)), "small": measure(nn.Linear(256, 256))})
        >>> verdict(compared.rows, "large")
        'Compared with large, small is 4.0 times smaller; speed and metrics were not compared.'
    """
    row = judged(rows, baseline)
    if row is None:
        return f"Only {on_one_line(baseline)} was measured: there is nothing to compare it with."
    base = next(other for other in rows if other.name == baseline)
    plain = row.name in (AFTER, TESTED) and baseline == BEFORE
    gains, losses = _gains_and_losses(row)
    who = "The compressed model" if plain else f"Compared with {on_one_line(baseline)}, {on_one_line(row.name)}"
    if gains:
        said = f"{who} is {_listed(gains)}" + (f", but {_listed(losses)}" if losses else "")
    elif plain:
        said = f"Compression brought nothing: the model is {_listed(losses)}"
    else:
        said = f"{who} brought nothing: it is {_listed(losses)}"
    return f"{said}; {_cost(row, base)}."


def _gains_and_losses(row: Row) -> tuple[list[str], list[str]]:
    """Say what is better, and what isn't; batch sizes of which the same is true stand together."""
    ratio = row.size_ratio
    gains, losses = list[str](), list[str]()
    if ratio is None or 1 - _SAME <= ratio <= 1 + _SAME:
        losses.append("no smaller on disk")
    elif ratio > 1:
        gains.append(f"{factor(ratio)} times smaller")
    else:
        losses.append(f"{factor(1 / ratio)} times larger")
    for faster in (True, False, None):
        sizes = [size for size in sorted(row.speedup) if row.is_faster(size) is faster]
        if sizes:
            (gains if faster else losses).extend(_speeds(row, faster, sizes))
    return gains, losses


def _speeds(row: Row, faster: bool | None, sizes: Sequence[int]) -> list[str]:
    where = f"at batch {_listed(list(map(str, sizes)))}"
    if faster is None:
        return [f"not measurably faster {where}"]
    word, ratios = ("faster", row.speedup) if faster else ("slower", {size: 1 / row.speedup[size] for size in sizes})
    factors = {size: factor(ratios[size]) for size in sizes}
    if len(set(factors.values())) == 1:
        return [f"{factors[sizes[0]]} times {word} {where}"]
    if len(sizes) == 2:
        return [f"{factors[size]} times {word} at batch {size}" for size in sizes]
    low, high = (factor(end(ratios[size] for size in sizes)) for end in (min, max))
    return [f"{low} to {high} times {word} {where}"]


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _cost(row: Row, base: Row) -> str:
    """Say what became of the metric, and what isn't known."""
    metric = chosen_metric([base, row])
    if metric is None or metric not in row.metric_changes:
        return "what it costs was not measured" if row.speedup else "speed and metrics were not compared"
    before, after, change = base.metrics[metric], row.metrics[metric], row.metric_changes[metric]
    name = on_one_line(metric)
    if "untrained" in base.origins.get(metric, ""):
        said = f"{name} is {after:.4g}, and was not measured before compression on trained weights"
    elif not math.isfinite(change):
        said = f"{name} is {after:.4g}, and was {before:.4g}"
    elif f"{before:.4g}" == f"{after:.4g}":
        said = f"{name} stays at {after:.4g}"
    else:
        said = f"{name} {'rises' if change > 0 else 'falls'} from {before:.4g} to {after:.4g}"
    if "not yet" in row.origins.get(metric, ""):
        said += ", measured before the model was converted"
    return said if row.speedup else f"{said}, and speed was not compared"
