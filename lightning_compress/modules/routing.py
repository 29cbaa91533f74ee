"""How does a module compute in another form and stay the object that it is? Its forward is routed into a child.

The module object, its children, names and attributes stay; only its ``forward`` is routed into a child that holds the
other form. So the keys and the order of the user's parameters never change, and going back is removing one child.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.modules.paths import device_of

CHILD = "_traced_forward"
"""The name of the child that holds the other form; no key of a checkpoint has it but in a converted one."""

_ASIDE = "_aside"


class RoutedForm(nn.Module):
    """A form that decides itself how it takes the arguments of the module whose forward it computes."""

    def serve(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a call of ``module`` gives."""
        raise NotImplementedError


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _routed(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of a module whose other form stands in ``CHILD``."""
    form: Any = module._modules[CHILD]
    return form.serve(module, args, kwargs) if isinstance(form, RoutedForm) else form(*args, **kwargs)


def route_(module: nn.Module, child: nn.Module) -> None:
    """Let ``child`` compute the forward of ``module``; `unroute_` takes it back."""
    module.add_module(CHILD, child)
    module.__dict__["forward"] = partial(_routed, module)
    child.train(module.training)


def unroute_(module: nn.Module) -> None:
    """Take the other form away again; the module computes as it was written."""
    restore_aside_(module)
    module.__dict__.pop("forward", None)


def set_aside_(module: nn.Module, used: frozenset[str], prepared: nn.Module | None) -> None:
    """Take what the other form replaces (``used``) out of the module's tree, which then is no larger than that form.

    It is kept aside, with the form that was ``prepared``, for `restore_aside_`.
    """
    aside: dict[str, Any] = {"prepared": prepared, "used": used}
    if isinstance(module, nn.RNNBase):
        aside["flat"], module._flat_weights = module._flat_weights, []  # a second hold on its parameters
    for kind in ("_parameters", "_buffers", "_modules"):
        values: dict[str, Any] = getattr(module, kind)
        aside[kind] = {name: value for name, value in values.items() if name != CHILD}
        for name in used & values.keys():
            if kind == "_modules":
                del values[name]
                continue
            form = module.get_submodule(CHILD)
            if (weight := values[name]) is not None and kind == "_parameters" and not hasattr(form, "float_value"):
                like = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
                vars(module)[name] = GoneWeight(name, type(module).__name__, like, form)
            values[name] = None  # as a layer without bias has it
    module.__dict__[_ASIDE] = aside


def restore_aside_(module: nn.Module) -> nn.Module | None:
    """Put back what `set_aside_` took, without the other form; return the form that was prepared before."""
    if _ASIDE not in vars(module):
        return module._modules.pop(CHILD, None)
    aside = module.__dict__[_ASIDE]
    if aside is None:
        raise CompressionError(
            f"The model must be float to train. Received: int8, and the float weights of its {type(module).__name__} "
            "are gone. Start from a checkpoint that was saved during training."
        )
    del module.__dict__[_ASIDE]
    module._modules.pop(CHILD, None)
    for name in [name for name, value in vars(module).items() if isinstance(value, GoneWeight)]:
        del vars(module)[name]
    for kind in ("_parameters", "_buffers", "_modules"):
        values = getattr(module, kind)
        # In their old order; what came or changed since (a metric, say) stays as it is.
        since = {name: value for name, value in values.items() if name not in aside["used"]}
        merged = {**aside[kind], **since}
        values.clear()
        values.update(merged)
    if isinstance(module, nn.RNNBase):
        module._flat_weights = aside["flat"]
    prepared: nn.Module | None = aside["prepared"]
    return prepared


def all_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of the tree, and those that were set aside."""
    for inner in module.modules():
        yield inner
        for child in children_aside(inner).values():
            yield from all_modules(child)


def children_aside(module: nn.Module) -> dict[str, nn.Module]:
    """Return the children of a module that were set aside, by name."""
    held: dict[str, nn.Module | None] = (set_aside_of(module) or {}).get("_modules", {})
    return {name: child for name, child in held.items() if child is not None and name not in module._modules}


def set_aside_of(module: nn.Module) -> dict[str, Any] | None:
    """Return what `set_aside_` kept of a module, if it hasn't been forgotten."""
    aside: dict[str, Any] | None = vars(module).get(_ASIDE)
    return aside


def is_set_aside(module: nn.Module) -> bool:
    """Whether what a routed form replaces was taken out of a module, kept or not."""
    return _ASIDE in vars(module)


def has_forgotten(module: nn.Module) -> bool:
    """Whether a module was set aside, and isn't kept any more."""
    return vars(module).get(_ASIDE, module) is None


def parameters_aside(module: nn.Module) -> list[nn.Parameter]:
    """List the parameters that were set aside, of the module and of its children aside."""
    aside = set_aside_of(module) or {}
    held = [*aside.get("_parameters", {}).values()]
    held += [found for child in children_aside(module).values() for found in child.parameters()]
    return [parameter for parameter in held if parameter is not None]


def drop_aside_(module: nn.Module) -> bool:
    """Return whether a module knows what it was; if it has forgotten, make it ready to be given its tensors anew."""
    if module.__dict__[_ASIDE] is None:
        del module.__dict__[_ASIDE]
        return False
    return True


def forget_aside_(module: nn.Module) -> None:
    """Drop what `set_aside_` kept."""
    if _ASIDE in vars(module):
        module.__dict__[_ASIDE] = None


_WHAT_IT_IS = {
    *(Tensor.dtype.__get__, Tensor.device.__get__, Tensor.shape.__get__, Tensor.ndim.__get__),  # type: ignore[attr-defined]
    *(Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_floating_point),
}


def needs_values(func: Callable[..., Any], args: tuple[Any, ...], kind: type) -> bool:
    """Whether a function computes with the values of a ``kind`` among its arguments, and doesn't just ask what it is.

    Example:
        >>> weight = torch.ones(2, 3)
        >>> needs_values(Tensor.size, (weight, 0), Tensor), needs_values(Tensor.sum, (weight,), Tensor)
        (False, True)
    """
    return func not in _WHAT_IT_IS and (func not in (Tensor.to, Tensor.type_as) or isinstance(args[0], kind))


@dataclass(frozen=True, eq=False)
class GoneWeight:
    """Stands for a weight: with its shape, type and device, to which forwards fit their inputs, but without values.

    Attributes:
        name: of the parameter.
        owner: class of its layer.
        like: has its shape and type.
        form: what computes now.
    """

    name: str
    owner: str
    like: Tensor
    form: nn.Module

    @property
    def device(self) -> torch.device:
        return device_of(self.form)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "name" not in vars(self):  # while it is copied
            raise AttributeError(name)
        if name in ("shape", "dtype", "ndim", "dim", "size", "numel", "is_floating_point"):
            return getattr(self.like, name)
        raise AttributeError(f"`{name}` can't be read: {self._why()}")

    def _why(self) -> str:
        return f"the float values of the `{self.name}` of this {self.owner} are gone, as it is quantized"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        arguments = (*args, *(kwargs or {}).values())
        gone = next((argument for argument in arguments if isinstance(argument, cls)), None)
        if gone is not None and not needs_values(func, args, cls):
            return args[0].to(gone.device, gone.dtype)
        why = "a float weight is gone, as its layer is quantized" if gone is None else gone._why()
        raise CompressionError(
            f"Code that computes with a layer's weight must find it. Received: {getattr(func, '__name__', func)}, and "
            f"{why}. Exclude that layer in `targets`."
        )
