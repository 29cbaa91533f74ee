"""The plain module that serves, made of every form that a module can have."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn

from lightning_compress import Distillation, FeatureMSE, load_compressed, save_compressed
from lightning_compress.deployable import deployable
from lightning_compress.modules.routing import class_of, form_before, parameters_aside
from lightning_compress.structure.change import recorded
from tests.golden.cases import CASES, Case
from tests.golden.networks import NETWORKS, inputs
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import assert_same_state, hooks

TRAINING_FORMS = {"prepared": "converted", "adapted": None}
"""Forms that don't serve, with the ones that they become."""


def trained(case: Case) -> Any:
    torch.manual_seed(2)
    return load_compressed(case.path, case.build()).eval()


def form_of(model: nn.Module) -> str | None:
    return {change.key: record for change, record in recorded(model)}.get("quantization", {}).get("form")


def forward_hooks(model: nn.Module) -> list[str]:
    return [hook for hook in hooks(model) if ": _forward" in hook]


@pytest.mark.filterwarnings("ignore:`load_compressed`")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_serves_as_the_model_does_in_every_form(case: Case, tmp_path: Any) -> None:
    model = trained(case)
    form, state, expected = form_of(model), model.state_dict(), case.outputs(model)
    plain: Any = deployable(model)

    assert form_of(plain) == TRAINING_FORMS.get(form, form)
    assert form_of(model) == form
    assert_same_state(model.state_dict(), state)
    off = (case.outputs(plain) - expected).abs().max() / expected.std()
    assert off < (0.2 if form in TRAINING_FORMS else 1e-6)  # int8, and NF4's weights in float
    assert class_of(plain) is (NETWORKS[case.kind] if hasattr(model, "student") else class_of(model))
    assert not forward_hooks(plain)
    assert not any(parameters_aside(module) or form_before(module) for module in plain.modules())

    path = str(tmp_path / "plain.ckpt")
    save_compressed(plain, path)
    again = load_compressed(path, type(plain)(*([case.kind] if isinstance(plain, pl.LightningModule) else [])))
    assert torch.equal(case.outputs(again), case.outputs(plain))


class Deploys(Callback):
    """Makes what serves in hooks of a fit, beside copies of the module's own state."""

    def __init__(self) -> None:
        self.made: list[tuple[str, Any, dict[str, Tensor]]] = []

    def make(self, hook: str, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        state = {name: value.clone() for name, value in module.state_dict().items()}
        self.made.append((hook, deployable(module, trainer), state))
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.make("train", trainer, pl_module)

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.make("validation", trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.make("end", trainer, pl_module)


def test_a_module_that_distils_becomes_its_student_without_taps_adapters_or_teacher() -> None:
    case = next(case for case in CASES if case.name == "distilled")
    module = case.build()
    module.prepare_(inputs("images"))
    module.compute_terms((inputs("images"), torch.zeros(4, dtype=torch.int64)))
    assert forward_hooks(module.student)
    plain = deployable(module)
    assert type(plain) is NETWORKS["images"] and not forward_hooks(plain)
    assert_same_state(plain.state_dict(), module.student.state_dict())


def test_a_module_beside_a_callback_that_teaches_it_loses_the_taps() -> None:
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    deploys = Deploys()
    teaches = Distillation(teacher, losses=[FeatureMSE("body", "1")])
    quiet_trainer(max_steps=2, callbacks=[teaches, deploys]).fit(Classifier(), TinyData())
    for _, plain, state in deploys.made:
        assert type(plain) is Classifier and plain._trainer is None and "training_step" not in vars(plain)
        assert not forward_hooks(plain)
        assert_same_state(plain.state_dict(), state)


@pytest.mark.parametrize(
    "average", [lambda: WeightAveraging(), lambda: StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)]
)
def test_the_average_of_a_fit_serves_as_soon_as_there_is_one(average: Any) -> None:
    averages, deploys = average(), Deploys()
    quiet_trainer(max_epochs=4, callbacks=[averages, deploys]).fit(Classifier(), TinyData())
    same = [(hook, plain.head.weight.equal(state["head.weight"])) for hook, plain, state in deploys.made]
    assert ("train", False) in same and ("validation", False) not in same and same[-1] == ("end", True)
    last = [plain.head.weight for hook, plain, _ in deploys.made if hook == "train"][-1]
    assert last.equal(deploys.made[-1][1].head.weight)
