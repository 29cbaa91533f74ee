"""Which: selects the tensors of a model that a technique works on, by name pattern and module type.

Names are dotted module paths from the root, without the ``_orig_mod`` that `torch.compile` puts in.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_compress.errors import CompressionError, invalid, nearest
from lightning_compress.messages import by_reason
from lightning_compress.modules.layer_weights import (
    NO_WEIGHT,
    PRUNABLE,
    UNSURE,
    holds_list_of,
    lies_in_a_list,
    magnitude,
    named_weights,
    own_parameters,
    why_no_weight,
)
from lightning_compress.modules.paths import compressible_modules

Scope = Literal["global", "layer"]
"""``global`` ranks the elements of all targets together, ``layer`` those of each layer by themselves."""


@dataclass(frozen=True)
class Target:
    """Holds one targeted tensor.

    Attributes:
        name: dotted name of the parameter, by its first owner.
        layer: the owning layer's dotted path.
        parameter: the parameter itself.
        magnitude: name and parameter of the magnitudes of a weight norm, if this tensor is its direction.
    """

    name: str
    layer: str
    parameter: nn.Parameter
    magnitude: tuple[str, nn.Parameter] | None = None


@dataclass(frozen=True)
class Selection:
    """Holds what `Targets.select` found.

    Attributes:
        targets: the targeted tensors.
        skipped: the names of the other weights, with the reasons.
        missed: the patterns of ``include``, and the ``types``, that select nothing, with the reasons.
    """

    targets: tuple[Target, ...]
    skipped: dict[str, str]
    missed: dict[str, str]

    @property
    def warning(self) -> str:
        """Says what was named and isn't targeted; empty if there is nothing."""
        reasons = by_reason(self.missed)
        missed = "; ".join(f"{', '.join(names)}: {why}" for why, names in reasons.items())
        return f"`targets` names what isn't targeted. {missed}." if missed else ""

    @property
    def numel(self) -> int:
        """Counts the targeted elements, each tensor once."""
        return sum(target.parameter.numel() for target in self.targets)


def matches(path: str, pattern: str) -> bool:
    """Tell whether a module path, or a container that it lies in, matches an `fnmatch` pattern.

    Example:
        >>> matches("backbone.conv1", "backbone"), matches("head", "backbone*")
        (True, False)
    """
    parts = path.split(".")
    return any(fnmatchcase(".".join(parts[:depth]), pattern) for depth in range(1, len(parts) + 1))


def names_itself(pattern: str, path: str) -> bool:
    """Tell whether the last part of a pattern names this module or parameter, and not all that lies in a container.

    Example:
        >>> names_itself("*.experts", "net.experts"), names_itself("net.*", "net.experts")
        (True, False)
    """
    return fnmatchcase(path, pattern) and bool(pattern.rpartition(".")[2].strip("*?"))


