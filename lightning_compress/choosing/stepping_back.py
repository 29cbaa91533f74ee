"""How few of a quantized model's worst layers have to go back, so that a metric keeps its floor?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from lightning_compress.callback import Candidate
from lightning_compress.choosing.paired import Fall, Group, student_t, unit_of
from lightning_compress.errors import CompressionError, invalid
from lightning_compress.messages import named
from lightning_compress.report.storage import file_bytes

_NAMED = 5
MANY = 1000
"""Groups, by which the noise is known."""


def fewest(most: int, passes: Callable[[int], bool]) -> int | None:
    """Return the least count from 1 to ``most`` that ``passes``, if all beyond one that does pass; None if none does.

    Counts are doubled until one passes, and halved into what lies between: ``2 log2(most) + 1`` trials at most.

    Example:
        >>> trials = []
        >>> fewest(50, lambda count: trials.append(count) or count >= 6), trials
        (6, [1, 2, 4, 8, 6, 5])
    """
    if most < 1:
        return None
    failed, count = 0, 1
    while not passes(count):
        if count == most:
            return None
        failed, count = count, min(2 * count, most)
    while count - failed > 1:
        middle = (failed + count) // 2
        if passes(middle):
            count = middle
        else:
            failed = middle
    return count


@dataclass
class SteppingBack:
    """Puts the worst layers of a quantized model back until the fall of a metric is within ``max_drop``.

    Args:
        monitor: the name of the metric, for messages.
        max_drop: what `Fall.bound` may be at most, in the metric's own unit.
        mode: ``max`` where more is better, or ``min``.
        min_samples: see `AccuracyGuard`.
        fallback: the scheme that layers get first, before they get ``float``.

    Attributes:
        lines: what was tried and what it cost, for the log and the report.
    """

    monitor: str
    max_drop: float
    mode: str
    min_samples: int | None
    fallback: str
    lines: list[str] = field(default_factory=list)

    def choose(self, candidate: Candidate, evaluate: Callable[[object], list[Group]]) -> Candidate:
        """Return the candidate, or the one like it with the fewest of its worst layers put back, that keeps the floor.

        Layers are ordered by the error of the outputs that each causes alone; the counts that are tried are those of
        `fewest`.

        Args:
            candidate: everything in few bits.
            evaluate: gives the metric of a model by group of samples; called once for the float model and once for
                each candidate.

        Raises:
            CompressionError: the data are too few to tell, or nothing suffices.
        """
        floats = evaluate(candidate.floats)
        self.check_samples(floats)
        fall = self._fall(floats, evaluate(candidate.model))
        self.lines = [f"{self.monitor} is {fall.before:.4g} in float, {fall.after:.4g} in {candidate.scheme}: {fall}"]
        if fall.bound <= self.max_drop:
            return candidate
        errors = candidate.errors()
        order = sorted(errors, key=lambda path: -errors[path])
        bytes_before, _ = file_bytes(candidate.model)
        kept: list[Candidate] = []  # the last one that passed, which has the fewest
        seen = [fall]

        def passes(count: int, scheme: str) -> bool:
            said = f"{named(order[:count])} in {scheme}"
            try:
                other = candidate.without(order[:count], scheme)
            except CompressionError as error:  # what is left can't be quantized alone
                self.lines.append(f"{said}: {error}")
                return False
            seen.append(self._fall(floats, evaluate(other.model)))
            ratio = candidate.ratio(other)
            cost = f"{file_bytes(other.model)[0] - bytes_before:+,} bytes"
            cost += "" if ratio is None else f", {ratio:.2f} times as long"
            self.lines.append(f"{said} ({cost}): {seen[-1]}")
            if seen[-1].bound <= self.max_drop:
                kept[:] = [other]
                return True
            return False

        for scheme in dict.fromkeys((self.fallback, "float")):
            most = len(order) - (scheme == "float")
            if fewest(most, partial(passes, scheme=scheme)) is not None:
                return kept[0]
        raise self._nothing(order, seen[-1], candidate.scheme)

    def check_samples(self, groups: list[Group]) -> None:
        """Raise if the data couldn't prove ``max_drop`` even where no sample changed."""
        if len(groups) < 2:
            must, remedy = "give at least 2 batches, whose differences tell the noise", "Use smaller batches."
            raise invalid("val_dataloader", must, len(groups), remedy)
        self.check_count(sum(group.samples for group in groups), len(groups), unit_of(groups))

    def check_count(self, samples: int, groups: int = MANY, unit: float = 1.0) -> None:
        """Raise if so many samples couldn't prove ``max_drop``."""
        if self.min_samples is not None:
            if samples < self.min_samples:
                must = f"be at most the samples of validation, {samples:,}"
                raise invalid("min_samples", must, self.min_samples, "Validate on more data.")
            return
        still = Fall(0.0, 0.0, 0.0, 0.0, samples, student_t(groups - 1), unit)
        if still.bound > self.max_drop:
            raise invalid(
                "max_drop",
                f"be one that {samples:,} samples of validation can prove",
                self.max_drop,
                f"Where not one of them changes, {self.monitor} may still fall by {still.bound:.2g} on others; "
                f"{still.needed(self.max_drop):,} would do. Validate on more data, allow more, or say how many you "
                "trust: min_samples.",
            )

    def _fall(self, before: list[Group], after: list[Group]) -> Fall:
        return Fall.between(before, after, self.mode, unit_of(before) if self.min_samples is None else 0.0)

    def _nothing(self, order: list[str], fall: Fall, scheme: str) -> CompressionError:
        worst = f"the layers that change the outputs most are {named(order[:_NAMED])}"
        needed = fall.needed(self.max_drop)
        remedy = "Train it so (QuantizationAwareTraining), or allow more."
        if needed is not None:
            remedy = f"For so small a fall some {needed:,} samples would do; or allow more."
        return invalid(
            "max_drop",
            f"be one that {scheme} can keep",
            self.max_drop,
            f"With all but `{order[-1]}` in float, {self.monitor} has {fall}; {worst}. {remedy}",
        )
