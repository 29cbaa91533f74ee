"""What stands in place of a float weight that is gone, as its quantized form can't give its values back?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError

_WHAT_IT_IS = {
    *(Tensor.dtype.__get__, Tensor.device.__get__, Tensor.shape.__get__, Tensor.ndim.__get__),  # type: ignore[attr-defined]
    *(Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_floating_point),
}


def needs_values(func: Callable[..., Any], args: tuple[Any, ...], kind: type) -> bool:
    """Whether a function computes with the values of a ``kind`` among its arguments, and doesn't just ask what it is.

    Example:
        >>> weight = torch.ones(2, 3)
        >>> needs_values(Tensor.size, (weight, 0), Tensor), needs_values(Tensor.sum, (weight,), Tensor)
        (False, True)
    """
    return func not in _WHAT_IT_IS and (func not in (Tensor.to, Tensor.type_as) or isinstance(args[0], kind))


@dataclass(frozen=True, eq=False)
class GoneWeight:
    """Stands for a weight: with its shape, type and device, to which forwards fit their inputs, but without values.

    Attributes:
        name: of the parameter.
        owner: class of its layer.
        shape: as it was.
        dtype: as it was.
        form: what computes now.

    Raises:
        CompressionError: it is computed with.
        AttributeError: anything else of it is read.
    """

    name: str
    owner: str
    shape: torch.Size
    dtype: torch.dtype
    form: nn.Module

    @property
    def device(self) -> torch.device:
        tensors = chain(self.form.parameters(), self.form.buffers())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "name" not in vars(self):  # while it is copied
            raise AttributeError(name)
        raise AttributeError(f"`{name}` can't be read: {self._why()}")

    def _why(self) -> str:
        return f"the float values of the `{self.name}` of this {self.owner} are gone, as it is quantized"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        arguments = (*args, *(kwargs or {}).values())
        gone = next((argument for argument in arguments if isinstance(argument, cls)), None)
        if gone is not None and not needs_values(func, args, cls):
            return args[0].to(gone.device, gone.dtype)
        why = "a float weight is gone, as its layer is quantized" if gone is None else gone._why()
        raise CompressionError(
            f"Code that computes with a layer's weight must find it. Received: {getattr(func, '__name__', func)}, and "
            f"{why}. Exclude that layer in `targets`."
        )
