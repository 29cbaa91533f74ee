"""Draws a comparison: what it costs in accuracy, and layer by layer what was saved. Needs the extra `plots`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_compress.errors import MissingExtraError, invalid, nearest
from lightning_compress.report.compare import Comparison, Row
from lightning_compress.report.render import shown_metrics
from lightning_compress.report.storage import LayerMeasurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT, _BEFORE, _AFTER = "#22303c", "#8a97a3", "#c9d3dc", "#1f77b4"
_COLORS = ("#5b6b7a", "#e07a3f", "#3f9e6e", "#1f77b4", "#9467bd", "#c44e52", "#8c6d31", "#17a2b8")
_MOST_LAYERS = 18
_LONGEST_NAME = 30


def plot_report(
    comparison: Comparison, path: str | Path, *, metric: str | None = None, layers_of: tuple[str, str] | None = None
) -> Path:
    """Save a picture of a comparison: left a metric against size, right the bytes of each layer before and after.

    Args:
        comparison: What `compare` returned.
        path: The file to write; its ending chooses the format.
        metric: The metric of the left panel; by default the first that the table shows, one with "acc" in its name
            first. Without any metric, latency takes its place.
        layers_of: The rows of the right panel, before and after; by default the baseline and the last row.

    Returns:
        The path.

    Raises:
        MissingExtraError: matplotlib isn't installed.
        CompressionError: no row has ``metric``, or a row of ``layers_of`` doesn't exist.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("The report's picture", "matplotlib", "plots") from error
    chosen = _metric(comparison, metric)
    before, after = layers_of or (comparison.baseline, comparison.rows[-1].name)
    bars = _bars(comparison[before].measurement.layers, comparison[after].measurement.layers)
    figure = Figure(figsize=(13, max(4.8, 2.1 + 0.32 * len(bars))), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    _draw_tradeoff(left, comparison, chosen)
    _draw_layers(right, bars, before, after)
    figure.savefig(path)
    return Path(path)


def _metric(comparison: Comparison, metric: str | None) -> str | None:
    known = list(dict.fromkeys(name for row in comparison.rows for name in row.metrics))
    if metric is not None:
        if metric not in known:
            raise invalid("metric", "be a metric of the comparison", metric, nearest(metric, known))
        return metric
    shown = shown_metrics(comparison.rows)
    return next((name for name in shown if "acc" in name.lower()), shown[0] if shown else None)


def _draw_tradeoff(axes: Axes, comparison: Comparison, metric: str | None) -> None:
    heights = [(row, _height(row, metric), _fastest(row)) for row in comparison.rows]
    points = [
        (row, height, latency) for row, height, latency in heights if height is not None and math.isfinite(height)
    ]
    slowest = max((latency for _, _, latency in points if latency), default=None)
    for index, (row, height, latency) in enumerate(points):
        color = _COLORS[index % len(_COLORS)]
        area = 90 + 900 * latency / slowest if latency and slowest else 160
        kilobytes = row.measurement.size_bytes / 1e3
        axes.scatter(kilobytes, height, s=area, color=color, alpha=0.75, edgecolor="white", linewidth=1.5, zorder=3)
        axes.scatter(kilobytes, height, s=9, color="white", zorder=4)
    axes.set_xscale("log")
    _room_for_labels(axes, points)
    _label_points(axes, points, metric)
    _plain_ticks(axes)
    ylabel = metric or "latency of one sample (ms)"
    dress(axes, f"{ylabel} against size", "size on disk (KB, log scale)", ylabel)
    axes.grid(True, which="major", color="#eef1f4", zorder=0)
    if slowest:
        axes.text(0.99, 0.01, "area: latency of the smallest batch", transform=axes.transAxes, ha="right", va="bottom",
                  fontsize=8, color=FAINT)  # fmt: skip


def _room_for_labels(axes: Axes, points: list[Any]) -> None:
    if not points:
        axes.text(0.5, 0.5, "no metric was logged", transform=axes.transAxes, ha="center", color=FAINT)
        return
    sizes = [row.measurement.size_bytes / 1e3 for row, _, _ in points]
    heights = [height for _, height, _ in points]
    axes.set_xlim(min(sizes) / 1.6, max(sizes) * 1.6)
    span = max(heights) - min(heights) or abs(heights[0]) * 0.1 or 1.0
    axes.set_ylim(min(heights) - 0.35 * span, max(heights) + 0.35 * span)


def _label_points(axes: Axes, points: list[Any], metric: str | None) -> None:
    """Write names beside the points, towards the middle, one under the other where they would cover each other."""
    low, high = axes.get_ylim()
    left, right = (math.log10(limit) for limit in axes.get_xlim())
    taken: list[tuple[float, float, float]] = []
    for row, height, latency in sorted(points, key=lambda point: -point[1]):
        kilobytes = row.measurement.size_bytes / 1e3
        x, y = (math.log10(kilobytes) - left) / (right - left), (height - low) / (high - low)
        beside_right = x < 0.5
        start, end = (x + 0.05, x + 0.4) if beside_right else (x - 0.4, x - 0.05)
        while any(start < right and left < end and abs(y - other) < 0.075 for left, right, other in taken):
            y -= 0.02
        taken.append((start, end, y))
        numbers = [f"{height:.4g}"] if metric else []
        numbers += [f"{kilobytes:,.0f} KB" if kilobytes >= 10 else f"{kilobytes:.2g} KB"]
        numbers += [f"{latency:.3g} ms"] if latency else []
        axes.annotate(
            f"{short_name(row.name)}\n{', '.join(numbers)}",
            xy=(kilobytes, height),
            xytext=(x + (0.05 if beside_right else -0.05), y),
            textcoords="axes fraction",
            ha="left" if beside_right else "right",
            va="center",
            fontsize=9,
            color=INK,
            zorder=5,
        )


def _draw_layers(axes: Axes, bars: list[tuple[str, int, LayerMeasurement | None]], baseline: str, after: str) -> None:
    places = range(len(bars))
    axes.barh(places, [before / 1e3 for _, before, _ in bars], height=0.74, color=_BEFORE, label=baseline)
    axes.barh(
        places, [(one.size_bytes if one else 0) / 1e3 for _, _, one in bars], height=0.4, color=_AFTER, label=after
    )
    widest = max((max(before, one.size_bytes if one else 0) for _, before, one in bars), default=1) / 1e3
    for place, (_, before, one) in zip(places, bars, strict=True):
        end = max(before, one.size_bytes if one else 0) / 1e3
        axes.text(end + 0.015 * widest, place, _saved(before, one), va="center", fontsize=8.5, color=INK)
    axes.set_yticks(list(places), [name for name, _, _ in bars])
    # The empty row at the bottom is the legend's.
    axes.set_ylim(len(bars) + 0.7, -0.7)
    axes.set_xlim(0, widest * 1.42)
    dress(axes, "What was saved, layer by layer", "bytes of the layer (KB)", "")
    axes.grid(True, axis="x", color="#eef1f4", zorder=0)
    axes.set_axisbelow(True)
    axes.legend(loc="lower right", ncols=2, frameon=False, fontsize=9)


def _bars(before: tuple[LayerMeasurement, ...], after: tuple[LayerMeasurement, ...]) -> list[Any]:
    """Pair layers by name, keep the largest in the model's order, and add the rest up as one bar."""
    new = {layer.name: layer for layer in after}
    old = {layer.name: layer.size_bytes for layer in before}
    names = list(dict.fromkeys([*old, *new]))
    by_size = sorted(names, key=lambda name: -max(old.get(name, 0), new[name].size_bytes if name in new else 0))
    kept = set(by_size if len(names) <= _MOST_LAYERS else by_size[: _MOST_LAYERS - 1])
    bars: list[Any] = [
        (short_name(name) or "(model)", old.get(name, 0), new.get(name)) for name in names if name in kept
    ]
    if others := [name for name in names if name not in kept]:
        rest = [new[name] for name in others if name in new]
        total = LayerMeasurement(
            name="",
            type="",
            parameters=sum(layer.parameters for layer in rest),
            nonzeros=sum(layer.nonzeros for layer in rest),
            size_bytes=sum(layer.size_bytes for layer in rest),
            dtype=rest[0].dtype if len({layer.dtype for layer in rest}) == 1 else "mixed",
        )
        bars.append((f"{len(others)} others", sum(old.get(name, 0) for name in others), total))
    return bars


def _saved(before: int, one: LayerMeasurement | None) -> str:
    if one is None:
        return "gone"
    parts = ["new" if not before else f"{before / one.size_bytes:.1f}x" if before != one.size_bytes else "same"]
    if one.dtype not in ("float32", "mixed"):
        parts.append(one.dtype)
    zeros = 1 - one.nonzeros / one.parameters if one.parameters else 0.0
    return ", ".join([*parts, f"{zeros:.0%} zeros"] if zeros >= 0.005 else parts)


def _height(row: Row, metric: str | None) -> float | None:
    return row.metrics.get(metric) if metric else _fastest(row)


def _fastest(row: Row) -> float | None:
    latency = row.measurement.latency
    return min(latency, key=lambda one: one.batch_size).median_ms if latency else None


def short_name(name: str) -> str:
    """A name that fits beside a panel."""
    # The end of a layer's name tells layers apart, the beginning is what they share.
    return name if len(name) <= _LONGEST_NAME else "…" + name[-(_LONGEST_NAME - 1) :]


def _plain_ticks(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def dress(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    """Title, labels and frame as in all pictures of the report."""
    axes.set_title(title, loc="left", fontsize=12, color=INK, pad=10)
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.tick_params(colors=INK, labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
