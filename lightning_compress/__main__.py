"""The entry of the program: answers ``--help`` at once, and leaves the rest to `lightning_compress.cli`."""

from __future__ import annotations

import sys

HELP = """\
usage: lightning-compress {fit,validate,test,predict,advise,export,report,sensitivity,search} [--config FILE] [...]
       lightning-compress report RUN.json [RUN.json] [--output FILE]

Trains, compresses and measures a LightningModule. Compression is done by callbacks of the Trainer:

  ScheduledPruning           zeroes weights on a schedule
  ChannelPruning             removes channels, neurons and heads
  QuantizationAwareTraining  trains for int8, converts when the fit ends
  PostTrainingPruning        zeroes weights when test, validate or predict starts
  PostTrainingQuantization   quantizes when test, validate or predict starts
  QLoRA                      trains adapters on weights of 4 bits
  Distillation               lets a teacher teach the model
  AccuracyGuard              keeps a metric from falling too far
  PhaseCheckpoint            saves the best dense, pruned or quantized model
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

Ask what to try first, and what not to bother with; it takes two minutes:

  lightning-compress advise --config config.yaml --ckpt_path best.ckpt

Ask which layers hurt, and let a choice be made for each, by your own validation:

  lightning-compress sensitivity --config config.yaml --ckpt_path best.ckpt --monitor val_acc --of int8
  lightning-compress search --config config.yaml --ckpt_path best.ckpt --monitor val_acc --over weights --max_drop 0.01

Measure a checkpoint beside the model that the configuration builds, and write a report:

  lightning-compress report --config config.yaml --ckpt_path best.ckpt

Draw a report again, or what the second of two runs brought:

  lightning-compress report first/report.json second/report.json --output difference.html

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
    elif given[0] == "report" and not any(_is_of_the_cli(argument) for argument in given[1:]):
        from lightning_compress.report import command

        command.main(given[1:])
    else:
        from lightning_compress import cli

        cli.main(args)


def _is_of_the_cli(argument: str) -> bool:
    """Tell an argument of a configuration, with which a checkpoint is measured, from those that draw a report again."""
    return argument.startswith("-") and argument.partition("=")[0] not in ("-h", "--help", "--output")


if __name__ == "__main__":
    main()
