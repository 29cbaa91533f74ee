"""What a scheme answers for itself, so that nobody else asks which one it is."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_compress.errors import invalid
from lightning_compress.modules.routing import Form, StoredWeight

_DYNAMIC = (nn.LSTM, nn.GRU, nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)


class Scheme(ABC):
    """Says which numbers a quantized layer computes with, and what others ask about that: the base of all schemes.

    A scheme of your own is a frozen dataclass of plain values on this base, with a ``name``, `why_not` and `form`. It
    is given as an object, by its import path (``"my_package.MyScheme"``), or in YAML as a ``class_path``. Checkpoints
    name that path: import its module before you load one, as files run no code.

    Attributes:
        name: in logs and reports.
        whole: whether it takes traced units, as static int8 does alone, and not layer by layer.
        calibrates: whether it needs batches.
        fits: whether `fit` rounds a weight for the inputs that its layer gets from calibration batches.
        needs_cpu: whether its forms compute on the CPU alone. If not, a model isn't copied as a whole to be quantized,
            so `form` must only read the layer's parameters.
        reduced: whether weights have 7 bits, where this CPU decides about a ``reduce_range`` of None.
        spares_embeddings: whether embeddings are left out unless they are named.
        spares_last_layer: whether the last layer is.
        decides_per_token: whether a batch decides which of its layers have a scale for each token.
    """

    name: str
    whole = False
    calibrates = False
    fits = False
    needs_cpu = True
    reduced = False
    spares_embeddings = False
    spares_last_layer = False
    decides_per_token = False

    def why_not(self, layer: nn.Module) -> str:
        """Say why a layer of torch can have no `form`; empty if it can.

        Asked about are Linear, Conv1d to Conv3d, Embedding, LSTM, GRU, RNN and MultiheadAttention.
        """
        return f"no {self.name} kernel for {type(layer).__name__}"

    def form(self, layer: Any, weights: Mapping[str, Any] = MappingProxyType({})) -> Form:
        """Make the form that computes in the place of a float ``layer``, which isn't changed.

        Its ``weights`` take the place of the layer's parameters of these names; what else it needs, such as a bias, it
        reads from the layer, with which it is called: ``form(layer, *args)``.

        Args:
            layer: float, one for which `why_not` has no reason.
            weights: quantized weights that are known already, as `fit` made them or another layer has them; by the part
                of the layer, which is ``""`` for its ``weight``, and of attention ``in_proj.0`` to ``in_proj.2`` (for
                queries, keys and values) and ``out_proj``.
        """
        raise NotImplementedError

    def fit(self, weight: Tensor, hessian: Tensor) -> StoredWeight:
        """Return the quantized weight of a layer that gets such inputs.

        Args:
            weight: float; as a matrix, ``(rows, columns)``, it is ``weight.flatten(1)``.
            hessian: ``X^T X`` of the inputs, ``(groups, columns, columns)``.
        """
        raise NotImplementedError

    def no_kernel(self, layer: nn.Module | None) -> str:
        """Say why a layer that `why_not` isn't asked about stays float."""
        kind = "it" if layer is None else type(layer).__name__
        if layer is not None and is_parametrized(layer):
            return f"the weight of this {kind} is computed by a parametrization"
        remedy = " (`overrides` can give it int8_dynamic)" if type(layer) in _DYNAMIC else ""
        return f"no {self.name} kernel for {kind}{remedy}"

    def note(self) -> str:
        """Say what users should know of its layers, for the log and the report; empty if nothing."""
        return ""

    def warning(self) -> str:
        """Say why weights that were stored in this scheme aren't right on this CPU; empty if they are."""
        return ""

    # While a model trains.

    def check_trains(self) -> None:
        """Raise `CompressionError` if `QuantizationAwareTraining` can't train with it."""
        raise invalid("scheme", "be int8_static or weight-only for training", self, "Use 'int8_static'.")

    def why_rounded_last(self, layer: nn.Module) -> str:
        """Say why a layer trains in float and is rounded afterwards only; empty if it has a `training_form`."""
        return f"no fake-quantizer for {self.name}"

    def training_form(self, layer: nn.Module) -> Form:
        """Make the form that computes in the place of ``layer`` while its parameters, the same objects, train."""
        raise NotImplementedError

    def trained_weight(self, form: Any, layer: nn.Module) -> StoredWeight:
        """Return the weight of ``layer`` in the codes that it trained with in such a form."""
        raise NotImplementedError
