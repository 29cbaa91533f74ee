"""How activations are rounded to 8 bits: in plain numbers, as an operation, and while ranges are found or trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.modules.written import writes_file
from lightning_compress.quantization.layers.int8_weight import in_onnx_export
from lightning_compress.quantization.numerics.int8 import channel_scales
from lightning_compress.quantization.numerics.operators import ROUNDED, rounded_values
from lightning_compress.quantization.static.histogram import Histogram

AVERAGING_CONSTANT = 0.1
"""Weight of each new batch in a moving average of activation ranges; with torch's 0.01 a short fit would end first."""


@dataclass(frozen=True)
class Rounding:
    """Says where an activation is rounded to 8 bits: ``clamp(round(x / scale) + zero_point, low, high)``.

    Attributes:
        after: the node of a traced graph whose value it is.
        users: the nodes that read the rounded value; None if all do.
    """

    after: str
    users: tuple[str, ...] | None
    scale: float
    zero_point: int
    low: int
    high: int


def rounded(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    """Return ``(clamp(round(x / scale) + zero_point, low, high) - zero_point) * scale``, in plain operators."""
    if writes_file():
        written: Tensor = ROUNDED(x, scale, zero_point, low, high)
        return written
    if in_onnx_export():
        codes = torch.uint8 if low >= 0 else torch.int8
        affine, symbolic = (torch.tensor(scale), torch.tensor(zero_point, dtype=codes)), torch.onnx.ops.symbolic
        stored = symbolic("QuantizeLinear", (x, *affine), dtype=codes, shape=x.shape)
        return symbolic("DequantizeLinear", (stored, *affine), dtype=x.dtype, shape=x.shape)
    return rounded_values(x, scale, zero_point, low, high)


class _Straight(torch.autograd.Function):
    """Rounds to codes; the gradient passes where the range wasn't left."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
        ctx.save_for_backward(x, (low - 0.5 - zero_point) * scale, (high + 0.5 - zero_point) * scale)
        codes = torch.mul(x, scale.reciprocal()).round_().clamp_(low - zero_point, high - zero_point)
        return codes.mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, least, largest = ctx.saved_tensors
        return gradient * ((x >= least) & (x <= largest)), None, None, None, None


class ActivationQuantizer(nn.Module):
    """Sees the range of an activation, and rounds it to the codes of that range.

    Args:
        low: the least code.
        high: the largest code.
        symmetric: whether zero is the middle code; else it is any code, so that the range is used whole.
        observer: how a range follows from several batches: ``minmax``, ``moving_average`` or ``histogram``.

    Attributes:
        observes: whether the range moves.
        rounds: whether values are rounded.
    """

    min_val: Tensor
    max_val: Tensor

    def __init__(self, low: int, high: int, symmetric: bool, observer: str) -> None:
        super().__init__()
        self.low, self.high, self.symmetric = low, high, symmetric
        self.observes, self.rounds = False, True
        self._averages = observer == "moving_average"
        self.register_buffer("min_val", torch.tensor(torch.inf))
        self.register_buffer("max_val", torch.tensor(-torch.inf))
        self._histogram = Histogram() if observer == "histogram" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.observes and x.numel():
            self._observe(x.detach())
        return self.round(x) if self.rounds else x

    def round(self, x: Tensor) -> Tensor:
        """Return the values of the nearest codes."""
        return _Straight.apply(x, *self._affine(), self.low, self.high)  # type: ignore[no-any-return,no-untyped-call]

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        low, high = torch.aminmax(x)
        if self._averages:
            # The first batch's range, and after it a moving average.
            low = torch.where(self.min_val.isinf(), low, self.min_val.lerp(low, AVERAGING_CONSTANT))
            high = torch.where(self.max_val.isinf(), high, self.max_val.lerp(high, AVERAGING_CONSTANT))
        else:
            low, high = torch.minimum(low, self.min_val), torch.maximum(high, self.max_val)
        self.min_val.copy_(low)
        self.max_val.copy_(high)
        if self._histogram is not None:
            self._histogram.observe(x)

    def _affine(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of the range, with zero in it; of one that wasn't seen the scale is 1."""
        low, high = self.min_val.clamp(max=0.0), self.max_val.clamp(min=0.0)
        if self._histogram is not None:
            low, high = map(low.new_tensor, self._histogram.range(self.high - self.low, self.symmetric))
        width = torch.maximum(-low, high) / self.high if self.symmetric else (high - low) / (self.high - self.low)
        scale = torch.where(self.min_val > self.max_val, 1.0, width.clamp_min(_LEAST))
        zero_point = torch.zeros_like(low) if self.symmetric else self.low - (low / scale).round()
        return scale, zero_point.clamp(self.low, self.high)

    def is_finite(self) -> bool:
        """Tell whether it has seen neither NaN nor infinity; before it has seen anything its range is empty."""
        low, high = self.min_val, self.max_val
        return bool((low > high) | (low.isfinite() & high.isfinite())) and not bool(low == -torch.inf)

    def rounding(self, after: str, users: tuple[str, ...] | None) -> Rounding:
        """Return what it does at a place, in plain numbers.

        Raises:
            CompressionError: it has seen NaN or infinity, as where a loss was NaN.
        """
        if not self.is_finite():
            remedy = "Train with a smaller learning rate, or clip gradients."
            raise CompressionError(f"Activations must be finite. Received: NaN or infinity, behind `{after}`. {remedy}")
        scale, zero_point = self._affine()
        return Rounding(after, users, float(scale), int(zero_point), self.low, self.high)


_LEAST = 1e-9
"""The least scale: that of an activation that is always zero."""


class WeightQuantizer(nn.Module):
    """Rounds a weight to the codes of its range as it is at that moment, by output channel; see `Int8Weight`."""

    def __init__(self, largest: int) -> None:
        super().__init__()
        self.largest = largest
        self.rounds = True

    def forward(self, weight: Tensor) -> Tensor:
        if not self.rounds:
            return weight
        with torch.no_grad():
            scale = channel_scales(weight.detach().flatten(1), self.largest).view(-1, *[1] * (weight.dim() - 1))
        return _Nearest.apply(weight, scale)  # type: ignore[no-any-return,no-untyped-call]


class _Nearest(torch.autograd.Function):
    """Rounds to multiples of a scale; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor) -> Tensor:
        return torch.div(weight, scale).round_().mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
