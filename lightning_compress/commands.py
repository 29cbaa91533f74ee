"""The subcommands of the command line that act on a configuration and a checkpoint, beside Lightning's own."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from lightning_compress.choosing.commands import check_output, run_advise, run_search, run_sensitivity, write
from lightning_compress.choosing.search import check_search
from lightning_compress.errors import CompressionError
from lightning_compress.export.callback import ExportModel, quantizes_tests
from lightning_compress.export.formats import refuse_unready
from lightning_compress.quantization.numerics.scheme import Scheme
from lightning_compress.report.callback import CompressionReport
from lightning_compress.structure.checkpoint import attach
from lightning_compress.structure.files import load_compressed


class CommandTrainer(Trainer):
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
