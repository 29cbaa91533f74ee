"""The forms of a quantized model, and the ways between them.

Float, prepared (fake-quantized), converted (in few bits), and adapted (4 bits, with float adapters that train). The
changes are made to any module that holds the units, and written down on it as plain data, so that a deep copy is as
convertible as the original and a checkpoint can rebuild the form.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import nn

from lightning_compress.errors import CompressionError
from lightning_compress.modules.fast_path import quiet_fast_path_, restore_fast_path_
from lightning_compress.modules.paths import is_at_or_below, is_below, module_at, modules_of
from lightning_compress.modules.routing import (
    Form,
    StoredWeight,
    forget_aside_,
    form_of,
    has_forgotten,
    route_,
    routed_modules,
    unroute_,
)
from lightning_compress.quantization.layers.int8_weight import Int8Weight
from lightning_compress.quantization.layers.packed_weight import PackedWeight
from lightning_compress.quantization.layers.plan import Weights, quantized_form
from lightning_compress.quantization.layers.schemes import NF4
from lightning_compress.quantization.lora.adapters import LowRank, adapt_, merge_
from lightning_compress.quantization.numerics.int8 import StaticInt8
from lightning_compress.quantization.numerics.scheme import Scheme
from lightning_compress.quantization.schemes import describe, from_description
from lightning_compress.quantization.static.graphs import COMPUTED, int8_layers
from lightning_compress.quantization.static.inner_layer import InnerLayer
from lightning_compress.quantization.static.int8_unit import Int8Unit, same_tensor
from lightning_compress.quantization.static.trace import Trace
from lightning_compress.quantization.static.traced import Traced
from lightning_compress.quantization.static.unit import Unit

RECORD = "_quantization"
"""The attribute of a model that holds what was done to it."""


def record_of(model: nn.Module) -> dict[str, Any] | None:
    """Return what was done to ``model``, as plain data: form, scheme, training, units, floats; None if nothing was."""
    record: dict[str, Any] | None = model.__dict__.get(RECORD)
    return record


def form_name(model: nn.Module) -> str:
    """Name the form of a model: ``float``, ``prepared``, ``converted`` or ``adapted``."""
    record = record_of(model)
    return "float" if record is None else str(record["form"])


def keep_record_(part: nn.Module, model: nn.Module, path: str) -> None:
    """Let ``part``, a copy of the module at ``path`` of ``model``, know by itself what was done to it."""
    if (record := copy.deepcopy(record_of(model))) is None:
        return
    for name in ("units", "layers"):
        record[name] = [
            {**entry, "path": entry["path"].removeprefix(path).lstrip(".")}
            for entry in record[name]
            if is_at_or_below(entry["path"], path)
        ]
    if record["units"] or record["layers"]:
        part.__dict__[RECORD] = record


def prepare_(
    model: nn.Module, described: Mapping[str, Any], traces: Mapping[str, Trace] = MappingProxyType({})
) -> None:
    """Put observers (for training, fake-quantizers) where `Plan.describe` says. Parameters stay the same objects.

    Units are traced, but for those whose ``traces`` are known, by their paths.
    """
    record = copy.deepcopy({**described, "form": "prepared"})
    scheme, training = cast(StaticInt8, from_description(record["scheme"])), record["training"]
    modules, units = modules_of(model), [Unit.from_description(plain) for plain in record["units"]]
    built = [
        Traced(unit, scheme, training=training).build_(module_at(model, unit.path), traces.get(unit.path))
        for unit in units
    ]
    for traced in built:
        route_(module_at(model, traced.unit.path), traced)
        for name, scales in traced.unit.moved.items():
            route_(modules[f"{traced.unit.path}.{name}".strip(".")], InnerLayer(scales))
    for layer in record["layers"]:
        module, scheme_of_layer = module_at(model, layer["path"]), from_description(layer["scheme"])
        layer["shapes"] = shapes_of(module)
        in_unit = any(is_at_or_below(layer["path"], unit["path"]) for unit in record["units"])
        if training and not in_unit and not scheme_of_layer.why_rounded_last(module):
            route_(module, scheme_of_layer.training_form(module))
    quiet_fast_path_(model)
    model.__dict__[RECORD] = record


def shapes_of(layer: nn.Module) -> dict[str, list[int]]:
    """Return the shapes of a layer's own parameters, as a record has them."""
    return {name: list(tensor.shape) for name, tensor in layer._parameters.items() if tensor is not None}


def convert_prepared_(model: nn.Module) -> None:
    """Convert a prepared module, also under `torch.inference_mode`."""
    if form_name(model) == "prepared":
        with torch.inference_mode(False), torch.no_grad():
            convert_(model)


