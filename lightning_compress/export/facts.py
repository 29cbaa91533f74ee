"""What is known of a file that was written, as plain data: what it holds, how it is called, how fast it is."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.deployable import deployable
from lightning_compress.errors import CompressionError
from lightning_compress.export.executorch_file import Lowered
from lightning_compress.export.lowering import (
    int8_layers,
    stored_path,
)
from lightning_compress.export.onnx_file import OPSET
from lightning_compress.export.program import Program
from lightning_compress.export.runtimes import Runtime
from lightning_compress.export.sidecar import weights_sha256
from lightning_compress.messages import named
from lightning_compress.modules.calls import Call
from lightning_compress.modules.copying import copy_module
from lightning_compress.modules.isolation import isolated_evaluation
from lightning_compress.modules.latency import time_in_turns
from lightning_compress.modules.paths import modules_of
from lightning_compress.modules.routing import form_of
from lightning_compress.quantization.layers.packed_weight import PackedWeight
from lightning_compress.quantization.numerics.operators import LSTM, PACKED
from lightning_compress.report.inputs import batch_size_of, resize_batch
from lightning_compress.report.render import factor
from lightning_compress.structure.change import recorded, to_float_


@dataclass(frozen=True)
class ExportedModel:
    """A file that was written and proven.

    Attributes:
        path: of the file.
        facts: what ``path + ".json"`` holds beside it, as plain data.
    """

    path: str
    facts: Mapping[str, Any]

    @property
    def int8(self) -> tuple[str, ...]:
        """The layers that the runtime computes in int8."""
        return tuple(self.facts["int8"])

    @property
    def float_layers(self) -> dict[str, str]:
        """The quantized layers that the runtime computes in float, with the reasons."""
        return dict(self.facts["float"])

    def __str__(self) -> str:
        """Say what a user wants to know, in a few lines."""
        facts = self.facts
        lines = [f"{self.path}, for {facts['target']}: {facts['bytes']:,} bytes"]
        for size, times in facts["latency"].items():
            ratio = times["ratio"]
            words = f"{factor(1.0 / ratio)} times faster" if ratio <= 1.0 else f"{factor(ratio)} times SLOWER"
            model = f"the {times['baseline']} model in torch ({times['model_ms']:.3g} ms)"
            lines.append(f"batch {size}: {times['file_ms']:.3g} ms in {facts['runtime']}, {words} than {model}")
        if facts["int8"] or facts["float"]:
            count = len(facts["int8"])
            where = "by TensorRT's rules" if facts["target"] == "tensorrt" else f"in {facts['runtime']}"
            lines.append(f"int8 {where}: {count} of {count + len(facts['float'])} quantized layers")
            lines += [f"  in float: {layer} ({reason})" for layer, reason in facts["float"].items()]
        if facts["dequantized"]:
            layers = named(facts["dequantized"])
            lines.append(f"smaller, but not faster: {layers}, whose weights become floats when the file is loaded")
        lines += [
            f"takes a `{name}` of up to {size}, where the model's code takes another way"
            for name, size in facts["largest"].items()
        ]
        if (parity := facts["parity"]) is not None:
            same = parity["same_class"]
            where = f" in {facts['runtime']}" if facts["target"] == "tensorrt" else ""
            lines.append(
                f"agrees with the model{where} on {parity['samples']} samples at batch sizes "
                f"{', '.join(map(str, parity['batch_sizes']))}: cosine {parity['cosine']:.6f}"
                + ("" if same is None else f", the same class for {same:.1%}")
                + f"; cosine {parity['own_cosine']:.6f} to torch's own kernels"
            )
        return "\n  ".join(lines)


def facts_of(
    model: nn.Module, program: Program, target: str, runtime: Runtime, path: Path, lowered: Lowered | None
) -> dict[str, Any]:
    """Return what was written, how it is called and what became of each layer, as plain data."""
    layers = int8_layers(program.graph)
    floats = runtime.float_layers(path, set(layers.values())) if lowered is None else lowered.float_layers
    if target == "tensorrt":  # which isn't there to be asked, and what is float in another is of no use
        floats = {}
    names = {codes: _layer_of(stored_path(node.args[1])) for node, codes in layers.items()}
    packages = ("lightning_compress", "torch")
    return {
        "target": target,
        "runtime": runtime.name,
        "opset": OPSET if path.suffix == ".onnx" else None,
        "versions": {name: importlib.metadata.version(name) for name in packages} | runtime.versions(),
        "inputs": [
            {
                "name": name,
                "dtype": _dtype(tensor),
                "shape": [sizes.get(n, size) for n, size in enumerate(tensor.shape)],
            }
            for name, tensor, sizes in zip(program.inputs, program.example, program.sizes, strict=True)
        ],
        "call": program.call,
        "parameters": list(program.parameters),
        "outputs": list(program.outputs),
        "result": program.result,
        "batch": "dynamic" if program.has_batch else batch_size_of(program.example),
        "max_batch": lowered.max_batch if lowered is not None else None,
        "largest": dict(program.largest),
        "done": {change.key: _plain(record) for change, record in recorded(model)} | _zeros(model),
        "weights_sha256": weights_sha256(model),
        "int8": [name for codes, name in names.items() if codes not in floats],
        "float": {names[codes]: reason for codes, reason in floats.items()},
        "dequantized": dequantized_layers(model, program),
    }


def dequantized_layers(model: nn.Module, program: Program) -> list[str]:
    """Return the layers whose weights of few bits, or recurrent ones, no kernel of the runtime multiplies with."""
    multiplied = {stored_path(node.args[1]) for node in program.graph.graph.nodes if node.target in (PACKED, LSTM)}
    return [
        path
        for path, module in modules_of(model).items()
        if (form := form_of(module)) is not None
        for name, weight in form.weights.items()
        if isinstance(weight, PackedWeight) or name == "weight_ih_l0"  # which stands for all of a recurrent layer
        if f"{path}.{name}".lstrip(".") not in multiplied
    ]


def _layer_of(path: str) -> str:
    """Name the layer of a stored tensor; of a weight that the module computes, as by weight norm, its number."""
    return path.removesuffix(".weight").replace("lifted_tensor_", "computed weight ")


def _zeros(model: nn.Module) -> dict[str, Any]:
    """Return the share of zeros among the elements of matrices, where it is worth a word."""
    matrices = [tensor for tensor in model.parameters() if tensor.dim() > 1]
    total = sum(tensor.numel() for tensor in matrices)
    share = sum(int((tensor == 0).sum()) for tensor in matrices) / total if total else 0.0
    return {"sparsity": round(share, 6)} if share > 0.05 else {}


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


_LONG = ("moved", "coded", "shapes", "inputs", "example", "hooked")
"""What a record has for those who rebuild a model, and a reader of a file doesn't need."""


