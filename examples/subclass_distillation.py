"""Distil with batches and a task loss of your own: subclass DistillationModule and override the parts that differ.

Run it with `python examples/subclass_distillation.py`.
"""

import sys
from functools import partial

import lightning as L
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_compress import DistillationModule, SoftTarget


class MyDistillation(DistillationModule):
    def split_batch(self, batch):
        # What goes into both models, and what the task loss compares with. By default a batch is a pair of these.
        return batch["features"], batch["label"]

    def compute_task_loss(self, outputs, targets):
        # Cross-entropy by default; here mistakes on class 0 cost three times as much.
        return cross_entropy(outputs, targets, weight=torch.tensor([3.0, 1.0, 1.0]))


def mlp(width):
    return torch.nn.Sequential(torch.nn.Linear(8, width), torch.nn.ReLU(), torch.nn.Linear(width, 3))


torch.manual_seed(0)
features = torch.randn(600, 8)
labels = features[:, :3].argmax(1)

teacher = mlp(256)  # in your project it is trained already, or `teacher_checkpoint="teacher.ckpt"` names its file
optimizer = torch.optim.Adam(teacher.parameters(), lr=0.01)
for _ in range(100):
    optimizer.zero_grad()
    cross_entropy(teacher(features), labels).backward()
    optimizer.step()

module = MyDistillation(
    student=mlp(8),
    teacher=teacher,
    losses=[SoftTarget(temperature=2.0)],
    task_weight=0.5,
    optimizer=partial(torch.optim.AdamW, lr=0.01),
)
epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False)
batches = DataLoader([{"features": x, "label": y} for x, y in zip(features, labels, strict=True)], batch_size=32)
trainer.fit(module, batches)
print(trainer.validate(module, batches, verbose=False))
trainer.save_checkpoint("demo_output/subclass_distillation.ckpt", weights_only=True)
print("The student is in demo_output/subclass_distillation.ckpt; the teacher is in no file.")
