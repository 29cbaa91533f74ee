"""How is a comparison drawn? What it costs in accuracy, and layer by layer what it saved. Needs the extra `plots`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_compress.errors import MissingExtraError, invalid, nearest
from lightning_compress.report.compare import Comparison
from lightning_compress.report.layers import LayerPair, became, largest, paired, short_name, size_of
from lightning_compress.report.metrics import LARGEST, chosen_metric, fastest
from lightning_compress.report.ratios import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, _BEFORE, _AFTER = "#22303c", "#8a97a3", "#c9d3dc", "#1f77b4"
_COLORS = ("#5b6b7a", "#e07a3f", "#3f9e6e", "#1f77b4", "#9467bd", "#c44e52", "#8c6d31", "#17a2b8")
_LONGEST_NAME = 30
"""Of a legend in one line."""
# Below it an axis has no room for anything else.
_SMALLEST = 1e-30


def plot_report(
    comparison: Comparison, path: str | Path, *, metric: str | None = None, layers_of: tuple[str, str] | None = None
) -> Path:
    """Save a picture of a comparison: left a metric against size, right the bytes of each layer before and after.

    Args:
        comparison: What `compare` returned.
        path: The file to write; its ending chooses the format.
        metric: The metric of the left panel; by default the first that the table shows, one with "acc" in its name
            first. Without any metric, latency takes its place.
        layers_of: The rows of the right panel, before and after; by default the baseline and the last row of a model.

    Returns:
        The path.

    Raises:
        MissingExtraError: matplotlib isn't installed.
        CompressionError: no row has ``metric``, or a row of ``layers_of`` doesn't exist.
    """
    chosen = _metric(comparison, metric)
    with_layers = [row.name for row in comparison.rows if row.measurement.layers]  # files have none
    before, after = layers_of or (comparison.baseline, (with_layers or [comparison.baseline])[-1])
    bars = largest(paired(comparison[before].measurement.layers, comparison[after].measurement.layers))
    with drawing("The report's picture", (13, max(4.8, 2.1 + 0.32 * len(bars)))) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
        _draw_tradeoff(left, comparison, chosen)
        _draw_layers(right, bars, short_name(before), short_name(after))
        figure.savefig(path)
    return Path(path)


@contextmanager
def drawing(what: str, size: tuple[float, float]) -> Iterator[Figure]:
    """Yield an empty figure of ``size`` inches that looks the same whatever the user's settings of matplotlib are.

    Names are written as they are: a ``$`` in one starts no formula, and a sign that the font lacks is no warning.

    Raises:
        MissingExtraError: matplotlib isn't installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(what, "matplotlib", "plots") from error
    defaults = {name: value for name, value in matplotlib.rcParamsDefault.items() if not name.startswith("backend")}
    with warnings.catch_warnings(action="ignore"), matplotlib.rc_context({**defaults, "text.parse_math": False}):
        figure = Figure(figsize=size, dpi=120, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        yield figure


def _metric(comparison: Comparison, metric: str | None) -> str | None:
    known = list(dict.fromkeys(name for row in comparison.rows for name in row.metrics))
    if metric is not None and metric not in known:
        raise invalid("metric", "be a metric of the comparison", metric, nearest(metric, known))
    return metric or chosen_metric(comparison.rows)


def _draw_tradeoff(axes: Axes, comparison: Comparison, metric: str | None) -> None:
    found = [(row, _height(row, metric), fastest(row)) for row in comparison.rows]
    points = [(row, height, latency) for row, height, latency in found if height is not None]
    slowest = max((latency for _, _, latency in points if latency), default=None)
    for index, (row, height, latency) in enumerate(points):
        color = _COLORS[index % len(_COLORS)]
        area = 90 + 900 * latency / slowest if latency and slowest else 160
        place = _kilobytes(row)
        axes.scatter(place, height, s=area, color=color, alpha=0.75, edgecolor="white", linewidth=1.5, zorder=3)
        axes.scatter(place, height, s=9, color="white", zorder=4)
    axes.set_xscale("log")
    ylabel = short_name(metric) if metric else "latency of one sample (ms)"
    _room_for_labels(axes, points)
    _label_points(axes, points, metric)
    _plain_ticks(axes)
    dress(axes, f"{ylabel} against size", "size on disk (KB, log scale)", ylabel)
    axes.grid(True, which="major", color="#eef1f4", zorder=0)
    lines = [f"no {ylabel}: {short_name(row.name)}" for row, height, _ in found if height is None][:3] if points else []
    by_origin: dict[str, list[str]] = {}
    for row, _, _ in points:
        if metric in row.origins:
            by_origin.setdefault(row.origins[metric], []).append(short_name(row.name))
    lines += [f"{', '.join(names)}: {origin}" for origin, names in by_origin.items()]
    lines += ["area: latency of the smallest batch"] if slowest else []
    axes.text(0.99, 0.01, "\n".join(lines), transform=axes.transAxes, ha="right", va="bottom", fontsize=8, color=FAINT)


def _kilobytes(row: Row) -> float:
    # A file of no bytes has no place on a log scale.
    return max(row.measurement.size_bytes, 1) / 1e3


def _room_for_labels(axes: Axes, points: list[Any]) -> None:
    if not points:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no metric was logged", transform=axes.transAxes, ha="center", color=FAINT)
        return
    sizes = [_kilobytes(row) for row, _, _ in points]
    heights = [height for _, height, _ in points]
    margin = max(1.6, (max(sizes) / min(sizes)) ** 0.1)
    axes.set_xlim(min(sizes) / margin, max(sizes) * margin)
    scale, span = max(map(abs, heights)), max(heights) - min(heights)
    if span <= 1e-9 * scale or scale < _SMALLEST:
        span = 0.1 * scale if scale > _SMALLEST else 1.0
    axes.set_ylim(min(heights) - 0.35 * span, max(heights) + 0.35 * span)


def _label_points(axes: Axes, points: list[Any], metric: str | None) -> None:
    """Write names beside the points, towards the middle, one under the other where they would cover each other."""
    low, high = axes.get_ylim()
    left, right = (math.log10(limit) for limit in axes.get_xlim())
    taken: list[tuple[float, float, float]] = []
    for row, height, latency in sorted(points, key=lambda point: -point[1]):
        place, kilobytes = _kilobytes(row), row.measurement.size_bytes / 1e3
        x, y = (math.log10(place) - left) / (right - left), (height - low) / (high - low)
        beside_right = x < 0.5
        start, end = (x + 0.05, x + 0.4) if beside_right else (x - 0.4, x - 0.05)
        while y > 0 and any(start < right and left < end and abs(y - other) < 0.075 for left, right, other in taken):
            y -= 0.02
        taken.append((start, end, y))
        lines = [f"{height:.4g}"] if metric else []
        lines += [f"{kilobytes:,.0f} KB" if kilobytes >= 10 else f"{kilobytes:.2g} KB"]
        lines += [f"{latency:.3g} ms"] if latency else []
        axes.annotate(
            f"{short_name(row.name)}\n{', '.join(lines)}",
            xy=(place, height),
            xytext=(x + (0.05 if beside_right else -0.05), y),
            textcoords="axes fraction",
            ha="left" if beside_right else "right",
            va="center",
            fontsize=9,
            color=INK,
            zorder=5,
        )


def _draw_layers(axes: Axes, bars: list[LayerPair], baseline: str, after: str) -> None:
    places = range(len(bars))
    old = [size_of(pair.before) / 1e3 for pair in bars]
    new = [size_of(pair.after) / 1e3 for pair in bars]
    axes.barh(places, old, height=0.74, color=_BEFORE, label=baseline)
    axes.barh(places, new, height=0.4, color=_AFTER, label=after)
    widest = max([*old, *new], default=0) or 1.0
    for place, pair in zip(places, bars, strict=True):
        end = max(old[place], new[place]) + 0.015 * widest
        axes.text(end, place, became(pair), va="center", fontsize=8.5, color=INK)
    axes.set_yticks(list(places), [short_name(pair.name) or "(model)" for pair in bars])
    # The empty row at the bottom is the legend's.
    axes.set_ylim(len(bars) + 0.7, -0.7)
    axes.set_xlim(0, widest * 1.42)
    dress(axes, "What was saved, layer by layer", "bytes of the layer (KB)", "")
    axes.grid(True, axis="x", color="#eef1f4", zorder=0)
    axes.set_axisbelow(True)
    axes.legend(
        loc="lower right", ncols=1 if len(baseline) + len(after) > _LONGEST_NAME else 2, frameon=False, fontsize=9
    )


def _height(row: Row, metric: str | None) -> float | None:
    """Where the row stands; None if nowhere."""
    height = row.metrics.get(metric) if metric else fastest(row)
    return height if height is not None and abs(height) <= LARGEST else None


def _plain_ticks(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 1e3 * low else (1.0,), numticks=12))
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
