"""Groups of channels that go together, as plain data: found by tracing a model, applied by `remove`."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_compress.channels.cutting.cached import cached_tensors
from lightning_compress.channels.cutting.corrections import WrittenSizes, written_sizes
from lightning_compress.channels.cutting.cut import modules_of, named_tensors
from lightning_compress.channels.cutting.layers import STANDARD
from lightning_compress.channels.cutting.written import WRITTEN, Correction, corrected_sizes
from lightning_compress.channels.tracing.deterministic import deterministic
from lightning_compress.channels.tracing.disjoint_sets import FIXED
from lightning_compress.channels.tracing.notes import Product, Size
from lightning_compress.channels.tracing.outputs import tensors_in
from lightning_compress.channels.tracing.tracer import Tracer, following
from lightning_compress.modules.paths import compressible_modules

Run = Callable[[nn.Module], Any]
"""Calls a model, or a copy of it, and returns what it puts out. A ``reason`` on it says why that keeps its size."""


@dataclass(frozen=True)
class Member:
    """A dimension of a tensor that belongs to a group, wholly or in part.

    Attributes:
        name: of the parameter or buffer.
        dim: its dimension.
        units: int64, for each place along the dimension the group's unit, or -1.
        makes: whether the dimension is what a layer puts out, not what it takes in.
    """

    name: str
    dim: int
    units: Tensor
    makes: bool


@dataclass(frozen=True)
class Group:
    """Units that are alike: the channels of some layers, the heads of an attention layer.

    Attributes:
        size: how many units.
        width: how many channels these are in the first layer.
        members: the dimensions that shrink with it.
        layers: paths of the layers that make these channels.
        spanned: what is computed across its units, if something is; then removal isn't exact.
        lasting: whether it stays spanned, even where an example doesn't show it.
        cached: dimensions of tensors that modules keep beside their own, which shrink too.
    """

    size: int
    width: int
    members: tuple[Member, ...]
    layers: tuple[str, ...]
    spanned: str = ""
    lasting: bool = False
    cached: tuple[Member, ...] = ()

    @property
    def name(self) -> str:
        """The first layer that makes its channels."""
        return self.layers[0] if self.layers else self.members[0].name


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates that are proportional to widths.

    Attributes:
        macs: with all channels.
        widths: for each width, which group's unit each place belongs to; -1 stays.
    """

    macs: int
    widths: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class Attribute:
    """A number that a module keeps and that follows a width, such as its heads.

    Attributes:
        path: of the module.
        name: of the attribute.
        groups: for each place of the width its group, or -1.
        units: and its unit in that.
        sure: whether the number follows for certain; else it only has the right value, and is to be tried.
    """

    path: str
    name: str
    groups: Tensor
    units: Tensor
    sure: bool


@dataclass(frozen=True)
class DependencyGroups:
    """What of a model can go.

    Attributes:
        groups: in the order of the model's tensors.
        costs: the multiply-accumulates that change.
        attributes: numbers that follow.
        written: calls whose sizes are corrected.
        corrected: path of a module to the corrections that it has: see `written`.
        fixed: layers whose outputs stay, with the reason.
        splits: keys of splits to the groups that they concern.
        shapes: of all tensors, when this was found.
        counted: names of the parameters that count as the model's.
        macs: multiply-accumulates of the first run.
    """

    groups: tuple[Group, ...]
    costs: tuple[Cost, ...]
    attributes: tuple[Attribute, ...]
    written: tuple[WrittenSizes, ...]
    corrected: Mapping[str, list[Correction]]
    fixed: Mapping[str, str]
    splits: Mapping[str, frozenset[int]]
    shapes: Mapping[str, tuple[int, ...]]
    counted: tuple[str, ...]
    macs: int

    def only(self, numbers: Sequence[int]) -> DependencyGroups:
        """The same with only some of its groups; what the others have stays."""
        place = torch.full((len(self.groups) + 1,), -1)
        place[list(numbers)] = torch.arange(len(numbers))
        costs = [replace(cost, widths=tuple((place[one], units) for one, units in cost.widths)) for cost in self.costs]
        attributes = [replace(one, groups=place[one.groups]) for one in self.attributes]
        written = [one.renumbered(place) for one in self.written]
        return replace(
            self,
            groups=tuple(self.groups[number] for number in numbers),
            costs=tuple(costs),
            attributes=tuple(attributes),
            written=tuple(written),
        )


