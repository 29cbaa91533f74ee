"""`hyperparameters`: a module that holds its network among its hyperparameters, as the most used template does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_compress import (
    ChannelPruning,
    CompressionError,
    Distillation,
    FeatureMSE,
    PostTrainingQuantization,
    QLoRA,
    QuantizationAwareTraining,
    ScheduledPruning,
    SoftTarget,
    load_compressed,
)
from tests.support.data import TinyData
from tests.support.fits import fit, read_checkpoint, resume
from tests.support.modules import quiet_trainer
from tests.support.oracles import assert_same_state
from tests.support.template import SGD, LitTemplate, Net, lit_template

pytestmark = pytest.mark.filterwarnings(
    "ignore:Attribute '.*' is an instance of `nn.Module`",
    "ignore:.*reads weights and plain data alone",
    "ignore:The dirpath has changed",
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:.*accuracy is near chance",
)
FOREIGN = ("lightning_compress", "torch.ao", "torch.fx", "torchao")


def distillation() -> Distillation:
    torch.manual_seed(7)
    teacher = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 4))
    return Distillation(teacher, [SoftTarget(), FeatureMSE("net.body", "1")], task_weight=0.5)


CALLBACKS: dict[str, Callable[[], Callback]] = {
    "pruning": lambda: ScheduledPruning(sparsity=0.7),
    "channels": lambda: ChannelPruning(macs=0.5, round_to=1),
    "qat": lambda: QuantizationAwareTraining(),
    "qat without conversion": lambda: QuantizationAwareTraining(convert=False),
    "qat in 4 bits": lambda: QuantizationAwareTraining("int4_weight_only"),
    "ptq static": lambda: PostTrainingQuantization(keep=True),
    "ptq dynamic": lambda: PostTrainingQuantization("int8_dynamic", keep=True),
    "qlora": lambda: QLoRA(rank=2),
    "distillation": distillation,
}
every_callback = pytest.mark.parametrize("name", CALLBACKS)


def run(name: str, **files: Any) -> tuple[Any, LitTemplate]:
    torch.manual_seed(1)
    return fit(CALLBACKS[name](), module=lit_template(), weights_only=False, **files)


def read(path: Path) -> dict[str, Any]:
    """The whole file, and in its hyperparameters no class but torch's and the project's."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    assert "tests.support.template.Net" in names
    assert [name for name in names if name.startswith(FOREIGN)] == []
    return read_checkpoint(path, weights_only=False)


def of_net(state: dict[str, Any]) -> dict[str, Any]:
    return {key.removeprefix("net."): value for key, value in state.items() if key.startswith("net.")}


def outputs(module: Any) -> torch.Tensor:
    torch.manual_seed(3)
    with torch.no_grad():
        found: torch.Tensor = module.eval()(torch.randn(5, 16))
    return found


@every_callback
def test_a_fit_saves_the_network_plain_and_resumes(name: str, tmp_path: Path) -> None:
    (_, module), _ = resume(partial(run, name), tmp_path, 0, read=read)
    whole = read(tmp_path / "whole" / "epoch=1.ckpt")
    assert module.hparams.net is module.net
    saved = whole["hyper_parameters"]
    assert type(saved["net"]) is Net and saved["parts"]["layers"][0] is saved["net"].head
    assert saved["optimizer"].keywords == SGD.keywords
    if name == "qlora":
        return  # the weights under its adapters are in 4 bits
    assert_same_state(saved["net"].state_dict(), of_net(whole["state_dict"]))
    loaded = LitTemplate.load_from_checkpoint(tmp_path / "whole" / "epoch=1.ckpt", weights_only=False)
    assert_same_state(loaded.net, of_net(whole["state_dict"]))
    hooks = [hook for inner in loaded.modules() for hook in (*inner._forward_hooks, *inner._forward_pre_hooks)]
    assert hooks == [] and "forward" not in vars(loaded.net)


