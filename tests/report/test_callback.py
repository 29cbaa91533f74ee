from __future__ import annotations

import copy
import json
import pickle
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_compress.errors import CompressionError
from lightning_compress.report import Comparison, CompressionReport
from lightning_compress.report.rows import Rows
from tests.report.models import CONV_NET_MACS, CONV_NET_PARAMETERS, Classifier, images, int8
from tests.support.modules import quiet_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # A loader of three batches is what these tests want.
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


def trainer(folder: Any, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    return quiet_trainer(**{"default_root_dir": folder, "callbacks": list(callbacks), **settings})


def report(**settings: Any) -> CompressionReport:
    return CompressionReport(**{"batch_sizes": (1, 2), "max_seconds": 0.01, "picture": False, "threads": 1, **settings})


class Convert(L.Callback):
    """Prepares at the first batch and converts when fit ends, as quantization-aware training does."""

    def __init__(self) -> None:
        self.prepared_at: list[str] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            pl_module.net = nn.Sequential(pl_module.net)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.net = int8(pl_module.net[0], images()[0])

    def report_notes(self) -> list[str]:
        return ["norm stayed float [just because]."]


class SwapForTest(L.Callback):
    """Puts an int8 form in when test starts and takes it out at the end, as quantization without training does."""

    def on_test_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        with torch.inference_mode(False):
            self.float_form = pl_module.net
            pl_module.net = int8(copy.deepcopy(pl_module.net), images()[0])

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if stage == "test":
            # Lightning put it into evaluation mode and restores only what it still finds in the module.
            pl_module.net = self.float_form.train()


def rows(folder) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads((folder / "report.json").read_text())["rows"]}


@pytest.mark.parametrize("example", [True, False], ids=["example_input_array", "first batch"])
@pytest.mark.parametrize("first", [True, False], ids=["before the converter", "after the converter"])
@pytest.mark.parametrize("sanity", [0, 1])
def test_before_is_float_and_after_is_converted(tmp_path, capsys, example: bool, first: bool, sanity: int) -> None:
    callbacks = [report(), Convert()] if first else [Convert(), report()]
    trainer(tmp_path, *callbacks, num_sanity_val_steps=sanity).fit(Classifier(example=example))
    found = rows(tmp_path)
    assert list(found) == ["before", "after"]
    before, after = found["before"]["measurement"], found["after"]["measurement"]
    assert {layer["dtype"] for layer in before["layers"]} == {"float32"}
    assert {layer["dtype"] for layer in after["layers"]} == {"qint8"}
    assert before["parameters"] == CONV_NET_PARAMETERS
    assert before["macs"] == after["macs"] == CONV_NET_MACS
    assert [len(one["latency"]) for one in (before, after)] == [2, 2]
    assert [layer["name"] for layer in before["layers"]] == ["net.conv", "net.norm", "net.depthwise", "net.head"]
    assert set(found["after"]["metrics"]) == {"train_loss", "train_loss_epoch", "val_acc"}
    printed = capsys.readouterr().out
    assert printed.count("Compression report") == 1
    assert "norm stayed float [just because]." in printed
    assert f"Report: {tmp_path} (report.html, report.json, report.md, report.csv)" in printed
    assert "norm stayed float" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("example", [True, False])
def test_training_is_bit_identical_with_and_without(tmp_path, example: bool) -> None:
    states: list[dict[str, Tensor]] = []
    randoms: list[Tensor] = []
    for callbacks in ([], [report()]):
        model = Classifier(example=example)
        torch.manual_seed(5)
        trainer(tmp_path, *callbacks, max_epochs=2).fit(model)
        states.append(model.state_dict())
        randoms.append(torch.get_rng_state())
    assert torch.equal(*randoms)
    assert list(states[0]) == list(states[1])
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name]), name
    assert not torch.equal(states[0]["net.conv.weight"], Classifier().net.conv.weight), "something was trained"


