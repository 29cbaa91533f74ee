"""Residual networks in the forms that people write them in, and a classifier that is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.modules import Classifier


class BasicBlock(nn.Module):
    """As in a ResNet without downsampling: the activation comes after the sum, in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        out += x
        return out.relu_()


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class ConvNextBlock(nn.Module):
    """The channels move to the end and back, a scale of the layer's own stands before the sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.scale = LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale(self.mlp(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)


class Inverted(nn.Module):
    """As in a MobileNet: the whole branch is one child."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *(nn.Conv2d(width, 2 * width, 1), nn.BatchNorm2d(2 * width), nn.ReLU6()),
            *(nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width), nn.Conv2d(2 * width, width, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class RMSNorm(nn.Module):
    """A norm of the user's own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Attention(nn.Module):
    """Gives back a tuple, and takes keywords."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, mask: Any = None, hidden_states: Tensor | None = None) -> tuple[Tensor, None]:
        assert hidden_states is not None
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        y = nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return self.out(y.transpose(1, 2).flatten(2)), None


class DecoderLayer(nn.Module):
    """Gives back a tuple, its branches in parallel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.attention = RMSNorm(width), Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        x = self.norm(hidden_states)
        return (self.mlp(x) + self.attention(hidden_states=x)[0] + hidden_states,)


class Decoder(nn.Module):
    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.layers = nn.ModuleList(DecoderLayer(width) for _ in range(depth))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)[0]
        return self.head(x)


class Transformer(nn.Module):
    """Of torch's own layers."""

    def __init__(self, norm_first: bool, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


def images(block: Callable[[int], nn.Module], depth: int = 3, width: int = 8) -> nn.Sequential:
    blocks = nn.Sequential(*(block(width) for _ in range(depth)))
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), blocks, nn.AvgPool2d(8), nn.Flatten(), nn.Linear(width, 5))


IMAGES, TOKENS = (4, 3, 8, 8), (4, 6, 8)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "basic": (lambda: images(BasicBlock), IMAGES),
    "convnext": (lambda: images(ConvNextBlock), IMAGES),
    "inverted": (lambda: images(Inverted), IMAGES),
    "post-norm": (lambda: Transformer(False), TOKENS),
    "pre-norm": (lambda: Transformer(True), TOKENS),
    "decoder": (Decoder, TOKENS),
}


def network(name: str) -> tuple[nn.Module, Tensor]:
    """A network with the same weights each time, in evaluation, and a batch for it."""
    build, shape = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval(), torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.norm(self.up(x)).relu())


class ResidualClassifier(Classifier):
    """A `Classifier` with residual blocks."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(32) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.norm(self.body(self.flatten(x))).relu()))
