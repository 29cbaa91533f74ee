"""A scheme of the user's own: weights rounded to powers of two, of which the package knows nothing."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional

from lightning_compress import (
    CompressionError,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    load_compressed,
    quantize,
    save_compressed,
)
from lightning_compress.cli import main
from lightning_compress.modules.routing import Form, StoredWeight
from lightning_compress.quantization import Scheme
from lightning_compress.quantization.convert import record_of
from lightning_compress.quantization.plan import explain, summary
from lightning_compress.quantization.schemes import from_description, resolve
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import assert_same_state, snapshot

PATH = f"{__name__}.PowersOfTwo"


class Power(StoredWeight):
    """Each value a sign and an exponent of two."""

    held = ("codes", "sign")

    def __init__(self, weight: Tensor, lowest: int) -> None:
        super().__init__(weight)
        exponent = weight.detach().abs().clamp_min(2.0**lowest).log2().round().to(torch.int8)
        self.hold_(codes=exponent, sign=weight.detach().sign().to(torch.int8))

    def values(self) -> Tensor:
        return self.sign * 2.0**self.codes


class Shifted(Form):
    """``y = x W^T + b`` with such a weight."""

    def forward(self, layer: Any, x: Tensor) -> Tensor:
        return functional.linear(x, self.weights["weight"](), layer.bias)


@dataclass(frozen=True)
class PowersOfTwo(Scheme):
    lowest: int = -8
    name = "powers_of_two"
    needs_cpu = False

    def why_not(self, layer: nn.Module) -> str:
        return "" if type(layer) is nn.Linear else super().why_not(layer)

    def form(self, layer: Any, weights: Mapping[str, Any] = MappingProxyType({})) -> Form:
        return Shifted({"weight": Power(layer.weight, self.lowest)})

    def note(self) -> str:
        return "weights are shifts"


@dataclass(frozen=True)
class Needy(PowersOfTwo):
    highest: int = -1

    def __post_init__(self) -> None:
        raise TypeError("`highest` must be given")


class NoDataclass(Scheme):
    name = "none"


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4), nn.LSTM(4, 4, batch_first=True)).eval()


def by_numpy(weight: Tensor, lowest: int = -8) -> np.ndarray:
    values = weight.detach().numpy().astype(np.float64)
    return np.sign(values) * np.exp2(np.round(np.log2(np.maximum(np.abs(values), 2.0**lowest))))


@pytest.mark.parametrize("scheme", [PATH, PowersOfTwo(), PowersOfTwo(lowest=-4)], ids=str)
def test_quantizes_what_it_says_and_leaves_the_model(scheme: Any) -> None:
    model = net()
    before = snapshot(model)
    shifted = quantize(model, scheme)
    assert_same_state(model.state_dict(), before)
    lowest = resolve(scheme).lowest  # type: ignore[attr-defined]
    for index in (0, 2):
        assert (shifted[index].weight.double().numpy() == by_numpy(model[index].weight, lowest)).all()
    x = torch.randn(3, 16)
    expected = functional.linear(x, torch.tensor(by_numpy(model[0].weight, lowest)).float(), model[0].bias)
    assert torch.allclose(shifted[0](x), expected)


def test_the_plan_lists_it_with_its_note_and_its_reasons() -> None:
    record = record_of(quantize(net(), PATH))
    assert record is not None
    assert summary(record) == "`{0,2}` (powers_of_two)"
    assert explain(record) == ["`3` stays float: no powers_of_two kernel for LSTM", "`{0,2}`: weights are shifts"]


def test_a_form_must_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PowersOfTwo, "form", lambda self, layer, weights: nn.Linear(1, 1))
    model = net()
    before = snapshot(model)
    with pytest.raises(CompressionError, match="`form` must return a `Form`.*'Linear'"):
        quantize(model, PATH)
    assert_same_state(model.state_dict(), before)


def test_beside_other_schemes() -> None:
    x = torch.randn(8, 16)
    mixed = quantize(net(), calibration=[x], overrides={"2": PATH, "3": "int8_dynamic"})
    record = record_of(mixed)
    assert record is not None and "`2` (powers_of_two)" in summary(record) and "int8_static for" in summary(record)
    mixed(x)


def test_comes_back_from_a_file(tmp_path: Path) -> None:
    shifted, x = quantize(net(), PowersOfTwo(lowest=-3)), torch.randn(3, 16)
    save_compressed(shifted, tmp_path / "shifted.pt")
    file = torch.load(tmp_path / "shifted.pt", weights_only=True)
    assert file["lightning_compress"]["quantization"]["scheme"] == {
        "class": PATH,
        "name": "powers_of_two",
        "lowest": -3,
    }
    again = load_compressed(tmp_path / "shifted.pt", net())
    assert torch.equal(again(x)[0], shifted(x)[0])
    assert again.state_dict()["0.weight_sign"].dtype == again.state_dict()["0.weight"].dtype == torch.int8


def test_a_file_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_compressed(quantize(net(), PATH), tmp_path / "shifted.pt")
    monkeypatch.delitem(sys.modules, __name__)
    model = net()
    before = snapshot(model)
    with pytest.raises(CompressionError, match=rf"imported before.*'{PATH}'.*`import {__name__}` first"):
        load_compressed(tmp_path / "shifted.pt", model)
    assert __name__ not in sys.modules
    assert_same_state(model.state_dict(), before)


def test_a_file_asks_no_module_that_imports_its_parts_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_compressed(quantize(net(), PATH), tmp_path / "shifted.pt")
    late, asked = ModuleType("late"), list[str]()
    late.__getattr__ = asked.append  # type: ignore[method-assign, assignment]
    monkeypatch.setitem(sys.modules, "late", late)
    file = torch.load(tmp_path / "shifted.pt", weights_only=True)
    file["lightning_compress"]["quantization"]["layers"][0]["scheme"]["class"] = "late.Part"
    torch.save(file, tmp_path / "other.pt")
    with pytest.raises(CompressionError, match="imported before.*'late.Part'"):
        load_compressed(tmp_path / "other.pt", net())
    assert "Part" not in asked


@pytest.mark.parametrize("kind", ["os.system", "pathlib.Path", "tests.quantization.nowhere.Scheme", "builtins.dict"])
def test_a_file_names_nothing_but_schemes(tmp_path: Path, kind: str) -> None:
    save_compressed(quantize(net(), PATH), tmp_path / "shifted.pt")
    file = torch.load(tmp_path / "shifted.pt", weights_only=True)
    file["lightning_compress"]["quantization"]["layers"][0]["scheme"]["class"] = kind
    torch.save(file, tmp_path / "other.pt")
    with pytest.raises(CompressionError, match="`scheme` must be of a class that was imported before"):
        load_compressed(tmp_path / "other.pt", net())


CLASS_PATH = {"class_path": PATH, "init_args": {"lowest": -5}}


@pytest.mark.parametrize("scheme", [PATH, CLASS_PATH], ids=["by import path", "by class_path"])
def test_from_a_configuration_file(scheme: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    found: list[PostTrainingQuantization] = []
    start = PostTrainingQuantization.on_test_start
    monkeypatch.setattr(
        PostTrainingQuantization, "on_test_start", lambda self, *args: found.append(self) or start(self, *args)
    )
    ptq = {"class_path": "PostTrainingQuantization", "init_args": {"scheme": scheme}}
    trainer = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "callbacks": [ptq]}
    config = {
        "trainer": trainer,
        "model": {"class_path": "tests.support.modules.Classifier"},
        "data": {"class_path": "tests.support.data.TinyData"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    main(["test", "--config", str(tmp_path / "config.yaml")])
    lowest = -8 if scheme == PATH else -5
    assert found[0].recipe.scheme == PowersOfTwo(lowest)
    record = record_of(found[0].quantized_model)  # type: ignore[arg-type]
    assert record is not None and record["scheme"]["lowest"] == lowest and record["layers"]


def test_in_a_trainer_it_needs_no_calibration_and_the_float_model_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    module, ptq = Classifier(), PostTrainingQuantization(PATH)
    before = snapshot(module)
    with caplog.at_level("INFO"):
        quiet_trainer(callbacks=[ptq]).test(module, TinyData(), verbose=False)
    assert_same_state(module.state_dict(), before)
    assert "(powers_of_two)" in caplog.text and "weights are shifts" in caplog.text


def test_qat_rounds_its_layers_when_the_fit_ends() -> None:
    module = Classifier()
    quiet_trainer(callbacks=[QuantizationAwareTraining("int4_weight_only", overrides={"head": PATH})]).fit(
        module, TinyData()
    )
    weight = module.head.weight.double().numpy()
    assert (weight == by_numpy(torch.tensor(weight))).all() and weight.any()


@pytest.mark.parametrize("make", [PostTrainingQuantization, lambda scheme: quantize(net(), scheme)])
@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (f"{__name__}.Gone", "import path of a class that needs no arguments.*no attribute 'Gone'"),
        ("tests.quantization.nowhere.Scheme", "import path .*No module named"),
        (f"{__name__}.Needy", "needs no arguments.*`highest` must be given"),
        (f"{__name__}.Power", "missing 2 required positional arguments"),
        ("collections.Counter", "`scheme` must be the name of a scheme"),
        (f"{__name__}.NoDataclass", "`scheme` must be a dataclass"),
        (NoDataclass(), "`scheme` must be a dataclass"),
        (PowersOfTwo, "`scheme` must be the name of a scheme"),
    ],
)
def test_what_is_no_scheme_is_refused(make: Any, scheme: Any, message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        make(scheme)


def test_a_class_that_a_file_could_not_name_is_refused() -> None:
    @dataclass(frozen=True)
    class Local(PowersOfTwo):
        pass

    with pytest.raises(CompressionError, match="stands in a module under its own name"):
        quantize(net(), Local())
    with pytest.raises(CompressionError, match="for training"):
        QuantizationAwareTraining(PATH)


def test_a_scheme_of_a_script_is_to_be_defined_in_the_script_that_loads_it() -> None:
    with pytest.raises(CompressionError, match="'__main__.Part'.*Define it in your script first"):
        from_description({"class": "__main__.Part", "name": "part"})
