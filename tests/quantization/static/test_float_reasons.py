"""What static int8 leaves float and why, in and out of a Trainer, and its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress import (
    CompressionError,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    Targets,
    load_compressed,
    quantize,
    save_compressed,
)
from lightning_compress.quantization.convert import record_of
from tests.quantization.static.children import child
from tests.quantization.test_quantize import agreement, batches
from tests.support.data import TinyData
from tests.support.foreign import FOREIGN, foreign
from tests.support.modules import Classifier, ZooModule, quiet_trainer
from tests.support.oracles import assert_same_state, described, snapshot
from tests.support.zoo import ZOO, Row, row


def kernel(kind: str, dynamic: bool = False) -> str:
    remedy = " (`overrides` can give it int8_dynamic)" if dynamic else ""
    return f"no static int8 kernel for {kind}{remedy}"


FLOATS: dict[str, dict[str, str]] = {
    "lstm": {"rnn": kernel("LSTM", True)},
    "gru": {"rnn": kernel("GRU", True)},
    "tied": {
        "lm_head": "its weight is tied to `embedding`, which stays float",
        "embedding": kernel("Embedding"),
    },
    "auxiliary_head": {"auxiliary": "the first batch doesn't call it"},
    "integers": {"words": kernel("Embedding"), "places": kernel("Embedding")},
    "own_parameters": {"mixed": "`matmul` takes it as a weight, for which there is no static int8 kernel"},
}
"""What stays float; the rows that aren't here are int8 as a whole."""

_RECURRENT = (["head"], "its `rnn` would be traced for sequences of one length")
PARTS = {
    "numbers": (["body", "head"], "torch.export can't trace its forward ("),
    "lstm": _RECURRENT,
    "gru": _RECURRENT,
}
"""Units of what isn't traced as a whole, and how the reason begins."""

TABLES = {"windows": {f"blocks.{block}.{name}" for block in (0, 1) for name in ("table", "gamma")}}
"""Float matrices that are no weights: they are added or looked up in."""

