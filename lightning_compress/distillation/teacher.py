"""The teacher: frozen, in evaluation mode, without gradients, and outside the module tree."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.distillation.features import Taps
from lightning_compress.errors import CompressionError, invalid


class Teacher:
    """A plain box around the teacher, so that no module tree, checkpoint, optimizer or averaged copy sees it.

    A deep copy of what holds the box holds the same box; a pickle holds the teacher. The teacher is moved when it is
    placed or asked, and :meth:`return_home` gives it the very tensors back that it came with.

    Args:
        module: Any module, frozen here; a LightningModule serves as a plain module. None: to be set later.
        taps: The teacher's layers that losses look at.

    Example:
        >>> teacher = Teacher(nn.Linear(2, 2), Taps([]))
        >>> teacher(torch.ones(1, 2), like=nn.Linear(2, 2)).requires_grad
        False
    """

    def __init__(self, module: nn.Module | None, taps: Taps) -> None:
        self.taps = taps
        self.module = module
        self._loaded: str | None = None
        self._placed: tuple[torch.device, torch.dtype] | None = None
        self._home_parameters: list[tuple[nn.Parameter, Tensor]] = []
        self._home_buffers: list[tuple[nn.Module, str, Tensor]] = []
        self._sealed: dict[str, str] | None = None
        if module is not None:
            module.requires_grad_(False).eval()

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        return self

    def __call__(self, inputs: Any, like: nn.Module) -> Any:
        """Ask the teacher: the one place where that happens.

        Args:
            inputs: A tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
            like: The student, whose device and dtype the teacher follows.

        Returns:
            What the teacher's forward returns, without a graph.
        """
        module = self.require()
        self.place(like)
        if any(child.training for child in module.modules()):  # someone called `train()` on it
            module.eval()
        # Not inference mode: its tensors can't be saved for the backward pass of the student's loss.
        with torch.no_grad():
            return call(module, inputs)

    def require(self) -> nn.Module:
        """The teacher's module.

        Raises:
            CompressionError: If there is none.
        """
        if self.module is None:
            raise invalid("teacher", "be given before `fit`", None, "Pass `teacher=`, or set `module.teacher`.")
        return self.module

    def load_once(self, path: str) -> None:
        """Load weights from ``path`` by the rule of :func:`load_weights_`, unless that has been done."""
        if self._loaded != path:
            load_weights_(self.require(), path)
            self._loaded = path

    def place(self, like: nn.Module) -> None:
        """Move the teacher to the device and floating dtype of ``like``."""
        target = _whereabouts(like)
        if self._placed == target:
            return
        module = self.require()
        if self._placed is None:
            self._home_parameters = [(parameter, parameter.data) for parameter in module.parameters()]
            self._home_buffers = [
                (child, name, buffer)
                for child in module.modules()
                for name, buffer in child._buffers.items()
                if buffer is not None
            ]
        with torch.inference_mode(False), torch.no_grad():
            module.to(*target)
        self._placed = target

    def return_home(self) -> None:
        """Give the teacher its own tensors back: device, dtype and every bit."""
        for parameter, data in self._home_parameters:
            parameter.data = data
        for module, name, buffer in self._home_buffers:
            module._buffers[name] = buffer
        self._home_parameters, self._home_buffers, self._placed, self._sealed = [], [], None, None

    def seal(self) -> None:
        """Remember what the teacher is now, for :meth:`check_seal`."""
        self._sealed = fingerprint(self.require())

    def moved(self) -> list[str]:
        """The names of parameters and buffers that changed since :meth:`seal`."""
        if self._sealed is None or self.module is None:
            return []
        now = fingerprint(self.module)
        return [name for name in sorted({*now, *self._sealed}) if now.get(name) != self._sealed.get(name)]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_placed": None, "_home_parameters": [], "_home_buffers": [], "_sealed": None}


def call(model: nn.Module, inputs: Any) -> Any:
    """Call ``model``: a tuple or list gives positional, a dict keyword arguments, anything else is the only argument.

    Example:
        >>> call(nn.Bilinear(2, 3, 4), (torch.ones(1, 2), torch.ones(1, 3))).shape
        torch.Size([1, 4])
    """
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def fingerprint(module: nn.Module) -> dict[str, str]:
    """A hash of every parameter and buffer by name; equal only if all bits are.

    Example:
        >>> sorted(fingerprint(nn.Linear(1, 1)))
        ['bias', 'weight']
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: _digest(tensor) for name, tensor in tensors.items()}


