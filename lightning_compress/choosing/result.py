"""`SearchResult`: what was chosen, what else was evaluated, and the YAML of the callback that does it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_compress.choosing.evaluations import Drop
from lightning_compress.choosing.plots import plot_front
from lightning_compress.choosing.table import SensitivityTable
from lightning_compress.report.yaml_text import as_yaml
from lightning_compress.whole_file import whole_file


@dataclass(frozen=True)
class Point:
    """A choice that was evaluated.

    Attributes:
        choice: layer to level; what it doesn't name stays as it is.
        cost: of the model.
        fraction: of the original's cost.
        drop: of the metric.
        drop_error: its standard error, paired by sample; None without samples.
        label: the level, where all layers have the same.
        spread: quartiles of the fraction, where it was measured.
    """

    choice: Mapping[str, str]
    cost: float
    fraction: float
    drop: float
    drop_error: float | None = None
    label: str = ""
    spread: tuple[float, float] | None = None

    def __str__(self) -> str:
        between = "" if self.spread is None else " ({:.3f} to {:.3f})".format(*self.spread)
        return f"{self.fraction:.4f}{between}  {Drop(self.drop, self.drop_error)}"


@dataclass(frozen=True)
class SearchResult:
    """Says which layer gets which level: made by `search`.

    Attributes:
        over: ``int8``, ``weights``, ``pruning`` or ``channels``.
        cost: ``bytes``, ``params``, ``macs`` or ``latency`` (in milliseconds).
        whole: cost of the original.
        metric: of the original.
        mode: ``max`` where more is better.
        chosen: the choice.
        points: all that was evaluated, the cheapest first.
        callback: the import path of the callback that does it.
        settings: its arguments.
        table: of the scores that the choice rests on.
        notes: what the reader should know of the choice.
    """

    over: str
    cost: str
    whole: float
    metric: float
    mode: str
    chosen: Point
    points: tuple[Point, ...]
    callback: str
    settings: Mapping[str, Any]
    table: SensitivityTable
    notes: tuple[str, ...] = ()

    @property
    def front(self) -> tuple[Point, ...]:
        """The Pareto front: no other point costs less and falls less."""
        best, front = float("inf"), list[Point]()
        for point in sorted(self.points, key=lambda point: (point.cost, point.drop)):
            if point.drop < best:
                best = point.drop
                front.append(point)
        return tuple(front)

    def __str__(self) -> str:
        chosen = self.chosen
        lines = [
            f"search over {self.over}: {self.cost} {self._amount(self.whole)} -> {self._amount(chosen.cost)} "
            f"({self._remaining(chosen)}), metric {self.metric:.4f}, drop {Drop(chosen.drop, chosen.drop_error)}"
        ]
        lines += [f"note: {note}" for note in self.notes]
        width = max((len(layer) for layer in self.table_order()), default=0)
        lines += [f"  {layer:<{width}}  {chosen.choice.get(layer, 'as it is')}" for layer in self.table_order()]
        lines.append(f"evaluated, the Pareto front marked by *, {self.cost} and drop:")
        front = set(map(id, self.front))
        for point in self.points:
            mark = "*" if id(point) in front else " "
            name = point.label or ("chosen" if point is chosen else "")
            lines.append(f"  {mark} {point}  {name}".rstrip())
        return "\n".join(lines)

    def _amount(self, cost: float) -> str:
        return f"{cost:.3g} ms" if self.cost == "latency" else f"{cost:,.0f}"

    def _remaining(self, point: Point) -> str:
        spread = "" if point.spread is None else ", quartiles {:.3f} to {:.3f}".format(*point.spread)
        return f"{point.fraction:.3f}{spread}"

    def table_order(self) -> list[str]:
        """Layers, those with the largest scores first."""
        return list(dict.fromkeys(row.layer for row in self.table.rows))

    def to_yaml(self) -> str:
        """Return the callback with its arguments, for ``trainer.callbacks``."""
        return as_yaml({"class_path": self.callback, "init_args": dict(self.settings)}, depth=3)

    def plot(self, path: str | Path) -> Path:
        """Draw cost against drop; needs the extra ``plots``. Returns the path."""
        mixed = [(point.fraction, point.drop) for point in self.front if not point.label]
        same = [(point.label, point.fraction, point.drop) for point in self.points if point.label]
        chosen = (self.chosen.fraction, self.chosen.drop)
        remain = "time that remains" if self.cost == "latency" else f"{self.cost} that remain"
        labels = (remain, "drop of the metric")
        return plot_front(path, f"search over {self.over}", mixed, same, chosen, labels)

    def save(self, path: str | Path) -> Path:
        """Write all of it as JSON. Returns the path."""
        path = Path(path)
        with whole_file(path) as begun:
            begun.write_text(json.dumps({"version": 1, **asdict(self)}, indent=1) + "\n", "utf-8")
        return path