@every_callback
def test_the_compressed_model_is_tested_saved_and_loaded(name: str, tmp_path: Path) -> None:
    trainer, module = run(name)
    trainer.test(module, TinyData(), verbose=False)
    assert module.hparams.net is module.net and module.hparams.parts["body"] is not None
    trainer.save_checkpoint(tmp_path / "final.ckpt", weights_only=True)
    saved = read(tmp_path / "final.ckpt")["hyper_parameters"]
    expected = outputs(module)
    for fresh in (lit_template(), LitTemplate(**saved)):
        assert torch.equal(outputs(load_compressed(str(tmp_path / "final.ckpt"), fresh)), expected)
    # What came from a file is tested and saved again.
    tester = quiet_trainer(callbacks=[CALLBACKS[name]()])
    tester.test(fresh, TinyData(), verbose=False)
    tester.save_checkpoint(tmp_path / "again.ckpt", weights_only=True)
    assert fresh.hparams.net is fresh.net
    again = LitTemplate(**read(tmp_path / "again.ckpt")["hyper_parameters"])
    assert torch.equal(outputs(load_compressed(str(tmp_path / "again.ckpt"), again)), outputs(fresh))


class Wide(LitTemplate):
    """Nearly all weights in one layer, and a hook of its own that saves a module."""

    def __init__(self) -> None:
        super().__init__(Net(4096))
        self.save_hyperparameters({"net": self.net})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["special"] = {"net": self.net, "kinds": [Net]}


def test_nothing_is_written_twice(tmp_path: Path) -> None:
    # In float the network's tensors are those of the weights; where the weights are in few bits it has none.
    module = Wide()
    trainer = quiet_trainer(callbacks=[QuantizationAwareTraining(convert=False)])
    trainer.fit(module, TinyData())
    trainer.save_checkpoint(tmp_path / "float.ckpt", weights_only=True)
    content = read(tmp_path / "float.ckpt")
    assert_same_state(content["special"]["net"].state_dict(), of_net(content["state_dict"]))
    assert content["special"]["kinds"] == [Net]
    quiet_trainer(callbacks=[QuantizationAwareTraining()]).test(module, TinyData(), verbose=False)
    tester = quiet_trainer()
    tester.test(module, TinyData(), verbose=False)
    tester.save_checkpoint(tmp_path / "int8.ckpt", weights_only=True)
    assert type(read(tmp_path / "int8.ckpt")["special"]["net"]) is Net
    sizes = {path.stem: path.stat().st_size for path in tmp_path.glob("*.ckpt")}
    weights = 4 * sum(tensor.numel() for tensor in Wide().state_dict().values())
    assert weights < sizes["float"] < 1.5 * weights  # and the observers
    assert sizes["int8"] < 0.5 * weights  # with a scale, a bias and a BatchNorm in float for each of its rows


def test_weights_in_few_bits_are_zeros_in_the_network_of_the_file(tmp_path: Path) -> None:
    trainer, _ = run("qat")
    trainer.save_checkpoint(tmp_path / "int8.ckpt", weights_only=True)
    net = read(tmp_path / "int8.ckpt")["hyper_parameters"]["net"]
    assert {name: parameter.shape for name, parameter in net.named_parameters()} == {
        name: parameter.shape for name, parameter in Net().named_parameters()
    }
    assert all(isinstance(parameter, nn.Parameter) and parameter.requires_grad for parameter in net.parameters())
    assert not net.head.weight.any()
    LitTemplate(net).load_state_dict(lit_template().state_dict())  # a network like any other


