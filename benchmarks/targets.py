"""Counts what runtimes compute in int8 where `StaticInt8` rounds for them, and compares their outputs.

The reference form of each network, quantized for a target, is given to that runtime, in whose file weights are
integers already. The least by which runtimes take it whole is added here: what passes codes on is rounded again, which
changes no value; the bias of a linear layer is int32 at the scale of its products (ONNX); each user has a conversion
of its own (ExecuTorch). Counted is the runtime's own graph: onnxruntime's optimized model (extended), OpenVINO's
runtime model with the hint f32, XNNPACK's subgraphs with what ExecuTorch leaves outside. TensorRT needs a GPU.

Run it with `python benchmarks/targets.py` (minutes; `--networks "residual block"` for a quick look).
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from unittest.mock import patch

import torch
from shapes.well_known import Encoder, Residual, block, mobilenet_v2, resnet18
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from lightning_compress import StaticInt8, quantize
from lightning_compress.modules.routing import form_of
from lightning_compress.quantization.layers.int8_weight import Int8Weight
from lightning_compress.quantization.numerics.int8 import TARGETS
from lightning_compress.quantization.static.graphs import aten, copy_graph, evaluate
from lightning_compress.quantization.static.placement import code_sources
from lightning_compress.quantization.static.rounding import rounded

Nodes = Iterable[tuple[str, bool]]  # of a runtime's graph: the kind, and whether it computes in int8


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


def round_again_(form: GraphModule) -> None:
    """Round what passes codes on once more: these runtimes look for codes at the operators themselves."""
    for node in list(form.graph.nodes):
        sources = code_sources(node)
        if sources and sources[0].target is rounded:
            with form.graph.inserting_after(node):
                again = form.graph.call_function(rounded, (node, *sources[0].args[1:]))
            node.replace_all_uses_with(again, delete_user_cb=lambda user, again=again: user is not again)


def store_biases_(form: GraphModule) -> None:
    for layer in form.graph.find_nodes(op="call_function", target=aten.linear.default):
        scale = form.get_submodule(layer.args[1].target).scale * layer.args[0].args[1]
        bias = evaluate(form, layer.args[2])
        form.add_submodule(f"stored_{layer.name}", Int8Weight(bias, (bias / scale).round().to(torch.int32), scale))
        with form.graph.inserting_before(layer):
            layer.update_arg(2, form.graph.call_module(f"stored_{layer.name}"))


def decompose_(form: GraphModule) -> None:
    """Write weights and roundings in torch's operators for codes."""
    graph, ops = form.graph, torch.ops.quantized_decomposed
    for node in [node for node in graph.nodes if node.op == "call_module"]:
        weight = form.get_submodule(node.target)
        zeros = torch.zeros(len(weight.scale), dtype=torch.int64)
        for part, tensor in {"codes": weight.codes.detach(), "scale": weight.scale, "zeros": zeros}.items():
            form.register_buffer(f"{node}_{part}", tensor)
        with graph.inserting_before(node):
            stored = [graph.get_attr(f"{node}_{part}") for part in ("codes", "scale", "zeros")]
            back = graph.call_function(ops.dequantize_per_channel.default, (*stored, 0, -127, 127, torch.int8))
        node.replace_all_uses_with(back)
        graph.erase_node(node)
    for node in graph.find_nodes(op="call_function", target=rounded):
        x, *codes = *node.args, torch.int8
        with graph.inserting_before(node):
            stored = graph.call_function(ops.quantize_per_tensor.default, (x, *codes))
        for user in list(node.users):
            with graph.inserting_before(user):
                back = graph.call_function(ops.dequantize_per_tensor.default, (stored, *codes))
            user.replace_input_with(node, back)
        graph.erase_node(node)


def onnx_file(form: GraphModule, x: Tensor, folder: str) -> Path:
    store_biases_(form)
    form.recompile()
    path = Path(folder, "int8.onnx")
    torch.onnx.export(form, (x,), path, dynamo=True, verbose=False, external_data=False)
    return path


