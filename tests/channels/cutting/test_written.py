"""Sizes that code writes or computes stay right after a cut, wherever the model goes then."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import (
    ChannelPruning,
    Steps,
    Window,
    load_compressed,
    plan_removal,
    quantize,
    remove_channels_,
    save_compressed,
)
from lightning_compress.channels.cutting.written import WRITTEN, set_written_
from tests.channels.cuts import inexact, off, run
from tests.support.modules import quiet_trainer


class Heads(nn.Module):
    """Attention in code that writes sizes in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.stem, self.qkv, self.gate = nn.Linear(6, 32), nn.Linear(32, 96), nn.Linear(32, 64)
        self.norm, self.o = nn.LayerNorm(32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        batch, count, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, -1, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = (part.reshape(batch * self.heads, count, 8) for part in (q, k, v))
        y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        y = y.view(batch, self.heads, count, -1).transpose(1, 2).reshape(batch, count, width)
        gate = self.gate(x)
        return self.o(y + gate[..., :32] * gate[..., 32:].tanh())


def heads(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(Heads(), nn.Linear(5, 3)).eval()


def cut(model: nn.Module, macs: float, seed: int = 0) -> float:
    """How far the model is from the one with zeros, for the batch that it was planned with and for another."""
    x = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(seed))
    plan = plan_removal(model, x, macs=macs, importance="random", seed=seed)
    assert {"0.qkv.weight", "0.gate.weight"} <= plan.kept.keys()
    wrong = max(inexact(model, plan, (x,)), inexact(model, plan, (torch.cat([x, x.flip(1), x])[:5, :4],)))
    remove_channels_(model, plan)
    return wrong


class Windows(nn.Module):
    """Attention in windows under a mask with one entry for each window of a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv, self.o = nn.Linear(6, 32), nn.Linear(32, 96), nn.Linear(32, 5)
        self.heads, self.norm = 4, nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        batch, length, width = x.shape
        count, places = length // 4, torch.zeros(1, length, 1).view(length // 4, 4)
        mask = places[:, None] - places[:, :, None]
        q, k, v = self.qkv(x).reshape(batch * count, 4, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)).view(batch, count, self.heads, 4, 4) + mask[:, None]
        y = scores.view(-1, self.heads, 4, 4).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(batch * count, 4, width).reshape(batch, length, width))


class Reduced(nn.Module):
    """Attention to a map of fewer tokens, which is a view of the tokens too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.q, self.kv, self.o = nn.Linear(6, 32), nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(32, 5)
        self.norm, self.pool = nn.LayerNorm(32), nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        batch, length, width = x.shape
        q = self.q(x).reshape(batch, length, 4, width // 4).permute(0, 2, 1, 3)
        x = self.pool(x.permute(0, 2, 1).reshape(batch, width, 4, length // 4)).reshape(batch, width, -1)
        k, v = self.kv(x.permute(0, 2, 1)).reshape(batch, -1, 2, 4, width // 4).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(batch, length, width))


class Stripes(nn.Module):
    """Heads of a map, and stripes of it whose view has as many dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv, self.norm = nn.Linear(6, 32), nn.Conv1d(32, 96, 1), nn.LayerNorm(32)
        self.o, self.out, self.scale = nn.Conv1d(32, 32, 1), nn.Linear(32, 5), nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).transpose(1, 2)
        q, k, v = (part.view(len(x), 4, 8, -1) for part in self.qkv(x).chunk(3, 1))
        y = (v @ (q.transpose(2, 3) @ k).softmax(-1).transpose(2, 3)).reshape(x.shape)
        return self.out((x + self.o(y)).transpose(1, 2).reshape(len(x), 4, -1, 32) * self.scale)


@pytest.mark.parametrize("kind", [Windows, Reduced, Stripes])
def test_lengths_that_equal_widths_or_differ_from_the_example(kind: type[nn.Module]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind().eval()
        plan = plan_removal(model, torch.randn(2, 64, 6), macs=0.5)
        assert {"qkv.weight", "kv.weight"} & plan.kept.keys()
        for batch, length in ((2, 64), (3, 24), (8, 16), (5, 32), (4, 8)):
            assert inexact(model, plan, (torch.randn(batch, length, 6),)) < 1e-5, (batch, length)


class First(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :16]


class Gated(nn.Module):
    """Takes halves of a width; a module that it calls takes as many tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv1d(6, 32, 1), nn.Conv1d(16, 16, 1)
        self.first, self.out = First(), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x.transpose(1, 2))
        return self.out(self.first(self.body(y[:, :16] * y[:, 16:].sigmoid()).transpose(1, 2)))


def test_a_module_that_is_called_writes_its_own_sizes() -> None:
    model = Gated().eval()
    plan = plan_removal(model, torch.randn(2, 40, 6), channels=0.6, round_to=1)
    assert "stem.weight" in plan.kept
    for length in range(8, 40):
        assert inexact(model, plan, (torch.randn(2, length, 6),)) < 1e-5, length


def test_cuts_go_on_from_each_other() -> None:
    model = heads()
    assert cut(model, 0.7) < 1e-5
    assert model[0].qkv.weight.shape == (72, 32)
    assert cut(model, 0.6, seed=1) < 1e-5
    assert model[0].qkv.weight.shape == (48, 32)


def test_a_class_keeps_its_name_and_is_left_alone() -> None:
    model, other = heads(), heads(1)
    cut(model, 0.6)
    assert type(model[0]).__name__ == "Heads" and isinstance(model[0], Heads) and type(other[0]) is Heads
    set_written_(model[0], None)
    assert type(model[0]) is Heads and WRITTEN not in vars(model[0])


class WithState(nn.Module):
    """Writes sizes, and says itself what a copy of it holds."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, self.size * 4).relu()

    def __getstate__(self) -> Any:
        return {"size": self.size}

    def __setstate__(self, state: Any) -> None:
        self.__init__(**state)  # type: ignore[misc]


class WithReduce(WithState):
    def __reduce__(self) -> Any:
        return WithReduce, (self.size,)


@pytest.mark.parametrize("kind", [WithState, WithReduce])
@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_modules_that_say_what_a_copy_holds_keep_their_corrections(kind: Any, again: Any) -> None:
    model, x = nn.Sequential(nn.Conv1d(3, 8, 1), kind(8), nn.Linear(32, 5)).eval(), torch.randn(2, 3, 4)
    remove_channels_(model, plan_removal(model, x, channels=0.5, round_to=1))
    assert model[0].out_channels == 4
    with torch.no_grad():
        assert torch.equal(again(again(model))(x), model(x))


@pytest.mark.parametrize("way", ["copy", "pickle", "torch_save", "export"])
def test_cut_models_go_elsewhere(way: str) -> None:
    model, x = heads(), torch.randn(3, 7, 6)
    cut(model, 0.7)
    expected = run(model, (x,))
    if way == "copy":
        there = copy.deepcopy(model)
    elif way == "pickle":
        there = pickle.loads(pickle.dumps(model))
    elif way == "torch_save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        there = torch.load(file, weights_only=False)
    else:
        sizes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("count")},)
        exported = torch.export.export(model, (torch.randn(4, 9, 6),), dynamic_shapes=sizes)
        assert off([exported.module()(x)], expected) < 1e-6
        return
    assert off(run(there, (x,)), expected) < 1e-6
    assert cut(there, 0.6, seed=1) < 1e-5


def test_files_hold_what_is_corrected(tmp_path: Path) -> None:
    model, x = heads(), torch.randn(3, 7, 6)
    cut(model, 0.7)
    cut(model, 0.6, seed=1)
    save_compressed(model, tmp_path / "small.ckpt")
    other = load_compressed(tmp_path / "small.ckpt", heads(1)).eval()
    assert off(run(other, (x,)), run(model, (x,))) < 1e-6
    # A file of the whole model takes the corrections away again.
    save_compressed(heads(2), tmp_path / "whole.ckpt")
    whole = load_compressed(tmp_path / "whole.ckpt", other).eval()
    assert off(run(whole, (x,)), run(heads(2), (x,))) == 0
    assert type(whole[0]) is Heads


class Fitted(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = heads()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-3)


def test_a_fit_in_rounds_and_its_file(tmp_path: Path) -> None:
    channels = ChannelPruning(macs=0.5, schedule=Steps([0.0, 1.0], [0.5, 1.0]), window=Window(1, 3, unit="step"))
    module, x = Fitted(), torch.randn(3, 7, 6)
    data = DataLoader(TensorDataset(torch.randn(16, 7, 6)), batch_size=4)
    trainer = quiet_trainer(callbacks=[channels, EMAWeightAveraging(decay=0.5)], max_epochs=1)
    trainer.fit(module.train(), data)
    assert module.net[0].qkv.weight.shape == (48, 32)
    trainer.save_checkpoint(tmp_path / "small.ckpt", weights_only=True)
    other = load_compressed(tmp_path / "small.ckpt", Fitted())
    assert off(run(other, (x,)), run(module, (x,))) < 1e-6


def test_int8_of_what_is_corrected(capfd: pytest.CaptureFixture[str]) -> None:
    model, x = heads(), torch.randn(16, 7, 6)
    cut(model, 0.6)
    small = quantize(model, "int8_static", [x])
    assert small.state_dict()["0.qkv.weight"].dtype == torch.int8
    assert off(run(small, (x,)), run(model, (x,))) < 0.1
    assert capfd.readouterr().err == ""


CALLS = {
    "view": (lambda x: x.view(2, -1, 4, 8), (2, 5, 3, 8)),
    "view_of_a_size": (lambda x: x.view(torch.Size([2, 5, 4, 8])), (2, 5, 3, 8)),
    "view_by_name": (lambda x: x.view(size=(2, 5, 4, 8)), (2, 5, 3, 8)),
    "as_another_type": (lambda x: x.view(torch.int32), (2, 5, 24)),
    "reshape": (lambda x: torch.reshape(x, (2, 5, 4, 8)), (2, 5, 3, 8)),
    "computed": (lambda x: x.reshape(2, 5, 4, 24 // 4), (2, 5, 3, 8)),
    "followed": (lambda x: x.reshape(2, 5, 3, -1), (2, 5, 3, 8)),
    "unflatten": (lambda x: x.unflatten(-1, (4, 8)), (2, 5, 3, 8)),
    "unflatten_by_name": (lambda x: torch.unflatten(x, dim=2, sizes=(4, -1)), (2, 5, 3, 8)),
    "another_view": (lambda x: x.view(10, 24), (10, 24)),
    "slice": (lambda x: x[..., :8], (2, 5, 4)),
    "slices": (lambda x: x[1:, None, 0, 8:32], (1, 1, 20)),
    "slice_from_the_end": (lambda x: x[:, :, -24:], (2, 5, 20)),
    "of_no_part": (lambda x: x[:, 1:3], (2, 2, 24)),
    "split": (lambda x: x.split([8, 24], 2)[1], (2, 5, 20)),
    "split_by_names": (lambda x: torch.split(x, split_size_or_sections=(8, 24), dim=-1)[1], (2, 5, 20)),
    "narrow": (lambda x: x.narrow(-1, 8, 24), (2, 5, 20)),
    "tensor_split": (lambda x: x.tensor_split((8,), 2)[0], (2, 5, 4)),
    "split_as_it_is": (lambda x: x.split([4, 20], -1)[0], (2, 5, 4)),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_write_sizes(name: str) -> None:
    call, shape = CALLS[name]
    module = type("Calls", (nn.Module,), {"forward": lambda self, x: call(x)})()
    view = ["view", 3, [[2, 32, 24, 24]], 4, [[2, 4, 3], [3, 8, 8]]]
    set_written_(module, [view, ["parts", 3, [[2, 32, 24]], 1, [[8, 4]]]])
    assert module(torch.ones(2, 5, 24)).shape == shape
