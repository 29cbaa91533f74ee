"""WHICH: selects the tensors of a model that a technique works on, by name pattern and module type.

Names are dotted module paths from the root (``_orig_mod``, which `torch.compile` puts in, is left out).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList

from lightning_compress.errors import CompressionError, invalid, nearest

PRUNABLE: tuple[type[nn.Module], ...] = (
    _ConvNd,
    nn.Linear,
    nn.Bilinear,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)
"""Layers whose weights are targeted when nothing else is said: no norms, no embeddings."""


@dataclass(frozen=True)
class Target:
    """One targeted tensor.

    Attributes:
        name: dotted name of the parameter, by its first owner.
        layer: the owning layer's dotted path.
        parameter: the parameter itself.
        magnitude: name and parameter of a weight norm's magnitudes, if this is its direction.
    """

    name: str
    layer: str
    parameter: nn.Parameter
    magnitude: tuple[str, nn.Parameter] | None = None


@dataclass(frozen=True)
class Selection:
    """What `Targets.select` found: the targets, and what was left out with the reason."""

    targets: tuple[Target, ...]
    skipped: dict[str, str]

    @property
    def numel(self) -> int:
        """How many elements are targeted, each tensor counted once."""
        return sum(target.parameter.numel() for target in self.targets)


def clean_name(name: str) -> str:
    """A dotted name without the ``_orig_mod`` parts that `torch.compile` inserts.

    Example:
        >>> clean_name("net._orig_mod.conv.weight")
        'net.conv.weight'
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def compressible_modules(model: nn.Module, every_name: bool = False) -> dict[str, nn.Module]:
    """The modules of ``model`` by clean path, without those that only help in training (``training_only``).

    The root's path is empty. A module with several names stands under the first, or under ``every_name``.
    """
    modules: dict[str, nn.Module] = {}
    helpers: list[str] = []
    for name, module in model.named_modules(remove_duplicate=not every_name):
        if getattr(module, "training_only", False):
            helpers.append(f"{name}.")
        if not f"{name}.".startswith(tuple(helpers)):
            modules[clean_name(name)] = module
    return modules


def matches(path: str, pattern: str) -> bool:
    """Whether a module path, or a container that it lies in, matches an `fnmatch` pattern.

    Example:
        >>> matches("backbone.conv1", "backbone"), matches("head", "backbone*")
        (True, False)
    """
    parts = path.split(".")
    return any(fnmatchcase(".".join(parts[:depth]), pattern) for depth in range(1, len(parts) + 1))


