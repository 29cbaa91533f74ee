"""`PruningRecipe`: what is pruned and how much of it, checked as far as that goes without a model."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from torch.nn.utils import prune

from lightning_compress.errors import CompressionError, invalid, nearest
from lightning_compress.pruning.budget import SparsityBudget
from lightning_compress.pruning.criteria import CRITERIA, Criterion
from lightning_compress.pruning.methods import Calibrated, LowestScores, PruningMethod, TorchMethod, UnitMethod
from lightning_compress.pruning.n_m import Pattern
from lightning_compress.targets import Scope, Targets

METHOD = "lamp"
"""Magnitudes as they are compare badly between layers, whose weights differ in scale by their fan-in alone: some layers
are emptied while others stay whole. ``benchmarks/defaults.md`` says what that costs."""

TORCH_METHODS: dict[str, type[prune.BasePruningMethod]] = {
    "random_unstructured": prune.RandomUnstructured,
    "l1_unstructured": prune.L1Unstructured,
    "random_structured": prune.RandomStructured,
    "ln_structured": prune.LnStructured,
    "custom_from_mask": prune.CustomFromMask,
}

CALIBRATED = {"wanda": False, "least_squares": True}
"""Methods that go by what layers are given, and whether they re-solve what stays."""


@dataclass(frozen=True)
class PruningRecipe:
    """Says what is pruned and how much of it, checked as far as that goes without a model."""

    method: PruningMethod
    budget: SparsityBudget
    targets: Targets
    regrow: bool = False


def make_recipe(
    method: str,
    sparsity: float | None,
    scope: Scope,
    targets: Targets,
    overrides: Mapping[str, float] | None,
    max_layer_sparsity: float,
    n_m: str | None,
    dim: int,
    norm: float,
    regrow: bool = False,
) -> PruningRecipe:
    """Check `prune_`'s arguments, and ``regrow``, each by itself and together, and make their recipe."""
    chosen = find_method(method, dim, norm, n_m)
    fixed = f"method={method!r}" if chosen.fixes_sparsity else f"n_m={n_m!r}" if n_m is not None else ""
    if fixed and sparsity is not None:
        raise invalid("sparsity", f"be left out: {fixed} fixes it itself", sparsity)
    if not fixed and sparsity is None:
        raise invalid("sparsity", f"be given for method={method!r}", sparsity, "0.9 zeroes nine weights of ten.")
    budget = SparsityBudget(sparsity, scope, overrides, max_layer_sparsity)
    if isinstance(chosen, LowestScores) and chosen.pattern is not None:
        budget = replace(budget, sparsity=1 - chosen.pattern.n / chosen.pattern.m)
    if scope == "global" and not chosen.compares_layers:
        raise invalid("scope", f"be 'layer' for method={method!r}, whose units compare within a layer only", scope)
    if regrow and (chosen.calibrates or not isinstance(chosen, LowestScores)):
        raise invalid("regrow", f"be False with method={method!r}; it goes with {', '.join(CRITERIA)}", regrow)
    return PruningRecipe(chosen, budget, targets, regrow)


def check_batches(count: int) -> None:
    """Raise if ``calibration_batches`` is no number of batches."""
    if not isinstance(count, int) or count < 1:
        raise invalid("calibration_batches", "be at least 1", count)


def find_method(method: str, dim: int = 0, norm: float = 2.0, n_m: str | None = None) -> PruningMethod:
    """Find the pruning method of a name in `CRITERIA`, `CALIBRATED` or `TORCH_METHODS`, or of an import path.

    At the path stands a subclass of `BasePruningMethod`, or a criterion: a `Criterion`, or just its function. One of
    three arguments needs gradients.

    Raises:
        CompressionError: no such name, nothing at that path, it is neither of these, or it can't follow N:M.

    Example:
        >>> find_method("ln_structured", dim=0, norm=1.0).structured
        True
    """
    pattern = None if n_m is None else Pattern.parse(n_m)
    if isinstance(method, str) and method in CALIBRATED:
        return Calibrated(CRITERIA["lamp"], pattern, refits=CALIBRATED[method])
    known = {**TORCH_METHODS, **CRITERIA}.get(method) if isinstance(method, str) else None
    found: Any = known or _imported(method)
    if found is prune.L1Unstructured:
        found = CRITERIA["magnitude"]
    if isinstance(found, Criterion):
        return LowestScores(found, pattern)
    if n_m is not None:
        raise invalid(
            "n_m", f"be left out with method={method!r}; N:M goes with {', '.join([*CRITERIA, *CALIBRATED])}", n_m
        )
    return UnitMethod(found, dim, norm) if found.PRUNING_TYPE == "structured" else TorchMethod(found)


def _imported(method: object) -> Criterion | type[prune.BasePruningMethod]:
    must = "be a pruning rule or the import path of one"
    if inspect.isroutine(method) or isinstance(method, type | prune.BasePruningMethod):
        named: Any = type(method) if isinstance(method, prune.BasePruningMethod) else method
        raise invalid("method", must, method, f"Write method='{named.__module__}.{named.__qualname__}'.")
    fraction: Any = None
    with suppress(TypeError, ValueError, OverflowError):
        fraction = float(method)  # type: ignore[arg-type]
    if fraction is not None:
        fraction = fraction / 100 if 1 < fraction < 100 else fraction
        share = f"{fraction:g}" if 0 <= fraction < 1 else "..."
        raise invalid("method", must, method, f"Is it the sparsity? Write sparsity={share}, a fraction in [0, 1).")
    if not isinstance(method, str) or "." not in method:
        raise invalid("method", must, method, nearest(str(method), [*TORCH_METHODS, *CRITERIA, *CALIBRATED]))
    module, _, name = method.rpartition(".")
    try:
        found: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # the last two: of "..x" and ".x"
        raise invalid("method", must, method, f"{error}.") from error
    if isinstance(found, type) and issubclass(found, prune.BasePruningMethod):
        return _checked_class(found, method)
    return found if isinstance(found, Criterion) else _criterion_of(found, method)


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _criterion_of(function: Any, method: str) -> Criterion:
    parameters: list[inspect.Parameter] = []
    if inspect.isroutine(function):
        with suppress(ValueError):  # a builtin may have no signature
            parameters = [*inspect.signature(function).parameters.values()]
    count = sum(parameter.default is parameter.empty for parameter in parameters)
    if count in (1, 3) and not any(parameter.kind in _VARIADIC for parameter in parameters):
        return Criterion(function, needs_gradients=count == 3)
    remedy = "A criterion is a function of (weight), or of (weight, gradient, last score)."
    raise invalid("method", "name a subclass of torch.nn.utils.prune.BasePruningMethod, or a criterion", method, remedy)


def _checked_class(cls: type[prune.BasePruningMethod], method: str) -> type[prune.BasePruningMethod]:
    if getattr(cls, "PRUNING_TYPE", None) not in ("unstructured", "structured", "global"):
        raise CompressionError(
            f"`method` must set PRUNING_TYPE to 'unstructured', 'structured' or 'global'. Received: {method}."
        )
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        needed = parameter.default is parameter.empty and parameter.kind not in _VARIADIC
        if needed and name not in ("self", "amount", "dim", "n"):
            raise invalid("method", "need no argument but amount, dim and n", method, f"It needs `{name}` too.")
    return cls
