"""Traces a model's runs, and reads from the labels of its tensors which channels depend on each other."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from lightning_compress.channels.cutting.cached import cached_tensors
from lightning_compress.channels.cutting.layers import STANDARD
from lightning_compress.channels.cutting.written import WRITES, WRITTEN, corrected_sizes
from lightning_compress.channels.tracing.corrections import written_sizes
from lightning_compress.channels.tracing.deterministic import deterministic
from lightning_compress.channels.tracing.disjoint_sets import FIXED
from lightning_compress.channels.tracing.groups import Attribute, Cost, DependencyGroups, Group, Member, Run
from lightning_compress.channels.tracing.recurrent_rules import Recurrences
from lightning_compress.channels.tracing.rules import rule_for
from lightning_compress.channels.tracing.tracer import Tracer, varying
from lightning_compress.modules.fast_path import without_fast_path
from lightning_compress.modules.outputs import states_given_back, tensors_in
from lightning_compress.modules.paths import clean_name, compressible_modules, modules_of, named_tensors


class _Writing(TorchFunctionMode):
    """Tells the tracer when a call runs whose sizes the code writes; an operator may call the same for itself."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.tracer.is_writing = func in WRITES
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.tracer.is_writing = False


@contextmanager
def _following(tracer: Tracer, model: nn.Module) -> Iterator[None]:
    """Run the calls inside under the tracer, which is told what module runs; no hook stays."""

    def enter(path: str) -> Callable[..., None]:
        return lambda *_: tracer.stack.append(path)

    def leave(*_: Any) -> None:
        tracer.stack.pop()

    own, held = set(model.modules()), set(model.parameters())

    def is_stranger(module: nn.Module) -> bool:
        """Tell whether a module isn't the model's, such as a teacher in a plain list."""
        return module not in own and any(True for _ in module.parameters()) and held.isdisjoint(module.parameters())

    def enter_any(module: nn.Module, *_: Any) -> None:
        tracer.strangers += is_stranger(module)

    def leave_any(module: nn.Module, *_: Any) -> None:
        tracer.strangers -= is_stranger(module)

    with ExitStack() as hooks, warnings.catch_warnings():
        # Fired for what `torch.compile` wraps too, they come in pairs.
        warnings.filterwarnings("ignore", r"Using `torch.compile\(module\)` when there are global hooks on modules")
        hooks.enter_context(register_module_forward_pre_hook(enter_any))
        hooks.enter_context(register_module_forward_hook(leave_any, always_call=True))
        for path, module in model.named_modules():
            hooks.enter_context(module.register_forward_pre_hook(enter(clean_name(path))))
            hooks.enter_context(module.register_forward_hook(leave, always_call=True))
        # Gradients of no use here, but not `inference_mode`: it hides what composite operators are made of.
        eager = torch.compiler.set_stance("force_eager")
        with without_fast_path(), eager, torch.no_grad(), tracer, Recurrences(tracer), _Writing(tracer):
            yield


def trace(model: nn.Module, runs: Sequence[Run], choices: Mapping[str, int]) -> DependencyGroups:
    """Trace some runs of ``model`` and say which channels depend on each other in any of them."""
    tensors, beside = named_tensors(model), cached_tensors(model)  # held, as the tracer knows them by their ids
    modules = modules_of(model)
    tracer = Tracer({**tensors, **beside}, _written_numbers(modules), rule_for, choices)
    with states_given_back(model) as states, deterministic(), _following(tracer, model):
        for number, run in enumerate(runs):
            tracer.counting = number == 0
            outputs = list(tensors_in(run(model), set(states)))
            with _disable_current_modes(), torch._C.DisableTorchFunction():  # labels are nobody's concern
                tracer.freeze(outputs, getattr(run, "reason", "an output"), output=True)
                for name, tensor in cached_tensors(model).items():
                    tracer.name(name, tensor)
    reader = _Reader(tracer, modules, tensors)
    layers = compressible_modules(model, every_name=True)
    return DependencyGroups(
        tuple(reader.group(number) for number in range(len(reader.units_of))),
        tuple(reader.costs()),
        tuple(reader.attributes()),
        written_sizes(tracer.written, reader.places),
        {path: vars(module)[WRITTEN] for path, module in modules.items() if WRITTEN in vars(module)},
        reader.fixed(),
        {
            key: frozenset(reader.places(torch.cat(labels))[0].unique().tolist()) - {-1}
            for key, labels in tracer.splits.items()
        },
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        tuple(
            name
            for name, tensor in tensors.items()
            if isinstance(tensor, nn.Parameter) and name.rpartition(".")[0] in layers
        ),
        tracer.macs,
    )


def _written_numbers(modules: Mapping[str, nn.Module]) -> dict[str, set[int]]:
    numbers = {}
    for path, module in modules.items():
        attributes = {value for value in vars(module).values() if type(value) is int and value > 1}
        numbers[path] = attributes | {now for before, now in corrected_sizes(module) if before in attributes}
    return numbers


