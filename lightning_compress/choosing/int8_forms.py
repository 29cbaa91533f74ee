"""A model with only some layers in static int8: one calibrated form, whose layers round or don't."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from lightning_compress.choosing.forms import Choice, Cost, Forms, Run, with_values
from lightning_compress.choosing.gradients import Passes, sum_by_sample
from lightning_compress.choosing.layer_facts import LayerFacts, layer_facts, sample_macs
from lightning_compress.choosing.scheme_text import plain
from lightning_compress.choosing.speed import quantized_copy
from lightning_compress.errors import invalid
from lightning_compress.modules.calls import samples_in
from lightning_compress.modules.copying import copy_module, copy_tensors
from lightning_compress.modules.isolation import evaluation_mode
from lightning_compress.modules.paths import device_of, modules_of
from lightning_compress.quantization.convert import prepare_
from lightning_compress.quantization.layers.int8_weight import Int8Weight
from lightning_compress.quantization.numerics.int8 import StaticInt8
from lightning_compress.quantization.numerics.scheme import Scheme
from lightning_compress.quantization.plan import make_plan
from lightning_compress.quantization.quantize import dry_run
from lightning_compress.quantization.recipe import Recipe
from lightning_compress.quantization.schemes import resolve
from lightning_compress.quantization.static.calibrate import adjusted, calibrate
from lightning_compress.quantization.static.graphs import COMPUTED, int8_layers, value_read
from lightning_compress.quantization.static.rounding import ActivationQuantizer
from lightning_compress.quantization.static.traced import Traced, traced_units
from lightning_compress.structure.change import require_float
from lightning_compress.targets import Targets

LEVEL = "int8_static"


class Int8Forms(Forms):
    """Layers that static int8 can compute, in one traced and calibrated copy.

    A layer alone in int8 has its own weight rounded, and the activations that it reads.

    Args:
        model: any float module.
        batches: that calibrate.
        run: how they run.
        levels: static int8 alone, by name or as an object.
    """

    callback = "lightning_compress.PostTrainingQuantization"

    def __init__(
        self, model: nn.Module, batches: Sequence[Any], run: Run, levels: Sequence[str | Scheme] = (LEVEL,)
    ) -> None:
        schemes = [resolve(level) for level in levels]
        if len(schemes) != 1 or not isinstance(scheme := schemes[0], StaticInt8):
            raise invalid("levels", "be one scheme of static int8", list(levels), "Such as ['int8_static'].")
        require_float(model)
        self.facts: dict[str, LayerFacts] = {}
        self.scheme, self.batches, self.run = scheme, list(batches), run
        self.model = copy_module(model).cpu()
        self.floats = model if device_of(model).type == "cpu" else copy_module(self.model)
        with torch.inference_mode(False), evaluation_mode(self.model):
            self._prepare_()
        self.levels = (LEVEL,)
        self._weights: dict[str, list[Any]] = {}
        self._readers: dict[ActivationQuantizer, set[str]] = {}
        for form in traced_units(self.model):
            self._read(form)
        self.layers = dict.fromkeys(self._weights, (LEVEL,))
        self.facts = {path: self.facts[path] for path in self.layers if path in self.facts}
        self._rounding: Collection[str] = ()
        for quantizer in self._readers:
            quantizer.register_forward_pre_hook(self._switch)

    def _prepare_(self) -> None:
        model, scheme, first = self.model, self.scheme, self.batches[0]
        log = dry_run(model, copy_tensors(first), self.run)
        plan = make_plan(model, log, scheme, None, {}, training=False)
        plan.units = [adjusted(model, unit, plan.traces[unit.path], log, scheme) for unit in plan.units]
        self._macs = sample_macs(model, self.run, first)
        self.facts = layer_facts(model, self.run, first, {path: at for path, at in modules_of(model).items() if path})
        prepare_(model, plan.describe(), plan.traces)
        calibrate(model, self.batches, len(self.batches), self.run)
        self.skipped = plan.floats
        for form in traced_units(model):
            form.rounds = True
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())

    def _read(self, form: Traced) -> None:
        """Find the weights of a unit's int8 layers, and which layers read what each quantizer rounds."""
        layers = int8_layers(form.graph, form.unit.floats)
        unit = modules_of(self.model)[form.unit.path]
        owned = {id(parameter): parameter for parameter in unit.parameters()}
        names = {node: f"{form.unit.path}.{path.partition(COMPUTED)[0]}".strip(".") for node, path in layers.items()}
        for node, path in names.items():
            held, weight = self._weights.setdefault(path, []), value_read(form.graph, cast(Node, node.args[1]))
            if id(weight) in owned and not any(weight is other for other in held):
                held.append(weight)
        for node in form.graph.graph.nodes:
            if (quantizer := _quantizer(form.graph, node)) is not None:
                readers = {names[reader] for reader in _ahead(node, layers)}
                found = readers or {names[maker] for maker in _behind(node, layers)}
                self._readers.setdefault(quantizer, set()).update(found or names.values())

    def _switch(self, quantizer: ActivationQuantizer, _: Any) -> None:
        quantizer.rounds = not self._readers[quantizer].isdisjoint(self._rounding)

    @contextmanager
    def rounded(self, weights: Collection[str], activations: Collection[str]) -> Iterator[nn.Module]:
        """Yield the model with some layers' weights rounded, and the activations that some layers read."""
        with torch.no_grad():
            values = [
                (weight, Int8Weight.nearest(weight, self.scheme.reduced)())
                for path in weights
                for weight in self._weights[path]
            ]
        with ExitStack() as stack:
            stack.callback(setattr, self, "_rounding", ())
            self._rounding = set(activations)
            yield stack.enter_context(with_values(self.model, values))

    def compressed(self, choice: Choice) -> AbstractContextManager[nn.Module]:
        return self.rounded(choice, choice)

    def deployed(self, choice: Choice) -> nn.Module:
        targets = Targets(exclude=[path for path in self.layers if path not in choice])
        recipe = Recipe(self.scheme, len(self.batches), targets, None, "auto")
        return quantized_copy(self.floats, recipe, self.batches, self.run)

    def splits(self) -> dict[str, AbstractContextManager[nn.Module]]:
        every = list(self.layers)
        return {
            "weights alone": self.rounded(every, ()),
            "activations alone": self.rounded((), every),
            "weights and activations": self.rounded(every, every),
        }

    def taylor(self, batches: Sequence[Any], seed: int) -> dict[tuple[str, str], float]:
        passes = Passes(self.model, self.run, batches, seed, apart=True)
        weights = [(path, weight) for path, held in self._weights.items() for weight in held]
        with torch.no_grad():
            changes = [Int8Weight.nearest(weight, self.scheme.reduced)() - weight for _, weight in weights]
        sums = dict.fromkeys(self.layers, 0.0)
        with self._watched() as seen, closing(iter(passes)) as losses:
            for batch, loss in losses:
                read = list(seen)
                tensors = [*(y for *_, y in read), *(weight for _, weight in weights)]
                gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
                parts: dict[ActivationQuantizer, list[Tensor]] = {}
                for (quantizer, x, _), gradient in zip(read, gradients, strict=False):
                    if gradient is not None:
                        product = (quantizer.round(x) - x) * gradient
                        parts.setdefault(quantizer, []).append(sum_by_sample(product, samples_in(batch)))
                for quantizer, terms in parts.items():
                    squares = sum(float(term.square().sum()) for term in terms)
                    for path in self._readers[quantizer]:
                        sums[path] += squares
                for (path, _), change, gradient in zip(weights, changes, gradients[len(read) :], strict=True):
                    if gradient is not None:
                        sums[path] += float((change * gradient).sum()) ** 2
                seen.clear()
        return {(path, LEVEL): total / passes.elements for path, total in sums.items()}

    @contextmanager
    def _watched(self) -> Iterator[list[tuple[ActivationQuantizer, Tensor, Tensor]]]:
        """List what quantizers read, and the same as a tensor that gets gradients."""
        seen: list[tuple[ActivationQuantizer, Tensor, Tensor]] = []

        def note(quantizer: ActivationQuantizer, args: tuple[Any, ...], output: Tensor) -> Tensor:
            y = output.view_as(output) if output.requires_grad else output.detach().requires_grad_()
            seen.append((quantizer, args[0].detach(), y))
            return y.clone()

        with ExitStack() as hooks:
            for quantizer in self._readers:
                hooks.enter_context(quantizer.register_forward_hook(note))
            yield seen

    def cost(self, choice: Choice) -> Cost:
        parameters = list(self.model.parameters())
        size_bytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        for path in choice:
            for weight in self._weights[path]:
                size_bytes -= weight.numel() * (weight.element_size() - 1) - 4 * len(weight)
        macs = sum(fact.macs for path, fact in self.facts.items() if path in choice)
        return Cost(sum(parameter.numel() for parameter in parameters), self._macs - macs, size_bytes)

    def settings(self, choice: Choice) -> dict[str, Any]:
        excluded = [path for path in self.layers if path not in choice]
        return {"scheme": plain(self.scheme), **({"targets": {"exclude": excluded}} if excluded else {})}


def _quantizer(graph: nn.Module, node: Node) -> ActivationQuantizer | None:
    found = getattr(graph, str(node.target), None) if node.op == "call_module" else None
    return found if isinstance(found, ActivationQuantizer) else None


def _ahead(node: Node, layers: Collection[Node]) -> set[Node]:
    """Return the layers that read a node's value, through what computes no layer and rounds nothing."""
    found, ahead = set[Node](), [*node.users]
    while ahead:
        user = ahead.pop()
        if user in layers:
            found.add(user)
        elif user.op == "call_function":
            ahead += user.users
    return found


def _behind(node: Node, layers: Collection[Node]) -> set[Node]:
    found, ahead = set[Node](), [*node.all_input_nodes]
    while ahead:
        source = ahead.pop()
        if source in layers:
            found.add(source)
        elif source.op in ("call_function", "call_module"):
            ahead += source.all_input_nodes
    return found
