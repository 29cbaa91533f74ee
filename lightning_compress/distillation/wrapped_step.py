"""A LightningModule's own ``training_step``, wrapped to add to its loss, and the call of the student in it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_compress.callback import compression_callbacks
from lightning_compress.distillation.calling import Arguments
from lightning_compress.errors import invalid
from lightning_compress.modules.copying import copy_tensors
from lightning_compress.modules.paths import clean_name


def wrap_step_(module: Any) -> None:
    """Let the callback that ``serves`` the module run the instance's ``training_step``; a deep copy keeps its own."""
    # A partial of a plain function: a deep copy gets one of its own, and no callback with its Trainer.
    wrapped = partial(_served_step, module, module.__dict__.get("training_step"))
    wrapped.__wrapped__ = type(module).training_step  # type: ignore[attr-defined]  # Lightning reads its signature
    module.__dict__["training_step"] = wrapped


def unwrap_step_(module: Any) -> None:
    """Give the instance its own ``training_step`` back; may be called twice."""
    wrapped = module.__dict__.get("training_step")
    if isinstance(wrapped, partial) and wrapped.func is _served_step:
        del module.__dict__["training_step"]
        if wrapped.args[1] is not None:
            module.__dict__["training_step"] = wrapped.args[1]


def _served_step(module: Any, previous: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    step = previous or partial(type(module).training_step, module)
    for callback in [] if module._trainer is None else compression_callbacks(module._trainer):  # as in a copy
        if callback.serves(module):
            return callback.teach(partial(step, **kwargs), module, args)
    return step(*args, **kwargs)


def run_own_step(module: Any, batch: Any, batch_idx: int) -> Any:
    """Run the ``training_step`` of the module's class on a copy of the batch, which the step may change or empty."""
    step = type(module).training_step
    parameters = list(inspect.signature(step).parameters.values())[1:]
    takes_index = len(parameters) > 1 or any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
    return step(module, copy_tensors(batch), *([batch_idx] if takes_index else []))


class _CallHooks:
    """A pair of hooks on one module, which hold its last call while they listen, as a :class:`Tap` does."""

    def __init__(self) -> None:
        self._open: list[object] = []
        self.listen(listening=False)

    def listen(self, listening: bool) -> None:
        self.listening = listening
        self.inputs: Arguments | None = None
        self.outputs: Any = None
        self._recorded: object | None = None
        self.with_graph = False

    # Compiled code would take the last step's tensors for inputs.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._open.append(call := object())
        if self.listening and (torch.is_grad_enabled() or not self.with_graph):
            # Copied: the student may change its inputs in place.
            self.inputs, self.outputs = Arguments(*copy_tensors((args, kwargs))), None
            self._recorded, self.with_graph = call, torch.is_grad_enabled()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Under DDP the LightningModule is called for the whole step, and by the step for its forward.
        if self._open.pop() is self._recorded and self.listening:
            self.outputs = output

    def __getstate__(self) -> dict[str, Any]:
        return vars(_CallHooks())


class StudentCall:
    """Watches the module that a step calls for the logits: the student or, if that isn't called, its one child.

    Example:
        >>> import torch
        >>> call, module = StudentCall(), nn.Sequential(nn.Linear(2, 3))
        >>> call.attach(module)
        >>> with call.listen():
        ...     y = module(torch.ones(1, 2))
        ...     path, inputs, outputs = call.seen()
        >>> path, inputs.args, outputs is y
        ('', (tensor([[1., 1.]]),), True)
    """

    def __init__(self) -> None:
        self._hooks: dict[str, _CallHooks] = {}
        self._handles: list[Any] = []

    def attach(self, student: nn.Module, path: str | None = None) -> None:
        """Watch the module at ``path``; None watches ``student`` and its children that have parameters."""
        self.detach()
        children = {clean_name(key): child for key, child in student.named_children() if list(child.parameters())}
        for name, module in {**children, "": student}.items():  # a compiled child may be the student itself
            if path not in (None, name):
                continue
            hooks = self._hooks[name] = _CallHooks()
            self._handles.append(module.register_forward_pre_hook(hooks.before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(hooks.after))

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._hooks = [], {}

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Record calls inside the block."""
        self.switch(listening=True)
        try:
            yield
        finally:
            self.switch(listening=False)

    def switch(self, listening: bool) -> None:
        """Begin or end to listen; both forget what was recorded."""
        for hooks in self._hooks.values():
            hooks.listen(listening)

    @property
    def fired(self) -> bool:
        """Whether anything was called."""
        return any(hooks.inputs is not None for hooks in self._hooks.values())

    def seen(self) -> tuple[str, Arguments, Any]:
        """Return which module was called (its path within the student), with what, and its outputs.

        Raises:
            CompressionError: If nothing was called, or several children and not the student itself.
        """
        called = {path: hooks for path, hooks in self._hooks.items() if hooks.inputs is not None}
        # A call without gradients, for a metric, is no call for the loss.
        called = {path: hooks for path, hooks in called.items() if hooks.with_graph} or called
        path = "" if "" in called else next(iter(called), None)
        if path is None or (path and len(called) > 1):
            raise invalid(
                "student",
                "name the layer whose forward takes the inputs and gives the logits",
                None,
                f"The step calls {', '.join(called) or 'no layer that has parameters'}. Give the module a `forward` "
                "that does all of it, and call that; or name the layer.",
            )
        inputs = called[path].inputs
        assert inputs is not None
        return path, inputs, called[path].outputs

    def __getstate__(self) -> dict[str, Any]:
        return {"_hooks": {}, "_handles": []}
