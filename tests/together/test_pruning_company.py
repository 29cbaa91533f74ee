"""`ScheduledPruning` beside what users combine it with, and asked for what can't be had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, weight_norm

from lightning_compress import CompressionError, Rewind, ScheduledPruning, Steps, Targets, Window, prune_, sparsity
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer

ROUNDS: dict[str, Any] = {
    "schedule": Steps([0.0, 1.0], [0.5, 1.0]),
    "window": Window(4, 12, unit="step"),
    "rewind": Rewind(2),
}


class TwoLosses(Classifier):
    """Both losses are built before either optimizer steps, as a GAN's are."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        losses = [net(batch[0]).square().mean() for net in (self, self.other)]
        for optimizer, loss in zip((first, second), losses, strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        own = [*self.body.parameters(), *self.norm.parameters(), *self.head.parameters()]
        return [torch.optim.Adam(part, lr=0.01) for part in (own, self.other.parameters())]


def test_a_step_of_one_optimizer_leaves_the_graph_of_the_other_whole() -> None:
    module = TwoLosses()
    quiet_trainer(max_epochs=2, callbacks=[ScheduledPruning(sparsity=0.8)]).fit(module, TinyData())
    assert sparsity(module) == pytest.approx(0.8, abs=1e-3)


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Be aware that when using `ckpt_path`")
def test_resuming_with_other_settings_says_so(tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path, save_last=True)
    quiet_trainer(enable_checkpointing=True, callbacks=[ScheduledPruning(sparsity=0.5), saved]).fit(
        Classifier(), TinyData()
    )
    trainer = quiet_trainer(max_epochs=3, callbacks=[ScheduledPruning(sparsity=0.9)])
    with pytest.warns(UserWarning, match="written with other settings: sparsity=0.5"):
        trainer.fit(Classifier(), TinyData(), ckpt_path=tmp_path / "last.ckpt")


def test_an_average_goes_back_too() -> None:
    average = EMAWeightAveraging(decay=0.999)
    seen: list[float] = []

    class Look(ScheduledPruning):
        def act(self, trainer: Any, pl_module: Any, progress: float) -> None:
            super().act(trainer, pl_module, progress)
            if progress in (0.0, 1.0):
                copy = average._average_model.module
                seen.append(float((copy.body.weight - pl_module.body.weight).detach().abs().max()))

    quiet_trainer(max_epochs=3, callbacks=[average, Look(sparsity=0.5, **ROUNDS)]).fit(Classifier(), TinyData())
    assert seen == [0.0, 0.0]


def test_two_callbacks_of_which_one_rewinds_both_stay_exact() -> None:
    module = Classifier()
    first = ScheduledPruning(sparsity=0.5, targets=Targets(include=["body"]), **ROUNDS)
    second = ScheduledPruning(sparsity=0.8, targets=Targets(include=["head"]), window=Window(1, 3, unit="step"))

    class Forward(nn.Module):
        def __init__(self, head: nn.Linear) -> None:
            super().__init__()
            head.register_forward_pre_hook(lambda layer, _: self.look(layer))

        def look(self, layer: nn.Module) -> None:
            mask = second.masks.get("head.weight")
            assert mask is None or not layer.weight[~mask].any(), "a pruned weight took part in a forward"

    Forward(module.head)
    quiet_trainer(max_epochs=3, callbacks=[first, second]).fit(module, TinyData())


def test_a_quick_check_doesnt_stumble_over_rewinding() -> None:
    pruning = ScheduledPruning(sparsity=0.5, rewind=Rewind(1, "epoch"), schedule=Steps(), window=Window(0.3, 0.8))
    quiet_trainer(fast_dev_run=True, callbacks=[pruning]).fit(Classifier(), TinyData())


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y += x
        return self.last(self.norm(y))


def test_a_norm_of_a_sum_that_is_made_in_place_stays() -> None:
    model = Residual()
    prune_(model, 0.5, "ln_structured", targets=Targets(include=["first"]), inputs=torch.randn(4, 8))
    assert model.norm.weight.all()


class Turned(nn.Module):
    """A linear layer whose weight is (in, out), like some libraries' Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.ones(8))


def test_of_a_layout_that_isnt_known_nothing_is_concluded() -> None:
    model = nn.ModuleDict({"turned": Turned()})
    with pytest.warns(
        UserWarning, match=r"put out a constant: `turned`\. Whether they do isn't known without `inputs`"
    ):
        prune_(model, 0.5, "ln_structured", targets=Targets(types=[Turned]))
    assert model["turned"].bias.all()
    with pytest.raises(CompressionError, match="which dimension of a Turned's weight are its inputs isn't known"):
        prune_(model, n_m="2:4", targets=Targets(types=[Turned]))


def test_a_weight_norm_is_ranked_by_the_weight() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(16, 2, bias=False)))
    with torch.no_grad():
        model[0].parametrizations.weight.original0[0] = 1e-4
    [mask] = prune_(model, 0.5).values()
    assert not mask[0].any() and mask[1].all()


def test_a_weight_that_zeros_dont_survive_in_is_left_out() -> None:
    with pytest.raises(CompressionError, match="a parametrization computes the weight"):
        prune_(nn.Sequential(orthogonal(nn.Linear(4, 4))), 0.5)


def test_a_goal_that_whole_units_cant_reach_is_said() -> None:
    module = Classifier(hidden=2)
    with pytest.warns(UserWarning, match=r"at its window's end sparsity is 0\.\d+, not 0.9"):
        quiet_trainer(callbacks=[ScheduledPruning("ln_structured", 0.9)]).fit(module, TinyData())


def test_zeros_are_positive_as_negative_ones_dont_compress() -> None:
    module = Classifier()
    quiet_trainer(max_epochs=2, callbacks=[ScheduledPruning(sparsity=0.8)]).fit(module, TinyData())
    gone = module.body.weight == 0
    assert gone.any() and not module.body.weight[gone].signbit().any()


@pytest.mark.parametrize("kind", ["inference", "expanded", "complex"])
def test_weights_that_cant_be_pruned_are_refused_before_anything_changes(kind: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = model[0].weight.detach().clone()
    if kind == "inference":
        with torch.inference_mode():
            model[1].weight = nn.Parameter(torch.randn(4, 4))
    elif kind == "expanded":
        model[1].weight = nn.Parameter(torch.randn(1, 4).expand(4, 4))
    else:
        model[1].weight = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))
    with pytest.raises(CompressionError, match="`targets` must select"):
        prune_(model, 0.5)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("wrong", [{"sparsity": "0.9"}, {"sparsity": 0.9, "overrides": ["body"]}])
def test_values_of_another_type_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(CompressionError, match="`(sparsity|overrides)` must"):
        ScheduledPruning(**wrong)
