"""Recurrent and audio networks in the idioms of real codebases: rows of `tests.support.wide`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


class AudioNet(nn.Module):
    """PReLU holds a slope for each channel; the head reads eight samples of each."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Conv1d(1, 10, 9, stride=4, padding=4), nn.BatchNorm1d(10), nn.PReLU(10)),
            *(nn.Conv1d(10, 14, 5, stride=4, padding=2, bias=False), nn.BatchNorm1d(14), nn.PReLU(14)),
            *(nn.Conv1d(14, 18, 3, stride=2, padding=1, bias=False), nn.BatchNorm1d(18), nn.PReLU(18)),
        )
        self.fc = nn.Linear(18 * 8, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        return self.fc(x.view(x.size(0), -1))


class ConvLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(5, 12, 3, padding=1), nn.BatchNorm1d(12), nn.ReLU(), nn.Conv1d(12, 18, 3))
        self.lstm = nn.LSTM(18, 22, num_layers=2, batch_first=True)
        self.fc = nn.Linear(22, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x)).permute(0, 2, 1)
        out, _ = self.lstm(x)
        return self.fc(out[:, -1, :])


class BiGRU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, 14)
        self.gru = nn.GRU(14, 10, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(2 * 10, 7)

    def forward(self, ids: Tensor) -> Tensor:
        output, _ = self.gru(self.embedding(ids))
        return self.fc(output.mean(dim=1))


class GatedBlock(nn.Module):
    """Channel i of the first half gates channel i of the second: they go together."""

    def __init__(self, channels: int, hidden: int, skip: int, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, 2 * hidden, 3, padding=dilation, dilation=dilation)
        self.res_conv = nn.Conv1d(hidden, channels, 1)
        self.skip_conv = nn.Conv1d(hidden, skip, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.conv(x).chunk(2, dim=1)
        y = a.tanh() * b.sigmoid()
        return x + self.res_conv(y), self.skip_conv(y)


class WaveNet(nn.Module):
    """As in the original, nothing reads the last block's `res_conv`."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv1d(6, 14, 1)
        self.blocks = nn.ModuleList([GatedBlock(14, 10, 19, 1), GatedBlock(14, 12, 19, 2)])
        self.end = nn.Conv1d(19, 2 * 11, 1)
        self.fc = nn.Linear(11, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        total: Tensor | int = 0
        for block in self.blocks:
            x, skip = block(x)
            total = skip + total
        x = F.glu(self.end(F.relu(total)), dim=1)
        return self.fc(x.mean(-1))


class VocoderBlock(nn.Module):
    def __init__(self, channels: int, hidden: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = weight_norm(nn.Conv1d(channels, hidden, 3, padding=dilation, dilation=dilation))
        self.conv2 = weight_norm(nn.Conv1d(hidden, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        xt = self.conv1(F.leaky_relu(x, 0.1))
        xt = self.conv2(F.leaky_relu(xt, 0.1))
        return xt + x


class Vocoder(nn.Module):
    """Every weight is computed from a direction and a length for each output channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_pre = weight_norm(nn.Conv1d(8, 20, 7, padding=3))
        self.resblocks = nn.ModuleList([VocoderBlock(20, 14, 1), VocoderBlock(20, 17, 3)])
        self.conv_mid = weight_norm(nn.Conv1d(20, 12, 5, stride=2, padding=2))
        self.conv_post = weight_norm(nn.Conv1d(12, 1, 7, padding=3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_pre(x)
        for block in self.resblocks:
            x = block(x)
        x = self.conv_mid(F.leaky_relu(x, 0.1))
        return torch.tanh(self.conv_post(F.leaky_relu(x)))
