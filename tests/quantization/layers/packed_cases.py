"""Models and schemes for the tests of weights of few bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress import (
    GPTQ,
    NF4,
    WeightOnly,
    quantize,
)
from lightning_compress.modules.routing import routed_modules
from lightning_compress.quantization.convert import record_of
from lightning_compress.quantization.layers.schemes import Packed
from tests.support.architectures import SharedModule, TiedLanguageModel

FEW: list[Packed] = [WeightOnly(4, 8, symmetric=False), NF4(16), GPTQ(3, 8)]


class Lookup(nn.Module):
    """Two embeddings, one of them with a row that is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.ids, self.places = nn.Embedding(11, 20, padding_idx=0), nn.Embedding(5, 20)
        self.body = nn.Linear(20, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(self.ids(ids) + self.places(torch.arange(ids.shape[-1])))


class Attends(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, **options)
        for name, parameter in self.attention.named_parameters():
            if "bias" in name:
                nn.init.normal_(parameter)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self.attention(query, key, value)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=padding)).masked_fill(padding[..., None], 0.0)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(16, 2, 24, dropout=0.0, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.decoder(x, memory, tgt_mask=mask, tgt_is_causal=True)


Case = tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]


CASES: dict[str, Case] = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 7, bias=False)),
        lambda: {"input": torch.randn(5, 24)},
    ),
    "conv1d": (
        lambda: nn.Sequential(
            nn.Conv1d(4, 6, 3, stride=2, dilation=2, padding=1, padding_mode="circular"),
            nn.Tanh(),
            nn.Conv1d(6, 4, 2, groups=2, bias=False),
        ),
        lambda: {"input": torch.randn(3, 4, 15)},
    ),
    "conv2d": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, (3, 1), stride=(2, 1), padding=(1, 2), padding_mode="reflect"),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding="same", groups=8),
            nn.Conv2d(8, 5, 1),
        ),
        lambda: {"input": torch.randn(3, 3, 7, 6)},
    ),
    "conv3d": (
        lambda: nn.Sequential(nn.Conv3d(2, 4, (1, 2, 3), padding_mode="replicate", padding=1, groups=2)),
        lambda: {"input": torch.randn(2, 2, 4, 5, 4)},
    ),
    "embedding": (Lookup, lambda: {"ids": torch.tensor([[0, 3, 10, 0], [1, 1, 2, 9]])}),
    "attention": (
        lambda: Attends(batch_first=True),
        lambda: dict(zip(("query", "key", "value"), torch.randn(3, 2, 5, 16), strict=True)),
    ),
    "attention of other sizes": (
        lambda: Attends(kdim=12, vdim=10, bias=False),
        lambda: {"query": torch.randn(5, 2, 16), "key": torch.randn(7, 2, 12), "value": torch.randn(7, 2, 10)},
    ),
    "encoder": (
        Encoder,
        lambda: {"x": torch.randn(3, 5, 16), "padding": torch.arange(5) >= torch.tensor([[5], [3], [1]])},
    ),
    "decoder": (Decoder, lambda: {"x": torch.randn(3, 5, 16), "memory": torch.randn(3, 4, 16)}),
    "tied": (TiedLanguageModel, lambda: {"ids": torch.randint(20, (4, 5))}),
    "shared": (SharedModule, lambda: {"x": torch.randn(4, 16)}),
}


KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.MultiheadAttention)


def build(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(seed)
    make, batch = CASES[name]
    return make().eval(), batch()


def layers_of(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if type(module) in KINDS]


def fully(model: Any, scheme: Packed, batch: dict[str, Tensor] | None = None) -> Any:
    """All layers of a model in one scheme, embeddings and the last one too."""
    calibration = None if batch is None else [batch]
    return quantize(model, scheme, calibration, overrides=dict.fromkeys(layers_of(model), scheme)).eval()


def stored_in(quantized: nn.Module) -> dict[str, str]:
    """Path of each quantized layer to the name of its scheme."""
    return {layer["path"]: layer["scheme"]["name"] for layer in (record_of(quantized) or {})["layers"]}


def held(module: nn.Module) -> list[Tensor]:
    """All tensors that a module and its stored weights hold, hidden second holds of recurrent layers too."""
    tensors = [*module.parameters(), *module.buffers()]
    for inner in module.modules():
        tensors += [tensor for tensor in getattr(inner, "_flat_weights", []) if tensor is not None]
    for form in routed_modules(module).values():
        tensors += [tensor for weight in form.weights.values() for tensor in weight.tensors().values()]
    return tensors


def storages(module: nn.Module) -> set[int]:
    """Addresses of all memory that a module's tensors stand in."""
    return {tensor.untyped_storage().data_ptr() for tensor in held(module) if tensor.numel()}
