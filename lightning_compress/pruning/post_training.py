"""`PostTrainingPruning`: decides when a trained model is pruned, and dense again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_compress.callback import CompressionCallback
from lightning_compress.errors import NoEffectWarning, invalid
from lightning_compress.modules.paths import clean_name
from lightning_compress.pruning.masks import sparsity_of
from lightning_compress.pruning.methods import Masks
from lightning_compress.pruning.pruner import Pruner
from lightning_compress.pruning.recipe import CALIBRATED, check_batches, make_recipe
from lightning_compress.pruning.trainer import calibrated_outcome
from lightning_compress.structure.change import is_converted, require_float
from lightning_compress.targets import Scope, Targets


class PostTrainingPruning(CompressionCallback):
    """Prunes a trained model when `test`, `validate` or `predict` starts: its metrics are those of that model.

    Afterwards the dense model is back. A fit, and the validation within it, see the dense model. In front of
    `PostTrainingQuantization` in the list, the pruned model is quantized.

    Batches are those of ``calibration_dataloader()`` of the datamodule or the module, if there is one, else of the
    train loader, never test data; they go through the module as in `PostTrainingQuantization`.

    Args:
        method: ``least_squares`` or ``wanda``, see `prune_`.
        sparsity: the fraction of the weights that is zero, in [0, 1); left out with ``n_m``.
        scope: ``global`` zeroes more in layers that matter less, ``layer`` as much in each.
        calibration_batches: how many batches calibrate at most; a fifth of them is held out.
        targets: which weights; by default those of all trainable convolution, linear, recurrent and attention layers.
        overrides: pattern of a layer's path to a fraction of its own; the last match wins.
        max_layer_sparsity: scope ``global``: no layer without an override is pruned more than this.
        n_m: ``"2:4"``: of every 4 consecutive weights along a layer's input dimension 2 stay.
        keep: leave the module pruned after the test, to save it.
        seed: of shuffling, and of what calibration looks at.

    Attributes:
        masks: parameter name to bool mask of the last test, validate or predict, False where pruned.

    Raises:
        CompressionError: in the constructor for bad arguments; on test start if there is nothing to calibrate on. The
            model is unchanged then.

    Hooks: `on_test_start`, `on_validation_start` (of `validate`) and `on_predict_start` prune, `teardown` and
    `on_exception` put the dense model back.

    Example:
        >>> pruning = PostTrainingPruning(sparsity=0.5, calibration_batches=16)
        >>> # Trainer(callbacks=[pruning]).test(model, datamodule)
    """

    key = "post-training pruning"

    def __init__(
        self,
        method: str = "least_squares",
        sparsity: float | None = None,
        scope: Scope = "global",
        calibration_batches: int = 32,
        targets: Targets = Targets(),  # noqa: B008  frozen
        overrides: Mapping[str, float] | None = None,
        max_layer_sparsity: float = 1.0,
        n_m: str | None = None,
        keep: bool = False,
        seed: int = 0,
    ) -> None:
        if not isinstance(method, str) or method not in CALIBRATED:
            raise invalid("method", f"be one of {', '.join(CALIBRATED)}", method, "ScheduledPruning has the others.")
        budget = (sparsity, scope, targets, overrides, max_layer_sparsity)
        self.recipe = make_recipe(method, *budget, n_m, dim=0, norm=2.0)
        check_batches(calibration_batches)
        self.calibration_batches = calibration_batches
        self.keep = keep
        self.seed = seed
        self.masks: Masks = {}
        self._dense: list[tuple[Tensor, Tensor]] = []
        self._note = ""

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        require_float(pl_module, "train")
        if is_converted(pl_module):
            self._note = f"{type(self).__name__}: the module is quantized already, and stays as it is."
            rank_zero_info(self._note)
            return
        pruner = Pruner(self.recipe, pl_module, {})
        outcome = calibrated_outcome(trainer, pl_module, pruner, 1.0, self.calibration_batches, self.seed)
        for text in (pruner.plan.warning, outcome.warning):
            if text:
                rank_zero_warn(f"{type(self).__name__}: {text}", category=NoEffectWarning)
        with torch.inference_mode(False):
            changed = {clean_name(name): tensor for name, tensor in pl_module.named_parameters()}
            # What another callback routes elsewhere still has these parameters when it comes back.
            self._dense = [(changed[name], changed[name].detach().clone()) for name in outcome.values]
            pruner.take_(pl_module, outcome)
        self.masks = pruner.masks
        zeros = f"{sparsity_of(self.masks):.1%} of the targeted weights are zero"
        self._note = f"{type(self).__name__}: {zeros}; {outcome}."
        rank_zero_info(self._note)

    on_predict_start = on_test_start

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "validate":  # and not in a fit
            self.on_test_start(trainer, pl_module)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.keep:
            self._dense = []
        super().teardown(trainer, pl_module, stage)

    @override
    def close(self, pl_module: pl.LightningModule) -> None:
        for parameter, before in self._dense:
            parameter.data.copy_(before)
        self._dense = []
        super().close(pl_module)

    @override
    def report_notes(self) -> list[str]:
        return [self._note] if self._note else []

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_dense": []}
