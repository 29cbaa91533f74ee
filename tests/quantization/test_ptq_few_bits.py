"""Weights of few bits in a Trainer, and mistakes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from torch import nn

from lightning_compress import (
    GPTQ,
    NF4,
    CompressionError,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    Targets,
    WeightOnly,
    load_compressed,
    quantize,
)
from lightning_compress.cli import main
from lightning_compress.quantization.convert import form_name
from lightning_compress.quantization.layers.schemes import Packed
from tests.contracts.test_yaml import CLASSIFIER, DATA, TRAINER
from tests.quantization.layers.packed_cases import FEW, storages, stored_in
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import assert_same_state, hooks, snapshot

# In a Trainer.


class At(Callback):
    """Looks at the module while it is tested."""

    def __init__(self) -> None:
        self.seen: list[dict[str, str]] = []

    def on_test_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen.append(stored_in(pl_module))


def trained() -> Classifier:
    torch.manual_seed(0)
    module = Classifier()
    quiet_trainer(max_epochs=2).fit(module, TinyData())
    return module


@pytest.mark.parametrize("compare", [False, True])
@pytest.mark.parametrize("scheme", ["int8_weight_only", "int4_weight_only", "nf4", "gptq", *FEW], ids=str)
def test_a_test_measures_the_quantized_model_and_gives_back_the_float_one(scheme: Any, compare: bool) -> None:
    module, data, at = trained(), TinyData(), At()
    data.setup("fit")
    train = [x for x, _ in data.train_dataloader()]
    gptq = scheme == "gptq" or isinstance(scheme, GPTQ)
    by_hand = quantize(module, scheme, calibration=train if gptq else None)
    [expected] = quiet_trainer().test(by_hand, data, verbose=False)
    [floats] = quiet_trainer().test(module, data, verbose=False)
    before, had = snapshot(module), [set(vars(m)) for m in module.modules()]
    identities = [id(parameter) for parameter in module.parameters()]
    ptq = PostTrainingQuantization(scheme, compare=compare)
    trainer = quiet_trainer(callbacks=[ptq, at])
    for _ in range(2):
        [metrics] = trainer.test(module, data, verbose=False)
        assert {name: metrics[name] for name in expected} == expected
        assert metrics["test_loss"] != floats["test_loss"]
        if compare:
            assert {name: metrics[f"float/{name}"] for name in floats} == floats
        assert_same_state(before, module)
        assert [set(vars(m)) for m in module.modules()] == had and hooks(module) == []
        assert [id(parameter) for parameter in module.parameters()] == identities
    assert at.seen and all("body" in seen for seen in at.seen)
    assert ptq.quantized_model is not None
    assert storages(module).isdisjoint(storages(ptq.quantized_model))
    notes = "; ".join(ptq.report_notes())
    assert "smaller, not faster" in notes
    assert ("`head` stays float: last layer" in notes) == (scheme != "int8_weight_only")
    trainer.fit(module, data)
    assert not torch.equal(before["body.weight"], module.body.weight)


@pytest.mark.parametrize("scheme", [NF4(16), GPTQ(4, 8)], ids=str)
@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_in_a_trainer_of_another_precision(scheme: Packed, precision: Any) -> None:
    module, data = trained(), TinyData()
    floats = quiet_trainer(precision=precision).test(module, data, verbose=False)[0]["test_loss"]
    module = trained()
    trainer = quiet_trainer(precision=precision, callbacks=[PostTrainingQuantization(scheme)])
    loss = trainer.test(module, data, verbose=False)[0]["test_loss"]
    assert loss == pytest.approx(floats, rel=0.2) and loss != floats
    assert module.body.weight.dtype == {"bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]


@pytest.mark.parametrize("scheme", FEW[:2], ids=str)
def test_a_quantized_file_is_tested_as_it_is_and_not_trained(scheme: Packed, tmp_path: Path) -> None:
    module, data, path = trained(), TinyData(), tmp_path / "few.ckpt"
    trainer = quiet_trainer(callbacks=[PostTrainingQuantization(scheme, keep=True)])
    expected = trainer.test(module, data, verbose=False)
    trainer.save_checkpoint(path)
    again = quiet_trainer(callbacks=[PostTrainingQuantization(scheme)])
    assert again.test(Classifier(), data, ckpt_path=path, verbose=False, weights_only=True) == expected
    fresh = Classifier()
    before = snapshot(fresh)
    with pytest.raises(CompressionError, match="must be a float or a prepared checkpoint to train from"):
        quiet_trainer(callbacks=[PostTrainingQuantization(scheme)]).fit(fresh, data, ckpt_path=path, weights_only=True)
    assert_same_state(before, fresh)


@pytest.mark.parametrize("scheme", FEW, ids=str)
def test_a_kept_model_is_saved_by_the_trainer_and_loads(scheme: Packed, tmp_path: Path) -> None:
    module, data = trained(), TinyData()
    trainer = quiet_trainer(callbacks=[PostTrainingQuantization(scheme, keep=True, overrides={"head": WeightOnly(8)})])
    expected = trainer.test(module, data, verbose=False)
    assert set(stored_in(module)) == {"body", "head"}
    trainer.save_checkpoint(tmp_path / "few.ckpt")
    assert "lightning_compress" in torch.load(tmp_path / "few.ckpt", weights_only=True)
    fresh = load_compressed(str(tmp_path / "few.ckpt"), Classifier())
    assert quiet_trainer().test(fresh, data, verbose=False) == expected
    # The next fit trains the float weights, which were kept.
    quiet_trainer(callbacks=[PostTrainingQuantization(scheme)]).fit(module, data)
    assert form_name(module) == "float" and module.body.weight is not None


def test_gptq_is_calibrated_on_the_datamodules_train_loader_in_evaluation_mode() -> None:
    class Data(TinyData):
        asked: list[str] = []

        def train_dataloader(self) -> Any:
            self.asked.append("train")
            return super().train_dataloader()

    data, module = Data(), trained()
    ptq = PostTrainingQuantization("gptq", calibration_batches=3)
    quiet_trainer(callbacks=[ptq]).test(module, data, verbose=False)
    assert ptq.quantized_model is not None and data.asked == ["train"]
    data.setup("fit")
    train = [x for x, _ in data.train_dataloader()]
    three = quantize(module, "gptq", calibration=train[:3])
    assert_same_state(three, ptq.quantized_model)
    other = quantize(module, "gptq", calibration=train[3:6]).state_dict()
    assert not torch.equal(other["body.weight"], three.state_dict()["body.weight"])


def test_bare_test_loaders_cannot_calibrate_gptq_and_the_others_need_nothing() -> None:
    module, data = trained(), TinyData()
    data.setup("test")
    before = snapshot(module)
    for scheme in ("nf4", "int4_weight_only"):
        quiet_trainer(callbacks=[PostTrainingQuantization(scheme)]).test(module, data.test_dataloader(), verbose=False)
    for options in ({"scheme": "gptq"}, {"scheme": "nf4", "overrides": {"head": "gptq"}}):
        with pytest.raises(CompressionError, match="`calibration_dataloader` must be there to calibrate on"):
            quiet_trainer(callbacks=[PostTrainingQuantization(**options)]).test(
                module, data.test_dataloader(), verbose=False
            )
        assert_same_state(before, module)


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ("gptq", GPTQ()),
        ({"class_path": "WeightOnly", "init_args": {"bits": 3, "group_size": 16}}, WeightOnly(3, 16)),
        ({"class_path": "lightning_compress.NF4", "init_args": {"block_size": 32}}, NF4(32)),
        (
            {"class_path": "GPTQ", "init_args": {"bits": 2, "group_size": None, "activation_order": True}},
            GPTQ(2, None, activation_order=True),
        ),
    ],
    ids=str,
)
def test_from_a_configuration_file(
    given_: Any, expected: Packed, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    made: list[PostTrainingQuantization] = []
    original = PostTrainingQuantization.on_test_start

    def watch(self: PostTrainingQuantization, *args: Any) -> None:
        made.append(self)
        original(self, *args)

    monkeypatch.setattr(PostTrainingQuantization, "on_test_start", watch)
    overrides = {"head": {"class_path": "NF4", "init_args": {"block_size": 8}}}
    init = {"scheme": given_, "overrides": overrides}
    callback = {"class_path": "PostTrainingQuantization", "init_args": init}
    config = {"trainer": {**TRAINER, "callbacks": [callback]}, "model": CLASSIFIER, "data": DATA}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    main(["test", "--config=config.yaml"])
    assert made[0].recipe.scheme == expected
    assert made[0].recipe.overrides == {"head": NF4(8)}
    assert made[0].quantized_model is not None
    assert stored_in(made[0].quantized_model) == {"body": expected.name, "head": "nf4"}
    capsys.readouterr()
    # What is printed can be read, and prints the same.
    printed = []
    for _ in range(2):
        with pytest.raises(SystemExit):
            main(["test", "--config=config.yaml", "--print_config"])
        printed.append(capsys.readouterr().out)
        Path("config.yaml").write_text(printed[-1])
    assert printed[0] == printed[1]


# Mistakes.


@pytest.mark.parametrize("make", [WeightOnly, GPTQ])
@pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.0, True, "4", None])
def test_bits_are_2_to_8(make: Any, bits: Any) -> None:
    with pytest.raises(CompressionError, match=rf"^`bits` must be 2 to 8\. Received: bits={bits!r}\."):
        make(bits=bits)


@pytest.mark.parametrize(("make", "name"), [(WeightOnly, "group_size"), (GPTQ, "group_size"), (NF4, "block_size")])
@pytest.mark.parametrize("size", [0, 1, -1, 2.5, True, "128"])
def test_groups_are_of_two_values_at_least(make: Any, name: str, size: Any) -> None:
    with pytest.raises(CompressionError, match=rf"^`{name}` must be at least 2\. Received: {name}={size!r}\. \w+"):
        make(**{name: size})


@pytest.mark.parametrize("damping", [0, -0.1, 1.5, float("nan"), float("inf"), True, "0.01", None])
def test_damping_is_a_fraction(damping: Any) -> None:
    with pytest.raises(CompressionError, match=r"^`damping` must lie in \(0, 1\]\. Received: damping="):
        GPTQ(damping=damping)


def test_nf4_needs_a_block_size() -> None:
    with pytest.raises(CompressionError, match=r"^`block_size` must be at least 2\. Received: block_size=None"):
        NF4(block_size=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "gptq"}, r"`calibration` must be given for gptq\. Received: calibration=None\. Pass a loader"),
        ({"scheme": "gptq", "calibration": []}, "`calibration` must"),
        ({"scheme": "gptq", "calibration": iter(())}, "`calibration` must"),
        ({"scheme": "nf4", "overrides": {"0": "gptq"}}, r"`calibration` must be given for gptq"),
        ({"scheme": "gptq", "calibration": torch.randn(4, 8)}, "`calibration` must be batches.*Put it in a list"),
        ({"scheme": "gptq", "calibration": [torch.randn(4, 9)]}, "9"),
        ({"scheme": "nf4", "flow": "pt2e"}, "`flow` must be 'auto'"),
        ({"scheme": "int4"}, r"`scheme` must be the name of a scheme.*int4_weight_only"),
        # All that isn't excluded is spared: said, with how to get it.
        (
            {"scheme": "nf4", "targets": Targets(exclude=["0"])},
            "must have a layer that the scheme can quantize.*2: last layer, which is left out unless it is named",
        ),
        ({"scheme": "nf4", "overrides": {"nope": "nf4"}}, "`overrides` must match layers of the model.*nope"),
        ({"scheme": "nf4", "targets": Targets(exclude=["*"])}, "must have a layer that the scheme can quantize"),
    ],
)
def test_mistakes_are_told_and_change_nothing(options: Any, message: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    before, had = snapshot(model), [set(vars(module)) for module in model.modules()]
    with pytest.raises((CompressionError, RuntimeError), match=message) as error:
        quantize(model, **options)
    assert isinstance(error.value, CompressionError) or "calibration" in options
    assert_same_state(before, model)
    assert [set(vars(module)) for module in model.modules()] == had and hooks(model) == []


def test_an_example_input_does_not_stand_in_for_calibration_data() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    model.example_input_array = torch.zeros(2, 8)
    with pytest.raises(CompressionError, match="`calibration` must be given for gptq"):
        quantize(model, "gptq")
    assert stored_in(quantize(model, "nf4")) == {"0": "nf4"}


@pytest.mark.parametrize("scheme", ["nf4", "int8_static", "gptq"])
def test_a_quantized_model_is_not_quantized_again(scheme: str) -> None:
    quantized = quantize(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "nf4")
    with pytest.raises(CompressionError, match="`model` must be a float model. Received: one that is converted"):
        quantize(quantized, scheme, calibration=[torch.randn(4, 8)])


def test_training_cannot_end_in_gptq_without_a_word() -> None:
    with pytest.raises(CompressionError, match="`overrides` must"):
        QuantizationAwareTraining(overrides={"head": "gptq"})


@pytest.mark.parametrize("scheme", [WeightOnly(4, 8), NF4(16)], ids=str)
def test_a_fit_with_fake_quantization_ends_with_a_head_of_few_bits(scheme: Packed) -> None:
    torch.manual_seed(0)
    module, data = Classifier(), TinyData()
    quiet_trainer(max_epochs=2, callbacks=[QuantizationAwareTraining(overrides={"head": scheme})]).fit(module, data)
    assert stored_in(module) == {"head": scheme.name}
    assert "test_acc" in quiet_trainer().test(module, data, verbose=False)[0]
