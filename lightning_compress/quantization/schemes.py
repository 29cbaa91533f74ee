"""Schemes: what numbers a quantized layer computes with. Plain, frozen, nameable from YAML."""

from __future__ import annotations

from abc import ABC
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lightning_compress.errors import CompressionError, invalid, nearest

ENGINES = ("x86", "fbgemm", "onednn", "qnnpack")
OBSERVERS = ("minmax", "histogram", "moving_average")

AVERAGING_CONSTANT = 0.1
"""Weight of each new batch in a moving average of activation ranges; with torch's 0.01 a short fit would end first."""


class Scheme(ABC):
    """Base of all schemes: says which numbers, not how a flow gets there."""

    name: str


@dataclass(frozen=True)
class StaticInt8(Scheme):
    """8-bit weights and activations, with the activations' ranges fixed by calibration or training.

    ``Q = clamp(round(R / S) + Z)``: weights symmetric with a scale for each output channel, activations asymmetric per
    tensor. What the defaults gain, and what was left out, is in ``docs/quantization.md``.

    Args:
        engine: the int8 kernels of torch: ``x86`` (the default), ``fbgemm``, ``onednn`` or ``qnnpack``.
        observer: how calibration finds the activations' ranges: ``minmax`` takes the extremes of all batches,
            ``histogram`` the range of least squared error, in several times the time, ``moving_average`` a mean of the
            batches' extremes, for batches of 32 and more (training always does so).
        reduce_range: 7-bit weights, without which CPUs that lack VNNI overflow in int8 products; None asks this CPU.
        equalize: before calibration, give the channels between two layers like ranges; the float function stays.
        smooth: before calibration, move the ranges of LayerNorm's outlier channels into the linear layers behind it.

    References:
        Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        2018 (arXiv:1712.05877), equation 1. Nagel et al., 2019 (arXiv:1906.04721), for ``equalize``; Xiao et al.,
        2022 (arXiv:2211.10438), for ``smooth``.
    """

    engine: str = "x86"
    observer: str = "minmax"
    reduce_range: bool | None = None
    equalize: bool = True
    smooth: bool = True
    name = "int8_static"

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise invalid("engine", f"be one of {', '.join(ENGINES)}", self.engine, nearest(self.engine, ENGINES))
        if self.observer not in OBSERVERS:
            remedy = nearest(self.observer, OBSERVERS)
            raise invalid("observer", f"be one of {', '.join(OBSERVERS)}", self.observer, remedy)


@dataclass(frozen=True)
class DynamicInt8(Scheme):
    """8-bit weights; activations are quantized as they come. Linear, LSTM, GRU and attention layers.

    Weights symmetric with a scale for each output channel. A row ``x`` of activations is divided by its own largest
    magnitude first, so an outlier costs only its own token precision.

    Args:
        reduce_range: 7-bit activations for CPUs that lack VNNI; None asks this CPU. (Weights keep 8 bits: the outliers
            are multiplied with them.)

    References:
        Dettmers et al., "LLM.int8()", 2022 (arXiv:2208.07339), section 2.1 (row-wise scales).
    """

    reduce_range: bool | None = None
    name = "int8_dynamic"


@dataclass(frozen=True)
class WeightOnly(Scheme):
    """8-bit weights, computed with in float: a quarter of the size, and no faster.

    Weights symmetric with a scale for each output channel, ``Q = round(W / S)`` with ``S = max|W| / 127``. For layers
    that 8-bit activations hurt, such as a first or last one. Linear and convolution layers.
    """

    name = "int8_weight_only"


SCHEMES: dict[str, type[Scheme]] = {cls.name: cls for cls in (StaticInt8, DynamicInt8, WeightOnly)}


def resolve(scheme: str | Scheme) -> Scheme:
    """A scheme by its name, or as it is.

    Raises:
        CompressionError: no scheme has this name; the nearest ones are listed.

    Example:
        >>> resolve("int8_static")
        StaticInt8(engine='x86', observer='minmax', reduce_range=None, equalize=True, smooth=True)
    """
    if isinstance(scheme, Scheme):
        return scheme
    if not isinstance(scheme, str) or scheme not in SCHEMES:
        raise invalid("scheme", "be the name of a scheme", scheme, nearest(str(scheme), SCHEMES))
    return SCHEMES[scheme]()


def needs_reduced_range(engine: str = "x86") -> bool:
    """Whether int8 products overflow on this CPU, as it adds pairs of them in 16 bit (all but VNNI, and qnnpack).

    ``2 * 255 * 127`` exceeds 32767, with weights of 7 bits ``2 * 255 * 64`` does not.
    """
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return engine != "qnnpack" and (supported is None or not supported())


def describe(scheme: Scheme) -> dict[str, Any]:
    """A scheme as plain data, with what was asked of this CPU filled in."""
    fields = asdict(scheme)  # type: ignore[call-overload]
    if fields.get("reduce_range", False) is None:
        fields["reduce_range"] = needs_reduced_range(fields.get("engine", "x86"))
    return {"name": scheme.name, **fields}


def from_description(description: dict[str, Any]) -> Scheme:
    """The scheme that `describe` described.

    Raises:
        CompressionError: written by a newer version.

    Example:
        >>> from_description(describe(DynamicInt8(reduce_range=True)))
        DynamicInt8(reduce_range=True)
    """
    fields = dict(description)
    name = fields.pop("name")
    if name not in SCHEMES:
        raise CompressionError(f"`scheme` must be known to this version. Received: {name!r} in a checkpoint. Update.")
    return SCHEMES[name](**fields)
