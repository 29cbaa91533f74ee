"""How does a module compute in another form and stay the object that it is? Its class routes calls into that form.

The form lies outside of the module's tree: children, parameters, buffers and their names are the user's. The class is
one made of the module's own, under its name, so `isinstance` holds; going back is giving the module its own class.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator, Mapping
from functools import cache, wraps
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from lightning_compress.errors import CompressionError
from lightning_compress.modules.written import needs_plain_operators

_FORM = "_form"
_ASIDE = "_aside"
ROUTING = (_FORM, _ASIDE)
"""Attributes that a routed module has, and no other."""
_CHANGED = (
    "The weight of a quantized layer must be left as it is. Received: {} its float values, which "
    "aren't what it computes with. Change it before it is quantized, or exclude the layer from `targets`."
)


class StoredWeight(nn.Module):
    """Holds the values of a parameter in other numbers: codes, and what makes floats of them.

    In the module's tree the codes stand where the parameter stood, as a parameter that needs no gradient, and in its
    state dict too; there the other tensors stand beside them, as ``weight_scale`` beside ``weight``. They keep their
    types, whatever the module is cast to.

    Attributes:
        held: names of the tensors, ``codes`` first.
        shape: of the parameter.
    """

    codes: Tensor
    held: tuple[str, ...] = ("codes", "scale")

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.shape = like.shape
        self._like = torch.empty(0, dtype=like.dtype, device=like.device)

    def hold_(self, **tensors: Any) -> None:
        """Take these tensors for those of the same names."""
        for name, tensor in tensors.items():
            if name == "codes" and not torch.compiler.is_compiling() and tensor.is_inference():
                with torch.inference_mode(False):  # data of inference tensors can't be set
                    tensor = tensor.clone()
            vars(self)[name] = tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return what it holds, by name."""
        found = {name: vars(self)[name] for name in self.held}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def saved(self) -> dict[str, Tensor]:
        """Return what a state dict has of it."""
        return {name: tensor.detach() for name, tensor in self.tensors().items()}

    @property
    def kind(self) -> str:
        """What the codes are, for a report."""
        return str(self.codes.dtype).removeprefix("torch.")

    def values(self) -> Tensor:
        """Return the parameter's values in float32."""
        raise NotImplementedError

    def forward(self) -> Tensor:
        """Return the parameter's values, in its shape and type."""
        return self.values().to(self._like.dtype).view(self.shape)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._like = fn(self._like)
        for name, tensor in self.tensors().items():
            moved: Tensor = fn(tensor)
            moved = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
            if name == "codes" and moved.device.type == tensor.device.type != "meta":
                tensor.data = moved
            else:
                self.hold_(**{name: moved})
        return self

    def copy_(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the values of tensors of the same names."""
        for name, tensor in self.tensors().items():
            tensor.data = tensors[name].detach().to(tensor.device, copy=True)

    def keys(self, name: str) -> dict[str, str]:
        """Return keys in a state dict of the tensors, by their names; ``name`` is the parameter's."""
        return {held: name if held == "codes" else f"{name}_{held}" for held in self.tensors()}

    def load_(self, name: str, state: Mapping[str, Any], prefix: str, missing: list[str], errors: list[str]) -> None:
        """Take the tensors from a state dict; all of them or, if one is missing or unlike, none."""
        keys, found = {held: prefix + key for held, key in self.keys(name).items()}, dict[str, Tensor]()
        for held, tensor in self.tensors().items():
            value = state.get(keys[held])
            if value is None:
                missing.append(keys[held])
            elif value.shape != tensor.shape or value.dtype != tensor.dtype:
                own, other = (f"{tuple(values.shape)} of {values.dtype}" for values in (tensor, value))
                errors.append(f"size mismatch for {keys[held]}: {other} in the checkpoint, {own} in the model.")
            else:
                found[held] = value.detach().to(tensor.device, copy=True)
        if len(found) == len(keys):
            self.codes.data = found.pop("codes")
            self.hold_(**found)


class Form(nn.Module):
    """Computes what a module computes, or nearly so, in other numbers.

    Attributes:
        weights: parameters of the module that it takes the place of, by their names in the module.
        inner: forms of children of the module, by their names, that come and go with it.
        added: names of parameters that the module has besides while it computes in the form.
        is_trained: whether it trains: averages of a module's parameters would average codes, so an empty parameter
            stands in their place.
    """

    is_trained = False
    added: tuple[str, ...] = ()

    def __init__(self, weights: Mapping[str, StoredWeight] = types.MappingProxyType({})) -> None:
        super().__init__()
        self.weights = nn.ModuleDict(weights)
        self.inner: dict[str, Form] = {}

    def serve(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a call of ``module`` gives; the form is called with the module before the arguments."""
        return self(module, *args, **kwargs)

    def float_value(self, module: nn.Module, name: str) -> Tensor:
        """Return what code that reads the parameter called ``name`` gets."""
        value: Tensor = self.weights[name]()
        return value

    def in_tree(self, name: str) -> nn.Parameter:
        """Return what stands in the module's tree for the parameter called ``name``."""
        weight: Any = self.weights[name]
        if self.is_trained:  # `torch.export` takes no parameters from outside of the tree: the codes stay a tensor
            return nn.Parameter(weight._like.new_empty(0), requires_grad=False)
        if not isinstance(weight.codes, nn.Parameter):
            with torch.inference_mode(False):
                weight.hold_(codes=nn.Parameter(weight.codes, requires_grad=False))
        codes: nn.Parameter = weight.codes
        return codes

    def bind_(self, module: nn.Module) -> None:
        """Take the codes that stand in the module's tree now."""
        if self.is_trained:
            return
        weight: Any
        for name, weight in self.weights._modules.items():
            codes = module._parameters[name]
            if codes is not weight.codes:
                if codes is None or codes.dtype != weight.codes.dtype:
                    raise CompressionError(_CHANGED.format("others in the place of"))  # of `functional_call`
                weight.hold_(codes=codes)

    def extra_state(self) -> Any:
        """Return what it knows beside the weights, such as ranges of activations, as plain data; empty if nothing."""
        return {}

    def load_extra_(self, state: Any) -> None:
        """Take what `extra_state` gave."""


class _Routed:
    """The base of classes whose instances compute in a form. Only functions that torch or Python call stand here."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Nothing: a class of the user's that registers its subclasses needn't know of these."""

    def __getattr__(self: Any, name: str) -> Any:
        form = vars(self).get(_FORM)
        if form is None or name not in form.weights:
            return super().__getattr__(name)  # type: ignore[misc]
        form.bind_(self)
        value = form.float_value(self, name)
        if needs_plain_operators():  # and tensors of no class of ours
            return value
        view: Any = value.as_subclass(_ReadOnly)
        view._is_param = True  # as torch's `get_parameter` and code of users ask for one
        return view

    def __setattr__(self: Any, name: str, value: Any) -> None:
        form = vars(self).get(_FORM)  # a copy of a parametrized layer is given all its attributes at once
        if form is not None and name in form.weights:
            raise CompressionError(_CHANGED.format("others in the place of"))
        super().__setattr__(name, value)

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        form = vars(self)[_FORM]
        form.bind_(self)
        super()._apply(fn, recurse)  # type: ignore[misc]
        form._apply(fn)
        for name in form.weights:
            self._parameters[name] = form.in_tree(name)
        _drop_flat_(self)
        return self

    def _save_to_state_dict(self: Any, destination: Any, prefix: str, keep_vars: bool) -> None:
        form = vars(self)[_FORM]
        form.bind_(self)
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        for name, weight in form.weights.items():
            tensors, keys = weight.saved(), weight.keys(name)
            destination.update({prefix + keys[held]: tensor for held, tensor in tensors.items()})

    def _load_from_state_dict(
        self: Any,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        form = vars(self)[_FORM]
        form.bind_(self)
        own: set[str] = set()
        for name, weight in form.weights.items():
            weight.load_(name, state_dict, prefix, missing_keys, error_msgs)
            own |= {prefix + key for key in weight.keys(name).values()}
        missed = list(missing_keys)
        rest = {key: value for key, value in state_dict.items() if key not in own}
        super()._load_from_state_dict(  # type: ignore[misc]
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        missing_keys[:] = [*missed, *(key for key in missing_keys[len(missed) :] if key not in own)]

    def extra_repr(self: Any) -> str:
        stored = (f"{name}={weight.kind}" for name, weight in vars(self)[_FORM].weights.items())
        return ", ".join(filter(None, [super().extra_repr(), *stored]))  # type: ignore[misc]

    def _init_flat_weights(self: Any) -> None:
        if vars(self)[_FORM].weights:
            _drop_flat_(self)
        else:
            super()._init_flat_weights()  # type: ignore[misc]

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        vars(self)[_FORM].bind_(self)
        reduced: Any = super().__reduce_ex__(protocol)
        make, (_, *rest), *state = reduced
        return (_new, (make, class_of(self), *rest), *state)


@cache
def _routed_class(kind: Any) -> Any:
    """Return the class of routed instances of ``kind``."""

    @wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return vars(self)[_FORM].serve(self, args, kwargs)

    @wraps(kind.__init__)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        object.__setattr__(self, "__class__", kind)  # what code makes by `type(module)` isn't routed
        kind.__init__(self, *args, **kwargs)

    own = {"forward": forward, "__init__": init, "_routes": kind}
    own |= {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    if hasattr(kind, "__deepcopy__"):
        own["__deepcopy__"] = _deepcopy  # nowhere else: who delegates attributes to a child would be copied as that
    return types.new_class(kind.__name__, (_Routed, kind), {}, lambda namespace: namespace.update(own))


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    """Copy a routed instance of a class with a `__deepcopy__` of its own; that of graph modules knows no form."""
    vars(self)[_FORM].bind_(self)
    if not isinstance(self, torch.fx.GraphModule):
        return class_of(self).__deepcopy__(self, memo)  # type: ignore[attr-defined]
    twin: Any = object.__new__(type(self))  # its own `__new__` makes another class
    memo[id(self)] = twin
    vars(twin).update(copy.deepcopy(vars(self), memo))
    return twin


def _new(make: Callable[..., Any], kind: Any, *args: Any) -> Any:
    """Make a routed instance again when it is copied or unpickled."""
    return make(_routed_class(kind), *args)


def class_of(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module has without a form."""
    kind: type[nn.Module] = vars(type(module)).get("_routes", type(module))
    return kind


def form_of(module: nn.Module) -> Form | None:
    """Return the form that a module computes in; None if it computes as it was written."""
    return vars(module).get(_FORM)


def routed_modules(model: nn.Module) -> dict[nn.Module, Form]:
    """Return the modules of the tree that compute in a form, and these."""
    return {module: form for module in model.modules() if (form := form_of(module)) is not None}


def with_forms(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of the tree, and those of the forms that they compute in."""
    for module in model.modules():
        yield module
        if (form := form_of(module)) is not None:
            yield from form.modules()


def route_(module: nn.Module, form: Form, others: Mapping[str, nn.Parameter] = types.MappingProxyType({})) -> None:
    """Let ``form`` compute the forward of ``module``; what it takes the place of is kept for `unroute_`.

    Meanwhile the module has ``others`` for its parameters of these names.
    """
    before, parameters = form_of(module), module._parameters
    aside: dict[str, Any] = {
        "form": before,
        "parameters": {name: parameters[name] for name in (*form.weights, *others)},
    }
    vars(module)[_FORM] = form
    if before is None:
        kind: Any = type(module)
        module.__class__ = _routed_class(kind)
    if aside["parameters"] or before is not None:
        vars(module)[_ASIDE] = aside
    parameters.update(others)
    for name in form.weights:
        parameters[name] = form.in_tree(name)
    _drop_flat_(module)
    for name, inner in form.inner.items():
        route_(module.get_submodule(name), inner)


def unroute_(module: nn.Module) -> Form | None:
    """Let a module compute as it was written, with the parameters that it had; return the form that it had before.

    Raises:
        CompressionError: these parameters are gone.
    """
    if has_forgotten(module):
        raise CompressionError(
            f"The model must be float to train. Received: int8, and the float weights of its {type(module).__name__} "
            "are gone. Start from a checkpoint that was saved during training."
        )
    aside, form = vars(module).pop(_ASIDE, {"form": None, "parameters": {}}), _take_form_(module)
    module._parameters.update(aside["parameters"])
    if isinstance(module, nn.RNNBase) and aside["parameters"]:
        module._init_flat_weights()
    for name in form.inner:
        unroute_(module.get_submodule(name))
    before: Form | None = aside["form"]
    return before


def _take_form_(module: nn.Module) -> Form:
    module.__class__ = class_of(module)
    form: Form = vars(module).pop(_FORM)
    for name in form.added:
        module._parameters.pop(name, None)
    return form


def settle_(module: nn.Module) -> None:
    """Let a module compute as it was written, with the float values of what its form holds."""
    form: Any = form_of(module)
    form.bind_(module)
    values = {name: nn.Parameter(form.float_value(module, name).detach(), requires_grad=False) for name in form.weights}
    vars(module).pop(_ASIDE, None)
    _take_form_(module)
    module._parameters.update(values)
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


def strip_(module: nn.Module) -> None:
    """Give a module of a copy, whose values don't matter, its own class and the parameters that it had."""
    aside = vars(module).pop(_ASIDE, None) or {"parameters": {}}
    _take_form_(module)
    module._parameters.update(aside["parameters"])
    if isinstance(module, nn.RNNBase):  # by what stands there, which needn't be tensors yet
        module._flat_weights = [module._parameters.get(name) for name in module._flat_weights_names]


def _drop_flat_(module: nn.Module) -> None:
    """Take the second hold that recurrent layers have on their parameters."""
    form = form_of(module)
    if isinstance(module, nn.RNNBase) and form is not None and form.weights:
        nothing = [None] * len(module._flat_weights_names)
        vars(module).update(_flat_weights=nothing, _flat_weight_refs=list(nothing))  # what is set goes into the former


def parameters_aside(module: nn.Module) -> list[nn.Parameter]:
    """List the parameters that the form of a module itself took the place of, and that are kept."""
    aside = vars(module).get(_ASIDE)
    return [] if aside is None else [parameter for parameter in aside["parameters"].values() if parameter is not None]


def form_before(module: nn.Module) -> Form | None:
    """Return the form that `unroute_` would return; None if there is none."""
    form: Form | None = (vars(module).get(_ASIDE) or {"form": None})["form"]
    return form


def has_forgotten(module: nn.Module) -> bool:
    """Whether a form took the place of parameters of a module that aren't kept any more."""
    return vars(module).get(_ASIDE, module) is None


def forget_aside_(module: nn.Module) -> None:
    """Drop what a form took the place of."""
    if _ASIDE in vars(module):
        vars(module)[_ASIDE] = None


class _ReadOnly(Tensor):
    """Refuses to be changed, as nothing would hear of it. A copy, and what a file has of it, is a plain tensor."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.as_subclass(Tensor).clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        changes = name in ("__set__", "__setitem__") or (name.endswith("_") and not name.endswith("__"))
        if changes and isinstance(args[0], cls):
            raise CompressionError(_CHANGED.format("a change to"))
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs or {})
        # What shares its memory: `data`, `T`, `detach()`.
        shares = name in ("__get__", "detach") and isinstance(result, Tensor)
        return result.as_subclass(cls) if shares else result


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
