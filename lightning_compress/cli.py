"""The command line: LightningCLI with this package's names."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any, NoReturn, cast

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, LRSchedulerTypeUnion
from torch.optim import Optimizer

import lightning_compress
from lightning_compress.command_errors import error_line
from lightning_compress.commands import CommandTrainer
from lightning_compress.errors import CompressionError, in_a_line, invalid
from lightning_compress.structure.inert import read_inert

_PROG = "lightning-compress"
_OWN = ("advise", "export", "report", "sensitivity", "search")
"""The subcommands that Lightning has not."""
_OF_THE_TRAINER = ("best", "last", "hpc")
"""The checkpoints that a Trainer finds itself."""
_OF_THE_CLI = ("_class_path", "_instantiator")
"""What LightningCLI adds to the hyperparameters that it saves."""


class _Parser(LightningArgumentParser):
    """A parser that prints errors in a line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error without sixty lines of options, and end with status 2; ``--help`` prints those."""
        if not self.exit_on_error:  # who asks for it reads it
            super().error(message, ex)
        asked = getattr(ex, "subcommand_parser", None) or self
        remedy = f"{asked.prog.replace(' [options]', '')} --help shows what is accepted."
        self.exit(2, f"{_PROG}: error: {error_line(message)} {remedy}\n")


class CompressCLI(LightningCLI):
    """LightningCLI with ``model`` and ``data`` given by ``class_path``, and optimizers that miss no parameter."""

    def __init__(self, args: ArgsType = None, **options: Any) -> None:
        words = sys.argv[1:] if args is None else args
        first = words[0] if isinstance(words, list) and words else None
        self._asked = {first} & self.subcommands().keys() or self.subcommands().keys()
        super().__init__(args=args, **options)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **options: Any) -> LightningArgumentParser:
        """Give their arguments only to the subcommands that can be meant: to build them takes most of a short run.

        A first argument that isn't a subcommand may be a configuration with sections for several.
        """
        if subcommand in self._asked:
            return super()._prepare_subcommand_parser(klass, subcommand, **options)
        self._subcommand_method_arguments[subcommand] = []
        return self.init_parser(**options)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the subcommands, each with the arguments that aren't the user's."""
        return {**LightningCLI.subcommands(), **{name: {"model", "datamodule"} for name in _OWN}}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse ``args``, or the command line where they are None.

        LightningCLI warns if ``args`` are passed in a process that has a command line of its own, which `main` allows.
        """
        self.config = parser.parse_args(cast("list[str] | None", args))
        given = self.config[self.config.subcommand].get("trainer")
        if not isinstance(given, Namespace):  # LightningCLI takes whatever stands there for its arguments
            raise invalid("trainer", "hold arguments of the Trainer, by their names", given)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the Trainer; what Lightning has against its arguments is the user's, and needs no traceback."""
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError, MisconfigurationException) as error:
            if _cause(error) is not None:
                raise
            why = " ".join(str(error).split())
            raise CompressionError(f"`trainer` must hold arguments that Lightning accepts. Received: {why}") from error

    def _parse_ckpt_path(self) -> None:
        """Take hyperparameters from a checkpoint only where they name their class, as those of a LightningCLI do.

        Those that a plain Trainer saved don't, and LightningCLI fails on them (2.5 on the former, too); here the
        configuration alone counts.
        """
        command = self.config.subcommand
        path = self.config[command].get("ckpt_path")
        if not path or (command in _OWN and command != "report"):
            return
        if not (path in _OF_THE_TRAINER or "://" in path or os.path.exists(path)):
            raise invalid("ckpt_path", f"be a file, or one of {', '.join(_OF_THE_TRAINER)}", path, "There is none.")
        hyperparameters = _hyperparameters(path) if os.path.isfile(path) else {}
        if "_class_path" in hyperparameters:
            arguments = {name: value for name, value in hyperparameters.items() if name not in _OF_THE_CLI}
            model = {"class_path": hyperparameters["_class_path"], "dict_kwargs": arguments}
            self.config = self.parser.parse_object({command: {"model": model}}, self.config)

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
    """Run ``lightning-compress fit|validate|test|predict|advise|export|report|sensitivity|search``.

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
            trainer_class=CommandTrainer,
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


def _hyperparameters(path: str) -> dict[str, Any]:
    """Read those of a checkpoint that are plain data."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of objects that are left out: the Trainer reads the file
            checkpoint, _ = read_inert(path, "ckpt_path")
        return cast("dict[str, Any]", checkpoint.get("hyper_parameters", {}))
    except Exception as error:  # torch.load raises a dozen types, by file format
        raise invalid("ckpt_path", "be a readable checkpoint", path, f"{in_a_line(error)}.") from error


def _cause(error: BaseException | None) -> CompressionError | None:
    """Find the error of this package in a chain; jsonargparse wraps what a constructor raises."""
    while error is not None and not isinstance(error, CompressionError):
        error = error.__cause__
    return error
