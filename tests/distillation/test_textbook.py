"""The three textbook mixtures: module and callback against one loop that is written out by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

from lightning_compress import FeatureCosine, FeatureMSE, SoftTarget, load_compressed
from lightning_compress.distillation import Distillation, DistillationModule, Snapshot
from lightning_compress.distillation.losses.base import DistillationLoss
from tests.distillation.nets import assert_same_bits, bits, loader, trainer

# The module can validate; these runs have nothing to validate on.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning")
STEPS, EPOCHS = 20, 4
WAYS = pytest.mark.parametrize("way", ["module", "callback"])


class Net(nn.Module):
    """Images (B, 1, 8, 8) to 4 classes; `pooled` are 64 numbers, whatever the width."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        # Without a bias: in front of BatchNorm its gradient is nothing but noise, which Adam would blow up.
        convolution = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.maps = nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.pooled = nn.Sequential(nn.Flatten(), nn.AvgPool1d(width))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.pooled(self.maps(x).flatten(1)[:, None]).flatten(1)))


class Own(L.LightningModule):
    """A module as users have it, which knows nothing of teachers."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Watch(Callback):
    """The total loss of each step, and the adapters as they were before the first."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.adapters: dict[str, Tensor] | None = None

    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        if self.adapters is None:
            owner = next((callback for callback in trainer.callbacks if isinstance(callback, Distillation)), module)
            self.adapters = bits(owner.objective.adapters)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def nets() -> tuple[Net, Net]:
    torch.manual_seed(3)
    return Net(4), Net(8, dropout=0.5)


def run(way: str, losses: list[DistillationLoss]) -> tuple[Watch, nn.Module]:
    """Twenty steps of Adam with 0.75 of cross-entropy."""
    (student, teacher), watch = nets(), Watch()
    if way == "module":
        adam = lambda parameters: torch.optim.Adam(parameters, lr=1e-2)  # noqa: E731
        module = DistillationModule(student, teacher, losses, task_weight=0.75, optimizer=adam)
        trainer(max_epochs=EPOCHS, callbacks=[watch]).fit(module, loader(40))
    else:
        callbacks = [Distillation(teacher, losses, task_weight=0.75, student="net"), watch]
        trainer(max_epochs=EPOCHS, callbacks=callbacks).fit(Own(student), loader(40))
    return watch, student


