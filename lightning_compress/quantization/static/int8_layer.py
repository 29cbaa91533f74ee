"""A convolution or linear layer between activations in 8 bits, by the int8 kernels that torch has of oneDNN.

A kernel is used only where it computes what the layer does: without VNNI its sums overflow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

aten, onednn = torch.ops.aten, torch.ops.onednn

_MIDDLE = 128
_DIGITS = 1e-4
PostOp = tuple[str, list[float], str]
"""What a kernel applies to its sums: oneDNN's name for it, numbers, and an algorithm."""
NOTHING: PostOp = ("none", [], "")


@dataclass(frozen=True)
class Codes:
    """Says what codes stand for: ``(code - zero_point) * scale``, from ``low`` to ``high``."""

    scale: float
    zero_point: int
    low: int
    high: int

    def unsigned(self) -> Codes:
        """Return what the same codes stand for in uint8, the only type that kernels read."""
        shift = _MIDDLE if self.low < 0 else 0
        return Codes(self.scale, self.zero_point + shift, self.low + shift, self.high + shift)


def encode(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    """Return the codes of an activation, uint8."""
    codes = torch.mul(x, 1.0 / scale).round_().add_(zero_point - _MIDDLE).clamp_(low - _MIDDLE, high - _MIDDLE)
    return codes.to(torch.int8).view(torch.uint8).bitwise_xor_(_MIDDLE)  # several times as fast as to uint8


def decode(codes: Tensor, scale: float, zero_point: int) -> Tensor:
    """Return the activation that codes stand for."""
    return codes.float().sub_(zero_point).mul_(scale)


class Int8Layer(nn.Module):
    """Computes ``post_op(layer(x) [+ other])`` of codes, uint8, into codes or float32.

    Args:
        path: of the layer in the module, for the log.
        operator: `aten.linear.default` or one of the convolutions.
        options: stride, padding, dilation and groups of a convolution.
        weight: has int8 ``codes`` and a ``scale`` for each output channel, and gives floats when it is called.
        inputs: what the codes of the input stand for, and those of another that is added to what the layer gives.
        post_op: what is applied to the sum.
        output: what the codes of the output stand for; None if it is float32.
    """

    def __init__(
        self,
        path: str,
        operator: Any,
        options: Sequence[Any],
        weight: nn.Module,
        inputs: Sequence[Codes],
        post_op: PostOp = NOTHING,
        output: Codes | None = None,
    ) -> None:
        super().__init__()
        self.path, self.operator, self.options, self.weight = path, operator, tuple(options), weight
        self.x, *others = inputs
        self.other = others[0] if others else None
        self.post_op, self.output = post_op, output
        *lists, groups = self.options or (1,)
        self._geometry = (*(_repeated(numbers, self._codes.dim() - 2) for numbers in lists), groups)
        self._packed: tuple[Tensor, ...] | None = None  # empty where the kernel isn't used
        self._reason: str | None = None

    @property
    def _codes(self) -> Tensor:
        codes: Tensor = self.weight.codes  # type: ignore[assignment]
        return codes

    def forward(self, x: Tensor, bias: Tensor | None = None, other: Tensor | None = None) -> Tensor:
        if self._packed is None:
            with torch.inference_mode(False), torch.no_grad():  # it serves outside of inference mode too
                self._packed = () if x.dim() < self._codes.dim() or self.wrong() else self.pack(x.shape)
        y: Tensor = self.kernel(self._packed, x, bias, other) if self._packed else self.plain(x, bias, other)
        return y

    def wrong(self) -> str:
        """Say why the kernel isn't used on this CPU; empty if it is."""
        if self._reason is None:
            with torch.inference_mode(False), torch.no_grad():
                self._reason = self._judge()
        return self._reason

    def plain(self, x: Tensor, bias: Tensor | None = None, other: Tensor | None = None) -> Tensor:
        """Compute the same in float."""
        y = self._layer(x, bias)
        if other is not None and self.other is not None:
            y = y + decode(other, self.other.scale, self.other.zero_point)
        name, numbers, algorithm = self.post_op
        y = functional.gelu(y, approximate=algorithm) if name == "gelu" else _IN_FLOAT[name](y, *numbers)
        return y if self.output is None else encode(y, *astuple(self.output))

    def _layer(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = self.operator(decode(x, self.x.scale, self.x.zero_point), self.weight(), bias, *self.options)
        return y

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}

    def pack(self, shape: Sequence[int]) -> tuple[Tensor, ...]:
        """Return what the kernel reads of the weight, in the order that suits inputs of this shape."""
        codes, scale = self._codes, self.weight.scale
        assert isinstance(scale, Tensor)
        if self.options:
            activations = self.x.scale, self.x.zero_point
            packed = onednn.qconv_prepack(codes, scale, *activations, *self._geometry, list(shape))
        else:
            packed = onednn.qlinear_prepack(codes, list(shape))
        return packed, scale.float(), torch.zeros(len(scale), dtype=torch.int32)

    def kernel(self, packed: Sequence[Any], x: Any, bias: Any, other: Any = None) -> Any:
        """Compute by the kernel, or write down what it does if these are proxies."""
        output = self.output
        y = self._run(packed, x, bias, other, self.post_op, output)
        is_narrow = output is not None and (output.low, output.high) != (0, 255)
        return y.clamp(output.low, output.high) if is_narrow and output is not None else y

    def _run(self, packed: Sequence[Any], x: Any, bias: Any, other: Any, post_op: PostOp, output: Codes | None) -> Any:
        into = (1.0, 0, torch.float32) if output is None else (output.scale, output.zero_point, torch.uint8)
        read = (x, self.x.scale, self.x.zero_point, *packed)
        if not self.options:
            return onednn.qlinear_pointwise.default(*read, bias, *into, *post_op)
        if other is None or self.other is None:
            return onednn.qconv_pointwise.default(*read, bias, *self._geometry, *into, *post_op)
        total = other.clone(memory_format=torch.channels_last)  # the kernel adds to what lies there
        added = self.other.scale, self.other.zero_point, "sum", 1.0
        return onednn.qconv2d_pointwise.binary(*read, total, bias, *self._geometry, *into, *added, *post_op)

    def _judge(self) -> str:
        """Say how far the kernel is off for codes that are drawn; empty if rounding explains it."""
        generator = torch.Generator().manual_seed(0)
        bias = torch.linspace(-1.0, 1.0, len(self._codes))
        for batch, places in ((2, 1), (5, 7)):
            x = _drawn(self._input_shape(batch, places), generator)
            y = self._layer(x, bias)
            other = None if self.other is None else _drawn(y.shape, generator)
            step = float(y.max() - y.min()) / 255 if self.output is None else self.output.scale
            try:
                packed = self.pack(x.shape)
                sums = self._run(packed, x, bias, None, NOTHING, None)  # in codes, clipping would hide what is wrong
                output = self.kernel(packed, x, bias, other)
            except RuntimeError as error:
                return f"it has no int8 kernel on this CPU ({str(error).strip().splitlines()[0]})"
            # Sums of drawn codes may be far out of the output's range, where float has fewer digits than they.
            step = max(step, _DIGITS * float(y.abs().max()))
            codes = 1.0 if self.output is None else step / self.output.scale
            expected = self.plain(x, bias, other)
            far = max(
                _steps_apart(sums, y, step), _steps_apart(output, expected, step if self.output is None else codes)
            )
            if not far <= 1.0:
                return f"its int8 kernel computes something else on this CPU, by {far:.0f} steps of its output"
        return ""

    def _input_shape(self, batch: int, places: int) -> tuple[int, ...]:
        """Return the shape of a small input, for so many places of an output in each dimension."""
        channels, *kernel = self._codes.shape[1:]
        if not self.options:
            return batch * places, channels
        *lists, groups = self._geometry
        sizes = [
            max(apart * (width - 1) + step * (places - 1) + 1 - 2 * pad, 1)
            for width, step, pad, apart in zip(kernel, *lists, strict=True)
        ]
        return batch, channels * groups, *sizes


_IN_FLOAT: dict[str, Callable[..., Tensor]] = {
    **{"none": lambda y: y, "relu": torch.relu, "hardtanh": torch.clamp},
    **{"swish": functional.silu, "hardswish": functional.hardswish},
}


def _repeated(numbers: Sequence[int], count: int) -> list[int]:
    return [*numbers] * (count // len(numbers))


def _drawn(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw codes; of every second sample the least and the largest alone, whose products are the largest."""
    codes = torch.randint(0, 256, tuple(shape), generator=generator).to(torch.uint8)
    codes[::2] = codes[::2].gt(127) * 255
    return codes


def _steps_apart(got: Tensor, expected: Tensor, step: float) -> float:
    if got.shape != expected.shape:
        return float("inf")
    return float((got.float() - expected.float()).abs().max()) / max(step, 1e-12)
