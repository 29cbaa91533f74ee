"""Schemes: what numbers a quantized layer computes with. Plain, frozen, nameable from YAML."""

from __future__ import annotations

import warnings
from abc import ABC
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
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
    """8-bit weights; activations are quantized to 8 bits as they come. Linear, LSTM, GRU and attention layers.

    Weights symmetric with a scale for each output channel. All activations of a call share one scale, which is fast;
    or each token has its own, and columns of outliers are multiplied in float, which is slower and more exact.

    Args:
        per_token: a scale for each token and outlier columns in float, in linear and attention layers. None decides
            for each layer by a batch, where there is one: only layers whose outputs are far off without.
        reduce_range: 7-bit weights, without which CPUs that lack VNNI overflow in int8 products; None asks this CPU.
            Weights that were stored in 8 bits are rounded to 7 where a CPU needs it.

    Raises:
        CompressionError: ``per_token`` is neither a boolean nor None.

    References:
        Dettmers et al., "LLM.int8()", 2022 (arXiv:2208.07339), sections 2.1 (row-wise scales) and 3.2 (outliers).
    """

    per_token: bool | None = None
    reduce_range: bool | None = None
    name = "int8_dynamic"

    def __post_init__(self) -> None:
        if not isinstance(self.per_token, bool | None):
            raise invalid("per_token", "be true, false or none", self.per_token)


class Packed(Scheme):
    """Base of the schemes that store weights in few bits and compute with them in float, on any device.

    Linear, Conv1d to Conv3d, Embedding and attention layers. Embeddings, and below 8 bits the last layer, stay as they
    are unless a pattern of `overrides` or `targets` names that very layer.
    """

    bits: int


@dataclass(frozen=True)
class WeightOnly(Packed):
    """Weights of 2 to 8 bits, each rounded to the nearest code: ``Q = round(W / S) + Z``.

    Symmetric: Z is the middle of the codes, and ``S = max(max(W) / (2^(bits-1) - 1), -min(W) / 2^(bits-1))``.
    Asymmetric: ``S = (max(W) - min(W)) / (2^bits - 1)``. A weight takes ``bits + 16 / group_size`` bits, asymmetric
    ones ``bits / group_size`` more.

    Args:
        bits: 2 to 8.
        group_size: weights along the input dimension with a scale (and zero point) of their own; None is a scale for
            each output channel.
        symmetric: without zero points.

    Raises:
        CompressionError: an argument is out of range.

    References:
        Krishnamoorthi, 2018 (arXiv:1806.08342), section 2; Shen et al., "Q-BERT", 2019 (arXiv:1909.05840), for groups.
    """

    bits: int = 8
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        _check_bits(self.bits)
        _check_block("group_size", self.group_size)

    @property
    def name(self) -> str:  # type: ignore[override]
        """``int8_weight_only`` and so on."""
        return f"int{self.bits}_weight_only"


@dataclass(frozen=True)
class NF4(Packed):
    """4-bit weights of 16 quantiles of the normal distribution: ``W = A * NF4_VALUES[Q]``.

    A is the largest magnitude of the weight's block, itself stored in 8 bits (double quantization), so that a weight
    takes about ``4 + 8 / block_size`` bits. Takes no calibration. What `QLoRA` trains on top of.

    Args:
        block_size: weights along the input dimension with a scale of their own.

    Raises:
        CompressionError: ``block_size`` is out of range.

    References:
        Dettmers et al., "QLoRA", 2023 (arXiv:2305.14314), section 3. Our scales are quantized in the logarithm, where
        one outlier costs its neighbours little, and blocks don't reach across rows.
    """

    block_size: int = 64
    bits = 4
    name = "nf4"

    def __post_init__(self) -> None:
        _check_block("block_size", self.block_size)
        if self.block_size is None:
            raise invalid("block_size", "be at least 2", None)


