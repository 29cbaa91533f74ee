"""What does a model weigh, and what does it cost? Counted and timed on the model itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from lightning_compress.errors import invalid, is_count, is_number
from lightning_compress.modules.paths import device_of
from lightning_compress.report.facts import FileFacts, QuantizedFacts, listed
from lightning_compress.report.inputs import batch_size_of, resize_batch, to_device
from lightning_compress.report.latency import Latency, measure_latency
from lightning_compress.report.macs import count_macs
from lightning_compress.report.quantized import quantized_facts
from lightning_compress.report.storage import LayerMeasurement, file_bytes, measure_layers

BATCH_SIZES = (1, 32)
MAX_SECONDS = 1.0


@dataclass(frozen=True)
class Measurement:
    """What was measured of a model: plain data that goes to JSON and back.

    ``macs`` are multiply-accumulates for one sample. Where ``uncounted`` names operators they are a lower bound. They
    are None, and ``latency`` is empty, if the model wasn't run. ``compressed_bytes`` is the size of the saved file
    after zlib, where zeros weigh nothing. ``quantized`` is None for a model in float, and ``file`` for one
    that isn't a file for another runtime.
    """

    parameters: int
    nonzeros: int
    size_bytes: int
    compressed_bytes: int | None
    macs: int | None
    uncounted: tuple[str, ...]
    latency: tuple[Latency, ...]
    layers: tuple[LayerMeasurement, ...]
    device: str
    threads: int
    quantized: QuantizedFacts | None = None
    file: FileFacts | None = None

    @property
    def sparsity(self) -> float:
        """Fraction of the parameters that are zero."""
        return 1.0 - self.nonzeros / self.parameters if self.parameters else 0.0

    @property
    def latency_ms(self) -> dict[int, float]:
        """Median latency of one call in milliseconds, by batch size."""
        return {timed.batch_size: timed.median_ms for timed in self.latency}

    def as_dict(self) -> dict[str, Any]:
        """Return numbers, strings, lists and dicts only."""
        return {key: listed(value) for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Measurement:
        """Build the measurement that `as_dict` described."""
        return cls(
            **{
                **plain,
                "uncounted": tuple(plain["uncounted"]),
                "latency": tuple(Latency(**{**at, "rounds_ms": tuple(at["rounds_ms"])}) for at in plain["latency"]),
                "layers": tuple(LayerMeasurement(**layer) for layer in plain["layers"]),
                "quantized": None if plain["quantized"] is None else QuantizedFacts(**plain["quantized"]),
                "file": None if plain["file"] is None else FileFacts.from_dict(plain["file"]),
            }
        )


def measure(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    max_seconds: float = MAX_SECONDS,
    threads: int | None = None,
) -> Measurement:
    """Measure a model: parameters, non-zeros, bytes on disk, multiply-accumulates and latency.

    The model is run on its own device in evaluation mode under ``inference_mode`` and is left bit-identical: buffers,
    training flags, attributes and the global random state are put back.

    Args:
        model: Any module, float or quantized. A parameter counts once however many names it has; packed int8 weights
            count like the float ones that they came from.
        example_inputs: A tensor, a tuple or list of positional arguments, or a dict of keyword arguments, with the
            batch as dimension 0, of any size: samples are repeated to fill a batch. None: the model isn't run, and
            ``macs`` and ``latency`` stay empty.
        batch_sizes: Sizes at which latency is measured.
        max_seconds: Time budget for each batch size.
        threads: Threads of torch while latency is measured; those that are set now by default. One gives steadier
            numbers on a machine that does other work.

    Returns:
        Plain numbers. Sizes are in bytes: ``size_bytes`` of the file that ``torch.save(model.state_dict())`` writes.

    Raises:
        CompressionError: a setting isn't positive, a parameter has no shape yet, or the inputs hold no batch.

    Example:
        >>> measurement = measure(nn.Linear(10, 5), torch.ones(1, 10), batch_sizes=[1], max_seconds=0.01)
        >>> measurement.parameters, measurement.macs
        (55, 50)
    """
    rows = measure_in_turns(
        {"": model}, example_inputs, batch_sizes=batch_sizes, max_seconds=max_seconds, threads=threads
    )
    return rows[""]


def measure_in_turns(
    models: Mapping[str, nn.Module],
    example_inputs: Any = None,
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    max_seconds: float = MAX_SECONDS,
    threads: int | None = None,
) -> dict[str, Measurement]:
    """Measure several models as `measure` does, their latency in turns: what slows the machine slows them all.

    Args:
        models: Name to model; all are run on the same inputs.
        example_inputs: As in `measure`.
        batch_sizes: Likewise.
        max_seconds: Time budget for each model and batch size.
        threads: As in `measure`.

    Returns:
        Name to measurement; `compare` takes ratios of speed round by round.

    Raises:
        CompressionError: as `measure`.

    Example:
        >>> models = {"large": nn.Linear(64, 64), "small": nn.Linear(64, 4)}
        >>> rows = measure_in_turns(models, torch.ones(1, 64), batch_sizes=[1], max_seconds=0.01)
        >>> rows["large"].macs, rows["small"].macs
        (4096, 256)
    """
    check_settings(batch_sizes, max_seconds, threads)
    if example_inputs is not None:
        batch_size_of(example_inputs)
    counted = {name: count(model, example_inputs) for name, model in models.items()}
    if example_inputs is None:
        return counted
    sized = {size: resize_batch(example_inputs, size) for size in dict.fromkeys(batch_sizes)}
    slots = {name: (model, to_device(sized, device_of(model))) for name, model in models.items()}
    latency = measure_latency(slots, max_seconds, threads)
    used = threads or torch.get_num_threads()
    return {name: replace(row, latency=latency[name], threads=used) for name, row in counted.items()}


def count(model: nn.Module, example_inputs: Any = None) -> Measurement:
    """Measure all but latency.

    Example:
        >>> count(nn.Linear(10, 5), torch.ones(1, 10)).macs
        50
    """
    layers = measure_layers(model)
    size_bytes, compressed_bytes = file_bytes(model)
    macs: int | None = None
    uncounted: tuple[str, ...] = ()
    if example_inputs is not None:
        macs, uncounted = count_macs(model, resize_batch(to_device(example_inputs, device_of(model)), 1))
    return Measurement(
        parameters=sum(layer.parameters for layer in layers),
        nonzeros=sum(layer.nonzeros for layer in layers),
        size_bytes=size_bytes,
        compressed_bytes=compressed_bytes,
        # Nothing that has a formula ran, but something that has none did: unknown, not zero.
        macs=None if uncounted and not macs else macs,
        uncounted=uncounted,
        latency=(),
        layers=layers,
        device=device_of(model).type,
        threads=torch.get_num_threads(),
        quantized=quantized_facts(model),
    )


def check_settings(batch_sizes: Sequence[int], max_seconds: float, threads: int | None) -> None:
    """Raise the error for settings that `measure` can't use.

    Example:
        >>> check_settings([0], 1.0, None)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        lightning_compress.errors.CompressionError: `batch_sizes` must hold positive integers. Received: ...
    """
    if not isinstance(batch_sizes, Sequence) or not batch_sizes or not all(map(is_count, batch_sizes)):
        raise invalid("batch_sizes", "hold positive integers", batch_sizes)
    if not (is_number(max_seconds) and max_seconds > 0):
        raise invalid("max_seconds", "be positive", max_seconds)
    if threads is not None and not is_count(threads):
        raise invalid("threads", "be a positive integer or None", threads)
