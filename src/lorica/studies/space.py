"""What a search may choose from: a grid of points, or the range of every parameter.

A point is a dict of JSON values, parameter -> value, in the order in which the parameters were named.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lorica.errors import ConfigError
from lorica.randomness import python_generator

Point = dict[str, Any]
Kind = Literal["float", "int", "log", "categorical"]
MAX_LISTED = 100_000  # points that are held as a list
MAX_CORNERS = 1024


def grid_points(grid: Mapping[str, Sequence[Any]]) -> list[Point]:
    """Every combination of the values, the last parameter changing fastest.

    Raises ConfigError for a grid without points, a value given twice, or more points than MAX_LISTED.
    """
    for name, values in grid.items():
        texts = [json.dumps(value) for value in values]
        twice = next((text for text in texts if texts.count(text) > 1), None)
        if twice is not None or not values:
            said = "no value" if twice is None else f"{twice} twice"
            raise ConfigError(f"search.grid.{name} has {said}: give each value once")
    num_points = math.prod(map(len, grid.values()))
    if not grid or num_points > MAX_LISTED:
        raise ConfigError(f"search.grid has {num_points if grid else 0} points: give from 1 to {MAX_LISTED}")
    return _product(grid)


def key(point: Point) -> str:
    """A text that equal points share, whatever the order of their parameters; 1, 1.0 and true differ."""
    return json.dumps(point, sort_keys=True)


@dataclass(frozen=True)
class Parameter:
    """One parameter: a range (float, int, or log for a float on a logarithmic scale) or a choice (categorical)."""

    name: str
    kind: Kind
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem is not None:
            raise ConfigError(f"search.space.{self.name} of type={self.kind} {problem}")
        if self.kind == "int":
            object.__setattr__(self, "low", int(self.range[0]))
            object.__setattr__(self, "high", int(self.range[1]))

    @property
    def range(self) -> tuple[float, float]:
        """(low, high), both among the values; of a parameter that is no choice."""
        assert self.low is not None and self.high is not None
        return self.low, self.high

    def ends(self) -> Sequence[Any]:
        """The values between which all others lie; of a choice, all."""
        return self.choices if self.kind == "categorical" else self.range

    def values(self) -> Sequence[Any] | None:
        """Every value, where they can be listed."""
        if self.kind == "int":
            low, high = self.range
            return range(int(low), int(high) + 1)
        return self.choices or None

    def at(self, share: float) -> Any:
        """The value at `share`, in [0, 1), of the way from the first to the last: shares alike, values alike."""
        listed = self.values()
        if listed is not None:
            return listed[int(share * len(listed))]
        low, high = self.range
        if self.kind == "log":
            return min(high, max(low, math.exp(math.log(low) + share * (math.log(high) - math.log(low)))))
        return low + share * (high - low)

    def coordinates(self, value: Any) -> list[float]:
        """`value` where points have distances: its share of the way, in [0, 1]; of a choice, a 1 at its place."""
        if self.kind == "categorical":
            return [float(place == self.choices.index(value)) for place in range(len(self.choices))]
        low, high = self.range
        if self.kind == "log":
            low, high, value = math.log(low), math.log(high), math.log(value)
        return [(value - low) / (high - low)]

    def holds(self, value: Any) -> bool:
        """Whether `value`, from a file, is one of the parameter's."""
        if self.kind == "categorical":
            return value in self.choices
        is_number = isinstance(value, int if self.kind == "int" else (int, float)) and not isinstance(value, bool)
        return is_number and self.range[0] <= value <= self.range[1]

    def _problem(self) -> str | None:
        if self.kind == "categorical":
            texts = [json.dumps(each) for each in self.choices]
            if self.low is not None or self.high is not None:
                return "takes choices: drop min and max"
            return None if len(set(texts)) == len(texts) > 1 else "needs two choices or more, each given once"
        if self.choices:
            return "takes min and max: drop choices"
        if self.low is None or self.high is None or not self.low < self.high:
            return f"needs min below max, and has min={self.low}, max={self.high}"
        if self.kind == "log" and self.low <= 0:
            return f"needs min above 0, and has min={self.low}"
        if self.kind == "int" and not (float(self.low).is_integer() and float(self.high).is_integer()):
            return f"needs whole numbers, and has min={self.low}, max={self.high}"
        return None


@dataclass(frozen=True)
class Space:
    """The parameters of a search."""

    parameters: tuple[Parameter, ...]

    def __post_init__(self) -> None:
        if not self.parameters:
            raise ConfigError("search.space is empty: name at least one parameter")

    def at(self, shares: Sequence[float]) -> Point:
        """The point at a share, in [0, 1), of every parameter's way."""
        return {each.name: each.at(share) for each, share in zip(self.parameters, shares, strict=True)}

    def coordinates(self, point: Point) -> list[float]:
        """The point where points have distances."""
        return [number for each in self.parameters for number in each.coordinates(point[each.name])]

    def corners(self) -> list[Point]:
        """Every combination of ends, or, where those are too many, each parameter's ends with the others at a first."""
        ends = {each.name: each.ends() for each in self.parameters}
        if math.prod(map(len, ends.values())) <= MAX_CORNERS:
            return _product(ends)
        first = {name: values[0] for name, values in ends.items()}
        return [{**first, name: value} for name, values in ends.items() for value in values]

    def listed(self) -> list[Point] | None:
        """Every point, where they can be listed and are not too many."""
        values = {each.name: each.values() for each in self.parameters}
        finite = {name: each for name, each in values.items() if each is not None}
        if len(finite) < len(values) or math.prod(map(len, finite.values())) > MAX_LISTED:
            return None
        return _product(finite)

    def holds(self, point: Any) -> bool:
        """Whether `point`, from a file, is one of the space's."""
        names = {each.name for each in self.parameters}
        return (
            isinstance(point, dict)
            and set(point) == names
            and all(each.holds(point[each.name]) for each in self.parameters)
        )

    def spread(self, number: int, total: int, seed: int) -> Point:
        """Random point `number` of `total`: among them each has its own `total`-th part of every parameter's range.

        Source: Latin hypercube sampling, McKay et al. 1979.
        """
        point = {}
        for each in self.parameters:
            parts = python_generator(seed, "parts", each.name).sample(range(total), total)
            share = python_generator(seed, "within", each.name, number).random()
            point[each.name] = each.at((parts[number] + share) / total)
        return point

    def drawn(self, seed: int, *names: str | int) -> Point:
        """A random point."""
        return {each.name: each.at(python_generator(seed, each.name, *names).random()) for each in self.parameters}


def _product(values: Mapping[str, Sequence[Any]]) -> list[Point]:
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]
