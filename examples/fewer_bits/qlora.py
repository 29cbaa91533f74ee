"""Fine-tune by QLoRA: a classifier learns digits that lie on their side, with its own weights frozen in 4 bits.

Run it with `python examples/fewer_bits/qlora.py`; it takes some seconds.
"""

from __future__ import annotations

import os
import sys

import lightning as L
from net import Classifier, Digits, trainer

from lightning_compress import QLoRA, load_compressed

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 12
L.seed_everything(0, verbose=False)
model, turned = Classifier(), Digits(turned=True)
trainer(epochs=epochs).fit(model, Digits())
[before] = trainer().test(model, turned, verbose=False)

# The head is small and trains as it is; everything else is frozen, with adapters of rank 8 over 4-bit weights.
qlora = QLoRA(rank=8, alpha=16, modules_to_train=["head"])
tuning = trainer(qlora, epochs=epochs)
tuning.fit(model, turned)
[after] = trainer().test(model, turned, verbose=False)
print(f"accuracy on turned digits: {before['accuracy']:.3f} before, {after['accuracy']:.3f} after")

tuning.save_checkpoint("qlora.ckpt", weights_only=True)
print(f"{sum(one.numel() for one in model.parameters() if one.requires_grad):,} parameters train; ", end="")
print(f"the checkpoint has {os.path.getsize('qlora.ckpt'):,} bytes, 4-bit weights included")

again = load_compressed("qlora.ckpt", Classifier())  # with its adapters, to be used or trained on
plain = qlora.merge()  # an ordinary Classifier with float weights
for name, module in (("loaded", again), ("merged", plain)):
    [metrics] = trainer().test(module, turned, verbose=False)
    print(f"{name}: {metrics['accuracy']:.3f}")
