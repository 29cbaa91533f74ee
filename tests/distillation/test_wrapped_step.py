"""`Distillation` over LightningModules as users have them: what a step and a student may look like."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    Callback,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_compress import FeatureMSE, SoftTarget
from lightning_compress.distillation import Distillation
from lightning_compress.errors import CompressionError
from tests.distillation.nets import ConvNet, assert_same_bits, bits, dataset, loader, trainer
from tests.distillation.own import Own, assert_close, by_hand, kd, large, own_step, taught
from tests.support.oracles import hooks

# The modules can validate; most of these runs have nothing to validate on.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning")
AVERAGING = pytest.mark.filterwarnings("ignore:Swapping scheduler:UserWarning")
OTHER_FOLDER = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed", "ignore:Be aware that when using `ckpt_path`"
)


# What a step may look like.


class NoIndex(Own):
    def training_step(self, batch: Any) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])


class Anything(Own):
    def training_step(self, *args: Any) -> Any:
        return super().training_step(*args)


class Dict(Own):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        return {"logits": logits.detach(), "loss": F.cross_entropy(logits, batch[1])}


class Inner(Own):
    """Calls its network, not itself; its own forward would be something else."""

    def forward(self, x: Tensor) -> Any:
        return self.net(x).softmax(-1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])


class OnInstance(Own):
    """A step that was put on the instance, as decorators and notebooks do."""

    def __init__(self) -> None:
        super().__init__()
        self.training_step = lambda batch, batch_idx: 1.0 * Own.training_step(self, batch, batch_idx)


FORMS = [
    NoIndex,
    Anything,
    Dict,
    Inner,
    OnInstance,
]


@pytest.mark.parametrize("form", FORMS)
def test_steps_of_every_form_equal_a_loop_by_hand(form: Any) -> None:
    expected = by_hand(form(), teacher := large(), lambda m, b, i: own_step(m, b, teacher))
    assert_close(taught(form(), large()), expected)


class Keywords(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.net = ConvNet(width)

    def forward(self, *, image: Tensor, scale: Tensor, unused: int = 3) -> dict[str, Tensor]:
        return {"first": image, "logits": self.net(image * scale)}


class KeywordModule(Own):
    def forward(self, **inputs: Any) -> Any:
        return self.net(**inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        outputs = self(image=batch["image"], scale=batch["scale"])
        return F.cross_entropy(outputs["logits"], batch["label"])


def rows() -> DataLoader[Any]:
    values = [{"image": x, "scale": torch.full((1, 1, 1), 0.5), "label": y} for x, y in dataset()]
    return DataLoader(values, batch_size=8)


def test_keyword_only_forward_and_batches_and_outputs_that_are_dicts() -> None:
    def step(module: Any, batch: Any, index: int) -> Any:
        logits = module.net.net(batch["image"] * batch["scale"])
        return F.cross_entropy(logits, batch["label"]), logits, teacher.net(batch["image"] * batch["scale"])

    torch.manual_seed(2)
    students, teacher = [Keywords(), Keywords()], Keywords(8)
    students[1].load_state_dict(students[0].state_dict())
    expected = by_hand(KeywordModule(students[0]), teacher, step, rows())
    assert_close(taught(KeywordModule(students[1]), teacher, rows()), expected)


class Skips(Own):
    skipped = (1,)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx in self.skipped else super().training_step(batch, batch_idx)


class SkipsTheFirst(Skips):
    skipped = (0,)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
@pytest.mark.parametrize("form", [Skips, SkipsTheFirst])
def test_batches_that_a_step_skips(form: Any) -> None:
    teacher = large()
    expected = by_hand(form(), teacher, lambda m, b, i: None if i in form.skipped else own_step(m, b, teacher))
    assert_close(taught(form(), large()), expected)


class TwoViews(Own):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        first, second = self(batch[0].flip(-1)), self(batch[0])
        return F.cross_entropy(first, batch[1]) + F.cross_entropy(second, batch[1])


def test_a_step_that_calls_the_student_twice_is_taught_by_the_last_call() -> None:
    def step(module: Any, batch: Any, index: int) -> Any:
        (x, y), teacher_logits = batch, teacher(batch[0])
        first, second = module.net(x.flip(-1)), module.net(x)
        return F.cross_entropy(first, y) + F.cross_entropy(second, y), second, teacher_logits

    teacher = large()
    assert_close(taught(TwoViews(), large()), by_hand(TwoViews(), teacher, step))


class Measures(Own):
    """Asks itself again, without a graph, for the accuracy; BatchNorm is held still for it."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.eval()
        with torch.no_grad():
            self.log("acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())
        self.train()
        return loss


def test_a_second_call_without_a_graph_takes_nothing_away() -> None:
    teacher = large()
    expected = by_hand(Own(), teacher, lambda m, b, i: own_step(m, b, teacher))
    assert_close(taught(Measures(), large()), expected)


class Pops(Own):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        label = batch.pop("label")
        return F.cross_entropy(self(batch["image"]), label)


def test_a_step_may_take_its_batch_apart() -> None:
    def step(module: Any, batch: Any, index: int) -> Any:
        return own_step(module, (batch["image"], batch["label"]), teacher)

    teacher = large()
    assert_close(taught(Pops(), large(), rows()), by_hand(Pops(), teacher, step, rows()))


class Rewrites(Own):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0].mul_(2.0)), batch[1])


