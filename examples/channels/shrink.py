"""Reduce the arithmetic of a trained CNN to a quarter: one callback in a second fit.

Run it with `python examples/channels/shrink.py`.
"""

import sys

from net import Net, accuracy, fit, images

from lightning_compress import ChannelPruning, CompressionReport, load_compressed, plan_removal

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 6
model = Net()
fit(model, epochs)
before = accuracy(model)

print("What would leave at once; nothing is touched yet:")
print(plan_removal(model, images[:64], macs=0.25), end="\n\n")

channels = ChannelPruning(macs=0.25)  # a quarter of the multiply-accumulates remains; the rest leaves in rounds
trainer = fit(model, epochs, CompressionReport("demo_output/channels", threads=1), channels)
trainer.save_checkpoint("demo_output/channels/small.ckpt", weights_only=True)
again = load_compressed("demo_output/channels/small.ckpt", Net())  # built at full size, it gets the sizes of the file

print(f"\nThe last of {len(channels.plans)} rounds:\n{channels.plans[-1]}\n")
print("Accuracy on 597 images")
print(f"whole:                 {before}")
print(f"a quarter of the MACs: {accuracy(model)}")
print(f"the same, loaded:      {accuracy(again)}")
