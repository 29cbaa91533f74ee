"""`ChannelPruning` in a fit: what leaves when, and how training goes on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_compress import (
    ChannelPruning,
    CompressionError,
    Linear,
    NoEffectWarning,
    OneShot,
    Steps,
    Targets,
    Window,
)
from tests.support.data import TinyData
from tests.support.fits import fit
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import assert_same_state, hooks, snapshot

PER_EPOCH = 7  # batches of `TinyData`, the last one of 2 samples


def shrink(**settings: Any) -> ChannelPruning:
    """Half of the channels leave after step 8, unless told otherwise."""
    window = Window(8, 12, unit="step")
    defaults = {"channels": 0.5, "round_to": 1, "calibration_batches": 0}
    return ChannelPruning(**{**defaults, "window": window, **settings})


class TensorLog(Callback):
    """A copy of the module's tensors and of what optimizers remember of them, after every batch."""

    def __init__(self) -> None:
        self.tensors: list[dict[str, Tensor]] = []
        self.remembered: list[dict[str, dict[str, Tensor]]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.tensors.append(snapshot(pl_module))
        states = {parameter: state for optimizer in trainer.optimizers for parameter, state in optimizer.state.items()}
        named = {name: states.get(parameter, {}) for name, parameter in pl_module.named_parameters()}
        self.remembered.append({name: snapshot(state) for name, state in named.items()})

    @property
    def widths(self) -> list[int]:
        return [len(tensors["body.weight"]) for tensors in self.tensors]


def survivors(before: Tensor, after: Tensor) -> list[int]:
    """Which rows of one are the rows of the other: no two of them are alike."""
    rows = [row.tolist() for row in before]
    found = [rows.index(row.tolist()) for row in after]
    assert found == sorted(set(found)) and 0 < len(found) < len(rows)
    return found


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "amsgrad": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, amsgrad=True),
    "centered": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.01),
    "lbfgs": lambda groups: torch.optim.LBFGS([parameter for group in groups for parameter in group["params"]], lr=0.1),
}


class Optimized(Classifier):
    """Two groups of parameters for the optimizer of that name."""

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.optimizer = optimizer

    def configure_optimizers(self) -> torch.optim.Optimizer:
        head = set(self.head.parameters())
        return OPTIMIZERS[self.optimizer](
            [{"params": [p for p in self.parameters() if p not in head]}, {"params": list(head)}]
        )


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "lbfgs"])
def test_moments_and_buffers_are_cut_with_the_same_indices(optimizer: str) -> None:
    before, after = TensorLog(), TensorLog()
    fit(before, shrink(), after, module=Optimized(optimizer))
    at = after.widths.index(16)
    assert at == 7 and before.widths[at] == 32
    old, new = before.tensors[at], after.tensors[at]
    rows = survivors(old["body.weight"], new["body.weight"])
    expected = {
        name: tensor[:, rows] if name == "head.weight" else tensor[rows] if tensor.shape[:1] == (32,) else tensor
        for name, tensor in old.items()
    }
    assert_same_state(expected, new)
    for name, state in before.remembered[at].items():
        moments = {key for key, value in state.items() if isinstance(value, Tensor) and value.dim()}
        assert moments
        for key in moments:
            expected_state = state[key][:, rows] if name == "head.weight" else state[key]
            expected_state = expected_state[rows] if expected_state.shape[0] == 32 else expected_state
            assert_same_state(expected_state, after.remembered[at][name][key])
        numbers = {key: value for key, value in state.items() if key not in moments}
        assert_same_state(numbers, {key: after.remembered[at][name][key] for key in numbers})


def test_parameters_stay_the_same_objects_in_the_same_groups() -> None:
    module = Optimized("sgd")
    before = dict(module.named_parameters())
    trainer, _ = fit(shrink(), module=module)
    assert module.body.weight.shape == (16, 16)
    assert all(after is before[name] for name, after in module.named_parameters())
    first, second = (group["params"] for group in trainer.optimizers[0].param_groups)
    assert {*map(id, first)} == {*map(id, [*module.body.parameters(), *module.norm.parameters()])}
    assert {*map(id, second)} == {*map(id, module.head.parameters())}


class Scheduled(Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5), "interval": "step"}]


