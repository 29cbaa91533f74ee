"""Files of fits with adapters."""

from __future__ import annotations

from functools import partial

from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging

from tests.quantization.lora.fits import SHORT
from tests.support import fits

fit = partial(fits.fit, max_epochs=3, **SHORT)


AVERAGES = {
    "alone": lambda: [],
    "ema": lambda: [EMAWeightAveraging(decay=0.7)],
    "ema 0.9": lambda: [EMAWeightAveraging(decay=0.9)],
    "ema of parameters": lambda: [EMAWeightAveraging(decay=0.9, use_buffers=False)],
    "averages": lambda: [WeightAveraging()],
}