def by_hand(extra: Any, *more: nn.Module) -> tuple[list[float], nn.Module]:
    """The same twenty steps; ``extra(student, teacher, x, logits)`` is what stands beside the cross-entropy."""
    student, teacher = nets()
    teacher.eval()
    parameters = [*student.parameters(), *(p for module in more for p in module.parameters())]
    optimizer, losses = torch.optim.Adam(parameters, lr=1e-2), []
    for _ in range(EPOCHS):
        for x, y in loader(40):
            maps = student.maps(x)
            logits = student.head(F.avg_pool1d(maps.flatten(1)[:, None], 4).flatten(1))
            loss = 0.75 * F.cross_entropy(logits, y) + 0.25 * extra(teacher, x, maps, logits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert len(losses) == STEPS
    return losses, student


def assert_equal_runs(run: tuple[Watch, nn.Module], expected: tuple[list[float], nn.Module]) -> None:
    assert len(run[0].losses) == STEPS
    assert run[0].losses == pytest.approx(expected[0], abs=1e-6)
    for (name, value), other in zip(run[1].named_parameters(), expected[1].parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5, msg=name)
    assert abs(run[0].losses[0] - run[0].losses[-1]) > 1e-2


@WAYS
def test_soft_targets_and_cross_entropy(way: str) -> None:
    def kd(teacher: nn.Module, x: Tensor, maps: Tensor, logits: Tensor) -> Tensor:
        with torch.no_grad():
            p = (teacher(x) / 2).softmax(-1)
        return torch.sum(p * (p.log() - (logits / 2).log_softmax(-1))) / len(p) * 2**2

    assert_equal_runs(run(way, [SoftTarget(temperature=2.0, weight=0.25)]), by_hand(kd))


@WAYS
def test_cosine_of_hidden_representations_and_cross_entropy(way: str) -> None:
    def cosine(teacher: nn.Module, x: Tensor, maps: Tensor, logits: Tensor) -> Tensor:
        with torch.no_grad():
            target = F.avg_pool1d(teacher.maps(x).flatten(1)[:, None], 8).flatten(1)
        features = F.avg_pool1d(maps.flatten(1)[:, None], 4).flatten(1)
        return nn.CosineEmbeddingLoss()(features, target, torch.ones(len(x)))

    losses = [FeatureCosine("dropout", "dropout", weight=0.25)]
    assert_equal_runs(run(way, losses), by_hand(cosine))


@WAYS
def test_a_regressor_of_feature_maps_and_cross_entropy(way: str) -> None:
    regressor = nn.Conv2d(4, 8, 1)
    watch, student = run(way, [FeatureMSE("maps", "maps", weight=0.25)])
    assert watch.adapters is not None
    regressor.load_state_dict({name.removeprefix("feature_mse."): value for name, value in watch.adapters.items()})

    def mse(teacher: nn.Module, x: Tensor, maps: Tensor, logits: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher.maps(x)
        return ((regressor(maps) - target) ** 2).mean()

    assert_equal_runs((watch, student), by_hand(mse, regressor))


class Wide(nn.Module):
    """About 270,000 parameters, as the tutorial's student."""

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        self.body, self.head = (
            nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, 460)),
            nn.Linear(460, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@WAYS
@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("teacher", ["large", "snapshot"])
def test_a_checkpoint_is_as_large_as_that_of_the_student_alone(
    tmp_path: Path, way: str, weights_only: bool, teacher: str
) -> None:
    net = Wide()
    given: nn.Module = Snapshot() if teacher == "snapshot" else Wide(2048)
    sizes = []
    for distil in (False, True):
        student, callbacks = copy.deepcopy(net), []
        module: L.LightningModule = Own(student)
        if distil and way == "module":
            adam = lambda parameters: torch.optim.Adam(parameters, lr=1e-2)  # noqa: E731
            module = DistillationModule(student, given, optimizer=adam)
        elif distil:
            callbacks = [Distillation(given)]
        folder = tmp_path / str(distil)
        save = ModelCheckpoint(folder, filename="last", save_weights_only=weights_only)
        trainer(enable_checkpointing=True, callbacks=[*callbacks, save]).fit(module, loader())
        sizes.append((folder / "last.ckpt").stat().st_size)
    alone = sum(tensor.nbytes for tensor in net.state_dict().values())
    assert alone < sizes[0] and sizes[1] == pytest.approx(sizes[0], rel=0.01)


def test_a_distilled_checkpoint_loads_strictly_without_the_callback(tmp_path: Path) -> None:
    student, teacher = nets()
    module, save = Own(student), ModelCheckpoint(tmp_path, filename="last")
    callback = Distillation(teacher, [SoftTarget(), FeatureMSE("net.maps", "maps")])
    trainer(enable_checkpointing=True, callbacks=[callback, save]).fit(module, loader())
    path = tmp_path / "last.ckpt"
    assert_same_bits(bits(module), bits(Own.load_from_checkpoint(path, net=Net(4))))
    assert_same_bits(bits(module), bits(load_compressed(str(path), Own(Net(4)))))
    saved = torch.load(path, weights_only=True)
    assert saved["state_dict"].keys() == Own(Net(4)).state_dict().keys()
    (state,) = (value for key, value in saved["callbacks"].items() if key == "Distillation")
    tensors = {name: tuple(value.shape) for name, value in state["adapters"].items()}
    assert tensors == {"feature_mse.weight": (8, 4, 1, 1), "feature_mse.bias": (8,)}
    assert state["teacher"]["class"].endswith("test_textbook.Net") and len(state["teacher"]["fingerprint"]) == 32
