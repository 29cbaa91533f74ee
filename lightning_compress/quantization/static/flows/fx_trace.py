"""Traces a module for the flow fx: one signature, each call of a layer its own, integers out of upstream's sight."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch.fx
from torch import Tensor, nn
from torch.fx import GraphModule, Node, Proxy, Tracer
from torch.nn.modules.conv import _ConvNd

from lightning_compress.modules.isolation import isolated_random_state, isolated_state
from lightning_compress.modules.outputs import Structure, flatten
from lightning_compress.modules.routing import ROUTING, class_of
from lightning_compress.quantization.static.flows.flow import Signature, Trace
from lightning_compress.quantization.static.flows.graphs import (
    Function,
    fold_layers_,
    hide_functions_,
    name_layers_,
    name_of,
    replace_,
    value_read,
    with_padding_in_numbers,
    without_parametrization,
)
from lightning_compress.quantization.static.flows.names import AGAIN, HELD, rename_

WITH_KERNEL = (nn.Linear, _ConvNd)


class Opaque(nn.Module):
    """Hides a layer with children of its own, as upstream would swap its children in place; it is called as it is."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["module"] = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["module"](*args, **kwargs)


class _Tracer(Tracer):
    """Traces the forward of one module for calls of one signature, as upstream's own tracer does, which it replaces."""

    def __init__(self, signature: Signature, hooked: Collection[str]) -> None:
        super().__init__()
        self.record_stack_traces = not torch.fx.config.do_not_emit_stack_traces
        self._signature = signature
        self._hooked = set(hooked)
        self._inserted: dict[str, nn.Module] = {}
        self._calls: Counter[str] = Counter()
        self._read: dict[int, Tensor] = {}
        self.structure = Structure(None)
        self.names: set[str] = set()
        self.baked: dict[str, Tensor] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_torchs = m.__module__.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(m, nn.Sequential)
        return is_torchs or type(m) is Opaque

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        count = len(self._signature.inputs)
        proxies = [self.create_proxy("placeholder", f"input_{index}", (), {}) for index in range(count)]
        args, kwargs = self._signature.rebuild(proxies)
        # All tensors that aren't parameters or buffers are constants, in the order in which they are met: what a module
        # keeps as an attribute need not be there where it is traced next.
        self.tensor_attrs.clear()

        def forward(root: nn.Module, *_: Any) -> list[Any]:
            tensors, self.structure = flatten(class_of(root).forward(root, *args, **kwargs))
            return tensors

        return forward, [self.root, *proxies]

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self.path_of_module(m)
        self.names.add(path)
        if self.is_leaf_module(m, path) and next(m.children(), None) is not None:
            return self._insert(path, Opaque(m), args, kwargs)
        self._calls[path] += 1
        again = isinstance(m, WITH_KERNEL) and self.is_leaf_module(m, path) and self._calls[path] > 1
        if again or isinstance(getattr(m, "padding", None), str):
            # An int8 layer has one output range: each further call gets a layer of its own, of the same weights.
            name = f"{path}{AGAIN}{self._calls[path]}" if again else path
            output = self._insert(name, with_padding_in_numbers(shallow_copy(m)), args, kwargs)
        else:
            output = super().call_module(m, forward, args, kwargs)
        if path in self._hooked and isinstance(output, Proxy):
            # The traced form calls no module that it inlined; an identity passes its output on to its hooks.
            point = nn.Identity()
            point.register_forward_hook(_ReplayHooks(m))
            output = self._insert(f"hooked_{len(self._inserted)}", point, (output,), {})
        return output

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Proxy]) -> Any:
        self._read[id(attr_val)] = attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def _insert(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._inserted[name] = module
        return self.create_proxy("call_module", name, args, kwargs)

    def graph_module(self, module: nn.Module) -> GraphModule:
        # Constants, and what the forward keeps: all of it is of this trace.
        with isolated_random_state(), isolated_state(module.modules()):
            graph = self.trace(module)
            leaves = {str(node.target): node for node in graph.nodes if node.op in ("call_module", "get_attr")}
            found: dict[str, Any] = {
                name: self._inserted.get(name) or operator.attrgetter(name)(module) for name in leaves
            }
            # A file fills them in place, which takes memory of their own for each element.
            found |= {name: value.contiguous() for name, value in found.items() if name in vars(module)}
        for name in found.keys() - self._inserted.keys():
            if isinstance(found[name], nn.Module):
                # The module's own may be routed to what is made of the graph. Hooks stay there: an identity calls them.
                found[name] = shallow_copy(found[name])
        read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        self.names |= read
        buffers = {name: buffer for name, buffer in module.named_buffers() if id(buffer) in self._read}
        self.baked = {name: buffer.detach().clone().cpu() for name, buffer in buffers.items() if name not in read}
        traced = GraphModule(found, graph)
        traced.train(module.training)
        name_layers_(traced)
        hide_integers_(traced, [not tensor.is_floating_point() for tensor in self._signature.inputs])
        return traced


class _ReplayHooks:
    """Calls the forward hooks that a module has at that moment, with the module's output."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, point: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for key, hook in list(self.module._forward_hooks.items()):
            if key in self.module._forward_hooks_with_kwargs:
                hook(self.module, (), {}, output)
            else:
                hook(self.module, (), output)


def trace(module: nn.Module, signature: Signature, hooked: Collection[str] = ()) -> Trace:
    """Return the traced form of ``module``, whose layers are others around the same tensors.

    Inner modules in ``hooked`` keep calling their forward hooks. Raises whatever `torch.fx` raises where control flow
    depends on data.
    """
    tracer = _Tracer(signature, hooked)
    if not type(module).__module__.startswith("torch.nn") or isinstance(module, nn.Sequential):
        graph = tracer.graph_module(module)
        return Trace(graph, tracer.structure, frozenset(tracer.names), tracer.baked)
    graph = tracer.graph_module(_Holder(shallow_copy(module)).train(module.training))
    return Trace(graph, tracer.structure, frozenset((*module._parameters, *module._buffers, *module._modules)), {})


class _Holder(nn.Module):
    """Holds one layer of torch, which is called in its traced form and never traced itself."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.add_module(HELD, layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._modules[HELD](*args, **kwargs)  # type: ignore[misc]


def simplify_(graph: GraphModule, training: bool) -> None:
    """Call layers of torch wherever one is computed, and hide the rest of such functions; once done it changes nothing.

    Before ``training`` computed weights stay computed: they hold what is trained.
    """
    if not training:
        fold_layers_(graph)
        for path, module in list(graph.named_modules()):
            if isinstance(module, Opaque) and (plain := without_parametrization(module.__dict__["module"])) is not None:
                graph.set_submodule(path, plain.eval())
    hide_functions_(graph)
    rename_(graph)


def shallow_copy(module: nn.Module) -> nn.Module:
    """Make a second module around the same tensors: the first one's forward will be routed to where this one stands."""
    own = class_of(module)
    twin = own.__new__(own)  # `copy` refuses parametrizations
    vars(twin).update({name: value for name, value in vars(module).items() if name not in ROUTING})
    for kind in ("_forward_hooks", "_forward_pre_hooks"):
        vars(twin)[kind] = type(getattr(module, kind))()
    for kind in ("_parameters", "_buffers", "_modules"):
        vars(twin)[kind] = dict(getattr(module, kind).items())  # of what a `CallLog` watches plain ones
    return twin


# Upstream takes every tensor for a float one, and would round integers.

_GIVE_INTEGERS = ("long", "int", "bool", "argmax", "argmin", "argsort", "eq", "ne", "lt", "le", "gt", "ge")
_KEEP_INTEGERS = (
    *("add", "iadd", "sub", "mul", "imul", "mod", "remainder", "floordiv", "floor_divide", "clamp", "cat", "stack"),
    *("view", "reshape", "flatten", "squeeze", "unsqueeze", "transpose", "permute", "expand", "repeat", "contiguous"),
    *("clone", "detach", "where", "getitem", "repeat_interleave", "cumsum", "relu", "min", "max"),
)


def hide_integers_(graph: GraphModule, are_integers: Sequence[bool]) -> None:
    """Put operations on integers into modules, which stay as they are; ``are_integers`` tells of the graph's inputs."""
    found, inputs = set[Node](), iter(are_integers)
    for node in list(graph.graph.nodes):
        name, tensor = name_of(node), value_read(graph, node)
        if node.op == "placeholder":
            is_integer = next(inputs)
        elif node.op == "get_attr":
            is_integer = isinstance(tensor, Tensor) and not tensor.is_floating_point()
        else:
            is_operation = node.op in ("call_function", "call_method")
            integers = [source in found for source in node.all_input_nodes if not _is_size(source)]
            hidden = is_operation and name in _KEEP_INTEGERS and any(integers)
            is_integer = (is_operation and name in _GIVE_INTEGERS) or (hidden and all(integers))
            if hidden and name != "getitem" and (all(integers) or name in ("add", "iadd", "mul", "imul")):
                function = getattr(Tensor, name) if node.op == "call_method" else node.target
                node = replace_(graph, node, f"integers_{node.name}", Function(function), node.args, node.kwargs)
        if is_integer:
            found.add(node)


def _is_size(node: Any) -> bool:
    if not isinstance(node, Node):  # the shape of a parameter
        return True
    if node.target is operator.getitem:
        return _is_size(node.args[0])
    return (node.target is getattr and node.args[1] == "shape") or (node.op == "call_method" and node.target == "size")
