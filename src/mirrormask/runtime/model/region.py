"""A region at work on torch's tensors: what it takes is looked at, and its runner gets their addresses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mirrormask.machine.targets import Target
from mirrormask.runtime.graph.ir import Graph, Unfit
from mirrormask.runtime.schedule.plan import Plan
from mirrormask.runtime.schedule.runner import Call, Runner
from mirrormask.runtime.schedule.tune import Tuner

__all__ = ["Quick", "Region"]


class Region(nn.Module):
    """Runs a graph with generated kernels.

    Attributes:
        core: does the work.
        failed: why no plan could be made of it.
    """

    core: Runner

    def __init__(self, graph: Graph, target: Target, tuner: Tuner) -> None:
        super().__init__()
        self.core = Runner(graph, target, tuner)
        self.failed = ""

    @property
    def graph(self) -> Graph:
        """What it computes."""
        return self.core.graph

    @property
    def target(self) -> Target:
        """The instruction set of its kernels."""
        return self.core.target

    @property
    def tuner(self) -> Tuner:
        """Who chooses them."""
        return self.core.tuner

    @property
    def tools(self) -> tuple[Target, Tuner, frozenset[str], bool]:
        """What :func:`mirrormask.runtime.model.half.make_region` made it of, but for the graph."""
        return self.target, self.tuner, frozenset(), False

    @property
    def parts(self) -> list[Region]:
        """The regions that do the work: this one."""
        return [self]

    @property
    def nbytes(self) -> int:
        """Memory of the plans made so far, and of the weights that they do not share."""
        return self.core.nbytes

    def plans(self) -> list[Plan]:
        """The plans made so far."""
        return self.core.plans()

    def plan_for(self, items: int, length: int = 0) -> Plan:
        """The plan for a call with so many images or rows, on as many threads as torch has."""
        return self.core.plan_for(torch.get_num_threads(), items, length)

    def tokens(self, rows: int, length: int = 0) -> int:
        """Rows per item of the plan for a call with so many rows, see :meth:`Runner.tokens`."""
        return self.core.tokens(torch.get_num_threads(), rows, length)

    def quick(self, shape: torch.Size) -> Quick | None:
        """The parts of a call for a contiguous tensor of this shape, if one native call is all of it."""
        call = self.core.known_call([shape], torch.get_num_threads())
        return None if call is None or not call.simple else Quick(call)

    def forward(self, *inputs: Tensor) -> Any:
        """Run the region on float32 tensors of the captured shapes (any batch size), or of others that fit it.

        Raises:
            TypeError: an input is not a float32 tensor on the CPU.
            ValueError: the inputs do not fit the region or each other.
        """
        shapes, threads = [x.shape for x in inputs], torch.get_num_threads()
        call = self.core.known_call(shapes, threads)
        if call is None:
            self.core.per_item(shapes)
            try:
                call = self.core.call_for(shapes, threads)
            except Unfit:
                raise
            except Exception as error:
                self.failed = f"no plan could be made: {error}"
                raise
        for x in inputs:
            if x.dtype is not torch.float32 or not x.is_cpu or x.layout is not torch.strided:
                raise TypeError(f"a region takes dense float32 tensors on the CPU, not {x.dtype} on {x.device}")
        return _run(call, inputs)


def _run(call: Call, inputs: tuple[Tensor, ...]) -> Any:
    tensors = [x.contiguous().resolve_neg() for x in inputs[: call.streams]]
    masks = [mask.resolve_neg() for mask in inputs[call.streams :]]
    if call.padded != call.items:
        tensors = [_pad(x.reshape(call.items, -1), call.padded) for x in tensors]
    results = [torch.empty(shape) for shape in call.inner]
    addresses = [x.data_ptr() for x in (*tensors, *masks, *results)]
    if call.run(addresses, [mask.stride() for mask in masks]):
        return _run(call.directly(), inputs)
    if call.inner != call.outer:
        results = [x[: call.items].view(shape) for x, shape in zip(results, call.outer, strict=True)]
    return results[0] if len(results) == 1 else tuple(results)


class Quick:
    """What a simple call needs, for a caller that makes it without a function between; see ``CompiledModel``."""

    __slots__ = (
        "_call",
        "addresses",
        "function",
        "lock",
        "lower_flag",
        "size",
        "spreads",
        "strides",
        "threads",
        "words",
    )

    def __init__(self, call: Call) -> None:
        self.threads = call.threads
        self.size = torch.Size(call.outer[0])
        self.strides = torch.empty(self.size).stride()
        self.addresses = call.addresses
        self.function, self.words, self.lock = call.start.function, call.start.words, call.plan.lock
        self.spreads, self.lower_flag = call.spreads, call.plan.lower_flag
        self._call = call

    def directly(self, x: Tensor) -> Any:
        """The result by kernels that spread nothing, for numbers that are not finite."""
        return _run(self._call.directly(), (x,))


def _pad(rows: Tensor, count: int) -> Tensor:
    padded = rows.new_zeros(count, rows.shape[1])
    padded[: len(rows)] = rows
    return padded
