"""Units that are pruned whole are silent: what follows them may multiply their outputs by anything."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from torch import Tensor, nn

from lightning_compress import QuantizationAwareTraining, ScheduledPruning, Targets, Window, prune_
from tests.pruning.silent import (
    IMAGES,
    ActivationBetween,
    Grouped,
    InnerSequential,
    InPlace,
    Instance,
    Net,
    Shared,
    TiedRows,
    TwoNorms,
    assert_silent,
    forward,
    gone_rows,
    rough,
)
from tests.support import fits
from tests.support.modules import quiet_trainer
from tests.support.oracles import assert_same_state, hooks, snapshot


def pruner(include: list[str], sparsity: float = 0.5, **kwargs: Any) -> ScheduledPruning:
    kwargs = {"scope": "layer", "window": Window(0.2, 0.8), **kwargs}
    return ScheduledPruning("ln_structured", sparsity, targets=Targets(include=include), **kwargs)


fit = partial(fits.fit, max_epochs=5)


@pytest.mark.parametrize("method", ["ln_structured", "random_structured"])
def test_t8_conv_bias_and_batchnorm_in_a_sequential(method: str) -> None:
    # T8, PT#38598: the rows were zero, the bias and BatchNorm still spoke.
    model = rough(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Conv2d(8, 4, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Nothing has to be run: no warning.
        prune_(model, 0.5, method, "layer", Targets(include=["0"]))
    gone = gone_rows(model[0].weight)
    assert not model[0].bias[gone].any() and not model[1].weight[gone].any() and not model[1].bias[gone].any()
    assert model[0].bias[~gone].all() and model[1].weight[~gone].all() and model[1].bias[~gone].all()
    assert_silent(model, gone, model[3].weight, run=forward)


def test_t8_linear_bias_and_batchnorm() -> None:
    model = rough(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4)))
    prune_(model, 0.5, "ln_structured", "layer", Targets(include=["0"]))
    assert_silent(model, gone_rows(model[0].weight), model[3].weight, run=lambda m: m(IMAGES[:, 0, 0, :5]))


def test_t15_a_second_event_takes_new_units_and_silences_them_too() -> None:
    model = rough(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Conv2d(8, 4, 3)))
    targets = Targets(include=["0"])
    first = prune_(model, 0.25, "ln_structured", "layer", targets)
    once = gone_rows(model[0].weight)
    prune_(model, 0.5, "ln_structured", "layer", targets, masks=first)
    twice = gone_rows(model[0].weight)
    assert int(once.sum()) == 2 and int(twice.sum()) == 4 and twice[once].all()
    assert_silent(model, twice, model[3].weight, run=forward)


def test_a_norm_that_only_a_run_can_find() -> None:
    model = rough(Net())
    before = snapshot(model)
    prune_(model, 0.5, "ln_structured", "layer", Targets(include=["conv"]), inputs=IMAGES)
    assert hooks(model) == []
    after = snapshot(model)
    assert_same_state(before["bn.running_mean"], after["bn.running_mean"])
    assert_silent(model, gone_rows(model.conv.weight), model.next.weight, run=forward)


def test_the_example_input_array_is_run_if_there_are_no_inputs() -> None:
    model = rough(Net())
    model.example_input_array = IMAGES[:2]
    prune_(model, 0.5, "ln_structured", "layer", Targets(include=["conv"]))
    assert_silent(model, gone_rows(model.conv.weight), model.next.weight, run=forward)


def test_without_inputs_a_warning_says_that_norms_are_not_known() -> None:
    model = rough(Net())
    with pytest.warns(UserWarning, match="may still put out a constant: `bn`. Whether they do isn't known without"):
        prune_(model, 0.5, "ln_structured", "layer", Targets(include=["conv"]))
    assert not model.conv.bias[gone_rows(model.conv.weight)].any()


def test_no_warning_without_norms_and_for_single_weights() -> None:
    prune_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), 0.5, "ln_structured", "layer")
    prune_(Net(), 0.5)


def test_in_a_fit_the_norm_is_found_by_a_look_at_a_batch() -> None:
    _, module = fit(pruner(["conv"]), module=rough(Net()))
    assert_silent(module, gone_rows(module.conv.weight), module.next.weight, run=forward)


def test_in_a_fit_everything_stays_silent_after_each_step() -> None:
    module, pruning = rough(Net()), pruner(["conv"])
    steps = []

    class Watch(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            gone = ~pruning.masks["conv.weight"].flatten(1).any(1)
            steps.append(int(gone.sum()))
            for tensor in (module.conv.weight, module.conv.bias, module.bn.weight, module.bn.bias):
                assert not tensor[gone].any()
                state = trainer.optimizers[0].state[tensor]
                assert not state["momentum_buffer"][gone].any()

    trainer = quiet_trainer(max_epochs=5, callbacks=[pruning, Watch()])
    trainer.fit(module)
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] == 4 and len(set(steps)) > 2


NETS: dict[str, tuple[type[Net], str]] = {
    "in-place relu after": (InPlace, "conv"),
    "two norms": (TwoNorms, "conv"),
    "instance norm": (Instance, "conv"),
    "grouped": (Grouped, "deep"),
    "inner sequential": (InnerSequential, "conv"),
    "in-place relu between": (ActivationBetween, "conv"),
}


@pytest.mark.parametrize("way", ["fit", "function"])
@pytest.mark.parametrize("name", NETS)
def test_pruned_units_are_silent(name: str, way: str) -> None:
    build, layer = NETS[name]
    module = rough(build())
    if way == "fit":
        fit(pruner([layer]), module=module)
    else:
        prune_(module, 0.5, "ln_structured", "layer", Targets(include=[layer]), inputs=IMAGES)
    assert_silent(module, gone_rows(module.get_submodule(layer).weight), module.next.weight, run=forward)


@pytest.mark.parametrize("way", ["fit", "function"])
def test_a_norm_that_two_convolutions_share_loses_only_what_both_lost(way: str) -> None:
    module = rough(Shared())
    with torch.no_grad():
        for unit, factor in enumerate([1e-4, 1e-4, 1e-4, 1, 1, 1, 1, 1]):
            module.conv.weight[unit] *= factor
            module.twin.weight[(unit + 1) % 8] *= factor
    targets = ["conv", "twin"]
    if way == "fit":
        fit(pruner(targets, 3 / 8, window=Window(0.1, 0.3)), module=module)
    else:
        prune_(module, 3 / 8, "ln_structured", "layer", Targets(include=targets), inputs=IMAGES)
    first, second = gone_rows(module.conv.weight), gone_rows(module.twin.weight)
    both = first & second
    assert 0 < int(both.sum()) < int(first.sum())
    assert not module.bn.weight[both].any() and not module.bn.bias[both].any()
    assert module.bn.weight[~both].all() and module.bn.bias[~both].all()
    assert_silent(module, both, module.next.weight, run=forward)


def test_only_one_of_two_convolutions_that_share_a_norm_is_pruned() -> None:
    module = rough(Shared())
    with pytest.warns(
        UserWarning, match=r"put out a constant: those of `conv\.weight` behind `bn\.weight`, which others"
    ):
        prune_(module, 0.5, "ln_structured", "layer", Targets(include=["conv"]), inputs=IMAGES)
    assert module.bn.weight.all() and module.bn.bias.all()


@pytest.mark.parametrize("bias", [True, False])
def test_units_of_a_transposed_convolution_are_its_outputs(bias: bool) -> None:
    layers = [nn.ConvTranspose2d(3, 8, 3, bias=bias), nn.BatchNorm2d(8), nn.Tanh(), nn.Conv2d(8, 4, 3)]
    model = rough(nn.Sequential(*layers))
    prune_(model, 0.5, "ln_structured", "layer", Targets(include=["0"]))
    assert_silent(model, gone_rows(model[0].weight, 1), model[3].weight, run=forward)


def test_dim_1_of_a_transposed_convolution_are_inputs_and_silence_nothing() -> None:
    model = rough(nn.Sequential(nn.ConvTranspose2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Conv2d(8, 4, 3)))
    prune_(model, 2 / 3, "ln_structured", "layer", Targets(include=["0"]), dim=1)
    assert int(gone_rows(model[0].weight).sum()) == 2
    assert model[0].bias.all() and model[1].weight.all() and model[1].bias.all()


@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 10}], ids=["one projection", "three projections"])
def test_rows_of_attention_projections_are_silent(sizes: dict[str, int]) -> None:
    # A query's row that is pruned makes what its key holds meaningless, and the other way round.
    attention = rough(nn.MultiheadAttention(8, 2, batch_first=True, **sizes))
    model = nn.ModuleDict({"attention": attention})
    query, key, value = (
        torch.randn(2, 5, 8),
        torch.randn(2, 4, sizes.get("kdim", 8)),
        torch.randn(2, 4, sizes.get("vdim", 8)),
    )
    masks = prune_(model, 0.5, "ln_structured", "layer", Targets(exclude=["attention.out_proj"]))
    rows = torch.cat([~mask.any(1) for mask in masks.values()])
    assert len(rows) == 24
    assert not attention.in_proj_bias[rows].any(), "biases of pruned rows speak"
    gone = rows[16:]
    assert_silent(model, gone, attention.out_proj.weight, run=lambda m: m["attention"](query, key, value)[0])


def test_a_tied_weight_silences_the_biases_of_all_its_owners() -> None:
    model = rough(TiedRows())
    prune_(model, 0.5, "ln_structured", "layer", Targets(exclude=["next"]))
    assert_silent(model, gone_rows(model.first.weight), model.next.weight, run=forward)


def test_what_averaging_callbacks_save_is_silent_too(tmp_path: Path) -> None:
    class Always(WeightAveraging):
        def should_update(self, step_idx: Any = None, epoch_idx: Any = None) -> bool:
            return step_idx is not None

    for name, average in (("ema", EMAWeightAveraging(decay=0.7)), ("mean", Always())):
        checkpoint = ModelCheckpoint(tmp_path / name, filename="{epoch}", save_top_k=-1)
        pruning = pruner(["conv"], window=Window(0.1, 0.5))
        fit(pruning, average, checkpoint, module=rough(Net()))
        for epoch in (3, 4):
            saved = torch.load(tmp_path / name / f"epoch={epoch}.ckpt", weights_only=True)
            for state in (saved["state_dict"], saved["current_model_state"]):
                module = Net()
                module.load_state_dict(state)
                assert_silent(module, gone_rows(module.conv.weight), module.next.weight, run=forward)


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_a_resumed_run_stays_silent_and_equals_the_uninterrupted(tmp_path: Path) -> None:
    every = ModelCheckpoint(tmp_path / "all", filename="{epoch}", save_top_k=-1)
    _, whole = fit(pruner(["conv"]), every, module=rough(Net()))
    for epoch in (1, 3):
        resumed, again = Net(), ModelCheckpoint(tmp_path / f"from {epoch}", filename="{epoch}", save_top_k=-1)
        trainer = quiet_trainer(max_epochs=5, callbacks=[pruner(["conv"]), again], enable_checkpointing=True)
        trainer.fit(resumed, ckpt_path=tmp_path / "all" / f"epoch={epoch}.ckpt", weights_only=True)
        assert_same_state(whole, resumed)
        assert_silent(resumed, gone_rows(resumed.conv.weight), resumed.next.weight, run=forward)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_submodule() -> None:
    module = Net()
    module.conv = torch.compile(module.conv)
    module = rough(module)
    order = list(module.state_dict())
    fit(pruner(["conv"]), module=module)
    assert list(module.state_dict()) == order
    gone = gone_rows(module.conv._orig_mod.weight)
    assert not module.bn.bias[gone].any()
    assert_silent(module, gone, module.next.weight, run=forward)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_submodule_that_holds_the_norm() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)).relu()

    class Module(Net):
        def __init__(self) -> None:
            super().__init__()
            del self.conv, self.bn
            self.block = torch.compile(Block())

        def middle(self, x: Tensor) -> Tensor:
            return self.block(x)

    _, module = fit(pruner(["block.conv"]), module=rough(Module()))
    assert_silent(module, gone_rows(module.block.conv.weight), module.next.weight, run=forward)


@pytest.mark.parametrize("ours_first", [True, False], ids=["ours first", "ours last"])
def test_p8_with_quantization_aware_training_a_fused_norm_of_scale_zero_trains(ours_first: bool) -> None:
    # P8; the fold divides by the BatchNorm's scale.
    module, pruning = rough(Net()), pruner(["conv"], window=Window(0.0, 0.4))
    losses: list[float] = []

    class Losses(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            losses.append(float(outputs["loss"]))

    qat = QuantizationAwareTraining(window=Window(0.5))
    callbacks = [pruning, qat] if ours_first else [qat, pruning]
    fit(*callbacks, Losses(), module=module, max_epochs=8)
    assert len(losses) == 16 and all(torch.tensor(losses).isfinite())
    gone = ~pruning.masks["conv.weight"].flatten(1).any(1)
    assert int(gone.sum()) == 4
    assert module(IMAGES).isfinite().all()
    codes = module.state_dict()["conv.weight"]
    assert codes.dtype == torch.int8 and torch.equal(gone_rows(codes), gone)
    assert not module.bn.weight[gone].any() and not module.bn.bias[gone].any() and module.bn.bias[~gone].any()
