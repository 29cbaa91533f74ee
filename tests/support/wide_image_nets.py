"""Convolutional networks from images to images or to maps of several sizes: rows of `tests.support.wide`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.wide_nets import ConvNormAct


class UNet(nn.Module):
    """Two levels down and up; the skips are concatenated in front of what comes up."""

    def __init__(self, widths: tuple[int, ...], grouped: bool) -> None:
        super().__init__()
        a, b, c, d, e, f, g = widths

        def double(inp: int, out: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for i in (inp, out):
                norm = nn.GroupNorm(4, out) if grouped else nn.BatchNorm2d(out)
                layers += [nn.Conv2d(i, out, 3, padding=1), norm, nn.ReLU(inplace=True)]
            return nn.Sequential(*layers)

        def up(inp: int, out: int) -> nn.Module:
            if not grouped:
                return nn.ConvTranspose2d(inp, out, kernel_size=2, stride=2)
            upsample = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
            return nn.Sequential(upsample, nn.Conv2d(inp, out, 3, padding=1))

        self.inc = double(3, a)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), double(a, b))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), double(b, c))
        self.up1, self.dec1 = up(c, d), double(b + d, e)
        self.up2, self.dec2 = up(e, f), double(a + f, g)
        self.outc = nn.Conv2d(g, 2, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x = self.up1(self.down2(x2))
        x = self.dec1(torch.cat([x2, x], dim=1))
        x = self.dec2(torch.cat([x1, self.up2(x)], dim=1))
        return self.outc(x)


def unet() -> nn.Module:
    return UNet((10, 18, 30, 15, 21, 11, 13), grouped=False)


def unet_groupnorm() -> nn.Module:
    return UNet((12, 20, 32, 17, 24, 14, 16), grouped=True)


class ResidualConv(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.act = nn.PReLU()
        self.conv2 = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * self.conv2(self.act(self.conv1(x)))


class SuperResolution(nn.Module):
    """Four neighbouring channels of a convolution become one channel of the next."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 14, 3, padding=1)
        self.body = nn.Sequential(ResidualConv(14, 18), ResidualConv(14, 20))
        self.upsample = nn.Sequential(nn.Conv2d(14, 9 * 2**2, 3, padding=1), nn.PixelShuffle(2), nn.ReLU())
        self.tail = nn.Conv2d(9, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        return self.tail(self.upsample(x + self.body(x)))


class StyleBlock(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(channels, hidden, 3))
        self.in1 = nn.InstanceNorm2d(hidden, affine=True)
        self.conv2 = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(hidden, channels, 3))
        self.in2 = nn.InstanceNorm2d(channels, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = torch.relu(self.in1(self.conv1(x)))
        return self.in2(self.conv2(out)) + residual


class StyleTransfer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.in1 = nn.Conv2d(3, 10, 3, padding=1), nn.InstanceNorm2d(10, affine=True)
        self.conv2, self.in2 = nn.Conv2d(10, 18, 3, stride=2, padding=1), nn.InstanceNorm2d(18, affine=True)
        self.residuals = nn.Sequential(StyleBlock(18, 14), StyleBlock(18, 22))
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.conv3, self.in3 = nn.Conv2d(18, 12, 3, padding=1), nn.InstanceNorm2d(12, affine=True)
        self.conv4 = nn.Conv2d(12, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.in1(self.conv1(x)))
        y = F.relu(self.in2(self.conv2(y)))
        y = self.upsample(self.residuals(y))
        y = F.relu(self.in3(self.conv3(y)))
        return torch.tanh(self.conv4(y))


class FPN(nn.Module):
    """The laterals are tied by the top-down sums, the outputs of all levels by the one head that reads them."""

    def __init__(self) -> None:
        super().__init__()
        widths = (12, 18, 26)
        self.stages = nn.ModuleList(ConvNormAct(i, o, 3, 2) for i, o in zip((3, *widths), widths, strict=False))
        self.lateral_convs = nn.ModuleList(nn.Conv2d(width, 15, 1) for width in widths)
        self.output_convs = nn.ModuleList(nn.Conv2d(15, 13, 3, padding=1) for _ in widths)
        self.head = nn.Sequential(nn.Conv2d(13, 11, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(11, 5, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        laterals = [conv(feature) for conv, feature in zip(self.lateral_convs, features, strict=True)]
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + F.interpolate(
                laterals[i], size=laterals[i - 1].shape[-2:], mode="nearest"
            )
        outputs = [conv(lateral) for conv, lateral in zip(self.output_convs, laterals, strict=True)]
        return [self.head(output) for output in outputs]
