"""Flows: how a scheme gets into a model; one file for each upstream that could go away.

A flow is a module with the functions of `Flow`. What would replace `torch.ao` for training, should it go, is one more
such file.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.modules.outputs import Structure
from lightning_compress.quantization.schemes import StaticInt8
from lightning_compress.quantization.static.signature import Signature

FLOWS = ("fx", "pt2e")


@dataclass(frozen=True)
class Trace:
    """The traced form of a module.

    Attributes:
        graph: shares the parameters, takes the tensors of a call in order, and gives those of the output in a list.
        structure: what the module puts its output into.
        names: the layers and tensors (paths in the module) that the graph took the place of.
        numbers: buffers (paths in the module) whose values the graph's code holds.
    """

    graph: nn.Module
    structure: Structure
    names: frozenset[str]
    numbers: dict[str, Tensor]


class Flow(Protocol):
    """What a flow does with one module; the callers know no more of it than this."""

    def trace(self, module: nn.Module, signature: Signature, hooked: Collection[str]) -> Trace:
        """The traced form of a module for calls of one signature."""

    def prepare(self, graph: nn.Module, scheme: StaticInt8, *, training: bool, floats: Collection[str]) -> nn.Module:
        """The form that observes (for training, fake-quantizes too), but for the layers in ``floats``."""

    def observe_(self, prepared: nn.Module, on: bool) -> None:
        """Let the activations' ranges move, or freeze them."""

    def fake_quantize_(self, prepared: nn.Module, on: bool) -> None:
        """Round values, or let them through."""

    def float_weights(self, prepared: nn.Module) -> dict[str, str]:
        """What stays float: paths in the module of layers, or of single matrices, each with the reason.

        The reason is empty where it is the kind of layer.
        """

    def quantizes(self, prepared: nn.Module) -> bool:
        """Whether any layer computes in int8."""

    def convert(self, prepared: nn.Module, scheme: StaticInt8, floats: Collection[str] = ()) -> nn.Module:
        """A new int8 form on the CPU, but for the layers in ``floats``; ``prepared`` is left as it is."""

    def wrong_kernels(
        self, prepared: nn.Module, int8: nn.Module, scheme: StaticInt8, inputs: list[Tensor], drawn_only: bool = False
    ) -> dict[str, str]:
        """Paths of the layers whose kernels compute something else, each with a reason; empty for what is no layer.

        Args:
            prepared: what was converted.
            int8: what `convert` made of it.
            scheme: the numbers.
            inputs: tensors of a call.
            drawn_only: the values of ``inputs`` mean nothing; judge by activations that are drawn.
        """


def load(name: str) -> Flow:
    """The flow called ``name``; its upstream is imported only now.

    Raises:
        CompressionError: its upstream isn't there.
    """
    try:
        if name == "pt2e":
            from lightning_compress.quantization.static.flows import pt2e

            return pt2e
        from lightning_compress.quantization.static.flows import fx

        return fx
    except ImportError as error:
        raise CompressionError(f"`flow` must have its upstream installed. Received: flow={name!r}, {error}.") from error
