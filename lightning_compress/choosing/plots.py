"""Pictures of a choice: layers against levels, and cost against the metric. Needs the extra `plots`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from lightning_compress.report.layers import short_name
from lightning_compress.report.plots import FAINT, INK, drawing
from lightning_compress.whole_file import whole_file

_MOST_LAYERS = 40
_LINE, _POINT, _CHOSEN = "#9ab4c8", "#1f77b4", "#c44e52"


def plot_levels(
    path: str | Path, title: str, values: Sequence[tuple[str, str, float]], levels: Sequence[str], what: str
) -> Path:
    """Save a picture with a row for each layer and a column for each level, in which a cell's colour is a value.

    Args:
        path: the file; its ending chooses the format.
        title: above.
        values: layer, level and value; a layer's first row decides its place.
        levels: of the columns.
        what: the values are, beside the scale.
    """
    layers = list(dict.fromkeys(layer for layer, _, _ in values))[:_MOST_LAYERS]
    found = {(layer, level): value for layer, level, value in values}
    grid = [[found.get((layer, level), math.nan) for level in levels] for layer in layers]
    finite = [value for line in grid for value in line if math.isfinite(value)]
    top = max([abs(value) for value in finite], default=1.0) or 1.0
    size = (max(5.0, 3.2 + 0.95 * len(levels)), max(2.6, 1.5 + 0.28 * len(layers)))
    with drawing("The table's picture", size) as figure:
        from matplotlib.colors import PowerNorm

        axes = figure.subplots()
        shown = axes.imshow(grid, aspect="auto", cmap="YlOrRd", norm=PowerNorm(0.4, vmin=0.0, vmax=top))
        axes.set_xticks(
            range(len(levels)), [short_name(level) for level in levels], rotation=20, ha="right", fontsize=8
        )
        axes.set_yticks(range(len(layers)), [short_name(layer or "the module") for layer in layers], fontsize=8)
        axes.set_title(title, loc="left", fontsize=11, color=INK)
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                text = f"{value:.2g}" if abs(value) >= 5e-5 or not math.isfinite(value) else "0"
                text = text if math.isfinite(value) else "–"
                color = "white" if math.isfinite(value) and value > 0.2 * top else INK
                axes.text(x, y, text, ha="center", va="center", fontsize=7, color=color)
        figure.colorbar(shown, ax=axes, label=what)
        with whole_file(path) as begun:
            figure.savefig(begun)
    return Path(path)


def plot_front(
    path: str | Path,
    title: str,
    points: Sequence[tuple[float, float]],
    others: Sequence[tuple[str, float, float]],
    chosen: tuple[float, float],
    labels: tuple[str, str],
) -> Path:
    """Save a picture of what was evaluated: cost against drop, with the Pareto front and what was chosen.

    Args:
        path: the file; its ending chooses the format.
        title: above.
        points: cost and drop of mixed choices.
        others: name, cost and drop of uniform ones.
        chosen: cost and drop.
        labels: of both axes.
    """
    with drawing("The front's picture", (7.5, 4.8)) as figure:
        from matplotlib.ticker import FuncFormatter

        axes = figure.subplots()
        front = sorted(points)
        axes.plot([x for x, _ in front], [y for _, y in front], "-o", color=_LINE, markerfacecolor=_POINT,
                  markeredgecolor="white", markersize=7, zorder=2, label="mixed")  # fmt: skip
        for number, (name, x, y) in enumerate(sorted(others, key=lambda other: other[1])):
            axes.scatter([x], [y], s=46, marker="s", color=FAINT, edgecolor="white", zorder=3)
            offset = (7, 6 + 11 * (number % 2))  # neighbours don't write over each other
            axes.annotate(short_name(name), (x, y), xytext=offset, textcoords="offset points", fontsize=8, color=INK)
        axes.scatter([chosen[0]], [chosen[1]], s=140, facecolor="none", edgecolor=_CHOSEN, linewidth=2, zorder=4)
        axes.annotate("chosen", chosen, xytext=(9, 7), textcoords="offset points", fontsize=9, color=_CHOSEN)
        axes.set_title(title, loc="left", fontsize=11, color=INK)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.grid(True, color="#eef1f4", zorder=0)
        finite = [abs(y) for y in (*(y for _, y in points), *(y for *_, y in others), chosen[1]) if math.isfinite(y)]
        small = max(2 * abs(chosen[1]), 1e-3 * max(finite), 1e-9)
        axes.set_yscale("symlog", linthresh=small, linscale=0.5)  # what breaks is far above what doesn't
        # Where the scale is linear, ticks of decades lie on that of 0.
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: "" if 0 < abs(y) < small else f"{y:g}"))
        axes.margins(0.12)
        with whole_file(path) as begun:
            figure.savefig(begun)
    return Path(path)
