"""Schemes of single layers inside and outside of traced units, also while they train."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import (
    CompressionError,
    DynamicInt8,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    StaticInt8,
    Targets,
    Window,
    load_compressed,
    quantize,
)
from lightning_compress.quantization.convert import record_of
from tests.quantization.layers.layer_views import DYNAMIC, WEIGHT_ONLY, count, rounded, schemes
from tests.quantization.prepared import fake_quantizers, int8_layers, trained_layers
from tests.quantization.test_quantize import agreement
from tests.support import fits
from tests.support.data import TinyData
from tests.support.fits import read_checkpoint, resume
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import assert_same_state, snapshot
from tests.support.zoo import row


def block() -> nn.Sequential:
    # No layer has a ReLU right behind it; that is another test.
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.ReLU(), nn.Linear(16, 16), nn.Tanh())


class Nested(nn.Module):
    """Two blocks of two layers each, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = block(), block()
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"head": WEIGHT_ONLY}, {"head": WEIGHT_ONLY}),
        ({"first": DYNAMIC}, {"first.0": DYNAMIC, "first.3": DYNAMIC}),
        ({"*.0": DYNAMIC, "head": WEIGHT_ONLY}, {"first.0": DYNAMIC, "second.0": DYNAMIC, "head": WEIGHT_ONLY}),
        # The last match wins, however exact an earlier one is.
        ({"first": DYNAMIC, "first.3": WEIGHT_ONLY}, {"first.0": DYNAMIC, "first.3": WEIGHT_ONLY}),
        ({"first.3": WEIGHT_ONLY, "first": DYNAMIC}, {"first.0": DYNAMIC, "first.3": DYNAMIC}),
        ({"head": DynamicInt8(reduce_range=True)}, {"head": DYNAMIC}),
    ],
    ids=str,
)
def test_overrides_inside_a_traced_unit(overrides: Any, expected: dict[str, str]) -> None:
    # Q3: a first and last layer of another kind.
    torch.manual_seed(0)
    model, x = Nested().eval(), torch.randn(64, 16)
    before = snapshot(model)
    int8 = quantize(model, calibration=[x], overrides=overrides).eval()
    assert schemes(int8) == expected
    values = list(expected.values())
    assert count(int8, "PackedLinear") == values.count(WEIGHT_ONLY)
    assert count(int8, "DynamicLinear") == values.count(DYNAMIC)
    assert len(int8_layers(int8)) == 5 - len(values)
    assert [unit["path"] for unit in (record_of(int8) or {})["units"]] == [""]
    assert agreement(model(x), int8(x)) > 0.99
    assert_same_state(before, model)


def conv_bn_relu() -> nn.Module:
    return row("conv_bn_relu").build()


@pytest.mark.parametrize("scheme", [WEIGHT_ONLY, DYNAMIC])
@pytest.mark.parametrize("training", [False, True])
def test_an_overridden_layer_with_a_relu_behind_it(scheme: str, training: bool) -> None:
    class Relu(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.Identity()  # type: ignore[assignment]
            self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU())  # type: ignore[assignment]

    module, data = Relu(), TinyData()
    if training:
        quiet_trainer(callbacks=[QuantizationAwareTraining(overrides={"body": scheme})]).fit(module, data)
        assert schemes(module) == {"body.0": scheme}
        return
    floats = quiet_trainer().test(module, data, verbose=False)[0]["test_loss"]
    ptq = PostTrainingQuantization(overrides={"body": scheme}, keep=True)
    loss = quiet_trainer(callbacks=[ptq]).test(module, data, verbose=False)[0]["test_loss"]
    assert schemes(module) == {"body.0": scheme}
    assert loss == pytest.approx(floats, rel=0.05)