def test_no_hook_or_attribute_is_left(tmp_path) -> None:
    def traces(model: nn.Module) -> dict[str, Any]:
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
        return {
            name: (set(vars(module)), [len(getattr(module, one)) for one in hooks])
            for name, module in model.named_modules()
        }

    plain, reported = Classifier(), Classifier()
    trainer(tmp_path).fit(plain)
    trainer(tmp_path, report()).fit(reported)
    assert traces(plain) == traces(reported)


def test_test_metrics_join_the_row_that_was_tested(tmp_path) -> None:
    callback = report()
    model, run = Classifier(), trainer(tmp_path, callback, Convert())
    run.fit(model)
    tested = run.test(model, verbose=False)[0]["test_acc"]
    found = rows(tmp_path)
    assert list(found) == ["before", "after"]
    assert found["after"]["metrics"]["test_acc"] == pytest.approx(tested)
    assert found["before"]["metrics"] == {}
    assert "test_acc" in (tmp_path / "report.md").read_text()
    assert callback.comparison is not None and callback.comparison["after"].metrics["test_acc"] == pytest.approx(tested)


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_a_form_made_for_the_test_is_compared_with_the_float_one(tmp_path, example: bool, first: bool) -> None:
    callbacks = [report(), SwapForTest()] if first else [SwapForTest(), report()]
    model = Classifier(example=example)
    trainer(tmp_path, *callbacks).test(model, verbose=False)
    found = rows(tmp_path)
    assert list(found) == ["before", "after"]
    assert {layer["dtype"] for layer in found["before"]["measurement"]["layers"]} == {"float32"}
    assert {layer["dtype"] for layer in found["after"]["measurement"]["layers"]} == {"qint8"}
    assert found["before"]["measurement"]["macs"] == found["after"]["measurement"]["macs"] == CONV_NET_MACS
    assert found["before"]["metrics"] == {} and set(found["after"]["metrics"]) == {"test_acc"}


def test_a_form_made_for_the_test_after_fit_is_a_third_row(tmp_path) -> None:
    model, run = Classifier(), trainer(tmp_path, SwapForTest(), report())
    run.fit(model)
    run.test(model, verbose=False)
    found = rows(tmp_path)
    assert list(found) == ["before", "after", "tested"]
    assert {layer["dtype"] for layer in found["tested"]["measurement"]["layers"]} == {"qint8"}
    assert "test_acc" in found["tested"]["metrics"] and "test_acc" not in found["after"]["metrics"]
    trainer(tmp_path, report()).fit(model)


def test_a_plain_test_has_one_row(tmp_path) -> None:
    trainer(tmp_path, report()).test(Classifier(), verbose=False)
    assert {name: set(row["metrics"]) for name, row in rows(tmp_path).items()} == {"before": {"test_acc"}}


def test_another_model_starts_a_new_report(tmp_path) -> None:
    run = trainer(tmp_path, report())
    run.fit(Classifier())
    run.test(Classifier(), verbose=False)
    assert list(rows(tmp_path)) == ["before"]


