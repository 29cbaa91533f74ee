"""What TensorRT wants of an ONNX file with roundings, checked in the file: TensorRT itself needs a GPU."""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_PASSES = (
    *("Relu", "Clip", "MaxPool", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Concat", "Slice"),
    *("Split", "Pad", "Resize", "Expand", "Tile", "Identity", "QuantizeLinear", "DequantizeLinear"),
)


def tensorrt_faults(path: Path) -> list[str]:
    """Return what in an ONNX file breaks TensorRT's rules for int8; empty if nothing does.

    The rules: codes are int8, their zero points 0, their scales constant and positive. Weights of int8 layers are
    integers in the file. Of a sum of a convolution and another branch, which are computed together, the branch is
    rounded. Nothing is rounded that no int8 layer reads, so that the output of a layer that stays float isn't.

    References:
        The pages "Working with Quantized Types" of TensorRT's documentation.
    """
    onnx: Any = importlib.import_module("onnx")
    graph = _Graph(onnx.load(str(path)).graph, onnx.numpy_helper.to_array)
    return [*graph.codes(), *graph.layers(), *graph.sums(), *graph.idle()]


class _Graph:
    """An ONNX graph, with the nodes that make a value and those that read it."""

    def __init__(self, graph: Any, to_array: Any) -> None:
        self.nodes = list(graph.node)
        self.stored = {tensor.name: to_array(tensor) for tensor in graph.initializer}
        self.makers = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[Any]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.readers[name].append(node)

    def codes(self) -> Iterator[str]:
        """Check codes, scales and zero points."""
        for node in self.nodes:
            if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                continue
            codes, scale, *rest = node.input
            zeros = self.stored.get(rest[0]) if rest and rest[0] else None
            kinds = [array.dtype.name for array in (self.stored.get(codes), zeros) if array is not None]
            if node.op_type == "QuantizeLinear":
                kinds = [zeros.dtype.name if zeros is not None else "uint8"]  # what ONNX takes where none is given
            yield from (f"`{node.name}` has codes of {kind}, not int8" for kind in {*kinds} - {"int8", "float32"})
            if zeros is not None and zeros.any():
                yield f"`{node.name}` has a zero point other than 0"
            if scale not in self.stored or not (self.stored[scale] > 0).all():
                yield f"`{node.name}` has a scale that isn't constant and positive"

    def layers(self) -> Iterator[str]:
        """Check the weights of layers that read codes."""
        for node in self.nodes:
            if node.op_type in _LAYERS and self._is_code(node.input[0]) and node.input[1] not in self.makers:
                yield f"`{node.name}` reads codes, and its weight is stored as float"

    def sums(self) -> Iterator[str]:
        """Check the sums of a convolution and another branch, behind which int8 goes on."""
        for node in self.nodes:
            if node.op_type != "Add" or not self._leads_to_int8(node, through_all=True):
                continue
            makers = [self.makers.get(name) for name in node.input]
            fused = [
                maker is not None and maker.op_type == "Conv" and self._is_code(maker.input[0]) for maker in makers
            ]
            others = [name for name, together in zip(node.input, fused, strict=True) if not together]
            if any(fused) and not any(self._is_code(name) or name in self.stored for name in others):
                yield f"`{node.name}` adds a branch to a convolution, and the branch isn't rounded"

    def idle(self) -> Iterator[str]:
        """Check that what is rounded is read in int8."""
        for node in self.nodes:
            if node.op_type == "QuantizeLinear" and not self._leads_to_int8(node):
                yield f"`{node.name}` rounds what no int8 layer reads"

    def _is_code(self, name: str) -> bool:
        maker = self.makers.get(name)
        return maker is not None and maker.op_type == "DequantizeLinear"

    def _leads_to_int8(self, node: Any, through_all: bool = False) -> bool:
        """Tell whether an int8 layer is behind a node; or a sum, where only what passes codes on is in between."""
        kinds = _LAYERS if through_all else (*_LAYERS, "Add")
        seen, ahead = set[str](), [*node.output]
        while ahead:
            name = ahead.pop()
            seen.add(name)
            for reader in self.readers[name]:
                if reader.op_type in kinds and any(map(self._is_code, reader.input)):
                    return True
                if through_all or reader.op_type in _PASSES:
                    ahead += {*reader.output} - seen
        return False