def _plain(record: Any) -> Any:
    """Return a record as JSON has it, without what only rebuilds a model."""
    if isinstance(record, Mapping):
        return {str(key): _plain(value) for key, value in record.items() if key not in _LONG}
    if isinstance(record, list | tuple):
        return [_plain(value) for value in record]
    return record if isinstance(record, int | float | str | bool | None) else str(getattr(record, "shape", record))


def in_float(model: nn.Module) -> nn.Module | None:
    """Return the model in float; None where its float weights are gone."""
    twin = copy_module(model)
    try:
        to_float_(twin)
    except CompressionError:
        return None
    return deployable(twin)


def latency_of(
    float_model: nn.Module | None, served: nn.Module, program: Program, runtime: Runtime, path: Path, call: Call
) -> dict[str, Any]:
    """Time the file and the float model, or the model itself where there is no float one, in turns."""
    baseline, name = (served, "quantized") if float_model is None else (float_model.cpu().eval(), "float")
    session = runtime.open(path)
    found = {}
    for size in sorted({1, batch_size_of(call)}) if program.has_batch else [batch_size_of(call)]:
        args, kwargs = resize_batch(call, size)
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        with isolated_evaluation(baseline), torch.inference_mode():
            rounds = time_in_turns([partial(session, tensors), partial(baseline, *args, **kwargs)], max_seconds=1.0)
        file, own = (sorted(times)[len(times) // 2] * 1e3 for times in zip(*rounds, strict=True))
        ratios = sorted(first / second for first, second in rounds)
        found[str(size)] = {
            "file_ms": file,
            "model_ms": own,
            "baseline": name,
            "ratio": ratios[len(ratios) // 2],
            "quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
            "threads": torch.get_num_threads(),
        }
    return found
