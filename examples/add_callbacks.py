"""Make a model that you already have smaller and faster: add callbacks to its Trainer, change nothing else.

Run it with `python examples/add_callbacks.py`.
"""

import sys

import lightning as L
from digits.data import Digits  # this example borrows data and model from its neighbour; yours come from your project
from digits.networks import Classifier, Student

from lightning_compress import CompressionReport, QuantizationAwareTraining, ScheduledPruning

model, data = Classifier(Student()), Digits()  # any LightningModule, any data
trainer = L.Trainer(
    max_epochs=int(sys.argv[1]) if len(sys.argv) > 1 else 10,
    accelerator="cpu",
    callbacks=[
        ScheduledPruning(sparsity=0.5),  # half of the weights become zero while the model trains
        QuantizationAwareTraining(),  # it learns to live with int8, and is int8 when the fit ends
        CompressionReport("demo_output/add_callbacks", threads=1),  # before and after, measured
    ],
    logger=False,
    enable_checkpointing=False,
)
trainer.fit(model, data)
trainer.test(model, data)  # tests the int8 model
print("Look at demo_output/add_callbacks/report.md.")
