"""`QuantizationAwareTraining` in fits of every kind, with other callbacks and after errors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_compress import (
    CompressionError,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    ScheduledPruning,
    Targets,
    Window,
    quantize,
)
from lightning_compress.quantization.convert import record_of
from tests.quantization.prepared import At, fake_quantizers, int8_layers
from tests.support.data import TinyData
from tests.support.modules import (
    Classifier,
    ManualClassifier,
    ZooModule,
    quiet_trainer,
)
from tests.support.oracles import (
    assert_same_state,
    hooks,
    snapshot,
)
from tests.support.zoo import row


def attributes(module: nn.Module) -> dict[str, set[str]]:
    """Names of everything on each module, but what Lightning itself leaves on the root."""
    lightnings = {"_trainer", "_current_fx_name", "_metric_attributes", "_param_requires_grad_state", "_hparams"}
    loaders = {f"{name}_dataloader" for name in ("train", "val", "test", "predict")}
    return {path: set(vars(inner)) - lightnings - loaders for path, inner in module.named_modules()}


def int8_weights(module: nn.Module) -> dict[tuple[int, ...], Tensor]:
    """The int8 weights of a converted model by their shape."""
    return {tuple(value.shape): value for value in module.state_dict().values() if value.dtype == torch.int8}


# Systems.


def test_manual_optimization_with_two_optimizers() -> None:
    module = ManualClassifier()
    trainer = quiet_trainer(max_epochs=2, callbacks=[QuantizationAwareTraining(window=Window(0.5))])
    trainer.fit(module, TinyData())
    assert len(int8_layers(module)) == 2
    assert "test_acc" in trainer.test(module, TinyData(), verbose=False)[0]


@pytest.mark.parametrize("name", ["mlp", "conv_bn_relu", "residual", "tied", "attention"])
def test_q20_bf16_mixed(name: str) -> None:
    module = ZooModule(row(name))
    trainer = quiet_trainer(precision="bf16-mixed", callbacks=[QuantizationAwareTraining()])
    trainer.fit(module)
    assert int8_layers(module)
    trainer.test(module, verbose=False)


def test_gradient_accumulation() -> None:
    module, forms = Classifier(), []
    note = At(on_train_batch_end=lambda t, m: forms.append(bool(fake_quantizers(m))))
    qat = QuantizationAwareTraining(window=Window(1, unit="step"))
    quiet_trainer(max_epochs=1, accumulate_grad_batches=3, callbacks=[qat, note]).fit(module, TinyData())
    assert forms == [False] * 3 + [True] * 4


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=["exception", "ctrl-c"])
def test_an_interruption_leaves_a_float_module_that_trains_again(error: BaseException) -> None:
    def interrupt(trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.global_step == 4:
            assert fake_quantizers(pl_module)
            raise error

    module = Classifier()
    order, before = list(module.state_dict()), attributes(module)
    trainer = quiet_trainer(callbacks=[QuantizationAwareTraining(), At(on_train_batch_end=interrupt)])
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        trainer.fit(module, TinyData())
    assert list(module.state_dict()) == order
    assert attributes(module) == before
    assert hooks(module) == []
    assert module(torch.zeros(2, 16)).shape == (2, 4)
    quiet_trainer(callbacks=[QuantizationAwareTraining()]).fit(module, TinyData())
    assert int8_layers(module)


def test_an_error_in_the_step_leaves_a_float_module() -> None:
    class Breaks(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 3:
                raise ValueError("in the step")
            return super().training_step(batch, batch_idx)

    module = Breaks()
    order = list(module.state_dict())
    with pytest.raises(ValueError, match="in the step"):
        quiet_trainer(callbacks=[QuantizationAwareTraining()]).fit(module, TinyData())
    assert list(module.state_dict()) == order and not fake_quantizers(module)


def test_nothing_to_quantize_is_an_error_and_changes_nothing() -> None:
    class Only(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.norm, self.head = nn.Bilinear(16, 16, 32), nn.Identity(), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x, x)

    module = Only()
    before, had = snapshot(module), attributes(module)
    with pytest.raises(CompressionError, match="must have a layer that the scheme can quantize"):
        quiet_trainer(callbacks=[QuantizationAwareTraining()]).fit(module, TinyData())
    assert_same_state(before, module)
    assert attributes(module) == had


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (Targets(include=["bdy"]), "'bdy' must match a module.*Nearest: body"),
        (Targets(exclude=["*"]), "`targets` must leave"),
    ],
    ids=["typo", "nothing left"],
)
def test_bad_targets_change_nothing(targets: Targets, message: str) -> None:
    module = Classifier()
    before, had = snapshot(module), attributes(module)
    with pytest.raises(CompressionError, match=message):
        quiet_trainer(callbacks=[QuantizationAwareTraining(targets=targets)]).fit(module, TinyData())
    assert_same_state(before, module)
    assert attributes(module) == had


@pytest.mark.parametrize("order", [1, -1])
def test_beside_post_training_quantization_it_is_refused(order: int) -> None:
    module = Classifier()
    before = snapshot(module)
    callbacks = [QuantizationAwareTraining(), PostTrainingQuantization()][::order]
    for run in ("fit", "test"):
        with pytest.raises(
            CompressionError, match="QuantizationAwareTraining or PostTrainingQuantization. Received: both"
        ):
            getattr(quiet_trainer(callbacks=list(callbacks)), run)(module, TinyData())
    assert_same_state(before, module)


@pytest.mark.parametrize("ours_first", [True, False], ids=["prune, qat", "qat, prune"])
@pytest.mark.parametrize("starts", [(0.1, 0.0), (0.0, 0.5), (0.4, 0.4)], ids=str)
def test_p8_the_zeros_of_the_int8_weight_contain_the_mask(ours_first: bool, starts: tuple[float, float]) -> None:
    # P8, PL#11047.
    module = Classifier()
    pruning = ScheduledPruning(sparsity=0.8, window=Window(starts[0], 0.9))
    callbacks = [pruning, QuantizationAwareTraining(window=Window(starts[1]))][:: 1 if ours_first else -1]
    quiet_trainer(max_epochs=3, callbacks=callbacks).fit(module, TinyData())
    weights = int8_weights(module)
    assert len(weights) == 2
    pruned = 0
    for mask in pruning.masks.values():
        assert not weights[tuple(mask.shape)][~mask].any()
        pruned += int((~mask).sum())
    assert pruned == round(0.8 * 640)


def test_p8_on_folded_convolutions() -> None:
    module = ZooModule(row("conv_bn_relu"))
    pruning = ScheduledPruning(sparsity=0.5)
    quiet_trainer(max_epochs=3, callbacks=[pruning, QuantizationAwareTraining()]).fit(module)
    weights = int8_weights(module)
    for name, mask in pruning.masks.items():
        assert not weights[tuple(mask.shape)][~mask].any(), name


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_callback_can_be_copied(clone: Callable[[Any], Any], when: str) -> None:
    qat = QuantizationAwareTraining(window=Window(0.5), freeze_observers=0.8)
    if when == "after":
        quiet_trainer(callbacks=[qat]).fit(Classifier(), TinyData())
    twin, module = clone(qat), Classifier()
    quiet_trainer(callbacks=[twin]).fit(module, TinyData())
    assert int8_layers(module) and twin.freeze_observers == 0.8


def test_a_prepared_module_can_be_copied_in_mid_training() -> None:
    copies: list[Any] = []
    look = At(on_train_batch_end=lambda t, m: copies.append(copy.deepcopy(m)))
    quiet_trainer(max_steps=2, callbacks=[QuantizationAwareTraining(), look]).fit(Classifier(), TinyData())
    for twin in copies:
        assert fake_quantizers(twin)
        twin(torch.zeros(3, 16)).sum().backward()
        assert twin.body.weight.grad is not None


def test_a_converted_module_can_be_copied_and_called_under_inference_mode() -> None:
    module = Classifier()
    quiet_trainer(callbacks=[QuantizationAwareTraining()]).fit(module, TinyData())
    x = torch.randn(4, 16)
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(module).eval()(x), module.eval()(x))


def test_a_frozen_submodule_stays_bit_identical_and_is_quantized() -> None:
    module = Classifier()
    module.body.requires_grad_(False)
    frozen = module.body.weight.detach().clone()
    quiet_trainer(callbacks=[QuantizationAwareTraining(convert=False)]).fit(module, TinyData())
    assert torch.equal(module.body.weight, frozen) and not module.body.weight.requires_grad


def test_a_batchnorm_that_the_user_holds_in_evaluation_mode_stays_so() -> None:
    class Held(ZooModule):
        def on_train_epoch_start(self) -> None:
            self.net[1].eval()

    module = Held(row("conv_bn_relu"))
    statistics = module.net[1].running_mean.clone()
    quiet_trainer(callbacks=[QuantizationAwareTraining(convert=False)]).fit(module)
    assert torch.equal(module.net[1].running_mean, statistics)
    assert module.net[4].running_mean.abs().sum() > 0


def test_a_fit_that_ends_before_the_window_warns_and_stays_float() -> None:
    class Stops(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = True

    module = Classifier()
    before = list(module.state_dict())
    with pytest.warns(UserWarning) as caught:
        quiet_trainer(max_epochs=2, callbacks=[QuantizationAwareTraining(window=Window(0.5)), Stops()]).fit(
            module, TinyData()
        )
    messages = [str(warning.message) for warning in caught]
    assert any("the fit ended before the window began; the model is still float" in message for message in messages)
    assert list(module.state_dict()) == before


def test_convert_can_be_left_to_later() -> None:
    # Q6.
    module = Classifier()
    quiet_trainer(callbacks=[QuantizationAwareTraining(convert=False)]).fit(module, TinyData())
    assert fake_quantizers(module) and not int8_layers(module)
    trainer = quiet_trainer(callbacks=[QuantizationAwareTraining()])
    trainer.fit(module, TinyData())
    assert int8_layers(module)


def test_fit_three_times_with_one_callback_and_live_tensors_stay() -> None:
    import gc

    gc.collect()
    gc.freeze()  # what is alive already isn't looked at
    module, qat, counts = Classifier(), QuantizationAwareTraining(), []
    for _ in range(4):
        quiet_trainer(callbacks=[qat]).fit(module, TinyData())
        assert int8_layers(module)
        gc.collect()
        counts.append(sum(1 for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)))
    gc.unfreeze()
    assert counts[1] == counts[2] == counts[3]


def test_fit_on_a_second_model() -> None:
    qat, first, second = QuantizationAwareTraining(), Classifier(), Classifier(hidden=8)
    quiet_trainer(callbacks=[qat]).fit(first, TinyData())
    before = snapshot(first)
    quiet_trainer(callbacks=[qat]).fit(second, TinyData())
    assert int8_layers(second)
    assert_same_state(before, first)


def test_int8_weights_are_within_one_step_of_the_float_weights() -> None:
    # A range that follows a growing weight slowly clips it.
    class Grows(ZooModule):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)

    module = Grows(row("mlp"))
    floats: dict[tuple[int, ...], Tensor] = {}
    note = At(on_train_end=lambda t, m: floats.update({tuple(p.shape): p.detach().clone() for p in m.parameters()}))
    quiet_trainer(max_epochs=5, callbacks=[QuantizationAwareTraining(freeze_observers=1.0), note]).fit(module)
    for inner in module.modules():
        if callable(getattr(inner, "weight", None)) and inner.weight().dtype == torch.qint8:
            weight = floats[tuple(inner.weight().shape)]
            step = weight.abs().amax(1, keepdim=True) / 127
            assert ((inner.weight().dequantize() - weight).abs() <= 1.01 * step).all()


@pytest.mark.parametrize("first", [True, False], ids=["ours first", "ours last"])
@pytest.mark.parametrize(
    "average", [lambda: EMAWeightAveraging(decay=0.8), lambda: StochasticWeightAveraging(0.05, 1)], ids=["ema", "swa"]
)
def test_with_averaged_weights_the_int8_model_is_the_averages(average: Any, first: bool, tmp_path: Path) -> None:
    # P17.
    module = ZooModule(row("mlp"))  # without BatchNorm, whose statistics SWA would renew in one more epoch
    qat, other = QuantizationAwareTraining(window=Window(0.3)), average()
    averages: dict[tuple[int, ...], Tensor] = {}
    live: dict[tuple[int, ...], Tensor] = {}

    def note(trainer: L.Trainer, pl_module: Any) -> None:
        average = other._average_model
        source = average.module if isinstance(average, AveragedModel) else average
        for place, holder in ((averages, source), (live, pl_module)):
            place.update({tuple(p.shape): p.detach().clone() for p in holder.parameters() if p.dim() > 1})

    callbacks = [qat, other] if first else [other, qat]
    quiet_trainer(max_epochs=4, callbacks=[*callbacks, At(on_train_batch_end=note)]).fit(module)
    layers = [module.get_submodule(path) for path in int8_layers(module)]
    weights = {tuple(layer.weight.shape): layer.weight for layer in layers}
    assert len(weights) == 3
    if isinstance(other, EMAWeightAveraging):
        for shape, weight in weights.items():
            assert (weight - averages[shape]).abs().mean() < 0.6 * (live[shape] - averages[shape]).abs().mean()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_p16_a_compiled_submodule() -> None:
    class Compiled(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.compile(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)))
            del self.body, self.norm, self.head

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    module = Compiled()
    order = list(module.state_dict())
    trainer = quiet_trainer(enable_checkpointing=True, callbacks=[QuantizationAwareTraining(), ModelCheckpoint()])
    trainer.fit(module, TinyData())
    assert len(int8_layers(module)) == 2
    saved = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert list(saved["state_dict"]) == order
    trainer.test(module, TinyData(), verbose=False)


def test_pre_hooks_of_inner_modules_keep_firing() -> None:
    module, calls = Classifier(), list[int]()
    module.body.register_forward_pre_hook(lambda m, i: calls.append(1))
    counts: list[int] = []
    note = At(
        on_train_batch_start=lambda t, m: calls.clear(), on_train_batch_end=lambda t, m: counts.append(len(calls))
    )
    quiet_trainer(num_sanity_val_steps=0, callbacks=[QuantizationAwareTraining(), note]).fit(module, TinyData())
    assert set(counts) == {1}
    assert int8_layers(module)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_a_weight_that_a_hook_computes_stays_float() -> None:
    module = Classifier()
    module.body = torch.nn.utils.weight_norm(module.body)
    module(torch.randn(4, 16))  # leaves a computed weight on the layer
    int8 = quantize(module, calibration=[torch.randn(4, 16)])
    assert len(int8_layers(int8)) == 1
    assert "body" in (record_of(int8) or {})["floats"]