def test_a_step_may_rewrite_its_batch_in_place() -> None:
    teacher = large()
    expected = by_hand(Rewrites(), teacher, lambda m, b, i: own_step(m, (b[0] * 2.0, b[1]), teacher))
    assert_close(taught(Rewrites(), large()), expected)


class InPlace(ConvNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.add_(1.0))


def test_a_student_that_rewrites_its_inputs_leaves_the_teachers_alone() -> None:
    def step(module: Any, batch: Any, index: int) -> Any:
        logits = ConvNet.forward(module.net, batch[0] + 1.0)
        return F.cross_entropy(logits, batch[1]), logits, teacher(batch[0])

    teacher = large()
    torch.manual_seed(4)
    nets = [InPlace(), InPlace()]
    nets[1].load_state_dict(nets[0].state_dict())
    expected = by_hand(Own(nets[0]), teacher, step)
    assert_close(taught(Own(nets[1]), large()), expected)


# Refused, each time before anything has changed.


class Several(Own):
    def __init__(self) -> None:
        super().__init__()
        self.second = ConvNet()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]) + self.second(batch[0]), batch[1])


class Deeper(Own):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net.head(self.net.features(batch[0]).mean((2, 3))), batch[1])


class Misfit(Own):
    def __init__(self) -> None:
        super().__init__(ConvNet(classes=5))


SHARED = ConvNet()


class Shared(Own):
    def __init__(self) -> None:
        super().__init__(SHARED)


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (Several, {}, "`student` must name the layer whose forward.*The step calls net, second"),
    (Deeper, {}, "`student` must name the layer whose forward"),
    (Misfit, {}, r"student's shape \(8, 5\)"),
    (Own, {"teacher": None}, "`teacher` must be given before `fit`"),
    (Own, {"student": "nett"}, "`student` must name a layer of the Own.*Nearest: net"),
    (Own, {"losses": [FeatureMSE("net.haed", "head")]}, "`student_layer` must name a layer.*Nearest: net.head"),
    (Own, {"losses": [FeatureMSE("net.head", "haed")]}, "`teacher_layer` must name a layer.*Nearest: head"),
    (Own, {"losses": [FeatureMSE("net.head", "features.0")]}, "an adapter can bring to the teacher's shape"),
    (Inner, {"losses": [FeatureMSE(":output", "head")]}, "`student_layer` must name a layer that the model calls"),
    (Own, {"teacher_checkpoint": "missing.ckpt"}, "`teacher_checkpoint` must be an existing file"),
    (Shared, {"teacher": SHARED}, "share no parameter with the student"),
]


@pytest.mark.parametrize(("make", "arguments", "message"), REFUSED)
def test_what_does_not_fit_is_refused_and_the_module_is_as_it_was(
    make: Any, arguments: dict[str, Any], message: str
) -> None:
    module, teacher = make(), large()
    callback = Distillation(**{"teacher": teacher, **arguments})
    before, teacher_bits = bits(module), bits(teacher)
    with pytest.raises(CompressionError, match=message):
        trainer(callbacks=[callback]).fit(module, loader())
    assert_same_bits(before, bits(module))
    assert_same_bits(teacher_bits, bits(teacher))
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert hooks(module) == hooks(teacher) == [] and "training_step" not in vars(module)
    if make is Own:
        taught(module, large())


class Adversarial(Own):
    """Two optimizers and two losses, as in a GAN."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def test_manual_optimization_is_refused_with_the_remedy() -> None:
    module, callback = Adversarial(), Distillation(large())
    before = bits(module)
    with pytest.raises(CompressionError, match=r"`automatic_optimization` must be True.*compute_terms"):
        trainer(callbacks=[callback]).fit(module, loader())
    assert_same_bits(before, bits(module))


# Architectures.


class Sequence(nn.Module):
    """Ids (B, 6) with padding 0 to logits (B, 6, 5)."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.embedding, self.kind = nn.Embedding(9, width), kind
        if kind == "lstm":
            self.body: nn.Module = nn.LSTM(width, width, 2, batch_first=True)
        else:
            self.body = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, 5)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embedding(ids)
        x = self.body(x)[0] if self.kind == "lstm" else self.body(x, src_key_padding_mask=mask)
        return self.head(x)


