"""`prune_` and `sparsity`: one pruning event on any module, no Trainer needed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_compress.errors import NoEffectWarning, invalid
from lightning_compress.messages import named
from lightning_compress.modules.calls import bind_example
from lightning_compress.modules.copying import copy_module
from lightning_compress.modules.isolation import isolated_random_state
from lightning_compress.pruning.dependents import Observations
from lightning_compress.pruning.methods import Masks
from lightning_compress.pruning.pruner import Pruner
from lightning_compress.pruning.recipe import METHOD, make_recipe
from lightning_compress.pruning.silence import observe
from lightning_compress.structure.change import require_float
from lightning_compress.targets import Scope, Targets


def prune_(
    model: nn.Module,
    sparsity: float | None = None,
    method: str = METHOD,
    scope: Scope = "global",
    targets: Targets | None = None,
    *,
    overrides: Mapping[str, float] | None = None,
    max_layer_sparsity: float = 1.0,
    n_m: str | None = None,
    dim: int = 0,
    norm: float = 2.0,
    masks: Mapping[str, Tensor] | None = None,
    inputs: Any = None,
    seed: int = 0,
) -> Masks:
    """Zero the least important weights of ``model`` in place and return the masks.

    Exactly ``round(sparsity * N)`` of the N targeted weights are masked (``scope="global"``), or of each tensor's
    (``scope="layer"``); structured methods take whole units, the nearest number: with ``dim=0`` a layer's outputs, and
    what would still speak for them is zeroed too: the layer's bias, and scale and shift of what stands behind it.

    Args:
        model: any module.
        sparsity: the fraction to mask, in [0, 1); None for a method that fixes it itself, and with ``n_m``.
        method: ``lamp``, ``l1_unstructured`` (or ``magnitude``), ``taylor``, ``movement`` (these two need gradients:
            call ``loss.backward()`` before), ``random_unstructured``, ``ln_structured``, ``random_structured``,
            ``custom_from_mask``, or the import path of a `torch.nn.utils.prune.BasePruningMethod` subclass, of a
            function that scores a layer's weights, or of a `pruning.criteria.Criterion`.
        scope: rank all targeted weights together, or each tensor by itself.
        targets: which weights; by default those of all trainable conv, linear, recurrent and attention layers.
        overrides: pattern of a layer's path to a fraction of its own; the last match wins. With scope ``global`` the
            other layers make up the difference.
        max_layer_sparsity: scope ``global``: no layer without an override is pruned more than this.
        n_m: ``"2:4"``: of every 4 consecutive weights along the input dimension the 2 smallest go, and sparsity is
            ``1 - 2 / 4``. Layers whose inputs don't divide into such groups stay dense.
        dim: structured methods: the dimension whose slices are the units, of weights seen as ``(outputs, inputs, ...)``
            whatever their own layout is: 0 is filters, rows, hidden units of recurrent layers, features of embeddings.
        norm: ``ln_structured``: the norm's order.
        masks: what is pruned already and stays so; with ``custom_from_mask``, the masks themselves.
        inputs: structured methods: example inputs, with which a copy of the model shows what becomes of pruned units (a
            tuple holds the arguments, a dict the keywords); by default the model's ``example_input_array``. Without
            them only norms that stand in an `nn.Sequential` are found.
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
        >>> sparsity(model)
        0.75

    References:
        Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021 (arXiv:2104.08378), for N:M.
    """
    recipe = make_recipe(method, sparsity, scope, targets or Targets(), overrides, max_layer_sparsity, n_m, dim, norm)
    if method == "custom_from_mask" and masks is None:
        raise invalid("masks", "be given for method='custom_from_mask'", None, "Pass masks={name: mask}.")
    require_float(model, "train")
    pruner = Pruner(recipe, model, masks or {})
    if method == "custom_from_mask":
        pruner.given = pruner.masks
    if pruner.plan.warning:
        warnings.warn(f"prune_: {pruner.plan.warning}", NoEffectWarning, stacklevel=2)
    if pruner.units.outputs:
        _silence(pruner, model, inputs, seed)
    pruner.update_scores()
    pruner.grow_(1.0, seed)
    pruner.settle_()
    return pruner.masks


def _silence(pruner: Pruner, model: nn.Module, inputs: Any, seed: int) -> None:
    """Find out on a copy what becomes of pruned units, so that nothing of the model runs."""
    example = getattr(model, "example_input_array", None) if inputs is None else inputs
    if example is None:
        if pruner.unknown:
            warnings.warn(
                f"prune_: behind these pruned units may still put out a constant: {named(sorted(pruner.unknown))}. "
                "Whether they do isn't known without `inputs`.",
                stacklevel=3,
            )
        return
    probe, seen = copy_module(model).eval(), Observations()
    args, kwargs = bind_example(example, next(model.parameters()).device)
    with isolated_random_state(seed):
        observe(probe, lambda: probe(*args, **kwargs), pruner.units, seen)
    if news := pruner.follow(model, seen):
        warnings.warn(f"prune_: {news}", stacklevel=3)


def sparsity(model: nn.Module, targets: Targets | None = None) -> float:
    """Count the fraction of the targeted weights that is zero, each tensor once.

    Of a layer with a weight norm, zeros of the weight itself count: of its direction times its magnitude.

    Args:
        model: any module.
        targets: which weights; by default those of all trainable conv, linear, recurrent and attention layers.

    Returns:
        Zeros over all targeted elements, in [0, 1].

    Raises:
        CompressionError: nothing is targeted.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 2)
        >>> layer.weight.data = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
        >>> sparsity(layer)
        0.75
    """
    zeros = total = 0
    for target in (targets or Targets()).select(model).targets:
        weight = target.parameter if target.magnitude is None else target.parameter * target.magnitude[1]
        zeros, total = zeros + int((weight == 0).sum()), total + weight.numel()
    return zeros / total
