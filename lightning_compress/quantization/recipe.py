"""What to quantize with: the arguments of `quantize` and `PostTrainingQuantization`, checked."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lightning_compress.errors import invalid
from lightning_compress.quantization.layers.packed import packable
from lightning_compress.quantization.numerics.scheme import Scheme
from lightning_compress.quantization.schemes import resolve
from lightning_compress.targets import Targets

Overrides = Mapping[str, str | Scheme]
"""Pattern of layers' paths to the scheme that they get; the last match wins."""


def check_overrides(overrides: Overrides | None) -> dict[str, Scheme]:
    """Resolve the schemes of ``overrides``.

    Raises:
        CompressionError: one of them names no scheme, or a static one, which isn't chosen layer by layer.
    """
    if not isinstance(overrides or {}, Mapping):
        raise invalid("overrides", "be a mapping from patterns to schemes", overrides)
    resolved = {pattern: resolve(value) for pattern, value in (overrides or {}).items()}
    for pattern, value in resolved.items():
        if value.whole:
            raise invalid(
                "overrides",
                "name schemes that work layer by layer",
                {pattern: value},
                "Make the static scheme the `scheme`, and override the others.",
            )
    return resolved


def check_flow(flow: str, scheme: Scheme) -> None:
    """Raise `CompressionError` if there is no such flow, or none for a scheme.

    A flow is the way from a module to static int8. There is one: ``pt2e``, through `torch.export`.
    """
    if flow not in ("auto", "pt2e"):
        remedy = "torch's `fx` goes with torch.ao. Leave `flow` out." if flow == "fx" else ""
        raise invalid("flow", "be 'auto' or 'pt2e'", flow, remedy)
    if flow != "auto" and not scheme.whole:
        raise invalid("flow", "be 'auto' for a scheme that works layer by layer", flow)


class Recipe:
    """Checks what to quantize with; the arguments are those of `quantize`.

    Raises:
        CompressionError: one of them is wrong.
    """

    def __init__(
        self,
        scheme: str | Scheme,
        calibration_batches: int,
        targets: Targets | None,
        overrides: Overrides | None,
        flow: str,
    ) -> None:
        self.scheme = resolve(scheme)
        if not isinstance(targets, Targets | None):
            raise invalid("targets", "be a Targets", targets, "Write Targets(include=[...]).")
        self.targets = targets
        self.overrides = check_overrides(overrides)
        check_flow(flow, self.scheme)
        if not isinstance(calibration_batches, int) or calibration_batches < 1:
            raise invalid("calibration_batches", "be at least 1", calibration_batches)
        self.calibration_batches = calibration_batches
        schemes = (self.scheme, *self.overrides.values())
        self.calibrates = [used for used in schemes if used.calibrates]
        self.decides_per_token = any(used.decides_per_token for used in schemes)
        self.needs_cpu = any(used.needs_cpu for used in schemes)

    def only_read(self, model: nn.Module) -> list[nn.Parameter]:
        """Find parameters that a copy to be quantized may share with ``model``, so that none is in memory twice."""
        if self.needs_cpu:
            return []
        written = {id(layer.weight) for layer in model.modules() if getattr(layer, "max_norm", None) is not None}
        found = (parameter for layer in model.modules() for parameter in packable(layer))
        return [parameter for parameter in found if id(parameter) not in written]
