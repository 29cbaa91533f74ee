"""Which modules train in training mode? Those that aren't frozen on purpose, whatever mode they are given in.

Lightning trains a module in the mode in which it is given, and pretrained networks are loaded in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_compress.modules.paths import clean_name

_GIVEN = "_given_in_eval"


@dataclass
class _Given:
    """What a model was like when a fit began."""

    switched: list[nn.Module] = field(default_factory=list)
    frozen: dict[str, nn.Module] = field(default_factory=dict)


def train_given_(model: nn.Module, trained: Collection[int]) -> list[str]:
    """Put into training mode what stands in evaluation mode and isn't frozen on purpose, when a fit begins.

    Frozen on purpose is a module none of whose parameters are trained; nothing but norms, dropouts and the like in a
    parent that trains; and what the model's own ``train`` keeps in evaluation mode. All other modules keep their modes.
    ``trained`` are ids of parameters. Returned are the paths of the largest modules that were switched, which
    `restore_given_` puts back.

    Example:
        >>> net = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Dropout()).eval(), nn.Dropout().eval())
        >>> train_given_(net, {id(parameter) for parameter in net.parameters()})
        ['0']
        >>> net[0][1].training, net[1].training
        (True, False)
    """
    given = model.__dict__.setdefault(_GIVEN, _Given())
    return _switch_(model, _given_in_eval("", model, trained, given.frozen), trained, given)


def wake_(model: nn.Module, trained: Collection[int]) -> list[str]:
    """Put into training mode what was frozen when the fit began, and is trained by now; returns its paths."""
    given: _Given = model.__dict__.get(_GIVEN, _Given())
    woken = [path for path, module in given.frozen.items() if _trains(module, trained)]
    modules = {path: given.frozen.pop(path) for path in woken}
    return _switch_(model, {path: module for path, module in modules.items() if not module.training}, trained, given)


def restore_given_(model: nn.Module) -> None:
    """Put what was switched back into evaluation mode, as plain Lightning would have left it."""
    for module in model.__dict__.pop(_GIVEN, _Given()).switched:
        module.training = False


def has_frozen(model: nn.Module) -> bool:
    """Whether something was left in evaluation mode that may be trained later."""
    return bool(model.__dict__.get(_GIVEN, _Given()).frozen)


def _given_in_eval(
    path: str, module: nn.Module, trained: Collection[int], frozen: dict[str, nn.Module]
) -> dict[str, nn.Module]:
    """Return the largest modules in evaluation mode that are to train; note in ``frozen`` those that may be later."""
    if module.training:
        found = dict[str, nn.Module]()
        for name, child in module.named_children():
            found |= _given_in_eval(f"{path}.{name}".lstrip("."), child, trained, frozen)
        return found
    parameters = list(module.parameters())
    if parameters and not _trains(module, trained):
        frozen[path] = module
        return {}
    # A norm, a dropout, or a block of such: someone has reached into a module that trains.
    return {path: module} if any(is_lazy(parameter) or parameter.dim() > 1 for parameter in parameters) else {}


def _switch_(model: nn.Module, roots: dict[str, nn.Module], trained: Collection[int], given: _Given) -> list[str]:
    moving = {inner for path, module in roots.items() for inner in _unfrozen(path, module, trained, given.frozen)}
    if not moving:
        return []
    modes = {module: module.training for module in model.modules()}
    model.train()  # from the top: a `train` that the user wrote has a say
    for module, mode in modes.items():
        if module not in moving:
            module.training = mode
    given.switched += [module for module in moving if module.training and not modes[module]]
    return [clean_name(path) for path, module in roots.items() if module.training]


def _unfrozen(path: str, module: nn.Module, trained: Collection[int], frozen: dict[str, nn.Module]) -> list[nn.Module]:
    """List the module and those below it, but for parts none of whose parameters are trained."""
    found = [module]
    for name, child in module.named_children():
        inner = f"{path}.{name}".lstrip(".")
        if any(True for _ in child.parameters()) and not _trains(child, trained):
            frozen[inner] = child
        else:
            found += _unfrozen(inner, child, trained, frozen)
    return found


def _trains(module: nn.Module, trained: Collection[int]) -> bool:
    return any(id(parameter) in trained for parameter in module.parameters())
