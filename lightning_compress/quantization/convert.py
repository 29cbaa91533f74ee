"""The forms of a quantized model, and the ways between them.

Float, prepared (fake-quantized), converted (in few bits), and adapted (4 bits, with float adapters that train). The
changes are made to any module that holds the units, and written down on it as plain data, so that a deep copy is as
convertible as the original and a checkpoint can rebuild the form.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import nn

from lightning_compress.modules.fast_path import quiet_fast_path_, restore_fast_path_
from lightning_compress.modules.isolation import restore_modes_, training_modes
from lightning_compress.modules.paths import is_at_or_below, is_below, module_at
from lightning_compress.modules.routing import CHILD, forget_aside_, restore_aside_, route_, set_aside_, unroute_
from lightning_compress.quantization.layers.float_values import hide_float_values_, show_float_values_
from lightning_compress.quantization.layers.packed import PackedLayer
from lightning_compress.quantization.layers.packed_weight import PackedWeight
from lightning_compress.quantization.layers.plan import Weights, quantized_form
from lightning_compress.quantization.layers.schemes import NF4
from lightning_compress.quantization.lora.adapters import LowRank, adapt_, merge_
from lightning_compress.quantization.numerics.int8 import StaticInt8
from lightning_compress.quantization.numerics.scheme import Scheme
from lightning_compress.quantization.schemes import describe, from_description
from lightning_compress.quantization.static.traced import Traced, Unit, prepared_form, share_buffers

RECORD = "_quantization"
"""The attribute of a model that holds what was done to it."""


def record_of(model: nn.Module) -> dict[str, Any] | None:
    """Return what was done to ``model``, as plain data: form, scheme, training, units, floats; None if nothing was."""
    record: dict[str, Any] | None = model.__dict__.get(RECORD)
    return record


def form_of(model: nn.Module) -> str:
    """Name the form: ``float``, ``prepared``, ``converted`` or ``adapted``."""
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


def prepare_(model: nn.Module, described: Mapping[str, Any]) -> None:
    """Put observers (for training, fake-quantizers) where `Plan.describe` says. Parameters stay the same objects."""
    record = copy.deepcopy({**described, "form": "prepared"})
    scheme, training, built = cast(StaticInt8, from_description(record["scheme"])), record["training"], []
    for plain in record["units"]:
        unit, module = Unit.from_description(plain), module_at(model, plain["path"])
        modes = training_modes(module)
        module.train(training)
        try:
            traced = prepared_form(module, unit, scheme, training=training)
        finally:
            restore_modes_(modes)
        share_buffers(traced, module)
        built.append((module, traced))
        plain["numbers"] = traced.baked
    for module, traced in built:
        traced.take_qconfigs_(module)
        route_(module, traced)
        traced.keep_frozen_batchnorm_()
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
    if form_of(model) == "prepared":
        with torch.inference_mode(False), torch.no_grad():
            convert_(model)


def take_stored_(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Check that a float model is the one of a stored record, and take the buffers whose values its traces hold.

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
        buffers = dict(module.named_buffers())
        for name in part.get("numbers", {}).keys() & buffers.keys():
            buffers[name].copy_(part["numbers"][name])


def convert_(model: nn.Module, weights: Weights = MappingProxyType({}), judge: bool = True) -> None:
    """Turn a prepared model into its quantized form; what it was stays aside, for `revert_`.

    To ``judge`` is to leave layers float, with a warning, whose int8 kernels compute something else now: on another
    CPU, say, than the one that it was prepared on.
    """
    record = record_of(model)
    assert record is not None and record["form"] == "prepared"
    scheme = cast(StaticInt8, from_description(record["scheme"]))  # what units are in
    layers = {layer["path"]: from_description(layer["scheme"]) for layer in record["layers"]}
    converted: dict[str, nn.Module] = {}
    for unit in record["units"]:
        path = unit["path"]
        traced = module_at(model, path)._modules[CHILD]
        assert isinstance(traced, Traced)
        wrong = traced.wrong_kernels(scheme) if judge else dict.fromkeys(unit["unconverted"], "")
        unconverted = [name for name in wrong if name]
        graph = traced.converted(scheme, unconverted)
        if judge:
            for name in unit["unconverted"]:  # when it was converted before
                record["floats"].pop(f"{path}.{name}".strip("."), None)
            unit["unconverted"] = unconverted
            _tell_of_wrong_kernels({f"{path}.{name}".strip("."): why for name, why in wrong.items()}, record["floats"])
        for layer in [layer for layer in layers if is_below(layer, path)]:
            # What a unit leaves in float was copied into its int8 form, where it is quantized in turn.
            leaf: Any = graph.get_submodule(layer.removeprefix(path).lstrip("."))
            if type(leaf).__module__.startswith("torch.ao.nn.intrinsic"):
                leaf = leaf[0]  # upstream fuses float layers too
            _swap_in_(leaf, quantized_form(leaf, layers.pop(layer), weights, layer))
            forget_aside_(leaf)
        converted[path] = traced.as_int8(graph)
    converted |= _layer_forms(model, layers, weights)
    for path, child in converted.items():
        _swap_in_(module_at(model, path), child)
    quiet_fast_path_(model)
    record["form"] = "converted"


def _tell_of_wrong_kernels(wrong: Mapping[str, str], floats: dict[str, str]) -> None:
    if wrong:
        floats |= wrong
        lines = [f"`{path}`: {reason}" for path, reason in wrong.items()]
        warnings.warn(
            f"On this CPU some layers can't be int8, and stay float: {'; '.join(lines)}. They were right when they "
            "were prepared: the model isn't quite the one that it is on a CPU where they still are.",
            stacklevel=3,
        )


def _layer_forms(model: nn.Module, layers: Mapping[str, Scheme], weights: Weights) -> dict[str, nn.Module]:
    """Make the forms of layers outside of units. Layers that share a weight, and so a scheme, share its codes."""
    made: dict[str, nn.Module] = {}
    modules = {path: module_at(model, path) for path in layers}
    for path, scheme in layers.items():
        if (form := modules[path]._modules.get(CHILD)) is not None:
            weights = {**weights, path: scheme.trained_weight(form)}
    keys = {path: id(dict(module._parameters).get("weight")) for path, module in modules.items()}
    shared = {keys[path]: weights[path] for path in layers if path in weights}
    for path, scheme in layers.items():
        known = {**weights, path: shared[keys[path]]} if keys[path] in shared else weights
        made[path] = form = quantized_form(modules[path], scheme, known, path)
        if isinstance(form, PackedLayer):
            shared[keys[path]] = form.weight
    return made


def _swap_in_(module: nn.Module, converted: Any) -> None:
    """Replace a prepared (or plain) unit or layer by its converted form and set the rest aside."""
    prepared = module._modules.pop(CHILD, None)
    route_(module, converted.eval())
    set_aside_(module, converted.used, prepared)
    show_float_values_(module)


def _converted_modules(model: nn.Module, record: Mapping[str, Any]) -> list[nn.Module]:
    """Return the modules that have (or had) a form of their own: units, and layers outside of them."""
    paths = [part["path"] for part in (*record["units"], *record["layers"])]
    units = [unit["path"] for unit in record["units"]]
    return [module_at(model, path) for path in paths if not any(is_below(path, unit) for unit in units)]


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
    modules = _converted_modules(model, record)
    prepared = {module: restore_aside_(module) for module in modules}
    for module in modules:
        hide_float_values_(module)
    restore_fast_path_(model)
    if form == "float" or not any(prepared.values()):
        for module in modules:
            unroute_(module)
        del model.__dict__[RECORD]
        return
    for module, child in prepared.items():
        if child is None:
            unroute_(module)
        else:
            route_(module, child)
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
    """Give a float ``model`` the converted form of its copy ``twin``; what the model was stays aside."""
    record = record_of(twin)
    assert record is not None and record["form"] == "converted"
    pairs = zip(_converted_modules(model, record), _converted_modules(twin, record), strict=True)
    for module, other in list(pairs):
        _swap_in_(module, other._modules[CHILD])
    quiet_fast_path_(model)
    model.__dict__[RECORD] = record


def packed_weights(model: nn.Module) -> list[PackedWeight]:
    """Return the matrices that a model holds in few bits, each once."""
    return [module for module in model.modules() if isinstance(module, PackedWeight)]


def forget_(model: nn.Module) -> None:
    """Let go of what a converted model was; it can't be reverted any more."""
    for module in model.modules():
        forget_aside_(module)