class Recurrent(nn.Module):
    """Recurrent layers hold their weights a second time; this one is tied to nothing, and a child has it twice."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(16, 8, batch_first=True)
        self.head = nn.Linear(8, 4)
        self.again = self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.rnn(x[:, None])[0][:, -1])


@pytest.mark.parametrize("again", [False, True], ids=["once", "from a file"])
def test_recurrent_and_shared_layers(again: bool, tmp_path: Path) -> None:
    module = LitTemplate(Recurrent())
    tester = quiet_trainer(callbacks=[PostTrainingQuantization("int8_dynamic", keep=True)])
    tester.test(module, TinyData(), verbose=False)
    tester.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    if again:
        module = load_compressed(str(tmp_path / "a.ckpt"), LitTemplate(Recurrent()))
        tester.test(module, TinyData(), verbose=False)
        tester.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    net = torch.load(tmp_path / "a.ckpt", weights_only=False)["hyper_parameters"]["net"]
    assert net.again is net.head and net(torch.randn(2, 16)).shape == (2, 4)
    assert [weight.shape for weight in net.rnn._flat_weights] == [p.shape for p in net.rnn.parameters()]
    loaded = load_compressed(str(tmp_path / "a.ckpt"), LitTemplate(net))
    assert torch.equal(outputs(loaded), outputs(module))


def test_deep_copies_and_initial_hyperparameters_stay_whole(tmp_path: Path) -> None:
    _, module = run("qat")
    twin = copy.deepcopy(module)
    assert twin.hparams.net is twin.net
    assert torch.equal(outputs(twin), outputs(module))
    assert list(module.hparams_initial.net.state_dict()) == list(Net().state_dict())


def test_a_logger_writes_the_hyperparameters(tmp_path: Path) -> None:
    module = lit_template()
    for stage in ("fit", "test"):
        logger = CSVLogger(tmp_path, version=stage)
        trainer = quiet_trainer(callbacks=[QuantizationAwareTraining()], logger=logger, log_every_n_steps=1)
        getattr(trainer, stage)(module, TinyData())
        text = (tmp_path / "lightning_logs" / stage / "hparams.yaml").read_text()
        assert "settings" in text and not any(name in text for name in FOREIGN)
        yaml.compose(text)


def test_the_networks_hooks_of_the_users_own_stay(tmp_path: Path) -> None:
    module = lit_template()
    module.net.register_forward_hook(noted)
    trainer = quiet_trainer(callbacks=[QuantizationAwareTraining(convert=False), distillation()])
    trainer.fit(module, TinyData())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert list(read(tmp_path / "a.ckpt")["hyper_parameters"]["net"]._forward_hooks.values()) == [noted]
    assert list(module.net._forward_hooks.values()) == [noted]


def noted(*_: Any) -> None:
    """A hook of the user's."""


class Late(LitTemplate):
    """Puts the network among its hyperparameters afterwards, so that Lightning keeps no copy of its own."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(nn.Identity())
        self.net = net
        self.hparams.late = net


def test_a_float_form_that_is_gone_is_said(tmp_path: Path) -> None:
    tester = quiet_trainer(callbacks=[PostTrainingQuantization(keep=True)])
    tester.test(Late(Net()), TinyData(), verbose=False)
    tester.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    loaded = load_compressed(str(tmp_path / "a.ckpt"), Late(Net()))
    tester.test(loaded, TinyData(), verbose=False)
    with pytest.raises(CompressionError, match=r"float form is gone.*save_hyperparameters\(ignore=\['late'\]\)"):
        tester.save_checkpoint(tmp_path / "b.ckpt")


class Container(dict[str, Any]):
    """Keeps its objects when it is copied, as a configuration of OmegaConf does."""

    def __deepcopy__(self, memo: Any) -> Container:
        return Container(self)


def test_a_container_that_copies_itself_otherwise(tmp_path: Path) -> None:
    net = Net()
    module = LitTemplate(net, settings=Container(net=net, layers=[net.body]))
    trainer = quiet_trainer(callbacks=[QuantizationAwareTraining()])
    trainer.fit(module, TinyData())
    trainer.test(module, TinyData(), verbose=False)
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    saved = read(tmp_path / "a.ckpt")["hyper_parameters"]
    assert type(saved["settings"]) is Container and saved["settings"]["net"] is saved["net"]
    assert saved["settings"]["layers"][0] is saved["net"].body


class DataWithNet(TinyData):
    """A datamodule that has the network too, to make features with, say."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_a_datamodules_hyperparameters_too(tmp_path: Path) -> None:
    module = lit_template()
    trainer = quiet_trainer(callbacks=[QuantizationAwareTraining()])
    trainer.fit(module, DataWithNet(module.net))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    content = read(tmp_path / "a.ckpt")
    assert content["datamodule_hyper_parameters"]["net"] is content["hyper_parameters"]["net"]
