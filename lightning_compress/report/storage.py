"""What does a model hold, and what does it weigh on disk? Packed int8 weights count as parameters."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_compress.errors import invalid
from lightning_compress.modules.paths import clean_name
from lightning_compress.modules.routing import StoredWeight, form_of

_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
# What quantized modules save beside their weights; it belongs to activations.
_ACTIVATION_KEYS = ("scale", "zero_point")
_COMPRESS_AT_MOST = 512_000_000


@dataclass(frozen=True)
class LayerMeasurement:
    """A module that owns parameters: each tensor stands in the first layer that holds it.

    ``size_bytes`` are the bytes of its parameters, quantization scales and persistent buffers.
    """

    name: str
    type: str
    parameters: int
    nonzeros: int
    size_bytes: int
    dtype: str


def measure_layers(model: nn.Module) -> tuple[LayerMeasurement, ...]:
    """Return one row for each module that owns parameters, in the model's order.

    Raises:
        CompressionError: a lazy parameter has no shape yet.

    Example:
        >>> [(row.name, row.parameters, row.size_bytes) for row in measure_layers(nn.Sequential(nn.Linear(3, 2)))]
        [('0', 8, 32)]
    """
    return tuple(_rows(model))


def file_bytes(model: nn.Module) -> tuple[int, int | None]:
    """Save the ``state_dict`` with ``torch.save`` and count: bytes of the file, and of the same file after zlib.

    Zeros and repeated values weigh nothing less in the file itself, only in the compressed one. Beyond 512 MB of file
    the compressed size isn't measured (None).

    Example:
        >>> size, compressed = file_bytes(nn.Linear(100, 100))
        >>> size > 100 * 100 * 4
        True
    """
    counter = _ByteCounter()
    torch.save(model.state_dict(), cast(IO[bytes], counter))
    return counter.size_bytes, counter.finish()


class _ByteCounter(io.RawIOBase):
    """A file that keeps nothing of what is written, so that a large model isn't held in memory twice."""

    def __init__(self) -> None:
        super().__init__()
        self.size_bytes = 0
        self._compressed = 0
        self._zlib = zlib.compressobj(level=1)

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        written = memoryview(data).nbytes
        self.size_bytes += written
        if self.size_bytes <= _COMPRESS_AT_MOST:
            self._compressed += len(self._zlib.compress(data))
        return written

    def finish(self) -> int | None:
        if self.size_bytes > _COMPRESS_AT_MOST:
            return None
        return self._compressed + len(self._zlib.flush())


def packed_weights(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a saved value: a tensor, a container of them, or a packed object of a quantized kernel."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from packed_weights(item)
    elif isinstance(value, torch.ScriptObject):
        yield from packed_weights(value.__getstate__())


def _rows(model: nn.Module) -> Iterator[LayerMeasurement]:
    seen: dict[int, Any] = {}

    def fresh(tensors: list[Tensor]) -> list[Tensor]:
        found = [tensor for tensor in tensors if id(tensor) not in seen]
        seen.update((id(tensor), tensor) for tensor in found)
        return list({id(tensor): tensor for tensor in found}.values())

    covered: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in covered:
            continue
        if _is_quantized(module):
            # A quantized layer of torch's keeps its weights in children that are no layers of their own.
            covered.update(module.modules())
            parameters = [tensor for child in module.modules() for tensor in _packed(child)]
        else:
            parameters = [parameter for parameter in module._parameters.values() if parameter is not None]
        form = form_of(module)
        stored: list[Any] = (
            [] if form is None else [weight for weight in form.weights.values() if id(weight) not in seen]
        )
        seen.update((id(weight), weight) for weight in stored)
        codes = {} if form is None else {id(module._parameters[name]) for name in form.weights}
        parameters = fresh([parameter for parameter in parameters if id(parameter) not in codes])
        buffers = fresh(_persistent_buffers(module))
        if parameters or stored:
            yield _row(clean_name(name), type(module).__name__, parameters, buffers, stored)


def _is_quantized(module: nn.Module) -> bool:
    return any(base.__module__.startswith(_QUANTIZED) for base in type(module).__mro__)


def _packed(module: nn.Module) -> list[Tensor]:
    saved: dict[str, Any] = {}
    module._save_to_state_dict(saved, "", keep_vars=True)
    return [tensor for key, value in saved.items() if key not in _ACTIVATION_KEYS for tensor in packed_weights(value)]


def _persistent_buffers(module: nn.Module) -> list[Tensor]:
    temporary = module._non_persistent_buffers_set
    return [tensor for key, tensor in module._buffers.items() if tensor is not None and key not in temporary]


def _row(
    name: str, kind: str, parameters: list[Tensor], buffers: list[Tensor], stored: list[StoredWeight]
) -> LayerMeasurement:
    if any(map(is_lazy, parameters)):
        raise invalid("model", "have a shape for every parameter", f"lazy layer {name}", "Run it once first.")
    dtype = max(parameters, key=Tensor.numel).dtype if parameters else None
    held = [tensor for weight in stored for tensor in weight.tensors().values()]
    return LayerMeasurement(
        name=name,
        type=kind,
        parameters=sum(map(Tensor.numel, parameters)) + sum(weight.shape.numel() for weight in stored),
        nonzeros=sum(map(_nonzeros, [*parameters, *(weight() for weight in stored)])),
        size_bytes=sum(map(_tensor_bytes, {*parameters, *buffers, *held})),
        dtype=stored[0].kind if stored else str(dtype).removeprefix("torch."),
    )


def _nonzeros(tensor: Tensor) -> int:
    values = tensor.dequantize() if tensor.is_quantized else tensor
    return int(torch.count_nonzero(values))


def _tensor_bytes(tensor: Tensor) -> int:
    size = tensor.numel() * tensor.element_size()
    if tensor.is_quantized and tensor.qscheme() not in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        size += sum(_tensor_bytes(part) for part in (tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()))
    return size