class _Reader:
    """Reads from a tracer's labels what goes together.

    Attributes:
        keys: of each group the dimensions (tensor, dim) that shrink with it.
        units_of: and its units.
    """

    def __init__(self, tracer: Tracer, modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> None:
        self.tracer = tracer
        self.modules = modules
        self.tensors = tensors
        self.units = tracer.sets.resolve()
        labels_along: dict[tuple[str, int], Tensor] = {}
        for name, factors in tracer.labels_of.items():
            for factor in factors:
                labels_along[name, varying(factor)[0]] = factor.reshape(-1)
        outer = tracer.sets.alike_in_weights(torch.cat([torch.zeros(0, dtype=torch.int64), *tracer.outer]))
        self._outer = {key for key, labels in labels_along.items() if bool(outer[labels].any())}
        self._registered = {key: labels for key, labels in labels_along.items() if key[0] in tensors}
        self._cached = {key: labels for key, labels in labels_along.items() if key[0] not in tensors}
        self.keys, self.units_of = self._grouped()
        self._place = torch.full((tracer.sets.count, 2), -1)
        for number, units in enumerate(self.units_of):
            self._place[units, 0], self._place[units, 1] = number, torch.arange(len(units))

    def _grouped(self) -> tuple[list[tuple[tuple[str, int], ...]], list[list[int]]]:
        """Group the units that have a place along the same dimensions."""
        where: dict[int, list[tuple[str, int]]] = {}
        for key, labels in self._registered.items():
            for unit in self.units.of(labels).unique().tolist():
                if unit != FIXED:
                    where.setdefault(unit, []).append(key)
        alike: dict[tuple[tuple[str, int], ...], list[int]] = {}
        for unit, keys in where.items():
            alike.setdefault(tuple(keys), []).append(unit)
        return [*alike], [*alike.values()]

    def places(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the groups of labels, or -1, and their units in these."""
        found = self._place[self.units.of(labels)]
        return found[..., 0], found[..., 1]

    def group(self, number: int) -> Group:
        """Return a group by its number."""
        units = self.units_of[number]
        members = [self._member(number, key, self._registered[key], self._makes(*key)) for key in self.keys[number]]
        weights = [member for member in members if self._is_weight(member.name)]
        layers = dict.fromkeys(self._called(member.name) for member in weights if member.makes)
        spanned = next((self.units.spanned[unit] for unit in units if unit in self.units.spanned), "")
        first = next((member for member in weights if member.makes), members[0])
        # A recurrent layer has rows for each gate of a channel.
        gated = isinstance(self.modules.get(first.layer), (nn.RNNBase, nn.RNNCellBase))
        width = len(units) if gated else int((first.units >= 0).sum())
        cached = tuple(
            self._member(number, key, labels, False)
            for key, labels in self._cached.items()
            if bool((self.places(labels)[0] == number).any())
        )
        lasting = not self.units.lasting.isdisjoint(units)
        return Group(len(units), width, tuple(members), tuple(layers), spanned, lasting, cached)

    def _member(self, number: int, key: tuple[str, int], labels: Tensor, makes: bool) -> Member:
        (name, dim), (groups, units) = key, self.places(labels)
        return Member(name, _layer_of(name), dim, units.masked_fill(groups != number, -1), makes)

    def fixed(self) -> dict[str, str]:
        """Return the layers whose outputs stay, with the reason."""
        fixed = dict[str, str]()
        for (name, dim), labels in self._registered.items():
            units = self.units.all[labels].unique().tolist()
            stays = all(unit in self.units.fixed for unit in units)
            if self._is_weight(name) and self._makes(name, dim) and stays:
                fixed.setdefault(self._called(name), self.units.fixed[units[0]])
        return fixed

    def costs(self) -> Iterator[Cost]:
        """Yield the multiply-accumulates, with the widths that change."""
        for macs, widths, path in self.tracer.products:
            places = [self.places(labels) for labels in widths]
            yield macs, tuple(width for width in places if bool((width[0] >= 0).any())), path

    def attributes(self) -> list[Attribute]:
        """Return attributes of modules that have the value of a size that was written."""
        found = dict[object, Attribute]()
        for size in self.tracer.sizes:
            groups, units = self.places(size.labels)
            module = self.modules[size.path]
            sure = type(module).__module__.startswith("torch.nn.")
            told = sure and next(module.parameters(), None) is not None and not isinstance(module, _ConvNd)
            if told or not bool((groups >= 0).any()):
                continue
            for name, value in vars(module).items():
                if type(value) is int and value == size.size and (not sure or name in _OWN):
                    key = size.path, name, *groups.tolist(), *units.tolist()
                    found.setdefault(key, Attribute(size.path, name, groups, units, sure))
        return [*found.values()]

    def _is_weight(self, name: str) -> bool:
        return isinstance(self.tensors[name], nn.Parameter) and self.tensors[name].dim() > 1

    def _called(self, name: str) -> str:
        """Return what a plan calls a tensor's owner: torch's layers by path, other modules' tensors by name."""
        layer = _layer_of(name)
        return layer if layer and isinstance(self.modules.get(layer), STANDARD) else name

    def _makes(self, name: str, dim: int) -> bool:
        """Whether a dimension of a tensor is what its layer puts out, by its kind or by products that were seen."""
        module, rank = self.modules.get(_layer_of(name)), self.tensors[name].dim()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or (isinstance(module, _ConvTransposeNd) and rank > 1):
            return dim == 1
        if isinstance(module, (nn.Linear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, _ConvNd)):
            return dim == 0
        if any((name, other) in self._outer for other in range(rank)):
            return (name, dim) in self._outer
        return dim == rank - 1


def _layer_of(name: str) -> str:
    """The path of the layer that a tensor belongs to."""
    return name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]


# What torch's own layers know that no tensor of theirs tells, at least where they have none.
_OWN = {"groups", "num_features", "num_channels"}
