"""How did sparsity grow? A picture of it, overall and layer by layer. Needs the extra `plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_compress.errors import invalid
from lightning_compress.report.layers import short_name
from lightning_compress.report.plots import FAINT, INK, drawing, dress

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[int, float, Mapping[str, float]]
"""Optimizer step, overall sparsity, and sparsity by parameter name."""

_MOST_LABELS = 40


def plot_sparsity(history: Sequence[Point], path: str | Path) -> Path:
    """Save a picture of a fit's sparsity: above overall, below one row for each pruned weight, both over the steps.

    Args:
        history: what `ScheduledPruning.sparsity_history` holds after a fit.
        path: the file to write; its ending chooses the format.

    Returns:
        The path.

    Raises:
        MissingExtraError: matplotlib isn't installed.
        CompressionError: the history is empty.
    """
    if not history:
        raise invalid("history", "have at least one point", history, "Masks didn't grow in this fit.")
    layers = list(history[-1][2])
    inches = 0.6 + 0.24 * min(len(layers), 60)
    with drawing("The picture of sparsity", (11, 3 + inches)) as figure:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, inches))
        first, last = history[0][0], history[-1][0]
        # What holds after the last step is shown for a little while, or it couldn't be seen.
        edges = [step for step, _, _ in history] + [last + max(1, (last - first) // 12)]
        _draw_overall(above, [overall for _, overall, _ in history], edges)
        rows = [[by_layer.get(name, 0.0) for name in layers] for _, _, by_layer in history]
        if layers:
            _draw_layers(below, rows, layers, edges)
        figure.savefig(path)
    return Path(path)


def _draw_overall(axes: Axes, overall: list[float], edges: list[int]) -> None:
    heights = [100 * value for value in overall]
    axes.step(edges, [*heights, heights[-1]], where="post", color="#1f77b4", linewidth=2)
    axes.annotate(f"{heights[-1]:.4g} %", (edges[-1], heights[-1]), xytext=(4, 0), textcoords="offset points",
                  va="center", fontsize=9, color=INK, annotation_clip=False)  # fmt: skip
    axes.set_ylim(0, 105)
    dress(axes, "Sparsity of all pruned weights", "", "zeros (%)")
    axes.grid(True, color="#eef1f4")


def _draw_layers(axes: Axes, rows: list[list[float]], layers: list[str], edges: list[int]) -> None:
    columns = [[100 * row[index] for row in rows] for index in range(len(layers))]
    borders = [index - 0.5 for index in range(len(layers) + 1)]
    mesh = axes.pcolormesh(edges, borders, columns, cmap="Blues", vmin=0, vmax=100)
    every = -(-len(layers) // _MOST_LABELS)
    shown = range(0, len(layers), every)
    axes.set_yticks(list(shown), [short_name(layers[index]) for index in shown])
    for index in shown:
        axes.annotate(f"{columns[index][-1]:.3g} %", (edges[-1], index), xytext=(4, 0), textcoords="offset points",
                      va="center", fontsize=8.5, color=INK, annotation_clip=False)  # fmt: skip
    axes.invert_yaxis()
    dress(axes, "Layer by layer", "optimizer step", "")
    assert axes.figure is not None
    bar = axes.figure.colorbar(mesh, ax=axes, orientation="horizontal", fraction=0.05, aspect=60)
    bar.set_label("zeros (%)", color=FAINT)