def test_fit_twice_starts_from_what_the_first_left(tmp_path) -> None:
    callback, model = report(), Classifier()
    trainer(tmp_path, callback).fit(model)
    with torch.no_grad():
        model.net.conv.weight.zero_()
    trainer(tmp_path, callback, max_epochs=1).fit(model)
    before = rows(tmp_path)["before"]["measurement"]
    assert before["parameters"] - before["nonzeros"] >= model.net.conv.weight.numel()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_nothing_behind(tmp_path, error: type[BaseException]) -> None:
    class Fails(L.Callback):
        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            raise error("boom")

    callback = report()
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        trainer(tmp_path, callback, Fails()).fit(Classifier())
    assert callback._rows == Rows((1, 2), 0.01, 1)
    assert (callback._waiting, callback._measured, callback._evaluations) == (None, None, [])
    assert not (tmp_path / "report.json").exists()
    trainer(tmp_path, callback).fit(Classifier())
    assert list(rows(tmp_path)) == ["before", "after"]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_forward_that_cannot_run_alone_is_noted(tmp_path) -> None:
    class Needy(Classifier):
        def forward(self, image: Tensor, table: Tensor | None = None) -> Tensor:
            assert table is not None, "a table\nis needed"
            return super().forward(image) + table

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None: ...

        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    trainer(tmp_path, report()).fit(Needy())
    for name in ("before", "after"):
        row = rows(tmp_path)[name]["measurement"]
        assert (row["parameters"], row["macs"], row["latency"]) == (CONV_NET_PARAMETERS, None, [])
        assert (
            f"- {name}: no MACs and no latency, there are no example inputs: The module must run one batch. Received: "
            "`validation_step`: it calls no layer; `test_step`: AssertionError: a table; `training_step`: it calls no "
            "layer; `forward`: AssertionError: a table. Set `example_input_array`"
        ) in (tmp_path / "report.md").read_text()


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_batch_that_does_not_bind_is_noted(tmp_path) -> None:
    class Pair(Classifier):
        def forward(self, image: Tensor, table: Tensor) -> Tensor:
            return super().forward(image) + table

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None: ...

        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    trainer(tmp_path, report()).fit(Pair())
    assert "The batch must bind to Pair.forward" in (tmp_path / "report.md").read_text()
    assert rows(tmp_path)["after"]["measurement"]["parameters"] == CONV_NET_PARAMETERS


def test_without_a_batch_the_model_is_still_weighed(tmp_path) -> None:
    callback = report()
    trainer(tmp_path, callback, limit_train_batches=0).fit(Classifier())
    assert callback._waiting is None
    assert rows(tmp_path)["before"]["measurement"]["parameters"] == CONV_NET_PARAMETERS
    assert "no batch was seen" in (tmp_path / "report.md").read_text()


def test_before_is_counted_before_anything_is_pruned(tmp_path) -> None:
    class Prunes(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            with torch.no_grad():
                pl_module.net.conv.weight.zero_()

    trainer(tmp_path, report(), Prunes()).fit(Classifier())
    before = rows(tmp_path)["before"]["measurement"]
    assert before["nonzeros"] > CONV_NET_PARAMETERS - 8 * 27
    assert before["threads"] == 1 and len(before["latency"]) == 2


def test_dict_batches_are_bound_by_name(tmp_path) -> None:
    class Keywords(Classifier):
        def forward(self, *, image: Tensor) -> Tensor:
            return self.net(image)

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(image=batch["image"]), batch["label"])

        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

        def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
            pixels, labels = images()
            return DataLoader([{"image": x, "label": y} for x, y in zip(pixels, labels, strict=True)], batch_size=8)

    trainer(tmp_path, report()).fit(Keywords())
    assert rows(tmp_path)["after"]["measurement"]["macs"] == CONV_NET_MACS


@pytest.mark.parametrize("make", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_a_copy_taken_in_mid_training_works_and_holds_no_model(tmp_path, make) -> None:
    class Copies(L.Callback):
        def on_train_start(self, *args: Any, **kwargs: Any) -> None:
            assert callback._waiting is not None, "the model is held until the first batch"
            self.copy = make(callback)

    callback, copies = report(), Copies()
    trainer(tmp_path, callback, copies).fit(Classifier())
    assert (copies.copy._rows.inputs, copies.copy._rows.models, copies.copy._waiting) == (None, {}, None)
    assert copies.copy._measured is None
    assert "log" in vars(callback), "Lightning lends it the module's method"
    assert not {"log", "log_dict"} & (vars(copies.copy).keys() | vars(make(callback)).keys())
    trainer(tmp_path / "copy", copies.copy).fit(Classifier())
    assert list(rows(tmp_path / "copy")) == ["before", "after"]


def test_directory_and_picture(tmp_path, capsys) -> None:
    trainer(tmp_path, report(directory=str(tmp_path / "new" / "here"), picture=True)).fit(Classifier())
    written = sorted(path.name for path in (tmp_path / "new" / "here").iterdir())
    assert written == [f"report.{kind}" for kind in ("csv", "html", "json", "md", "png")]
    assert not (tmp_path / "report.json").exists()
    assert Comparison.from_json((tmp_path / "new" / "here" / "report.json").read_text()).baseline == "before"
    assert "(report.html, report.json, report.md, report.csv, report.png)" in capsys.readouterr().out


def test_a_missing_matplotlib_is_a_note(tmp_path, monkeypatch) -> None:
    found = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "matplotlib" else found(name, *rest)
    )
    trainer(tmp_path, report(picture=True)).fit(Classifier())
    assert 'pip install "lightning_compress[plots]"' in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "report.png").exists()