def find_structure(model: nn.Module, runs: Sequence[Run], choices: Mapping[str, int]) -> DependencyGroups:
    """Trace some runs of ``model`` and say which channels hang together in all of them.

    Args:
        model: nothing of it is changed but what the runs change themselves.
        runs: each calls the model in some way and returns what it puts out, whose shape must stay.
        choices: how splits are taken: see `Tracer`.
    """
    tensors, beside = named_tensors(model), cached_tensors(model)  # held, as the tracer knows them by their ids
    tracer = Tracer({**tensors, **beside}, _numbers(model), choices)
    with deterministic(), following(tracer, model):
        for number, run in enumerate(runs):
            tracer.counting = number == 0
            tracer.pin(list(tensors_in(run(model))), getattr(run, "reason", "an output"), output=True)
            for name, tensor in cached_tensors(model).items():
                tracer.name(name, tensor)
    return _read(tracer, model, tensors)


def _numbers(model: nn.Module) -> dict[str, set[int]]:
    numbers = {}
    for path, module in modules_of(model).items():
        mine = {value for value in vars(module).values() if type(value) is int and value > 1}
        numbers[path] = mine | {now for before, now in corrected_sizes(module) if before in mine}
    return numbers


def _read(tracer: Tracer, model: nn.Module, tensors: Mapping[str, Tensor]) -> DependencyGroups:
    units = tracer.atoms.resolve()
    modules = modules_of(model)
    along: dict[tuple[str, int], Tensor] = {}
    for name, factors in tracer.labels_of.items():
        for factor in factors:
            dim = next(dim for dim, size in enumerate(factor.shape) if size > 1)
            along[name, dim] = factor.reshape(-1)
    outer = tracer.atoms.alike_in_weights(torch.cat([torch.zeros(0, dtype=torch.int64), *tracer.outer]))
    made_by = {key for key, atoms in along.items() if bool(outer[atoms].any())}

    def makes(name: str, dim: int) -> bool:
        return _makes(modules, name, dim, tensors[name], made_by)

    registered = {key: atoms for key, atoms in along.items() if key[0] in tensors}
    beside = {key: atoms for key, atoms in along.items() if key not in registered}
    where: dict[int, list[tuple[str, int]]] = {}
    for key, atoms in registered.items():
        for unit in units.of(atoms).unique().tolist():
            if unit != FIXED:
                where.setdefault(unit, []).append(key)
    alike: dict[tuple[tuple[str, int], ...], list[int]] = {}
    for unit, found in where.items():
        alike.setdefault(tuple(found), []).append(unit)
    place = torch.full((tracer.atoms.count, 2), -1)
    groups = []
    for number, (keys, mine) in enumerate(alike.items()):
        place[mine, 0], place[mine, 1] = number, torch.arange(len(mine))
        groups.append((keys, mine))

    def places(atoms: Tensor) -> tuple[Tensor, Tensor]:
        found = place[units.of(atoms)]
        return found[..., 0], found[..., 1]

    made = []
    for number, (keys, mine) in enumerate(groups):
        members = []
        for name, dim in keys:
            group, unit = places(along[name, dim])
            members.append(Member(name, dim, unit.masked_fill(group != number, -1), makes(name, dim)))
        weights = [
            one for one in members if isinstance(tensors[one.name], nn.Parameter) and tensors[one.name].dim() > 1
        ]
        layers = dict.fromkeys(_called(modules, one.name) for one in weights if one.makes)
        spanned = next((units.spanned[unit] for unit in mine if unit in units.spanned), "")
        lasting = not units.lasting.isdisjoint(mine)
        first = next((one for one in weights if one.makes), members[0])
        # A recurrent layer has rows for each gate of a channel.
        gated = isinstance(modules.get(layer_of(first.name)), (nn.RNNBase, nn.RNNCellBase))
        width = len(mine) if gated else int((first.units >= 0).sum())
        cached = []
        for (name, dim), atoms in beside.items():
            group, unit = places(atoms)
            if bool((group == number).any()):
                cached.append(Member(name, dim, unit.masked_fill(group != number, -1), False))
        made.append(Group(len(mine), width, tuple(members), tuple(layers), spanned, lasting, tuple(cached)))
    fixed = dict[str, str]()
    for (name, dim), atoms in registered.items():
        roots = units.all[atoms].unique().tolist()
        weight = isinstance(tensors[name], nn.Parameter) and tensors[name].dim() > 1
        if weight and makes(name, dim) and all(root in units.fixed for root in roots):
            fixed.setdefault(_called(modules, name), units.fixed[roots[0]])
    return DependencyGroups(
        tuple(made),
        tuple(Cost(one.macs, tuple(places(labels) for labels in one.widths)) for one in _live(tracer.products, units)),
        tuple(_attributes(tracer.sizes, modules, places)),
        written_sizes(tracer.written, places),
        {path: vars(module)[WRITTEN] for path, module in modules.items() if WRITTEN in vars(module)},
        fixed,
        {key: frozenset(places(torch.cat(atoms))[0].unique().tolist()) - {-1} for key, atoms in tracer.splits.items()},
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        _counted(model, tensors),
        tracer.macs,
    )


