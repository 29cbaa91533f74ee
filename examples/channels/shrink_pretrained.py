"""Halve the arithmetic of a network that somebody trained, with 500 samples and none of their labels.

Run it with `python examples/channels/shrink_pretrained.py`.
"""

import copy
import sys

import lightning as L
import torch
from net import Net, accuracy, fit, images
from torch.utils.data import DataLoader

from lightning_compress import ChannelPruning, Distillation, Snapshot, SoftTarget


class Unlabelled(Net):
    """The same network with the only step that data without labels allows: it is called, and has no loss of its own."""

    def training_step(self, images, batch_idx):
        return self(images).sum() * 0.0

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-4)


pretrained = Net()
fit(pretrained, int(sys.argv[1]) if len(sys.argv) > 1 else 6)  # stands for weeks of somebody's training

model = Unlabelled()
model.load_state_dict(copy.deepcopy(pretrained.state_dict()))
trainer = L.Trainer(
    max_epochs=10,
    accelerator="cpu",
    callbacks=[
        # Channels that the outputs miss least leave at once; what stays is fitted to what the whole network computes.
        ChannelPruning(macs=0.5),
        # Then the network learns from what it was, without labels.
        Distillation(Snapshot(), [SoftTarget(temperature=1.0, weight=1.0)], task_weight=0.0),
    ],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, DataLoader(images[:500], batch_size=64, shuffle=True))

print("\nAccuracy on 597 images")
print(f"as it was trained:                     {accuracy(pretrained)}")
print(f"half of the MACs, 500 unlabelled ones: {accuracy(model)}")
