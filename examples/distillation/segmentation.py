"""Distil dense predictions: which of three textures, if any, each pixel of a noisy picture belongs to.

Run it with `python examples/distillation/segmentation.py`.
"""

import sys
from functools import partial

import torch
from plain import Alone, fit
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import DistillationModule, SoftTarget


def pictures(count, seed):
    """Noise with a rectangle of stripes (class 1: across, 2: down) or squares (3) in it; 0 is beside it."""
    draw = torch.Generator().manual_seed(seed)
    images = 0.8 * torch.randn(count, 1, 16, 16, generator=draw)
    classes = torch.zeros(count, 16, 16, dtype=torch.long)
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    textures = [rows // 2 % 2, columns // 2 % 2, (rows // 2 + columns // 2) % 2]
    for image, truth in zip(images, classes, strict=True):
        top, left, kind = torch.randint(8, (3,), generator=draw).tolist()
        height, width = torch.randint(6, 10, (2,), generator=draw).tolist()
        inside = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
        image[0] += inside * (textures[kind % 3] - 0.5)
        truth[inside] = 1 + kind % 3
    return images, classes


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        torch.manual_seed(0)
        self.fine = nn.Sequential(nn.Conv2d(1, width, 4, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.coarse = nn.Sequential(
            *(nn.Conv2d(width, 2 * width, 4, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU()),
            *(nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU()),
            nn.Upsample(scale_factor=2),
        )
        self.head = nn.ConvTranspose2d(3 * width, 4, 4, 2, 1)

    def forward(self, x):  # (B, 1, H, W) to logits of (B, 4, H, W)
        fine = self.fine(x)
        return self.head(torch.cat([fine, self.coarse(fine)], 1))


def iou(network):
    with torch.no_grad():
        found = network(test_images).argmax(1)
    masks = [(found == kind, test_classes == kind) for kind in (1, 2, 3)]
    return f"{sum(float((a & b).sum() / (a | b).sum()) for a, b in masks) / 3:.3f}"


def batches(count):
    return DataLoader(TensorDataset(images[:count], classes[:count]), batch_size=32, shuffle=True)


epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
images, classes = pictures(1600, seed=0)
test_images, test_classes = pictures(400, seed=1)

teacher, alone = Alone(Net(16)), Alone(Net(3))
fit(teacher, batches(1600), epochs)
fit(alone, batches(160), 5 * epochs)

module = DistillationModule(
    student=Net(3),
    teacher=teacher,
    losses=[SoftTarget(temperature=2.0, weight=0.5, class_dim=1)],  # the classes stand behind the batch
    task_weight=0.5,
    optimizer=partial(torch.optim.AdamW, lr=3e-3),
)
fit(module, batches(160), 5 * epochs)
print(f"Intersection over union on {len(test_images)} pictures, mean over the textures")
print(f"teacher, 1600 pictures:            {iou(teacher)}")
print(f"student alone, 160 pictures:       {iou(alone)}")
print(f"distilled on the same 160:         {iou(module)}")
