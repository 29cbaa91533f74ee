"""The schemes that work layer by layer: dynamic int8, and weights alone in few bits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from lightning_compress.errors import invalid
from lightning_compress.modules.attention_form import projections_of
from lightning_compress.modules.routing import Form, class_of
from lightning_compress.quantization.layers import fake_quantizers
from lightning_compress.quantization.layers.attention import DynamicAttention, PackedAttention
from lightning_compress.quantization.layers.int8_weight import Int8Weight
from lightning_compress.quantization.layers.linear import DynamicLinear
from lightning_compress.quantization.layers.packed import PACKED, PackedLinear
from lightning_compress.quantization.layers.packed_weight import LinearWeight, NF4Weight, PackedWeight
from lightning_compress.quantization.layers.recurrent import DynamicRecurrent
from lightning_compress.quantization.layers.without_kernel import why_not
from lightning_compress.quantization.numerics.gptq import gptq
from lightning_compress.quantization.numerics.int8 import needs_reduced_range
from lightning_compress.quantization.numerics.scheme import Scheme


@dataclass(frozen=True)
class DynamicInt8(Scheme):
    """Computes with 8-bit weights, and activations that are quantized to 8 bits as they come.

    For linear, LSTM, GRU and attention layers. Weights symmetric with a scale for each output channel. All activations
    of a call share one scale, which is fast; or each token has its own, and columns of outliers are multiplied in
    float, which is slower and more exact.

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

    @property
    def reduced(self) -> bool:  # type: ignore[override]
        return needs_reduced_range() if self.reduce_range is None else self.reduce_range

    @property
    def decides_per_token(self) -> bool:  # type: ignore[override]
        return self.per_token is None

    def why_not(self, layer: nn.Module) -> str:
        return why_not(layer, self.name, (nn.Linear, nn.LSTM, nn.GRU, nn.MultiheadAttention))

    def form(self, layer: Any, weights: Mapping[str, Any] = MappingProxyType({})) -> Form:
        if isinstance(layer, nn.LSTM | nn.GRU):
            return DynamicRecurrent(layer, self.reduced)
        per_token = bool(self.per_token)
        if isinstance(layer, nn.MultiheadAttention):
            int8 = {name: Int8Weight.nearest(part, self.reduced) for name, part in projections_of(layer).items()}
            out_proj = DynamicLinear(Int8Weight.nearest(layer.out_proj.weight, self.reduced), per_token)
            return DynamicAttention(int8, out_proj, per_token)
        return DynamicLinear(weights.get("") or Int8Weight.nearest(layer.weight, self.reduced), per_token)

    def warning(self) -> str:
        if self.reduced or not needs_reduced_range():
            return ""
        return (
            "The int8_dynamic weights have 8 bits, with which products overflow on a CPU without VNNI, such as this "
            "one: they are rounded to 7 bits here. DynamicInt8(reduce_range=True) does so from the float weights."
        )


class Packed(Scheme):
    """Stores weights in few bits and computes with them in float, on any device: a base.

    Linear, Conv1d to Conv3d, Embedding and attention layers. Embeddings, and below 8 bits the last layer, stay as they
    are unless a pattern of `overrides` or `targets` names that very layer.
    """

    bits: int
    needs_cpu = False
    spares_embeddings = True

    @property
    def spares_last_layer(self) -> bool:  # type: ignore[override]
        return self.bits < 8

    @abstractmethod
    def packed(self, weight: Tensor) -> PackedWeight:
        """Return ``weight`` in few bits, each value rounded to the nearest code."""

    def why_not(self, layer: nn.Module) -> str:
        return why_not(layer, self.name, (*PACKED, nn.MultiheadAttention))

    def form(self, layer: Any, weights: Mapping[str, Any] = MappingProxyType({})) -> Form:
        if isinstance(layer, nn.MultiheadAttention):
            parts = projections_of(layer)
            made = [weights[name] for name in ("in_proj.0", "in_proj.1", "in_proj.2") if name in weights]
            made = made or [self.packed(part) for part in parts.values()]
            if len(made) > len(parts):  # each was fitted to inputs of its own
                made = [LinearWeight.joined(layer.in_proj_weight, made)]
            out_proj = PackedLinear({"weight": weights.get("out_proj") or self.packed(layer.out_proj.weight)})
            return PackedAttention(dict(zip(parts, made, strict=True)), out_proj)
        kind = PACKED.get(class_of(layer), PackedLinear)  # of attention's projections too
        return kind({"weight": weights.get("") or self.packed(layer.weight)})

    def note(self) -> str:
        return f"weights are stored in {self.bits} bits and computed with in float; this is smaller, not faster"


@dataclass(frozen=True)
class WeightOnly(Packed):
    """Rounds each weight to the nearest code of 2 to 8 bits: ``Q = round(W / S) + Z``.

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

    def packed(self, weight: Tensor) -> PackedWeight:
        return LinearWeight.nearest(weight, self.bits, self.group_size, self.symmetric)

    def check_trains(self) -> None:
        if not self.symmetric:
            remedy = "Use symmetric=True: torchao trains no other."
            raise invalid("scheme", "be symmetric for training", self, remedy)

    def why_rounded_last(self, layer: nn.Module) -> str:
        return fake_quantizers.why_not(layer, self.symmetric, self.group_size)

    def training_form(self, layer: nn.Module) -> Form:
        return fake_quantizers.FakeQuantized(layer, self.bits, self.group_size)

    def trained_weight(self, form: Any, layer: nn.Module) -> PackedWeight:
        return fake_quantizers.trained_weight(form, layer, self.bits, self.group_size)


@dataclass(frozen=True)
class NF4(Packed):
    """Stores 4-bit weights, 16 quantiles of the normal distribution: ``W = A * NF4_VALUES[Q]``.

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

    def packed(self, weight: Tensor) -> PackedWeight:
        return NF4Weight(weight, self.block_size)


@dataclass(frozen=True)
class GPTQ(Packed):
    """Rounds weights to 2 to 8 bits, one input column at a time; later columns make up for the error so far.

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
    calibrates = True
    fits = True

    def __post_init__(self) -> None:
        _check_bits(self.bits)
        _check_block("group_size", self.group_size)
        if isinstance(self.damping, bool) or not isinstance(self.damping, int | float) or not 0.0 < self.damping <= 1.0:
            raise invalid("damping", "lie in (0, 1]", self.damping, "It is a fraction of the Hessian's mean diagonal.")

    def packed(self, weight: Tensor) -> PackedWeight:
        return LinearWeight.nearest(weight, self.bits, self.group_size, self.symmetric)

    def fit(self, weight: Tensor, hessian: Tensor) -> PackedWeight:
        grouped = weight.detach().flatten(1).unflatten(0, (len(hessian), -1))
        options = (self.bits, self.group_size, self.symmetric, self.damping, self.activation_order)
        codes, scale, zero = (part.flatten(0, 1) for part in gptq(grouped, hessian, *options))
        return LinearWeight(weight, codes, scale, None if self.symmetric else zero, self.bits, self.group_size)


def _check_bits(bits: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise invalid("bits", "be 2 to 8", bits)


def _check_block(name: str, size: int | None) -> None:
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 2):
        raise invalid(name, "be at least 2", size, "A power of two such as 32, 64 or 128 is usual.")
