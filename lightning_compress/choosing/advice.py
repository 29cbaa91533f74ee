"""What `advise` found out, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_compress.choosing.evaluations import Drop
from lightning_compress.choosing.speed import Speed
from lightning_compress.modules.agreement import Agreement
from lightning_compress.quantization.agreement import LEAST
from lightning_compress.report.render import factor
from lightning_compress.report.yaml_text import as_yaml

FASTER, SMALLER = 1.05, 0.8
"""Less gain is none: so many times the speed, for three quarters of the rounds, and such a part of the bytes."""
_TRAINED = 0.8
"""An agreement from which some training gets a model back whose channels have left."""


@dataclass(frozen=True)
class Trial:
    """What came of one way to compress.

    Attributes:
        name: a scheme, or ``channels``.
        callback: what does it in a Trainer, as YAML says it.
        speeds: by batch size.
        size: the part of the bytes that is left.
        agreement: of the outputs with the model's, on batches that were held out.
        drop: how far the metric falls; None without one.
        problem: why nothing was measured; empty if it was.
        is_tried: whether there was time for it.
    """

    name: str
    callback: Mapping[str, Any]
    speeds: Mapping[int, Speed] = field(default_factory=dict)
    size: float = 1.0
    agreement: Agreement | None = None
    drop: Drop | None = None
    problem: str = ""
    is_tried: bool = True

    @property
    def is_trained(self) -> bool:
        """Whether training follows it."""
        return self.name == "channels"

    @property
    def best(self) -> tuple[int, Speed] | None:
        """The batch size at which it is fastest beyond the noise, with the speed; None where it isn't faster."""
        faster = {size: speed for size, speed in self.speeds.items() if speed.low >= FASTER}
        return max(faster.items(), key=lambda pair: pair[1].median, default=None)

    @property
    def is_faster(self) -> bool:
        """Whether it is faster at one batch size beyond the noise, and slower at none."""
        return self.best is not None and all(speed.high >= 1.0 for speed in self.speeds.values())

    @property
    def refusal(self) -> str:
        """Why it isn't worth it; empty if it is."""
        if self.problem or self.agreement is None:
            return self.problem
        least = _TRAINED if self.is_trained else LEAST
        if self.agreement.cosine < least:
            return f"its outputs agree by {self.agreement.cosine:.3f} only"
        if self.is_faster or self.size <= SMALLER:
            return ""
        return "no faster and hardly smaller"


@dataclass(frozen=True)
class Advice:
    """Says what to try first on a model, and what not to bother with; prints itself.

    Attributes:
        model: name of its class.
        parameters: how many it has.
        size_bytes: of its file.
        macs: multiply-accumulates of one sample.
        samples: in the batch that was timed.
        latency_ms: of that batch.
        times: milliseconds of it that the layers of each class take, the longest first.
        trials: in the order in which they were made.
    """

    model: str
    parameters: int
    size_bytes: int
    macs: float
    samples: int
    latency_ms: float
    times: Mapping[str, float]
    trials: tuple[Trial, ...]

    @property
    def worth(self) -> list[Trial]:
        """What is worth it, the best first: what is faster before what is only smaller."""
        found = [trial for trial in self.trials if not trial.refusal]
        return sorted(found, key=_rank)

    def to_yaml(self) -> str:
        """Return the callback to try first, for ``trainer.callbacks``; empty where nothing is worth it."""
        return as_yaml(self.worth[0].callback, depth=3) if self.worth else ""

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        sizes = f"{self.parameters:,} parameters, {self.size_bytes / 1e6:.2f} MB, {self.macs:,.0f} MACs per sample"
        yield f"{self.model}: {sizes}, {self.latency_ms:.3g} ms for {self.samples} samples"
        whole = max(self.latency_ms, sum(self.times.values()))
        parts = [f"{name} {time / whole:.0%}" for name, time in self.times.items() if time >= 0.02 * whole]
        rest = 1 - sum(self.times.values()) / whole
        yield f"where its time goes: {', '.join([*parts, *([f'between layers {rest:.0%}'] if rest >= 0.02 else [])])}"
        yield ""
        yield from self._table()
        yield ""
        worth = self.worth
        if not worth:
            yield "try first: nothing of this; a smaller model, taught by this one, may be the way (DistillationModule)"
        for place, trial in enumerate(worth):
            yield f"{'then' if place else 'try first'}: {trial.name}, {_gain(trial)}"
        for trial in self.trials:
            if trial.refusal:
                verdict = "don't bother with" if trial.is_tried else "not tried"
                yield f"{verdict}: {trial.name} ({trial.refusal})"
        if worth:
            yield ""
            yield from f"# for trainer.callbacks\n{self.to_yaml()}".rstrip().split("\n")

    def _table(self) -> Iterator[str]:
        sizes = sorted({size for trial in self.trials for size in trial.speeds})
        has_drop = any(trial.drop is not None for trial in self.trials)
        rows = [["tried", *(f"speed, {size}" for size in sizes), "bytes left", "agreement"] + ["drop"] * has_drop]
        for trial in self.trials:
            if trial.problem or trial.agreement is None:
                continue
            speeds = (trial.speeds[size] for size in sizes)
            row = [trial.name, *(f"{speed.median:.2f} ({speed.low:.2f} to {speed.high:.2f})" for speed in speeds)]
            rows.append([*row, f"{trial.size:.2f}", f"{trial.agreement.cosine:.4f}"] + [str(trial.drop)] * has_drop)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _rank(trial: Trial) -> tuple[bool, float]:
    return (False, -trial.best[1].median) if trial.best and trial.is_faster else (True, trial.size)


def _gain(trial: Trial) -> str:
    said = "no faster"
    slow = min(trial.speeds.items(), key=lambda pair: pair[1].high)
    if trial.best and trial.is_faster:
        size, speed = trial.best
        said = f"{factor(speed.median)} times faster at batch size {size}"
    elif slow[1].high < 1.0:
        said = f"SLOWER, {factor(slow[1].median)} times the speed at batch size {slow[0]}"
    said += f", {trial.size:.0%} of the bytes"
    return f"{said}; train it afterwards" if trial.is_trained else said
