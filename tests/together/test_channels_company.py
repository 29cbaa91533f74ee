"""`ChannelPruning` beside everything else that a fit may hold, in any order."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn

from lightning_compress import (
    ChannelPruning,
    CompressionError,
    CompressionReport,
    Distillation,
    DistillationModule,
    EMATeacher,
    FeatureMSE,
    Linear,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    Rewind,
    ScheduledPruning,
    Snapshot,
    SoftTarget,
    Steps,
    Targets,
    Window,
    load_compressed,
)
from tests.support import fits
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import assert_same_state, count_zeros, hooks, snapshot

pytestmark = pytest.mark.filterwarnings("ignore:Swapping scheduler", "ignore:Be aware that when using `ckpt_path`")
both_orders = pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
STEPS = 21


def shrink(**settings: Any) -> ChannelPruning:
    """Channels leave after the steps 4, 7 and 10: 32, 29, 21, 16 of them are there, or about that."""
    window = Window(3, 10, unit="step", every_n_steps=3)
    return ChannelPruning(**{"channels": 0.5, "round_to": 1, "schedule": Linear(), "window": window, **settings})


fit = partial(fits.fit, max_epochs=3)


def ordered(first: bool, *callbacks: Callback) -> list[Callback]:
    return list(callbacks) if first else list(reversed(callbacks))


def fits(trainer: Any, module: nn.Module) -> None:
    """All that optimizers hold is of the module's shapes."""
    held = {parameter: state for optimizer in trainer.optimizers for parameter, state in optimizer.state.items()}
    assert set(module.parameters()) <= held.keys()
    for parameter, state in held.items():
        assert all(value.shape == parameter.shape for value in state.values() if value is not None and value.dim())


# Zeros.

ONE_LAYER: dict[str, Any] = {"scope": "layer", "targets": Targets(include=["body"])}
METHODS: dict[str, dict[str, Any]] = {
    "l1_unstructured": {},
    "lamp": {},
    "taylor": {},
    "movement": {},
    "random_unstructured": {},
    "tests.pruning.rules.Noisy": {},
    "ln_structured": ONE_LAYER,
    "random_structured": ONE_LAYER,
    "regrown": {"method": "taylor", "regrow": True},
    "rewound": {"rewind": Rewind(1), "schedule": Steps(), "window": Window(2, 15, unit="step")},
    "layer": {"scope": "layer"},
    "overridden": {"overrides": {"head": 0.25}},
}


IN_BOTH_ORDERS = ("taylor", "rewound", "ln_structured")


@pytest.mark.parametrize(
    ("method", "first"), [*((name, False) for name in METHODS), *((name, True) for name in IN_BOTH_ORDERS)]
)
def test_masks_follow_and_sparsity_is_exact_of_what_survives(method: str, first: bool) -> None:
    settings = {"window": Window(2, 18, unit="step"), "sparsity": 0.5, "method": method, **METHODS[method]}
    if method in ("regrown", "rewound", "layer", "overridden"):
        settings["method"] = METHODS[method].get("method", "l1_unstructured")
    pruning = ScheduledPruning(**settings)
    trainer, module = fit(*ordered(first, pruning, shrink()))
    assert {name: mask.shape for name, mask in pruning.masks.items()}["body.weight"] == (16, 16)
    weights = [module.get_parameter(name) for name in pruning.masks]
    gone = sum(int((~mask).sum()) for mask in pruning.masks.values())
    assert gone == round(0.5 * count_zeros(weights)[1])
    assert not any(weight[~mask].any() for weight, mask in zip(weights, pruning.masks.values(), strict=True))
    assert trainer.callback_metrics["sparsity"] == 0.5
    momenta = [trainer.optimizers[0].state[weight]["momentum_buffer"] for weight in weights]
    for momentum, mask in zip(momenta, pruning.masks.values(), strict=True):
        assert not momentum[~mask].any() and momentum[mask].any()


