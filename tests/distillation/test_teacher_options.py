"""What a teacher may be told to be: its dtype, its inputs, its file; and what a start says of it."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_compress import FeatureMSE, SoftTarget
from lightning_compress.distillation import Distillation, DistillationModule, EMATeacher
from lightning_compress.errors import CompressionError
from tests.distillation.nets import ConvNet, assert_same_bits, bits, dataset, loader, soft_only, trainer
from tests.distillation.own import Own, assert_close, by_hand, large
from tests.support.oracles import hooks

pytestmark = pytest.mark.filterwarnings(
    # The module can validate; these runs have nothing to validate on.
    "ignore:You defined a `validation_step` but have no:UserWarning",
    "ignore:The dirpath has changed",
    "ignore:Be aware that when using `ckpt_path`",
)
WAYS = pytest.mark.parametrize("way", ["module", "callback"])


def build(way: str, teacher: nn.Module | None = None, **kwargs: Any) -> tuple[Any, list[Callback]]:
    arguments = {"teacher": teacher or large(), "losses": [SoftTarget()], "task_weight": 0.5, **kwargs}
    if way == "module":
        torch.manual_seed(5)
        sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)  # noqa: E731
        return DistillationModule(ConvNet(), optimizer=sgd, **arguments), []
    return Own(), [Distillation(**arguments)]


def learnt(way: str, **kwargs: Any) -> dict[str, Tensor]:
    module, callbacks = build(way, **kwargs)
    trainer(callbacks=callbacks).fit(module, loader())
    return bits(module.student if way == "module" else module.net)


def expected(teacher: nn.Module, ask: Any) -> dict[str, Tensor]:
    def step(module: Any, batch: Any, index: int) -> Any:
        logits = module.net(batch[0])
        return F.cross_entropy(logits, batch[1]), logits, ask(teacher, batch[0]).float()

    return {name.removeprefix("net."): value for name, value in by_hand(Own(), teacher, step).items()}


@WAYS
def test_a_teacher_in_bfloat16(way: str) -> None:
    teacher = large()
    before = bits(teacher)
    ours = learnt(way, teacher=teacher, teacher_dtype="bfloat16")
    assert_same_bits(before, bits(teacher))
    assert_close(ours, expected(large().bfloat16(), lambda net, x: net(x.bfloat16())))
    exact = expected(large(), lambda net, x: net(x))
    assert not torch.equal(ours["head.weight"], exact["head.weight"])


class Normalize(nn.Module):
    """Another normalisation, with numbers that 16 bits can't hold, and weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(0.4855))
        self.mix = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(F.avg_pool2d((x - self.mean) / 0.2291, 2))


def normalize() -> Normalize:
    torch.manual_seed(9)
    return Normalize()


@WAYS
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_adapter_of_the_teachers_inputs(way: str, dtype: Any) -> None:
    adapter, after = normalize(), normalize()
    before = bits(adapter)
    ours = learnt(way, teacher_adapter=adapter, teacher_dtype=dtype)
    assert_same_bits(before, bits(adapter))
    assert not any(parameter.requires_grad for parameter in adapter.parameters())
    if dtype is None:
        theirs = expected(large(), lambda net, x: net(after(x)))
    else:
        theirs = expected(large().bfloat16(), lambda net, x: net(after(x).bfloat16()))
    assert_close(ours, theirs)


