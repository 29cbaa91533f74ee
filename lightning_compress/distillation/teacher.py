"""The teacher, held outside the module tree: frozen, in evaluation mode, without gradients."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from lightning_compress.distillation.calling import call, cast
from lightning_compress.distillation.student_teachers import EMATeacher, Snapshot
from lightning_compress.distillation.taps import Taps, find_layer
from lightning_compress.distillation.weights import load_weights_
from lightning_compress.errors import CompressionError, invalid
from lightning_compress.modules.paths import device_of

TeacherDtype = Literal["float32", "bfloat16", "float16"]


TeacherState = TypedDict(
    "TeacherState", {"class": str, "checkpoint": str | None, "dtype": str | None, "fingerprint": str | None}
)
"""What a checkpoint says of a teacher."""


class Teacher:
    """A plain box around the teacher, so that no module tree, checkpoint, optimizer or averaged copy sees it.

    A deep copy of what holds the box holds the same box; a pickle holds the teacher. The teacher is moved when it is
    placed or called, and :meth:`restore_tensors` gives it back the very tensors that it came with.

    Args:
        given: Any module, frozen when it is placed; None: to be set later. See `DistillationModule` for the others.
        taps: The teacher's layers that losses look at.

    Example:
        >>> teacher = Teacher(nn.Linear(2, 2), Taps([]))
        >>> teacher(torch.ones(1, 2), like=nn.Linear(2, 2)).requires_grad
        False
    """

    def __init__(
        self,
        given: nn.Module | None,
        taps: Taps,
        checkpoint: str | None = None,
        adapter: nn.Module | None = None,
        dtype: TeacherDtype | None = None,
        compile: bool = False,
    ) -> None:
        if dtype not in (None, "float32", "bfloat16", "float16"):
            raise invalid("teacher_dtype", "be float32, bfloat16, float16 or None", dtype)
        if isinstance(given, Snapshot) and checkpoint is not None:
            raise invalid("teacher_checkpoint", f"be left out with {type(given).__name__}", checkpoint)
        check_is_module(given)
        check_is_module(adapter, "teacher_adapter", "Head")
        self.given = given
        self.taps = taps
        self.checkpoint = checkpoint
        self.adapter = adapter
        self.compile = compile
        self._dtype: torch.dtype | None = None if dtype is None else getattr(torch, dtype)
        self._loaded: str | None = None
        self._entry = ""
        self._leave()

    def _leave(self) -> None:
        self._callable: Callable[..., Any] | None = None
        self._children: list[nn.Module] = []
        self._placed: tuple[torch.device, torch.dtype] | None = None
        self._own_parameters: list[tuple[nn.Parameter, Tensor]] = []
        self._own_buffers: list[tuple[dict[str, Tensor | None], dict[str, Tensor | None]]] = []
        self._fingerprint: dict[str, str] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        return self

    @property
    def module(self) -> nn.Module | None:
        """The module that is called: the given one, or the copy that a `Snapshot` holds."""
        return self.given.model if isinstance(self.given, Snapshot) else self.given

    def __call__(self, inputs: Any, like: nn.Module) -> Any:
        """Call the teacher, on the device and in the dtype of the student that it is ``like``."""
        module = self.require()
        self.place(like)
        for child in self._children:
            child.training = False  # someone may have called `train()` on it
        if self._callable is None:
            entered = find_layer(module, self._entry) if self._entry else module
            self._callable = torch.compile(entered) if self.compile else entered
        # Not inference mode: its tensors can't be saved for the backward pass of the student's loss.
        with torch.no_grad():
            if self.adapter is not None:
                inputs = call(self.adapter, inputs)
            if self._dtype is not None:
                inputs = cast(inputs, self._dtype)
            return call(self._callable, inputs)

    def require(self) -> nn.Module:
        """Return the teacher's module.

        Raises:
            CompressionError: If there is none, or it can't be called.
        """
        if self.module is None:
            raise invalid("teacher", "be given before `fit`", None, "Pass `teacher=`, or set `module.teacher`.")
        if self.module is self.given and not has_forward(self.module):
            raise without_forward(self.module)
        return self.module

    def freeze_(self) -> None:
        """Put it into evaluation mode, without gradients, as it is whenever it is called."""
        for module in (self.given, self.adapter):
            if module is not None:
                module.requires_grad_(False).eval()

    def take_(self, student: nn.Module) -> None:
        """Let a `Snapshot` take its copy of the student."""
        if isinstance(self.given, Snapshot):
            self.given.take_(student)
            self.enter("")

    def enter(self, path: str) -> None:
        """Call the submodule at ``path`` from now on; empty is the module itself."""
        self._entry, self._callable = path, None

    @property
    def ema(self) -> EMATeacher | None:
        """The teacher, if it is an average of the student's weights."""
        return self.given if isinstance(self.given, EMATeacher) else None

    def load_once(self) -> None:
        """Load its weights by the rule of :func:`load_weights_`, unless that has been done."""
        if self.checkpoint is not None and self._loaded != self.checkpoint:
            load_weights_(self.require(), self.checkpoint)
            self._loaded = self.checkpoint

    def place(self, like: nn.Module) -> None:
        """Move the teacher to the device and floating dtype of ``like``; its own dtype, if it has one, wins."""
        device, dtype = device_and_dtype(like)
        target = (device, self._dtype or dtype)
        if self._placed == target:
            return
        self.freeze_()
        modules = [module for module in (self.require(), self.adapter) if module is not None]
        self._children = [child for module in modules for child in module.modules()]
        if self._placed is None and not isinstance(self.given, Snapshot):
            self._own_parameters = [(p, p.data) for module in modules for p in module.parameters()]
            self._own_buffers = [(child._buffers, dict(child._buffers)) for child in self._children]
        with torch.inference_mode(False), torch.no_grad():
            self.require().to(*target)
            if self.adapter is not None:
                self.adapter.to(device, dtype)  # the student's: normalisation constants keep their precision
        self._placed = target

    def restore_tensors(self) -> None:
        """Give the teacher its own tensors back, with their device, dtype and every bit."""
        for parameter, data in self._own_parameters:
            parameter.data = data
        for buffers, own in self._own_buffers:
            buffers.update(own)
        if self._placed is not None and isinstance(self.given, Snapshot):
            self.given.to("cpu")
        if self.compile and self._callable is not None:
            torch.compiler.reset()  # compiled code has the taps of its first call built in
        self._leave()

    def take_fingerprint(self) -> None:
        """Remember a hash of each of the teacher's tensors, for :meth:`changed`."""
        self._fingerprint = fingerprint(self.require())

    def changed(self) -> list[str]:
        """Name the parameters and buffers that changed since :meth:`take_fingerprint`; none of an `EMATeacher`."""
        if self._fingerprint is None or self.module is None or self.ema is not None:
            return []
        now = fingerprint(self.module)
        return [name for name in sorted({*now, *self._fingerprint}) if now.get(name) != self._fingerprint.get(name)]

    def reference(self) -> TeacherState:
        """What a checkpoint says of the teacher: its class, its file, its dtype, and one hash of the fingerprint."""
        kind = type(self.given)
        hashes = sorted((self._fingerprint or {}).items())
        return {
            "class": f"{kind.__module__}.{kind.__qualname__}",
            "checkpoint": self.checkpoint,
            "dtype": str(self._placed[1]) if self._placed else None,
            "fingerprint": hashlib.blake2b(repr(hashes).encode(), digest_size=16).hexdigest() if hashes else None,
        }

    def __getstate__(self) -> dict[str, Any]:
        left = Teacher.__new__(Teacher)
        left._leave()
        return {**vars(self), **vars(left)}


