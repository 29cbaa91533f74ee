"""Checkpoints of `QLoRA`: the 4-bit base once, adapters beside it, and everything comes back from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn

from lightning_compress import (
    CompressionError,
    QLoRA,
    QuantizationAwareTraining,
    Targets,
    load_compressed,
    merge_adapters,
    save_compressed,
)
from lightning_compress.cli import main
from tests.quantization.lora.files import AVERAGES, fit
from tests.quantization.lora.fits import BOTH, At, Net, adapted_layers, adapters, mlp
from tests.support.data import TinyData
from tests.support.fits import PARTS, read_checkpoint
from tests.support.modules import Classifier, ZooModule, quiet_trainer
from tests.support.oracles import assert_different_state, assert_same_state, differing, flatten, snapshot
from tests.support.zoo import row

pytestmark = [
    # Checkpoints are read by another ModelCheckpoint, in another folder, than the one that wrote them.
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning"),
]


COPIES = AVERAGES | {"stochastic": lambda: [StochasticWeightAveraging(0.01, swa_epoch_start=1)]}


def every_tensor(tree: Any) -> dict[str, Tensor]:
    return {name: leaf for name, leaf in flatten(tree).items() if isinstance(leaf, Tensor)}


# What a file holds.


@pytest.mark.parametrize("weights_only", [False, True], ids=["whole", "weights only"])
def test_a_file_holds_codes_under_the_users_keys_and_scales_and_adapters_beside_them(
    weights_only: bool, tmp_path: Path
) -> None:
    _, module = fit(QLoRA(rank=2), folder=tmp_path, save_weights_only=weights_only)
    checkpoint = read_checkpoint(tmp_path / "epoch=2.ckpt")
    user, state, [layer] = Classifier().state_dict(), checkpoint["state_dict"], adapted_layers(module).values()
    beside = {f"body.weight_scale_{name}" for name in ("codes", "offset", "step")}
    assert state.keys() == user.keys() | BOTH | beside
    for key in user.keys() - {"body.weight"}:
        assert (state[key].dtype, state[key].shape) == (user[key].dtype, user[key].shape)
    assert (state["body.weight"].dtype, state["body.weight"].shape) == (torch.uint8, (32, 16 // 2))
    for name in ("lora_A", "lora_B"):
        assert torch.equal(state[f"body.{name}"], getattr(layer, name))
    assert not every_tensor(checkpoint["lightning_compress"])
    assert not [
        name
        for name, value in every_tensor(checkpoint).items()
        if value.is_floating_point() and value.shape in ((32, 16), (16, 32))
    ]
    if not weights_only:
        [state] = checkpoint["optimizer_states"]
        assert len(state["state"]) == 2 and [len(group["params"]) for group in state["param_groups"]] == [2]


class Wide(Net):
    def __init__(self, plain_lr: float = 0.05) -> None:
        super().__init__(mlp(256, 256, 4), plain_lr)


def storages(tree: Any) -> int:
    """Bytes of all the storages that a file's tensors stand in, each once."""
    found = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in every_tensor(tree).values()
    }
    return sum(found.values())


@pytest.mark.parametrize("others", COPIES)
@pytest.mark.parametrize("weights_only", [False, True], ids=["whole", "weights only"])
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step", "ignore:Swapping scheduler")
def test_the_base_is_on_disk_once(others: str, weights_only: bool, tmp_path: Path) -> None:
    fit(QLoRA(rank=2), *COPIES[others](), folder=tmp_path, module=Wide(), save_weights_only=weights_only, max_epochs=2)
    path = tmp_path / "epoch=1.ckpt"
    # In bits: 4 for a weight and 8 for each 64 of them, in both layers; float for the rest.
    base = (256 * 256 + 256 * 16) // 2 + 256 * (256 // 64) + 256
    small = 4 * (2 * (16 + 256 + 256 + 256) + 256 + 256 + 256 * 4 + 4)
    for size in (storages(read_checkpoint(path)), path.stat().st_size):
        # Adapters up to four times: current, average, momentum; a file has 16 kB of names and padding.
        assert base + small <= size <= 1.05 * base + 4 * small + 16000
    codes = [
        value
        for value in every_tensor(read_checkpoint(path)).values()
        if value.dtype == torch.uint8 and value.numel() > 2048
    ]
    assert codes and len({value.data_ptr() for value in codes}) == len({value.numel() for value in codes})


def test_the_file_is_a_fraction_of_the_float_one(tmp_path: Path) -> None:
    fit(QLoRA(rank=2), folder=tmp_path / "ours", module=Wide(), max_epochs=1, save_weights_only=True)
    fit(folder=tmp_path / "plain", module=Wide(), max_epochs=1, save_weights_only=True)
    ours, plain = (Path(tmp_path / name / "epoch=0.ckpt").stat().st_size for name in ("ours", "plain"))
    assert ours < 0.3 * plain


