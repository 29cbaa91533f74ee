"""A converted graph as a module; it is compiled by inductor at its first call."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor
from torch.fx import GraphModule

from lightning_compress.errors import CompressionError, NoEffectWarning, in_a_line
from lightning_compress.quantization.static.flows.exported_kernels import compiled_is_off
from lightning_compress.quantization.static.flows.pt2e_trace import Exported, quiet

with quiet(), torch._inductor.config.patch(pre_grad_custom_pass=torch._inductor.config.pre_grad_custom_pass):
    # Importing them sets this flag of inductor's for the whole process; only our own compilations are to have it.
    from torch._inductor.compile_fx import compile_fx
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import quant_lift_up

_INDUCTOR = {"freezing": True, "pre_grad_custom_pass": quant_lift_up}


class Int8Graph(Exported):
    """Compiles a converted graph at its first call.

    Attributes:
        paths: nodes of its int8 layers, with where in the module each has its weight.

    Raises:
        CompressionError: called with a shape that it wasn't exported for.
    """

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self._compiled: Any = None
        self._dynamic: bool | None = None
        self._gave_up = False
        self._compilations = 0
        self._known: set[Any] = set()  # calls that were compiled for

    @torch.no_grad()
    def forward(self, *tensors: Tensor) -> Any:
        if self._gave_up:
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

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None, "_known": set()}