def check_stored(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Check that a float model is the one of a stored record.

    Raises:
        CompressionError: the model hasn't the modules that the record names.
        RuntimeError: they have other shapes.
    """
    plain = [*([record["scheme"]] if record["units"] else ()), *(layer["scheme"] for layer in record["layers"])]
    for text in dict.fromkeys(filter(None, (from_description(scheme).warning() for scheme in plain))):
        warnings.warn(text, stacklevel=3)
    for part in (*record["units"], *record["layers"]):
        module = module_at(model, part["path"])
        if (shapes := part.get("shapes", shapes_of(module))) != shapes_of(module):
            # Packed rows of different lengths can take the same bytes.
            raise RuntimeError(f"size mismatch for {part['path']}: {shapes} in the file, {shapes_of(module)} here.")


def convert_(model: nn.Module, weights: Weights = MappingProxyType({})) -> None:
    """Turn a prepared model into its quantized form; what it was is kept for `revert_`."""
    record = record_of(model)
    assert record is not None and record["form"] == "prepared"
    layers = {layer["path"]: from_description(layer["scheme"]) for layer in record["layers"]}
    forms, known = _layer_forms(model, layers, weights), dict[int, Int8Weight]()
    for plain in record["units"]:
        module = module_at(model, plain["path"])
        traced = form_of(module)
        assert isinstance(traced, Traced)
        if traced.graph is None:
            traced.build_(module)
        plain |= _coded(module, int8_layers(traced.trace.graph, traced.unit.floats).values())
        below = {layer: forms.pop(layer) for layer in layers if is_below(layer, plain["path"])}
        int8 = _route_unit_(model, plain, traced.scheme, traced.trains, below, known)
        int8.roundings = traced.roundings()
        int8.build_(module, traced.trace)
    for path, form in forms.items():
        route_(module_at(model, path), form)
    quiet_fast_path_(model)
    record["form"] = "converted"


def _coded(module: nn.Module, layers: Collection[str]) -> dict[str, list[str]]:
    """Return which parameters of a unit have codes, by all of their names, and which layers compute their weights."""
    modules, codes = modules_of(module, every_name=True), set[int]()
    for path in layers:
        owner, _, name = (f"{path}.weight" if path in modules else path).rpartition(".")
        if COMPUTED not in path:
            codes.add(id(modules[owner]._parameters[name]))
    names = [
        f"{path}.{name}".lstrip(".")
        for path, owner in modules_of(module).items()
        for name, parameter in owner._parameters.items()
        if id(parameter) in codes
    ]
    return {"coded": names, "computed": sorted(path for path in layers if COMPUTED in path)}


def _route_unit_(
    model: nn.Module,
    plain: dict[str, Any],
    scheme: StaticInt8,
    trained: bool,
    below: Mapping[str, Form],
    known: dict[int, Int8Weight],
) -> Int8Unit:
    """Let a unit compute in int8, and its layers, called alone, with their codes; ``known`` are those of parameters."""
    unit, module = Unit.from_description(plain), module_at(model, plain["path"])
    modules, owned = modules_of(module), dict[str, dict[str, StoredWeight]]({"": {}})
    for path in plain["coded"]:
        owner, _, name = path.rpartition(".")
        parameter = modules[owner]._parameters.get(name) if owner in modules else None
        if parameter is None:
            raise CompressionError(f"The model must have a parameter at {path!r}. Received: none.")
        if id(parameter) not in known:
            known[id(parameter)] = Int8Weight.nearest(parameter, scheme.reduced)
        owned.setdefault(owner, {})[name] = known[id(parameter)]
    int8 = Int8Unit(unit, scheme, trained, owned.pop(""))
    for path, form in below.items():
        route_(module_at(model, path), form)
    for path in dict.fromkeys((*owned, *unit.moved)):
        route_(modules[path], InnerLayer(unit.moved.get(path, {}), owned.get(path, {})))
    route_(module, int8)
    return int8


def _layer_forms(model: nn.Module, layers: Mapping[str, Scheme], weights: Weights) -> dict[str, Form]:
    """Make the forms of single layers. Layers that share a weight, and so a scheme, share its codes."""
    made: dict[str, Form] = {}
    modules = {path: module_at(model, path) for path in layers}
    for path, scheme in layers.items():
        if (form := form_of(modules[path])) is not None:
            weights = {**weights, path: scheme.trained_weight(form, modules[path])}
    keys = {path: id(module._parameters.get("weight")) for path, module in modules.items()}
    shared = {keys[path]: weights[path] for path in layers if path in weights}
    for path, scheme in layers.items():
        known = {**weights, path: shared[keys[path]]} if keys[path] in shared else weights
        made[path] = form = quantized_form(modules[path], scheme, known, path)
        if "weight" in form.weights:
            weight: Any = form.weights["weight"]
            shared[keys[path]] = weight
    return made


def revert_(model: nn.Module, form: str = "prepared") -> None:
    """Put a model back into its ``prepared`` form, where it had one, or the ``float`` form, with its values.

    An adapted model has its adapters merged into float weights, unless these haven't been let go of yet.
    """
    if (record := record_of(model)) is None:
        return
    if record["form"] == "adapted":
        merge_(model, record)
        del model.__dict__[RECORD]
        return
    paths = [part["path"] for part in (*record["units"], *record["layers"])]
    own = {module for path, module in modules_of(model).items() if any(is_at_or_below(path, part) for part in paths)}
    routed = [module for module in routed_modules(model) if module in own]  # a part may have been quantized before
    if gone := [module for module in routed if has_forgotten(module)]:
        unroute_(gone[0])  # raises
    restore_fast_path_(model)
    before = {module: unroute_(module) for module in routed if form_of(module) is not None}
    if form == "float" or all(prepared is None for prepared in before.values()):
        del model.__dict__[RECORD]
        return
    for module, prepared in before.items():
        if prepared is not None:
            route_(module, prepared)
    quiet_fast_path_(model)
    record["form"] = "prepared"


def adapt_and_record_(model: nn.Module, layers: list[str], low_rank: LowRank, settings: Mapping[str, Any]) -> None:
    """Put adapters over 4-bit ``layers``; the float weights stay aside until `forget_`.

    Of ``settings``, ``trained`` are patterns of modules that train on as they are, ``targets`` is what was asked for,
    and ``floats`` says why other layers have none.
    """
    shapes = {path: shapes_of(module_at(model, path)) for path in layers}
    done = adapt_(model, layers, low_rank, settings["trained"])
    model.__dict__[RECORD] = {
        "form": "adapted",
        "scheme": describe(NF4()),
        "training": True,
        "units": [],
        "layers": [{"path": path, "scheme": describe(NF4()), "shapes": shapes[path]} for path in layers],
        "floats": dict(settings["floats"]),
        "targets": settings["targets"],
        **done,
    }


def transplant_(model: nn.Module, twin: nn.Module) -> None:
    """Give a float ``model`` the converted form of its copy ``twin``; what the model was is kept for `revert_`.

    Parameters that have other values in the twin, as ranges were moved between layers, are the twin's meanwhile.
    """
    record = record_of(twin)
    assert record is not None and record["form"] == "converted"
    modules, twins = modules_of(model), modules_of(twin)
    forms = {path: form for path, other in twins.items() if (form := form_of(other)) is not None}
    memo: dict[int, Any] = {id(other): modules[path] for path, other in twins.items()}
    others: dict[str, dict[str, nn.Parameter]] = {path: {} for path in forms}
    for path, other in twins.items():
        for kind in ("_parameters", "_buffers"):
            for name, tensor in getattr(other, kind).items():
                own = getattr(modules[path], kind)[name]
                if path in forms and (name in forms[path].weights or not same_tensor(own, tensor)):
                    others[path] |= {} if name in forms[path].weights else {name: tensor}
                else:
                    memo[id(tensor)] = own
    for path, form in copy.deepcopy(forms, memo).items():
        if form_of(modules[path]) is None:  # not yet, as that of a child of another
            route_(modules[path], form, copy.deepcopy(others[path], memo))
    quiet_fast_path_(model)
    model.__dict__[RECORD] = copy.deepcopy(record)


def traces_of(model: nn.Module) -> dict[str, Trace]:
    """Return the traces of a prepared model's units, by their paths."""
    forms = {path: form_of(module) for path, module in modules_of(model).items()}
    return {path: form.trace for path, form in forms.items() if isinstance(form, Traced) and form.graph is not None}


def packed_weights(model: nn.Module) -> list[PackedWeight]:
    """Return the matrices that a model holds in few bits, each once."""
    found = (weight for form in routed_modules(model).values() for weight in form.weights.values())
    return list(dict.fromkeys(weight for weight in found if isinstance(weight, PackedWeight)))


def forget_(model: nn.Module) -> None:
    """Let go of what a converted model was; it can't be reverted any more."""
    for module in model.modules():
        forget_aside_(module)


def rebuild_(model: nn.Module, record: Mapping[str, Any], traces: Mapping[str, Trace] = MappingProxyType({})) -> None:
    """Give a float model the form that ``record`` tells of; its weights are loaded afterwards. See `prepare_`.

    Raises:
        CompressionError: the model hasn't the modules that the record names.
    """
    check_stored(model, record)
    if record["form"] == "adapted":
        paths = [layer["path"] for layer in record["layers"]]
        adapt_and_record_(model, paths, LowRank(**record["low_rank"]), record)
    elif record["form"] == "prepared":
        prepare_(model, record, traces)
        return
    else:
        _rebuild_converted_(model, copy.deepcopy(dict(record)))
    forget_(model)


def _rebuild_converted_(model: nn.Module, record: dict[str, Any]) -> None:
    scheme = cast(StaticInt8, from_description(record["scheme"]))
    forms = _layer_forms(model, {layer["path"]: from_description(layer["scheme"]) for layer in record["layers"]}, {})
    known: dict[int, Int8Weight] = {}
    for plain in record["units"]:
        below = {path: forms.pop(path) for path in list(forms) if is_below(path, plain["path"])}
        _route_unit_(model, plain, scheme, record["training"], below, known)
    for path, form in forms.items():
        route_(module_at(model, path), form)
    quiet_fast_path_(model)
    model.__dict__[RECORD] = record
