"""Any layer without a kernel stays float and is listed, none refuses the model; what is made is saved, and loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import (
    GPTQ,
    NF4,
    DynamicInt8,
    PostTrainingQuantization,
    QLoRA,
    QuantizationAwareTraining,
    WeightOnly,
    load_compressed,
    quantize,
    save_compressed,
)
from lightning_compress.quantization.convert import record_of
from tests.support.modules import quiet_trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:LSTM with projections is not supported with oneDNN",
    "ignore:Initializing zero-element tensors",
    "ignore:`torch.nn.utils.weight_norm` is deprecated",
)


class Own(nn.Module):
    """Computes with a matrix of its own."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(*shape) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix if self.matrix.dim() == 2 else torch.einsum("bi,eio->beo", x, self.matrix).mean(1)


class OwnBesideLayers(Own):
    """The same in a module that also holds one, as fused experts hold their activation."""

    def __init__(self, *shape: int) -> None:
        super().__init__(*shape)
        self.activation = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(super().forward(x))


class Doubled(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 2 * self.weight, self.bias)


class Adapted(nn.Linear):
    """A subclass that holds layers."""

    def __init__(self) -> None:
        super().__init__(16, 16)
        self.down, self.up = nn.Linear(16, 2), nn.Linear(2, 16)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


class SelfAttention(nn.MultiheadAttention):
    """A subclass with a signature of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x, x)[0]


class Called(nn.Module):
    """Calls a layer in its own way."""

    def __init__(self, layer: nn.Module, how: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.how = layer, how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.layer, x)


class Alias(nn.Module):
    """Uses the weight of its layer under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.matrix = self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.layer(x).relu(), self.matrix)


