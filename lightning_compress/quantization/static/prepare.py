"""Prepares a traced graph: quantizers, hooks, and what depends on the mode by the user's own modules.

BatchNorm isn't folded: as the weights of each output channel have a scale of their own, the codes of a folded weight
are those of the weight, but for the sign, and what is computed is the same.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_compress.errors import CompressionError
from lightning_compress.modules.outputs import Structure
from lightning_compress.modules.paths import modules_of
from lightning_compress.modules.routing import class_of
from lightning_compress.quantization.numerics.int8 import StaticInt8
from lightning_compress.quantization.static.graphs import (
    aten,
    copy_graph,
    in_evaluation,
    int8_layers,
    overwritten,
    owner_path,
    read_through_,
    trains,
)
from lightning_compress.quantization.static.placement import TARGETS, Place, places
from lightning_compress.quantization.static.rounding import ActivationQuantizer, WeightQuantizer
from lightning_compress.quantization.static.trace import Trace
from lightning_compress.quantization.static.unit import Unit


def prepare(
    trace: Trace, module: nn.Module, unit: Unit, scheme: StaticInt8, *, training: bool
) -> tuple[GraphModule, list[Place]]:
    """Return a traced graph with quantizers (for training of weights, too), and the places of those of activations."""
    target, graph, modules = TARGETS[scheme.target], copy_graph(trace.graph), modules_of(module, every_name=True)
    layers = int8_layers(graph, unit.floats)
    found = places(graph, layers, target)
    nodes = {node.name: node for node in graph.graph.nodes}
    changed = overwritten(graph)
    if any(nodes[place.after] in changed for place in found):
        raise CompressionError("it changes in place a part of what int8 layers give or read")
    observer = "moving_average" if training else scheme.observer
    for place in found:
        if place.name not in graph._modules:
            graph.add_module(place.name, ActivationQuantizer(target.low, target.high, target.symmetric, observer))
        read_through_(graph, nodes[place.after], place.users, "call_module", place.name)
    for layer in layers if training else ():
        graph.add_module(f"weight_{layer.name}", WeightQuantizer(scheme.largest_code))
        with graph.graph.inserting_before(layer):
            layer.update_arg(1, graph.graph.call_module(f"weight_{layer.name}", (layer.args[1],)))
    for path, structure, marks in trace.hooked:
        behind = max((nodes[mark] for mark in marks), default=None)
        graph.add_module(name := f"hooks_{len(graph._modules)}", _Hooks(modules[path], structure))
        if behind is not None:
            with graph.graph.inserting_after(behind):
                graph.graph.call_module(name, tuple(nodes[mark] for mark in marks))
    for node in [node for node in nodes.values() if trains(node)]:
        owner = modules[owner_path(node)]
        normalizes = node.target is aten.batch_norm.default and isinstance(owner, _BatchNorm)
        is_own = normalizes or owner_path(node) in trace.dropping
        mode = Own(owner) if is_own else _Switched(node.target, owner)
        graph.add_module(name := f"mode_{node.name}", mode)
        with graph.graph.inserting_before(node):
            call = graph.graph.call_module(name, node.args[:1] if is_own else node.args)
        node.replace_all_uses_with(call)
        graph.graph.erase_node(node)
    graph.recompile()
    return graph, found


class Own(nn.Module):
    """Calls a module of the tree that depends on its mode: a BatchNorm, which knows its momentum and counts batches."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["module"] = module
        self.frozen = False

    def forward(self, x: Tensor) -> Any:
        module = self.__dict__["module"]
        if self.frozen and isinstance(module, _BatchNorm) and module.running_mean is not None:
            options = module.running_mean, module.running_var, module.weight, module.bias, False, 0.0, module.eps
            return nn.functional.batch_norm(x, *options)
        return class_of(module).forward(module, x)


class _Switched(nn.Module):
    """Computes an operator whose arguments depend on the mode of a module of the tree."""

    def __init__(self, operator: Any, owner: nn.Module) -> None:
        super().__init__()
        self.__dict__["owner"] = owner
        self.operator = operator

    def forward(self, *args: Any) -> Any:
        training = self.__dict__["owner"].training
        return self.operator(*(args if training else in_evaluation(self.operator, args)))


class _Hooks(nn.Module):
    """Calls the forward hooks that a module of the tree has at that moment, with its output."""

    def __init__(self, module: nn.Module, structure: Structure) -> None:
        super().__init__()
        self.__dict__["module"] = module
        self.structure = structure

    def forward(self, *tensors: Tensor) -> None:
        module, output = self.__dict__["module"], self.structure.rebuild(tensors)
        for key, hook in list(module._forward_hooks.items()):
            if key in module._forward_hooks_with_kwargs:
                hook(module, (), {}, output)
            else:
                hook(module, (), output)
