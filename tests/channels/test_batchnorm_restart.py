"""Statistics of norms after a cut: those that can't move describe inputs that are gone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import ChannelPruning, QuantizationAwareTraining, Window
from tests.support.data import TinyData
from tests.support.fits import fit, read_checkpoint, resume
from tests.support.modules import Classifier, quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore:Found [0-9]+ module", "ignore:The dirpath has changed")


class Frozen(nn.Module):
    """As torchvision's and detectron2's frozen BatchNorms: buffers alone."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        for name, value in {**dict(norm.named_parameters()), **dict(norm.named_buffers())}.items():
            if name != "num_batches_tracked":
                self.register_buffer(name, value.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[None, :, None, None] + shift[None, :, None, None]


class Net(L.LightningModule):
    """Two convolutions with a norm behind each; unless it learns, statistics have one right value."""

    def __init__(self, make: Callable[[int], nn.Module] = nn.BatchNorm2d, lr: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lr = lr
        self.first, self.second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norms = nn.ModuleList([make(16), make(16)])
        self.head = nn.Linear(16, 4)

    def reaches(self, x: Tensor) -> list[Tensor]:
        a = self.first(x.view(-1, 1, 4, 4))
        return [a, self.second(self.norms[0](a).relu())]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norms[1](self.reaches(x)[1]).relu().mean((2, 3)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def images() -> tuple[Tensor, Tensor]:
    data = TinyData()
    data.setup("fit")
    return data.train.tensors  # type: ignore[no-any-return]


def learn_statistics(module: Net) -> None:
    with torch.no_grad():
        for norm in module.norms:
            norm.momentum = 1.0
        module.train()(images()[0])
        for norm in module.norms:
            norm.momentum = 0.1


def in_eval(norm: nn.Module) -> nn.Module:
    return norm.eval()


def no_momentum(norm: Any) -> nn.Module:
    norm.momentum = 0.0
    return norm  # type: ignore[no-any-return]


def untracked(norm: Any) -> nn.Module:
    """As Lightning's `BaseFinetuning.freeze` leaves it."""
    norm.track_running_stats = False
    return norm.requires_grad_(False)  # type: ignore[no-any-return]


STILL = {
    "eval": in_eval,
    "eval, no gradient": lambda norm: norm.eval().requires_grad_(False),
    "momentum 0": no_momentum,
    "untracked": untracked,
    "untracked, eval": lambda norm: untracked(norm).eval(),
    "frozen class": Frozen,
}


@pytest.mark.parametrize("steps", [1, 12])
@pytest.mark.parametrize("freeze", STILL.values(), ids=STILL)
def test_statistics_that_cant_move_are_those_of_the_narrower_network(
    freeze: Callable[[Any], nn.Module], steps: int
) -> None:
    module = Net()
    learn_statistics(module)
    module.norms = nn.ModuleList([freeze(norm) for norm in module.norms])
    modes = [(norm.training, getattr(norm, "momentum", None)) for norm in module.norms]
    wide = [norm.running_mean.clone() for norm in module.norms]
    x, y = images()
    cut = ChannelPruning(channels=0.5, round_to=1, calibration_batches=0, window=Window(0, 1, unit="step"))
    quiet_trainer(max_epochs=steps, callbacks=[cut]).fit(module, DataLoader(TensorDataset(x, y), batch_size=len(x)))
    first, second = module.norms
    assert [(norm.training, getattr(norm, "momentum", None)) for norm in module.norms] == modes
    assert len(second.running_mean) < 16
    with torch.no_grad():
        reached = copy.deepcopy(module).eval().reaches(x)[1].transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(second.running_mean.double(), reached.mean(1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(second.running_var.double(), reached.var(1), rtol=1e-3, atol=1e-4)
    # Nothing upstream of the first one has left: it is frozen on purpose, and stays to the bit.
    assert set(first.running_mean.tolist()) <= set(wide[0].tolist())
    assert not set(second.running_mean.tolist()) <= set(wide[1].tolist())


def test_an_instance_norm_in_eval_mode_gets_means_over_samples() -> None:
    module = Net(lambda width: nn.InstanceNorm2d(width, affine=True, track_running_stats=True))
    learn_statistics(module)
    for norm in module.norms:
        norm.eval()
    x, y = images()
    cut = ChannelPruning(channels=0.5, round_to=1, calibration_batches=0, window=Window(0, 1, unit="step"))
    quiet_trainer(callbacks=[cut]).fit(module, DataLoader(TensorDataset(x, y), batch_size=len(x)))
    with torch.no_grad():
        reached = copy.deepcopy(module).eval().reaches(x)[1]
    torch.testing.assert_close(module.norms[1].running_var, reached.var((2, 3)).mean(0), rtol=1e-3, atol=1e-4)


def test_a_norm_with_a_cumulative_average_starts_it_anew() -> None:
    module = Net(lambda width: nn.BatchNorm2d(width, momentum=None))  # type: ignore[arg-type]
    x, y = images()
    module.train()(x * 100)
    cut = ChannelPruning(channels=0.5, round_to=1, calibration_batches=0, window=Window(0, 1, unit="step"))
    quiet_trainer(max_epochs=3, callbacks=[cut]).fit(module, DataLoader(TensorDataset(x, y), batch_size=len(x)))
    with torch.no_grad():
        reached = module.train().reaches(x)[1].transpose(0, 1).flatten(1)
    torch.testing.assert_close(module.norms[1].running_mean, reached.mean(1), rtol=1e-3, atol=1e-4)
    assert module.norms[1].num_batches_tracked == 4


def test_a_norm_has_its_own_momentum_again_where_quantization_begins_right_after_a_cut() -> None:
    module, qat = Classifier(), QuantizationAwareTraining(convert=False)
    quiet_trainer(max_epochs=2, callbacks=[ChannelPruning(macs=0.5), qat]).fit(module, TinyData())
    norms = [inner for inner in module.modules() if isinstance(inner, nn.modules.batchnorm._BatchNorm)]
    assert [norm.momentum for norm in norms] == [0.1]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("freeze", [in_eval, no_momentum])
def test_a_resumed_fit_estimates_the_same(freeze: Callable[[Any], nn.Module], tmp_path: Path) -> None:
    def run(**files: Any) -> Any:
        module = Net(lr=0.1)
        for norm in module.norms:
            freeze(norm)
        cut = ChannelPruning(channels=0.5, round_to=1, calibration_batches=0, window=Window(1, 2, unit="step"))
        return fit(cut, module=module, data=DataLoader(TensorDataset(*images()), batch_size=8), **files)

    resume(run, tmp_path, 0)
    earlier, later = (read_checkpoint(tmp_path / "whole" / f"epoch={epoch}.ckpt")["state_dict"] for epoch in (0, 1))
    assert not torch.equal(earlier["norms.1.running_mean"], later["norms.1.running_mean"])