def test_state_dicts_of_the_live_module_are_not_changed_by_a_save(tmp_path: Path) -> None:
    _, module = fit(QLoRA(rank=2))
    keys = list(module.state_dict())
    module.trainer.save_checkpoint(tmp_path / "a.ckpt")
    module.trainer.save_checkpoint(tmp_path / "b.ckpt")
    assert list(module.state_dict()) == keys
    a, b = read_checkpoint(tmp_path / "a.ckpt"), read_checkpoint(tmp_path / "b.ckpt")
    for part in PARTS:
        assert_same_state(a.get(part, {}), b.get(part, {}))


@pytest.mark.parametrize("name", ["mlp", "transformer", "tied", "shared"])
def test_over_the_zoo_a_file_brings_everything_back(name: str, tmp_path: Path) -> None:
    module = ZooModule(row(name))
    trainer = quiet_trainer(callbacks=[QLoRA(rank=2)])
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    loaded = load_compressed(tmp_path / "end.ckpt", ZooModule(row(name)))
    assert_same_state(module, loaded)
    args, kwargs = row(name).inputs(3)
    assert_same_state(module.eval()(*args, **kwargs), loaded.eval()(*args, **kwargs))
    assert {n: p.requires_grad for n, p in module.named_parameters()} == {
        n: p.requires_grad for n, p in loaded.named_parameters()
    }
    assert_same_state(merge_adapters(module), merge_adapters(loaded))
    quiet_trainer(callbacks=[QLoRA(rank=2)]).fit(loaded.train())


# Loading.


def test_load_compressed_and_training_goes_on(tmp_path: Path) -> None:
    _, module = fit(QLoRA(rank=2, modules_to_train=["head"]), folder=tmp_path)
    loaded = load_compressed(tmp_path / "epoch=2.ckpt", Classifier())
    assert_same_state(module, loaded)
    start: dict[str, Any] = {}
    trainable: list[str] = []
    note = At(
        on_train_start=lambda t, m: (
            start.update(snapshot(m)),
            trainable.extend(n for n, p in m.named_parameters() if p.requires_grad),
        )
    )
    fit(QLoRA(rank=2, modules_to_train=["head"]), note, folder=tmp_path / "again", module=loaded)
    assert_same_state(snapshot(module), start)
    assert set(trainable) == {f"body.lora_{name}" for name in "AB"} | {"head.weight", "head.bias"}
    assert_different_state(adapters(module), adapters(loaded))
    again = load_compressed(tmp_path / "again" / "epoch=2.ckpt", Classifier())
    assert_same_state(loaded, again)
    [layer], [base] = adapted_layers(module).values(), adapted_layers(again).values()
    assert torch.equal(layer.weight(), base.weight())


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("weights_only", [False, True], ids=["whole", "weights only"])
def test_a_file_is_evaluated_as_it_was_trained(stage: str, weights_only: bool, tmp_path: Path) -> None:
    module, data = fit(QLoRA(rank=2), folder=tmp_path, save_weights_only=weights_only)[1], TinyData()
    options = {} if stage == "predict" else {"verbose": False}
    expected = getattr(quiet_trainer(), stage)(module, data, **options)
    fresh = Classifier()
    # Whatever the callback's own settings are: the file has its own.
    trainer = quiet_trainer(callbacks=[QLoRA(rank=5)])
    got = getattr(trainer, stage)(fresh, data, ckpt_path=tmp_path / "epoch=2.ckpt", weights_only=True, **options)
    assert_same_state(expected, got)
    assert_same_state(module, fresh)
    # A second file, and the first again.
    other = getattr(trainer, stage)(fresh, data, ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True, **options)
    assert_different_state(expected, other)
    got = getattr(trainer, stage)(fresh, data, ckpt_path=tmp_path / "epoch=2.ckpt", weights_only=True, **options)
    assert_same_state(expected, got)


def test_the_best_and_the_last_after_a_fit(tmp_path: Path) -> None:
    module, data, qlora = Classifier(), TinyData(), QLoRA(rank=2)
    best = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="val_loss", save_top_k=1, save_last=True)
    trainer = quiet_trainer(max_epochs=3, enable_checkpointing=True, callbacks=[qlora, best])
    trainer.fit(module, data)
    score = float(best.best_model_score)
    metrics = trainer.validate(module, data, ckpt_path="best", verbose=False, weights_only=True)
    assert metrics[0]["val_loss"] == pytest.approx(score, rel=1e-6)
    for stage, options in (("test", {"verbose": False}), ("predict", {})):
        for path in ("best", "last"):
            getattr(trainer, stage)(module, data, ckpt_path=path, weights_only=True, **options)
            assert list(adapted_layers(module)) == ["body"]
    merged = qlora.merge()
    assert list(merged.state_dict()) == list(Classifier().state_dict())
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module.train(), data)
    assert list(adapted_layers(module)) == ["body"]


