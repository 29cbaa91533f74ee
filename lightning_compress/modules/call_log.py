"""Which modules does a run of a model call, who calls them, and with what?

A module that is called from outside its parent can't vanish into the parent's traced form.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from lightning_compress.modules.copying import copy_tensors
from lightning_compress.modules.paths import is_at_or_below, is_below, modules_of
from lightning_compress.modules.routing import form_of, needs_values

_HALF = (torch.float16, torch.bfloat16)
Tell = Callable[[], None]


@dataclass
class CallLog:
    """Says what a run called.

    Attributes:
        inputs: path (without ``_orig_mod``) to the ``(args, kwargs)`` of its first call, tensors detached and cloned.
        callers: path to the paths of the modules that called it; None is code outside of all modules.
        readers: path to the paths of the user's modules that computed with its parameters while they were evaluated.
        replaced: path to the paths of the modules that called it with other parameters than its own.
    """

    inputs: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    callers: dict[str, set[str | None]] = field(default_factory=dict)
    readers: dict[str, set[str]] = field(default_factory=dict)
    replaced: dict[str, set[str]] = field(default_factory=dict)

    def merge(self, other: CallLog) -> None:
        """Add what another run called; inputs that are known already stay."""
        self.inputs = {**other.inputs, **self.inputs}
        for name in ("callers", "readers", "replaced"):
            for path, found in getattr(other, name).items():
                getattr(self, name).setdefault(path, set()).update(found)

    def entered_below(self, path: str) -> str | None:
        """Return a module below ``path`` that something outside of ``path`` calls directly; None if there is none."""
        return _from_outside({inner: callers for inner, callers in self.callers.items() if is_below(inner, path)}, path)

    def read_below(self, path: str) -> str | None:
        """Return a module at or below ``path`` whose parameters a module outside of it reads; None if there is none."""
        return _from_outside(self.readers, path)

    def replaced_below(self, path: str) -> str | None:
        """Return a module at or below ``path`` whose parameters something outside of it replaces; None if none is."""
        return _from_outside(self.replaced, path)


def _from_outside(found: Mapping[str, Collection[str | None]], path: str) -> str | None:
    for inner, others in found.items():
        if is_at_or_below(inner, path) and any(other is None or not is_at_or_below(other, path) for other in others):
            return inner
    return None


class _Watched(dict[str, Any]):
    """The parameters of a module: when another module reads one by its name and computes with it, that is told.

    When they are replaced, as `torch.func.functional_call` does for the time of a call, that is told at once.
    """

    def __init__(self, parameters: dict[str, Any], teller: Callable[[], Tell | None], tell_replaced: Tell) -> None:
        super().__init__(parameters)
        self.teller, self.tell_replaced = teller, tell_replaced

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(value, _Read):
            value = value.own
        if self.get(name) is not None:
            self.tell_replaced()
        super().__setitem__(name, value)

    def __getitem__(self, name: str) -> Any:
        value, tell = super().__getitem__(name), self.teller()
        if value is None or tell is None or isinstance(value, FakeTensor):  # torch.export puts those in while it traces
            return value
        read = value.as_subclass(_Read)
        read.own, read.tell = value, tell
        return read


class _Read(Tensor):
    """A parameter as another module reads it."""

    own: nn.Parameter
    tell: Tell

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if needs_values(func, args, cls):
            for leaf in pytree.tree_leaves((args, kwargs)):
                if isinstance(leaf, cls):
                    leaf.tell()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def record_calls(model: nn.Module, run: Callable[[], Any], keep_inputs: bool = True) -> CallLog:
    """Call ``run`` and log every module call in ``model``. Hooks are gone afterwards, also after an error."""
    log, stack = CallLog(), list[str]()

    def enter(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        log.callers.setdefault(path, set()).add(stack[-1] if stack else None)
        if path not in log.inputs:
            log.inputs[path] = as_seen((args, kwargs)) if keep_inputs else ((), {})
        stack.append(path)

    def leave(*_: Any) -> None:
        stack.pop()

    # Scripted modules take no hooks, and nothing in them is Python's to see.
    modules = {
        path: module for path, module in modules_of(model).items() if not isinstance(module, torch.jit.ScriptModule)
    }

    def teller(path: str) -> Tell | None:
        reader = stack[-1] if stack else path
        # Torch's own read what lies in them for a fused path, which is switched off where it matters.
        # A form reads what lies in its module, too.
        if reader == path or modules[reader].training or form_of(modules[reader]) is not None:
            return None
        if type(modules[reader]).__module__.startswith("torch."):
            return None
        return lambda: log.readers.setdefault(path, set()).add(reader)

    def tell_replaced(path: str) -> None:
        replacer = stack[-1] if stack else ""
        if replacer != path:
            log.replaced.setdefault(path, set()).add(replacer)

    def unwatch(module: nn.Module, parameters: dict[str, Any]) -> None:
        watched = dict(module._parameters)
        parameters.clear()
        parameters.update(watched)
        module.__dict__["_parameters"] = parameters

    # Compiled submodules run as written, so that the calls inside them are seen.
    with ExitStack() as exits, torch.compiler.set_stance("force_eager"):
        for path, module in modules.items():
            parameters: dict[str, Any] = module._parameters
            if type(parameters) is dict:
                exits.callback(unwatch, module, parameters)
                told = _Watched(parameters, partial(teller, path), partial(tell_replaced, path))
                module.__dict__["_parameters"] = told
            exits.enter_context(module.register_forward_pre_hook(partial(enter, path), with_kwargs=True))
            exits.enter_context(module.register_forward_hook(leave, always_call=True))
        run()
    return log


def as_seen(call: Any) -> Any:
    """Copy a call to run it again, without autocast: what that made of floats is no choice of the model's."""
    call = copy_tensors(call)
    leaves = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor)]
    if not any(torch.is_autocast_enabled(kind) for kind in {leaf.device.type for leaf in leaves}):
        return call
    return pytree.tree_map_only(Tensor, lambda leaf: leaf.float() if leaf.dtype in _HALF else leaf, call)


def count_inputs(model: nn.Module, run: Callable[[], Any]) -> int:
    """Count the numbers that reach modules with parameters in a run, whatever they do with them."""
    count = 0

    def see(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal count
        count += sum(leaf.numel() for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))

    with ExitStack() as hooks, torch.compiler.set_stance("force_eager"):
        for layer in model.modules():
            if not isinstance(layer, torch.jit.ScriptModule) and next(layer.parameters(), None) is not None:
                hooks.enter_context(layer.register_forward_pre_hook(see, with_kwargs=True))
        run()
    return count
