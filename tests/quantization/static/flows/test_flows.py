"""What each flow quantizes and why not, in and out of a Trainer, and its files."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress import (
    CompressionError,
    PostTrainingQuantization,
    Targets,
    load_compressed,
    quantize,
    save_compressed,
)
from lightning_compress.quantization.convert import record_of
from tests.quantization.static.flows.children import child, resized, uncompiled
from tests.quantization.test_quantize import agreement, batches
from tests.support.data import TinyData
from tests.support.foreign import FOREIGN, foreign
from tests.support.modules import Classifier, ZooModule, quiet_trainer
from tests.support.oracles import assert_same_state, described, same_random_state, snapshot
from tests.support.zoo import ZOO, Row, row

FLOWS = ["fx", "pt2e"]


def kernel(kind: str, dynamic: bool = False) -> str:
    remedy = " (`overrides` can give it int8_dynamic)" if dynamic else ""
    return f"no static int8 kernel for {kind}{remedy}"


def times(name: str) -> str:
    return f"`{name}` takes it as a weight, for which there is no static int8 kernel"


UNSEEN = "`mixed` computes with it, which torch.fx doesn't see into; flow='pt2e' may"


TIED = "its weight is tied to `embedding`, which stays float"


# Row: what flow fx leaves in float, then what pt2e does; rows that aren't here are int8 as a whole in both.
FLOATS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "attention": ({"theirs": kernel("MultiheadAttention", True)}, {}),
    "transformer": (
        {"0": kernel("TransformerEncoderLayer", True), "0.self_attn": kernel("MultiheadAttention", True)},
        {},
    ),
    "lstm": ({"rnn": kernel("LSTM", True)}, {"rnn": kernel("LSTM", True)}),
    "gru": ({"rnn": kernel("GRU", True)}, {"rnn": kernel("GRU", True)}),
    "tied": ({"lm_head": TIED, "embedding": kernel("Embedding")},) * 2,
    "auxiliary_head": ({"auxiliary": "the first batch doesn't call it"},) * 2,
    "integers": ({"words": kernel("Embedding"), "places": kernel("Embedding")},) * 2,
    "own_parameters": ({"mixed": times("matmul"), "last": UNSEEN}, {"mixed": times("matmul")}),
}


TABLES = {"windows": {f"blocks.{block}.{name}" for block in (0, 1) for name in ("table", "gamma")}}
"""Float matrices that are no weights: they are added or looked up in."""


INGREDIENTS = {
    "weight_norm": {"0.parametrizations.weight.original0", "0.parametrizations.weight.original1"},
    "computed_weights": {"0.weight", "4.weight", "6.weight", "6.down", "6.up"},
    "parametrized": {
        *("0.parametrizations.weight.original0", "0.parametrizations.weight.original1"),
        "4.parametrizations.weight.original",
    },
    "reading": {"qkv.weight"},
}
"""Float matrices of which a forward computes weights: they stay in the tree."""


def matrices(int8: nn.Module) -> set[str]:
    """Names of the float matrices of an int8 model."""
    return {
        key
        for key, value in int8.state_dict().items()
        if isinstance(value, Tensor) and value.dtype == torch.float32 and value.dim() > 1
    }


def untold(int8: nn.Module) -> set[str]:
    """Names of the float matrices of an int8 model that its record doesn't name."""
    floats = (record_of(int8) or {})["floats"]
    return {name for name in matrices(int8) if not any(f"{name}.".startswith(f"{path}.") for path in floats)}


