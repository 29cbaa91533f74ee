"""What the student of a foreign LightningModule was given and gave back, seen by hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_compress.distillation.teacher import Arguments
from lightning_compress.errors import invalid
from lightning_compress.modules.copying import copy_tensors
from lightning_compress.modules.paths import clean_name


class _Witness:
    """A pair of hooks on one module: its last call while it listens, like a :class:`Tap`'s."""

    def __init__(self) -> None:
        self._open: list[object] = []
        self.listen(listening=False)

    def listen(self, listening: bool) -> None:
        self.listening = listening
        self.inputs: Arguments | None = None
        self.outputs: Any = None
        self._kept: object | None = None
        self.with_graph = False

    # Compiled code would take the last step's tensors for inputs.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._open.append(call := object())
        if self.listening and (torch.is_grad_enabled() or not self.with_graph):
            # Copied: the student may change its inputs in place.
            self.inputs, self.outputs = Arguments(*copy_tensors((args, kwargs))), None
            self._kept, self.with_graph = call, torch.is_grad_enabled()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Under DDP the LightningModule is called for the whole step, and by the step for its forward.
        if self._open.pop() is self._kept and self.listening:
            self.outputs = output

    def __getstate__(self) -> dict[str, Any]:
        return vars(_Witness())


class StudentCall:
    """Watches the module that is called for the logits: the student itself or, if that isn't called, its one child.

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
        self._witnesses: dict[str, _Witness] = {}
        self._handles: list[Any] = []

    def attach(self, student: nn.Module, path: str | None = None) -> None:
        """Watch the module at ``path``; None watches ``student`` and its children that have parameters."""
        self.detach()
        children = {clean_name(name): child for name, child in student.named_children() if list(child.parameters())}
        for each, module in {**children, "": student}.items():  # a compiled child may be the student itself
            if path not in (None, each):
                continue
            witness = self._witnesses[each] = _Witness()
            self._handles.append(module.register_forward_pre_hook(witness.before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(witness.after))

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._witnesses = [], {}

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Keep calls inside the block."""
        self.switch(listening=True)
        try:
            yield
        finally:
            self.switch(listening=False)

    def switch(self, listening: bool) -> None:
        """Begin or end to listen; either forgets what was seen."""
        for witness in self._witnesses.values():
            witness.listen(listening)

    @property
    def fired(self) -> bool:
        """Whether anything was called."""
        return any(each.inputs is not None for each in self._witnesses.values())

    def seen(self) -> tuple[str, Arguments, Any]:
        """Which module was called (a path within the student), with what, and its outputs.

        Raises:
            CompressionError: If nothing was called, or several children and not the student itself.
        """
        called = {path: each for path, each in self._witnesses.items() if each.inputs is not None}
        # A call without gradients, for a metric, is no call for the loss.
        called = {path: each for path, each in called.items() if each.with_graph} or called
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
        return {"_witnesses": {}, "_handles": []}
