"""The command line: LightningCLI with this package's names."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any, Literal, cast

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, LRSchedulerTypeUnion
from torch.optim import Optimizer

import lightning_compress
from lightning_compress.choosing.commands import check_output, run_advise, run_search, run_sensitivity, write
from lightning_compress.choosing.search import check_search
from lightning_compress.errors import CompressionError, in_a_line, invalid
from lightning_compress.export.callback import ExportModel, quantizes_tests
from lightning_compress.export.formats import refuse_unready
from lightning_compress.quantization.numerics.scheme import Scheme
from lightning_compress.report.callback import CompressionReport
from lightning_compress.structure.checkpoint import attach
from lightning_compress.structure.files import load_compressed
from lightning_compress.structure.inert import read_inert

_PROG = "lightning-compress"
_OWN = ("advise", "export", "report", "sensitivity", "search")
"""The subcommands that Lightning has not."""
_OF_THE_TRAINER = ("best", "last", "hpc")
"""The checkpoints that a Trainer finds itself."""
_OF_THE_CLI = ("_class_path", "_instantiator")
"""What LightningCLI adds to the hyperparameters that it saves."""


class _Parser(LightningArgumentParser):
    """A parser that prints errors without its usage."""

    def print_usage(self, file: Any = None) -> None:
        """Print nothing: sixty lines of options would bury the error. ``--help`` prints them."""


class _Trainer(Trainer):
    """A Trainer with the subcommands that Lightning has not."""

    def export(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        *,
        ckpt_path: str,
        output: str,
        target: str | None = None,
        module: str = "",
        dynamic: dict[str, list[int]] | None = None,
        dynamic_batch: bool = True,
        verify: bool = True,
        calibration_batches: int = 8,
        weights_only: bool | None = None,
    ) -> None:
        """Write a checkpoint as a file that another runtime runs.

        Args:
            model: of the configuration.
            datamodule: of the configuration.
            ckpt_path: The checkpoint: masked, narrowed, trained for int8, converted, or plain.
            output: Path of the file: .onnx, .pt2 or .pte.
            target: onnxruntime, openvino, tensorrt, torch or executorch.
            module: Dotted path of the module to write; by default what the steps call.
            dynamic: Further dimensions that may vary, by the names of arguments.
            dynamic_batch: Whether the file takes batches of any size.
            verify: Whether the file is compared with the model.
            calibration_batches: How many batches are run to compare, at most.
            weights_only: Stands in configurations of fit; checkpoints are always read so.
        """
        export = ExportModel(output, target, False, module, dynamic, dynamic_batch, verify, calibration_batches)
        if quantizes_tests(self):
            raise CompressionError(
                "`callbacks` must hold no PostTrainingQuantization to export a checkpoint. Received: one, which works "
                "in a test. Add ExportModel to the callbacks, and run: lightning-compress test."
            )
        refuse_unready(export.path, export.target)
        self._load(model, datamodule, ckpt_path)
        export.write(self, model)

    def report(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        *,
        ckpt_path: str,
        directory: str | None = None,
        stage: Literal["test", "validate"] = "test",
        weights_only: bool | None = None,
    ) -> None:
        """Measure the model of the configuration and what a checkpoint makes of it, and write the report.

        Args:
            model: of the configuration.
            datamodule: of the configuration.
            ckpt_path: The checkpoint: masked, narrowed, trained for int8, or converted.
            directory: Folder of the report; by default that of the CompressionReport among the callbacks, or the log's.
            stage: By which evaluation the checkpoint's metrics are measured.
            weights_only: Whether the checkpoint is read without running code from it, as torch.load has it.
        """
        callbacks: list[Callback] = self.callbacks  # type: ignore[attr-defined]
        report = next((callback for callback in callbacks if isinstance(callback, CompressionReport)), None)
        if report is None:
            report = CompressionReport(directory)
            callbacks.append(report)
        report.directory = directory or report.directory
        attach(model)  # so that what is read has the structure that the checkpoint tells of
        reads: dict[str, Any] = {} if weights_only is None else {"weights_only": weights_only}
        getattr(self, stage)(model, datamodule=datamodule, ckpt_path=ckpt_path, **reads)

    def sensitivity(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        *,
        ckpt_path: str,
        monitor: str,
        of: Literal["int8", "weights", "pruning", "channels"] = "int8",
        levels: list[str | float | Scheme] | None = None,
        method: Literal["taylor", "measured"] = "taylor",
        mode: Literal["max", "min"] = "max",
        top: int = 8,
        max_drop: float = 0.01,
        output: str | None = None,
        resume: str | None = None,
        calibration_batches: int = 8,
        weights_only: bool | None = None,
    ) -> None:
        """Say what each layer of a checkpoint costs when it alone is compressed.

        Args:
            model: of the configuration.
            datamodule: of the configuration.
            ckpt_path: The checkpoint of the float model.
            monitor: The metric that the validation logs.
            of: What each layer is to be: in int8, with weights of few bits, with zeros, with fewer channels.
            levels: Schemes, or fractions of zeros or of channels that stay; by default some of each.
            method: taylor evaluates only the layers with the largest scores, measured all.
            mode: max where more of the metric is better.
            top: With taylor, so many layers are evaluated.
            max_drop: What a layer alone may cost in the YAML that is printed.
            output: Path of the table: .json, .csv, or a picture, .png or .svg.
            resume: Path of a file of JSON lines with which an interrupted run goes on.
            calibration_batches: How many batches the scores rest on, at most.
            weights_only: Stands in configurations of fit; checkpoints are always read so.
        """
        check_output(output, (".json", ".csv", ".png", ".svg"))
        self._load(model, datamodule, ckpt_path)
        options = (of, levels, method, mode, top, calibration_batches, resume)
        table = run_sensitivity(self, model, monitor, *options)
        print(table)
        print(f"\n# layers that alone cost no more than {max_drop}\n{table.to_yaml(max_drop)}", end="")
        write(table, output)

    def search(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        *,
        ckpt_path: str,
        monitor: str,
        over: Literal["int8", "weights", "pruning", "channels"] = "weights",
        budget: float | None = None,
        max_drop: float | None = None,
        cost: Literal["bytes", "params", "macs", "latency"] | None = None,
        levels: list[str | float | Scheme] | None = None,
        mode: Literal["max", "min"] = "max",
        output: str | None = None,
        resume: str | None = None,
        calibration_batches: int = 8,
        weights_only: bool | None = None,
    ) -> None:
        """Choose for each layer of a checkpoint how far it is compressed, and print the callback that does it.

        Args:
            model: of the configuration.
            datamodule: of the configuration.
            ckpt_path: The checkpoint of the float model.
            monitor: The metric that the validation logs.
            over: What is chosen: layers in int8, schemes of weights, sparsities, or channels.
            budget: The fraction of the cost that remains; this or max_drop.
            max_drop: How far the metric may fall; this or budget.
            cost: bytes, params (that aren't zero), macs (in float), or latency, measured here on the first batch.
            levels: Schemes, or fractions of zeros or of channels that stay; by default some of each.
            mode: max where more of the metric is better.
            output: Path of the result: .json, or a picture, .png or .svg.
            resume: Path of a file of JSON lines with which an interrupted run goes on.
            calibration_batches: How many batches the scores rest on, at most.
            weights_only: Stands in configurations of fit; checkpoints are always read so.
        """
        check_output(output, (".json", ".png", ".svg"))
        check_search(over, budget, max_drop, cost, mode)
        self._load(model, datamodule, ckpt_path)
        options = (over, budget, max_drop, cost, levels, mode, calibration_batches, resume)
        result = run_search(self, model, monitor, *options)
        print(result)
        print(f"\n{result.to_yaml()}", end="")
        write(result, output)

    def advise(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        *,
        ckpt_path: str,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        seconds: float = 120.0,
        weights_only: bool | None = None,
    ) -> None:
        """Try the usual ways on a checkpoint for two minutes, and say which are worth it, with the YAML for the best.

        Args:
            model: of the configuration.
            datamodule: of the configuration.
            ckpt_path: The checkpoint of the float model.
            monitor: A metric that the validation logs, to be compared too.
            mode: max where more of the metric is better.
            seconds: No trial begins after so many.
            weights_only: Stands in configurations of fit; checkpoints are always read so.
        """
        self._load(model, datamodule, ckpt_path)
        print(run_advise(self, model, monitor, mode, seconds))

    def _load(self, model: LightningModule, datamodule: LightningDataModule | None, ckpt_path: str) -> None:
        """Set data and module up as a test does, and load the checkpoint."""
        self.strategy._lightning_module = model
        model.trainer = self
        if datamodule is not None:
            self.datamodule = datamodule
            datamodule.trainer = self
        for source in (model, datamodule):
            if source is not None:
                source.prepare_data()
        for source in (datamodule, model):
            if source is not None:
                source.setup("test")
        load_compressed(ckpt_path, model)


class CompressCLI(LightningCLI):
    """LightningCLI with ``model`` and ``data`` given by ``class_path``, and optimizers that miss no parameter."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the subcommands, each with the arguments that aren't the user's."""
        return {**LightningCLI.subcommands(), **{name: {"model", "datamodule"} for name in _OWN}}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse ``args``, or the command line where they are None.

        LightningCLI warns if ``args`` are passed in a process that has a command line of its own, which `main` allows.
        """
        self.config = parser.parse_args(cast("list[str] | None", args))

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
            trainer_class=_Trainer,
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
