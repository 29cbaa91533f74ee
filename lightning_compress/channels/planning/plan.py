"""`RemovalPlan` says what a removal will do, as data to inspect, print and apply."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_compress.messages import by_reason, named
from lightning_compress.modules.resizing import KeptIndices


@dataclass(frozen=True)
class PlanRow:
    """One group of layers in a plan.

    Attributes:
        layers: paths of the layers that make these channels.
        before: channels now.
        after: channels that stay.
        approximate: what is computed across them, if something is: what stays computes something else then.
        block: what takes the place of a residual block that leaves, "identity" or "zero"; empty of channels.
    """

    layers: tuple[str, ...]
    before: int
    after: int
    approximate: str = ""
    block: str = ""


@dataclass(frozen=True)
class Totals:
    """What a model costs on the example inputs; ``macs`` are multiply-accumulates for one sample of them."""

    params: int
    macs: int
    channels: int


@dataclass(frozen=True)
class RemovalPlan:
    """Which slices of which tensors stay. Print it before you apply it.

    Attributes:
        rows: what shrinks.
        fixed: layers that stay whole, with the reason.
        before: totals of the model that it was planned for.
        after: totals once it is applied.
        missed: what keeps the budget from being met within its tolerance; empty if nothing does.
        latency: measured time of a run after over before, where the budget is one of latency.
        kept: tensor name to what stays along its dimensions.
        numbers: ``path.name`` of attributes that follow, with their new values.
        shapes: of the tensors that it was planned for.
    """

    rows: tuple[PlanRow, ...]
    fixed: Mapping[str, str]
    before: Totals
    after: Totals
    missed: str
    latency: float | None
    kept: Mapping[str, KeptIndices]
    numbers: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]

    def __str__(self) -> str:
        return "\n".join([*self.lines(), *self.totals(), *([self.missed] if self.missed else [])])

    def lines(self) -> list[str]:
        """A line for each group that shrinks, and for each reason why layers stay whole."""
        channels = [row for row in self.rows if not row.block]
        shown = [(_names(row.layers), f"{row.before} -> {row.after}", _mark(row)) for row in channels]
        width = max((len(name) for name, _, _ in shown), default=0)
        middle = max((len(count) for _, count, _ in shown), default=0)
        kinds = by_reason({row.layers[0]: row.block for row in self.rows if row.block})
        lines = [f"leaves whole: {named(blocks)}: {_PLACES[kind]}" for kind, blocks in kinds.items()]
        lines += [f"{name:<{width}}  {count:>{middle}}{mark}" for name, count, mark in shown]
        return lines + [f"stays whole: {named(layers)}: {why}" for why, layers in by_reason(self.fixed).items()]

    def totals(self) -> list[str]:
        """What the model costs, before and after."""
        lines = []
        for name, shown in (("channels", "channels"), ("params", "params"), ("macs", "macs per sample")):
            old, new = getattr(self.before, name), getattr(self.after, name)
            lines.append(f"{shown}: {old:,} -> {new:,} ({new / max(old, 1):.3f})")
        if self.latency is not None:
            lines.append(f"latency: {self.latency:.3f} of before, measured")
        return lines


_PLACES = {"identity": "its input takes its place", "zero": "zeros take its place"}


def _names(layers: tuple[str, ...]) -> str:
    return ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")


def _mark(row: PlanRow) -> str:
    return f"  (approximate: {row.approximate})" if row.approximate and row.after < row.before else ""
