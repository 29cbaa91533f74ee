"""Remove channels, prune and distil in one fit; the teacher is the network before the fit.

Run it with `python examples/channels/prune_cut_distil.py`.
"""

import sys

from net import Net, accuracy, fit

from lightning_compress import ChannelPruning, Distillation, ScheduledPruning, Snapshot, SoftTarget, sparsity

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 6
model = Net()
fit(model, epochs)
before = accuracy(model)

channels = ChannelPruning(macs=0.1)  # a tenth remains
pruning = ScheduledPruning(sparsity=0.5)  # of what remains, half becomes zero: its masks follow the cut
# The teacher is a copy of the network as it is when the fit begins, whole.
teaching = Distillation(Snapshot(), [SoftTarget(temperature=4.0, weight=0.75)], task_weight=0.25)
fit(model, epochs, channels, pruning, teaching)

print(f"\nThe last of {len(channels.plans)} rounds:\n{channels.plans[-1]}\n")
print(f"zeros among what remains: {sparsity(model):.3f}")
print("Accuracy on 597 images")
print(f"whole:                        {before}")
print(f"cut, pruned and distilled:    {accuracy(model)}")