INGREDIENTS = {
    "weight_norm": {"0.parametrizations.weight.original0", "0.parametrizations.weight.original1"},
    "computed_weights": {"0.weight", "4.weight", "6.weight", "6.down", "6.up"},
    "parametrized": {
        *("0.parametrizations.weight.original0", "0.parametrizations.weight.original1"),
        "4.parametrizations.weight.original",
    },
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


def resized(inputs: Any, size: int) -> Any:
    """The same inputs with another batch size; the zoo's batches are of four, but for `keyword_only`'s two of them."""

    def resize(leaf: Any) -> Any:
        return torch.cat([leaf] * 3)[:size] if isinstance(leaf, Tensor) and len(leaf) == 4 else leaf

    return pytree.tree_map(resize, inputs)


@pytest.mark.parametrize("row", (*ZOO, *FOREIGN), ids=str)
def test_the_table_of_what_is_quantized_and_why_the_rest_is_not_and_its_files(row: Row, tmp_path: Path) -> None:
    model = row.build()
    before = snapshot(model)
    int8 = quantize(model, calibration=batches(row, 3))
    record = record_of(int8) or {}
    assert [unit["path"] for unit in record["units"]] == PARTS.get(row.name, ([""],))[0]
    reasons = dict(record["floats"])
    if row.name in PARTS:
        assert reasons.pop("").startswith(f"not as a whole: {PARTS[row.name][1]}")
    assert reasons == FLOATS.get(row.name, {})
    assert record["layers"] == []
    assert untold(int8) == INGREDIENTS.get(row.name, TABLES.get(row.name, set()))
    assert_same_state(before, model)
    model.eval(), int8.eval()
    save_compressed(int8, str(tmp_path / "int8.ckpt"))
    loaded = load_compressed(str(tmp_path / "int8.ckpt"), row.build(seed=1)).eval()
    for size in (4, 1, 7):
        args, kwargs = resized(row.inputs(0), size)
        expected, got = model(*args, **kwargs), int8(*args, **kwargs)
        assert_same_state({"output": got}, {"output": loaded(*args, **kwargs)})
        assert described(got) == described(expected)
        assert agreement(expected, got) > 0.99, size


EXCLUDED = {"computed_weights": ["0", "6"], "reading": ["qkv", "body"], "own_parameters": ["rest"]}


@pytest.mark.parametrize("name", EXCLUDED)
def test_what_is_excluded_stays_float_whoever_uses_its_weight(name: str) -> None:
    # A layer with a forward of its own, a matrix of a module around layers, and weights that are read and computed.
    row, exclude = foreign(name), EXCLUDED[name]
    int8 = quantize(row.build(), calibration=batches(row, 1), targets=Targets(exclude=exclude))
    floats, left = (record_of(int8) or {})["floats"], matrices(int8)
    assert {path: floats[path] for path in exclude} == dict.fromkeys(exclude, "excluded")
    assert all(any(name.startswith(path) for name in left) for path in exclude)
    args, kwargs = row.inputs(0)
    assert agreement(row.build().eval()(*args, **kwargs), int8(*args, **kwargs)) > 0.98


@pytest.mark.parametrize("kind", ["ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"])
def test_transposed_convolutions_are_float_and_told_of(kind: str) -> None:
    dims = int(kind[-2])
    conv = getattr(nn, f"Conv{dims}d")
    model, x = (
        nn.Sequential(conv(3, 4, 1), getattr(nn, kind)(4, 8, 2, 2), conv(8, 4, 1)),
        torch.randn(2, 3, *[5] * dims),
    )
    int8 = quantize(model.eval(), calibration=[x]).eval()
    reason = f"torch has no int8 kernel of {kind} that is right on every CPU"
    assert (record_of(int8) or {})["floats"] == {"1": reason}
    assert agreement(model(x), int8(x)) > 0.99
    with pytest.raises(CompressionError, match="`targets` must leave"):
        quantize(model, calibration=[x], targets=Targets(["1"]))


class Functional(nn.Module):
    """Reads its layers' weights, calls none of them, and checks its input."""

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


def test_in_a_trainer_layers_that_are_never_called_are_int8_and_the_float_model_comes_back() -> None:
    module, data = FunctionalModule(), TinyData()
    before = snapshot(module)
    floats = quiet_trainer().test(module, data, verbose=False)[0]["test_loss"]
    ptq = PostTrainingQuantization()
    loss = quiet_trainer(callbacks=[ptq]).test(module, data, verbose=False)[0]["test_loss"]
    assert loss == pytest.approx(floats, rel=0.05) and loss != floats
    assert untold(ptq.quantized_model) == set()
    assert_same_state(before, module)
    quiet_trainer().fit(module, data)


@pytest.mark.parametrize("inference_mode", [True, False])
def test_in_a_trainer_in_either_mode_of_inference(inference_mode: bool) -> None:
    # The last batch of test and calibration is of another size; dropout and BatchNorm stay in evaluation.
    module, data = Classifier(), TinyData(samples=17)
    quiet_trainer(max_epochs=3).fit(module, TinyData())
    before = snapshot(module)
    floats = quiet_trainer().test(module, data, verbose=False)[0]
    trainer = quiet_trainer(inference_mode=inference_mode, callbacks=[PostTrainingQuantization()])
    metrics = trainer.test(module, data, verbose=False)[0]
    assert metrics["test_loss"] == pytest.approx(floats["test_loss"], rel=0.05) and metrics != floats
    assert trainer.test(module, data, verbose=False)[0] == metrics
    assert_same_state(before, module)
    trainer.fit(module, TinyData())
    assert not any(torch.equal(before[name], parameter) for name, parameter in module.named_parameters())


def test_calibrated_one_sample_at_a_time() -> None:
    model, x = row("conv_bn_relu").build().eval(), torch.randn(8, 3, 8, 8)
    int8 = quantize(model, calibration=list(x.split(1)))
    assert agreement(model(x), int8(x)) > 0.98
    assert agreement(model(x[:1]), int8(x[:1])) > 0.98


def test_images_of_other_sizes_than_the_calibrated() -> None:
    model = row("conv_bn_relu").build().eval()
    int8 = quantize(model, calibration=[torch.randn(4, 3, 8, 8)])
    x = torch.randn(3, 3, 12, 20)
    assert agreement(model(x), int8(x)) > 0.98


# The argument `flow`, of which one is left.


def test_the_flow_pt2e_is_the_only_one() -> None:
    x = torch.randn(8, 16)
    found = [quantize(row("mlp").build(), calibration=[x], flow=flow) for flow in ("auto", "pt2e")]
    assert_same_state(*(model.state_dict() for model in found))
    assert torch.equal(*(model(x) for model in found))


MAKES = {
    "quantize": lambda flow: quantize(row("mlp").build(), calibration=[torch.zeros(4, 16)], flow=flow),
    "PostTrainingQuantization": lambda flow: PostTrainingQuantization(flow=flow),
    "QuantizationAwareTraining": lambda flow: QuantizationAwareTraining(flow=flow),
}


@pytest.mark.parametrize("make", MAKES)
def test_the_flow_fx_is_refused_with_a_remedy(make: str) -> None:
    with pytest.raises(
        CompressionError, match="`flow` must be 'auto' or 'pt2e'. Received: flow='fx'.* Leave `flow` out"
    ):
        MAKES[make]("fx")
    with pytest.raises(CompressionError, match="`flow` must be 'auto' or 'pt2e'. Received: flow='pt3e'"):
        MAKES[make]("pt3e")


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int8_weight_only"])
@pytest.mark.parametrize("make", [quantize, PostTrainingQuantization], ids=["quantize", "callback"])
def test_a_flow_is_refused_for_schemes_that_work_layer_by_layer(make: Any, scheme: str) -> None:
    arguments = (row("mlp").build(),) if make is quantize else ()
    with pytest.raises(CompressionError, match="`flow` must be 'auto' for a scheme that works layer by layer"):
        make(*arguments, scheme, flow="pt2e")


# Files.

LOAD = """
import sys, torch
from lightning_compress import load_compressed
from tests.support.modules import ZooModule
from tests.support.oracles import snapshot
from tests.support.zoo import row
torch.set_num_threads(1)
found = {}
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
    *[(name, "int8_static") for name in ("conv_bn_relu", "depthwise", "keyword_only", "attention", "lstm")],
    *[("transformer", "int8_dynamic"), ("grouped", "int8_weight_only")],
]


def test_sequences_of_any_length_beside_a_recurrent_layer() -> None:
    model = row("lstm").build().eval()
    batches = [torch.randn(4, length, 8) for length in (5, 9, 3)]
    int8 = quantize(model, calibration=batches).eval()
    for length in (5, 12):
        x = torch.randn(2, length, 8)
        assert agreement(model(x), int8(x)) > 0.99


@pytest.mark.slow
def test_int8_files_load_bit_equal_in_a_fresh_process(tmp_path: Path) -> None:
    # Q23. `load_compressed` reads with weights_only=True.
    expected = {}
    for name, scheme in FILES:
        path, module = tmp_path / f"{name}-{scheme}.ckpt", ZooModule(row(name))
        trainer = quiet_trainer(callbacks=[PostTrainingQuantization(scheme, keep=True)])
        trainer.test(module, verbose=False)
        trainer.save_checkpoint(path)
        args, kwargs = row(name).inputs(7)
        expected[str(path)] = {"state": snapshot(module), "output": module.eval()(*args, **kwargs)}
    run = child(LOAD, str(tmp_path / "found.pt"), *expected)
    assert run.returncode == 0, run.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=False)
    assert found.keys() == expected.keys()
    for path, wanted in expected.items():
        assert_same_state(wanted, found[path])


def test_an_int8_file_is_tested_with_ckpt_path_and_refuses_to_train(tmp_path: Path) -> None:
    module, data, path = Classifier(), TinyData(), tmp_path / "int8.ckpt"
    trainer = quiet_trainer(callbacks=[PostTrainingQuantization(keep=True)])
    expected = trainer.test(module, data, verbose=False)
    trainer.save_checkpoint(path)
    other = quiet_trainer(callbacks=[PostTrainingQuantization()])
    assert other.test(Classifier(), data, ckpt_path=path, weights_only=True, verbose=False) == expected
    loaded = load_compressed(str(path), Classifier())
    assert quiet_trainer().test(loaded, data, verbose=False) == expected
    with pytest.raises(CompressionError, match="`ckpt_path` must be a float or a prepared checkpoint"):
        quiet_trainer(callbacks=[PostTrainingQuantization()]).fit(Classifier(), data, ckpt_path=path, weights_only=True)