@pytest.mark.parametrize("how", ["plain", "clipped", "scheduled", "accumulated"])
def test_training_goes_on_as_if_the_module_had_been_built_so(how: str) -> None:
    after = TensorLog()
    options = {"clipped": {"gradient_clip_val": 0.1}, "accumulated": {"accumulate_grad_batches": 2}}
    module = Scheduled() if how == "scheduled" else Classifier()
    every = 2 if how == "accumulated" else 1
    fit(
        shrink(window=Window(4, 6, unit="step")),
        after,
        module=module,
        data=TinyData(samples=48),
        **options.get(how, {}),
    )
    at = after.widths.index(16)
    assert at == 4 * every - 1
    # The same by hand, from there on.
    twin = Classifier(hidden=16)
    twin.load_state_dict(after.tensors[at])
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for name, parameter in twin.named_parameters():
        optimizer.state[parameter]["momentum_buffer"] = after.remembered[at][name]["momentum_buffer"]
    data = TinyData(samples=48)
    data.setup("fit")
    batches = [*data.train_dataloader()] * 2
    for number, (x, y) in enumerate(batches[at + 1 :], at + 1):
        # Statistics are of the batches since the cut, and of that on which it was planned.
        twin.norm.momentum = max(0.1, 1 / (number - at + 1))
        if how == "scheduled":
            optimizer.param_groups[0]["lr"] = 0.1 * 0.5 ** (number // 5)
        (F.cross_entropy(twin(x), y) / every).backward()
        if (number + 1) % every == 0:
            if how == "clipped":
                nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    assert_same_state(twin, module)


SCHEDULES: dict[str, tuple[dict[str, Any], dict[int, int]]] = {
    # The window is that of the steps 4 to 14; step to width from there on.
    "at once": ({"schedule": OneShot()}, {4: 16}),
    "in steps": ({"schedule": Steps([0.1, 0.5, 1.0], [0.25, 0.75, 1.0])}, {5: 28, 9: 20, 14: 16}),
    "linear": ({"schedule": Linear(), "window": Window(4, 14, unit="step", every_n_steps=4)}, {8: 26, 12: 19, 14: 16}),
    "in epochs": ({"window": Window(1, 2, unit="epoch")}, {7: 16}),
    "of the fit": ({"window": Window(0.25, 0.5)}, {3: 16}),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_channels_leave_when_the_schedule_says(name: str) -> None:
    settings, changes = SCHEDULES[name]
    log = TensorLog()
    fit(shrink(**{"window": Window(4, 14, unit="step"), **settings}), log)
    expected, width = [], 32
    for step in range(1, 2 * PER_EPOCH + 1):
        width = changes.get(step, width)
        expected.append(width)
    assert log.widths == expected


def test_a_window_from_the_start_cuts_before_the_first_step() -> None:
    steps = TensorLog()
    fit(shrink(window=Window(0, 0.5)), steps, max_epochs=1)
    assert steps.widths == [16] * PER_EPOCH


COSTS = {"channels": lambda h: h, "params": lambda h: 16 * h + h + 2 * h + 4 * h + 4, "macs": lambda h: 16 * h + 4 * h}


@pytest.mark.filterwarnings("ignore:ChannelPruning. The budget is missed")  # of 32 channels none may be near enough
@pytest.mark.parametrize(("kind", "fraction"), [("channels", 0.55), ("params", 0.3), ("macs", 0.45)])
@pytest.mark.parametrize("schedule", [OneShot(), Linear()], ids=["at once", "linear"])
def test_the_budget_is_met_as_nearly_as_whole_channels_can(kind: str, fraction: float, schedule: Any) -> None:
    # Batches of 8 and of 2: multiply-accumulates are those of the whole model on the same batch.
    settings: dict[str, Any] = {"channels": None, kind: fraction, "schedule": schedule}
    trainer, module = fit(shrink(**settings))
    cost = COSTS[kind]
    nearest = min(range(1, 33), key=lambda h: abs(cost(h) / cost(32) - fraction))
    assert module.body.out_features == nearest
    assert trainer.callback_metrics[f"remaining_{kind}"].item() == pytest.approx(cost(nearest) / cost(32))


def test_floors_on_the_way_are_those_of_the_end() -> None:
    class Two(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 4))
            del self.body, self.norm, self.head

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.net(x.flatten(1))
            return output

    module = Two()
    with torch.no_grad():  # half of the first layer's channels matter least of all
        module.net[0].weight[20:] *= 1e-3
        module.net[0].bias[20:] *= 1e-3
        module.net[2].weight[:, 20:] *= 1e-3
    halves = Steps(points=[0.0, 1.0], fractions=[0.5, 1.0])
    callback = shrink(schedule=halves, importance="l1")
    fit(callback, module=module)
    first, last = ([row.after for row in plan.rows] for plan in callback.plans)
    assert first == [20, 40]
    assert sum(last) == 40 and min(last) >= 15  # three quarters of a half


def test_a_missed_budget_is_said_and_reported() -> None:
    pruning = shrink(min_layer_channels=0.75)
    with pytest.warns(UserWarning, match="channels=0.5 was asked for, 0.750 is nearest"):
        fit(pruning)
    assert any("channels=0.5 was asked for, 0.750 is nearest" in note for note in pruning.report_notes())


def test_training_that_stops_before_the_windows_end_says_what_is_reached() -> None:
    pruning = shrink(schedule=Linear(), window=Window(1, 27, unit="step"))
    with pytest.warns(UserWarning, match=r"stopped at optimizer step 14.*channels=0.5 was asked for, 0.781 is reached"):
        _, module = fit(pruning)
    assert module.body.out_features == 25  # 13 of 26 steps of the way
    assert any("0.781 is reached" in note for note in pruning.report_notes())


def test_the_report_says_what_keeps_its_width() -> None:
    pruning = shrink(targets=Targets(exclude=["second"]))
    fit(pruning, module=Deeper())
    assert [note for note in pruning.report_notes() if note.startswith("`second` keeps its width")]


class Deeper(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.norm(self.body(x)).relu()).relu())


