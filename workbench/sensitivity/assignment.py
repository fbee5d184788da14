"""Which matrix gets which format: the least loss for a number of bytes, when every choice has a measured loss.

Losses of single matrices are taken to add up, which measuring the result then confirms or not. Under that assumption
the problem is a multiple-choice knapsack (Sinha, Zoltners, "The Multiple-Choice Knapsack Problem", Operations Research
27, 1979): one format of each matrix, least total loss, bytes within a budget. Greedy steps of least loss per byte
saved, along each matrix's lower convex hull, are optimal at every step they stop at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Choice:
    """One matrix in one format: its bytes, and the loss of quantizing it alone, in a unit that adds up, 0 or more."""

    matrix: str
    format: str
    nbytes: int
    loss: float


@dataclass(frozen=True, slots=True)
class Assignment:
    """One choice for every matrix."""

    choices: tuple[Choice, ...]

    @property
    def formats(self) -> dict[str, str]:
        return {choice.matrix: choice.format for choice in self.choices}

    @property
    def nbytes(self) -> int:
        return sum(choice.nbytes for choice in self.choices)

    @property
    def loss(self) -> float:
        """The sum of the single losses: a prediction."""
        return sum(choice.loss for choice in self.choices)


def assign(choices: Iterable[Choice], *, budget_bytes: int | None = None, max_loss: float | None = None) -> Assignment:
    """The least loss within `budget_bytes`, or the fewest bytes within `max_loss`; exactly one of them is given.

    Each matrix begins with its least loss. Steps are taken in order of loss per byte saved until the budget is met, or
    while the loss permits; then whatever single changes still fit take up what the last step left over. ConfigError
    where even the smallest formats exceed the budget, or the largest exceed the loss.
    """
    if (budget_bytes is None) == (max_loss is None):
        raise ConfigError("give either budget_bytes or max_loss")
    table = _by_matrix(choices)
    steps = _steps(table)
    chosen = {name: hull[0] for name, hull in _hulls(table).items()}
    if budget_bytes is not None:
        for _, before, after in steps:
            if sum(choice.nbytes for choice in chosen.values()) <= budget_bytes:
                break
            assert chosen[after.matrix] == before
            chosen[after.matrix] = after
        return _refined(Assignment(tuple(chosen.values())), table, budget_bytes)
    assert max_loss is not None
    start = Assignment(tuple(chosen.values()))
    if start.loss > max_loss:
        raise ConfigError(f"max_loss is {max_loss:g}; the least that these formats allow is {start.loss:g}")
    stuck: set[str] = set()
    for _, before, after in steps:
        total = sum(choice.loss for choice in chosen.values())
        if after.matrix in stuck or total - before.loss + after.loss > max_loss:
            stuck.add(after.matrix)  # a later step of this matrix starts where this one was not taken
        else:
            chosen[after.matrix] = after
    return Assignment(tuple(chosen.values()))


def frontier(choices: Iterable[Choice]) -> list[Assignment]:
    """Every assignment that the greedy steps pass, from the least loss to the fewest bytes."""
    table = _by_matrix(choices)
    chosen = {name: hull[0] for name, hull in _hulls(table).items()}
    found = [Assignment(tuple(chosen.values()))]
    for _, _, after in _steps(table):
        chosen[after.matrix] = after
        found.append(Assignment(tuple(chosen.values())))
    return found


def _by_matrix(choices: Iterable[Choice]) -> dict[str, list[Choice]]:
    table: dict[str, list[Choice]] = {}
    for choice in choices:
        if not choice.loss >= 0.0:
            raise ConfigError(f"the loss of {choice.matrix} in {choice.format} is {choice.loss}; it must be 0 or more")
        table.setdefault(choice.matrix, []).append(choice)
    if not table:
        raise ConfigError("there is nothing to assign: no choices were given")
    return table


def _hulls(table: Mapping[str, Sequence[Choice]]) -> dict[str, list[Choice]]:
    """Of each matrix the choices on its lower convex hull, from the most bytes to the fewest; the loss rises."""
    hulls = {}
    for name, options in table.items():
        hull: list[Choice] = []
        for choice in sorted(options, key=lambda c: (c.loss, c.nbytes)):
            if hull and choice.nbytes >= hull[-1].nbytes:
                continue  # more bytes and no less loss
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], choice):
                hull.pop()
            hull.append(choice)
        hulls[name] = hull
    return hulls


def _slope(before: Choice, after: Choice) -> float:
    """Loss per byte saved."""
    return (after.loss - before.loss) / (before.nbytes - after.nbytes)


def _steps(table: Mapping[str, Sequence[Choice]]) -> list[tuple[float, Choice, Choice]]:
    """(loss per byte saved, from, to) of all matrices, the cheapest first; those of one matrix come in their order."""
    pairs = ((a, b) for hull in _hulls(table).values() for a, b in zip(hull, hull[1:], strict=False))
    return sorted(((_slope(a, b), a, b) for a, b in pairs), key=lambda step: step[0])


def _refined(found: Assignment, table: Mapping[str, Sequence[Choice]], budget: int) -> Assignment:
    """While a single change lowers the loss within the budget, the one that lowers it most."""
    if found.nbytes > budget:
        raise ConfigError(f"budget_bytes is {budget:,}; the smallest formats take {found.nbytes:,} bytes")
    chosen = {choice.matrix: choice for choice in found.choices}
    room = budget - found.nbytes
    while True:
        better = [
            (other.loss - held.loss, other)
            for name, held in chosen.items()
            for other in table[name]
            if other.loss < held.loss and other.nbytes - held.nbytes <= room
        ]
        if not better:
            return Assignment(tuple(chosen.values()))
        _, best = min(better, key=lambda pair: pair[0])
        room -= best.nbytes - chosen[best.matrix].nbytes
        chosen[best.matrix] = best