def has_forward(module: nn.Module) -> bool:
    """Whether a module has a ``forward``, which a LightningModule may do without.

    Example:
        >>> has_forward(nn.Linear(1, 1)), has_forward(nn.ModuleList())
        (True, False)
    """
    function: Any = module.forward
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    home = getattr(function, "__module__", None) or ""
    return not (
        home.startswith(("lightning.pytorch.core.", "pytorch_lightning.core."))
        or getattr(function, "__name__", "") == "_forward_unimplemented"
    )


def without_forward(module: nn.Module) -> CompressionError:
    """Make the error for a teacher that can't be called, which names the children that can."""
    callable_children = [
        f"`{name}` ({type(child).__name__})"
        for name, child in module.named_children()
        if has_forward(child) and any(True for _ in child.parameters())
    ]
    remedy = "Give it a `forward` that does all of it."
    if callable_children:
        children = ", ".join(callable_children)
        remedy = f"Pass the one of its children that computes the outputs: {children}; or g{remedy[1:]}"
    return invalid("teacher", "have a `forward`", type(module).__name__, remedy)


def fingerprint(module: nn.Module) -> dict[str, str]:
    """Hash every parameter and buffer by name; two hashes are equal only if all bits are.

    Example:
        >>> sorted(fingerprint(nn.Linear(1, 1)))
        ['bias', 'weight']
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: _digest(tensor) for name, tensor in tensors.items()}


def device_and_dtype(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Those of the first floating parameter; float32 where there is none."""
    floating = next((parameter for parameter in module.parameters() if parameter.is_floating_point()), None)
    return (device_of(module), torch.float32) if floating is None else (floating.device, floating.dtype)


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    header = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return hashlib.blake2b(header + data.tobytes(), digest_size=16).hexdigest()


def check_is_module(value: Any, name: str = "teacher", example: str = "Large") -> None:
    """Raise for a teacher, or the like, that is no module, such as a class or its name."""
    if value is not None and not isinstance(value, nn.Module):
        kind = value.__name__ if isinstance(value, type) else example
        raise invalid(name, "be a module", value, f"Make one: {name}={kind}(...).")


def refuse_shared(teacher: nn.Module, student: nn.Module) -> None:
    """Raise for a teacher that shares parameters with the student: freezing the teacher would freeze these too.

    Example:
        >>> refuse_shared(nn.Linear(1, 1), nn.Linear(1, 1))
    """
    own = {id(parameter) for parameter in student.parameters()}
    names = [name for name, parameter in teacher.named_parameters() if id(parameter) in own]
    if names:
        remedy = "Pass a copy: copy.deepcopy(model)."
        raise invalid("teacher", "share no parameter with the student", names[0], remedy)