def _counted(model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    layers = compressible_modules(model, every_name=True)
    return tuple(
        name for name, one in tensors.items() if isinstance(one, nn.Parameter) and name.rpartition(".")[0] in layers
    )


def _live(products: list[Product], units: Any) -> list[Product]:
    return [one for one in products if any(bool((units.of(labels) != FIXED).any()) for labels in one.widths)]


def layer_of(name: str) -> str:
    """The path of the layer that a tensor belongs to."""
    return name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]


def _called(modules: Mapping[str, nn.Module], name: str) -> str:
    """How a plan calls what a tensor belongs to: torch's layers by their path, other modules' tensors by their own."""
    layer = layer_of(name)
    return layer if layer and isinstance(modules.get(layer), STANDARD) else name


def _makes(
    modules: Mapping[str, nn.Module], name: str, dim: int, tensor: Tensor, outer: Container[tuple[str, int]]
) -> bool:
    """Whether a dimension of a tensor is what its layer puts out; ``outer`` are those that products were seen to."""
    module = modules.get(layer_of(name))
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return dim == 1
    if isinstance(module, _ConvTransposeNd) and tensor.dim() > 1:
        return dim == 1
    if isinstance(module, (nn.Linear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, _ConvNd)):
        return dim == 0
    if any((name, one) in outer for one in range(tensor.dim())):
        return (name, dim) in outer
    return dim == tensor.dim() - 1


# What torch's own layers know that no tensor of theirs tells, at least where they have none.
_OWN = {"groups", "num_features", "num_channels"}


def _attributes(
    sizes: list[Size], modules: Mapping[str, nn.Module], places: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> list[Attribute]:
    found = list[Attribute]()
    for size in sizes:
        groups, units = places(size.labels)
        module = modules[size.path]
        sure = type(module).__module__.startswith("torch.nn.")
        if not bool((groups >= 0).any()) or (
            sure and next(module.parameters(), None) is not None and not _is_conv(module)
        ):
            continue
        for name, value in vars(module).items():
            if type(value) is int and value == size.size and (not sure or name in _OWN):
                one = Attribute(size.path, name, groups, units, sure)
                if not any(_same(one, other) for other in found):
                    found.append(one)
    return found


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd)


def _same(one: Attribute, other: Attribute) -> bool:
    return (
        (one.path, one.name) == (other.path, other.name)
        and torch.equal(one.groups, other.groups)
        and torch.equal(one.units, other.units)
    )