def load_weights_(module: nn.Module, path: str) -> None:
    """Load the weights of ``module`` from a Lightning checkpoint or a plain state dict.

    The rule: the file's weights are its ``state_dict`` entry, or else the file itself; ``_orig_mod.`` is left out of
    all names. Then there must be one prefix (``""``, ``model.``, ``student.``, ...) under which *every* key of the
    module stands with its shape; the empty prefix wins. Other keys in the file are ignored.

    Args:
        module: The model whose weights are replaced.
        path: A file that ``torch.load(weights_only=True)`` reads.

    Raises:
        CompressionError: If the file can't be read, no prefix fits, several do, or a shape differs. Nothing is
            changed then.

    Example:
        >>> import tempfile
        >>> source, target = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({f"model.{key}": value for key, value in source.state_dict().items()}, f"{folder}/t.pt")
        ...     load_weights_(target, f"{folder}/t.pt")
        >>> torch.equal(source.weight, target.weight)
        True
    """
    stored = _read(path)
    wanted = {_uncompiled(key): key for key in module.state_dict()}
    prefix = _find_prefix(stored, list(wanted), path)
    own = module.state_dict()
    chosen = {key: stored[prefix + name] for name, key in wanted.items()}
    for key, value in chosen.items():
        if isinstance(value, Tensor) and isinstance(own[key], Tensor) and value.shape != own[key].shape:
            raise invalid(
                "teacher_checkpoint",
                f"hold `{prefix}{_uncompiled(key)}` in the teacher's shape {tuple(own[key].shape)}",
                path,
                f"The file has shape {tuple(value.shape)}: is it of another teacher?",
            )
    module.load_state_dict(chosen)


def _read(path: str) -> dict[str, Any]:
    remedy = "Save the teacher's weights alone: torch.save(teacher.state_dict(), path)."
    try:
        content = torch.load(os.fspath(path), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise invalid("teacher_checkpoint", "be an existing file", path) from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        must = "be readable by `torch.load(weights_only=True)`"
        raise invalid("teacher_checkpoint", must, path, f"{reason} {remedy}") from error
    weights = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(weights, Mapping) or not all(isinstance(key, str) for key in weights):
        raise invalid("teacher_checkpoint", "hold a state dict", path, remedy)
    return {_uncompiled(key): value for key, value in weights.items()}


def _find_prefix(stored: Mapping[str, Any], wanted: list[str], path: str) -> str:
    if not wanted:
        raise invalid("teacher", "have weights to load", path, "Leave `teacher_checkpoint` out.")
    found = {
        prefix: sum(prefix + name in stored for name in wanted) for prefix in dict.fromkeys(_prefixes(stored, wanted))
    }
    fitting = [prefix for prefix, count in found.items() if count == len(wanted)]
    if "" in fitting:
        return ""
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        remedy = f"All of these fit: {', '.join(sorted(fitting))}. Save the one that you mean in a file of its own."
        raise invalid("teacher_checkpoint", "hold the teacher's weights once", path, remedy)
    best = max(found, key=lambda prefix: found[prefix], default="")
    missing = [best + name for name in wanted if best + name not in stored]
    shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
    raise invalid("teacher_checkpoint", "hold every weight of the teacher", path, f"Missing: {shown}.")


def _prefixes(stored: Mapping[str, Any], wanted: Collection[str]) -> Iterator[str]:
    names = set(wanted)
    for key in stored:
        parts = key.split(".")
        for cut in range(len(parts)):
            if ".".join(parts[cut:]) in names:
                yield "".join(f"{part}." for part in parts[:cut])


def _uncompiled(key: str) -> str:
    return key.replace("_orig_mod.", "")


def _whereabouts(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    device, dtype = torch.device("cpu"), torch.float32
    for parameter in module.parameters():
        device = parameter.device
        if parameter.is_floating_point():
            return device, parameter.dtype
    return device, dtype


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    header = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return hashlib.blake2b(header + data.tobytes(), digest_size=16).hexdigest()


def shared_with(teacher: nn.Module, student: nn.Module) -> CompressionError | None:
    """The error for a teacher that shares parameters with the student, which freezing it would freeze too.

    Example:
        >>> model = nn.Linear(1, 1)
        >>> print(type(shared_with(model, model)).__name__, shared_with(nn.Linear(1, 1), model))
        CompressionError None
    """
    own = {id(parameter) for parameter in student.parameters()}
    names = [name for name, parameter in teacher.named_parameters() if id(parameter) in own]
    if not names:
        return None
    return invalid("teacher", "share no parameter with the student", names[0], "Pass a copy: copy.deepcopy(model).")