def test_a_first_convolution_with_batchnorm_and_relu_behind_it() -> None:
    model, x = conv_bn_relu().eval(), torch.randn(8, 3, 8, 8)
    int8 = quantize(model, calibration=[x], overrides={"0": WEIGHT_ONLY, "8": WEIGHT_ONLY}).eval()
    assert schemes(int8) == {"0": WEIGHT_ONLY, "8": WEIGHT_ONLY}
    assert agreement(model(x), int8(x)) > 0.99


@pytest.mark.parametrize("relu", [False, True])
def test_an_excluded_layer_with_batchnorm_behind_it_keeps_its_function(relu: bool) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU() if relu else nn.Tanh(), nn.Flatten(), nn.Linear(288, 4)
    )
    x = torch.randn(8, 3, 8, 8)
    for _ in range(3):
        model(x * 3 + 1)
    model.eval()
    int8 = quantize(model, calibration=[x], targets=Targets(exclude=["0"])).eval()
    assert (record_of(int8) or {})["floats"]["0"] == "excluded"
    assert len(int8_layers(int8)) == 1
    assert agreement(model(x), int8(x)) > 0.99


def test_overrides_outside_of_any_unit() -> None:
    class Branches(nn.Module):
        """Can't be traced; its layers are units of their own."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.rnn = nn.Linear(16, 16), nn.Linear(16, 8), nn.LSTM(8, 8, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.rnn(self.b(x.relu() if x.sum() > 0 else -x))[0]

    model, x = Branches().eval(), torch.randn(8, 5, 16)
    int8 = quantize(model, calibration=[x], overrides={"a": WEIGHT_ONLY, "rnn": DYNAMIC}).eval()
    assert schemes(int8) == {"a": WEIGHT_ONLY, "rnn": DYNAMIC}
    assert [unit["path"] for unit in (record_of(int8) or {})["units"]] == ["b"]
    for sign in (1, -1):
        assert agreement(model(sign * x), int8(sign * x)) > 0.98


def test_an_override_of_a_scheme_that_works_layer_by_layer() -> None:
    int8 = quantize(Nested(), DYNAMIC, overrides={"head": WEIGHT_ONLY})
    assert schemes(int8) == {
        **dict.fromkeys(["first.0", "first.3", "second.0", "second.3"], DYNAMIC),
        "head": WEIGHT_ONLY,
    }


def test_an_excluded_layer_stays_float_whatever_overrides_say() -> None:
    int8 = quantize(
        Nested(), calibration=[torch.randn(8, 16)], overrides={"*": WEIGHT_ONLY}, targets=Targets(exclude=["head"])
    )
    assert set(schemes(int8)) == {"first.0", "first.3", "second.0", "second.3"}
    assert (record_of(int8) or {})["floats"]["head"] == "excluded"


def test_a_layer_that_the_scheme_has_no_kernel_for_stays_float_and_says_so() -> None:
    model = row("conv_bn_relu").build()
    int8 = quantize(model, calibration=[torch.randn(4, 3, 8, 8)], overrides={"0": DYNAMIC})
    assert schemes(int8) == {}
    assert (record_of(int8) or {})["floats"]["0"] == "no int8_dynamic kernel for Conv2d"


@pytest.mark.parametrize("make", [PostTrainingQuantization, QuantizationAwareTraining])
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"head": "int8_static"}, "`overrides` must name schemes that work layer by layer.*Make the static scheme"),
        ({"head": StaticInt8()}, "`overrides` must name schemes that work layer by layer"),
        ({"head": "int8_dynamik"}, "`scheme` must be the name of a scheme.*Nearest: int8_dynamic"),
        (["head"], "`overrides` must be a mapping"),
    ],
    ids=str,
)
def test_overrides_that_cannot_be_are_refused_at_once(make: Any, overrides: Any, message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        make(overrides=overrides)


@pytest.mark.parametrize("way", ["quantize", "ptq", "qat"])
def test_a_pattern_that_matches_nothing_lists_the_nearest_and_changes_nothing(way: str) -> None:
    module = Classifier()
    before = snapshot(module)
    overrides = {"heat": WEIGHT_ONLY}
    with pytest.raises(CompressionError, match=r"`overrides` must match layers of the model.*heat.*Nearest: head"):
        if way == "quantize":
            quantize(module, calibration=[torch.randn(4, 16)], overrides=overrides)
        elif way == "ptq":
            quiet_trainer(callbacks=[PostTrainingQuantization(overrides=overrides)]).test(
                module, TinyData(), verbose=False
            )
        else:
            quiet_trainer(callbacks=[QuantizationAwareTraining(overrides=overrides)]).fit(module, TinyData())
    assert_same_state(before, module)


# In training.


def qat(**options: Any) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(**{"window": Window(0.25), "overrides": {"head": WEIGHT_ONLY}, **options})


fit = partial(fits.fit, max_epochs=4)


@pytest.mark.parametrize("scheme", [WEIGHT_ONLY, DYNAMIC])
def test_in_training_an_overridden_layer_is_float_and_converted_at_the_end(scheme: str, tmp_path: Path) -> None:
    seen: list[set[str]] = []

    class Watches(QuantizationAwareTraining):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *args)
            seen.append(trained_layers(pl_module))

    _, module = fit(Watches(window=Window(0.25), overrides={"head": scheme}), folder=tmp_path)
    assert seen[-1] == {"body"}
    assert schemes(module) == {"head": scheme}
    assert count(module, {WEIGHT_ONLY: "PackedLinear", DYNAMIC: "DynamicLinear"}[scheme]) == 1
    assert len(int8_layers(module)) == 1
    # Its weights are those that were trained, to half a step.
    trained = read_checkpoint(tmp_path / "epoch=3.ckpt")["state_dict"]["head.weight"]
    values, scale = rounded(module.head)
    assert (values - trained).abs().div(scale).max() <= 0.5 + 1e-4
    quiet_trainer(callbacks=[qat(overrides={"head": scheme})]).fit(module, TinyData())  # the float form goes on
    assert schemes(module) == {"head": scheme}


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_resumed_equals_uninterrupted_with_overrides(tmp_path: Path) -> None:
    (_, whole), (_, resumed) = resume(lambda **files: fit(qat(), **files), tmp_path, 0, 2)
    assert schemes(whole) == schemes(resumed) == {"head": WEIGHT_ONLY}
    x = torch.randn(16, 16)
    assert torch.equal(whole.eval()(x), resumed.eval()(x))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_files_of_a_model_with_overrides_load(tmp_path: Path) -> None:
    module, data = fit(qat(), folder=tmp_path)[1], TinyData()
    expected = quiet_trainer().test(module, data, verbose=False)
    trainer = quiet_trainer(callbacks=[qat()])
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "int8.ckpt")
    # Prepared: a plain module takes it strictly, `load_compressed` brings the form back, a test converts it.
    prepared = tmp_path / "epoch=3.ckpt"
    Classifier().load_state_dict(torch.load(prepared, weights_only=True)["state_dict"], strict=True)
    loaded = load_compressed(str(prepared), Classifier())
    assert fake_quantizers(loaded) and schemes(loaded) == {"head": WEIGHT_ONLY}
    ours = quiet_trainer(callbacks=[qat()])
    assert ours.test(Classifier(), data, ckpt_path=prepared, weights_only=True, verbose=False) == expected
    # Converted.
    int8 = load_compressed(str(tmp_path / "int8.ckpt"), Classifier())
    assert quiet_trainer().test(int8, data, verbose=False) == expected


@pytest.mark.parametrize("scheme", [WEIGHT_ONLY, DYNAMIC])
def test_everything_overridden_leaves_nothing_to_train_and_still_converts(scheme: str) -> None:
    module = Classifier()
    quiet_trainer(callbacks=[qat(window=Window(), overrides={"*": scheme})]).fit(module, TinyData())
    assert schemes(module) == {"body": scheme, "head": scheme}
