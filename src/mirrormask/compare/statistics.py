"""What a comparison shows: means with intervals, and which differences are more than chance."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mirrormask import checks

__all__ = ["DENSE", "LEVEL", "Pair", "Summary", "Values", "half_width", "holm", "paired_tests", "summarize"]

#: (method, sparsity, seed) -> accuracy in [0, 1]; the dense method has one entry a seed, whatever the sparsities.
Values = Mapping[tuple[str, float, int], float]

#: The method that the others are compared with; its values count at every sparsity.
DENSE = "dense"
#: The probability of a false alarm, per sparsity, that significance allows.
LEVEL = 0.05
#: Differences that spread less than this are taken for equal: what remains is rounding.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Summary:
    """A method at a sparsity, over seeds.

    Args:
        method, sparsity: which; the dense method is at sparsity 0.
        seeds: over which the mean is taken.
        mean: of the accuracies, in [0, 1].
        half_width: half of its 95% interval; None for fewer than two seeds.
        difference_from_dense: the mean over shared seeds; None without any, and for the dense method itself.
        difference_half_width: half of its 95% interval; None for fewer than two shared seeds.
        values: the accuracies, in the order of ``seeds``.
    """

    method: str
    sparsity: float
    seeds: tuple[int, ...]
    mean: float
    half_width: float | None
    difference_from_dense: float | None
    difference_half_width: float | None
    values: tuple[float, ...]


@dataclass(frozen=True)
class Pair:
    """Method ``a`` minus method ``b`` at one sparsity, seed by seed.

    Args:
        a, b, sparsity: which.
        seeds: that both have.
        difference: the mean; None without a shared seed.
        half_width: half of its 95% interval; None for fewer than two shared seeds.
        p: of the two-sided paired t test; None where there is none: fewer than two seeds, or differences that are
            all the same, whose spread says nothing. If all of them are zero it is 1.
        p_corrected: by Holm's method over the tests at this sparsity; None where ``p`` is.
        significant: whether ``p_corrected`` is below 0.05.
    """

    a: str
    b: str
    sparsity: float
    seeds: tuple[int, ...]
    difference: float | None
    half_width: float | None
    p: float | None
    p_corrected: float | None
    significant: bool


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95% interval of the mean: ``t · s / sqrt(n)``, ``t`` the 97.5% quantile of Student's t.

    Args:
        values: n of them; ``s`` is their standard deviation with n - 1 in the denominator.

    Returns:
        None for fewer than two values: one value has no spread.

    Example:
        >>> round(half_width([0.89, 0.90, 0.91]), 4)
        0.0248
        >>> half_width([0.89])
    """
    if len(values) < 2:
        return None
    stats = checks.require("scipy.stats", "flow", "intervals and tests")
    t = float(stats.t.ppf(0.975, len(values) - 1))
    return t * statistics.stdev(values) / math.sqrt(len(values))


def summarize(values: Values) -> tuple[Summary, ...]:
    """Mean, interval and difference from dense of every method at every sparsity.

    Methods keep the order in which ``values`` names them first; sparsities rise.

    Example:
        >>> rows = summarize({("dense", 0.0, 0): 0.875, ("gmp", 0.95, 0): 0.75})
        >>> [(row.method, row.mean, row.difference_from_dense) for row in rows]
        [('dense', 0.875, None), ('gmp', 0.75, -0.125)]
    """
    rows = []
    for method, sparsity in _cells(values):
        own = _by_seed(values, method, sparsity)
        accuracies = tuple(own.values())
        from_dense = [] if method == DENSE else _differences(own, _by_seed(values, DENSE, sparsity))
        rows.append(
            Summary(
                method,
                sparsity,
                tuple(own),
                statistics.fmean(accuracies),
                half_width(accuracies),
                statistics.fmean(from_dense) if from_dense else None,
                half_width(from_dense),
                accuracies,
            )
        )
    return tuple(rows)


def paired_tests(values: Values) -> tuple[Pair, ...]:
    """Every pair of methods at every sparsity, dense left out, tested on the seeds that both have.

    Two runs of the same seed share their first weights and the order of their data, so the test is on differences: the
    paired t test, ``t = d̄ / (s_d / sqrt(n))`` with n - 1 degrees of freedom. With k pairs at a sparsity, one
    of them would look significant by chance far more often than one time in twenty; Holm's method corrects for k.

    Example:
        >>> a, b = [0.80, 0.81, 0.80], [0.90, 0.92, 0.91]
        >>> values = {("a", 0.9, s): a[s] for s in range(3)} | {("b", 0.9, s): b[s] for s in range(3)}
        >>> (pair,) = paired_tests(values)
        >>> pair.a, pair.b, round(pair.difference, 3), pair.significant
        ('a', 'b', -0.107, True)

    Source: Student, The probable error of a mean, 1908; Holm, A simple sequentially rejective multiple test
    procedure, 1979.
    """
    cells = _cells(values)
    result = []
    for sparsity in sorted({s for m, s in cells if m != DENSE}):
        methods = [m for m, s in cells if s == sparsity and m != DENSE]
        rows = []
        for a, b in itertools.combinations(methods, 2):
            of_a, of_b = _by_seed(values, a, sparsity), _by_seed(values, b, sparsity)
            rows.append((a, b, tuple(s for s in of_a if s in of_b), _differences(of_a, of_b)))
        tests = [_paired_test(differences) for *_, differences in rows]
        for (a, b, seeds, differences), p, corrected in zip(rows, tests, holm(tests), strict=True):
            mean = statistics.fmean(differences) if differences else None
            significant = corrected is not None and corrected < LEVEL
            result.append(Pair(a, b, sparsity, seeds, mean, half_width(differences), p, corrected, significant))
    return tuple(result)


def holm(p: Sequence[float | None]) -> list[float | None]:
    """Holm's correction: the i-th smallest of k values times ``k - i + 1``, never falling, at most 1; None stays None.

    Example:
        >>> holm([0.01, 0.04, None, 0.03])
        [0.03, 0.06, None, 0.06]
    """
    tested = sorted((value, i) for i, value in enumerate(p) if value is not None)
    corrected: list[float | None] = [None] * len(p)
    largest = 0.0
    for rank, (value, i) in enumerate(tested):
        largest = max(largest, min(1.0, value * (len(tested) - rank)))
        corrected[i] = largest
    return corrected


def _paired_test(differences: Sequence[float]) -> float | None:
    if len(differences) < 2:
        return None
    if max(differences) - min(differences) <= ROUNDING:
        return 1.0 if abs(differences[0]) <= ROUNDING else None
    stats = checks.require("scipy.stats", "flow", "intervals and tests")
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def _cells(values: Values) -> list[tuple[str, float]]:
    """Method and sparsity of each cell: methods as first named, sparsities rising."""
    methods = list(dict.fromkeys(method for method, _, _ in values))
    return sorted({(method, sparsity) for method, sparsity, _ in values}, key=lambda c: (methods.index(c[0]), c[1]))


def _by_seed(values: Values, method: str, sparsity: float) -> dict[int, float]:
    """Seed -> accuracy, seeds rising; dense counts at every sparsity."""
    chosen = {seed: v for (m, s, seed), v in values.items() if m == method and (s == sparsity or m == DENSE)}
    return dict(sorted(chosen.items()))


def _differences(a: Mapping[int, float], b: Mapping[int, float]) -> list[float]:
    return [a[seed] - b[seed] for seed in a if seed in b]
