"""A model with the weights of some layers in few bits, or with zeros in them: other values in the same tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_compress.choosing.forms import Choice, Cost, Forms, Run, with_values
from lightning_compress.choosing.gradients import Values, layer_scores
from lightning_compress.choosing.layer_facts import LayerFacts, layer_facts
from lightning_compress.choosing.scheme_text import label_of, plain
from lightning_compress.choosing.speed import quantized_copy
from lightning_compress.errors import CompressionError, invalid
from lightning_compress.modules.copying import copy_module
from lightning_compress.modules.isolation import evaluation_mode
from lightning_compress.modules.paths import compressible_modules, named_tensors
from lightning_compress.modules.routing import StoredWeight
from lightning_compress.pruning.smallest import take_smallest
from lightning_compress.quantization.layers.gptq_calibration import calibrated_weights
from lightning_compress.quantization.layers.packed import PACKED
from lightning_compress.quantization.layers.plan import plan_layers, quantized_form
from lightning_compress.quantization.layers.schemes import Packed, WeightOnly
from lightning_compress.quantization.numerics.scheme import Scheme
from lightning_compress.quantization.quantize import dry_run
from lightning_compress.quantization.recipe import Recipe
from lightning_compress.quantization.schemes import resolve
from lightning_compress.structure.change import require_float
from lightning_compress.targets import Targets

BITS: tuple[Packed, ...] = tuple(WeightOnly(bits, group_size=32, symmetric=False) for bits in (8, 4, 3, 2))
"""The levels of weights by default."""

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
"""The levels of pruning by default."""

FINE = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99)
"""Those that a search chooses from."""


class ValueForms(Forms):
    """Knows other values for the weights of single layers: a base."""

    facts: dict[str, LayerFacts]

    def __init__(self, model: nn.Module, batches: Sequence[Any], run: Run) -> None:
        require_float(model)
        self.floats, self.model = model, copy_module(model)
        self.batches, self.run = list(batches), run
        self.modules = compressible_modules(self.model)
        self.log = dry_run(self.model, self.batches[0], run, keep_inputs=False)
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())  # gradients are to reach frozen layers too
        tensors = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        self._parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self._size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        self._shared = {key for key, count in Counter(map(id, _all_parameters(self.model))).items() if count > 1}

    def measure_layers_(self) -> None:
        """Measure what the layers cost, once they are known."""
        layers = {path: self.modules[path] for path in self.layers}
        self.facts = layer_facts(self.model, self.run, self.batches[0], layers)
        self._macs = sum(fact.macs for fact in self.facts.values())

    def values(self, choice: Choice) -> Values:
        """Return the tensors that change, with their values."""
        raise NotImplementedError

    @contextmanager
    def compressed(self, choice: Choice) -> Iterator[nn.Module]:
        with torch.inference_mode(False), torch.no_grad():
            values = self.values(choice)
        with with_values(self.model, values):
            yield self.model

    def taylor(self, batches: Sequence[Any], seed: int) -> dict[tuple[str, str], float]:
        layers = {path: self.modules[path] for path in self.layers}
        return layer_scores(
            self.model,
            self.run,
            batches,
            layers,
            lambda path: ((level, self.values({path: level})) for level in self.layers[path]),
            seed,
        )


def _all_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        yield from (parameter for parameter in module._parameters.values() if parameter is not None)


class WeightForms(ValueForms):
    """Layers whose weights can be stored in few bits, in one of several schemes.

    Args:
        model: any float module.
        batches: run through it; GPTQ is calibrated on them.
        run: how.
        levels: schemes for weights alone, by name or as objects, from the one that compresses least.
    """

    callback = "lightning_compress.PostTrainingQuantization"

    def __init__(
        self, model: nn.Module, batches: Sequence[Any], run: Run, levels: Sequence[str | Scheme] = BITS
    ) -> None:
        schemes = [resolve(level) for level in levels]
        for scheme in schemes:
            if not isinstance(scheme, Packed):
                raise invalid("levels", "be schemes for weights alone", scheme, "Such as WeightOnly(4) or 'gptq'.")
        self.schemes = {label_of(scheme): cast(Packed, scheme) for scheme in schemes}
        self.levels = tuple(self.schemes)
        super().__init__(model, batches, run)
        candidates = [path for path, layer in self.modules.items() if type(layer) in (*PACKED, nn.MultiheadAttention)]
        self.layers, self.skipped = {}, {}
        found: dict[str, list[str]] = {}
        for label, scheme in self.schemes.items():
            named = dict.fromkeys(candidates, scheme)
            chosen, floats = plan_layers(self.model, self.log.inputs, scheme, None, named, self.log.replaced)
            for path in chosen:
                found.setdefault(path, []).append(label)
            self.skipped |= floats
        for path in candidates:
            own = [*self.modules[path].parameters()]
            if any(id(parameter) in self._shared for parameter in own):
                self.skipped[path] = "its weight is shared with another layer"
            elif path in found:
                self.layers[path] = tuple(found[path])
        self.skipped = {path: reason for path, reason in self.skipped.items() if path not in self.layers}
        if not self.layers:
            reasons = "; ".join(f"{path}: {reason}" for path, reason in list(self.skipped.items())[:5])
            raise CompressionError(
                "`model` must have weights that can be stored in few bits. Received: none. "
                f"{reasons or 'It has no linear, convolution, embedding or attention layer'}."
            )
        self._known: dict[tuple[str, str], dict[str, Any]] = {}
        self._packed: dict[tuple[str, str], dict[str, StoredWeight]] = {}
        self._saved: dict[tuple[str, str], float] = {}
        self.measure_layers_()

    def _fitted(self, choice: Choice) -> dict[str, Any]:
        """Return stored weights that calibration makes; those of single layers are kept."""
        fits = {path: self.schemes[level] for path, level in choice.items() if self.schemes[level].fits}
        if not fits:
            return {}
        key = next(iter(choice.items())) if len(choice) == 1 else None
        if key not in self._known or key is None:
            with evaluation_mode(self.model):
                made = calibrated_weights(self.model, fits, self.batches, self.run)
            if key is None:
                return made
            self._known[key] = made
        return self._known[key]

    def _stored(self, path: str, level: str, known: Mapping[str, Any]) -> dict[str, StoredWeight]:
        if not known and (path, level) in self._packed:
            return self._packed[path, level]
        layer = self.modules[path]
        form: Any = quantized_form(layer, self.schemes[level], known, path)
        stored = dict(form.weights)
        if isinstance(layer, nn.MultiheadAttention):
            stored |= {f"out_proj.{name}": weight for name, weight in form.inner["out_proj"].weights.items()}
        if not known:
            self._packed[path, level] = stored
        return stored

    def values(self, choice: Choice) -> Values:
        known, values = self._fitted(choice), list[tuple[Tensor, Tensor]]()
        for path, level in choice.items():
            layer = self.modules[path]
            for name, weight in self._stored(path, level, known).items():
                values.append((layer.get_parameter(name), weight()))
        return values

    def _saving(self, path: str, level: str) -> float:
        if (path, level) not in self._saved:
            layer, saved = self.modules[path], 0.0
            scheme = self.schemes[level]
            nearest = scheme.packed  # as many bytes as fitted codes
            for parameter in layer.parameters():
                if parameter.dim() > 1:
                    stored = nearest(parameter.detach()).tensors().values()
                    saved += parameter.numel() * parameter.element_size()
                    saved -= sum(tensor.numel() * tensor.element_size() for tensor in stored)
            self._saved[path, level] = saved
        return self._saved[path, level]

    def cost(self, choice: Choice) -> Cost:
        size_bytes = self._size_bytes - sum(self._saving(path, level) for path, level in choice.items())
        return Cost(self._parameters, self._macs, size_bytes)

    def _arguments(self, choice: Choice) -> tuple[Packed, dict[str, Packed], list[str]]:
        """Return the scheme that most layers get, what others get, and which get none."""
        counts = Counter(choice.values())
        base = max(counts, key=lambda level: (counts[level], -self.levels.index(level)))
        chosen, _ = plan_layers(self.model, self.log.inputs, self.schemes[base], None, {}, self.log.replaced)
        overrides = {path: level for path, level in choice.items() if level != base or path not in chosen}
        excluded = [path for path in chosen if path not in choice]
        return self.schemes[base], {path: self.schemes[level] for path, level in overrides.items()}, excluded

    def deployed(self, choice: Choice) -> nn.Module:
        scheme, overrides, excluded = self._arguments(choice)
        recipe = Recipe(scheme, len(self.batches), Targets(exclude=excluded), overrides, "auto")
        return quantized_copy(self.floats, recipe, self.batches, self.run)

    def settings(self, choice: Choice) -> dict[str, Any]:
        scheme, overrides, excluded = self._arguments(choice)
        settings: dict[str, Any] = {"scheme": plain(scheme)}
        if overrides:
            settings["overrides"] = {path: plain(other) for path, other in overrides.items()}
        return settings | ({"targets": {"exclude": excluded}} if excluded else {})


class PruningForms(ValueForms):
    """Layers whose smallest weights can be zero.

    Args:
        model: any float module.
        batches: run through it.
        run: how.
        levels: the fractions of a layer's weights that are zero, rising, in (0, 1).
    """

    callback = "lightning_compress.ScheduledPruning"

    def __init__(
        self, model: nn.Module, batches: Sequence[Any], run: Run, levels: Sequence[float] = SPARSITIES
    ) -> None:
        if not all(isinstance(level, float) and 0.0 < level < 1.0 for level in levels):
            raise invalid("levels", "be fractions in (0, 1)", levels, "They are the parts of a layer that are zero.")
        self._sparsities = {f"{level:g}": level for level in sorted(levels)}
        self.levels = tuple(self._sparsities)
        selection = Targets().select(model)
        self.skipped = dict(selection.skipped)
        names = {target.name: target.layer for target in selection.targets}
        super().__init__(model, batches, run)
        parameters: Mapping[str, Any] = named_tensors(self.model)
        self._weights: dict[str, list[nn.Parameter]] = {}
        for name, layer in names.items():
            around = layer.rpartition(".")[0]  # attention computes with its `out_proj`, and doesn't call it
            layer = around if isinstance(self.modules.get(around), nn.MultiheadAttention) else layer
            self._weights.setdefault(layer, []).append(parameters[name])
        self.skipped |= {
            path: "the first batch doesn't call it" for path in self._weights if path not in self.log.inputs
        }
        self.layers = {path: self.levels for path in self._weights if path in self.log.inputs}
        self.measure_layers_()

    def values(self, choice: Choice) -> Values:
        values = list[tuple[Tensor, Tensor]]()
        for path, level in choice.items():
            for weight in self._weights[path]:
                if count := round(self._sparsities[level] * weight.numel()):
                    every = torch.ones_like(weight, dtype=torch.bool)
                    [mask] = take_smallest([weight.detach()], [every], count)
                    values.append((weight, weight.detach() * mask))
        return values

    def errors_in_training(self) -> dict[tuple[str, str], float]:
        """Return ``-log(||W'||^2 / ||W||^2)``: its sum is least where the product of what layers keep is largest.

        At high sparsity the outputs are beyond recognition, and first-order scores of them say nothing of what training
        makes of the weights that stay. See ``benchmarks/choosing.md``.
        """
        errors = dict[tuple[str, str], float]()
        for path, levels in self.layers.items():
            whole = sum(float(weight.detach().square().sum()) for weight in self._weights[path])
            for level in levels:
                kept = sum(float(value.square().sum()) for _, value in self.values({path: level}))
                errors[path, level] = -math.log(max(kept / max(whole, 1e-30), 1e-9))
        return errors

    def cost(self, choice: Choice) -> Cost:
        weights = sum(weight.numel() for path in self.layers for weight in self._weights[path])
        zeros = {
            path: sum(round(self._sparsities[level] * weight.numel()) for weight in self._weights[path])
            for path, level in choice.items()
        }
        sizes = {path: self._weights[path][0].element_size() for path in zeros}
        macs = sum(
            fact.macs * (1 - (self._sparsities[choice[path]] if path in choice else 0.0))
            for path, fact in self.facts.items()
        )
        size_bytes = self._size_bytes - sum(count * sizes[path] for path, count in zeros.items())
        return Cost(weights - sum(zeros.values()), macs, size_bytes)

    def settings(self, choice: Choice) -> dict[str, Any]:
        whole, left = self.cost({}).parameters, self.cost(choice).parameters
        fractions = {path: self._sparsities[choice[path]] if path in choice else 0.0 for path in self.layers}
        return {"sparsity": round(1 - left / whole, 6), "scope": "layer", "overrides": fractions}
