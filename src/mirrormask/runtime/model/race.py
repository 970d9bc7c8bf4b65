"""The plan beside eager PyTorch, and its steps: what a build measures, or finds in the cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from mirrormask.machine.timing import in_turns, own_time
from mirrormask.runtime.graph import known
from mirrormask.runtime.graph.export import Arguments
from mirrormask.runtime.model.measure import layer_reports
from mirrormask.runtime.model.parts import Options, Part
from mirrormask.runtime.model.piece import Piece
from mirrormask.runtime.model.region import Region
from mirrormask.runtime.model.report import LayerReport
from mirrormask.runtime.schedule.tune import Tuner

__all__ = ["ExampleCall", "measured", "tuners_of"]


#: Seconds of a call beside which cold caches and the steps of a clock are nothing, and how many times longer than
#: another one it then is without a doubt.
LONG, CLEAR = 0.25, 2.0


class ExampleCall:
    """A call of the example."""

    def __init__(self, module: nn.Module, arguments: Arguments) -> None:
        self.module, self.arguments = module, arguments

    def __call__(self) -> Any:
        """Make it."""
        if isinstance(self.module, Piece):
            return self.module.run(self.arguments)
        return self.module(*self.arguments.args, **self.arguments.kwargs)


def measured(
    model: nn.Module,
    parts: list[Part],
    regions: list[Region],
    call: Callable[[], Any],
    arguments: Arguments,
    options: Options,
) -> tuple[list[LayerReport], float, float, bool]:
    """The steps of all regions, the seconds of a call before and after, and whether the cache knew them."""
    facts = [part.facts for part in parts]
    key = known.graph_key([region.graph for region in regions], facts, arguments.shapes)
    stored = known.load(key) or {}
    if "layers" in stored and not any(tuner.again for tuner in tuners_of(parts)):
        rows = [LayerReport(**{**row, "shape": tuple(row["shape"])}) for row in stored["layers"]]
        return rows, float(stored["eager"]), float(stored["seconds"]), True
    whole = parts[0].at_work.region if len(parts) == 1 and not parts[0].path else None
    if whole is not None:
        inputs = arguments.tensors  # a model that is one region is called without anything around it
        call = lambda: whole.forward(*inputs)  # noqa: E731
    eager, seconds = _race(ExampleCall(model, arguments), call)
    rows = _layers(call, regions, {whole: tuple(arguments.tensors)} if whole is not None else {})
    known.store(key, {"eager": eager, "seconds": seconds, "layers": [asdict(row) for row in rows]})
    return rows, eager, seconds, False


def tuners_of(parts: list[Part]) -> list[Tuner]:
    """Who chose the kernels."""
    return [tuner for part in parts for _, tuner, _, _ in part.tools.values()]


def _race(eager: Callable[[], Any], plan: Callable[[], Any]) -> tuple[float, float]:
    """Median seconds of both, taken in turns so that a busy moment hits both.

    A model that takes long, and far longer than its plan, has run often enough by now: one look at it will do.
    """
    clock = own_time if torch.get_num_threads() == 1 else time.perf_counter
    took = []
    for call in (eager, plan):
        start = clock()
        call()
        took.append(clock() - start)
    if took[0] > max(LONG, CLEAR * took[1]):
        return took[0], statistics.median(in_turns({"plan": plan}, 3, 0.01, clock)["plan"])
    turns = in_turns({"eager": eager, "plan": plan}, rounds=3, budget=0.01, clock=clock, limit=2.0)
    return statistics.median(turns["eager"]), statistics.median(turns["plan"])


def _layers(
    call: Callable[[], Any], regions: list[Region], seen: dict[Region | None, tuple[Tensor, ...]]
) -> list[LayerReport]:
    """The steps of every region, on the tensors that the example brings to it."""
    if not seen:
        hooks = [r.register_forward_pre_hook(lambda region, given: seen.setdefault(region, given)) for r in regions]  # type: ignore[arg-type, func-returns-value]
        call()
        for hook in hooks:
            hook.remove()
    rows = [row for region in regions if region in seen for row in layer_reports(region, seen[region], {})]
    total = sum(row.seconds for row in rows) or 1.0
    return [replace(row, share=row.seconds / total) for row in rows]
