"""What is known of a row beside what it weighs: how it was quantized, how its file was proven, which layers hurt."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_compress.errors import invalid


@dataclass(frozen=True)
class QuantizedFacts:
    """How a model is quantized.

    Attributes:
        floats: layers that stay float, or are quantized in parts, with the reason.
        errors: by layer of static int8, what rounding changes: ``|y' - y| / |y|``, of exact inputs y and of rounded
            ones y'; empty where it wasn't measured.
        cosine: the least cosine of an output with that of the float model; None where it wasn't measured.
        same_class: the share of samples whose largest output is the same one; None where no output is a matrix.
        batches: on which they were compared.
    """

    floats: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    cosine: float | None = None
    same_class: float | None = None
    batches: int = 0


@dataclass(frozen=True)
class FileLatency:
    """The time of a batch in a file's runtime and in torch, in turns: ``ratio`` is file / model, with its quartiles."""

    batch_size: int
    file_ms: float
    model_ms: float
    baseline: str
    ratio: float
    quartiles: tuple[float, float]
    threads: int


@dataclass(frozen=True)
class FileFacts:
    """How a file for another runtime was proven, as it was written.

    Attributes:
        target: what it is for.
        runtime: in which it was run.
        versions: of the packages that wrote and ran it.
        int8: layers that the runtime computes in int8.
        floats: quantized layers that the runtime computes in float, with the reason.
        dequantized: layers whose weights of few bits become floats when the file is loaded.
        parity: ``cosine``, ``same_class``, ``samples`` and ``batch_sizes`` of the comparison with the model; None where
            it wasn't compared.
        latency: by batch size.
    """

    target: str
    runtime: str
    versions: dict[str, str]
    int8: tuple[str, ...]
    floats: dict[str, str]
    dequantized: tuple[str, ...]
    parity: dict[str, Any] | None
    latency: tuple[FileLatency, ...]

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> FileFacts | None:
        """Take them out of what stands beside an exported file; None where nothing is known."""
        if "runtime" not in facts:
            return None
        parity = facts.get("parity")
        compared = ("cosine", "same_class", "samples", "batch_sizes")
        return cls(
            target=facts["target"],
            runtime=facts["runtime"],
            versions=dict(facts.get("versions", {})),
            int8=tuple(facts.get("int8", ())),
            floats=dict(facts.get("float", {})),
            dequantized=tuple(facts.get("dequantized", ())),
            parity=None if parity is None else {name: listed(parity[name]) for name in compared},
            latency=tuple(
                FileLatency(batch_size=int(size), **{**times, "quartiles": tuple(times["quartiles"])})
                for size, times in facts.get("latency", {}).items()
            ),
        )

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> FileFacts:
        """Build what `dataclasses.asdict` described, after JSON has made lists of its tuples."""
        latency = tuple(FileLatency(**{**times, "quartiles": tuple(times["quartiles"])}) for times in plain["latency"])
        lists = {name: tuple(plain[name]) for name in ("int8", "dequantized")}
        return cls(**{**plain, **lists, "latency": latency})


def listed(value: Any) -> Any:
    """Return plain data with lists in place of tuples, as JSON gives it back."""
    if isinstance(value, dict):
        return {key: listed(item) for key, item in value.items()}
    return [listed(item) for item in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class LayerSensitivity:
    """What one layer alone costs the metric at one level; ``drop`` is None where only a ``score`` predicts it."""

    layer: str
    level: str
    drop: float | None
    drop_error: float | None
    score: float | None


@dataclass(frozen=True)
class Sensitivity:
    """What each layer alone costs, as `sensitivity` measured it: ``of`` int8, weights, pruning or channels."""

    of: str
    metric: float
    layers: tuple[LayerSensitivity, ...]

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Sensitivity:
        """Build it from a saved table or a saved report, whose further entries don't count."""
        names = ("layer", "level", "drop", "drop_error", "score")
        rows = plain["rows"] if "rows" in plain else plain["layers"]
        layers = tuple(LayerSensitivity(**{name: row[name] for name in names}) for row in rows)
        metric = plain["metric"]
        return cls(str(plain["of"]), math.nan if metric is None else float(metric), layers)

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Read a table that ``SensitivityTable.save`` or ``lightning-compress sensitivity --output`` wrote as JSON.

        Raises:
            CompressionError: there is no such file, or it holds no table.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            remedy = f"({type(error).__name__}: {error}) Write it: lightning-compress sensitivity --output table.json."
            raise invalid("sensitivity", "be a table of sensitivities as JSON", str(path), remedy) from error

    def worst(self) -> dict[str, LayerSensitivity]:
        """Return of each layer the level that costs most, measured ones first."""
        found: dict[str, LayerSensitivity] = {}
        for row in self.layers:
            if row.layer not in found or _cost(row) > _cost(found[row.layer]):
                found[row.layer] = row
        return found


def _cost(row: LayerSensitivity) -> tuple[bool, float]:
    return (row.drop is not None, row.score or 0.0 if row.drop is None else row.drop)
