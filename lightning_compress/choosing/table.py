"""`SensitivityTable`: which layer hurts, at which level; a table that prints itself, and is saved and loaded."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lightning_compress.choosing.evaluations import Drop, rank_correlation
from lightning_compress.choosing.plots import plot_levels
from lightning_compress.errors import CompressionError, invalid
from lightning_compress.report.yaml_text import as_yaml
from lightning_compress.whole_file import whole_file

_MOST_ROWS = 40


@dataclass(frozen=True)
class SensitivityRow:
    """One layer alone at one level.

    Attributes:
        layer: its path; of channels that hang together that of the first layer that makes them.
        level: the label of a scheme, the fraction of weights that are zero, or of channels that stay.
        score: predicted relative squared error of the outputs (Taylor).
        error: measured relative squared error of the outputs on the batches; None where it wasn't measured.
        drop: how far the metric falls; None where it wasn't evaluated.
        drop_error: standard error of it, paired by sample; None where the metric gives no samples.
        drop_left_out: how far it falls with all layers at this level but this one.
        parameters: that the level makes zero, or takes out.
        macs: multiply-accumulates of the layer for a sample; those that leave where channels do.
        size_bytes: that the level saves.
        latency_ms: time of the layer's calls for the first batch, as it is.
    """

    layer: str
    level: str
    score: float | None = None
    error: float | None = None
    drop: float | None = None
    drop_error: float | None = None
    drop_left_out: float | None = None
    parameters: float = 0.0
    macs: float | None = None
    size_bytes: float = 0.0
    latency_ms: float | None = None


@dataclass(frozen=True)
class SensitivityTable:
    """Says how much each layer alone costs the metric: made by `sensitivity`.

    Attributes:
        of: ``int8``, ``weights``, ``pruning`` or ``channels``.
        metric: of the model as it is.
        mode: ``max`` where more is better.
        rows: the layers at their levels, the worst first.
        splits: what all layers together lose, by parts: of int8, weights alone and activations alone.
        skipped: layers that can't be compressed, with the reason.
        levels: labels, from what compresses least.
        scheme_of: what YAML says of a level.
        notes: what the reader should know of the numbers.
    """

    of: str
    metric: float
    mode: str
    rows: tuple[SensitivityRow, ...]
    levels: tuple[str, ...]
    splits: Mapping[str, SensitivityRow] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    scheme_of: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """The parts of the whole first, then the layers, the worst first."""
        lines = [f"sensitivity of {self.of}: metric {self.metric:.4f} as it is ({self.mode})"]
        if self.splits:
            lines.append("all layers together:")
            lines += [f"  {name:<24} {_drop(row):>18}  error {_number(row.error)}" for name, row in self.splits.items()]
        shown: list[tuple[str, ...]] = [
            ("layer", "level", "drop", "left out", "error", "taylor", "params", "MACs", "bytes saved", "ms")
        ]
        shown += [_cells(row) for row in self.rows[:_MOST_ROWS]]
        used = [number for number in range(len(shown[0])) if any(cells[number] for cells in shown[1:])]
        widths = [max(len(cells[number]) for cells in shown) for number in used]
        for cells in shown:
            parts = [
                cells[number].ljust(width) if number < 2 else cells[number].rjust(width)
                for number, width in zip(used, widths, strict=True)
            ]
            lines.append("  ".join(parts).rstrip())
        if len(self.rows) > _MOST_ROWS:
            lines.append(f"... and {len(self.rows) - _MOST_ROWS} more rows, which `save` writes")
        return lines + [f"note: {note}" for note in self.notes]

    def rank_correlation(self, beyond_noise: bool = False) -> float:
        """Return Spearman's correlation of scores and measured drops; NaN where fewer than three rows have both.

        Args:
            beyond_noise: count only rows whose drop is more than two standard errors from zero.
        """
        pairs = [
            (row.score, row.drop)
            for row in self.rows
            if row.score is not None and row.drop is not None
            if not beyond_noise or abs(row.drop) > 2 * (row.drop_error or 0.0)
        ]
        return rank_correlation(*map(list, zip(*pairs, strict=True))) if len(pairs) > 2 else math.nan

    def bound(self, row: SensitivityRow) -> float:
        """Return the drop of a row; of one that wasn't evaluated, the least of those with a higher score."""
        if row.drop is not None:
            return row.drop
        worse = [
            other.drop for other in self.rows if other.drop is not None and (other.score or 0.0) >= (row.score or 0.0)
        ]
        return min(worse, default=math.inf)

    def choice(self, max_drop: float) -> dict[str, str]:
        """Return the level of each layer that compresses most and alone costs no more than ``max_drop``.

        Layers without one aren't in it. What they cost together isn't known: `search` evaluates that.
        """
        if not max_drop >= 0:
            raise invalid("max_drop", "be at least 0", max_drop)
        order = {level: number for number, level in enumerate(self.levels)}
        found: dict[str, str] = {}
        for row in self.rows:
            if self.bound(row) <= max_drop and order[row.level] >= order.get(found.get(row.layer, ""), -1):
                found[row.layer] = row.level
        return {layer: found[layer] for layer in dict.fromkeys(row.layer for row in self.rows) if layer in found}

    def to_yaml(self, max_drop: float) -> str:
        """Return ``overrides`` and ``exclude`` for the callback: layers that alone cost more are left out.

        Args:
            max_drop: what a layer alone may cost, in the metric's units.
        """
        chosen = self.choice(max_drop)
        excluded = [layer for layer in dict.fromkeys(row.layer for row in self.rows) if layer not in chosen]
        said: dict[str, Any] = {}
        if self.of in ("int8", "weights"):
            levels = list(chosen.values()) or [self.levels[0]]
            said["scheme"] = self.scheme_of[max(self.levels, key=levels.count)]
        if self.of == "pruning":
            said |= {"sparsity": self.scheme_of[self.levels[0]], "scope": "layer"}
        if self.of != "int8" and chosen:
            said["overrides"] = {layer: self.scheme_of[level] for layer, level in chosen.items()}
        if self.of == "weights":
            excluded += [layer for layer in self.skipped if layer]  # the scheme would take those with a shared weight
        if excluded:
            said["targets"] = {"exclude": excluded}
        return as_yaml(said)

    def save(self, path: str | Path) -> Path:
        """Write the table: all of it as ``.json``, the rows as ``.csv``.

        Raises:
            CompressionError: the ending is another one.
        """
        path = Path(path)
        if path.suffix == ".json":
            with whole_file(path) as begun:
                begun.write_text(json.dumps({"version": 1, **asdict(self)}, indent=1) + "\n", "utf-8")
        elif path.suffix == ".csv":
            with whole_file(path) as begun, begun.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, [part.name for part in fields(SensitivityRow)])
                writer.writeheader()
                writer.writerows(asdict(row) for row in self.rows)
        else:
            raise invalid("path", "end in .json or .csv", str(path))
        return path

    @classmethod
    def load(cls, path: str | Path) -> SensitivityTable:
        """Read a table that `save` wrote as ``.json``.

        Raises:
            CompressionError: the file holds no table.
        """
        try:
            plain: dict[str, Any] = json.loads(Path(path).read_text("utf-8"))
            plain.pop("version")
            rows = tuple(SensitivityRow(**row) for row in plain.pop("rows"))
            splits = {name: SensitivityRow(**row) for name, row in plain.pop("splits").items()}
            levels, notes = tuple(plain.pop("levels")), tuple(plain.pop("notes"))
            return cls(rows=rows, splits=splits, levels=levels, notes=notes, **plain)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CompressionError(f"`path` must be a table that `save` wrote as .json. Received: {path}.") from error

    def plot(self, path: str | Path) -> Path:
        """Draw layers against levels: drops where all were evaluated, else scores. Needs the extra ``plots``.

        Returns:
            The path.
        """
        measured = all(row.drop is not None for row in self.rows)
        values = [(row.layer, row.level, row.drop if measured else row.score) for row in self.rows]
        what = "drop of the metric, alone" if measured else "predicted relative error of the outputs"
        known = [(layer, level, value) for layer, level, value in values if value is not None]
        return plot_levels(path, f"sensitivity of {self.of}", known, self.levels, what)


def _cells(row: SensitivityRow) -> tuple[str, ...]:
    left_out = "" if row.drop_left_out is None else f"{row.drop_left_out:+.4f}"
    macs = "" if row.macs is None else f"{row.macs:,.0f}"
    latency = "" if row.latency_ms is None else f"{row.latency_ms:.3f}"
    size = f"{row.size_bytes:,.0f}" if row.size_bytes else ""
    parameters = f"{row.parameters:,.0f}" if row.parameters else ""
    numbers = (_number(row.error), _number(row.score), parameters, macs, size, latency)
    return (row.layer or "the module", row.level, _drop(row), left_out, *numbers)


def _drop(row: SensitivityRow) -> str:
    return "" if row.drop is None else str(Drop(row.drop, row.drop_error))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"