class Split(nn.Module):
    """Gives keyword arguments."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": x, "shift": x.mean()}


class Shifted(ConvNet):
    def forward(self, x: Tensor, *, shift: Tensor) -> Tensor:
        return super().forward(x + shift)


@WAYS
def test_an_adapter_may_give_other_arguments(way: str) -> None:
    torch.manual_seed(1)
    teacher = Shifted(8)
    ours = learnt(way, teacher=teacher, teacher_adapter=Split())
    assert_close(ours, expected(teacher, lambda net, x: net(x, shift=x.mean())))


@pytest.mark.slow
# torch's own compiler imports what torch has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@WAYS
def test_a_compiled_teacher_is_tapped_and_left_as_it_was(way: str) -> None:
    name = "features.0" if way == "module" else "net.features.0"
    ends = []
    for compiled in (False, True):
        teacher = large()
        losses = [SoftTarget(), FeatureMSE(name, "features.0")]
        module, callbacks = build(way, teacher, losses=losses, teacher_compile=compiled)
        for _ in range(2):
            trainer(callbacks=callbacks).fit(module, loader(), loader())
            assert hooks(teacher) == []
        assert list(teacher.state_dict()) == list(large().state_dict())
        ends.append(bits(module))
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)


# Its file, and what a checkpoint says of it.


@WAYS
def test_its_weights_come_from_a_file_once(way: str, tmp_path: Path) -> None:
    torch.save({"state_dict": {f"net.{name}": value for name, value in bits(large()).items()}}, tmp_path / "t.ckpt")
    teacher = ConvNet(8, dropout=0.5)
    module, callbacks = build(way, teacher, teacher_checkpoint=str(tmp_path / "t.ckpt"))
    trainer(callbacks=callbacks).fit(module, loader())
    assert_same_bits(bits(teacher), bits(large()))
    (tmp_path / "t.ckpt").unlink()
    trainer(callbacks=callbacks).fit(module, loader())


@WAYS
def test_the_checkpoint_refers_to_it_and_a_resume_with_another_warns(way: str, tmp_path: Path) -> None:
    module, callbacks = build(way)
    save = ModelCheckpoint(tmp_path, filename="last")
    trainer(callbacks=[*callbacks, save], enable_checkpointing=True).fit(module, loader())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    (state,) = (state for state in saved["callbacks"].values() if "clock" in state)
    reference = state["teacher"]
    assert reference["class"] == "tests.distillation.nets.ConvNet" and reference["checkpoint"] is None
    assert len(reference["fingerprint"]) == 32 and set(reference) == {"class", "checkpoint", "dtype", "fingerprint"}

    def resume(teacher: nn.Module, **kwargs: Any) -> None:
        module, callbacks = build(way, teacher, **kwargs)
        trainer(callbacks=callbacks, max_epochs=2).fit(module, loader(), ckpt_path=tmp_path / "last.ckpt")

    resume(large())
    other = large()
    with torch.no_grad():
        other.head.bias[0] += 1e-6
    with pytest.warns(UserWarning, match=r"isn't the one.*tests\.distillation\.nets\.ConvNet, file None"):
        resume(other)


@pytest.mark.parametrize("dtype", ["float64", "int8", torch.bfloat16, 16])
@WAYS
def test_other_dtypes_are_refused(way: str, dtype: Any) -> None:
    with pytest.raises(CompressionError, match="`teacher_dtype` must be float32, bfloat16, float16 or None"):
        build(way, teacher_dtype=dtype)


@WAYS
def test_a_teacher_that_moves_is_named_and_still_goes_home(way: str) -> None:
    class Moves(ConvNet):
        def forward(self, x: Tensor) -> Tensor:
            self.head.bias.data += 1e-6
            return super().forward(x)

    teacher = Moves(8)
    module, callbacks = build(way, teacher, losses=[SoftTarget(), FeatureMSE(pairs="auto")])
    with pytest.raises(CompressionError, match=r"The teacher must not change while it teaches. Changed: head\.bias\."):
        trainer(callbacks=callbacks).fit(module, loader())
    assert hooks(teacher) == hooks(module) == []


# The look at a start.


class Oracle(nn.Module):
    """Knows the classes of `nets.dataset`, with a chosen number of mistakes and confidence."""

    def __init__(self, wrong: int = 0, scale: float = 5.0) -> None:
        super().__init__()
        self.wrong, self.scale, self.weight = wrong, scale, nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        classes = (x.mean((1, 2, 3)) * 40).long().clamp(-2, 1) + 2
        shift = (torch.arange(len(x)) < self.wrong).long()
        return F.one_hot((classes + shift) % 4, 4).float() * self.scale + 0 * self.weight


def start(way: str, teacher: nn.Module, student: nn.Module | None = None, val: bool = False) -> None:
    module, callbacks = build(way, teacher)
    if student is not None:
        setattr(module, "student" if way == "module" else "net", student)
    fit = trainer(callbacks=callbacks, limit_train_batches=1, limit_val_batches=int(val))
    fit.fit(module, DataLoader(dataset(), batch_size=20), loader() if val else None)


@WAYS
def test_a_good_teacher_is_described_and_not_warned_of(way: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Tt]eacher.*")
        start(way, Oracle(wrong=2))
    (text,) = (record.getMessage() for record in caplog.records if "teacher on the first" in record.getMessage())
    p = math.exp(5.0) / (math.exp(5.0) + 3)
    q = (1 - p) / 3
    entropy = -(p * math.log(p) + 3 * q * math.log(q))
    assert "teacher on the first 20 predictions: accuracy 0.900" in text
    assert f"entropy {entropy:.3f} of at most 1.386 nats" in text


@WAYS
def test_a_teacher_near_chance_or_behind_is_warned_of(way: str) -> None:
    with pytest.warns(UserWarning, match="accuracy is near chance: 0.000 on 20 predictions.*`teacher_adapter`"):
        start(way, Oracle(wrong=20))
    with pytest.warns(UserWarning, match="behind the student: accuracy 0.600 against 1.000"):
        start(way, Oracle(wrong=8), student=Oracle())


@WAYS
def test_an_average_is_never_told_that_it_is_near_chance(way: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Tt]eacher.*")
        start(way, EMATeacher(0.9))


@WAYS
def test_regression_has_no_chance(way: str) -> None:
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    student = copy.deepcopy(teacher)
    rows = [(x, torch.zeros(1)) for x, _ in dataset()]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Tt]eacher.*")
        losses = [FeatureMSE("1", "1")]
        if way == "module":
            module: Any = DistillationModule(student, teacher, losses, task_loss=nn.MSELoss())
            trainer().fit(module, DataLoader(rows, batch_size=8))
            return

        class Regression(Own):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return F.mse_loss(self(batch[0]), batch[1])

        callback = Distillation(teacher, losses, student="net")
        trainer(callbacks=[callback]).fit(Regression(student), DataLoader(rows, batch_size=8))


def test_a_teacher_of_probabilities_is_told() -> None:
    module = soft_only(teacher=nn.Sequential(ConvNet(8), nn.Softmax(-1)))
    with pytest.warns(UserWarning, match="puts out probabilities, where logits are compared"):
        trainer().fit(module, loader())