def run_onnxruntime(form: GraphModule, x: Tensor, folder: str) -> tuple[Tensor, Nodes]:
    onnx, runtime = importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    settings, optimized = runtime.SessionOptions(), str(Path(folder, "optimized.onnx"))
    settings.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    settings.optimized_model_filepath, settings.log_severity_level = optimized, 3
    session = runtime.InferenceSession(onnx_file(form, x, folder), settings, providers=["CPUExecutionProvider"])
    graph, kinds = onnx.load(optimized).graph, (onnx.TensorProto.UINT8, onnx.TensorProto.INT8)
    codes = {value.name for value in graph.value_info if value.type.tensor_type.elem_type in kinds}
    conversions = ("QuantizeLinear", "DequantizeLinear")
    nodes = [(node.op_type, node.op_type not in conversions and bool(codes & {*node.input})) for node in graph.node]
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]), nodes


def run_openvino(form: GraphModule, x: Tensor, folder: str) -> tuple[Tensor, Nodes]:
    core = importlib.import_module("openvino").Core()
    compiled = core.compile_model(onnx_file(form, x, folder), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    infos = [node.rt_info for node in compiled.get_runtime_model().get_ops()]
    nodes = [(info["layerType"].astype(str), info["runtimePrecision"].astype(str) in ("u8", "i8")) for info in infos]
    outside = ("Const", "Input", "Output")
    return torch.from_numpy(compiled([x.numpy()])[0]), [node for node in nodes if node[0] not in outside]


def run_executorch(form: GraphModule, x: Tensor, folder: str) -> tuple[Tensor, Nodes]:
    exir, runtime = importlib.import_module("executorch.exir"), importlib.import_module("executorch.runtime")
    xnnpack = importlib.import_module("executorch.backends.xnnpack.xnnpack_preprocess")
    partition = importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    decompose_(form)
    form.recompile()
    exported = torch.export.export(form, (x,))
    with patch.object(xnnpack, "serialize_xnnpack_binary", wraps=xnnpack.serialize_xnnpack_binary) as serialize:
        edge = exir.to_edge_transform_and_lower(exported, partitioner=[partition.XnnpackPartitioner()])
    calls = [node.target.__name__ for node in edge.exported_program().graph.nodes if node.op == "call_function"]
    nodes = [(name, False) for name in calls if name not in ("getitem", "executorch_call_delegate")]
    for graph in (call.args[0] for call in serialize.call_args_list):
        tensors = [getattr(value.xvalue_union, "tensor_value", value.xvalue_union) for value in graph.xvalues]
        types = {tensor.id_out: tensor.datatype.name for tensor in tensors}
        for node in (node.xnode_union for node in graph.xnodes):
            kind = type(node).__name__.removeprefix("XNN")
            nodes.append((kind, "qint8" in types[node.output_id] and kind != "Convert"))
    buffer = edge.to_executorch().buffer
    program = runtime.Runtime.get().load_program(buffer)
    method = program.load_method("forward")
    return method.execute([x])[0].clone(), nodes  # a view of the method's memory


RUNTIMES = {"onnxruntime": run_onnxruntime, "openvino": run_openvino, "executorch": run_executorch}


def cells(target: str, network: nn.Module, form: GraphModule, x: Tensor) -> str:
    if target not in RUNTIMES or importlib.util.find_spec(target) is None:
        return "not installed | | | "
    expected, whole = form(x)[0], network(x)
    round_again_(form)
    with tempfile.TemporaryDirectory() as folder:
        got, nodes = RUNTIMES[target](form, x, folder)
    found = [Counter(kind for kind, is_int8 in nodes if is_int8 is wanted) for wanted in (True, False)]
    counts = (", ".join(f"{count} {kind}" for kind, count in sorted(counter.items())) for counter in found)
    difference = (got - expected).abs().max() / expected.abs().max()
    cosine = F.cosine_similarity(got.flatten(), whole.flatten(), dim=0)
    return f"{' | '.join(counts)} | {difference:.1e} | {cosine:.4f}"


def described(form: GraphModule) -> str:
    """The operations in their order; a star marks what they read rounded."""
    nodes = [node for node in form.graph.nodes if node.op not in ("get_attr", "call_module")]
    names = {node: f"{node.args[0]}*" if node.target is rounded else node.name for node in nodes}
    calls = [node for node in nodes if node.op != "placeholder" and node.target is not rounded]
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
            unit = form_of(quantize(network, StaticInt8(target=target), calibration=[x]))
            form = copy_graph(unit._reference)
            if name in ("residual block", "encoder"):
                graphs.append(f"{name}, {target}: {described(form)}")
            print(f"| {name} | {target} | {len(unit.roundings)} | {cells(target, network, form, x)} |", flush=True)
    print("", *graphs, sep="\n")


if __name__ == "__main__":
    main()