@both_orders
def test_masks_from_a_file_are_cut_with_the_same_indices(first: bool, tmp_path: Path) -> None:
    torch.manual_seed(3)
    masks = {"body.weight": torch.rand(32, 16) > 0.5, "head.weight": torch.rand(4, 32) > 0.5}
    torch.save(masks, tmp_path / "masks.pt")
    pruning = ScheduledPruning("custom_from_mask", mask_file=str(tmp_path / "masks.pt"), window=Window(1, 15, "step"))
    before: list[list[float]] = []
    after: list[list[float]] = []

    class FitCalls(Callback):
        """Notes a bias for each channel; no two are alike."""

        def __init__(self, seen: list[list[float]]) -> None:
            self.seen = seen

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.seen.append(pl_module.body.bias.tolist())

    class Later(FitCalls):
        """Another kind of callback, as Lightning wants."""

    fit(FitCalls(before), *ordered(first, pruning, shrink()), Later(after))
    index = torch.arange(32)
    for wide, narrow in zip(before, after, strict=True):
        index = index[[wide.index(bias) for bias in narrow]]
    assert len(index) == 16
    body, head = masks["body.weight"][index], masks["head.weight"][:, index]
    assert_same_state(pruning.masks, {"body.weight": body, "head.weight": head})


@pytest.mark.filterwarnings("ignore:ScheduledPruning. without its channels, head.weight can't be pruned")
@both_orders
def test_groups_of_n_of_m_go_on_where_widths_dont_divide_into_them(first: bool) -> None:
    pruning = ScheduledPruning(n_m="2:4", window=Window(2, 18, unit="step"))
    _, module = fit(*ordered(first, pruning, shrink()))
    zeros, elements = count_zeros([module.body.weight])
    assert module.body.weight.shape == (16, 16) and zeros == elements / 2
    grouped = (module.body.weight != 0).view(16, 4, 4).sum(-1)
    assert (grouped == 2).all()


# Quantization.


def int8_shapes(module: nn.Module) -> set[tuple[int, ...]]:
    return {tuple(parameter.shape) for parameter in module.parameters() if parameter.dtype == torch.int8}


