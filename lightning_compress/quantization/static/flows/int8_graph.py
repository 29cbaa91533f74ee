"""Exported graphs as modules; a converted one is compiled by inductor at its first call."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from lightning_compress.errors import CompressionError, NoEffectWarning, in_a_line
from lightning_compress.quantization.static.flows.exported_kernels import compiled_is_off


@contextmanager
def quiet() -> Iterator[None]:
    """Silence upstream, which warns of its kernels for other devices, and of what follows from torch's changes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        levels = {logging.getLogger(name): logging.getLogger(name).level for name in ("torch", "torchao")}
        for logger in levels:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in levels.items():
                logger.setLevel(level)


with quiet(), torch._inductor.config.patch(pre_grad_custom_pass=torch._inductor.config.pre_grad_custom_pass):
    # Importing them sets this flag of inductor's for the whole process; only our own compilations are to have it.
    from torch._inductor.compile_fx import compile_fx
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import quant_lift_up

_INDUCTOR = {"freezing": True, "pre_grad_custom_pass": quant_lift_up}
_ROUNDINGS = (
    torch.ops.quantized_decomposed.quantize_per_tensor.default,
    torch.ops.quantized_decomposed.dequantize_per_tensor.default,
)


class Exported(nn.Module):
    """Holds an exported graph, which knows no modes: switching them would reset its dropout and BatchNorm."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def train(self, mode: bool = True) -> Exported:
        self.training = mode
        return self

    def forward(self, *tensors: Tensor) -> Any:
        return self.graph(*tensors)


class Int8Graph(Exported):
    """Compiles a converted graph at its first call; scales and zero points are in its state, not in its code alone.

    Raises:
        CompressionError: called with a shape that it wasn't exported for.
    """

    qparams: Tensor

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        values = [[float(value) for value in node.args[1:3]] for node in self._roundings()]  # type: ignore[arg-type]
        self.register_buffer("qparams", torch.tensor(values, dtype=torch.float64).reshape(-1, 2))
        self._compiled: Any = None
        self._dynamic: bool | None = None
        self._gave_up = False
        self._compilations = 0
        self._known: set[Any] = set()  # calls that were compiled for

    def _roundings(self) -> list[Node]:
        return [node for node in self.graph.graph.nodes if node.target in _ROUNDINGS]

    @torch.no_grad()
    def forward(self, *tensors: Tensor) -> Any:
        if self._gave_up or torch.compiler.is_compiling():  # the latter also while it is exported
            return self.graph(*tensors)
        key = (*[(tensor.shape, tensor.dtype) for tensor in tensors], torch.is_inference_mode_enabled())
        if key in self._known:
            return self._compiled(*tensors)
        return self._first_call(key, *tensors)

    def _first_call(self, key: Any, *tensors: Tensor) -> Any:
        """Compile for a new shape: for any where inductor can, else for this one, else not at all."""
        reason = ""
        for dynamic in (None, False) if self._compiled is None else (self._dynamic, False):
            if self._compiled is None or dynamic != self._dynamic:
                self._compiled = torch.compile(self.graph.forward, backend=self._compile, dynamic=dynamic)
                self._dynamic = dynamic
            before = self._compilations
            try:
                # Weights become constants that are packed once; that is decided while compiling.
                with quiet(), torch._inductor.config.patch(_INDUCTOR):
                    output = self._compiled(*tensors)
            except Exception as error:  # of the compiler, or of what it made
                reason = in_a_line(error)
                self._check_shapes(*tensors)
                continue
            if self._compilations == before:
                return output
            self._known.add(key)
            if not (off := compiled_is_off(self.graph, tensors, output)):
                return output
            reason = off
            self._compiled = None
        self._gave_up = True
        warnings.warn(
            f"pt2e: the int8 form isn't compiled by inductor ({reason}). It runs uncompiled, and so slower than "
            "float32. Install a C++ compiler, or use flow='fx'.",
            NoEffectWarning,
            stacklevel=2,
        )
        return self.graph(*tensors)

    def _check_shapes(self, *tensors: Tensor) -> None:
        try:
            self.graph(*tensors)
        except AssertionError as error:
            raise CompressionError(
                "An int8 form that pt2e made must be called with the shapes that it was exported for. "
                f"Received: {[tuple(tensor.shape) for tensor in tensors]}, {error}. Calibrate with such a batch."
            ) from error

    def _compile(self, graph: GraphModule, inputs: list[Tensor]) -> Any:
        self._compilations += 1
        return compile_fx(graph, inputs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        for node, (scale, zero_point) in zip(self._roundings(), self.qparams.tolist(), strict=True):
            node.args = (node.args[0], scale, int(zero_point), *node.args[3:])
        self.graph.recompile()
        self._compiled = None
        self._known.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None, "_known": set()}
