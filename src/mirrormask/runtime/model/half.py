"""A region in half precision of which some layers stay in fp32: parts that run one after another."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Collection
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from mirrormask.machine.targets import Target, best_target
from mirrormask.runtime.graph.ir import Graph, Node
from mirrormask.runtime.model.moments import Moments
from mirrormask.runtime.model.ranges import RangeFinder
from mirrormask.runtime.model.region import Region
from mirrormask.runtime.schedule.runner import MOST_SHAPES, resized
from mirrormask.runtime.schedule.tune import Tuner

__all__ = ["Mixed", "make_region", "split"]


def make_region(graph: Graph, target: Target, tuner: Tuner, wide: Collection[str] = (), check: bool = False) -> Region:
    """A region that runs ``graph`` on ``target``; in half precision, the nodes ``wide`` stay in fp32.

    So do recurrent layers: what is rounded at one moment is in all that come after.
    """
    if graph.recurrent:
        return Moments(graph, best_target() if target.half else target, tuner)
    if target.half and (wide or check):
        return Mixed(graph, target, tuner, frozenset(wide), check)
    return Region(graph, target, tuner)


def split(graph: Graph, wide: Collection[str]) -> list[tuple[Graph, bool]]:
    """The graph in pieces that follow each other, each either in fp32 (with ``True``) or not.

    A piece takes tensors ``[items, *shape]``, and gives those that a later piece or the caller wants.
    """
    inner = [node for node in graph.nodes if node.op != "input"]
    nodes = {node.name: node for node in graph.nodes}
    runs = [(list(run), in_wide) for in_wide, run in groupby(inner, lambda node: node.name in wide)]
    pieces = []
    for number, (run, in_wide) in enumerate(runs):
        own = {node.name for node in run}
        inputs = list(dict.fromkeys(name for node in run for name in node.inputs if name not in own))
        wanted = {name for later, _ in runs[number + 1 :] for node in later for name in node.inputs}
        outputs = [node.name for node in run if node.name in wanted or node.name in graph.outputs]
        inputs.sort(key=lambda name: nodes[name].kind == "mask" and nodes[name].op == "input")
        heads = [
            nodes[name] if nodes[name].op == "input" else Node("input", name, [], nodes[name].shape) for name in inputs
        ]
        shapes = {name: nodes[name].shape for name in (*inputs, *outputs)}
        pieces.append((Graph(graph.rows, [*heads, *run], inputs, outputs, shapes), in_wide))
    return pieces


class Mixed(Region):
    """Runs the pieces of a graph, in half precision but for the nodes ``wide``.

    With ``check``, every call notices results that are not finite. If the input was, the layers that left the range
    move to fp32, with a warning, and the call runs again.
    """

    def __init__(self, graph: Graph, target: Target, tuner: Tuner, wide: frozenset[str], check: bool) -> None:
        super().__init__(graph, target, tuner)
        self.wide, self.check = wide, check
        self._lock = threading.RLock()
        self._make_parts()

    def _make_parts(self) -> None:
        self.__dict__["_sized"] = dict[tuple[tuple[int, ...], ...], Mixed]()
        half = replace(self.target, watched=self.check) if self.target.half else self.target
        full = best_target() if self.target.half else self.target
        wide = self.wide if self.target.half else {node.name for node in self.graph.nodes}
        pieces = split(self.graph, wide)
        self.__dict__["_parts"] = [Region(piece, full if in_wide else half, self.tuner) for piece, in_wide in pieces]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_parts", "_sized", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()
        self._make_parts()

    @property
    def tools(self) -> tuple[Target, Tuner, frozenset[str], bool]:
        """What :func:`make_region` made it of, but for the graph."""
        return self.target, self.tuner, self.wide, self.check

    @property
    def parts(self) -> list[Region]:
        """The regions that run one after another."""
        parts: list[Region] = self.__dict__["_parts"]
        return parts

    @property
    def nbytes(self) -> int:
        """Memory of the parts."""
        return sum(part.nbytes for part in self.parts)

    def quick(self, shape: torch.Size) -> None:
        """There is no short way through several parts."""

    def sized(self, shapes: tuple[tuple[int, ...], ...]) -> Mixed:
        """Such a region for inputs of other shapes per item.

        Raises:
            Unfit: an operation does not fit them; its message names it.
        """
        with self._lock:
            known: dict[tuple[tuple[int, ...], ...], Mixed] = self.__dict__["_sized"]
            if shapes not in known:
                graph = resized(self.graph, shapes)
                known[shapes] = Mixed(graph, self.target, self.tuner, self.wide, self.check)
                while len(known) > MOST_SHAPES:
                    known.pop(next(iter(known)))
            return known[shapes]

    def forward(self, *inputs: Tensor) -> Any:
        """Run the parts; see :meth:`Region.forward`."""
        if not self.check:
            return self._run(inputs)[0]
        with self._lock:
            result, finite = self._run(inputs)
            while not finite and all(bool(x.isfinite().all()) for x in inputs):
                if not self._widen(inputs):
                    break
                result, finite = self._run(inputs)
        return result

    def _run(self, inputs: tuple[Tensor, ...]) -> tuple[Any, bool]:
        """The result, and whether all that was watched was finite."""
        found = self.core.per_item([x.shape for x in inputs])
        if found != self.core.wanted:
            return self.sized(found).forward(*inputs), True  # it looks for itself
        leading = self.graph.leading(inputs[0].shape)
        values = {
            name: x if name in self.graph.masks else x.reshape(*leading, *self.graph.node(name).shape)
            for name, x in zip(self.graph.inputs, inputs, strict=True)
        }
        finite = True
        for part in self.parts:
            made = part(*[values[name] for name in part.graph.inputs])
            values |= zip(part.graph.outputs, made if isinstance(made, tuple) else (made,), strict=True)
            for plan in part.plans():
                finite &= not plan.lower_flag()
        results = [values[name].reshape(*leading, *self.graph.shapes[name]) for name in self.graph.outputs]
        return (results[0] if len(results) == 1 else tuple(results)), finite

    def _widen(self, inputs: tuple[Tensor, ...]) -> bool:
        """Move the layers that leave the range for these inputs to fp32; all of them if none can be named."""
        every = frozenset(node.name for node in self.graph.nodes if node.op != "input")
        finder = RangeFinder(self.graph)
        finder(*inputs)
        found = self.wide | finder.wide
        if found == self.wide:
            found = every
        if found == self.wide:
            return False
        new = [node.layer or node.name for node in self.graph.nodes if node.name in found - self.wide]
        warnings.warn(
            f"{', '.join(new)} left the range of half precision (65,504) and will run in fp32 from now on",
            RuntimeWarning,
            stacklevel=3,
        )
        self.wide = found
        self._make_parts()
        return True
