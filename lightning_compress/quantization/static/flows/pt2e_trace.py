"""Traces a module for the flow pt2e, by `torch.export` alone."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule

from lightning_compress.errors import CompressionError
from lightning_compress.modules.isolation import isolated_evaluation
from lightning_compress.modules.outputs import Structure, flatten
from lightning_compress.modules.routing import class_of
from lightning_compress.quantization.static.flows.flow import Signature, Trace


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

    def __deepcopy__(self, memo: dict[int, Any]) -> Exported:
        twin = memo[id(self)] = type(self).__new__(type(self))
        with quiet():  # torch warns of its own copies
            twin.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__


class _Call(nn.Module):
    """Makes a function of the tensors of its call of a module; what it puts those of its output into is told aside."""

    def __init__(self, module: nn.Module, signature: Signature, tell: Callable[[Structure], None]) -> None:
        super().__init__()
        self.module = module
        self.signature = signature
        self.tell = tell
        self.training = module.training

    def forward(self, *tensors: Tensor) -> list[Any]:
        args, kwargs = self.signature.rebuild(list(tensors))
        outputs, structure = flatten(class_of(self.module).forward(self.module, *args, **kwargs))
        self.tell(structure)
        return outputs


def trace(module: nn.Module, signature: Signature, hooked: Collection[str] = ()) -> Trace:
    """Return the exported form of ``module`` in evaluation.

    All sizes that its code leaves open may vary, or the first alone where else it couldn't be one. Raises whatever
    `torch.export` raises where control flow depends on data.
    """
    if hooked:
        raise CompressionError(f"its `{next(iter(hooked))}` has a forward hook, which an exported graph doesn't call")
    device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    inputs = tuple(tensor.to(device) for tensor in _sizes_above_one(signature.inputs))
    structures: list[Structure] = []
    call = _Call(module, signature, structures.append)
    with quiet(), isolated_evaluation(module):
        call(*inputs)  # so that it is exported with what it makes at its first call, whether it has been called or not
        exported = _export(call, inputs)
    read = [str(node.target) for node in exported.graph.nodes if node.op == "get_attr" and node.users]
    names = frozenset(name.removeprefix("module.") for name in read if name.startswith("module."))
    return Trace(Exported(exported), structures[-1], names, {})


def _export(call: nn.Module, inputs: tuple[Tensor, ...]) -> GraphModule:
    """Return the graph with as many variable sizes as leave a batch of one possible."""
    several = [range(tensor.dim()) for tensor in inputs]
    for dims in (several, [sizes[:1] for sizes in several]):
        dynamic = (tuple(dict.fromkeys(sizes, Dim.AUTO) for sizes in dims),)
        exported = torch.export.export(call, inputs, dynamic_shapes=dynamic).module()
        assert isinstance(exported, GraphModule)
        try:
            exported(*[tensor[:1] for tensor in inputs])
            break
        except (AssertionError, RuntimeError, IndexError):  # with all sizes variable, some code excludes a one
            continue
    return exported


def _sizes_above_one(inputs: list[Tensor]) -> list[Tensor]:
    """Return a batch of one would be exported as a batch that is always one."""
    if all(tensor.dim() and tensor.shape[0] == 1 for tensor in inputs):
        return [tensor.expand(2, *tensor.shape[1:]) for tensor in inputs]
    return inputs
