"""`Distillation` over LightningModules as users have them: what stands beside it in a fit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_compress import FeatureMSE, QuantizationAwareTraining, ScheduledPruning, SoftTarget
from lightning_compress.distillation import Distillation, DistillationModule, Ramp, Snapshot
from tests.distillation.nets import ConvNet, assert_same_bits, bits, dataset, loader, trainer
from tests.distillation.own import Own, assert_close, kd, large
from tests.support.oracles import hooks, same_random_state

# The modules can validate; most of these runs have nothing to validate on.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning")
AVERAGING = pytest.mark.filterwarnings("ignore:Swapping scheduler:UserWarning")
OTHER_FOLDER = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed", "ignore:Be aware that when using `ckpt_path`"
)


# What the dry run must not leave behind.


class Random(ConvNet):
    """Everything that a dry run might move: BatchNorm, dropout, a counter, a generator of its own."""

    def __init__(self) -> None:
        super().__init__(dropout=0.5)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.calls += 1
        return super().forward(x + 0.1 * torch.randn_like(x))


def test_the_dry_run_moves_nothing_but_the_optimizers_list() -> None:
    class Before(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
            if trainer.global_step == 0:
                self.state, self.modes = bits(module), [child.training for child in module.modules()]
                self.random, self.calls = torch.get_rng_state(), module.net.calls

    class After(Before):
        pass

    module, before, after = Own(Random()), Before(), After()
    module.net.dropout.eval()
    callback = Distillation(large(), [SoftTarget(), FeatureMSE("net.features.0", "features.0")])
    with pytest.warns(UserWarning, match="Found 1 module"):
        trainer(callbacks=[before, callback, after]).fit(module, loader())
    assert_same_bits(before.state, after.state)
    assert torch.equal(before.random, after.random)
    assert (before.modes, before.calls) == (after.modes, after.calls) and False in before.modes
    assert int(module.net.seen) == module.net.calls == 3


def test_a_fit_with_a_weightless_teacher_is_the_fit_without() -> None:
    # Dropout and noise are drawn from the global generator: one number more or less would show.
    ends = []
    for callbacks in ([], [Distillation(large(), [SoftTarget(weight=0.0)])]):
        torch.manual_seed(0)
        net = Random()
        module = Own(net)
        trainer(callbacks=callbacks, max_epochs=2).fit(module, loader(), loader())
        ends.append(bits(module))
    assert_same_bits(*ends)


def test_construction_draws_nothing() -> None:
    teacher = large()
    with same_random_state():
        Distillation(teacher, [SoftTarget(), FeatureMSE(pairs="auto")], ramps=[Ramp("soft_target")])


# In company.


@pytest.mark.parametrize("clip", ["norm", "value"])
def test_clipping_counts_the_adapters(clip: str) -> None:
    class Adapter(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
            self.state = getattr(self, "state", None) or bits(callback.objective.adapters["feature_mse"])

    module, teacher, first = Own(), large(), Adapter()
    twin = copy.deepcopy(module)
    callback = Distillation(teacher, [FeatureMSE("net.features.0", "features.0", weight=5.0)])
    fit = trainer(
        gradient_clip_val=0.05, gradient_clip_algorithm=clip, accumulate_grad_batches=2, callbacks=[callback, first]
    )
    fit.fit(module, loader(32))
    adapter = nn.Conv2d(4, 8, 1)
    adapter.load_state_dict(first.state)
    parameters = [*twin.parameters(), *adapter.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for index, (x, y) in enumerate(loader(32)):
        hidden = twin.net.features[0](x)
        logits = twin.net.head(twin.net.features[1:](hidden.clone()).mean((2, 3)))
        mse = ((adapter(hidden) - teacher.features[0](x)) ** 2).mean()
        ((F.cross_entropy(logits, y) + 5.0 * mse) / 2).backward()
        if index % 2:
            if clip == "norm":
                torch.nn.utils.clip_grad_norm_(parameters, 0.05)
            else:
                torch.nn.utils.clip_grad_value_(parameters, 0.05)
            optimizer.step()
            optimizer.zero_grad()
    assert fit.global_step == 2
    assert_close(bits(module), bits(twin))
    assert_close(bits(callback.objective.adapters["feature_mse"]), bits(adapter))


@pytest.mark.parametrize("interval", ["step", "plateau"])
def test_schedulers_move_the_adapters_rate_too(interval: str, tmp_path: Path) -> None:
    class Scheduled(Own):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(
                [{"params": self.net.features.parameters()}, {"params": self.net.head.parameters(), "lr": 0.02}], 0.01
            )
            if interval == "step":
                scheduler: Any = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.1, 0.2], total_steps=6)
            else:
                scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=9e9)
            config = {"scheduler": scheduler, "interval": "step" if interval == "step" else "epoch"}
            return {"optimizer": optimizer, "lr_scheduler": {**config, "monitor": "val_loss"}}

    rates = []
    for callbacks in ([], [Distillation(large(), [FeatureMSE("net.features.0", "features.0", weight=0.0)])]):
        monitor, logger = LearningRateMonitor(), CSVLogger(tmp_path)
        fit = trainer(max_epochs=2, callbacks=[*callbacks, monitor], logger=logger, log_every_n_steps=1)
        fit.fit(Scheduled(), loader(), loader())
        rates.append([group["lr"] for group in fit.optimizers[0].param_groups])
    assert rates[0] == rates[1] != [0.01, 0.02]
    first, second = fit.optimizers[0].param_groups
    adapters = list(callbacks[0].objective.adapters.parameters())
    assert len(adapters) == len(second["params"]) == 2
    assert {id(parameter) for parameter in first["params"]} >= {id(parameter) for parameter in adapters}


def test_lbfgs_asks_the_teacher_in_each_closure() -> None:
    class Second(Own):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), max_iter=3)

    module, callback = Second(), Distillation(large(), [SoftTarget(), FeatureMSE("net.features.0", "features.0")])
    before = bits(module)
    trainer(callbacks=[callback]).fit(module, loader())
    assert not torch.equal(before["net.head.weight"], bits(module)["net.head.weight"])
    assert callback.objective.clock.step == 3


def test_an_average_of_weights_knows_nothing_of_teachers(tmp_path: Path) -> None:
    ends = []
    for average in ([], [EMAWeightAveraging(decay=0.5)]):
        save = ModelCheckpoint(tmp_path / str(len(average)), filename="last")
        callback = Distillation(large(), [SoftTarget(), FeatureMSE("net.features.0", "features.0")])
        module = Own()
        trainer(max_epochs=2, enable_checkpointing=True, callbacks=[callback, *average, save]).fit(
            module, loader(), loader()
        )
        assert hooks(module) == []
        ends.append(torch.load(tmp_path / str(len(average)) / "last.ckpt", weights_only=True))
    plain, averaged = ends
    assert_same_bits(plain["state_dict"], averaged["current_model_state"])
    assert averaged["state_dict"].keys() == Own().state_dict().keys()
    assert not torch.equal(plain["state_dict"]["net.head.weight"], averaged["state_dict"]["net.head.weight"])


@AVERAGING
def test_stochastic_weight_averaging_is_what_it_is_without() -> None:
    ends, features = [], FeatureMSE("net.features.0", "features.0", weight=0.0)
    for weight in (None, 0.0, 0.5):
        module = Own()
        teaching = [] if weight is None else [Distillation(large(), [SoftTarget(weight=weight), features])]
        average = StochasticWeightAveraging(0.05, swa_epoch_start=2)
        trainer(max_epochs=4, callbacks=[*teaching, average]).fit(module, loader())
        assert hooks(module) == []
        ends.append(bits(module))
    assert_same_bits(*ends[:2])
    assert not torch.equal(ends[0]["net.head.weight"], ends[2]["net.head.weight"])
    assert teaching[0].objective.clock.bounds is None


@OTHER_FOLDER
def test_test_of_the_best_and_a_module_with_checkpoint_hooks_of_its_own(tmp_path: Path) -> None:
    class Notes(Own):
        loaded: Any = None

        def on_save_checkpoint(self, checkpoint: Any) -> None:
            checkpoint["note"] = {"epoch": self.current_epoch}

        def on_load_checkpoint(self, checkpoint: Any) -> None:
            self.loaded = checkpoint["note"]

    module, save = Notes(), ModelCheckpoint(tmp_path, monitor="val_loss", save_weights_only=True)
    callback = Distillation(large(), [SoftTarget(), FeatureMSE("net.features.0", "features.0")])
    fit = trainer(max_epochs=3, enable_checkpointing=True, callbacks=[callback, save])
    fit.fit(module, loader(), loader())
    (row,) = fit.test(module, loader(), ckpt_path="best", verbose=False)
    assert row["test_loss"] == pytest.approx(float(save.best_model_score), rel=1e-5)
    assert module.loaded is not None and not torch.load(save.best_model_path, weights_only=True).get("callbacks")
    again = Notes()
    trainer(callbacks=[Distillation(large())]).validate(again, loader(), ckpt_path=save.best_model_path, verbose=False)
    assert again.loaded == module.loaded and hooks(again) == []


@pytest.mark.filterwarnings("ignore:.*training stopped at optimizer step:UserWarning")
def test_an_interrupted_fit_sends_the_teacher_home(tmp_path: Path) -> None:
    class Stops(Callback):
        def on_before_optimizer_step(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 2:
                raise KeyboardInterrupt

    teacher, module = large(), Own()
    before, tensors = bits(teacher), {name: p.data_ptr() for name, p in teacher.named_parameters()}
    callback = Distillation(
        teacher, [SoftTarget(), FeatureMSE("net.features.0", "features.0")], teacher_dtype="bfloat16"
    )
    qat = QuantizationAwareTraining()
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        trainer(callbacks=[callback, qat, ScheduledPruning(sparsity=0.5), Stops()]).fit(module, loader())
    assert_same_bits(before, bits(teacher))
    assert tensors == {name: p.data_ptr() for name, p in teacher.named_parameters()}
    assert hooks(teacher) == [] and "training_step" not in vars(module)
    fresh = Own()
    trainer(callbacks=[callback]).fit(fresh, loader())
    assert hooks(fresh) == []


def test_fit_twice_and_on_a_second_model_with_other_names() -> None:
    class Other(Own):
        def __init__(self) -> None:
            super().__init__()
            self.other, self.net = ConvNet(6), None

        def forward(self, x: Tensor) -> Any:
            return self.other(x)

    callback = Distillation(large(), [SoftTarget()], task_weight=0.5)
    module = Own()
    trainer(callbacks=[callback]).fit(module, loader())
    once = bits(module)
    trainer(callbacks=[callback]).fit(module, loader())
    alone = Own()
    alone.load_state_dict(once)
    trainer(callbacks=[Distillation(large(), [SoftTarget()], task_weight=0.5)]).fit(alone, loader())
    assert_same_bits(bits(alone), bits(module))
    other = Other()
    trainer(callbacks=[callback]).fit(other, loader(), loader())
    assert hooks(other) == hooks(module) == []


def test_pairs_are_found_anew_on_a_second_model() -> None:
    callback = Distillation(large(), [FeatureMSE(pairs="auto")])
    trainer(callbacks=[callback]).fit(Own(), loader())

    class Renamed(Own):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.net = self.net, None

        def forward(self, x: Tensor) -> Any:
            return self.body(x)

    fit = trainer(callbacks=[callback])
    fit.fit(Renamed(), loader())
    assert "train_feature_mse" in fit.callback_metrics


def test_a_copy_made_in_mid_fit_is_a_plain_module() -> None:
    class Copies(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            self.copy = copy.deepcopy(module)

    copies, callback = Copies(), Distillation(large(), [SoftTarget(), FeatureMSE("net.features.0", "features.0")])
    trainer(callbacks=[callback, copies]).fit(Own(), loader())
    plain = Own()
    plain.load_state_dict(copies.copy.state_dict())
    batch = next(iter(loader()))
    assert torch.equal(copies.copy.training_step(batch, 0), plain.training_step(batch, 0))


def test_a_copy_made_in_mid_fit_trains_in_a_trainer_of_its_own() -> None:
    class Copies(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            self.copy = copy.deepcopy(module)

    copies, callback = Copies(), Distillation(large(), [SoftTarget(), FeatureMSE("net.features.0", "features.0")])
    trainer(callbacks=[callback, copies]).fit(Own(), loader())
    plain = Own()
    plain.load_state_dict(copies.copy.state_dict())
    for module in (plain, copies.copy):
        trainer().fit(module, loader())
    assert_same_bits(bits(plain), bits(copies.copy))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision: Any) -> None:
    module, teacher = Own(), large()
    before = bits(teacher)
    callback = Distillation(teacher, [SoftTarget(), FeatureMSE("net.features.0", "features.0")])
    fit = trainer(precision=precision, max_epochs=2, callbacks=[callback])
    fit.fit(module, loader(), loader())
    assert_same_bits(before, bits(teacher))
    assert all(value.isfinite() for value in fit.callback_metrics.values())
    dtype = callback.objective.adapters["feature_mse"].weight.dtype
    assert dtype == {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]


# Logs.


def test_validation_tells_how_close_the_student_is(tmp_path: Path) -> None:
    class TwoLoaders(Own):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)

    module, teacher = TwoLoaders(), large()
    fit = trainer(callbacks=[Distillation(teacher)])
    fit.fit(module, loader(), [loader(20), loader(12)])
    module.eval(), teacher.eval()
    for index, samples in enumerate((20, 12)):
        x, _ = dataset(samples).tensors
        logits, target = module(x), teacher(x)
        agreement = (logits.argmax(1) == target.argmax(1)).float().mean()
        p, q = target.softmax(1), logits.softmax(1)
        kl = (p * (p.log() - q.log())).sum(1).mean().detach()
        logged = fit.callback_metrics
        assert float(logged[f"val_agreement/dataloader_idx_{index}"]) == pytest.approx(float(agreement))
        assert float(logged[f"val_kl/dataloader_idx_{index}"]) == pytest.approx(float(kl), rel=1e-4)


def test_shares_of_the_gradient_are_those_of_autograd() -> None:
    class Stops(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            self.logged = dict(trainer.callback_metrics)

    module, teacher, stops = Own(), large(), Stops()
    module.net.features.requires_grad_(False)
    twin = copy.deepcopy(module).train()
    callback = Distillation(teacher, [SoftTarget(weight=0.7)], task_weight=0.3, log_gradient_share=True)
    fit = trainer(limit_train_batches=1, log_every_n_steps=1, callbacks=[callback, stops])
    fit.fit(module, loader())
    (x, y), parameters = next(iter(loader())), list(twin.net.head.parameters())
    norms = []
    for part in (0.3 * F.cross_entropy(twin(x), y), 0.7 * kd(twin(x), teacher(x))):
        gradients = torch.autograd.grad(part, parameters)
        norms.append(float(torch.cat([gradient.flatten() for gradient in gradients]).norm()))
    assert float(stops.logged["train_task_share"]) == pytest.approx(norms[0] / sum(norms), rel=1e-4)
    assert float(stops.logged["train_soft_target_share"]) == pytest.approx(norms[1] / sum(norms), rel=1e-4)


def test_shares_are_logged_only_on_request_and_when_the_trainer_logs() -> None:
    class Counts(Callback):
        seen: list[bool]

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            self.seen = [*getattr(self, "seen", []), "train_task_share" in trainer.callback_metrics]

    counts = Counts()
    callback = Distillation(large(), log_gradient_share=True)
    trainer(log_every_n_steps=3, callbacks=[callback, counts]).fit(Own(), loader(40))
    assert counts.seen[:3] == [False, False, True]
    counts = Counts()
    trainer(log_every_n_steps=1, callbacks=[Distillation(large()), counts]).fit(Own(), loader())
    assert not any(counts.seen)


def test_a_distillation_module_may_be_taught_by_a_second_teacher() -> None:
    torch.manual_seed(3)
    module = DistillationModule(ConvNet(), large(), [SoftTarget(weight=0.5)], task_weight=0.5)
    fit = trainer(callbacks=[Distillation(Snapshot(), [FeatureMSE("student.features.0", "student.features.0")])])
    fit.fit(module, loader(), loader())
    assert {"train_loss", "train_soft_target", "train_feature_mse"} < set(fit.callback_metrics)
    assert hooks(module) == []
