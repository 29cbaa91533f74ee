"""`prune_`: one pruning event on any module, no Trainer needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressionError, invalid
from lightning_compress.pruning.masks import Masks, Scope, applied, check_masks, grow
from lightning_compress.pruning.methods import Rule, resolve
from lightning_compress.targets import Target, Targets


def prune_(
    model: nn.Module,
    sparsity: float | None = None,
    method: str = "l1_unstructured",
    scope: Scope = "global",
    targets: Targets | None = None,
    *,
    dim: int = 0,
    norm: float = 2.0,
    masks: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Masks:
    """Zero the least important weights of ``model`` in place and return the masks.

    Exactly ``round(sparsity * N)`` of the N targeted weights are masked (``scope="global"``), or of each tensor's
    (``scope="layer"``); structured methods take whole slices along ``dim``, the nearest number.

    Args:
        model: any module.
        sparsity: the fraction to mask, in [0, 1); None for a method that fixes it itself.
        method: ``random_unstructured``, ``l1_unstructured``, ``random_structured``, ``ln_structured``,
            ``custom_from_mask``, or the import path of a `torch.nn.utils.prune.BasePruningMethod` subclass.
        scope: rank all targeted weights together, or each tensor by itself.
        targets: which weights; by default those of all trainable conv, linear, recurrent and attention layers.
        dim: structured methods: the dimension whose slices are the units; 0 is filters and rows.
        norm: ``ln_structured``: the norm's order.
        masks: what is pruned already and stays so; with ``custom_from_mask``, the masks themselves.
        seed: of the random methods; the global generators aren't touched.

    Returns:
        Parameter name to bool mask, False where pruned.

    Raises:
        CompressionError: bad arguments, or nothing to prune; the model is unchanged then.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> masks = prune_(model, 0.75)
        >>> sum(int((~mask).sum()) for mask in masks.values())
        72
    """
    rule = check_arguments(method, sparsity, scope, dim, norm)
    if rule.name == "custom_from_mask" and masks is None:
        raise invalid("masks", "be given for method='custom_from_mask'", None, "Pass masks={name: mask}.")
    found = (targets or Targets()).select(model).targets
    weights: dict[str, Tensor] = {target.name: target.parameter for target in found}
    check_dim(rule, weights)
    grown = next_masks(weights, check_masks(masks or {}, weights), sparsity, rule, scope, seed)
    magnitudes = magnitudes_of(found)
    apply_masks_({**weights, **dict(magnitudes.values())}, applied(grown, magnitudes))
    return grown


def magnitudes_of(targets: Iterable[Target]) -> dict[str, tuple[str, Tensor]]:
    """Names of the targets that are a weight norm's direction, each with name and tensor of its magnitudes."""
    return {target.name: target.magnitude for target in targets if target.magnitude is not None}


def next_masks(
    weights: Mapping[str, Tensor], masks: Masks, sparsity: float | None, rule: Rule, scope: Scope, seed: int
) -> Masks:
    """`masks.grow` under a random state of its own."""
    if rule.name == "custom_from_mask":
        return masks
    with torch.no_grad(), own_random_state(seed):
        return grow(weights, masks, sparsity or 0.0, rule, scope)


@torch.no_grad()
def apply_masks_(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Multiply each weight by its mask, in place; one that is inf or NaN stays so.

    Example:
        >>> weight = torch.ones(3)
        >>> apply_masks_({"w": weight}, {"w": torch.tensor([True, False, True])})
        >>> weight
        tensor([1., 0., 1.])
    """
    names = [name for name in masks if name in weights]
    if names:
        torch._foreach_mul_([weights[name] for name in names], [masks[name] for name in names])


def check_arguments(method: str, sparsity: float | None, scope: str, dim: int, norm: float) -> Rule:
    """The rule, once all that can be checked without a model has been.

    Raises:
        CompressionError: an argument is out of range, or sparsity and method don't go together.
    """
    rule = resolve(method, dim, norm)
    if rule.fixes_sparsity and sparsity is not None:
        raise invalid("sparsity", f"be left out: method={method!r} fixes it itself", sparsity)
    if not rule.fixes_sparsity:
        if sparsity is None:
            raise invalid("sparsity", f"be given for method={method!r}", sparsity, "0.9 zeroes nine weights of ten.")
        if not 0.0 <= sparsity < 1.0:
            raise invalid("sparsity", "lie in [0, 1)", sparsity, "It is the fraction of weights that become zero.")
    if scope not in ("global", "layer"):
        raise invalid("scope", "be 'global' or 'layer'", scope)
    if scope == "global" and rule.structured and rule.name not in ("ln_structured", "random_structured"):
        raise invalid("scope", f"be 'layer' for method={method!r}, whose units compare within a layer only", scope)
    return rule


def check_dim(rule: Rule, weights: Mapping[str, Tensor]) -> None:
    """Raise if a structured rule's ``dim`` isn't a dimension of some weight."""
    for name, weight in weights.items() if rule.structured else ():
        if not -weight.dim() <= rule.dim < weight.dim():
            raise CompressionError(
                f"`dim` must be a dimension of every target. Received: dim={rule.dim} for {name} of shape "
                f"{tuple(weight.shape)}. Exclude the layer, or choose another dim."
            )


@contextmanager
def own_random_state(seed: int) -> Iterator[None]:
    """Draw from a state of our own, and put the global ones back."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
