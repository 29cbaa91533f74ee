"""What is fitted to, and what decides whether a fit stays: samples that are held out, and strange ones beside both."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_compress.compensation.hold_out import HoldOut, pieces, split
from lightning_compress.compensation.in_order import Visit
from lightning_compress.compensation.pairs import Call
from lightning_compress.compensation.runner import Runner
from lightning_compress.compensation.strangers import strangers
from lightning_compress.errors import CompressionError
from lightning_compress.modules.agreement import Agreement
from lightning_compress.modules.calls import first_batches, samples_in

_DECIDING = 32
"""So many samples of either kind decide: they run for every layer."""


@dataclass(frozen=True)
class Samples:
    """Holds the batches of a calibration by what they are for.

    Attributes:
        own: that layers are fitted to.
        strange: that layers are fitted to as well, made of half of them: see `strangers`.
        held_out: at least a fifth of the samples.
        strange_held_out: made of these.
    """

    own: list[Any]
    strange: list[Any]
    held_out: list[Any]
    strange_held_out: list[Any]

    @classmethod
    def of(cls, reference: Runner, batches: Sequence[Any], seed: int = 0) -> Samples:
        """Divide batches that run in a model.

        Raises:
            CompressionError: nothing can be held out of them.
        """
        own, held_out = split(batches)
        if not own or not held_out:
            raise CompressionError(
                "`calibration` must give two batches, or a batch of five samples, as some are held out. Received: "
                f"{len(batches)} batches of {sum(map(samples_in, batches))} samples. A few hundred samples are good."
            )
        made = strangers(reference, [*own[: max(1, len(own) // 2)], *held_out], seed)
        return cls(own, made[: -len(held_out)], held_out, made[-len(held_out) :])

    @property
    def all(self) -> list[Any]:
        """All batches, in the order of the attributes."""
        return [*self.own, *self.strange, *self.held_out, *self.strange_held_out]

    def counts(self) -> tuple[int, int]:
        """How many samples layers are fitted to, and how many are held out."""
        return sum(map(samples_in, self.own)), sum(map(samples_in, self.held_out))

    def are_own(self, batches: Tensor) -> Tensor:
        """Whether batches are the calibration's own, by their numbers in `all`."""
        return batches < len(self.own)

    def own_calls(self, visit: Visit) -> list[Call]:
        """The calls of a visit for samples that are the calibration's own."""
        return [call for call in visit.calls if call.batch < len(self.own)]

    def fitted_calls(self, visit: Visit) -> list[Call]:
        """The calls that a layer is fitted to."""
        return [call for call in visit.calls if call.batch < len(self.own) + len(self.strange)]

    def held_out_calls(self, visit: Visit) -> list[Call]:
        """The calls for samples that are held out, strange ones among them."""
        return [call for call in visit.calls if call.batch >= len(self.own) + len(self.strange)]


class Guard:
    """Tells whether a fit stays: the outputs for samples held out come nearer, and for strange ones not less near.

    Args:
        reference: what is to be computed.
        fitted: what is fitted; it is looked at anew at each question.
        samples: that decide.
    """

    def __init__(self, reference: Runner, fitted: Runner, samples: Samples) -> None:
        self._held_out = HoldOut(reference, fitted, samples.held_out)
        self._deciding = [
            HoldOut(reference, fitted, _deciding(batches)) for batches in (samples.held_out, samples.strange_held_out)
        ]
        self.renew()

    def renew(self, changed: Collection[Tensor] | None = None) -> None:
        """Take the outputs as they are now for those of before; what has ``changed`` is as for `HoldOut.error`."""
        self._errors = self._measured(changed)

    def accepts(self, changed: Collection[Tensor] | None = None) -> bool:
        """Whether the outputs are better than before; then they are what the next ones must be better than."""
        own, strange = self._measured(changed)
        if own < self._errors[0] and strange <= self._errors[1]:
            self._errors = [own, strange]
            return True
        return False

    def agreement(self) -> Agreement:
        """How well the outputs for all samples held out agree with the reference's."""
        return self._held_out.agreement()

    def _measured(self, changed: Collection[Tensor] | None) -> list[float]:
        return [hold_out.error(changed) for hold_out in self._deciding]


def _deciding(batches: Sequence[Any]) -> list[Any]:
    cut = (piece for batch in batches for piece in pieces(batch, max(1, samples_in(batch) // _DECIDING)))
    return list(first_batches(cut, _DECIDING))
