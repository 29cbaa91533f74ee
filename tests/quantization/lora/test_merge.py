"""A plain module from one with adapters."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from lightning_compress import (
    CompressionError,
    QLoRA,
    QuantizationAwareTraining,
    ScheduledPruning,
    WeightOnly,
    merge_adapters,
    quantize,
)
from tests.quantization.layers.packed_cases import storages
from tests.quantization.lora.fits import Net, adapted_layers, adapters, fit, mlp
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import (
    assert_different_state,
    assert_same_state,
    snapshot,
)

# merge.


def test_merge_gives_the_plain_module_and_leaves_the_other() -> None:
    module = Net(mlp(24, 20, 4))
    plain_keys = list(module.state_dict())
    names = [name for name, _ in module.named_parameters()]
    attributes = {path: set(vars(inner)) for path, inner in Net(mlp(24, 20, 4)).named_modules()}
    qlora = QLoRA(rank=3, alpha=2.0)
    fit(qlora, module=module)
    before, was = snapshot(module), adapted_layers(module)
    for merged in (qlora.merge(), merge_adapters(module)):
        assert type(merged) is Net and merged is not module
        assert list(merged.state_dict()) == plain_keys
        assert [name for name, _ in merged.named_parameters()] == names
        assert all(parameter.requires_grad and parameter.is_leaf for parameter in merged.parameters())
        assert all(isinstance(parameter, nn.Parameter) for parameter in merged.parameters())
        ours = {path: set(vars(inner)) for path, inner in merged.named_modules()}
        lightnings = {"_trainer", "_current_fx_name", "_metric_attributes", "_param_requires_grad_state", "_hparams"}
        lightnings |= {f"{stage}_dataloader" for stage in ("train", "val", "test", "predict")}
        assert {path: names - lightnings for path, names in ours.items()} == {
            path: names - lightnings for path, names in attributes.items()
        }
        for path, layer in adapted_layers(module).items():
            expected = layer.weight() + (2.0 / 3) * layer.lora_B @ layer.lora_A
            torch.testing.assert_close(merged.get_submodule(path).weight, expected, rtol=1e-5, atol=1e-6)
        x = torch.randn(8, 16)
        with torch.no_grad():
            torch.testing.assert_close(merged.eval()(x), module.eval()(x), rtol=1e-5, atol=1e-5)
        Net(mlp(24, 20, 4)).load_state_dict(merged.state_dict(), strict=True)
        shared = {p.data_ptr() for p in merged.parameters()} & {p.data_ptr() for p in module.parameters()}
        assert not shared
        with torch.no_grad():
            for parameter in merged.parameters():
                parameter.add_(1.0)
    assert_same_state(before, snapshot(module))
    assert adapted_layers(module).keys() == was.keys()


def test_what_was_merged_trains_saves_and_quantizes_like_any_module(tmp_path: Any) -> None:
    qlora = QLoRA(rank=2)
    fit(qlora)
    merged = qlora.merge()
    trainer, _ = fit(ScheduledPruning(sparsity=0.5), module=merged)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    checkpoint = torch.load(tmp_path / "plain.ckpt", weights_only=True)
    assert "quantization" not in checkpoint.get("lightning_compress", {})
    Classifier.load_from_checkpoint(tmp_path / "plain.ckpt", weights_only=True)
    quiet_trainer(callbacks=[QuantizationAwareTraining(WeightOnly(4, 16))]).fit(qlora.merge(), TinyData())
    quantize(qlora.merge(), "int8_dynamic")
    pickle.loads(pickle.dumps(qlora.merge()))
    fit(QLoRA(rank=4), module=qlora.merge())


def test_merge_needs_a_fit_and_adapters() -> None:
    with pytest.raises(CompressionError, match="`merge` must come after a fit"):
        QLoRA().merge()
    with pytest.raises(CompressionError, match="`model` must have adapters.*float.*QLoRA"):
        merge_adapters(Classifier())
    with pytest.raises(CompressionError, match="`model` must have adapters.*converted"):
        merge_adapters(quantize(Classifier(), "nf4"))
    qlora = QLoRA()
    module = Classifier()
    fit(qlora, module=module)
    trainer_free = weakref.ref(module)
    del module
    gc.collect()
    if trainer_free() is None:
        with pytest.raises(CompressionError, match="`merge` must come after a fit"):
            qlora.merge()


def test_merge_after_evaluation_alone_says_what_is_missing() -> None:
    module, qlora = Classifier(), QLoRA()
    quiet_trainer(callbacks=[qlora]).test(module, TinyData(), verbose=False)
    with pytest.raises(CompressionError, match="adapters|fit"):
        qlora.merge()


def test_copies_and_pickles_of_an_adapted_module() -> None:
    qlora = QLoRA(rank=2)
    _, module = fit(qlora)
    x = torch.randn(4, 16)
    before = snapshot(module)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same_state(snapshot(module), snapshot(twin))
        assert torch.equal(module.eval()(x), twin.eval()(x))
        assert storages(module).isdisjoint(storages(twin))
        fit(QLoRA(rank=2), module=twin.train())
        assert_different_state(adapters(module), adapters(twin))
        assert_same_state(before, snapshot(module))
        torch.testing.assert_close(merge_adapters(twin).eval()(x), twin.eval()(x), rtol=1e-5, atol=1e-5)
    for callback in (copy.deepcopy(qlora), pickle.loads(pickle.dumps(qlora))):
        assert callback.state_key == qlora.state_key
        fit(callback)
