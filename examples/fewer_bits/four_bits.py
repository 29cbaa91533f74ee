"""Quantize to few bits without training: a classifier of digits, with rounded weights, NF4 and GPTQ.

Run it with `python examples/fewer_bits/four_bits.py`; it takes some seconds.
"""

from __future__ import annotations

import os
import sys

import lightning as L
import torch
from net import Classifier, Digits, trainer

from lightning_compress import GPTQ, PostTrainingQuantization, WeightOnly, load_compressed, save_compressed


def show(name: str, metrics: dict[str, float], path: str) -> None:
    print(
        f"{name:28} accuracy {metrics['accuracy']:.3f}  loss {metrics['loss']:.4f} {os.path.getsize(path):>10,} bytes"
    )


L.seed_everything(0, verbose=False)
model, data = Classifier(), Digits()
trainer(epochs=int(sys.argv[1]) if len(sys.argv) > 1 else 12).fit(model, data)
[metrics] = trainer().test(model, data, verbose=False)
save_compressed(model, "float.ckpt")
show("float32", dict(metrics), "float.ckpt")

schemes = {
    "int8": "int8_weight_only",
    "int4, groups of 128": "int4_weight_only",
    "NF4": "nf4",
    "GPTQ, int4, groups of 128": "gptq",
    "int2, groups of 32": WeightOnly(bits=2, group_size=32, symmetric=False),
    "GPTQ, int2, groups of 32": GPTQ(bits=2, group_size=32, symmetric=False),
}
for name, scheme in schemes.items():
    # GPTQ is calibrated on the datamodule's train loader. The first layer takes 8 bits, and the last stays float.
    quantization = PostTrainingQuantization(scheme, overrides={"body.0": "int8_weight_only"})
    [metrics] = trainer(quantization).test(model, data, verbose=False)
    assert quantization.quantized_model is not None
    save_compressed(quantization.quantized_model, "few_bits.ckpt")
    show(name, dict(metrics), "few_bits.ckpt")

again = load_compressed("few_bits.ckpt", Classifier())  # a freshly built model takes the file's form
assert torch.equal(again(torch.ones(1, 64)), quantization.quantized_model(torch.ones(1, 64)))
