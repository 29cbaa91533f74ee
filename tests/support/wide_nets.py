"""Convolutional networks in the idioms of real codebases, small and of uneven widths: rows of `tests.support.wide`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvNormAct(nn.Sequential):
    def __init__(
        self,
        inp: int,
        out: int,
        kernel: int = 3,
        stride: int = 1,
        groups: int = 1,
        act: type[nn.Module] | None = nn.ReLU,
    ) -> None:
        conv = nn.Conv2d(inp, out, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(out), *([act()] if act is not None else []))


class VGG(nn.Module):
    """The classifier flattens a map of 2 × 3 pixels: six of its inputs belong to each channel."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for v in (12, "M", 18, "M", 22, 26, "M"):
            if isinstance(v, str):
                layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
            else:
                layers += [nn.Conv2d(channels, v, 3, padding=1), nn.BatchNorm2d(v), nn.ReLU(inplace=True)]
                channels = v
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((2, 3))
        self.classifier = nn.Sequential(
            nn.Linear(channels * 2 * 3, 40), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(40, 7)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        x = torch.flatten(x, 1)
        return self.classifier(x)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    expansion = 4
    groups = 1

    def __init__(self, inplanes: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        width = planes + 4 * (self.groups - 1)
        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=self.groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        identity = x if self.downsample is None else self.downsample(x)
        out += identity
        return self.relu(out)


class GroupedBottleneck(Bottleneck):
    """As in ResNeXt: the convolution in the middle sees its channels in four groups."""

    expansion = 2
    groups = 4


class ResNet(nn.Module):
    """Each stage is one sum: its blocks and its shortcut keep or lose a channel together."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck] = BasicBlock,
        stem: int = 10,
        planes: tuple[int, ...] = (10, 14, 22),
        depths: tuple[int, ...] = (2, 1, 2),
    ) -> None:
        super().__init__()
        self.inplanes = stem
        self.conv1 = nn.Conv2d(3, stem, 5, 1, 2, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        stages = [
            self._make_layer(block, p, n, 1 if i == 0 else 2)
            for i, (p, n) in enumerate(zip(planes, depths, strict=True))
        ]
        self.layers = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.inplanes, 7)

    def _make_layer(
        self, block: type[BasicBlock] | type[Bottleneck], planes: int, depth: int, stride: int
    ) -> nn.Sequential:
        downsample, out = None, planes * block.expansion
        if stride != 1 or self.inplanes != out:
            downsample = nn.Sequential(nn.Conv2d(self.inplanes, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        layers = [block(self.inplanes, planes, stride, downsample)]
        self.inplanes = out
        return nn.Sequential(*layers, *(block(out, planes, 1, None) for _ in range(1, depth)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layers(x))
        return self.fc(torch.flatten(x, 1))


def bottleneck() -> nn.Module:
    return ResNet(Bottleneck, 12, (8, 11), (2, 2))


def grouped() -> nn.Module:
    return ResNet(GroupedBottleneck, 14, (8, 16), (2, 1))


class InvertedResidual(nn.Module):
    def __init__(self, inp: int, oup: int, stride: int, expand_ratio: int) -> None:
        super().__init__()
        hidden_dim = round(inp * expand_ratio)
        self.use_res_connect = stride == 1 and inp == oup
        layers: list[nn.Module] = []
        if expand_ratio != 1:
            layers.append(ConvNormAct(inp, hidden_dim, 1, act=nn.ReLU6))
        layers += [
            ConvNormAct(hidden_dim, hidden_dim, 3, stride, groups=hidden_dim, act=nn.ReLU6),
            nn.Conv2d(hidden_dim, oup, 1, bias=False),
            nn.BatchNorm2d(oup),
        ]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        inp = 12
        features: list[nn.Module] = [ConvNormAct(3, inp, stride=2, act=nn.ReLU6)]
        for t, c, n, s in ((1, 9, 1, 1), (3, 13, 2, 2), (4, 15, 3, 1)):
            for i in range(n):
                features.append(InvertedResidual(inp, c, s if i == 0 else 1, t))
                inp = c
        features.append(ConvNormAct(inp, 46, 1, act=nn.ReLU6))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Linear(46, 7))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = F.adaptive_avg_pool2d(x, (1, 1))
        return self.classifier(torch.flatten(x, 1))


class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int, squeeze: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeeze, 1)
        self.fc2 = nn.Conv2d(squeeze, channels, 1)
        self.activation = nn.ReLU()
        self.scale_activation = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.activation(self.fc1(self.avgpool(x)))
        return self.scale_activation(self.fc2(scale)) * x


class MobileNetV3Block(nn.Module):
    def __init__(
        self, inp: int, expanded: int, out: int, kernel: int, squeeze: int | None, act: type[nn.Module], stride: int
    ) -> None:
        super().__init__()
        self.use_res_connect = stride == 1 and inp == out
        layers: list[nn.Module] = []
        if expanded != inp:
            layers.append(ConvNormAct(inp, expanded, 1, act=act))
        layers.append(ConvNormAct(expanded, expanded, kernel, stride, groups=expanded, act=act))
        if squeeze is not None:
            layers.append(SqueezeExcitation(expanded, squeeze))
        layers.append(ConvNormAct(expanded, out, 1, act=None))
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        result = self.block(x)
        if self.use_res_connect:
            result += x
        return result


class MobileNetV3(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            ConvNormAct(3, 12, stride=2, act=nn.Hardswish),
            MobileNetV3Block(12, 12, 11, 3, 8, nn.ReLU, 1),
            MobileNetV3Block(11, 28, 17, 3, None, nn.ReLU, 2),
            MobileNetV3Block(17, 38, 17, 5, 10, nn.Hardswish, 1),
            MobileNetV3Block(17, 42, 21, 5, 9, nn.Hardswish, 1),
            ConvNormAct(21, 50, 1, act=nn.Hardswish),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Linear(50, 34), nn.Hardswish(inplace=True), nn.Linear(34, 7))

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(x.flatten(1))


class DenseLayer(nn.Module):
    def __init__(self, channels: int, growth: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = torch.cat(features, 1)
        x = self.conv1(F.relu(self.norm1(x)))
        return self.conv2(F.relu(self.norm2(x)))


class DenseBlock(nn.ModuleDict):
    def __init__(self, depth: int, channels: int, growth: int, width: int) -> None:
        super().__init__()
        for i in range(depth):
            self.add_module(f"denselayer{i + 1}", DenseLayer(channels + i * growth, growth, width))

    def forward(self, init_features: Tensor) -> Tensor:
        features = [init_features]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    """Pre-activation norms stand on concatenations: each cuts the same feature in its own place."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential()
        self.features.add_module("conv0", nn.Conv2d(3, 13, 3, 2, 1, bias=False))
        self.features.add_module("denseblock1", DenseBlock(3, 13, 8, 18))
        transition = (nn.BatchNorm2d(37), nn.ReLU(inplace=True), nn.Conv2d(37, 19, 1, bias=False), nn.AvgPool2d(2, 2))
        self.features.add_module("transition1", nn.Sequential(*transition))
        self.features.add_module("denseblock2", DenseBlock(2, 19, 9, 15))
        self.features.add_module("norm5", nn.BatchNorm2d(37))
        self.classifier = nn.Linear(37, 7)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.features(x), inplace=True)
        out = F.adaptive_avg_pool2d(out, (1, 1)).flatten(1)
        return self.classifier(out)


class InceptionBlock(nn.Module):
    def __init__(self, inp: int, ch1: int, ch3: tuple[int, int], ch5: tuple[int, int], pool: int) -> None:
        super().__init__()
        self.branch1 = ConvNormAct(inp, ch1, 1)
        self.branch2 = nn.Sequential(ConvNormAct(inp, ch3[0], 1), ConvNormAct(*ch3, 3))
        self.branch3 = nn.Sequential(ConvNormAct(inp, ch5[0], 1), ConvNormAct(*ch5, 5))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), ConvNormAct(inp, pool, 1))
        self.out_channels = ch1 + ch3[1] + ch5[1] + pool

    def forward(self, x: Tensor) -> Tensor:
        outputs = [self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)]
        return torch.cat(outputs, 1)


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(3, 17, 3, 2)
        self.inception3a = InceptionBlock(17, 8, (9, 11), (10, 12), 13)
        self.inception3b = InceptionBlock(self.inception3a.out_channels, 14, (15, 16), (18, 9), 10)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(self.inception3b.out_channels, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inception3b(self.inception3a(self.conv1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(hidden, dim)
        self.gamma = nn.Parameter(torch.full((dim,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.dwconv(x).permute(0, 2, 3, 1)
        x = self.pwconv2(self.act(self.pwconv1(self.norm(x))))
        x = self.gamma * x
        return shortcut + x.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Channels are the second axis of the convolutions and the last of the linear layers and norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 14, kernel_size=2, stride=2), LayerNorm2d(14, eps=1e-6))
        self.stage1 = nn.Sequential(ConvNeXtBlock(14, 40), ConvNeXtBlock(14, 44))
        self.downsample = nn.Sequential(LayerNorm2d(14, eps=1e-6), nn.Conv2d(14, 22, kernel_size=2, stride=2))
        self.stage2 = nn.Sequential(ConvNeXtBlock(22, 60))
        self.norm = nn.LayerNorm(22, eps=1e-6)
        self.head = nn.Linear(22, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.downsample(self.stage1(self.stem(x))))
        return self.head(self.norm(x.mean([-2, -1])))


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.shape
    x = x.view(batch, groups, channels // groups, height, width)
    return x.transpose(1, 2).reshape(batch, channels, height, width)


class ShuffleUnit(nn.Module):
    """Stride 1 works on one half of the channels and passes the other; stride 2 works on all of them twice."""

    def __init__(self, inp: int, out: int, stride: int) -> None:
        super().__init__()
        self.stride, half = stride, out // 2
        start = inp if stride > 1 else half
        if stride > 1:
            depthwise = ConvNormAct(inp, inp, 3, stride, groups=inp, act=None)
            self.branch1 = nn.Sequential(depthwise, ConvNormAct(inp, half, 1))
        self.branch2 = nn.Sequential(
            ConvNormAct(start, half, 1),
            ConvNormAct(half, half, 3, stride, groups=half, act=None),
            ConvNormAct(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return channel_shuffle(out, 2)


class ShuffleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(3, 14, 3, 2)
        self.stage2 = nn.Sequential(ShuffleUnit(14, 20, 2), ShuffleUnit(20, 20, 1), ShuffleUnit(20, 20, 1))
        self.conv5 = ConvNormAct(20, 33, 1)
        self.fc = nn.Linear(33, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv5(self.stage2(self.conv1(x)))
        return self.fc(x.mean([2, 3]))


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(ConvNormAct(3, 12), nn.MaxPool2d(2), ConvNormAct(12, 20, stride=2))
        self.fc = nn.Linear(20, 30)
        self.bbox_head = nn.Sequential(nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 4))
        self.class_head = nn.Linear(30, 7)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.backbone(x).mean(dim=(2, 3))
        x = F.relu(self.fc(x))
        return {"boxes": self.bbox_head(x).sigmoid(), "classes": self.class_head(x)}


class Siamese(nn.Module):
    """One tower, called twice: a channel of it leaves three places of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(
            ConvNormAct(3, 11), nn.MaxPool2d(2), ConvNormAct(11, 17, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.embed = nn.Linear(17, 13)
        self.head = nn.Linear(3 * 13, 7)

    def forward_once(self, x: Tensor) -> Tensor:
        return self.embed(self.tower(x)).relu()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.forward_once(a), self.forward_once(b)
        return self.head(torch.cat([a, b, torch.abs(a - b)], dim=-1))