@dataclass(frozen=True)
class GPTQ(Packed):
    """Weights of 2 to 8 bits, rounded one input column at a time, where later columns make up for the error so far.

    Minimizes ``||X W^T - X W_q^T||^2`` of each layer over calibration inputs X, which come from layers that are
    quantized already. Stored as `WeightOnly` is.

    Args:
        bits: 2 to 8.
        group_size: as in `WeightOnly`.
        symmetric: as in `WeightOnly`.
        damping: added to the Hessian's diagonal, as a fraction of its mean.
        activation_order: round the columns with the largest inputs first.

    Raises:
        CompressionError: an argument is out of range.

    References:
        Frantar et al., "GPTQ", 2022 (arXiv:2210.17323), algorithm 1.
    """

    bits: int = 4
    group_size: int | None = 128
    symmetric: bool = True
    damping: float = 0.01
    activation_order: bool = False
    name = "gptq"

    def __post_init__(self) -> None:
        _check_bits(self.bits)
        _check_block("group_size", self.group_size)
        if isinstance(self.damping, bool) or not isinstance(self.damping, int | float) or not 0.0 < self.damping <= 1.0:
            raise invalid("damping", "lie in (0, 1]", self.damping, "It is a fraction of the Hessian's mean diagonal.")


def _check_bits(bits: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise invalid("bits", "be 2 to 8", bits)


def _check_block(name: str, size: int | None) -> None:
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 2):
        raise invalid(name, "be at least 2", size, "A power of two such as 32, 64 or 128 is usual.")


SCHEMES: dict[str, Scheme] = {
    "int8_static": StaticInt8(),
    "int8_dynamic": DynamicInt8(),
    "int8_weight_only": WeightOnly(bits=8),
    "int4_weight_only": WeightOnly(bits=4, group_size=128),
    "nf4": NF4(),
    "gptq": GPTQ(),
}
"""Schemes by name."""

_CLASSES = {type(scheme).__name__: type(scheme) for scheme in SCHEMES.values()}


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
    return SCHEMES[scheme]


def needs_reduced_range(engine: str = "x86") -> bool:
    """Whether int8 products overflow on this CPU, as it adds pairs of them in 16 bit (all but VNNI, and qnnpack).

    ``2 * 255 * 127`` exceeds 32767, with weights of 7 bits ``2 * 255 * 64`` does not.
    """
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    # The kernel is asked too: settings such as ONEDNN_MAX_CPU_ISA can keep it from what the CPU has.
    return engine != "qnnpack" and (supported is None or not supported() or _kernel_overflows(engine))


@cache
def _kernel_overflows(engine: str) -> bool:
    """Whether a linear or a convolution kernel gets the largest products wrong; each may be another kind of kernel."""
    before = torch.backends.quantized.engine
    with warnings.catch_warnings(), torch.inference_mode(False):
        warnings.simplefilter("ignore")  # torch announces the end of its quantized tensors
        try:
            torch.backends.quantized.engine = engine
            weight = torch.full((16, 16), 127, dtype=torch.int8)
            total = weight.shape[1] * 255 * 127
            linear = torch.ops.quantized.linear_prepack(torch._make_per_tensor_quantized_tensor(weight, 1.0, 0), None)
            kernel = torch._make_per_tensor_quantized_tensor(weight.view(16, 16, 1, 1), 1.0, 0)
            conv = torch.ops.quantized.conv2d_prepack(kernel, None, [1, 1], [0, 0], [1, 1], 1)
            image = torch.quantize_per_tensor(torch.full((1, 16, 8, 8), 255.0), 1.0, 0, torch.quint8)
            found = (
                torch.ops.quantized.linear_dynamic(torch.full((1, 16), 255.0), linear, False),
                torch.ops.quantized.conv2d(image, conv, total / 200, 0).dequantize(),
            )
        finally:
            torch.backends.quantized.engine = before
    return any(bool(one.min() < 0.99 * total) for one in found)


def describe(scheme: Scheme) -> dict[str, Any]:
    """A scheme as plain data, with what was asked of this CPU filled in."""
    fields = asdict(scheme)  # type: ignore[call-overload]
    if fields.get("reduce_range", False) is None:
        fields["reduce_range"] = needs_reduced_range(fields.get("engine", "x86"))
    return {"class": type(scheme).__name__, "name": scheme.name, **fields}


def from_description(description: Mapping[str, Any]) -> Scheme:
    """The scheme that `describe` described.

    Raises:
        CompressionError: written by a newer version.

    Example:
        >>> from_description(describe(DynamicInt8(reduce_range=True)))
        DynamicInt8(per_token=None, reduce_range=True)
    """
    fields = {name: value for name, value in description.items() if name not in ("class", "name")}
    kind = description["class"]
    if kind not in _CLASSES:
        raise CompressionError(f"`scheme` must be known to this version. Received: {kind!r} in a checkpoint. Update.")
    return _CLASSES[kind](**fields)
