"""Schemes: what numbers a quantized layer computes with. Plain, frozen, nameable from YAML."""

from __future__ import annotations

from abc import ABC
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lightning_compress.errors import CompressionError, invalid, nearest

ENGINES = ("x86", "fbgemm", "onednn", "qnnpack")


class Scheme(ABC):
    """Base of all schemes: says which numbers, not how a flow gets there."""

    name: str


@dataclass(frozen=True)
class StaticInt8(Scheme):
    """8-bit weights and activations, with the activations' ranges fixed by calibration or training.

    ``Q = clamp(round(R / S) + Z)``: weights symmetric with a scale for each output channel, activations asymmetric per
    tensor.

    Args:
        engine: the int8 kernels of torch: ``x86`` (the default), ``fbgemm``, ``onednn`` or ``qnnpack``.
        reduce_range: 7-bit activations, without which CPUs that lack VNNI overflow in int8 products; None asks this
            CPU.

    References:
        Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        2018 (arXiv:1712.05877), equation 1.
    """

    engine: str = "x86"
    reduce_range: bool | None = None
    name = "int8_static"

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise invalid("engine", f"be one of {', '.join(ENGINES)}", self.engine, nearest(self.engine, ENGINES))


@dataclass(frozen=True)
class DynamicInt8(Scheme):
    """8-bit weights; activations are quantized as they come, with a scale for each token. Linear layers only.

    Weights symmetric with a scale for each output channel. A row ``x`` of activations is divided by its own largest
    magnitude first, so an outlier costs only its own token precision.

    Args:
        reduce_range: 7-bit activations; None asks this CPU (see `StaticInt8`).

    References:
        Dettmers et al., "LLM.int8()", 2022 (arXiv:2208.07339), section 2.1 (row-wise scales).
    """

    reduce_range: bool | None = None
    name = "int8_dynamic"


SCHEMES: dict[str, type[Scheme]] = {cls.name: cls for cls in (StaticInt8, DynamicInt8)}


def resolve(scheme: str | Scheme) -> Scheme:
    """A scheme by its name, or as it is.

    Raises:
        CompressionError: no scheme has this name; the nearest ones are listed.

    Example:
        >>> resolve("int8_static")
        StaticInt8(engine='x86', reduce_range=None)
    """
    if isinstance(scheme, Scheme):
        return scheme
    if not isinstance(scheme, str) or scheme not in SCHEMES:
        raise invalid("scheme", "be the name of a scheme", scheme, nearest(str(scheme), SCHEMES))
    return SCHEMES[scheme]()


def needs_reduced_range() -> bool:
    """Whether int8 products overflow on this CPU, as it has no VNNI (16-bit intermediate sums)."""
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return supported is None or not supported()


def describe(scheme: Scheme) -> dict[str, Any]:
    """A scheme as plain data, with what was asked of this CPU filled in."""
    fields = asdict(scheme)  # type: ignore[call-overload]
    if fields.get("reduce_range") is None:
        fields["reduce_range"] = needs_reduced_range()
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