@dataclass(frozen=True)
class Targets:
    """Selects weights by the dotted path of their layer.

    By default: the weights of every trainable convolution, linear, recurrent and attention layer; never biases, norms,
    embeddings or frozen parameters. An embedding is targeted when an ``include`` pattern names it exactly or ``types``
    lists its class. A tensor with several owners (tied weights) is targeted once, and only if all owners are.

    Args:
        include: `fnmatch` patterns on dotted module paths; a container means its subtree. None means everything.
        exclude: patterns that are taken out again.
        types: module classes whose weights are targeted in place of the default ones.

    Raises:
        CompressionError: on `select`, if a pattern matches no module, or nothing is left to target.

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
        """The targeted tensors of ``model``, each once, in the order of its modules. Changes nothing.

        Raises:
            CompressionError: a pattern matched nothing, everything was excluded, or a layer is still lazy.
        """
        layers = self.check_patterns(model)
        owners: dict[int, list[tuple[str, str, nn.Parameter]]] = {}
        refused: dict[int, str] = {}
        for path, module in layers.items():
            weights = {name for name, _ in _weights(module, self.types)}
            for name, parameter in own_parameters(module):
                owners.setdefault(id(parameter), []).append((path, name, parameter))
                reason = self._refusal(path, module, parameter) if name in weights else "not a weight"
                if reason:
                    refused.setdefault(id(parameter), reason)
        targets, skipped = [], {}
        for key, found in owners.items():
            path, name, parameter = found[0]
            full = f"{path}.{name}".lstrip(".")
            reason = refused.get(key, "")
            if not reason:
                if is_lazy(parameter):
                    raise CompressionError(
                        f"`{full}` must have its shape. Received: a lazy layer that hasn't run yet. "
                        "Run one forward pass before training, or build the layer with its sizes."
                    )
                targets.append(Target(full, path, parameter, _magnitude(layers[path], full, name)))
            elif reason != "not a weight":
                skipped[full] = reason
            elif parameter.dim() > 1 and name.startswith("parametrizations."):
                skipped[full] = "a parametrization computes the weight, and zeros in this needn't be zeros in that"
            elif parameter.dim() > 1 and not isinstance(layers[path], (nn.LayerNorm, nn.RMSNorm)):
                skipped[full] = f"{type(layers[path]).__name__} isn't among the targeted types (name it in `types`)"
        if not targets:
            raise CompressionError(
                f"`targets` must select at least one trainable weight. Received: {self}. "
                + _why_nothing(skipped, layers)
            )
        return Selection(tuple(targets), skipped)

    def check_patterns(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules of ``model`` by clean path, once every pattern has matched one.

        Raises:
            CompressionError: a pattern matches nothing; the nearest paths are named.
        """
        layers = compressible_modules(model, every_name=True)
        for pattern in (*(self.include or ()), *self.exclude):
            if not any(matches(path, pattern) for path in layers if path):
                raise CompressionError(
                    f"`targets` pattern {pattern!r} must match a module. Received: a model without such a path. "
                    + nearest(pattern, layers)
                )
        return layers

    def leaves_out(self, path: str) -> str:
        """Why the module at ``path`` is left out by the patterns; empty if it isn't."""
        if self.include is not None and not any(matches(path, pattern) for pattern in self.include):
            return "not included"
        return "excluded" if any(matches(path, pattern) for pattern in self.exclude) else ""

    def _refusal(self, path: str, module: nn.Module, parameter: nn.Parameter) -> str:
        """Why this weight isn't targeted; empty if it is."""
        if reason := self.leaves_out(path):
            return reason
        if not parameter.requires_grad:
            return "frozen"
        if not is_lazy(parameter) and not parameter.numel():
            return "empty"
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and not self._names_embedding(path, module):
            return "embedding (name it exactly in `include`, or its class in `types`, to target it)"
        return ""

    def _names_embedding(self, path: str, module: nn.Module) -> bool:
        return path in (self.include or ()) or isinstance(module, tuple(self.types or ()))


def _why_nothing(skipped: dict[str, str], layers: dict[str, nn.Module]) -> str:
    if skipped:
        shown = ", ".join(f"{name} ({reason})" for name, reason in list(skipped.items())[:5])
        return f"Left out: {shown}."
    kinds = sorted({type(module).__name__ for module in layers.values()})
    return f"The model's layers are of type {', '.join(kinds[:8])}; name them in `types`." if kinds else "It has none."


def _weights(module: nn.Module, types: Sequence[type[nn.Module]] | None) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of one layer that count as its weights, by their names in the layer."""
    embedding = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    if not isinstance(module, tuple(types) if types is not None else PRUNABLE) and not (types is None and embedding):
        return
    for name, parameter in module.named_parameters(recurse=False):
        # weight_ih_l0, in_proj_weight, weight_v of the old weight norm; its magnitudes weight_g aren't weights.
        if "weight" in name and not name.endswith("_g") and (is_lazy(parameter) or parameter.dim() > 1):
            yield name, parameter
    for name, parametrized in getattr(module, "parametrizations", {}).items():
        # Weight norm keeps (magnitude, direction), spectral norm one tensor of the weight's shape; zeros in it are the
        # weight's. In others they needn't be.
        inner = {_WeightNorm: "original1", _SpectralNorm: "original"}.get(type(parametrized[0]), "")
        original = getattr(parametrized, inner, None) if len(parametrized) == 1 else None
        if "weight" in name and isinstance(original, nn.Parameter) and original.dim() > 1:
            yield f"parametrizations.{name}.{inner}", original


def _magnitude(module: nn.Module, full: str, name: str) -> tuple[str, nn.Parameter] | None:
    """Of a weight norm's direction, the magnitudes: of its parametrization, or of the older hook."""
    for direction, magnitude in (("original1", "original0"), ("_v", "_g")):
        if name.endswith(direction):
            other = name[: -len(direction)] + magnitude
            found = dict(own_parameters(module)).get(other)
            if found is not None:
                return full[: -len(direction)] + magnitude, found
    return None


def own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that one layer owns itself; those that a parametrization keeps count as the layer's."""
    if isinstance(module, ParametrizationList):
        return
    yield from module.named_parameters(recurse=False)
    for name, parametrized in getattr(module, "parametrizations", {}).items():
        for inner, parameter in parametrized.named_parameters(recurse=False):
            yield f"parametrizations.{name}.{inner}", parameter
