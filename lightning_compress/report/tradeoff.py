"""The part of `report.html` on what compression costs: a metric against latency, and against bytes."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_compress.report.markup import Markup, element, joined, table
from lightning_compress.report.metrics import chosen_metric, drawable, fastest, more_is_better, on_front
from lightning_compress.report.ratios import Row
from lightning_compress.report.render import on_one_line
from lightning_compress.report.svg import Point, cost_axis, metric_axis, scatter

_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "KB"), (1.0, "bytes"))


def tradeoff_section(rows: Sequence[Row], base: Row, row: Row | None) -> Markup:
    """Return the metric against latency and against bytes, where at least two models have both."""
    pair = [base] if row is None else [base, row]
    metric = chosen_metric(pair)
    if metric is None or not all(drawable(one.metrics.get(metric)) for one in pair):
        metric = chosen_metric(rows)
    known = [one for one in rows if metric is not None and drawable(one.metrics.get(metric))]
    if metric is None or len(known) < 2:
        said = f"{metric} is known of {known[0].name} alone" if metric and known else "No metric was measured"
        remedy = "Test the model before the fit too, or set CompressionReport(validate_before=True)."
        return element("p", f"{said}, so that it can't be weighed against size and speed. {remedy}")
    drawn = [_latency(metric, known, base, row), _size(metric, known, base, row)]
    return joined([_direction(metric), element("div", *filter(None, drawn), class_="pictures")])


def _direction(metric: str) -> Markup:
    more = more_is_better(metric)
    if more is None:
        said = f"Whether more of {metric} is better can't be told by its name, so no Pareto front is drawn."
    else:
        said = f"Of {metric} {'more' if more else 'less'} is better. A dashed line joins the Pareto front: no other "
        said += "model is as cheap and as good."
    return element("p", said, class_="quiet")


def _latency(metric: str, rows: Sequence[Row], base: Row, row: Row | None) -> Markup:
    size = min((timed.batch_size for one in rows for timed in one.measurement.latency), default=1)
    found = [(one, time) for one in rows if (time := fastest(one))]
    # A difference that can't be measured puts nothing behind.
    same = [one.is_faster(size) is None if size in one.speedup and one is not base else False for one, _ in found]
    costs = [fastest(base) or time if equal else time for (_, time), equal in zip(found, same, strict=True)]
    return _drawn("latency", f"Latency of batch {size}, ms", metric, found, costs, base, row)


def _size(metric: str, rows: Sequence[Row], base: Row, row: Row | None) -> Markup:
    smallest = min(one.measurement.size_bytes for one in rows)
    scale, unit = next(((scale, unit) for scale, unit in _UNITS if smallest >= scale), (1.0, "bytes"))
    found = [(one, one.measurement.size_bytes / scale) for one in rows if one.measurement.size_bytes]
    return _drawn("size", f"Size on disk, {unit}", metric, found, [cost for _, cost in found], base, row)


def _drawn(
    kind: str,
    label: str,
    metric: str,
    found: Sequence[tuple[Row, float]],
    costs: Sequence[float],
    base: Row,
    row: Row | None,
) -> Markup:
    """Return a picture and its table; ``costs`` are what the front goes by."""
    if len(found) < 2:
        return Markup("")
    more = more_is_better(metric)
    heights = [one.metrics[metric] for one, _ in found]
    front = [False] * len(found) if more is None else on_front(list(zip(costs, heights, strict=True)), more)
    points = [
        Point(one.name, cost, height, "base" if one is base else "judged" if one is row else "other", best)
        for (one, cost), height, best in zip(found, heights, front, strict=True)
    ]
    title = f"{on_one_line(metric)} against {label[0].lower()}{label[1:]}"
    description = "A point for each model; the table has the same numbers."
    across, up = cost_axis(label, [point.x for point in points]), metric_axis(metric, heights)
    lines = [
        [on_one_line(point.name), f"{point.x:,.4g}", f"{point.y:.4g}", "yes" if point.on_front else "no"]
        for point in points
    ]
    head = ["Model", label, on_one_line(metric), "On the Pareto front"]
    if more is None:
        head, lines = head[:-1], [line[:-1] for line in lines]
    picture = scatter(f"{kind}-picture", title, description, points, across, up)
    return element("div", element("figure", picture), table(f"{kind}-points", title, head, lines))
