"""From nothing compressed to all of it, in steps that lose least for what they save. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Choice = dict[str, str]
_MOST = 4000
_STARTS = 16
"""So many choices within a budget are improved: of few layers, a step further may leave room for a better one."""


@dataclass(frozen=True)
class Steps:
    """Holds the choices on the way.

    Attributes:
        choices: from the empty one on, each with one more layer at another level.
        costs: what they cost, falling.
        errors: sums of their layers' predicted errors.
        error: such a sum of any choice.
        improve: gives room within a cost back, one layer at a time.
    """

    choices: tuple[Choice, ...]
    costs: tuple[float, ...]
    errors: tuple[float, ...]
    error: Callable[[Choice], float]
    improve: Callable[[Choice, float], Choice]

    @property
    def last(self) -> Choice:
        """The choice that costs least."""
        return self.choices[-1]

    def within(self, cost: float) -> Choice | None:
        """Return the best of the first choices that cost no more, with what room is left given back; None if none."""
        places = [place for place, reached in enumerate(self.costs) if reached <= cost * (1 + 1e-9)][:_STARTS]
        return min((self.improve(self.choices[place], cost) for place in places), key=self.error, default=None)

    def spread(self, count: int) -> list[Choice]:
        """Return some choices that are evenly spread over the way, without the empty one."""
        last = len(self.choices) - 1
        return [self.choices[place] for place in sorted({round(last * part / count) for part in range(1, count + 1)})]


def greedy(
    layers: Mapping[str, Sequence[str]],
    errors: Mapping[tuple[str, str], float],
    cost: Callable[[Mapping[str, str]], float],
) -> Steps:
    """Take the step with the least more error for what it saves, again and again, until nothing saves more.

    Args:
        layers: with the levels that each can have.
        errors: of each layer alone at each level; they are added up.
        cost: of a choice; it need not be a sum.

    Example:
        >>> sizes = {"x": 1.0, "y": 0.4}
        >>> steps = greedy(
        ...     {"a": ["x", "y"], "b": ["x"]},
        ...     {("a", "x"): 1.0, ("a", "y"): 9.0, ("b", "x"): 4.0},
        ...     lambda choice: sum(sizes.get(choice.get(layer), 2.0) for layer in "ab"),
        ... )
        >>> [sorted(choice.items()) for choice in steps.choices]
        [[], [('a', 'x')], [('a', 'x'), ('b', 'x')], [('a', 'y'), ('b', 'x')]]
    """
    choice, here = Choice(), cost({})
    choices, costs, sums = [dict(choice)], [here], [0.0]

    def error(layer: str, given: Mapping[str, str]) -> float:
        return errors[layer, given[layer]] if layer in given else 0.0

    while len(choices) < _MOST:
        best: tuple[float, float, str, str] | None = None
        for layer, levels in layers.items():
            for level in levels:
                saved = here - cost({**choice, layer: level})
                if saved > 1e-9 * max(here, 1.0):
                    ratio = (errors[layer, level] - error(layer, choice)) / saved
                    if best is None or (ratio, -saved) < best[:2]:
                        best = ratio, -saved, layer, level
        if best is None:
            break
        _, saved, layer, level = best
        sums.append(sums[-1] + errors[layer, level] - error(layer, choice))
        choice[layer] = level
        here += saved
        choices.append(dict(choice))
        costs.append(here)

    def improve(given: Choice, most: float) -> Choice:
        """Take the change of one layer that makes the error least within a cost, as long as there is one."""
        found = dict(given)
        for _ in range(_MOST):
            gains = []
            for layer in found:
                others = {name: level for name, level in found.items() if name != layer}
                ways: list[Choice] = [others, *({**others, layer: level} for level in layers[layer])]
                for way in ways:
                    gain = error(layer, found) - error(layer, way)
                    if gain > 0 and cost(way) <= most * (1 + 1e-9):
                        gains.append((gain, way))
            if not gains:
                return found
            found = max(gains, key=lambda item: item[0])[1]
        return found

    def total(given: Mapping[str, str]) -> float:
        return sum(errors[key] for key in given.items())

    return Steps(tuple(choices), tuple(costs), tuple(sums), total, improve)