@pytest.mark.filterwarnings("ignore:QuantizationAwareTraining. these weights were saved before")
@both_orders
def test_quantization_begins_when_the_last_channels_have_left(first: bool, tmp_path: Path) -> None:
    qat = QuantizationAwareTraining(window=Window(10, unit="step"))
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer, module = fit(*ordered(first, qat, shrink()), save)
    metrics = trainer.test(module, TinyData(), verbose=False)
    assert int8_shapes(module) == {(4, 16), (16, 16)}
    fresh = ordered(first, QuantizationAwareTraining(window=Window(10, unit="step")), shrink())
    path = tmp_path / "epoch=2.ckpt"
    assert quiet_trainer(callbacks=fresh).test(Classifier(), TinyData(), ckpt_path=path, verbose=False) == metrics
    wide = quiet_trainer(callbacks=fresh).test(
        Classifier(), TinyData(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False
    )
    assert trainer.test(module, TinyData(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False) == wide != metrics


@both_orders
@pytest.mark.parametrize(
    "window", [Window(9, unit="step"), Window(0.4), Window(1, unit="epoch"), Window(0.0, 0.4)], ids=str
)
def test_quantization_that_would_begin_earlier_is_refused_and_nothing_changes(window: Window, first: bool) -> None:
    module = Classifier()
    before, attributes = snapshot(module), set(vars(module))
    with pytest.raises(CompressionError, match="QuantizationAwareTraining must start when all channels have left"):
        fit(*ordered(first, QuantizationAwareTraining(window=window), shrink()), module=module)
    assert_same_state(before, snapshot(module))
    assert hooks(module) == [] and set(vars(module)) == attributes


@both_orders
def test_the_refusal_names_a_window_that_works(first: bool) -> None:
    with pytest.raises(CompressionError, match="must start when all channels have left") as refused:
        early = QuantizationAwareTraining(window=Window(0.1))
        fit(*ordered(first, early, ChannelPruning(macs=0.5, schedule=Linear())))
    [start] = re.findall(r"start it later: \S+Window\(start=([\d.]+), unit='fit'\)", str(refused.value))
    qat = QuantizationAwareTraining(window=Window(float(start)))
    _, module = fit(*ordered(first, qat, ChannelPruning(macs=0.5, schedule=Linear())))
    assert int8_shapes(module) == {(16, 16), (4, 16)}


def test_an_overlap_in_the_same_unit_is_refused_in_setup() -> None:
    trainer = quiet_trainer(callbacks=[shrink(), QuantizationAwareTraining(window=Window(9, unit="step"))])
    with pytest.raises(CompressionError, match="must start when all channels have left"):
        trainer.fit(Classifier(), TinyData())
    assert trainer.optimizers == []


@both_orders
@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic", "int8_weight_only"])
def test_a_narrower_model_is_quantized_for_tests_and_trains_on(scheme: str, first: bool, tmp_path: Path) -> None:
    ptq = PostTrainingQuantization(scheme, calibration_batches=2)
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer, module = fit(*ordered(first, ptq, shrink()), save)
    after = snapshot(module)
    narrow = trainer.test(module, TinyData(), verbose=False)
    assert_same_state(after, snapshot(module))
    wide = trainer.test(module, TinyData(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert trainer.test(module, TinyData(), ckpt_path=tmp_path / "epoch=2.ckpt", verbose=False) == narrow != wide
    assert module.body.out_features == 16


# Teachers.


def teacher() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 4))


@both_orders
def test_adapters_lose_the_channels_that_they_read(first: bool) -> None:
    distillation = Distillation(teacher(), [SoftTarget(), FeatureMSE("body", "1")], task_weight=0.5)
    before: list[Any] = []

    class FitCalls(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            [adapter] = distillation.objective.adapters.values()
            state = trainer.optimizers[0].state.get(adapter.weight, {})
            momentum = state.get("momentum_buffer")
            before.append([t.detach().clone() for t in (pl_module.body.weight, adapter.weight, momentum)])

    trainer, module = fit(FitCalls(), *ordered(first, distillation, shrink()), FitCalls())
    [adapter] = distillation.objective.adapters.values()
    assert adapter.weight.shape == (48, 16)
    fits(trainer, module)
    cuts = [
        (tensors, narrow)
        for tensors, narrow in zip(before[::2], before[1::2], strict=True)
        if len(tensors[0]) != len(narrow[0])
    ]
    assert len(cuts) >= 2
    for old, new in cuts:
        rows = [row.tolist() for row in old[0]]
        indices = [rows.index(row.tolist()) for row in new[0]]
        assert torch.equal(new[1], old[1][:, indices]) and torch.equal(new[2], old[2][:, indices])
    assert "train_feature_mse" in trainer.callback_metrics


@both_orders
def test_a_mean_teacher_loses_them_too(first: bool) -> None:
    made = EMATeacher(0.0)
    trainer, module = fit(*ordered(first, Distillation(made, [SoftTarget()], task_weight=0.5), shrink()))
    # With no memory it is the student.
    assert_same_state(made.model.state_dict(), module.state_dict())
    assert module.body.out_features == 16 and made.model.head.in_features == 16
    fits(trainer, module)


@both_orders
def test_features_of_a_mean_teacher_stay_comparable(first: bool) -> None:
    made = EMATeacher(0.9)
    distillation = Distillation(made, [SoftTarget(), FeatureMSE("body", "body")], task_weight=0.5)
    _, module = fit(*ordered(first, distillation, shrink()))
    assert module.body.out_features == made.model.body.out_features == 16


@both_orders
def test_a_snapshot_stays_as_it_was(first: bool) -> None:
    module = Classifier()
    before = snapshot(module)
    made = Snapshot()
    fit(*ordered(first, Distillation(made, [SoftTarget()], task_weight=0.5), shrink()), module=module)
    assert_same_state(before, snapshot(made.model))
    assert module.body.out_features == 16


def test_what_a_teacher_without_an_adapter_is_compared_with_keeps_its_width() -> None:
    distillation = Distillation(Snapshot(), [FeatureMSE("body", "body")], task_weight=0.5)
    module = Classifier()
    with pytest.raises(CompressionError, match="must have channels that can be removed.*body"):
        fit(distillation, shrink(), module=module)
    assert module.body.out_features == 32


def network(width: int) -> nn.Module:
    hidden = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU())
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), hidden, nn.Linear(width, 4))


def distilled(given: Any) -> DistillationModule:
    torch.manual_seed(0)
    losses = [SoftTarget(weight=0.5), FeatureMSE(student_layer="2", teacher_layer="2", weight=0.1)]
    return DistillationModule(
        student=network(24),
        teacher=given,
        losses=losses[: 1 if isinstance(given, EMATeacher) else 2],
        task_weight=0.5,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    )