@pytest.mark.parametrize(
    ("row", "flow"),
    [
        pytest.param(row, flow, id=f"{row}-{flow}")
        for row in (*ZOO, *FOREIGN)
        for flow in ("auto", "pt2e")
        if (row.name, flow) != ("numbers", "pt2e")  # an export can't take it
    ],
)
def test_the_table_of_what_each_flow_quantizes_and_why_not_and_its_files(
    row: Row, flow: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, calibration = row.build(), batches(row, 3)
    before = snapshot(model)
    with uncompiled():
        with caplog.at_level(logging.INFO, "lightning_compress"):
            int8 = quantize(model, calibration=calibration, flow=flow)  # type: ignore[arg-type]
        assert "'pt2e' can" not in caplog.text  # auto takes it where fx can't alone
        record = record_of(int8) or {}
        assert [(unit["path"], unit["flow"]) for unit in record["units"]] == [("", "fx" if flow == "auto" else flow)]
        assert record["floats"] == FLOATS.get(row.name, ({}, {}))[flow == "pt2e"]
        assert record["layers"] == []
        assert untold(int8) - INGREDIENTS.get(row.name, set()) == TABLES.get(row.name, set())
        assert_same_state(before, model)
        model.eval(), int8.eval()
        save_compressed(int8, str(tmp_path / "int8.ckpt"))
        loaded = load_compressed(str(tmp_path / "int8.ckpt"), row.build(seed=1)).eval()
        for size in (4, 1, 2, 7):
            args, kwargs = resized(row.inputs(0), size)
            expected, got = model(*args, **kwargs), int8(*args, **kwargs)
            assert_same_state({"output": got}, {"output": loaded(*args, **kwargs)})
            assert described(got) == described(expected)
            assert agreement(expected, got) > 0.98, size


@pytest.mark.parametrize("flow", FLOWS)
def test_what_is_excluded_stays_float_whoever_uses_its_weight(flow: str) -> None:
    # A layer with a forward of its own, a matrix of a module around layers, and weights that are read and computed.
    own, reading = foreign("own_parameters"), foreign("reading")
    computed = foreign("computed_weights")
    with uncompiled():
        for row, exclude in ((computed, ["0", "6"]), (reading, ["qkv", "body"]), (own, ["rest"])):
            targets = Targets(exclude=exclude)
            int8 = quantize(row.build(), calibration=batches(row, 1), targets=targets, flow=flow)  # type: ignore[arg-type]
            floats, left = (record_of(int8) or {})["floats"], matrices(int8)
            assert {path: floats[path] for path in exclude} == dict.fromkeys(exclude, "excluded")
            assert all(any(name.startswith(path) for name in left) for path in exclude)
            args, kwargs = row.inputs(0)
            assert agreement(row.build().eval()(*args, **kwargs), int8(*args, **kwargs)) > 0.98


@pytest.mark.parametrize("flow", FLOWS)
def test_a_flow_draws_nothing_from_the_global_generators(flow: str) -> None:
    model, x = row("mlp").build(), torch.randn(8, 16)
    with uncompiled(), same_random_state():
        quantize(model, calibration=[x], flow=flow)(x)  # type: ignore[arg-type]


class Functional(nn.Module):
    """Reads its layers' weights, calls none of them, and checks its input: fx sees no layer, an export does."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 16:
            raise ValueError("16 features")
        return F.linear(F.linear(x, self.body.weight, self.body.bias).relu(), self.head.weight, self.head.bias)


class FunctionalModule(Classifier):
    def __init__(self) -> None:
        super().__init__()
        del self.body, self.norm, self.head
        self.net = Functional()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_auto_falls_back_to_pt2e_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, x = Functional().eval(), torch.randn(64, 16)
    with uncompiled(), caplog.at_level(logging.INFO, "lightning_compress"):
        int8 = quantize(model, calibration=[x])
        assert agreement(model(x), int8(x)) > 0.99
    assert not torch.equal(model(x), int8(x))
    assert [unit["flow"] for unit in (record_of(int8) or {})["units"]] == ["pt2e"]
    [line] = [entry.getMessage() for entry in caplog.records if entry.name == "lightning_compress"]
    assert "'fx' can quantize nothing here, 'pt2e' can" in line


def test_in_a_trainer_auto_falls_back_too_and_the_float_model_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    module, data = FunctionalModule(), TinyData()
    before = snapshot(module)
    floats = quiet_trainer().test(module, data, verbose=False)[0]["test_loss"]
    ptq = PostTrainingQuantization()
    with uncompiled(), caplog.at_level(logging.INFO, "lightning_compress"):
        loss = quiet_trainer(callbacks=[ptq]).test(module, data, verbose=False)[0]["test_loss"]
    assert loss == pytest.approx(floats, rel=0.05) and loss != floats
    assert "pt2e" in caplog.text
    assert any("compiled by inductor" in note for note in ptq.report_notes())
    assert_same_state(before, module)
    quiet_trainer().fit(module, data)


@pytest.mark.parametrize("inference_mode", [True, False])
def test_the_explicit_flow_pt2e_in_a_trainer(inference_mode: bool) -> None:
    # The last batch of test and calibration is of another size; dropout and BatchNorm stay in evaluation.
    torch.manual_seed(0)
    module, data = Classifier(), TinyData(samples=17)
    quiet_trainer(max_epochs=3).fit(module, TinyData())
    before = snapshot(module)
    floats = quiet_trainer().test(module, data, verbose=False)[0]
    trainer = quiet_trainer(inference_mode=inference_mode, callbacks=[PostTrainingQuantization(flow="pt2e")])
    with uncompiled():
        metrics = trainer.test(module, data, verbose=False)[0]
        assert metrics["test_loss"] == pytest.approx(floats["test_loss"], rel=0.05)
        assert metrics != floats
        assert trainer.test(module, data, verbose=False)[0] == metrics
    assert_same_state(before, module)
    trainer.fit(module, TinyData())
    assert not any(torch.equal(before[name], parameter) for name, parameter in module.named_parameters())


@pytest.mark.parametrize("flow", FLOWS)
def test_calibrated_one_sample_at_a_time(flow: str) -> None:
    model, x = row("conv_bn_relu").build().eval(), torch.randn(8, 3, 8, 8)
    with uncompiled():
        int8 = quantize(model, calibration=list(x.split(1)), flow=flow)  # type: ignore[arg-type]
        assert agreement(model(x), int8(x)) > 0.98
        assert agreement(model(x[:1]), int8(x[:1])) > 0.98


@pytest.mark.parametrize("flow", FLOWS)
def test_images_of_other_sizes_than_the_calibrated(flow: str) -> None:
    model = row("conv_bn_relu").build().eval()
    with uncompiled():
        int8 = quantize(model, calibration=[torch.randn(4, 3, 8, 8)], flow=flow)  # type: ignore[arg-type]
        x = torch.randn(3, 3, 12, 20)
        assert agreement(model(x), int8(x)) > 0.98


@pytest.mark.parametrize("flow", FLOWS)
def test_dropout_stays_off_in_int8_whatever_the_mode(flow: str) -> None:
    # torchao's own train/eval switch resets dropout to p=0.5 and BatchNorm's momentum and eps.
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32, eps=0.1), nn.ReLU(), nn.Dropout(0.9), nn.Linear(32, 4))
    x = torch.randn(64, 16)
    for _ in range(3):
        model(x)
    with uncompiled():
        int8 = quantize(model, calibration=[x], flow=flow)  # type: ignore[arg-type]
        expected = model.eval()(x)
        assert agreement(expected, int8.eval()(x)) > 0.99
        assert torch.equal(int8.eval()(x), int8.train()(x))


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("scheme", ["int8_dynamic", "int8_weight_only"])
@pytest.mark.parametrize("make", [quantize, PostTrainingQuantization], ids=["quantize", "callback"])
def test_a_flow_is_refused_for_schemes_that_work_layer_by_layer(make: Any, scheme: str, flow: str) -> None:
    arguments = (row("mlp").build(),) if make is quantize else ()
    with pytest.raises(CompressionError, match="`flow` must be 'auto' for a scheme that works layer by layer"):
        make(*arguments, scheme, flow=flow)


def test_a_mistyped_flow_lists_the_flows() -> None:
    with pytest.raises(CompressionError, match="`flow` must be one of auto, fx, pt2e.*'pt3e'.*Nearest: pt2e"):
        quantize(row("mlp").build(), calibration=[torch.zeros(4, 16)], flow="pt3e")  # type: ignore[arg-type]


LOAD = """
import sys, torch
from lightning_compress import load_compressed
from tests.support.modules import ZooModule
from tests.support.oracles import snapshot
from tests.support.zoo import row
torch.set_num_threads(1)
found = {}
with torch.compiler.set_stance("force_eager"):
    for path in sys.argv[2:]:
        name = path.rpartition("/")[2].partition("-")[0]
        module = ZooModule(row(name))
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(3.0)  # nothing of the fresh module may be left
        module = load_compressed(path, module).eval()
        args, kwargs = row(name).inputs(7)
        found[path] = {"state": snapshot(module), "output": module(*args, **kwargs)}
torch.save(found, sys.argv[1])
"""


FILES = [
    ("conv_bn_relu", "int8_static", "pt2e"),
    ("depthwise", "int8_static", "fx"),
    ("keyword_only", "int8_static", "fx"),
    ("attention", "int8_static", "pt2e"),
    ("lstm", "int8_static", "fx"),
    ("transformer", "int8_dynamic", "auto"),
    ("grouped", "int8_weight_only", "auto"),
]


@pytest.mark.slow
def test_int8_files_load_bit_equal_in_a_fresh_process(tmp_path: Path) -> None:
    # Q23. `load_compressed` reads with weights_only=True.
    expected = {}
    for name, scheme, flow in FILES:
        path, module = tmp_path / f"{name}-{scheme}-{flow}.ckpt", ZooModule(row(name))
        trainer = quiet_trainer(callbacks=[PostTrainingQuantization(scheme, flow=flow, keep=True)])  # type: ignore[arg-type]
        with uncompiled():
            trainer.test(module, verbose=False)
            trainer.save_checkpoint(path)
            args, kwargs = row(name).inputs(7)
            expected[str(path)] = {"state": snapshot(module), "output": module.eval()(*args, **kwargs)}
    run = child(LOAD, str(tmp_path / "found.pt"), *expected)
    assert run.returncode == 0, run.stderr
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of quantized tensors' storages
        found = torch.load(tmp_path / "found.pt", weights_only=False)
    assert found.keys() == expected.keys()
    for path, wanted in expected.items():
        assert_same_state(wanted, found[path])


def test_an_int8_file_of_pt2e_is_tested_with_ckpt_path_and_refuses_to_train(tmp_path: Path) -> None:
    module, data, path = Classifier(), TinyData(), tmp_path / "int8.ckpt"
    trainer = quiet_trainer(callbacks=[PostTrainingQuantization(flow="pt2e", keep=True)])
    with uncompiled():
        expected = trainer.test(module, data, verbose=False)
        trainer.save_checkpoint(path)
        ours = quiet_trainer(callbacks=[PostTrainingQuantization(flow="pt2e")])
        assert ours.test(Classifier(), data, ckpt_path=path, weights_only=True, verbose=False) == expected
        loaded = load_compressed(str(path), Classifier())
        assert quiet_trainer().test(loaded, data, verbose=False) == expected
        with pytest.raises(CompressionError, match="`ckpt_path` must be a float or a prepared checkpoint"):
            quiet_trainer(callbacks=[PostTrainingQuantization()]).fit(
                Classifier(), data, ckpt_path=path, weights_only=True
            )
