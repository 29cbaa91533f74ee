"""What `DistillationModule` refuses, each time before anything has changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_compress import FeatureMSE, SoftTarget
from lightning_compress.distillation import DistillationModule
from lightning_compress.errors import CompressionError
from tests.distillation.nets import (
    ConvNet,
    assert_same_bits,
    bits,
    dataset,
    hooks,
    loader,
    soft_only,
    trainer,
    with_features,
)

# The module can validate; these runs have nothing to validate on.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning")


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(dataset())


class Shallow(nn.Module):
    """A layer, `unused`, that forward never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.head, self.norm = nn.Linear(2, 2), nn.Linear(64, 4), nn.BatchNorm1d(64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x.flatten(1)))


REFUSED = [
    ({"teacher": None}, "`teacher` must be given before `fit`"),
    ({"losses": [FeatureMSE("haed", "head")]}, "`student_layer` must name a layer of the Shallow.*Nearest: head"),
    ({"losses": [FeatureMSE("head", "features.00")]}, "`teacher_layer` must name a layer of the ConvNet.*features.0"),
    ({"losses": [FeatureMSE("unused", "head")]}, "`student_layer` must name a layer that the model calls"),
    ({"losses": [FeatureMSE("head", "features.0")]}, r"\(2, 8, 8, 8\). Received: student_layer=\(2, 4\)"),
    ({"teacher": ConvNet(classes=7)}, r"student's shape \(2, 4\). Received: teacher=\(2, 7\)"),
    (
        {"teacher": ConvNet(classes=7), "losses": [SoftTarget(), FeatureMSE("head", "head")]},
        r"student's shape \(2, 4\). Received: teacher=\(2, 7\)",
    ),
    ({"teacher_checkpoint": "missing.ckpt"}, "`teacher_checkpoint` must be an existing file"),
    ({"teacher_checkpoint": "missing.ckpt", "losses": [FeatureMSE("norm", "head")]}, "must be an existing file"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_does_not_fit_is_refused_with_everything_bit_identical(arguments: dict[str, Any], message: str) -> None:
    module = soft_only(**{"student": Shallow(), "teacher": ConvNet(8), **arguments})
    teacher = module.teacher or ConvNet()
    before = bits(module), bits(teacher)
    with pytest.raises(CompressionError, match=message):
        trainer().fit(module, loader())
    assert_same_bits(before[0], bits(module))
    assert_same_bits(before[1], bits(teacher))
    assert hooks(module) == hooks(teacher) == 0


def test_a_stream_loses_no_batch_and_asks_for_an_example() -> None:
    with pytest.raises(CompressionError, match="`example_input_array` must be set on the module or the student"):
        trainer().fit(with_features(), DataLoader(Stream(), batch_size=8))
    module = with_features()
    module.student.example_input_array = torch.zeros(2, 1, 8, 8)
    trainer().fit(module, DataLoader(Stream(), batch_size=8))
    trainer().fit(soft_only(), DataLoader(Stream(), batch_size=8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task_weight": -1}, "`task_weight` must be a finite number, at least 0. Received: task_weight=-1."),
        ({"task_weight": float("nan")}, "Received: task_weight=nan"),
        ({"losses": [], "task_weight": 0}, "`losses` must name something to learn"),
        ({"losses": ["soft"]}, "`losses` must be a list of distillation losses. Received: losses='soft'"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        soft_only(**arguments)


def test_a_teacher_that_is_the_student_is_refused_before_it_is_frozen() -> None:
    net = ConvNet()
    with pytest.raises(CompressionError, match=r"share no parameter with the student.*'features\.0\.weight'"):
        DistillationModule(net, net)
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_batches_that_are_no_pairs_are_refused() -> None:
    with pytest.raises(CompressionError, match="Override `split_batch`"):
        soft_only().distill({"x": 1})


def test_a_moving_teacher_is_an_error_that_names_the_layer() -> None:
    class Meddles(Callback):
        def on_train_end(self, trainer: Any, module: Any) -> None:
            module.teacher.features[1].running_mean.add_(1e-6)

    module = soft_only()
    with pytest.raises(CompressionError, match=r"Changed: features\.1\.running_mean"):
        trainer(callbacks=[Meddles()]).fit(module, loader())


def test_features_alone_are_learnt_from_a_teacher_of_other_classes() -> None:
    fit = trainer()
    fit.fit(
        soft_only(teacher=ConvNet(8, classes=7), losses=[FeatureMSE("features.0", "features.0")]), loader(), loader()
    )
    assert "train_feature_mse" in fit.callback_metrics and "val_kl" not in fit.callback_metrics