class Reader(nn.Module):
    """Reads its layer's type and weight, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.layer(x.to(self.layer.weight.dtype)), self.layer.weight.T, self.layer.bias)


def changed(layer: Any, change: Callable[[Any], Any]) -> nn.Module:
    made: nn.Module = change(layer) or layer
    return made


def spoil(layer: nn.Linear) -> None:
    layer.weight.data[0, 0] = 1e300


def recurrent(layer: nn.Module) -> nn.Module:
    return Called(layer, lambda layer, x: layer(x[:, None])[0][:, 0])


def convolution(layer: nn.Module) -> nn.Module:
    return Called(layer, lambda layer, x: layer(x.view(-1, 4, 4)).flatten(1))


def of_type(dtype: torch.dtype, layer: Any = None) -> nn.Module:
    layer = nn.Linear(16, 16, dtype=dtype) if layer is None else layer
    return Called(layer, lambda layer, x: torch.view_as_real(layer(x.to(dtype)) + 0j)[..., 0].clamp(-9, 9).float())


ODD: dict[str, Callable[[], nn.Module]] = {
    "matrix": lambda: Own(16, 16),
    "matrix beside layers": lambda: OwnBesideLayers(16, 16),
    "fused experts": lambda: OwnBesideLayers(3, 16, 16),
    "list of matrices": lambda: Called(
        nn.ParameterList([torch.randn(16, 16) / 4 for _ in range(2)]), lambda ws, x: x @ ws[0] @ ws[1]
    ),
    "subclass": lambda: Doubled(16, 16),
    "subclass with layers": Adapted,
    "attention subclass": lambda: SelfAttention(16, 4),
    "attention with keys of its own": lambda: Called(
        nn.MultiheadAttention(16, 4, add_bias_kv=True), lambda layer, x: layer(x, x, x)[0]
    ),
    "alias": Alias,
    "reader": Reader,
    "bilinear": lambda: Called(nn.Bilinear(16, 16, 16), lambda layer, x: layer(x, x)),
    "embedding bag": lambda: Called(nn.EmbeddingBag(9, 16), lambda layer, x: x + layer(x[:, :2].abs().long() % 9)),
    "lstm": lambda: recurrent(nn.LSTM(16, 16, batch_first=True)),
    "lstm with projections": lambda: recurrent(nn.LSTM(16, 20, batch_first=True, proj_size=16)),
    "rnn": lambda: recurrent(nn.RNN(16, 16, batch_first=True)),
    "cell": lambda: Called(nn.GRUCell(16, 16), lambda layer, x: layer(x)),
    "grouped": lambda: convolution(nn.Conv1d(4, 4, 1, groups=2)),
    "transposed": lambda: convolution(nn.ConvTranspose1d(4, 4, 1)),
    "no inputs": lambda: Called(nn.Linear(0, 16), lambda layer, x: x + layer(x[:, :0])),
    "no outputs": lambda: Called(nn.Linear(16, 0), lambda layer, x: torch.cat([x, layer(x)], 1)),
    "odd width": lambda: nn.Sequential(nn.Linear(16, 17), nn.Linear(17, 16)),
    "complex": lambda: of_type(torch.complex64),
    "bfloat16": lambda: of_type(torch.bfloat16),
    "float64": lambda: of_type(torch.float64),
    "not finite in float32": lambda: of_type(torch.float64, changed(nn.Linear(16, 16, dtype=torch.float64), spoil)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(16, 16)),
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(16, 16)),
    "old weight norm of an lstm": lambda: recurrent(
        nn.utils.weight_norm(nn.LSTM(16, 16, batch_first=True), "weight_hh_l0")
    ),
    "pruned": lambda: changed(nn.Linear(16, 16), lambda layer: prune.l1_unstructured(layer, "weight", 0.5)),
}
SCHEMES = {"int8": WeightOnly(8), "int4": WeightOnly(4, 8), "nf4": NF4(8), "gptq": GPTQ(4, 8), "dynamic": DynamicInt8()}
CALLBACKS = {
    **{name: (lambda scheme=scheme: PostTrainingQuantization(scheme, keep=True)) for name, scheme in SCHEMES.items()},
    "qat": lambda: QuantizationAwareTraining(WeightOnly(4, 8)),
    "qlora": lambda: QLoRA(rank=2),
}


def build(*kinds: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), *(ODD[kind]() for kind in kinds), nn.Linear(16, 16))


def assert_all_are_listed(quantized: nn.Module, model: nn.Module) -> None:
    """Each matrix of the float ``model`` is in few bits, or stays float with its own or its layer's name."""
    record = record_of(quantized)
    assert record is not None
    listed = [*(layer["path"] for layer in record["layers"]), *record["floats"]]
    for name, parameter in model.named_parameters():
        layer = name.rpartition(".")[0].partition(".parametrizations")[0]
        if parameter.squeeze().dim() > 1 or not parameter.numel():
            assert any(path in (name, layer) or layer == f"{path}.out_proj" for path in listed) or layer == "", name


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ODD)
def test_an_odd_layer_is_quantized_or_listed_and_loads_bit_for_bit(kind: str, scheme: str, tmp_path: Path) -> None:
    model, x = build(kind).eval(), torch.randn(6, 16)
    quantized = quantize(model, SCHEMES[scheme], calibration=[x]).eval()
    assert_all_are_listed(quantized, model)
    save_compressed(quantized, str(tmp_path / "odd.ckpt"))
    loaded = load_compressed(str(tmp_path / "odd.ckpt"), build(kind)).eval()
    with torch.no_grad():
        first, got = loaded(x), quantized(x)
        assert torch.equal(first, got)
        assert torch.cosine_similarity(got.flatten(), model(x).flatten(), dim=0) > 0.9


class Odd(L.LightningModule):
    """All of them that train."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build(*(kind for kind in ODD if kind not in ("no outputs", "not finite in float32")))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.randn(8, 16, generator=torch.Generator().manual_seed(0))), 4)

    test_dataloader = train_dataloader


@pytest.mark.parametrize("name", CALLBACKS)
def test_every_form_that_a_trainer_makes_of_odd_layers_is_listed_saved_and_loaded(name: str, tmp_path: Path) -> None:
    module, callback = Odd(), CALLBACKS[name]()
    trainer = quiet_trainer(callbacks=[callback])
    if name in ("qat", "qlora"):
        trainer.fit(module)
    else:
        trainer.test(module, verbose=False)
    assert_all_are_listed(module, Odd())
    notes = " ".join(callback.report_notes())
    assert "no kernel for the own parameters of OwnBesideLayers" in notes
    trainer.save_checkpoint(tmp_path / "trainer.ckpt")
    save_compressed(module, str(tmp_path / "plain.ckpt"))
    x = torch.randn(3, 16)
    for file in ("trainer.ckpt", "plain.ckpt"):
        loaded = load_compressed(str(tmp_path / file), Odd()).eval()
        with torch.no_grad():
            assert torch.equal(loaded(x), module.eval()(x))