def test_other_ranks_measure_and_write_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(L.Trainer, "is_global_zero", False)
    callback = report()
    run = trainer(tmp_path, callback)
    run.fit(Classifier())
    run.test(Classifier(), verbose=False)
    assert not list(tmp_path.iterdir())
    assert (callback._rows.measurements, callback._waiting, callback.comparison) == ({}, None, None)


def test_a_tensor_that_the_step_changes_in_place_is_not_ours(tmp_path) -> None:
    class InPlace(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step([batch[0].clone(), batch[1]], batch_idx)
            batch[0].fill_(torch.nan)
            return loss

    seen: list[Tensor] = []

    class Looks(L.Callback):
        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            seen.append(callback._rows.inputs[0][0][0])

    callback = report()
    trainer(tmp_path, callback, Looks(), num_sanity_val_steps=0, limit_train_batches=1).fit(InPlace())
    assert torch.equal(seen[0], images()[0][:2])


@pytest.mark.parametrize("settings", [{"batch_sizes": (0,)}, {"max_seconds": -1.0}, {"threads": 0}])
def test_bad_settings_fail_in_the_constructor(settings) -> None:
    with pytest.raises(CompressionError, match=rf"`{next(iter(settings))}` must"):
        CompressionReport(**settings)


class Parts(L.LightningModule):
    """An encoder and a decoder, without a `forward`: Lightning's autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(8, 3), nn.Linear(3, 8)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].flatten(1)
        return nn.functional.mse_loss(self.decoder(self.encoder(x)), x)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Flattens(Parts):
    def forward(self, x: Tensor, *, scale: float) -> Tensor:
        return self.decoder(self.encoder(x)) * scale

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0].flatten(1), scale=2.0).square().mean()


class Named(NamedTuple):
    features: Tensor
    lengths: Tensor


class OfNamed(Parts):
    def forward(self, source: Tensor, lengths: Tensor) -> Tensor:
        return self.decoder(self.encoder(source)) / lengths[:, None]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch.features.flatten(1), batch.lengths).square().mean()


class Manual(Parts):
    """Two optimizers that it steps by itself, and a scheduler."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def forward(self, noise: Tensor) -> Tensor:
        raise AssertionError("not what a batch is for")

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        self.manual_backward(super().training_step(batch, batch_idx))
        first.step()
        self.untoggle_optimizer(first)
        second.step()
        self.lr_schedulers().step()
        first.zero_grad()

    def configure_optimizers(self) -> Any:
        pair = [torch.optim.Adam(part.parameters()) for part in (self.encoder, self.decoder)]
        return pair, [torch.optim.lr_scheduler.StepLR(pair[0], 1, 0.5)]


@pytest.mark.parametrize("kind", [Parts, Flattens, OfNamed, Manual])
def test_what_a_step_calls_is_measured_and_nothing_changes(kind: type[Parts], tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 2, 4)
    batches = [Named(x, torch.ones(8)) if kind is OfNamed else [x]] * 3
    plain, module = (copy.deepcopy(built) for built in [kind()] * 2)
    if kind is not Manual:
        module.example_input_array = torch.zeros(1, 99)  # which nothing would run on
    for one, callbacks in ((plain, []), (module, [report()])):
        trainer(tmp_path, *callbacks).fit(one, torch.utils.data.DataLoader(batches, batch_size=None))
    for row in rows(tmp_path).values():
        assert row["measurement"]["macs"] == 2 * 8 * 3
        assert [entry["batch_size"] for entry in row["measurement"]["latency"]] == [1, 2]
    for name, value in plain.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name
