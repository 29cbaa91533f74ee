"""Pictures as SVG, drawn by pure functions: a point for each model, and a pair of bars for each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from lightning_compress.report.layers import LayerPair, became, short_name, size_of
from lightning_compress.report.markup import Markup, element

# Narrow, so that text keeps its size on a phone.
_WIDTH, _HEIGHT = 400, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 28, 46
_CHARACTER, _LINE, _LONGEST, _LONGEST_WORDS = 8.2, 16, 22, 40
_BAR = 34


class Point(NamedTuple):
    """A model in a picture; ``kind`` is ``base``, ``judged`` or ``other``."""

    name: str
    x: float
    y: float
    kind: str
    on_front: bool


class Axis(NamedTuple):
    """Maps values to places; ``ticks`` are values that get a label."""

    label: str
    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        """Return where a value stands."""
        low, high, at = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (at - low) / (high - low) * (self.end - self.start), 1)


def cost_axis(label: str, values: Sequence[float]) -> Axis:
    """Return the horizontal axis for positive values; a logarithmic one where they differ much."""
    low, high = min(values), max(values)
    log = high > 4 * low > 0
    margin = max(1.25, (high / low) ** 0.08) if log else 0.12 * (high - low) or 0.1 * high or 1.0
    low, high = (low / margin, high * margin) if log else (max(0.0, low - margin), high + margin)
    return Axis(label, low, high, _LEFT, _WIDTH - _RIGHT, log, _log_ticks(low, high) if log else _ticks(low, high))


def metric_axis(label: str, values: Sequence[float]) -> Axis:
    """Return the vertical axis, with room above and below."""
    low, high = min(values), max(values)
    margin = 0.25 * (high - low)
    if margin <= 1e-9 * max(abs(low), abs(high)):
        margin = 0.05 * abs(high) or 1.0
    # A fraction has no room above 1.
    low, high = low - margin, 1.0 if 0 <= low <= high <= 1 < high + margin else high + margin
    return Axis(label, low, high, _HEIGHT - _BOTTOM, _TOP, False, _ticks(low, high))


def _ticks(low: float, high: float) -> tuple[float, ...]:
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= 0.999 * rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(float(f"{number * step:.12g}") for number in range(first, last + 1))


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        found = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
        if len(found) <= 6:
            break
    return tuple(found[:: -(-len(found) // 6) or 1])


def scatter(id_: str, title: str, description: str, points: Sequence[Point], across: Axis, up: Axis) -> Markup:
    """Draw models as points, with the line of those that nothing else beats."""
    floor, parts = _HEIGHT - _BOTTOM, list[Markup]()
    for tick in up.ticks:
        y = up.place(tick)
        parts.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(_text(f"{tick:.6g}", _LEFT - 6, y + 4, "end", "tick"))
    for tick in across.ticks:
        parts.append(
            element("line", x1=across.place(tick), x2=across.place(tick), y1=floor, y2=floor + 4, class_="axis")
        )
        parts.append(_text(f"{tick:,.6g}", across.place(tick), floor + 17, "middle", "tick"))
    parts.append(element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=floor, y2=floor, class_="axis"))
    parts.append(
        _text(across.label + (" (log scale)" if across.log else ""), _WIDTH - _RIGHT, _HEIGHT - 10, "end", "label")
    )
    parts.append(_text(short_name(up.label, 40), 4, 10, "start", "label"))
    placed = [(point, across.place(point.x), up.place(point.y)) for point in points]
    front = sorted((x, y) for point, x, y in placed if point.on_front)
    if len(front) > 1:
        steps = [f"M{front[0][0]} {front[0][1]}", *(f"H{x}V{y}" for x, y in front[1:])]
        parts.append(element("path", d="".join(steps), class_="front"))
    parts += [element("circle", cx=x, cy=y, r=6, class_=f"point {point.kind}") for point, x, y in placed]
    return _svg(id_, title, description, _HEIGHT, [*parts, *_labels(placed)])


def _labels(placed: Sequence[tuple[Point, float, float]]) -> list[Markup]:
    """Write names beside the points, above or below where they would cover each other."""
    drawn, taken = list[Markup](), [(x - 7, x + 7, y) for _, x, y in placed]
    for point, x, y in sorted(placed, key=lambda item: item[2]):
        name = short_name(point.name, _LONGEST)
        width = len(name) * _CHARACTER
        beside = [(x + 12, "start"), (x - 12, "end")]
        places = [
            (start if anchor == "start" else start - width, y + shift, anchor)
            for shift in (0, _LINE, -_LINE, 2 * _LINE, -2 * _LINE, 3 * _LINE, -3 * _LINE)
            for start, anchor in beside
        ]
        inside = [
            place
            for place in places
            if 0 <= place[0] <= _WIDTH - width and _TOP + 4 <= place[1] <= _HEIGHT - _BOTTOM - 4
        ]
        free = [place for place in inside if not _covers(place[0], place[0] + width, place[1], taken)]
        left, at, anchor = (free or inside or places)[0]
        taken.append((left, left + width, at))
        drawn.append(_text(name, left if anchor == "start" else left + width, at + 4, anchor, point.kind))
    return drawn


def _covers(start: float, end: float, at: float, taken: Sequence[tuple[float, float, float]]) -> bool:
    return any(start < other and begin < end and abs(y - at) < _LINE - 1 for begin, other, y in taken)


def bars(id_: str, title: str, description: str, pairs: Sequence[LayerPair]) -> Markup:
    """Draw the bytes of each layer, before above after."""
    widest = max((max(size_of(pair.before), size_of(pair.after)) for pair in pairs), default=0) or 1
    parts = list[Markup]()
    for index, pair in enumerate(pairs):
        top = index * _BAR
        parts.append(_text(short_name(pair.name) or "(model)", 0, top + 12, "start", "name"))
        parts.append(_text(short_name(became(pair), _LONGEST_WORDS), _WIDTH, top + 12, "end", "tick"))
        for side, offset, kind in ((pair.before, 17, "base"), (pair.after, 23, "judged")):
            width = round(_WIDTH * size_of(side) / widest, 1)
            parts.append(element("rect", x=0, y=top + offset, width=width, height=6, class_=f"bar {kind}"))
    return _svg(id_, title, description, max(1, len(pairs)) * _BAR, parts)


def _svg(id_: str, title: str, description: str, height: int, parts: Sequence[Markup]) -> Markup:
    named = (element("title", title, id=f"{id_}-title"), element("desc", description, id=f"{id_}-desc"))
    return element(
        "svg",
        *named,
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {_WIDTH} {height}",
        role="img",
        aria_labelledby=f"{id_}-title {id_}-desc",
    )


def _text(text: str, x: float, y: float, anchor: str, kind: str) -> Markup:
    return element("text", text, x=round(x, 1), y=round(y, 1), text_anchor=anchor, class_=kind)
