"""Makes modules plain that a checkpoint holds beside its weights: hyperparameters, or what a user's hook puts there.

They are the very objects that are fake-quantized, tapped or converted. A file gets copies of them that are float and
of the user's classes alone, around the same tensors.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.errors import CompressionError
from lightning_compress.modules.routing import form_before, form_of, has_forgotten, parameters_aside
from lightning_compress.structure.change import changes

_TENSORS_ALONE = ("state_dict", "current_model_state", "optimizer_states")
_ATTRIBUTES = ("_form", "_aside", "_fast_path", "_quantization", "_restored_callback_states")
_WRAPPED = ("forward", "training_step", "setup", "on_save_checkpoint", "on_load_checkpoint")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_HOOK_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


class _Called:
    """Becomes what a call returns when it is loaded."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def _zeros(parameters: Iterable[nn.Parameter]) -> dict[int, _Called]:
    """Return zeros by the `id` of parameters, as a file doesn't hold weights of few bits in float as well."""
    return {
        id(parameter): _Called(
            nn.Parameter, _Called(partial(torch.zeros, dtype=parameter.dtype), parameter.shape), parameter.requires_grad
        )
        for parameter in parameters
    }


def plain_modules_(checkpoint: dict[str, Any], module: Any) -> None:
    """Replace what a checkpoint holds of the modules that we work on by plain float copies.

    Parameters are those of ``module``, so that nothing is written twice. Where the file's weights are in few bits, the
    copy has zeros in their place: it is there to be built and loaded into.

    Raises:
        CompressionError: a module's float form is gone, and Lightning has kept no copy of it.
    """
    modules = list(module.modules())
    tops = [inner for inner in modules if inner is not module and any(_ours(inner))]
    marked = list(dict.fromkeys(inner for top in tops for inner in top.modules()))
    memo = _memo(module, modules, [module, *marked])
    keys = [key for key in checkpoint.keys() - set(_TENSORS_ALONE) if _reaches(checkpoint[key], [module, *marked])]
    if keys:
        values = {key: _with_known_modules(key, checkpoint[key], module, memo) for key in keys}
        checkpoint.update(_copied(values, [module, *marked], memo))
    for copied in [memo[id(inner)] for inner in (module, *marked) if id(inner) in memo]:
        for change in reversed(changes()):
            change.strip_(copied)
        for name in set(_ours(copied)) - set(_HOOKS):
            del vars(copied)[name]
        drop_hooks_(copied)


def _with_known_modules(key: str, value: Any, module: Any, memo: dict[int, Any]) -> Any:
    """Return the value; where a module has no float form any more, Lightning's own copy of the constructor's argument.

    That copy has the weights of then, not those of now.
    """
    forgotten = [inner for inner in module.modules() if has_forgotten(inner)]
    if not _reaches(value, forgotten):
        return value
    initial = getattr(module, "_hparams_initial", {}) if key == "hyper_parameters" else {}
    values = dict(value) if isinstance(value, dict) else {key: value}
    for name in [name for name, part in values.items() if _reaches(part, forgotten)]:
        if name not in initial or _reaches(initial[name], forgotten):
            raise CompressionError(
                f"`checkpoint[{key!r}]` must hold no module whose float form is gone. Received: one in {name!r}. Keep "
                f"it out of the file: self.save_hyperparameters(ignore=[{name!r}])."
            )
        values[name] = initial[name]
        walk = _Walk(())
        walk.dump(initial[name])
        memo |= _zeros(found for found in walk.held.values() if isinstance(found, nn.Parameter))
    return values


def _ours(module: nn.Module) -> Iterator[str]:
    """Yield the names of the attributes that we put on a module, and of its hooks if one of ours is among them."""
    for name, value in vars(module).items():
        if (
            name in _ATTRIBUTES
            or (name in _WRAPPED and isinstance(value, partial) and _is_ours(value))
            or (name in _HOOKS and any(map(_is_ours, value.values())))
        ):
            yield name


def _is_ours(hook: Any) -> bool:
    """Tell whether a hook is code of this package: a function, a method, a partial, or an object that is called."""
    while isinstance(hook, partial):
        hook = hook.func
    hook = getattr(hook, "__self__", hook)
    place = str(getattr(hook, "__module__", type(hook).__module__))
    return place.partition(".")[0] == __name__.partition(".")[0]


def _memo(module: nn.Module, modules: list[nn.Module], marked: list[nn.Module]) -> dict[int, Any]:
    """Return the memo of a deep copy, which shares the tensors, and what is stripped anyway."""
    memo: dict[int, Any] = {}
    for inner in modules:
        tensors = [leaf for leaf in pytree.tree_leaves(vars(inner)) if isinstance(leaf, Tensor)]
        memo |= {id(tensor): tensor.detach() if tensor.grad_fn is not None else tensor for tensor in tensors}
    live = {id(parameter) for parameter in module.parameters()}
    aside = [found for inner in modules for found in parameters_aside(inner)]
    memo |= _zeros(parameter for parameter in aside if id(parameter) not in live)
    for inner in marked:
        parts: list[Any] = [form_of(inner), form_before(inner)]
        parts += [hook for name in _HOOKS for hook in getattr(inner, name).values() if _is_ours(hook)]
        memo |= {id(part): part for part in parts if part is not None}
    return memo


def drop_hooks_(module: nn.Module) -> None:
    """Take the forward hooks of this package off a module itself, and what it wraps of Lightning's."""
    for name in ("training_step", "setup"):
        if name in _ours(module):
            del module.__dict__[name]
    for name in _HOOKS:
        for key in [key for key, hook in getattr(module, name).items() if _is_ours(hook)]:
            for place in (name, *_HOOK_FLAGS):
                module.__dict__[place].pop(key, None)


class _Walk(pickle.Pickler):
    """Walks through what a file would hold, and keeps the tensors and those of ``modules`` that it meets."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.buffer = io.BytesIO()
        super().__init__(self.buffer)
        self.held: dict[int, Any] = {}
        self.keys = {id(module) for module in modules}

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor) and id(obj) not in self.keys:
            return None
        self.held[id(obj)] = obj
        return id(obj)


def _reaches(value: Any, modules: Iterable[nn.Module]) -> bool:
    walk = _Walk(modules)
    with contextlib.suppress(Exception):  # what can't be pickled is Lightning's to say
        walk.dump(value)
    return not walk.keys.isdisjoint(walk.held)


def _copied(value: Any, modules: Iterable[nn.Module], memo: dict[int, Any]) -> Any:
    """Copy a value as a file would, with deep copies of ``modules``: containers may define another copy."""
    walk = _Walk(modules)
    walk.dump(value)

    def load(key: int) -> Any:
        found = walk.held[key]
        return memo.get(key, found) if isinstance(found, Tensor) else copy.deepcopy(found, memo)

    reader = pickle.Unpickler(io.BytesIO(walk.buffer.getvalue()))
    reader.persistent_load = load  # type: ignore[method-assign]
    return reader.load()