class Language(L.LightningModule):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.net = Sequence(4, kind)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.net(batch["ids"], mask=batch["ids"] == 0)
        return F.cross_entropy(logits.flatten(0, 1), batch["label"].flatten(), ignore_index=-100)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch["ids"], mask=batch["ids"] == 0)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Tokens(Distillation):
    """Padding counts nowhere."""

    def targets(self, batch: Any) -> Any:
        return batch["label"]

    def valid_positions(self, batch: Any) -> Any:
        return batch["ids"] != 0


def sentences() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 9, (12, 6), generator=generator)
    ids[torch.arange(6) >= torch.randint(2, 7, (12, 1), generator=generator)] = 0
    rows = [{"ids": row, "label": (row % 5).masked_fill(row == 0, -100)} for row in ids]
    return DataLoader(rows, batch_size=4)


@pytest.mark.parametrize("kind", ["lstm", "attention"])
def test_sequences_with_padding_equal_a_loop_by_hand(kind: str) -> None:
    torch.manual_seed(7)
    teacher, module = Sequence(8, kind), Language(kind)
    twin = copy.deepcopy(module)
    callback = Tokens(teacher, [SoftTarget(), FeatureMSE("net.body", "body")], task_weight=0.5)
    adapter: dict[str, Tensor] = {}

    class First(Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 0:
                adapter.update(bits(callback.objective.adapters["feature_mse"]))

    fit = trainer(callbacks=[callback, First()])
    fit.fit(module, sentences(), sentences())
    regressor = nn.Linear(4, 8)
    regressor.load_state_dict(adapter)
    optimizer = torch.optim.SGD([*twin.parameters(), *regressor.parameters()], lr=0.1)
    teacher.train(kind == "attention")  # not the fast path, which has no hidden states to look at; no dropout in it
    for batch in sentences():
        keep = batch["ids"] != 0
        hidden = []
        for net in (twin.net, teacher):
            x = net.embedding(batch["ids"])
            hidden.append(net.body(x)[0] if kind == "lstm" else net.body(x, src_key_padding_mask=~keep))
        logits, target = twin.net.head(hidden[0])[keep], teacher.head(hidden[1]).detach()[keep]
        mse = ((regressor(hidden[0])[keep] - hidden[1].detach()[keep]) ** 2).mean()
        loss = 0.5 * F.cross_entropy(logits, batch["label"][keep]) + 0.75 * kd(logits, target) + 0.25 * mse
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(bits(module), bits(twin), rtol=1e-3, atol=1e-5)
    assert {"val_agreement", "val_kl"} < set(fit.callback_metrics)


class Recomputed(ConvNet):
    """Keeps no activations of its features."""

    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant:
            x = x.clone().requires_grad_()
        maps = checkpoint(self.features, x, use_reentrant=self.reentrant)
        return self.head(maps.mean((2, 3)))


class Reentrant(Recomputed):
    reentrant = True


@pytest.mark.parametrize(
    ("net", "tapped"),
    [
        (Recomputed, False),
        (Recomputed, True),
        (Reentrant, False),
    ],
)
def test_activation_checkpointing_changes_nothing(net: Any, tapped: bool) -> None:
    losses = [FeatureMSE("net.features.0", "features.0", weight=2.0)] if tapped else [SoftTarget()]
    ends = []
    for form in (ConvNet, net):
        torch.manual_seed(1)
        plain = form()
        module = Own(plain)
        trainer(callbacks=[Distillation(large(), losses)]).fit(module, loader())
        ends.append({name: value for name, value in bits(module).items() if "running" not in name})
    for state in ends:
        state.pop("net.features.1.num_batches_tracked")
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
def test_weight_norm(norm: Any) -> None:
    def make() -> Own:
        module = Own()
        module.net.head = norm(module.net.head)
        return module

    teacher = large()
    expected = by_hand(make(), teacher, lambda m, b, i: own_step(m, b, teacher))
    assert_close(taught(make(), large()), expected)


# Dynamo looks at the `grad` of a tensor that a tap keeps, which torch warns of, once a process.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    "where", ["child", *(pytest.param(where, marks=pytest.mark.slow) for where in ("child as the student", "module"))]
)
def test_compiled_modules_learn_the_same(where: str) -> None:
    losses = [SoftTarget(), FeatureMSE("net.features.0", "features.0")]
    student = None
    if where == "child as the student":
        losses, student = [SoftTarget(), FeatureMSE("features.0", "features.0")], "net"
    ends = []
    for compiled in (False, True):
        torch.compiler.reset()
        module = Own()
        target: Any = module
        if compiled and where == "module":
            target = torch.compile(module, backend="eager")
        elif compiled:
            module.net = torch.compile(module.net, backend="eager")
        # The sanity check calls, and so compiles, the student before the callback watches it.
        fit = trainer(callbacks=[Distillation(large(), losses, student=student)], max_epochs=2)
        fit.fit(target, loader(), loader())
        assert "val_kl" in fit.callback_metrics and hooks(module) == []
        ends.append({name.replace("_orig_mod.", ""): value for name, value in bits(module).items()})
    torch.testing.assert_close(*ends)
