"""The headings of the page: what a section shows, said in words from its numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mirrormask.compare import DENSE, Pair, Summary
from mirrormask.compare.grid import method_of
from mirrormask.report import words
from mirrormask.report.setting import Place, Setting

__all__ = ["accuracy", "closeness", "cost", "findings", "significance"]

#: How far below the dense model a small or fast one may be and still count as about as accurate.
CLOSE = 0.01


def findings(setting: Setting) -> dict[str, str]:
    """A heading for each section that compares."""
    return {
        "accuracy": accuracy(setting),
        "summary": summary(setting),
        "closeness": closeness(setting),
        "size": cost(setting, setting.sizes, "in a file of", "smaller", words.size),
        "time": cost(setting, setting.times, "with calls of", "faster", words.duration),
        "significance": significance(setting.comparison.pairs),
    }


def accuracy(setting: Setting) -> str:
    """Which method leads the best other one at the sparsity in focus, by how much, and whether that is beyond chance.

    Settings of one method (``mirror``, ``mirror/descent``) are not each other's rivals: the best of them speaks for it.
    """
    rows = setting.at(setting.focus)
    if not rows:
        dense = setting.dense
        return "There is no run yet" if dense is None else f"The dense model reaches {words.percent(dense.mean)}"
    best, where = rows[0], words.sparsity(setting.focus)
    if len(rows) == 1:
        return f"{best.method} reaches {words.percent(best.mean)} at {where}{_below(best)}"
    family = method_of(best.method)
    rivals = [row for row in rows if method_of(row.method) != family]
    if not rivals:
        settings = words.count(len(rows), "setting")
        return f"{best.method} is the best of {settings} of {family} at {where}: {words.percent(best.mean)}"
    second = rivals[0]
    if abs(best.mean - second.mean) < 5e-5:
        return f"{best.method} and {second.method} are level at {where}"
    pair = _pair(setting.comparison.pairs, best.method, second.method, setting.focus)
    lead, half_width = best.mean - second.mean, None
    if pair is not None and pair.difference is not None:
        paired = pair.difference if pair.a == best.method else -pair.difference
        # Over the seeds that both have; with others the means may even point the other way.
        if paired > 0:
            lead, half_width = paired, pair.half_width
    others = len({method_of(row.method) for row in rivals})
    whom = second.method if others == 1 else f"the best other method, {second.method},"
    text = f"{best.method} leads {whom} by {words.points(lead, half_width)} at {where}"
    if pair is None or pair.p is None:
        return f"{text}, not tested"
    return text if pair.significant else f"{text}, within chance"


def summary(setting: Setting) -> str:
    """What is compared, in a sentence."""
    levels = sorted({row.sparsity for row in setting.sparse})
    names = len(setting.methods) - (setting.dense is not None)
    seeds = len({seed for row in setting.comparison.summaries for seed in row.seeds})
    dense = "the dense model" if setting.dense is not None else ""
    if not levels:
        return f"{dense.capitalize()} alone, {words.count(seeds, 'seed')}."
    span = words.sparsity(levels[0]) + (f" to {words.sparsity(levels[-1])}" if len(levels) > 1 else "")
    with_dense = f" and {dense}" if dense else ""
    return f"{words.count(names, 'method')}{with_dense}, at {span} sparsity, {words.count(seeds, 'seed')}."


def closeness(setting: Setting) -> str:
    """The highest sparsity at which a method stays within a point of the dense model."""
    close = [r for r in setting.sparse if r.difference_from_dense is not None and r.difference_from_dense >= -CLOSE]
    if setting.dense is None:
        return "How accuracy falls with sparsity"
    if not setting.sparse:
        return ""
    if not close:
        return f"No method stays within a point of the dense model's {words.percent(setting.dense.mean)}"
    best = max(close, key=lambda row: (row.sparsity, row.mean))
    return (
        f"{best.method} stays within a point of the dense model's {words.percent(setting.dense.mean)} "
        f"at {words.sparsity(best.sparsity)}"
    )


def cost(setting: Setting, costs: dict[Place, float], how: str, better: str, unit: Callable[[float], str]) -> str:
    """The cheapest of the methods about as accurate as dense; where there is none, the most accurate."""
    rows = [row for row in setting.sparse if (row.method, row.sparsity) in costs]
    if not rows:
        return ""
    reference = setting.dense.mean if setting.dense is not None else max(row.mean for row in rows)
    close = [row for row in rows if row.mean >= reference - CLOSE]
    if close:
        chosen = min(close, key=lambda row: (costs[row.method, row.sparsity], -row.mean))
    else:
        chosen = max(rows, key=lambda row: row.mean)
    paid = costs[chosen.method, chosen.sparsity]
    where = f"{chosen.method} at {words.sparsity(chosen.sparsity)}"
    text = f"{where} keeps {words.percent(chosen.mean)} {how} {unit(paid)}"
    dense = costs.get((DENSE, 0.0))
    return f"{text}, {dense / paid:.2g} times {better} than dense" if dense and dense > paid else text


def significance(pairs: Sequence[Pair]) -> str:
    """How many differences are more than chance."""
    tested = [pair for pair in pairs if pair.p is not None]
    if not tested:
        return "No difference between methods can be tested: that needs two seeds of both"
    sure = sum(pair.significant for pair in tested)
    if not sure:
        return f"None of {words.count(len(tested), 'difference')} between methods is more than chance"
    verb = "is" if sure == 1 else "are"
    return f"{sure:,} of {words.count(len(tested), 'difference')} between methods {verb} more than chance"


def _below(row: Summary) -> str:
    difference = row.difference_from_dense
    if difference is None:
        return ""
    side = "below" if difference < 0 else "above"
    return f", {words.points(difference)} {side} the dense model"


def _pair(pairs: Sequence[Pair], a: str, b: str, sparsity: float) -> Pair | None:
    return next((pair for pair in pairs if pair.sparsity == sparsity and {pair.a, pair.b} == {a, b}), None)
