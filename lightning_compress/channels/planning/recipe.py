"""Checks the arguments of `plan_removal` and `ChannelPruning`: how channels are chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeGuard, get_args

from lightning_compress.channels.planning.importance import Importance, resolve_importance
from lightning_compress.errors import CompressionError, invalid
from lightning_compress.targets import Scope, Targets

SCOPE: Scope = "global"
LEAST = 0.1
IMPORTANCE, CALIBRATED = "l1", "outputs"
"""The importance by default, and where there are samples to measure on."""

Kind = Literal["channels", "params", "macs", "latency"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Budget:
    """What is to remain, as a fraction of what there was."""

    kind: Kind
    fraction: float


def make_budget(given: Mapping[str, float | None]) -> Budget:
    """Return the one budget that was given.

    Raises:
        CompressionError: none or several were, or one isn't a fraction.

    Example:
        >>> make_budget({"channels": None, "params": None, "macs": 0.5, "latency": None})
        Budget(kind='macs', fraction=0.5)
    """
    budgets = {kind: given[kind] for kind in KINDS if given.get(kind) is not None}
    if len(budgets) != 1:
        raise CompressionError(
            "`channels`, `params`, `macs` or `latency` must be given, exactly one of them. Received: "
            f"{', '.join(f'{kind}={value!r}' for kind, value in budgets.items()) or 'none'}. "
            "Each is the fraction that is to remain: macs=0.5 keeps half."
        )
    [(kind, fraction)] = budgets.items()
    if not _is_fraction(fraction):
        raise invalid(kind, "lie in (0, 1]", fraction, "It is the fraction that is to remain.")
    return Budget(kind, float(fraction))


@dataclass(frozen=True)
class Recipe:
    """How channels are chosen; the arguments of `plan_removal`, checked.

    Of a round on the way ``goal`` is the fraction of the last one, by which floors of layers are set.
    """

    budget: Budget
    importance: Importance
    scope: Scope
    targets: Targets
    overrides: Mapping[str, float]
    min_layer_channels: float
    round_to: int | None
    seed: int
    blocks: bool = False
    goal: float | None = None


def make_recipe(
    channels: float | None,
    params: float | None,
    macs: float | None,
    latency: float | None,
    importance: str | None,
    scope: Scope,
    targets: Targets,
    overrides: Mapping[str, float] | None,
    min_layer_channels: float,
    round_to: int | None,
    seed: int,
    blocks: bool = False,
    calibrates: bool = False,
) -> Recipe:
    """Check the arguments, and return the recipe.

    Raises:
        CompressionError: one of them is out of range.
    """
    budget = make_budget({"channels": channels, "params": params, "macs": macs, "latency": latency})
    resolved = resolve_importance((CALIBRATED if calibrates else IMPORTANCE) if importance is None else importance)
    if resolved.needs_batches and not calibrates:
        raise invalid("calibration", f"be given for importance={importance!r}", None, "It measures on these batches.")
    if scope not in ("global", "layer"):
        raise invalid("scope", "be 'global' or 'layer'", scope)
    if not isinstance(targets, Targets):
        raise invalid("targets", "be a Targets", targets, "Such as Targets(exclude=['head']).")
    if not isinstance(overrides or {}, Mapping) or not all(map(_is_fraction, (overrides or {}).values())):
        raise invalid("overrides", "map patterns to fractions that remain, in (0, 1]", overrides)
    if min_layer_channels != 0 and not _is_fraction(min_layer_channels):
        raise invalid("min_layer_channels", "lie in [0, 1]", min_layer_channels, "It is the fraction that stays.")
    if round_to is not None and (type(round_to) is not int or round_to < 1):
        raise invalid("round_to", "be a whole number, at least 1", round_to, "1 keeps any number of channels.")
    if type(seed) is not int:
        raise invalid("seed", "be a whole number", seed)
    if type(blocks) is not bool:
        raise invalid("blocks", "be True or False", blocks)
    return Recipe(budget, resolved, scope, targets, overrides or {}, min_layer_channels, round_to, seed, blocks)


def _is_fraction(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 < value <= 1.0
