"""`QLoRA`: decides when a module gets 4-bit weights with adapters over them, and what its optimizers train."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_compress.callback import CompressionCallback, warn_of_other_settings
from lightning_compress.errors import CompressionError, invalid, nearest
from lightning_compress.messages import by_reason, in_short, named, they
from lightning_compress.modules.paths import compressible_modules
from lightning_compress.probe import is_own
from lightning_compress.quantization import convert
from lightning_compress.quantization.change import CHANGE
from lightning_compress.quantization.lora.adapters import LowRank, plan_adapters
from lightning_compress.quantization.lora.merge import merge_adapters
from lightning_compress.quantization.lora.reentrant import let_gradients_in_, restore_
from lightning_compress.saved_state import STATE_VERSION, SavedState
from lightning_compress.structure.listener import averaged_copies
from lightning_compress.targets import Targets, matches


class QLoRA(CompressionCallback):
    """Fine-tunes a module whose linear layers are frozen in 4 bits (NF4), by low-rank adapters in float over them.

    ``y = x W^T + b + (alpha / rank) x A^T B^T`` with A ``(rank, in_features)`` and B ``(out_features, rank)``. When a
    fit begins the targeted layers' float weights give way to packed ones, everything but the adapters is frozen, and
    frozen parameters leave the optimizers. The module stays so afterwards, for `test` and further fits; `merge` gives a
    plain one. Saves memory, not time: the 4-bit weights are dequantized in each forward and each backward pass.

    A checkpoint holds the codes of 4-bit weights under these weights' keys, their scales and the adapters beside them,
    and the other parameters as they are; it loads with this callback or `load_compressed`.

    Args:
        rank: r.
        alpha: the adapters' output is scaled by ``alpha / rank``.
        targets: which linear layers; by default all but the one that is registered last, such as a head. A pattern
            that names that one includes it.
        dropout: of the adapters' inputs.
        modules_to_train: patterns of modules whose float parameters train too, such as a new head.

    Raises:
        CompressionError: in the constructor for bad arguments; in `setup` if there is nothing to adapt, beside
            callbacks that need the float weights, and for a module with other adapters; on fit start if the optimizers
            don't hold the adapters.

    Hooks: `setup` adapts the module, after its own `setup` if it has one; `on_fit_start` restricts the optimizers;
    `on_before_optimizer_step` says where no gradient reaches adapters.

    Example:
        >>> qlora = QLoRA(rank=8, alpha=16, modules_to_train=["head"])
        >>> # Trainer(callbacks=[qlora]).fit(model, datamodule)
        >>> # plain = qlora.merge()

    References:
        Dettmers et al., "QLoRA", 2023 (arXiv:2305.14314), section 3; Hu et al., "LoRA", 2021 (arXiv:2106.09685).
    """

    key = "adapters"
    saved_form: ClassVar[Any] = SavedState
    conflicts = ("pruning", "channels", "quantization-aware training", "post-training quantization")
    kept_with_weights = True

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        targets: Targets | None = None,
        dropout: float = 0.0,
        modules_to_train: Sequence[str] = (),
    ) -> None:
        self.low_rank = LowRank(rank, alpha, dropout)
        if not isinstance(targets, Targets | None):
            raise invalid("targets", "be a Targets", targets, "Write Targets(include=[...]).")
        if not isinstance(modules_to_train, list | tuple) or not all(
            isinstance(pattern, str) for pattern in modules_to_train
        ):
            raise invalid("modules_to_train", "be a list of patterns", modules_to_train)
        self.targets = targets
        self.modules_to_train = list(modules_to_train)
        self._module: weakref.ref[pl.LightningModule] | None = None
        self._notes: list[str] = []
        self._begun = True
        self._stepped = False

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._module = weakref.ref(pl_module)
        if stage != "fit":
            return
        if is_own(pl_module, "setup"):
            pl_module.__dict__["setup"] = partial(self._after_setup, pl_module)  # it may be what loads the weights
        else:
            self._adapt(pl_module)

    @override
    def why_conflicts(self, trainer: pl.Trainer, other: CompressionCallback) -> str:
        if other.key not in self.conflicts:
            return ""
        return (
            "`callbacks` must hold no other technique that needs float weights beside QLoRA. Received: "
            f"{type(other).__name__}. Fit with QLoRA first, and give it `qlora.merge()`."
        )

    def _after_setup(self, pl_module: pl.LightningModule, stage: str) -> None:
        del pl_module.__dict__["setup"]
        pl_module.setup(stage)
        self._adapt(pl_module)

    def _adapt(self, pl_module: pl.LightningModule) -> None:
        record = convert.record_of(pl_module)
        asked = self._asked()
        if record is None:
            paths = compressible_modules(pl_module)
            for pattern in self.modules_to_train:
                if not any(matches(path, pattern) for path in paths):
                    raise invalid("modules_to_train", "match modules", pattern, nearest(pattern, paths))
            layers, floats = plan_adapters(pl_module, self.targets, self.modules_to_train)
            self._begun = False
            with torch.no_grad():
                convert.adapt_and_record_(pl_module, layers, self.low_rank, {**asked, "floats": floats})
        elif any(record.get(name) != value for name, value in asked.items()):
            raise CompressionError(
                f"The module must be float, or have the adapters that {type(self).__name__} asks for. Received: one "
                f"that is {record['form']}, made with other settings. Merge adapters first: merge_adapters(model); of "
                "a quantized model, start from its float checkpoint."
            )

    def _asked(self) -> dict[str, Any]:
        return {"low_rank": asdict(self.low_rank), "trained": self.modules_to_train, "targets": _plain(self.targets)}

    @override
    def check_entry(self, entry: Mapping[str, Any], stage: str) -> None:
        if stage == "fit" and entry.get("quantization", {}).get("form") != "adapted":
            raise CompressionError(
                "`ckpt_path` must be a checkpoint of a fit with QLoRA. Received: one without adapters. Load its "
                "weights into the module first, and fit without `ckpt_path`."
            )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begin_training_mode_(trainer, pl_module)
        record = convert.record_of(pl_module)
        assert record is not None
        saved, now = ({key: str(value) for key, value in settings.items()} for settings in (record, self._asked()))
        warn_of_other_settings(type(self).__name__, saved, now, "adapters")
        adapters = {
            id(parameter) for name, parameter in pl_module.named_parameters() if name.endswith((".lora_A", ".lora_B"))
        }
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        held = {id(parameter) for group in groups for parameter in group["params"]}
        if not adapters <= held:
            raise CompressionError(
                f"`configure_optimizers` must give the adapters to an optimizer. Received: {len(adapters & held)} of "
                f"{len(adapters)}. Pass it self.parameters(), or those that require gradients."
            )
        for group in groups:
            # The list stays the same one: some optimizers hold it too.
            group["params"][:] = [parameter for parameter in group["params"] if parameter.requires_grad]
        for optimizer in trainer.optimizers:
            for parameter in [parameter for parameter in optimizer.state if not parameter.requires_grad]:
                del optimizer.state[parameter]
        convert.forget_(pl_module)
        self._begun = True
        self._stepped = False
        let_gradients_in_()
        for weight in convert.packed_weights(pl_module):
            # Being no parameters or buffers, they are nothing that DDP makes equal.
            weight.copy_(trainer.strategy.broadcast(weight.tensors()))
        self.sync_(trainer, pl_module)
        self._notes = self._explain(pl_module, record)
        rank_zero_info("\n  ".join(in_short(self._notes)))

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.keep_training_mode_(trainer, pl_module, batch_idx)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        reached = {
            name.rpartition(".")[0]: parameter.grad is not None
            for name, parameter in pl_module.named_parameters()
            if name.endswith("lora_B") and id(parameter) in held
        }
        if self._stepped or not reached:
            return
        self._stepped = True
        if missed := [path for path, found in reached.items() if not found]:
            self._notes.append(f"no gradient reached the adapters of {named(missed)} in the first optimizer step")
            tell = rank_zero_info if any(reached.values()) else rank_zero_warn
            tell(
                f"{type(self).__name__}: {self._notes[-1]}. They learn nothing where the module calls these layers "
                "under torch.no_grad, detaches what they give, or doesn't call them."
            )

    def _explain(self, pl_module: pl.LightningModule, record: dict[str, Any]) -> list[str]:
        training = sum(parameter.numel() for parameter in pl_module.parameters() if parameter.requires_grad)
        total = sum(parameter.numel() for parameter in pl_module.parameters())
        total += sum(weight.rows * weight.columns for weight in convert.packed_weights(pl_module))
        layers = named(layer["path"] for layer in record["layers"])
        return [
            f"{type(self).__name__}: {layers} in 4 bits (NF4) with adapters of rank {record['low_rank']['rank']}; "
            f"{training:,} of {total:,} parameters train. This saves memory, not time.",
            *(f"{they(names, 'stays', 'stay')} float: {why}" for why, names in by_reason(record["floats"]).items()),
        ]

    @override
    def sync_(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for averaged in averaged_copies(trainer):
            CHANGE.sync_(averaged, pl_module)

    def merge(self) -> pl.LightningModule:
        """Make a plain copy of the module of the last fit, with the adapters in its weights; the module stays as it is.

        Raises:
            CompressionError: there was no fit, or the module is gone.
        """
        module = self._module() if self._module is not None else None
        if module is None:
            raise CompressionError("`merge` must come after a fit. Received: no module. Use merge_adapters(model).")
        return merge_adapters(module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if not self._begun:
            convert.revert_(pl_module, "float")  # its float weights are still there
            self._begun = True
        super().on_exception(trainer, pl_module, exception)

    @override
    def close(self, pl_module: pl.LightningModule) -> None:
        pl_module.__dict__.pop("setup", None)
        restore_()
        super().close(pl_module)

    @override
    def report_notes(self) -> list[str]:
        return self._notes

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"version": STATE_VERSION}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.check_state(state_dict)

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_module": None}


def _plain(targets: Targets | None) -> dict[str, Any] | None:
    if targets is None:
        return None
    types = None if targets.types is None else [kind.__qualname__ for kind in targets.types]
    return {"include": targets.include and list(targets.include), "exclude": list(targets.exclude), "types": types}
