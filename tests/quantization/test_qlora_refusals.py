"""What `QLoRA` refuses, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
)
from torch import nn

from lightning_compress import (
    ChannelPruning,
    CompressionError,
    PostTrainingQuantization,
    QLoRA,
    QuantizationAwareTraining,
    ScheduledPruning,
    Targets,
    merge_adapters,
    plan_removal,
    prune_,
    quantize,
)
from tests.quantization.lora.fits import Net, adapted_layers, fit
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import (
    assert_same_state,
    snapshot,
)

# Refusals.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "`rank` must be at least 1. Received: rank=0"),
        ({"rank": -2}, "`rank` must"),
        ({"rank": 2.0}, "`rank` must.*Received: rank=2.0"),
        ({"rank": True}, "`rank` must"),
        ({"rank": "8"}, "`rank` must"),
        ({"alpha": 0}, "`alpha` must be above 0"),
        ({"alpha": -1.0}, "`alpha` must"),
        ({"alpha": float("nan")}, "`alpha` must"),
        ({"alpha": float("inf")}, "`alpha` must"),
        ({"alpha": "16"}, "`alpha` must"),
        ({"alpha": None}, "`alpha` must"),
        ({"dropout": 1.0}, r"`dropout` must lie in \[0, 1\). Received: dropout=1.0"),
        ({"dropout": -0.1}, "`dropout` must"),
        ({"dropout": "0.1"}, "`dropout` must"),
        ({"targets": ["body"]}, "`targets` must be a Targets.*Targets"),
        ({"targets": "body"}, "`targets` must be a Targets"),
        ({"modules_to_train": "head"}, "`modules_to_train` must be a list of patterns"),
        ({"modules_to_train": [3]}, "`modules_to_train` must"),
        ({"modules_to_train": None}, "`modules_to_train` must"),
    ],
    ids=str,
)
def test_bad_arguments(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(CompressionError, match=words):
        QLoRA(**settings)


OTHERS: dict[str, Callable[[], Callback]] = {
    "pruning": lambda: ScheduledPruning(sparsity=0.5),
    "channels": lambda: ChannelPruning(channels=0.5),
    "qat": lambda: QuantizationAwareTraining(),
    "qat in few bits": lambda: QuantizationAwareTraining("int4_weight_only"),
    "ptq": lambda: PostTrainingQuantization("int8_dynamic"),
    "a second one": lambda: QLoRA(rank=2),
}


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("other", OTHERS)
def test_refused_beside_what_needs_float_weights(other: str, before: bool) -> None:
    module = Classifier()
    was, had = snapshot(module), set(vars(module))
    callbacks = [QLoRA(), OTHERS[other]()]
    with pytest.raises((CompressionError, RuntimeError), match="QLoRA|one|more than"):
        fit(*(reversed(callbacks) if before else callbacks), module=module)
    assert_same_state(was, snapshot(module))
    assert not {"forward", "setup", "on_save_checkpoint", "on_load_checkpoint"} & set(vars(module)) - had
    fit(module=module)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"targets": Targets(include=["boddy"])}, "'boddy' must match a module.*body"),
        ({"targets": Targets(include=["norm"])}, "must have a linear layer to adapt"),
        ({"targets": Targets(exclude=["body", "head"])}, "must have a linear layer to adapt"),
        ({"modules_to_train": ["haed"]}, "`modules_to_train` must match modules.*'haed'.*Nearest: head"),
    ],
    ids=str,
)
def test_patterns_that_match_nothing(settings: dict[str, Any], words: str) -> None:
    module = Classifier()
    was = snapshot(module)
    with pytest.raises(CompressionError, match=words):
        fit(QLoRA(**settings), module=module)
    assert_same_state(was, snapshot(module))
    assert not {"forward", "setup", "on_save_checkpoint", "on_load_checkpoint"} & set(vars(module))


def test_a_mistyped_module_to_train_is_named_as_such() -> None:
    # `targets` wasn't given: the message must not speak of it.
    with pytest.raises(CompressionError, match="`modules_to_train`"):
        fit(QLoRA(modules_to_train=["haed"]))


def test_a_module_without_linear_layers() -> None:
    module = Net(nn.Sequential(nn.Unflatten(1, (1, 16)), nn.Conv1d(1, 4, 16), nn.Flatten()))
    was = snapshot(module)
    with pytest.raises(CompressionError, match="must have a linear layer to adapt"):
        fit(QLoRA(), module=module)
    assert_same_state(was, snapshot(module))


def test_the_only_linear_layer_is_adapted_though_it_is_the_last() -> None:
    module = Net(nn.Linear(16, 4))
    fit(QLoRA(rank=2), module=module)
    assert list(adapted_layers(module)) == ["net"]


@pytest.mark.parametrize("scheme", ["nf4", "int8_dynamic", "int8_static"])
def test_quantizing_an_adapted_module_says_what_to_do(scheme: str) -> None:
    _, module = fit(QLoRA(rank=2))
    was = snapshot(module)
    with pytest.raises(CompressionError, match="merge"):
        quantize(module, scheme, calibration=[(torch.randn(4, 16),)])
    with pytest.raises(CompressionError, match="merge"):
        quiet_trainer(callbacks=[PostTrainingQuantization(scheme)]).test(module, TinyData(), verbose=False)
    assert_same_state(was, snapshot(module))


def test_pruning_an_adapted_module_says_what_to_do() -> None:
    _, module = fit(QLoRA(rank=2))
    was = snapshot(module)
    with pytest.raises(CompressionError, match="merge"):
        prune_(module, 0.5)
    assert_same_state(was, snapshot(module))


def test_removing_channels_of_an_adapted_module_says_what_to_do() -> None:
    _, module = fit(QLoRA(rank=2))
    was = snapshot(module)
    with pytest.raises(CompressionError, match="merge"):
        plan_removal(module, torch.randn(2, 16), channels=0.5)
    assert_same_state(was, snapshot(module))


@pytest.mark.parametrize(
    "other",
    ["pruning", "channels", "qat", "qat in few bits"],
)
def test_a_fit_of_an_adapted_module_with_another_technique_says_what_to_do(other: str) -> None:
    _, module = fit(QLoRA(rank=2))
    was = snapshot(module)
    with pytest.raises(CompressionError, match="merge"):
        fit(OTHERS[other](), module=module)
    assert_same_state(was, snapshot(module))
    fit(OTHERS[other](), module=merge_adapters(module))


@pytest.mark.parametrize("scheme", ["nf4", "int8_dynamic"])
@pytest.mark.filterwarnings("ignore:.*converted|.*quantized")
def test_a_quantized_module_is_refused(scheme: str) -> None:
    module = quantize(Classifier(), scheme)
    was = snapshot(module)
    with pytest.raises(CompressionError, match="must be float") as caught:
        fit(QLoRA(rank=2), module=module)
    assert "merge its adapters" not in str(caught.value)  # it has none
    assert_same_state(was, snapshot(module))


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_strategies_that_lose_structure_are_refused(strategy: str) -> None:
    trainer = quiet_trainer(strategy=strategy, devices=1, callbacks=[QLoRA()])
    with pytest.raises(CompressionError, match="`strategy` must"):
        QLoRA().setup(trainer, Classifier(), "fit")