@dataclass(frozen=True)
class Targets:
    """Selects weights by the dotted path of their layer, or of the parameter itself.

    By default: the weights of every trainable convolution, linear, recurrent and attention layer; never biases, norms,
    embeddings or frozen parameters. An embedding is targeted when an ``include`` pattern names it exactly or ``types``
    lists its class. Of a layer of your own, which ``types`` lists or ``include`` names, all parameters of two
    dimensions and more are weights, whatever they are called, also those in a list or dict of parameters; biases and
    scales, by name or shape, are not. An ``include`` pattern may also name a parameter, such as ``moe.experts.up``. A
    tensor with several owners (tied weights) is targeted once, and only if all owners are.

    Args:
        include: `fnmatch` patterns on dotted module paths; a container means its subtree. A pattern that matches no
            module, or has no wildcard in its last part, may match the path of a parameter. None means everything.
        exclude: patterns that are taken out again.
        types: module classes whose weights are targeted in place of the default ones.

    Raises:
        CompressionError: ``include`` or ``exclude`` is a single string.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [target.name for target in Targets(exclude=["2"]).select(model).targets]
        ['0.weight']
    """

    include: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    types: Sequence[type[nn.Module]] | None = None

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            if isinstance(getattr(self, name), str):
                raise invalid(name, "be a list of patterns", getattr(self, name), f'Write {name}=["..."].')

    def select(self, model: nn.Module) -> Selection:
        """Find the targeted tensors of ``model``, each once, in the order of its modules. Changes nothing.

        Raises:
            CompressionError: a pattern matches neither module nor parameter, nothing is left to target, or a layer is
                still lazy.
        """
        layers = compressible_modules(model, every_name=True)
        modules = {path: module for path, module in layers.items() if not lies_in_a_list(path, layers)}
        names = [_join(path, name) for path, module in modules.items() for name, _ in own_parameters(module)]
        self._check_patterns(list(filter(None, layers)), names)
        owners: dict[int, list[tuple[str, str, nn.Parameter]]] = {}
        refused: dict[int, str] = {}
        for path, module in modules.items():
            for name, parameter in own_parameters(module):
                owners.setdefault(id(parameter), []).append((path, name, parameter))
                if reason := self._refusal(path, name, parameter, modules):
                    refused.setdefault(id(parameter), reason)
        targets, skipped = [], {}
        for key, found in owners.items():
            path, name, parameter = found[0]
            full, reason = _join(path, name), refused.get(key, "")
            if reason:
                skipped[full] = reason
            elif is_lazy(parameter):
                raise CompressionError(
                    f"`{full}` must have its shape. Received: a lazy layer that hasn't run yet. "
                    "Run one forward pass before training, or build the layer with its sizes."
                )
            else:
                targets.append(Target(full, path, parameter, magnitude(modules[path], full, name)))
        skipped = {full: reason for full, reason in skipped.items() if reason not in NO_WEIGHT}
        missed = dict(self._missed(modules, targets, skipped))
        if not targets:
            left = [f"{name}: {why}" for name, why in missed.items()] or [_shown(skipped)]
            kinds = ", ".join(sorted({type(module).__name__ for module in modules.values()})[:8])
            raise CompressionError(
                f"`targets` must select at least one trainable weight. Received: {self}. "
                + (f"Left out: {'; '.join(left)}." if any(left) else f"The model's layers are of type {kinds}.")
            )
        return Selection(tuple(targets), skipped, missed)

    def check_patterns(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the modules of ``model`` by path, after a check that every pattern matches one.

        Raises:
            CompressionError: a pattern matches no module; the error names the nearest paths.
        """
        layers = compressible_modules(model, every_name=True)
        self._check_patterns(list(filter(None, layers)))
        return layers

    def _check_patterns(self, paths: Sequence[str], parameters: Sequence[str] = ()) -> None:
        for pattern in (*(self.include or ()), *self.exclude):
            if not any(matches(path, pattern) for path in (*paths, *parameters)):
                raise CompressionError(
                    f"`targets` pattern {pattern!r} must match a module. Received: a model without such a path. "
                    + nearest(pattern, [*paths, *(name for name in parameters if not name.endswith(_USUAL))])
                )

    def leaves_out(self, path: str) -> str:
        """Say why the patterns leave out the module at ``path``; empty if they don't."""
        if self.include is not None and not any(matches(path, pattern) for pattern in self.include):
            return "not included"
        return "excluded" if any(matches(path, pattern) for pattern in self.exclude) else ""

    def _refusal(self, path: str, name: str, parameter: nn.Parameter, modules: Mapping[str, nn.Module]) -> str:
        """Say why this parameter isn't targeted; empty if it is."""
        full, module = _join(path, name), modules[path]
        include = [pattern for pattern in self.include or () if _reaches(pattern, path, full, modules)]
        direct = [pattern for pattern in include if not matches(path, pattern)]
        if full not in direct and (reason := self._kind(path, name, bool(direct), modules)):
            return reason
        if self.include is not None and not include:
            return "not included"
        if any(_reaches(pattern, path, full, modules) for pattern in self.exclude):
            return "excluded"
        if not parameter.requires_grad:
            return "frozen"
        if not is_lazy(parameter) and not parameter.numel():
            return "empty"
        named = path in (self.include or ()) or full in direct or isinstance(module, tuple(self.types or ()))
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and not named:
            return "embedding (name it exactly in `include`, or its class in `types`, to target it)"
        return ""

    def _kind(self, path: str, name: str, direct: bool, modules: Mapping[str, nn.Module]) -> str:
        """Say why a parameter is no weight, or its layer not targeted; empty if it is a weight of a targeted layer."""
        module = modules[path]
        types = (*PRUNABLE, nn.Embedding, nn.EmbeddingBag) if self.types is None else tuple(self.types)
        own = tuple(kind for kind in types if kind is nn.Module or not kind.__module__.startswith("torch.nn.modules."))
        known = tuple(kind for kind in types if kind not in own)
        if direct or isinstance(module, own) or holds_list_of(module, name, types):
            return why_no_weight(module, name)
        if isinstance(module, known) and name in named_weights(module):
            return ""
        reason = why_no_weight(module, name)
        named = any(names_itself(pattern, path) for pattern in self.include or ())
        if self.types is None and named and self._is_leaf(path, modules):
            return reason
        if isinstance(module, known) or (reason and not reason.startswith(UNSURE)):
            return reason or NO_WEIGHT[1]
        return f"{type(module).__name__} {_OTHER_TYPE} (name it in `types`, or this in `include`)"

    def _is_leaf(self, path: str, modules: Mapping[str, nn.Module]) -> bool:
        """Tell whether no layer of a targeted type lies below a module."""
        types = tuple(self.types or PRUNABLE)
        return not any(inner.startswith(f"{path}.") and isinstance(modules[inner], types) for inner in modules)

    def _missed(
        self, modules: Mapping[str, nn.Module], targets: Collection[Target], skipped: Mapping[str, str]
    ) -> Iterator[tuple[str, str]]:
        """Yield, with reasons, what was named and has nothing that is targeted, and tensors that may be no weights."""
        none = "it has no parameter of two dimensions or more; name one in `include` to target it"
        for pattern in self.include or ():
            if not any(_reaches(pattern, target.layer, target.name, modules) for target in targets):
                under = {full: why for full, why in skipped.items() if matches(full, pattern)}
                yield f"`{pattern}`", _shown(under) or none
        for kind in self.types or ():
            paths = [path for path, module in modules.items() if isinstance(module, kind)]
            layers = [modules[target.layer] for target in targets]
            if not any(isinstance(module, kind) for layer in layers for module in (layer, *layer.children())):
                under = {full: why for full, why in skipped.items() if full.rpartition(".")[0] in paths}
                known = nearest(kind.__name__, {type(module).__name__ for module in modules.values()})
                yield kind.__name__, (_shown(under) or none) if paths else f"the model has no such layer. {known}"
        for full, why in skipped.items():
            named = any(names_itself(pattern, full[:end]) for pattern in self.include or () for end in _ends(full))
            path = max((path for path in modules if f"{full}.".startswith(f"{path}.")), key=len, default="")
            if why.startswith(UNSURE) or (named and _OTHER_TYPE in why and self._is_leaf(path, modules)):
                yield f"`{full}`", why


def _ends(path: str) -> list[int]:
    """Return the places where the parts of a dotted path end."""
    return [place for place, letter in enumerate(path) if letter == "."] + [len(path)]


_OTHER_TYPE = "isn't among the targeted types"
_USUAL = ("weight", "bias")
"""Ends of parameter names that an error doesn't suggest, as it suggests their layers."""


def _join(path: str, name: str) -> str:
    return f"{path}.{name}".lstrip(".")


def _shown(skipped: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({reason})" for name, reason in list(skipped.items())[:5])


def _reaches(pattern: str, path: str, full: str, modules: Collection[str]) -> bool:
    """Tell whether a pattern means the layer at ``path``, or its parameter ``full`` itself."""
    if matches(path, pattern) or not matches(full, pattern):
        return matches(path, pattern)
    literal = not set("*?[") & set(pattern.rpartition(".")[2])
    return literal or not any(matches(module, pattern) for module in modules if module)