@pytest.mark.parametrize("given", ["larger", "average"])
def test_a_distilled_student_shrinks_with_its_adapters_and_average(given: str, tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    made = network(40) if given == "larger" else EMATeacher(0.9)
    trainer, module = fit(shrink(), save, module=distilled(made))
    widths = [module.student[0].out_features, module.student[2][0].out_features]
    assert sum(widths) == 24 and module.student[3].in_features == widths[1]
    fits(trainer, module)
    if given == "larger":
        [adapter] = module.adapters.values()
        assert adapter.weight.shape == (40, widths[1])
    else:
        assert made.model[3].in_features == widths[1]
    again = load_compressed(tmp_path / "epoch=2.ckpt", distilled(None))
    assert_same_state(again.student, module.student)
    assert_same_state(again.adapters, module.adapters)
    metrics = trainer.test(module, TinyData(), verbose=False)
    tester = quiet_trainer(callbacks=[shrink()])
    assert tester.test(distilled(None), TinyData(), ckpt_path=tmp_path / "epoch=2.ckpt", verbose=False) == metrics


# Averages and the report.


class Recorder(Callback):
    """The weights after each batch; what an average is made of."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen.append(snapshot(dict(pl_module.named_parameters())))


@both_orders
def test_an_average_is_that_of_the_channels_that_stay(first: bool) -> None:
    once = shrink(schedule=Steps([0.0], [1.0]), window=Window(9, 12, unit="step"), calibration_batches=0)
    recorder = Recorder()
    initial = Classifier()
    state = snapshot(dict(initial.named_parameters()))
    # The average is updated after each step; recorded before the cut, so that the 9th is still the wide one.
    _, module = fit(recorder, *ordered(first, EMAWeightAveraging(decay=0.75), once), module=initial)
    [kept] = [plan.kept for plan in once.plans]
    index = kept["body.weight"][0]
    narrow = {"body.weight": 0, "body.bias": 0, "norm.weight": 0, "norm.bias": 0, "head.weight": 1}
    average = {name: value.double() for name, value in state.items()}
    for step, weights in enumerate(recorder.seen, 1):
        for name, value in weights.items():
            # Lightning copies the first; then it averages.
            average[name] = value.double() if step == 1 else 0.75 * average[name] + 0.25 * value.double()
            if step == 9 and name in narrow:
                average[name] = average[name].index_select(narrow[name], index)
    assert module.body.out_features == 16
    for name, value in module.named_parameters():  # Lightning puts the average into the module at the end
        torch.testing.assert_close(value.double(), average[name], rtol=1e-4, atol=1e-6)


@both_orders
@pytest.mark.parametrize("start", [1, 2])
def test_stochastic_weight_averaging_before_and_after_the_cut(start: int, first: bool) -> None:
    swa = StochasticWeightAveraging(0.01, swa_epoch_start=start)
    window = Window(10, 17, unit="step", every_n_steps=3)
    trainer, module = fit(*ordered(first, swa, shrink(window=window)), max_epochs=4)
    assert module.body.weight.shape == (16, 16) and module.norm.running_mean.shape == (16,)
    assert trainer.callback_metrics["val_loss"].isfinite()
    fits(trainer, module)


@both_orders
def test_the_report_measures_what_really_went(first: bool, tmp_path: Path) -> None:
    report, pruning = CompressionReport(str(tmp_path), picture=False, max_seconds=0.01), shrink(min_layer_channels=0.75)
    with pytest.warns(UserWarning, match="budget is missed"):
        fit(*ordered(first, report, pruning))
    text = (tmp_path / "report.md").read_text()
    params = {h: 16 * h + h + 2 * h + 4 * h + 4 for h in (24, 32)}
    assert f"| before | {params[32]} |" in text and f"| after | {params[24]} (" in text
    assert "channels=0.5 was asked for, 0.750 is nearest" in text


def test_a_teachers_arithmetic_is_no_part_of_the_budget() -> None:
    def net(width: int) -> nn.Sequential:
        return nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 4))

    module = DistillationModule(student=net(32), teacher=net(500), losses=[SoftTarget()])
    _, module = fit(ChannelPruning(macs=0.5, round_to=1), module=module)
    assert module.student[1].out_features == 16
