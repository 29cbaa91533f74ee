"""What is a module called, and which one has a path? Paths are dotted, as users write them in `Targets`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError


def clean_name(name: str) -> str:
    """Return a dotted name without the ``_orig_mod`` parts that `torch.compile` inserts.

    Example:
        >>> clean_name("net._orig_mod.conv.weight")
        'net.conv.weight'
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def compressible_modules(model: nn.Module, every_name: bool = False) -> dict[str, nn.Module]:
    """Return the modules of ``model`` by clean path, without those that only help in training (``training_only``).

    The root's path is empty. A module with several names stands under the first, or under ``every_name``.
    """
    modules: dict[str, nn.Module] = {}
    helpers: list[str] = []
    for name, module in model.named_modules(remove_duplicate=not every_name):
        if getattr(module, "training_only", False):
            helpers.append(f"{name}.")
        if not f"{name}.".startswith(tuple(helpers)):
            modules[clean_name(name)] = module
    return modules


def is_below(inner: str, path: str) -> bool:
    """Whether ``inner`` is a strict descendant of ``path``; the root is ``""``.

    Example:
        >>> is_below("net.conv", "net"), is_below("net2", "net"), is_below("net", "")
        (True, False, True)
    """
    return inner != path and (path == "" or inner.startswith(path + "."))


def is_at_or_below(inner: str, path: str) -> bool:
    """Whether ``inner`` is ``path`` or a descendant of it."""
    return inner == path or is_below(inner, path)


def module_at(model: nn.Module, path: str) -> nn.Module:
    """Return the module at a clean path.

    Raises:
        CompressionError: there is none.
    """
    # A compiled module and the one inside it have the same path; that one counts.
    modules = modules_of(model)
    if path in modules:
        return modules[path]
    raise CompressionError(f"The model must have a module at {path!r}. Received: no such module.")


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter or buffer, the CPU if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by clean name, each under its first name."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found.setdefault(id(tensor), (clean_name(name), tensor))
    return dict(found.values())


def modules_of(model: nn.Module, every_name: bool = False) -> dict[str, nn.Module]:
    """The modules of a model by clean path; one with several names under the first, or under ``every_name``."""
    return {clean_name(path): module for path, module in model.named_modules(remove_duplicate=not every_name)}