def test_an_override_holds_and_the_others_make_up_the_difference() -> None:
    _, module = fit(shrink(overrides={"second": 0.25}, scope="layer"), module=Deeper())
    assert (module.body.out_features, module.second.out_features) == (24, 8)


@pytest.mark.parametrize("settings", [{"include": ["body"]}, {"exclude": ["second"]}, {}], ids=str)
def test_a_budget_of_channels_counts_those_of_the_targets(settings: dict[str, Any]) -> None:
    module = Deeper()
    module.second.requires_grad_(bool(settings))  # a frozen layer isn't targeted
    fit(shrink(targets=Targets(**settings)), module=module)
    assert (module.body.out_features, module.second.in_features, module.second.out_features) == (16, 16, 32)


def test_a_message_names_the_budget_as_it_was_given() -> None:
    with pytest.warns(UserWarning, match="channels=0.3 was asked for"):
        fit(shrink(channels=0.3, min_layer_channels=0.75))


def test_nothing_to_remove_is_an_error_and_nothing_has_changed() -> None:
    module = Classifier()
    before = snapshot(module)
    with pytest.raises(CompressionError, match="must have channels that can be removed.*`head`: an output"):
        fit(shrink(targets=Targets(include=["head"]), window=Window(0, 0.5)), module=module)
    assert_same_state(before, snapshot(module))
    assert hooks(module) == [] and "_removed_channels" not in vars(module)
    fit(shrink(), module=module)


@pytest.mark.parametrize("settings", [{"targets": Targets(include=["bdy"])}, {"overrides": {"bdy": 0.5}}], ids=str)
def test_a_pattern_that_matches_nothing_is_refused_with_what_there_is(settings: dict[str, Any]) -> None:
    with pytest.raises(CompressionError, match="'bdy'.*body"):
        fit(shrink(**settings))


# Nothing is drawn, nothing moves.


class Drawing(Classifier):
    """Draws from every global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.body(x)).relu()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1 + 0.1 * random.random() + 0.1 * np.random.rand())


@pytest.mark.parametrize("importance", ["l2", "taylor", "random"])
def test_a_budget_of_everything_equals_the_plain_fit_bit_for_bit(importance: str) -> None:
    ends = []
    for callbacks in ([], [ChannelPruning(macs=1.0, importance=importance, schedule=Linear())]):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        trainer, module = fit(*callbacks, module=Drawing())
        generators = [torch.get_rng_state(), repr(random.getstate()), repr(np.random.get_state())]
        ends.append([module, trainer.optimizers[0].state_dict(), generators])
    assert_same_state(snapshot(ends[0]), snapshot(ends[1]))


def test_a_budget_of_everything_leaves_nothing_behind() -> None:
    _, module = fit(ChannelPruning(macs=1.0))
    assert vars(module).keys() == vars(fit()[1]).keys()


def test_no_channel_left_is_said() -> None:
    with pytest.warns(NoEffectWarning, match="no channel has left"):
        fit(shrink(channels=0.99, round_to=32))


class Breaking(Classifier):
    """Its momentum is its own, and its tenth batch breaks it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm.momentum = 0.05

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.trainer.global_step == 9:
            raise RuntimeError("stopped")
        return loss


