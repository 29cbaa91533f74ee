"""The command line: LightningCLI with this package's names."""

from __future__ import annotations

import os
import sys
from typing import Any, cast

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, LRSchedulerTypeUnion
from torch.optim import Optimizer

import lightning_compress
from lightning_compress.errors import CompressionError

_PROG = "lightning-compress"


class _Parser(LightningArgumentParser):
    """A parser that prints errors without its usage."""

    def print_usage(self, file: Any = None) -> None:
        """Print nothing: sixty lines of options would bury the error. ``--help`` prints them."""


class CompressCLI(LightningCLI):
    """LightningCLI with ``model`` and ``data`` given by ``class_path``, and optimizers that miss no parameter."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse ``args``, or the command line where they are None.

        LightningCLI warns if ``args`` are passed in a process that has a command line of its own, which `main` allows.
        """
        self.config = parser.parse_args(cast("list[str] | None", args))

    @staticmethod
    def configure_optimizers(
        lightning_module: LightningModule, optimizer: Optimizer, lr_scheduler: LRSchedulerTypeUnion | None = None
    ) -> Any:
        """Add the parameters that were made after the optimizer, then do as LightningCLI does.

        ``--optimizer`` is built together with the model. Parameters that ``setup`` makes, such as the regressors of a
        feature loss, come later and would stay untrained without a word.
        """
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        added = [parameter for parameter in lightning_module.parameters() if id(parameter) not in held]
        # Into the first group: a scheduler holds one base rate for each group and would not know of another one.
        optimizer.param_groups[0]["params"].extend(added)
        return LightningCLI.configure_optimizers(lightning_module, optimizer, lr_scheduler)


def main(args: list[str] | None = None) -> None:
    """Run ``lightning-compress fit|validate|test|predict``.

    Classes are named by their import path (``lightning_compress.ScheduledPruning``, ``my_project.MyModule``) or, for
    those of this package and of Lightning, by their short name. Modules in the current folder can be imported.
    The configuration that was used, defaults included, is saved as ``resolved_config.yaml`` in the log folder.

    Args:
        args: the arguments; None takes those of the process.

    Raises:
        SystemExit: with status 2 and a message on stderr, no traceback, for input that can't be honoured.
    """
    for name in lightning_compress.__all__:
        getattr(lightning_compress, name)  # jsonargparse finds by their short names the classes that are imported
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as `python -m` does; a console script gets its own folder there instead
    try:
        CompressCLI(
            args=args,
            parser_class=_Parser,
            # Without a logger this goes to the current folder, where the user's own config.yaml may stand.
            save_config_kwargs={"config_filename": "resolved_config.yaml", "overwrite": True},
            seed_everything_default=0,  # what LightningCLI falls back to, with a warning
            parser_kwargs={"prog": _PROG, "description": "Train and compress with Lightning."},
        )
    except ValueError as error:
        cause = _cause(error)
        if cause is None:
            raise
        sys.stderr.write(f"{_PROG}: error: {cause}\n")
        raise SystemExit(2) from error


def _cause(error: BaseException | None) -> CompressionError | None:
    """Find the error of this package in a chain; jsonargparse wraps what a constructor raises."""
    while error is not None and not isinstance(error, CompressionError):
        error = error.__cause__
    return error
