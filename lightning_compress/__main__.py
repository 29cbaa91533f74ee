"""The entry of the program: answers ``--help`` at once, and leaves the rest to `lightning_compress.cli`."""

from __future__ import annotations

import sys

HELP = """\
usage: lightning-compress {fit,validate,test,predict,export} [--config FILE] [--ARGUMENT VALUE ...]

Trains, compresses and measures a LightningModule. Compression is done by callbacks of the Trainer:

  ScheduledPruning           zeroes weights on a schedule
  ChannelPruning             removes channels, neurons and heads
  QuantizationAwareTraining  trains for int8, converts when the fit ends
  PostTrainingPruning        zeroes weights when test, validate or predict starts
  PostTrainingQuantization   quantizes when test, validate or predict starts
  QLoRA                      trains adapters on weights of 4 bits
  Distillation               lets a teacher teach the model
  ExportModel                writes the result for onnxruntime, OpenVINO, ExecuTorch
  CompressionReport          measures before and after

Write them into a YAML file, with your own module and data:

  trainer:
    max_epochs: 10
    callbacks:
      - {class_path: lightning_compress.ScheduledPruning, init_args: {sparsity: 0.5}}
      - {class_path: lightning_compress.CompressionReport}
  model: {class_path: my_project.MyModule}
  data: {class_path: my_project.MyData}

and run it, or add a callback to any configuration on the command line:

  lightning-compress fit --config config.yaml
  lightning-compress test --config config.yaml --ckpt_path best.ckpt
  lightning-compress fit --config config.yaml --trainer.callbacks+=ChannelPruning --trainer.callbacks.macs=0.5

Write a checkpoint as a file for another runtime, proven there; such a file can't be loaded back into a module:

  lightning-compress export --config config.yaml --ckpt_path best.ckpt --output model.onnx --target openvino

More:

  lightning-compress fit --help                                     every argument of a subcommand
  lightning-compress fit --trainer.callbacks.help=ChannelPruning    the arguments of one callback
  lightning-compress fit --config config.yaml --print_config        the configuration with all defaults
"""


def main(args: list[str] | None = None) -> None:
    """Run ``lightning-compress``. ``--help`` is answered before Lightning is imported, which takes seconds.

    Args:
        args: the arguments; None takes those of the process.

    Raises:
        SystemExit: with status 2 and a message on stderr for input that can't be honoured.
    """
    given = sys.argv[1:] if args is None else args
    if given in (["-h"], ["--help"]):
        sys.stdout.write(HELP)
    elif not given:
        sys.stderr.write(HELP)
        raise SystemExit(2)
    else:
        from lightning_compress import cli

        cli.main(args)


if __name__ == "__main__":
    main()