def test_a_file_without_us_names_what_is_in_4_bits(tmp_path: Path) -> None:
    # The one exception to the float keys of promise 9: torch's own strict load says so.
    fit(QLoRA(rank=2), folder=tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch for body.weight"):
        Classifier.load_from_checkpoint(tmp_path / "epoch=2.ckpt", weights_only=True)
    with pytest.raises(RuntimeError, match="size mismatch for body.weight"):
        quiet_trainer().test(Classifier(), TinyData(), ckpt_path=tmp_path / "epoch=2.ckpt", weights_only=True)


def test_save_compressed_of_a_plain_module_with_adapters(tmp_path: Path) -> None:
    _, module = fit(QLoRA(rank=2))
    save_compressed(module, tmp_path / "adapted.ckpt")
    again = load_compressed(tmp_path / "adapted.ckpt", Classifier())
    assert_same_state(module, again)


def test_a_merged_module_saves_like_a_plain_one(tmp_path: Path) -> None:
    _, module = fit(QLoRA(rank=2))
    merged = merge_adapters(module)
    torch.save(merged.state_dict(), tmp_path / "state.pt")
    Classifier().load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    save_compressed(merged, tmp_path / "merged.ckpt")
    assert_same_state(merged, load_compressed(tmp_path / "merged.ckpt", Classifier()))
    fit(folder=tmp_path, module=merged, max_epochs=1)
    checkpoint = read_checkpoint(tmp_path / "epoch=0.ckpt")
    assert list(checkpoint["state_dict"]) == list(Classifier().state_dict())
    assert "lightning_compress" not in checkpoint
    Classifier.load_from_checkpoint(tmp_path / "epoch=0.ckpt", weights_only=True)


def test_loading_into_a_module_that_has_adapters_already(tmp_path: Path) -> None:
    _, first = fit(QLoRA(rank=2), folder=tmp_path / "first")
    _, second = fit(QLoRA(rank=4, targets=Targets(include=["head"])), folder=tmp_path / "second", module=Classifier())
    load_compressed(tmp_path / "first" / "epoch=2.ckpt", second)
    assert_same_state(first, second)
    assert list(adapted_layers(second)) == ["body"]
    _, plain = fit(folder=tmp_path / "plain")
    load_compressed(tmp_path / "plain" / "epoch=2.ckpt", second)
    assert_same_state(plain, second)
    assert all(parameter.requires_grad for parameter in second.parameters())


# What doesn't fit.


@pytest.mark.parametrize("kind", ["float", "float weights only", "prepared"])
def test_a_checkpoint_without_adapters_is_refused_with_the_remedy(kind: str, tmp_path: Path) -> None:
    others = [QuantizationAwareTraining()] if kind == "prepared" else []
    fit(*others, folder=tmp_path, max_epochs=1, save_weights_only="weights" in kind)
    module = Classifier()
    with pytest.raises(CompressionError, match="`ckpt_path` must.*QLoRA.*[Ll]oad its weights"):
        fit(QLoRA(rank=2), module=module, ckpt_path=tmp_path / "epoch=0.ckpt")
    # The remedy.
    plain = load_compressed(tmp_path / "epoch=0.ckpt", Classifier())
    if kind != "prepared":
        fit(QLoRA(rank=2), module=plain)


def test_a_float_checkpoint_that_was_refused_leaves_a_module_that_trains(tmp_path: Path) -> None:
    fit(folder=tmp_path, max_epochs=1)
    module = Classifier()
    before = snapshot(module)
    with pytest.raises(CompressionError, match="`ckpt_path`"):
        fit(QLoRA(rank=2), module=module, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert list(module.state_dict()) == list(Classifier().state_dict())
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert_same_state(before, snapshot(module))


@pytest.mark.parametrize(
    "other",
    [{"rank": 3}, {"alpha": 3.0}, {"targets": Targets(include=["head"])}, {"modules_to_train": ["head"]}],
    ids=lambda other: next(iter(other)),
)
def test_resuming_with_other_settings_says_so(other: dict[str, Any], tmp_path: Path) -> None:
    # As a second fit in memory is refused, and as the other callbacks warn.
    fit(QLoRA(rank=2), folder=tmp_path, max_epochs=1)
    with pytest.raises((CompressionError, UserWarning), match="other settings|of the same kind|merge_adapters"):
        fit(QLoRA(**{"rank": 2, **other}), ckpt_path=tmp_path / "epoch=0.ckpt")


@pytest.mark.parametrize("way", ["load_compressed", "fit", "test"])
@pytest.mark.parametrize(
    "content", ["other model", "body.lora_B", "body.weight", "body.weight_scale_step", "head.weight", "newer", "text"]
)
def test_a_load_that_fails_leaves_the_module_as_it_was(way: str, content: str, tmp_path: Path) -> None:
    fit(QLoRA(rank=2), folder=tmp_path, max_epochs=1)
    path, module = tmp_path / "epoch=0.ckpt", Classifier()
    checkpoint = read_checkpoint(path)
    entry = checkpoint["lightning_compress"]
    if content == "other model":
        module = Classifier(hidden=40)
    elif content == "newer":
        entry["version"] = 2
    elif content != "text":
        del checkpoint["state_dict"][content]  # a key
    torch.save(checkpoint, path)
    if content == "text":
        path.write_text("nothing")
    before, had = snapshot(module), set(vars(module))
    if way == "load_compressed":
        with pytest.raises(CompressionError, match="`path`|version"):
            load_compressed(path, module)
        assert set(vars(module)) == had
    else:
        trainer = quiet_trainer(callbacks=[QLoRA(rank=2)])
        options = {} if way == "fit" else {"verbose": False}
        with pytest.raises(Exception) as caught:
            getattr(trainer, way)(module, TinyData(), ckpt_path=path, weights_only=True, **options)
        assert not isinstance(caught.value, (AttributeError, AssertionError, KeyError, IndexError))
    if way == "fit":
        return  # adapted before the file is read: the float weights are in 4 bits
    assert_same_state(before, snapshot(module))


@pytest.mark.parametrize("kind", ["targets", "rank", "columns"])
def test_a_file_whose_layers_differ_is_an_error(kind: str, tmp_path: Path) -> None:
    fit(QLoRA(rank=2), folder=tmp_path, max_epochs=1, module=Net(mlp(24, 4)))
    other: nn.Module
    if kind == "targets":
        other = Net(nn.Sequential(nn.Conv1d(1, 1, 1), nn.GELU(), nn.Linear(24, 4)))
    elif kind == "rank":
        other = Net(mlp(25, 4))
    else:
        # 15 and 16 columns take the same bytes.
        other = Net(nn.Sequential(nn.Linear(15, 24), nn.GELU(), nn.Linear(24, 4)))
    before = snapshot(other)
    with pytest.raises(CompressionError, match="`path`"):
        load_compressed(tmp_path / "epoch=0.ckpt", other)
    assert_same_state(before, snapshot(other))


def test_a_prepared_or_quantizing_callback_on_a_file_of_adapters_says_what_to_do(tmp_path: Path) -> None:
    fit(QLoRA(rank=2), folder=tmp_path, max_epochs=1)
    with pytest.raises(CompressionError, match="merge"):
        fit(QuantizationAwareTraining(), ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=2)


# YAML.


def test_from_yaml_and_back_and_evaluated_by_the_same_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    callbacks = [
        {
            "class_path": "lightning_compress.QLoRA",
            "init_args": {
                "rank": 2,
                "alpha": 4.0,
                "targets": {"include": ["b*"], "exclude": ["head"], "types": ["torch.nn.Linear"]},
                "dropout": 0.1,
                "modules_to_train": ["head"],
            },
        },
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"dirpath": str(tmp_path), "filename": "end"},
        },
    ]
    config = {
        "model": {"class_path": "tests.support.modules.Classifier"},
        "data": {"class_path": "tests.support.data.TinyData"},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "callbacks": callbacks, **quiet},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(tmp_path / "config.yaml"), "--print_config"])
    printed = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(printed)
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(tmp_path / "again.yaml"), "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(printed)
    main(["fit", "--config", str(tmp_path / "again.yaml")])
    loaded = load_compressed(tmp_path / "end.ckpt", Classifier())
    [layer] = adapted_layers(loaded).values()
    assert (len(layer.lora_A), layer.scaling, layer.dropout) == (2, 2.0, 0.1)
    assert loaded.head.weight.requires_grad and not loaded.norm.weight.requires_grad
    # The `fit` section of a config is not for `test`: the same callbacks, without its data's own options.
    main(["test", "--config", str(tmp_path / "config.yaml"), "--ckpt_path", str(tmp_path / "end.ckpt")])


def test_the_callbacks_state_is_plain() -> None:
    state = QLoRA(rank=2).state_dict()
    assert not differing(state, {"version": state["version"]})
    with pytest.raises(CompressionError, match="must have version"):
        QLoRA(rank=2).load_state_dict({"version": 99})
