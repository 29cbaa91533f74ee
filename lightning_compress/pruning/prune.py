"""`prune_` and `sparsity`: one pruning event on any module, no Trainer needed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.compensation.runner import Runner
from lightning_compress.errors import NoEffectWarning, invalid
from lightning_compress.messages import named
from lightning_compress.modules.calls import bind_example, way_without_trainer
from lightning_compress.modules.copying import copy_module, copy_tensors
from lightning_compress.modules.isolation import isolated_evaluation, isolated_random_state
from lightning_compress.pruning.calibrated import prune_copy
from lightning_compress.pruning.dependents import Observations
from lightning_compress.pruning.methods import Masks, PruningMethod
from lightning_compress.pruning.pruner import Pruner
from lightning_compress.pruning.recipe import CALIBRATED, METHOD, check_batches, make_recipe
from lightning_compress.pruning.silence import observe
from lightning_compress.structure.change import require_float
from lightning_compress.targets import Scope, Targets

_logger = logging.getLogger("lightning_compress")


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
    calibration: Iterable[Any] | None = None,
    calibration_batches: int = 32,
    seed: int = 0,
) -> Masks:
    """Zero the least important weights of ``model`` in place and return the masks.

    Exactly ``round(sparsity * N)`` of the N targeted weights are masked (``scope="global"``), or of each tensor's
    (``scope="layer"``); structured methods take whole units, the nearest number: with ``dim=0`` a layer's outputs, and
    what would still speak for them is zeroed too: the layer's bias, and scale and shift of what stands behind it.

    Two methods look at what layers are given, in the order of calls, where ``x`` is a layer's input in the network as
    it is by then, ``x0`` and ``y0`` input and output in the original. They zero as much of every output's weights:

    - ``wanda`` those with the least ``|W_ij| ||x_j||``.
    - ``least_squares`` those with the least ``|T_ij| ||x_j||``, where ``T`` makes ``||T x - y||^2 + l ||T - W||^2``
      least, and re-solves the others: they make ``||V x - y||^2 + l ||V - W||^2`` small. ``y`` is ``y0``, plus what a
      residual stream that it is added to has lost; ``l`` is a tenth of the mean of ``x_j^2``, summed over samples. The
      bias follows. A layer's new weights stay only if the outputs get better by them on batches that are held out.

    With scope ``global`` both zero more in layers that matter less: ``s_n = clip(s + 0.07 (c - log(e_n / N_n)))``, up
    to 0.2 from ``s``, where ``e_n`` is the error of the outputs with only layer n at 60 %. With ``n_m`` all are alike.

    Args:
        model: any module.
        sparsity: the fraction to mask, in [0, 1); None for a method that fixes it itself, and with ``n_m``.
        method: ``wanda`` and ``least_squares`` (these two need ``calibration``: see above), ``lamp``,
            ``l1_unstructured`` (or ``magnitude``), ``taylor``, ``movement`` (these two need gradients: call
            ``loss.backward()`` before), ``random_unstructured``, ``ln_structured``, ``random_structured``,
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
        calibration: batches for ``wanda`` and ``least_squares``, such as a DataLoader, of the kind that the model will
            be used on. A batch is what ``forward`` takes, or a tuple whose first element is, or a dict whose keys name
            the parameters of ``forward``; or it goes through the model's own ``calibration_step(batch)``. A fifth is
            held out.
        calibration_batches: how many of them at most.
        seed: of the random methods, and of the positions that calibration looks at; the global generators aren't
            touched.

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
        Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2023 (arXiv:2306.11695), for
        ``wanda``, there with the same sparsity everywhere. Frantar and Alistarh, "SparseGPT", 2023 (arXiv:2301.00774),
        re-solve column by column with each layer's own output as the goal; ``least_squares`` takes the original's.
        Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021 (arXiv:2104.08378), for N:M.
    """
    recipe = make_recipe(method, sparsity, scope, targets or Targets(), overrides, max_layer_sparsity, n_m, dim, norm)
    if method == "custom_from_mask" and masks is None:
        raise invalid("masks", "be given for method='custom_from_mask'", None, "Pass masks={name: mask}.")
    _check_calibration(recipe.method, method, calibration, calibration_batches)
    require_float(model, "train")
    pruner = Pruner(recipe, model, masks or {})
    if method == "custom_from_mask":
        pruner.given = pruner.masks
    if pruner.plan.warning:
        warnings.warn(f"prune_: {pruner.plan.warning}", NoEffectWarning, stacklevel=2)
    if calibration is not None:
        _prune_calibrated(pruner, model, list(islice(calibration, calibration_batches)), seed)
        return pruner.masks
    if pruner.units.outputs:
        _silence(pruner, model, inputs, seed)
    pruner.update_scores()
    pruner.grow_(1.0, seed)
    pruner.settle_()
    return pruner.masks


def _check_calibration(method: PruningMethod, name: str, calibration: Any, batches: int) -> None:
    if method.calibrates and calibration is None:
        raise invalid("calibration", f"be given for method={name!r}", None, "Pass a loader of representative batches.")
    if calibration is not None and not method.calibrates:
        raise invalid(
            "calibration", f"be left out with method={name!r}; it goes with {', '.join(CALIBRATED)}", "batches"
        )
    if isinstance(calibration, Tensor):
        raise invalid("calibration", "be batches", f"a tensor of shape {tuple(calibration.shape)}", "Put it in a list.")
    check_batches(batches)


def _prune_calibrated(pruner: Pruner, model: nn.Module, batches: list[Any], seed: int) -> None:
    if not batches:
        raise invalid("calibration", "hold a batch", "none")
    with torch.inference_mode(False):
        run = way_without_trainer(model)
        with isolated_evaluation(model):
            run(model, copy_tensors(batches[0]))  # what fails before a batch is bound as it should be is no call
        outcome = prune_copy(Runner(model, run), pruner.plan, pruner.masks, batches, seed=seed)
    if outcome.warning:
        warnings.warn(f"prune_: {outcome.warning}", NoEffectWarning, stacklevel=3)
    _logger.info("prune_: %s.", outcome)
    pruner.take_(model, outcome)


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