def test_a_norms_momentum_is_its_own_again_after_every_batch() -> None:
    seen: list[float] = []

    class Momenta(Callback):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(pl_module.norm.momentum)

    module = Breaking()
    with pytest.raises(RuntimeError, match="stopped"):
        fit(shrink(), Momenta(), module=module, val_check_interval=1)
    assert module.body.out_features == 16
    assert len(seen) == 10 and {*seen, module.norm.momentum} == {0.05}


@pytest.mark.filterwarnings("ignore:Found 1 module")
def test_a_norm_in_evaluation_mode_stays_so() -> None:
    module = Classifier()
    module.norm.eval()
    fit(shrink(), module=module)
    assert not module.norm.training and module.norm.num_batches_tracked == 0 and module.body.training


# Trainers as people call them.


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(0)
        while True:
            yield torch.randn(16, generator=generator), torch.randint(4, (), generator=generator)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_an_endless_loader_works_with_a_window_in_steps_only() -> None:
    loader = DataLoader(Endless(), batch_size=8)
    for window in (Window(0.2, 0.5), Window(1, 2, unit="epoch")):
        module = Classifier()
        with pytest.raises(CompressionError, match=r"must have a fit of known length.*unit='step'"):
            quiet_trainer(max_epochs=-1, callbacks=[shrink(window=window)]).fit(module, loader)
        assert module.body.out_features == 32 and hooks(module) == []
    quiet_trainer(max_steps=14, callbacks=[shrink()]).fit(module, loader)
    assert module.body.out_features == 16


@pytest.mark.parametrize(
    "options",
    [
        {"fast_dev_run": True},
        {"fast_dev_run": 3},
        {"limit_train_batches": 2},
        {"max_epochs": -1, "max_steps": 5},
        {"accumulate_grad_batches": 5},
        {"precision": "bf16-mixed"},
        {"precision": "64-true"},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        {"num_sanity_val_steps": 0, "val_check_interval": 2},
        {"reload_dataloaders_every_n_epochs": 1},
    ],
    ids=str,
)
def test_every_trainer_ends_at_the_budget(options: dict[str, Any]) -> None:
    trainer, module = fit(shrink(window=Window(0.1, 0.7), schedule=Steps()), **options)
    assert module.body.weight.shape == (16, 16) and module.head.weight.shape == (4, 16)
    [optimizer] = trainer.optimizers
    assert all(state["momentum_buffer"].shape == parameter.shape for parameter, state in optimizer.state.items())


def test_lbfgs_starts_anew() -> None:
    with pytest.warns(UserWarning, match="LBFGS keeps state of no known layout"):
        fit(shrink(), module=Optimized("lbfgs"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # the compiler's own, where it is imported first
def test_a_compiled_submodule_shrinks_and_is_compiled_anew() -> None:
    class Compiled(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    module = Compiled()
    net = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
    module.body, module.norm, module.head = torch.compile(net), nn.Identity(), nn.Identity()
    fit(shrink(targets=Targets(include=["body.0"])), module=module)
    x = torch.randn(8, 16)
    assert net[0].weight.shape == (16, 16)
    torch.testing.assert_close(module.body.eval()(x), net.eval()(x))


def test_fits_again_without_losing_more() -> None:
    pruning = shrink()
    _, module = fit(pruning)
    first = snapshot(module)
    trainer, _ = fit(pruning, module=module)
    assert module.body.out_features == 16 and trainer.callback_metrics["remaining_channels"] == 0.5
    assert not torch.equal(first["body.weight"], module.body.weight)
    _, other = fit(pruning, module=Classifier(hidden=24))
    assert other.body.out_features == 12


def test_a_latency_budget_is_measured_once_and_kept_as_a_goal(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_compress.channels.planning import search

    # Time as it would be if nothing but hidden widths mattered.
    monkeypatch.setattr(search, "latency_ratio", lambda subject, twin, *_, **__: twin.body.out_features / 32)
    pruning = shrink(channels=None, latency=0.5, schedule=Linear())
    trainer, module = fit(pruning)
    goal = pruning.state_dict()["goal"]
    assert goal == pytest.approx(module.body.out_features / 32) and 0.45 <= goal <= 0.55
    assert pruning.state_dict()["latency"] == pytest.approx(goal)
    assert trainer.callback_metrics["remaining_macs"].item() == pytest.approx(goal)


def test_a_multiple_holds_after_several_rounds() -> None:
    pruning = shrink(channels=0.375, round_to=8, schedule=Linear(), window=Window(0.1, 0.7))
    _, module = fit(pruning, module=Classifier(hidden=64))
    assert len(pruning.plans) > 2
    assert module.body.out_features == 24
