"""What code that reads the weight of a quantized layer gets: its values in float, made when they are asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.modules.routing import CHILD
from lightning_compress.quantization.numerics.packing import is_recorded

_CHANGED = (
    "The weight of a quantized layer must be left as it is. Received: {} its float values, which "
    "aren't what it computes with. Change it before it is quantized, or exclude the layer from `targets`."
)


class _ReadOnly(Tensor):
    """Refuses to be changed, as nothing would hear of it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        changes = name in ("__set__", "__setitem__") or (name.endswith("_") and not name.endswith("__"))
        if changes and isinstance(args[0], cls):
            raise CompressionError(_CHANGED.format("a change to"))
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs or {})
        # What shares its memory: `data`, `T`, `detach()`.
        shares = name in ("__get__", "detach") and isinstance(result, Tensor)
        return result.as_subclass(cls) if shares else result


class _FloatValues(dict[str, Any]):
    """Holds the parameters of a layer; what isn't there is read from its quantized form, and in no iteration."""

    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__({} if layer is None else layer._parameters)
        self.layer = layer

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        form: Any = None if self.layer is None else self.layer._modules.get(CHILD)
        if value is not None or not hasattr(form, "float_value"):
            return value
        value = form.float_value(name)
        # What is compiled or written down knows no class of ours.
        plain = value is None or torch.compiler.is_compiling() or is_recorded()
        return value if plain else value.as_subclass(_ReadOnly)

    def __setitem__(self, name: str, value: Any) -> None:
        is_gone = value is not None and self.get(name, value) is None
        if is_gone and self.layer is not None and hasattr(self.layer._modules.get(CHILD), "float_value"):
            raise CompressionError(_CHANGED.format("others in the place of"))  # of `torch.func.functional_call`
        super().__setitem__(name, value)


def show_float_values_(layer: nn.Module) -> None:
    """Let a layer with a quantized form be asked for its ``weight`` and ``bias``, as code of language models does."""
    layer.__dict__["_parameters"] = _FloatValues(layer)


def hide_float_values_(layer: nn.Module) -> None:
    """Undo `show_float_values_`."""
    layer.__dict__["_parameters"] = dict(layer._parameters)
