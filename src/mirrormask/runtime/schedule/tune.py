"""Choosing each layer's kernel by measuring the candidates on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from mirrormask.machine.timing import Watch
from mirrormask.runtime.graph import known
from mirrormask.runtime.schedule.problem import Choice, Problem
from mirrormask.runtime.schedule.trial import Trial

__all__ = ["Tuner", "default_choice"]

#: How many turns the last of the candidates get, how many candidates those are at most, and how much slower than the
#: fastest.
ROUNDS, FINALISTS, CLOSE = 9, 5, 1.4
#: How much slower than the fastest a choice may be that has its kernel and a narrower tile, which is then taken: it
#: needs less cache, and a neighbour or the rest of the model leaves less of it than there is here.
AS_FAST = 1.05
#: Bytes of their plans together, above which they are fewer, but two at least.
MOST_HELD = 1 << 25
#: Bytes that are read between turns, at most: more than any L2 cache holds.
MOST_AROUND = 1 << 22
#: Builds that measure a choice again which was measured while others had the processor; then it is taken as it is.
TRIES = 3


def default_choice(problem: Problem) -> Choice:
    """A good guess without measuring."""
    return next(problem.candidates())


class Tuner:
    """Measures the candidates of a layer and remembers the winner, on disk too.

    Args:
        key: under which the cache holds what was measured for this model before, for whatever input shape; ``""`` to
            neither read nor write it.
        measure: whether to measure at all; without, unknown layers get the best guess.
        around: bytes that a call of the model reads besides a layer's own, see :class:`Trial`.
    """

    def __init__(self, key: str = "", *, measure: bool = True, around: int = 0) -> None:
        self.key, self.measure, self.around = key, measure, around
        self.choices: dict[str, Choice] = {}
        self.facts: dict[str, bool] = {}
        self.given: dict[str, Choice] = {}
        """Found elsewhere, for one in a model's file: taken without measuring, where they are candidates here."""
        self.unsure: dict[str, int] = {}
        """How often each choice was measured that was always measured while the machine was busy."""
        self.again = False
        """Whether some choice was measured again, that the cache held."""
        self._doubtful: dict[str, Choice] = {}
        self._new = False
        self._read()

    def __call__(self, problem: Problem) -> Choice:
        """The choice for a layer."""
        key = problem.key
        if key not in self.choices:
            found = list(dict.fromkeys(problem.candidates()))
            if self.given.get(key) in found:
                self.choices[key] = self.given[key]
            elif self.measure and len(found) > 1:
                watch = Watch()
                self.again |= key in self._doubtful
                self.choices[key] = _fastest(problem, found, self.around, watch)
                self.unsure[key] = self.unsure.get(key, 0) + 1
                if not watch.busy:
                    del self.unsure[key]
                self._new = True
            else:
                known_before = self._doubtful.get(key)
                self.choices[key] = known_before if known_before in found else found[0]
        return self.choices[key]

    def decide(self, question: str, measure: Callable[[], bool]) -> bool:
        """The answer to a question that measuring decides."""
        if question not in self.facts:
            self.facts[question] = measure()
            self._new = True
        return self.facts[question]

    def save(self) -> None:
        """Write what was measured since, beside what others wrote meanwhile."""
        if self.key and self.measure and self._new:
            self._read()
            choices = {name: asdict(choice) for name, choice in self.choices.items()}
            choices |= {name: asdict(choice) for name, choice in self._doubtful.items() if name not in choices}
            known.store(self.key, {"choices": choices, "facts": self.facts, "unsure": self.unsure})
            self._new = False

    def _read(self) -> None:
        stored = (known.load(self.key) or {}) if self.key and self.measure else {}
        choices = {name: Choice(**values) for name, values in stored.get("choices", {}).items()}
        others = {name: tries for name, tries in stored.get("unsure", {}).items() if name not in self.choices}
        again = {name for name, tries in others.items() if tries < TRIES}
        self.unsure = others | self.unsure
        self._doubtful = {name: choice for name, choice in choices.items() if name in again}
        sure = {name: choice for name, choice in choices.items() if name not in again}
        self.choices, self.facts = sure | self.choices, stored.get("facts", {}) | self.facts

    def __getstate__(self) -> dict[str, Any]:
        # What is measured elsewhere is not for this machine's cache.
        return {**self.__dict__, "key": ""}


def _fastest(problem: Problem, found: list[Choice], around: int, watch: Watch) -> Choice:
    """First every choice a few times, then the good ones in turns, whose medians decide; ``watch`` watches all turns.

    Whatever else the machine does meets all of them, and is not left out: a neighbour that shares the cache takes more
    from a choice that needs more of it.
    """
    others = np.zeros(min(around, MOST_AROUND) // 4, np.float32)
    least = float("inf")
    trials: dict[Choice, tuple[float, Trial]] = {}
    for choice in found:
        trial = Trial(problem, choice, others)
        with watch:
            seconds = trial.seconds(least)
        least = min(least, seconds)
        trials[choice] = (seconds, trial)
        # Packed weights are large: those that are out of the race go.
        close = sorted((row for row in trials.items() if row[1][0] <= CLOSE * least), key=lambda row: row[1][0])
        held = np.cumsum([trial.alone.plan.nbytes for _, (_, trial) in close])
        trials = dict(close[: min(FINALISTS, max(2, int((held <= MOST_HELD).sum())))])
    finalists = list(trials)
    if len(finalists) == 1:
        return finalists[0]
    with watch:
        rounds = [[trials[choice][1].turn() for choice in finalists] for _ in range(ROUNDS)]
    return _narrowest(dict(zip(finalists, np.median(rounds, axis=0).tolist(), strict=True)))


def _narrowest(seconds: dict[Choice, float]) -> Choice:
    """The choice with the narrowest tile among those that are as fast as the fastest, with its kernel and rows."""
    fastest = min(seconds, key=seconds.__getitem__)
    alike = [c for c in seconds if (c.kernel, c.rows) == (fastest.kernel, fastest.rows)]
    equal = [c for c in alike if seconds[c] <= AS_FAST * seconds[fastest]]
    return min(equal, key=lambda choice: (choice.vectors, seconds[choice]))
