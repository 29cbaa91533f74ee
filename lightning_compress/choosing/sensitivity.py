"""`sensitivity` says which layer hurts: what each alone costs the metric, at each level."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_compress.choosing.channel_forms import ChannelForms
from lightning_compress.choosing.evaluations import Evaluate, Evaluation, Mode, check_mode, drop, evaluated
from lightning_compress.choosing.forms import Forms, Run
from lightning_compress.choosing.int8_forms import Int8Forms
from lightning_compress.choosing.resume import Progress, digest
from lightning_compress.choosing.scheme_text import plain
from lightning_compress.choosing.table import SensitivityRow, SensitivityTable
from lightning_compress.choosing.weight_forms import PruningForms, WeightForms
from lightning_compress.compensation.hold_out import relative_error
from lightning_compress.errors import CompressionError, invalid, nearest
from lightning_compress.modules.agreement import outputs_of
from lightning_compress.modules.calls import way_without_trainer
from lightning_compress.quantization.numerics.scheme import Scheme

Kind = Literal["int8", "weights", "pruning", "channels"]
Method = Literal["taylor", "measured"]
Level = str | float | Scheme

_KINDS: dict[str, Callable[..., Forms]] = {
    "int8": Int8Forms,
    "weights": WeightForms,
    "pruning": PruningForms,
    "channels": ChannelForms,
}
MOST_BATCHES = 32
_RANKED = 5
"""Ranks of fewer rows say nothing."""
_COMPARED = 4
"""On so many batches the error of the outputs is measured."""


def sensitivity(
    model: nn.Module,
    evaluate: Evaluate,
    batches: Iterable[Any],
    of: Kind = "int8",
    levels: Sequence[Level] | None = None,
    method: Method = "taylor",
    mode: Mode = "max",
    top: int = 8,
    path: str | Path | None = None,
    seed: int = 0,
) -> SensitivityTable:
    """Find out what each layer alone costs, compressed at each level; the model is left as it is.

    Taylor scores predict the squared error of the outputs for all layers and levels, of one forward and backward pass
    over ``batches``: ``e = sum_s (dL/dy_s (f'(x_s) - f(x_s)))^2 / n``, where the layer f becomes f', and the loss L is
    a random product of the outputs, so that its mean is the squared change to first order. The layers with the largest
    scores, or with ``method="measured"`` all, are then really compressed, one at a time, and evaluated.

    Of int8 the first lines say what weights alone and activations alone cost: where it is activations, calibrate with a
    histogram or train; where it is weights, leave layers float. Each layer is then also left out of int8.

    Args:
        model: any float module.
        evaluate: returns the metric of a model, which it doesn't change: a number, or one for each sample,
            ``(samples,)``, by which drops get a standard error, paired by sample. `ValidationMetric` makes it of a
            Trainer.
        batches: of what ``forward`` takes, as for `quantize`; not of the data that ``evaluate`` uses. At most 32.
        of: ``int8`` (static), ``weights`` (in few bits), ``pruning`` or ``channels``.
        levels: schemes for weights alone, by name or as objects; fractions of a layer's weights that are zero; or of
            its channels that stay. By default 8, 4, 3 and 2 bits in groups of 32 with zero points; 0.5 to 0.98 zero;
            0.875 to 0.25 of the channels.
        method: ``taylor`` evaluates only what has the largest scores, ``measured`` all.
        mode: ``max`` where more of the metric is better, ``min`` where less is.
        top: with ``taylor``, so many layers are evaluated, each at the level with its largest score.
        path: a file of JSON lines that each evaluation is appended to. An interrupted run goes on where it was.
        seed: of the random products.

    Returns:
        The table, the worst layers first.

    Raises:
        CompressionError: bad arguments, nothing that can be compressed, or a file of another model or settings.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
        >>> batches = [torch.randn(8, 16, generator=torch.Generator().manual_seed(0)) for _ in range(4)]
        >>> wanted = model(batches[0]).argmax(1)
        >>> def accuracy(model):
        ...     return (model(batches[0]).argmax(1) == wanted).float()
        >>> table = sensitivity(model, accuracy, batches, "weights")
        >>> table.metric, sorted({row.layer for row in table.rows})
        (1.0, ['0', '2'])

    References:
        Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019 (arXiv:1906.10771); Dong et al.,
        "HAWQ-V2", 2019 (arXiv:1911.03852), rank layers by the trace of the loss' Hessian. Here the outputs themselves
        are kept, and the change is that of the layer's output, so that activations, attention and recurrence count.
    """
    forms, taken = make_forms(model, batches, of, levels)
    return measure_forms(
        forms, evaluate, taken, of, way_without_trainer(model), method, mode, top, path, seed, digest(model)
    )


def make_forms(
    model: nn.Module,
    batches: Iterable[Any],
    of: str,
    levels: Sequence[Level] | None = None,
    run: Run | None = None,
) -> tuple[Forms, list[Any]]:
    """Check what is to be compressed; return its forms, and the batches.

    Raises:
        CompressionError: see `sensitivity`.
    """
    if of not in _KINDS:
        raise invalid("of", f"be one of {', '.join(_KINDS)}", of, nearest(str(of), _KINDS))
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise invalid("batches", "be batches", type(batches).__name__, "Put a tensor in a list.")
    if not (taken := list(islice(batches, MOST_BATCHES))):
        raise invalid("batches", "give at least one batch", "an empty loader")
    if levels is not None and (isinstance(levels, str) or not levels):
        raise invalid("levels", "be a list of levels", levels)
    options = {} if levels is None else {"levels": levels}
    with torch.inference_mode(False):
        return _KINDS[of](model, taken, run or way_without_trainer(model), **options), taken


def measure_forms(
    forms: Forms,
    evaluate: Evaluate,
    batches: Sequence[Any],
    of: str,
    run: Run,
    method: str = "taylor",
    mode: Mode = "max",
    top: int = 8,
    path: str | Path | None = None,
    seed: int = 0,
    model_digest: str = "",
    splits: bool = True,
) -> SensitivityTable:
    """Make the table of forms that are known; the arguments are those of `sensitivity`."""
    if method not in get_args(Method):
        raise invalid("method", "be 'taylor' or 'measured'", method)
    check_mode(mode)
    if type(top) is not int or top < 0:
        raise invalid("top", "be a whole number, at least 0", top)
    with forms.compressed({}) as whole:
        before = evaluated(evaluate, whole)
        expected = outputs_of(whole, batches[:_COMPARED], run)
    settings = {"version": 1, "of": of, "levels": list(forms.levels), "mode": mode, "model": model_digest}
    progress = Progress(path, {**settings, "batches": len(batches), "metric": before.value})
    measurer = _Measurer(forms, evaluate, before, mode, (batches[:_COMPARED], run, expected), progress)
    scores = _scores(forms, batches, seed, method)
    rows = {key: row_of(forms, *key, score) for key, score in scores.items()}
    order = sorted(rows, key=lambda key: -(rows[key].score or 0.0))
    chosen = order if method == "measured" else _tops(order, top)
    parts = forms.splits() if splits else {}
    left_out = list(chosen) if of == "int8" and len(forms.layers) > 1 else []
    with tqdm(total=len(parts) + len(chosen) + len(left_out), desc="Evaluating", leave=False, disable=None) as bar:
        found_splits = {}
        for name, form in parts.items():
            found_splits[name] = _with(SensitivityRow("", name), measurer.of(("", name, "split"), form))
            bar.update()
        for layer, level in chosen:
            form = forms.compressed({layer: level})
            rows[layer, level] = _with(rows[layer, level], measurer.of((layer, level, "alone"), form))
            bar.update()
        for layer, level in left_out:
            rest = {other: level for other in forms.layers if other != layer}
            found = measurer.of((layer, level, "left out"), forms.compressed(rest))
            rows[layer, level] = replace(rows[layer, level], drop_left_out=found["drop"])
            bar.update()
    table = SensitivityTable(
        of=of,
        metric=before.value,
        mode=mode,
        rows=tuple(sorted(rows.values(), key=lambda row: (-_worse(row), -(row.score or 0.0)))),
        levels=forms.levels,
        splits=found_splits,
        skipped=dict(forms.skipped),
        scheme_of={level: _said(forms, level) for level in forms.levels},
    )
    return replace(table, notes=tuple(_notes(table, before)))


def _scores(forms: Forms, batches: Sequence[Any], seed: int, method: str) -> dict[tuple[str, str], float | None]:
    """Return Taylor scores; where all is measured they may be missing, as of outputs without gradients."""
    try:
        return {**forms.taylor(batches, seed)}
    except CompressionError:
        if method == "taylor":
            raise
        return {(layer, level): None for layer, levels in forms.layers.items() for level in levels}


def _tops(order: Sequence[tuple[str, str]], top: int) -> list[tuple[str, str]]:
    """Return the first level of each of the first layers."""
    first = {layer: (layer, level) for layer, level in reversed(order)}
    return sorted(first.values(), key=order.index)[:top]


def _worse(row: SensitivityRow) -> float:
    return -math.inf if row.drop is None else row.drop


class _Measurer:
    """Evaluates forms, unless they have been."""

    def __init__(
        self,
        forms: Forms,
        evaluate: Evaluate,
        before: Evaluation,
        mode: Mode,
        outputs: tuple[Sequence[Any], Run, list[list[Any]]],
        progress: Progress,
    ) -> None:
        self.forms, self.evaluate, self.before, self.mode = forms, evaluate, before, mode
        self.batches, self.run, self.expected = outputs
        self.progress = progress

    def of(self, key: tuple[str, str, str], form: AbstractContextManager[nn.Module]) -> dict[str, Any]:
        """Return drop, its error, and the error of the outputs."""
        if key in self.progress.found:
            return self.progress.found[key]
        with form as model:
            fall = drop(self.before, evaluated(self.evaluate, model), self.mode)
            error = relative_error(self.expected, outputs_of(model, self.batches, self.run))
        return self.progress.add(key, {"drop": fall.value, "drop_error": fall.error, "error": error})


def _with(row: SensitivityRow, found: Mapping[str, Any]) -> SensitivityRow:
    return replace(row, **found)


def row_of(forms: Forms, layer: str, level: str, score: float | None = None) -> SensitivityRow:
    """Return what a layer's level saves, unmeasured."""
    saved, fact = forms.cost({}) - forms.cost({layer: level}), getattr(forms, "facts", {}).get(layer)
    return SensitivityRow(
        layer,
        level,
        score,
        parameters=saved.parameters,
        macs=saved.macs if isinstance(forms, ChannelForms) else None if fact is None else fact.macs,
        size_bytes=saved.size_bytes,
        latency_ms=None if fact is None else fact.latency_ms,
    )


def _said(forms: Forms, level: str) -> Any:
    """Return what YAML says of a level."""
    if isinstance(forms, WeightForms):
        return plain(forms.schemes[level])
    return plain(forms.scheme) if isinstance(forms, Int8Forms) else float(level)


def _notes(table: SensitivityTable, before: Evaluation) -> list[str]:
    notes = []
    measured = [row for row in table.rows if row.drop is not None]
    if before.samples is None:
        notes.append("drops have no standard error: `evaluate` gives a single value, or has a single batch")
    if len(measured) < len(table.rows):
        notes.append(f"evaluated: {len(measured)} of {len(table.rows)} rows, those of the largest Taylor scores")
    if len(measured) >= _RANKED and not math.isnan(alike := table.rank_correlation()):
        beyond = table.rank_correlation(beyond_noise=True)
        of_these = "" if math.isnan(beyond) or before.samples is None else f", {beyond:.2f} of those beyond their noise"
        notes.append(f"Taylor scores rank the evaluated rows as their drops do: Spearman {alike:.2f}{of_these}")
    if table.splits:
        weights, activations = (table.splits[name].error or 0.0 for name in ("weights alone", "activations alone"))
        remedy = (
            "calibrate with StaticInt8(observer='histogram'), or train with QuantizationAwareTraining"
            if activations > weights
            else "leave the worst layers float, or give them another scheme"
        )
        more = "activations" if activations > weights else "weights"
        notes.append(f"{more} have the larger part in the error: where it is too large, {remedy}")
    return notes


def worst_first(model: nn.Module, batches: Iterable[Any], run: Run | None = None, seed: int = 0) -> dict[str, float]:
    """Return the predicted relative error of the outputs for each layer alone in static int8, the worst first.

    Nothing is evaluated: one calibration, one forward and backward pass. ``model`` is float, and left as it is.
    """
    forms, taken = make_forms(model, batches, "int8", run=run)
    scores = forms.taylor(taken, seed)
    return {layer: score for (layer, _), score in sorted(scores.items(), key=lambda item: -item[1])}
