"""`advise` tries the usual ways on a model for a while, and says which of them are worth it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import nn

from lightning_compress.channels.remove_channels import plan_removal, remove_channels_
from lightning_compress.choosing.advice import Advice, Trial
from lightning_compress.choosing.evaluations import Evaluate, Mode, check_mode, drop, evaluated
from lightning_compress.choosing.forms import Run
from lightning_compress.choosing.layer_facts import layer_facts
from lightning_compress.choosing.speed import Speed, milliseconds, quantized_copy
from lightning_compress.errors import CompressionError, in_a_line, invalid
from lightning_compress.modules.agreement import Agreement, outputs_of
from lightning_compress.modules.calls import samples_in, way_without_trainer
from lightning_compress.modules.copying import copy_module
from lightning_compress.modules.isolation import evaluation_mode
from lightning_compress.modules.paths import modules_of
from lightning_compress.quantization.recipe import Recipe
from lightning_compress.report.inputs import resize_batch
from lightning_compress.report.measure import count
from lightning_compress.structure.change import require_float

Make = Callable[[nn.Module, Sequence[Any], Run], nn.Module]

MOST_BATCHES, HELD_OUT = 8, 2
SHARE = 0.75
"""So many of the channels stay in the trial."""
_SCHEMES = ("int8_dynamic", "int8_weight_only", "int4_weight_only")


def advise(
    model: nn.Module,
    batches: Iterable[Any],
    evaluate: Evaluate | None = None,
    mode: Mode = "max",
    seconds: float = 120.0,
) -> Advice:
    """Find out what to try first on a model, and what not to bother with; the model is left as it is.

    Static int8, three quarters of the channels, dynamic int8, and weights in 8 and 4 bits are tried in this order on
    copies. Each is timed in turns with the model, on batches of one sample and of as many as ``batches`` have; its
    outputs are compared with the model's on two batches that it wasn't calibrated on. Nothing is trained.

    Args:
        model: any float module.
        batches: three or more of what ``forward`` takes, as for `quantize`; at most ten are read.
        evaluate: returns the metric of a model, as for `sensitivity`.
        mode: ``max`` where more of the metric is better, ``min`` where less is.
        seconds: no trial begins after so many.

    Returns:
        What was measured, with a verdict on each trial and the YAML of the best one.

    Raises:
        CompressionError: bad arguments, or a model that is compressed already.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
        >>> batches = [torch.randn(8, 16, generator=torch.Generator().manual_seed(n)) for n in range(4)]
        >>> [trial.name for trial in advise(model, batches, seconds=0.0).trials]
        ['int8_static', 'channels', 'int8_dynamic', 'int8_weight_only', 'int4_weight_only']
    """
    return advise_by(way_without_trainer(model), model, batches, evaluate, mode, seconds)


def advise_by(
    run: Run, model: nn.Module, batches: Iterable[Any], evaluate: Evaluate | None, mode: Mode, seconds: float
) -> Advice:
    """Advise where batches go through the model in a way of their own; the other arguments are those of `advise`."""
    started = time.monotonic()
    check_mode(mode)
    if isinstance(batches, torch.Tensor) or not isinstance(batches, Iterable):
        raise invalid("batches", "be batches", type(batches).__name__, "Put a tensor in a list.")
    taken = list(islice(batches, MOST_BATCHES + HELD_OUT))
    if len(taken) <= HELD_OUT:
        raise invalid("batches", f"give {HELD_OUT + 1} batches or more", len(taken), f"{HELD_OUT} are held out.")
    require_float(model)
    calibration, held_out = taken[:-HELD_OUT], taken[-HELD_OUT:]
    with torch.inference_mode(False), evaluation_mode(model):
        sizes = _sized(held_out[0])
        whole, metric = count(model), None if evaluate is None else evaluated(evaluate, model)
        expected = outputs_of(model, held_out, run)
        trials = list[Trial]()
        for name, (settings, make) in _ways().items():
            if time.monotonic() - started >= seconds:
                trials.append(Trial(name, settings, problem=f"the {seconds:g} seconds were over", is_tried=False))
                continue
            try:
                with warnings.catch_warnings(action="ignore"):  # what is said of a trial is what was measured
                    small = make(model, calibration, run)
                agreement = Agreement.of(expected, outputs_of(small, held_out, run))
                speeds = {size: Speed.beside(model, small, run, batch) for size, batch in sizes.items()}
                fall = None if metric is None or evaluate is None else drop(metric, evaluated(evaluate, small), mode)
            except Exception as error:  # a model that doesn't take one way may take the next
                trials.append(Trial(name, settings, problem=in_a_line(error)))
                continue
            trials.append(Trial(name, settings, speeds, count(small).size_bytes / whole.size_bytes, agreement, fall))
        times, macs = _where(model, run, held_out[0])
        latency_ms = milliseconds(model, run, held_out[0])
    facts = type(model).__name__, whole.parameters, whole.size_bytes, macs, samples_in(held_out[0]), latency_ms
    return Advice(*facts, times, tuple(trials))


def _ways() -> Mapping[str, tuple[Mapping[str, Any], Make]]:
    """Return what is tried, by name: the callback as YAML says it, and a function that makes the smaller model."""

    def scheme(name: str) -> tuple[Mapping[str, Any], Make]:
        said = {"class_path": "lightning_compress.PostTrainingQuantization", "init_args": {"scheme": name}}
        recipe = Recipe(name, MOST_BATCHES, None, None, "auto")
        return said, lambda model, batches, run: quantized_copy(model, recipe, batches, run)

    channels = {"class_path": "lightning_compress.ChannelPruning", "init_args": {"channels": SHARE}}
    others = {name: scheme(name) for name in _SCHEMES}
    return {"int8_static": scheme("int8_static"), "channels": (channels, _narrow), **others}


def _narrow(model: nn.Module, batches: Sequence[Any], run: Run) -> nn.Module:
    twin = copy_module(model)
    plan = plan_removal(twin, channels=SHARE, calibration=batches)
    remove_channels_(twin, plan, calibration=batches)
    return twin


def _sized(batch: Any) -> dict[int, Any]:
    """Return a batch of one sample and the batch itself, by their sizes; only the batch where it has no samples."""
    try:
        one = {1: resize_batch(batch, 1)}
    except CompressionError:
        one = {}
    return {**one, samples_in(batch): batch}


def _where(model: nn.Module, run: Run, batch: Any) -> tuple[dict[str, float], float]:
    """Return the milliseconds that the layers of each class take, the longest first, and MACs of a sample."""
    leaves = {path: module for path, module in modules_of(model).items() if not any(module.children())}
    facts = layer_facts(model, run, batch, leaves)
    times = dict[str, float]()
    for path, fact in facts.items():
        name = type(leaves[path]).__name__
        times[name] = times.get(name, 0.0) + fact.latency_ms
    order = sorted(times, key=lambda name: -times[name])
    return {name: times[name] for name in order}, sum(fact.macs for fact in facts.values())
