"""What a kernel makes of tensors before it computes with them: its own order of weights, say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class KernelCache:
    """Keeps what was made of tensors for as long as these stay what they were; copies and files leave it out.

    Example:
        >>> cache, scale = KernelCache(), torch.ones(2)
        >>> cache.made([scale], [], lambda: "first"), cache.made([scale], [], lambda: "second")
        ('first', 'first')
        >>> cache.made([scale.mul_(2)], [], lambda: "third")
        'third'
    """

    def __init__(self) -> None:
        self._stored: list[tuple[Tensor, int, int]] = []
        self._biases: list[Tensor | None] = []
        self._made: Any = None

    def __reduce__(self) -> Any:
        return KernelCache, ()

    def made(self, stored: Sequence[Tensor], biases: Sequence[Tensor | None], make: Callable[[], Any]) -> Any:
        """Return what ``make`` made, or makes now if tensors are others than before, or were changed in place.

        Of ``biases`` the values are compared: users change them through ``data`` too, where no version counts.
        """
        if not self._stored or not self._is_of(stored, biases):
            with torch.inference_mode(False), torch.no_grad():  # it serves outside of inference mode too
                self._made = make()
                self._biases = [None if bias is None else bias.detach().clone() for bias in biases]
            self._stored = [(tensor, tensor.data_ptr(), _version(tensor)) for tensor in stored]
        return self._made

    def _is_of(self, stored: Sequence[Tensor], biases: Sequence[Tensor | None]) -> bool:
        for tensor, (before, place, version) in zip(stored, self._stored, strict=True):
            if tensor is not before or tensor.data_ptr() != place or _version(tensor) != version:
                return False
        for bias, old in zip(biases, self._biases, strict=True):
            if bias is None or old is None:
                if bias is not old:
                    return False
            elif bias.dtype != old.dtype or not torch.equal(bias, old):
                return False
        return True


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
