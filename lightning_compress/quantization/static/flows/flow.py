"""What a flow is: the functions that its module has, the calls that it traces, and the traced form that it gives.

What would replace `torch.ao` for training, should it go, is one more such module.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.errors import CompressionError
from lightning_compress.modules.outputs import Structure
from lightning_compress.quantization.numerics.int8 import StaticInt8

FLOWS = ("fx", "pt2e")
AVERAGING_CONSTANT = 0.1
"""Weight of each new batch in a moving average of activation ranges; with torch's 0.01 a short fit would end first."""


def largest_code(reduced: bool) -> int:
    """Return the largest code of a weight, whose codes lie on both sides of zero, so that a sign changes them alone."""
    return 63 if reduced else 127


@dataclass(frozen=True)
class Rounding:
    """Says where an activation is rounded to 8 bits: ``clamp(round(x / scale) + zero_point, low, high)``.

    Attributes:
        after: the node of a traced graph whose value it is, the last of those that one kernel computes.
        users: the nodes that read the rounded value; None if all do.
    """

    after: str
    users: tuple[str, ...] | None
    scale: float
    zero_point: int
    low: int
    high: int

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point as observers do."""
        return torch.tensor([self.scale]), torch.tensor([self.zero_point])


@dataclass(frozen=True)
class Trace:
    """Holds the traced form of a module.

    Attributes:
        graph: shares the parameters, takes the tensors of a call in order, and gives those of the output in a list.
        structure: what the module puts its output into.
        names: the layers and tensors (paths in the module) that the graph took the place of.
        baked: buffers (paths in the module) whose values the graph's code holds.
    """

    graph: nn.Module
    structure: Structure
    names: frozenset[str]
    baked: dict[str, Tensor]


class Flow(Protocol):
    """Says what a flow does with one module; the callers know no more of it than this."""

    def trace(self, module: nn.Module, signature: Signature, hooked: Collection[str]) -> Trace:
        """Return the traced form of a module for calls of one signature."""

    def prepare(self, graph: nn.Module, scheme: StaticInt8, *, training: bool, floats: Collection[str]) -> nn.Module:
        """Return the form that observes (for training, fake-quantizes too), but for the layers in ``floats``."""

    def observe_(self, prepared: nn.Module, on: bool) -> None:
        """Let the activations' ranges move, or freeze them."""

    def fake_quantize_(self, prepared: nn.Module, on: bool) -> None:
        """Round values, or let them through."""

    def float_weights(self, prepared: nn.Module) -> dict[str, str]:
        """Find what stays float: paths in the module of layers, or of single matrices, each with the reason.

        The reason is empty where it is the kind of layer.
        """

    def quantizes(self, prepared: nn.Module) -> bool:
        """Tell whether any layer computes in int8."""

    def convert(self, prepared: nn.Module, scheme: StaticInt8, floats: Collection[str] = ()) -> nn.Module:
        """Return a new int8 form on the CPU, but for the layers in ``floats``; ``prepared`` is left as it is."""

    def roundings(self, graph: nn.Module, prepared: nn.Module, floats: Collection[str] = ()) -> list[Rounding]:
        """List where the int8 form rounds activations, but for the layers in ``floats``, as places in ``graph``.

        ``prepared`` is what `prepare` made of ``graph``.
        """

    def fix_(self, graph: nn.Module, prepared: nn.Module, roundings: Sequence[Rounding]) -> None:
        """Let a ``prepared`` graph be converted with these scales and zero points, whatever it has observed."""

    def int8_layers(self, prepared: nn.Module) -> set[str]:
        """Return the paths of the layers that become int8, and of matrices of no layer."""

    def wrong_kernels(
        self, prepared: nn.Module, int8: nn.Module, scheme: StaticInt8, inputs: list[Tensor], drawn_only: bool = False
    ) -> dict[str, str]:
        """Find the layers whose kernels compute something else, with reasons; the path is empty for what is no layer.

        ``int8`` is what `convert` made of ``prepared``. With ``drawn_only`` the values of ``inputs``, tensors of a
        call, mean nothing: judge by activations that are drawn.
        """


def load(name: str) -> Flow:
    """Return the flow called ``name``; its upstream, which takes seconds, is imported only now.

    Raises:
        CompressionError: its upstream isn't there.
    """
    try:
        flow: Any = import_module(f"{__package__}.{name}")
    except ImportError as error:
        raise CompressionError(f"`flow` must have its upstream installed. Received: flow={name!r}, {error}.") from error
    checked: Flow = flow
    return checked


def tracer(name: str) -> Callable[[nn.Module, Signature, Collection[str]], Trace]:
    """Return the function that traces for the flow called ``name``; it needs no upstream."""
    trace: Callable[[nn.Module, Signature, Collection[str]], Trace] = import_module(f"{__package__}.{name}_trace").trace
    return trace


PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device)


class Signature:
    """Knows where the tensors of a call stand, how large they were, and the values of everything else.

    A traced form holds for calls of this shape only: a flag that steers control flow is baked in. Immutable and plain:
    ``example`` is what a checkpoint keeps of it.

    Raises:
        CompressionError: the call holds something that is neither tensor nor plain data.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves, self.spec = pytree.tree_flatten((args, kwargs))
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, *PLAIN)):
                raise CompressionError(f"its input holds a {type(leaf).__name__}")
        self.constants = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        self.inputs = [
            torch.zeros((), dtype=leaf.dtype).expand(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)
        ]
        self.is_one_tensor = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)

    @property
    def example(self) -> list[Any]:
        """``[args, kwargs]`` with zeros of its shape, stored as a single one, in the place of each tensor."""
        args, kwargs = self.rebuild(list(self.inputs))
        return [args, kwargs]

    def __deepcopy__(self, memo: dict[int, Any]) -> Signature:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Signature, tuple(self.example)

    def tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | None:
        """Return the tensors of a call that has this shape; None if it hasn't."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.spec:
            return None
        found = []
        for leaf, constant in zip(leaves, self.constants, strict=True):
            if constant is None and isinstance(leaf, Tensor):
                found.append(leaf)
            elif constant is None or isinstance(leaf, Tensor) or leaf != constant[0]:
                return None
        return found

    def of_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | None:
        """Return the tensors of a call of ``module`` that has this shape; None if it hasn't."""
        if self.is_one_tensor and len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            return [args[0]]  # nearly every call, and binding it would take longer than a small layer
        return self.tensors(*canonical(module, args, kwargs))

    def rebuild(self, tensors: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return ``(args, kwargs)`` with ``tensors`` in their places."""
        rest = iter(tensors)
        leaves = [next(rest) if constant is None else constant[0] for constant in self.constants]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return tuple(args), dict(kwargs)


def canonical(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the same call in one form: by position where that can be, without what only repeats a default."""
    bound = _signature(type(module).forward).bind(module, *args, **kwargs)
    for name, parameter in bound.signature.parameters.items():
        value = bound.arguments.get(name, parameter.empty)
        if value is parameter.default or (isinstance(value, PLAIN) and value == parameter.default):
            bound.arguments.pop(name, None)
    return bound.args[1:], bound.kwargs


_signature = lru_cache(maxsize=256)(inspect.signature)
