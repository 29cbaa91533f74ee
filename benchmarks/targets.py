"""Counts what runtimes compute in int8 where `StaticInt8` rounds for them, and compares their outputs.

`export` writes each network, quantized for a target, and that runtime runs the file. Counted is the runtime's own
graph, for a batch of fixed size: onnxruntime's optimized model (extended), OpenVINO's runtime model with the hint f32,
XNNPACK's subgraphs with what ExecuTorch leaves outside. TensorRT needs a GPU. `runtimes.py` has latency, beside the
runtimes' own toolkits.

Run it with `python benchmarks/targets.py` (minutes; `--networks "residual block"` for a quick look).
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from runtimes_files import OPENVINO, counted, onnxruntime_nodes, openvino_nodes
from shapes.well_known import Encoder, Residual, block, mobilenet_v2, resnet18
from torch import Tensor, nn
from torch.fx import Graph
from torch.nn import functional as F

from lightning_compress import RuntimeModule, StaticInt8, export, quantize
from lightning_compress.deployable import deployable
from lightning_compress.export.program import trace_program
from lightning_compress.modules.written import writing_file
from lightning_compress.quantization.numerics.int8 import TARGETS
from lightning_compress.quantization.numerics.operators import ROUNDED, STORED

OWN_CALLS = ("getitem", "executorch_call_delegate", "sym_size.int", "sym_size")


class Concatenated(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


def unet() -> nn.Module:
    coarse = nn.Sequential(nn.MaxPool2d(2), block(16, 32, 3), nn.Upsample(scale_factor=2))
    return nn.Sequential(block(3, 16, 3), Concatenated(coarse), block(48, 16, 3), nn.Conv2d(16, 2, 1))


def residual_block() -> nn.Module:
    body = nn.Sequential(block(16, 16, 3), block(16, 16, 3, act=None))
    end = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return nn.Sequential(block(3, 16, 3), Residual(body, nn.Identity(), nn.ReLU()), *end)


NETWORKS = {
    "residual block": (residual_block, (3, 32, 32)),
    "encoder": (Encoder, (16, 768)),
    "U-Net": (unet, (3, 32, 32)),
    "ResNet-18": (resnet18, (3, 96, 96)),
    "MobileNetV2": (mobilenet_v2, (3, 96, 96)),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A network whose BatchNorm has seen data, and a batch."""
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    network = make()
    for _ in range(10):
        network(torch.randn(8, *shape))
    return network.eval(), torch.randn(2, *shape)


@contextmanager
def told() -> Iterator[list[tuple[str, bool]]]:
    """Nodes of what is written for ExecuTorch meanwhile: XNNPACK's, and those that it leaves."""
    exir = importlib.import_module("executorch.exir")
    xnnpack = importlib.import_module("executorch.backends.xnnpack.xnnpack_preprocess")
    lower, serialize, nodes = exir.to_edge_transform_and_lower, xnnpack.serialize_xnnpack_binary, []

    def lowered(*args: Any, **kwargs: Any) -> Any:
        edge = lower(*args, **kwargs)
        calls = [node.target.__name__ for node in edge.exported_program().graph.nodes if node.op == "call_function"]
        nodes.extend((name, False) for name in calls if name not in OWN_CALLS)
        return edge

    def serialized(graph: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [getattr(value.xvalue_union, "tensor_value", value.xvalue_union) for value in graph.xvalues]
        types = {tensor.id_out: tensor.datatype.name for tensor in tensors}
        for node in (node.xnode_union for node in graph.xnodes):
            kind = type(node).__name__.removeprefix("XNN")
            nodes.append((kind, "qint8" in types[node.output_id] and kind != "Convert"))
        return serialize(graph, *args, **kwargs)

    with (
        patch.object(exir, "to_edge_transform_and_lower", lowered),
        patch.object(xnnpack, "serialize_xnnpack_binary", serialized),
    ):
        yield nodes


def cells(target: str, network: nn.Module, quantized: nn.Module, x: Tensor) -> str:
    if target == "tensorrt" or importlib.util.find_spec(target) is None:
        return "not installed | | | "
    with tempfile.TemporaryDirectory() as name, told() if target == "executorch" else nullcontext([]) as nodes:
        folder = Path(name)
        path = folder / ("model.pte" if target == "executorch" else "model.onnx")
        exported = export(quantized, x, path, target, dynamic_batch=False)
        got = RuntimeModule(exported.path)(x)
        if target == "onnxruntime":
            nodes = list(onnxruntime_nodes(path, folder))
        if target == "openvino":
            nodes = [node for node in openvino_nodes(path, OPENVINO, x) if node[0] not in ("Const", "Input", "Output")]
    with writing_file():
        expected = quantized(x)
    difference = (got - expected).abs().max() / expected.abs().max()
    cosine = F.cosine_similarity(got.flatten(), network(x).flatten(), dim=0)
    return f"{' | '.join(counted(nodes))} | {difference:.1e} | {cosine:.4f}"


def described(graph: Graph) -> str:
    """The operations in their order; a star marks what they read rounded."""
    nodes = [node for node in graph.nodes if node.op != "get_attr" and node.target is not STORED]
    names = {node: f"{node.args[0]}*" if node.target is ROUNDED else node.name for node in nodes}
    calls = [node for node in nodes if node.op not in ("placeholder", "output") and node.target is not ROUNDED]
    return "; ".join(f"{node}({', '.join(names[x] for x in node.all_input_nodes if x in names)})" for node in calls)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="What runtimes run in int8.")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    warnings.filterwarnings("ignore")
    graphs = []
    print("| Network | Target | Places | In int8 | Not in int8 | To the reference form | Cosine to float |")
    print("|:--|:--|--:|:--|:--|--:|--:|")
    for name in parser.parse_args().networks:
        for target in TARGETS:
            network, x = build(name)
            quantized = quantize(network, StaticInt8(target=target), calibration=[x])
            graph = trace_program(deployable(quantized), (x,), {}, batch=True, dynamic={}).graph.graph
            if name in ("residual block", "encoder"):
                graphs.append(f"{name}, {target}: {described(graph)}")
            places = len(graph.find_nodes(op="call_function", target=ROUNDED))
            print(f"| {name} | {target} | {places} | {cells(target, network, quantized, x)} |", flush=True)
    print("", *graphs, sep="\n")


if __name__ == "__main__":
    main()
