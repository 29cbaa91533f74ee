"""Static int8 as a scheme, and what int8 kernels ask of a CPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_compress.errors import CompressionError, invalid, nearest
from lightning_compress.quantization.numerics.scheme import Scheme

TARGETS = ("onnxruntime", "openvino", "tensorrt", "executorch")
ENGINES = ("onednn", "inductor")
OBSERVERS = ("minmax", "histogram", "moving_average")

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def largest_code(reduced: bool) -> int:
    """Return the largest code of a weight of 8 bits, or of 7."""
    return 63 if reduced else 127


def channel_scales(rows: Tensor, largest: int) -> Tensor:
    """Return the scale of each row of a weight ``(out_channels, rest)``, whose largest code stands for its range."""
    return rows.abs().amax(dim=1).clamp_min(1e-12) / largest


@dataclass(frozen=True)
class StaticInt8(Scheme):
    """Computes with 8-bit weights and activations, whose ranges calibration or training fixes.

    ``Q = clamp(round(R / S) + Z)``: weights symmetric with a scale for each output channel, activations asymmetric per
    tensor. What the defaults gain, and what was left out, is in ``docs/quantization.md``.

    Args:
        target: the runtime that the placement of roundings is for. ``onnxruntime``, the default, and ``openvino`` are
            the same: uint8 activations at the inputs of convolutions and linear layers, behind convolutions, and around
            residual sums. ``tensorrt``: int8 about a zero point of 0. ``executorch``: int8, outputs rounded too.
        engine: what computes in this process: ``onednn``, the int8 kernels of torch, at once; or ``inductor``, which
            compiles at the first call of each shape, and is faster afterwards.
        observer: how calibration finds the activations' ranges: ``minmax`` takes the extremes of all batches,
            ``histogram`` the range of least squared error, in several times the time, ``moving_average`` a mean of the
            batches' extremes, for batches of 32 and more (training always does so).
        reduce_range: 7-bit weights. CPUs without VNNI overflow in products of 8 bits, so that there a model of 8-bit
            weights computes in float, dequantized; the files are the same on each CPU.
        equalize: first give the channels between two layers like ranges; the float function stays, the parameters
            don't. None does so before calibration, and not before training, where penalties, averages and optimizers
            of yours follow them.
        smooth: first move the ranges of LayerNorm's outlier channels into the linear layers behind it; None as above.

    Raises:
        CompressionError: ``target``, ``engine`` or ``observer`` has no such name.

    References:
        Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        2018 (arXiv:1712.05877), equation 1. Nagel et al., 2019 (arXiv:1906.04721), for ``equalize``; Xiao et al.,
        2022 (arXiv:2211.10438), for ``smooth``.
    """

    target: str = "onnxruntime"
    engine: str = "onednn"
    observer: str = "minmax"
    reduce_range: bool = False
    equalize: bool | None = None
    smooth: bool | None = None
    name = "int8_static"
    whole = True
    calibrates = True

    def __post_init__(self) -> None:
        for name, known in {"target": TARGETS, "engine": ENGINES, "observer": OBSERVERS}.items():
            if (value := getattr(self, name)) not in known:
                raise invalid(name, f"be one of {', '.join(known)}", value, nearest(str(value), known))

    @property
    def reduced(self) -> bool:  # type: ignore[override]
        return self.reduce_range

    @property
    def largest_code(self) -> int:
        """The largest code of a weight, whose codes lie on both sides of zero, so that a sign changes them alone."""
        return largest_code(self.reduce_range)

    def no_kernel(self, layer: nn.Module | None) -> str:
        if isinstance(layer, _LAYERS + _TRANSPOSED) and not is_parametrized(layer):
            if isinstance(layer, _TRANSPOSED):
                return f"torch has no int8 kernel of {type(layer).__name__} that is right on every CPU"
            if layer._parameters.get("weight") is None:
                return "its weight is computed by a hook (weight norm, pruning)"
            return f"no static int8 kernel for this {type(layer).__name__} as it is used here"
        return super().no_kernel(layer).replace(self.name, "static int8")

    def check_trains(self) -> None:
        pass


def has_vnni() -> bool:
    """Tell whether this CPU has VNNI, by which sums of 8-bit products don't overflow."""
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return supported is not None and bool(supported())


def needs_reduced_range(engine: str = "x86") -> bool:
    """Tell whether int8 products overflow on this CPU, as it adds pairs of them in 16 bit (all but VNNI, and qnnpack).

    ``2 * 255 * 127`` exceeds 32767, with weights of 7 bits ``2 * 255 * 64`` does not.
    """
    # The kernel is asked too: settings such as ONEDNN_MAX_CPU_ISA can keep it from what the CPU has.
    return engine != "qnnpack" and (not has_vnni() or _kernel_overflows(engine))


@contextmanager
def kernels_of(engine: str) -> Iterator[None]:
    """Run under one of torch's int8 engines, and put the old one back."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


@cache
def _kernel_overflows(engine: str) -> bool:
    """Try whether a linear or a convolution kernel gets the largest products wrong; each may be of another kind."""
    with warnings.catch_warnings(), torch.inference_mode(False), kernels_of(engine):
        warnings.simplefilter("ignore")  # torch announces the end of its quantized tensors
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
    return any(bool(product.min() < 0.99 * total) for product in found)


def refuse_to_move(fn: Callable[[Tensor], Tensor]) -> None:
    """Raise if ``fn``, about to be applied to an int8 module, takes tensors off the CPU: nothing there runs them."""
    moved = fn(torch.empty(0))
    if moved.device.type != "cpu" or moved.dtype != torch.float32:
        raise CompressionError(
            f"An int8 model must stay on the CPU, with float32 around it. Received: a move to {moved.device}, "
            f"{moved.dtype}. Use Trainer(accelerator='cpu'), or fit again to train the float model on."
        )
