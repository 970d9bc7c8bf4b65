"""A region at work: plans by input shape, and the call that runs them."""

from __future__ import annotations

import ctypes
import math
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mirrormask.machine.targets import Target, available_targets, best_target, fp16_target
from mirrormask.machine.timing import in_turns
from mirrormask.runtime.graph.ir import Graph, Unfit
from mirrormask.runtime.kernels.driver import MAX_THREADS
from mirrormask.runtime.schedule.lower import lower
from mirrormask.runtime.schedule.plan import Plan
from mirrormask.runtime.schedule.problem import Choice, Problem
from mirrormask.runtime.schedule.tune import Tuner

__all__ = ["Quick", "Region"]

#: Vectors of rows that one item of a plan over rows holds at most, and rows: more do not stay in the L2 cache between
#: wide layers.
MOST_VECTORS, MOST_TOKENS = 8, 128
#: Seconds that threads must save by sharing an item. Here they are awake when this is measured; between calls that lie
#: some milliseconds apart they fall asleep, and take longer to wake than a small model takes.
LEAST_GAIN = 5e-5
#: Products from which on threads take rows of their own: about twice :data:`LEAST_GAIN` on one thread.
LEAST_WORK = 4e6
#: Input shapes whose calls are kept prepared, and shapes per item whose plans are kept; the oldest go.
MOST_CALLS, MOST_SHAPES = 64, 32


class Region(nn.Module):
    """Runs a graph with generated kernels.

    Plans are made when first needed: for a region over images one per thread count (any batch size), for one over
    rows one for single rows and one per number of rows up to :attr:`most_tokens`.
    """

    def __init__(self, graph: Graph, target: Target, tuner: Tuner) -> None:
        super().__init__()
        self.graph, self.target, self.tuner = graph, target, tuner
        self._plans: dict[tuple[int, int], Plan] = {}
        self._calls: dict[tuple[Any, ...], _Call] = {}
        self._direct: list[DirectRegion] = []
        self._sized: dict[tuple[tuple[int, ...], ...], Region] = {}
        self._lock = threading.RLock()
        self.failed = ""
        """Why no plan could be made of it."""

    def __getstate__(self) -> dict[str, Any]:
        # Plans hold addresses of this process; they are made anew where the region goes.
        state = {**self.__dict__, "_plans": {}, "_calls": {}, "_direct": [], "_sized": {}}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()
        runs = fp16_target() is not None if self.target.half else self.target in available_targets()
        if not runs:
            self.target, self.tuner = best_target(), Tuner("", measure=self.tuner.measure, around=self.tuner.around)

    def sized(self, shapes: tuple[tuple[int, ...], ...]) -> Region:
        """The same region for inputs of other shapes per item.

        Raises:
            Unfit: an operation does not fit them; its message names it.
        """
        graph = self.graph
        if graph.rows:
            raise Unfit(f"it takes rows of {[graph.shapes[name] for name in graph.inputs]}, not {list(shapes)}")
        with self._lock:
            if shapes not in self._sized:
                self._sized[shapes] = self.remade(graph.resized(list(shapes)))
                while len(self._sized) > MOST_SHAPES:
                    self._sized.pop(next(iter(self._sized)))
            return self._sized[shapes]

    def remade(self, graph: Graph) -> Region:
        """Such a region for another graph."""
        return Region(graph, self.target, self.tuner)

    def plan_for(self, items: int, length: int = 0) -> Plan:
        """The plan for a call with so many images or rows; for a region over sequences, with rows of so many each."""
        with self._lock:
            key = (min(torch.get_num_threads(), MAX_THREADS), self.tokens(items, length))
            if key not in self._plans:
                plan = lower(self.graph, self.target, key[0], self._choose, key[1])
                question = f"a team may share {key} {self.graph.shapes}"
                plan.shares = plan.threads > 1 and self.tuner.decide(question, lambda: _sharing_pays(plan))
                self._plans[key] = plan
                # Dense weights are kept once, as the plan reads them.
                self.graph = self.graph.holding(plan.panels)
                self.tuner.save()
            return self._plans[key]

    def _choose(self, problem: Problem) -> Choice:
        return self.tuner(problem)

    def direct(self) -> Region:
        """The region for inputs with numbers that are not finite, which some kernels spread."""
        with self._lock:
            if not self._direct:
                self._direct.append(DirectRegion(self.graph, self.target, self.tuner))
            return self._direct[0]

    @property
    def tools(self) -> tuple[Target, Tuner, frozenset[str], bool]:
        """What :func:`mirrormask.runtime.model.half.make_region` made it of, but for the graph."""
        return self.target, self.tuner, frozenset(), False

    def plans(self) -> list[Plan]:
        """The plans made so far."""
        return list(self._plans.values())

    @property
    def parts(self) -> list[Region]:
        """The regions that do the work: this one."""
        return [self]

    def tokens(self, rows: int, length: int = 0) -> int:
        """Rows per item of the plan for a call with so many rows: all, or as many as make an item for each thread.

        Of sequences (of ``length``) an item takes whole ones, or of a long one as much as makes equal parts.

        Threads with rows of their own need not wait for each other after every layer; see :data:`LEAST_WORK`.
        """
        sequences = self.graph.sequences
        if not self.graph.rows or (rows == 1 and not sequences):
            return 1
        lanes, threads = self.target.lanes, min(torch.get_num_threads(), MAX_THREADS)
        if sequences and length:
            batch = rows // length
            if batch >= threads and rows * self.graph.products >= LEAST_WORK:
                batch = -(-batch // threads)
            if length > self.most_tokens:
                rows = -(-length // -(-length // self.most_tokens))
            else:
                rows = length * min(batch, self.most_tokens // length)
        elif rows >= threads * lanes and rows * self.graph.products >= LEAST_WORK:
            rows = -(-rows // threads)
        if rows < lanes:
            return max(lanes, 2)
        exact = min(self.most_tokens, -(-rows // lanes) * lanes)
        if not self._plans or (threads, exact) in self._plans:
            return exact
        # Numbers of rows that come later share few plans, however many there are.
        return min(self.most_tokens, lanes << (-(-rows // lanes) - 1).bit_length())

    @property
    def most_tokens(self) -> int:
        """Rows that one item of a plan over rows holds at most, a multiple of the vector width."""
        return min(MOST_TOKENS, MOST_VECTORS * self.target.lanes)

    @property
    def nbytes(self) -> int:
        """Memory of the plans made so far, and of the weights that they do not share."""
        constants = [value for plan in self._plans.values() for op in plan.ops for value in op.args.values()]
        kept = [node.weight for node in self.graph.layers() if node.weight is not None]
        weights = sum(w.nbytes for w in kept if not any(w.values is value for value in constants))
        plans = [plan for region in (self, *self._direct) for plan in region.plans()]
        return weights + sum(plan.nbytes for plan in plans)

    def quick(self, shape: torch.Size) -> Quick | None:
        """The parts of a call for a contiguous tensor of this shape, if one native call is all of it."""
        call = self._calls.get((shape, torch.get_num_threads()))
        return None if call is None or not call.simple else Quick(call)

    def forward(self, *inputs: Tensor) -> Any:
        """Run the region on float32 tensors of the captured shapes (any batch size), or of others that fit it.

        Raises:
            TypeError: an input is not a float32 tensor on the CPU.
            ValueError: the inputs do not fit the region or each other.
        """
        key = (*[x.shape for x in inputs], torch.get_num_threads())
        call = self._calls.get(key)
        if call is None:
            call = self._call_for(inputs, key)
        for x in inputs:
            if x.dtype is not torch.float32 or not x.is_cpu or x.layout is not torch.strided:
                raise TypeError(f"a region takes dense float32 tensors on the CPU, not {x.dtype} on {x.device}")
        return call(inputs)

    def _call_for(self, inputs: tuple[Tensor, ...], key: tuple[Any, ...]) -> _Call:
        """A call for inputs of shapes that were not seen before, or not lately."""
        with self._lock:
            region = self._region_for(inputs)
            try:
                call = _Call(region, [x.shape for x in inputs])
            except Exception as error:
                self.failed = f"no plan could be made: {error}"
                raise
            calls = dict(self._calls)  # others may be looking into the old one
            calls[key] = call
            while len(calls) > MOST_CALLS:
                calls.pop(next(iter(calls)))
            self._calls = calls
            return call

    def _region_for(self, inputs: tuple[Tensor, ...]) -> Region:
        """This region, or the one of it for other shapes per item."""
        graph = self.graph
        wanted = [graph.shapes[name] for name in graph.inputs]
        if len(inputs) != len(wanted):
            raise ValueError(f"the region takes {len(wanted)} tensors, not {len(inputs)}")
        if graph.flattens:
            found: list[tuple[int, ...]] = [(math.prod(x.shape[1:]),) for x in inputs]
        else:
            found = [tuple(x.shape[-1:] if graph.rows else x.shape[1:]) for x in inputs]
        streams = len(inputs) - len(graph.masks)
        leading = {graph.leading(x.shape) for x in inputs[:streams]}
        if graph.sequences:
            found[streams:] = [()] * len(graph.masks)
            _check_sequences(graph, leading, [tuple(x.shape) for x in inputs[streams:]])
        if len(leading) > 1:
            raise Unfit(f"the inputs have shapes {[tuple(x.shape) for x in inputs]}; they must have equal batches")
        return self if found == wanted else self.sized(tuple(found))


class DirectRegion(Region):
    """A region whose kernels compute every output from the inputs that its weights name, and no others."""

    def _choose(self, problem: Problem) -> Choice:
        return problem.direct(self.tuner(problem))


class _Call:
    """A region's call for one input shape and thread count, with all that can be known before it."""

    def __init__(self, region: Region, shapes: list[torch.Size]) -> None:
        leading = region.graph.leading(shapes[0])
        self.region = region
        self.items = math.prod(leading)
        self.sequences = region.graph.sequences
        length = leading[-1] if self.sequences else 0
        tokens = region.tokens(self.items, length)
        self.plan = region.plan_for(self.items, length)
        self.spreads = self.plan.spreads
        self.padded = self.items if self.sequences else -(-self.items // tokens) * tokens
        self.streams = len(shapes) - len(region.graph.masks)
        self.steps = np.zeros((len(self.plan.strides), 4), np.int64)
        self.inner = [(self.padded, *out) for out in self.plan.outputs]
        self.outer = [(*leading, *out) for out in self.plan.outputs]
        self.addresses = (ctypes.c_int64 * len(self.plan.strides))()
        place = ctypes.addressof(self.addresses)
        if self.sequences:
            self.run = self.plan.prepare(place, self.items // max(1, length), self.steps, length)
        else:
            self.run = self.plan.prepare(place, self.padded // tokens)
        self.simple = self.run.function is not None and self.inner == self.outer and len(self.plan.strides) == 2

    def __call__(self, inputs: tuple[Tensor, ...]) -> Any:
        tensors = [x.contiguous() for x in inputs[: self.streams]]
        masks = inputs[self.streams :]
        if self.padded != self.items:
            tensors = [_pad(x.reshape(self.items, -1), self.padded) for x in tensors]
        results = [torch.empty(shape) for shape in self.inner]
        with self.plan.lock:
            for i, x in enumerate((*tensors, *masks, *results)):
                self.addresses[i] = x.data_ptr()
            for i, mask in enumerate(masks, self.streams):
                self.steps[i] = [0 if size == 1 else step for size, step in zip(mask.shape, mask.stride(), strict=True)]
            self.run()
            spread = self.spreads and self.plan.lower_flag()
        if spread:
            return self.region.direct().forward(*inputs)
        if self.inner != self.outer:
            results = [x[: self.items].view(shape) for x, shape in zip(results, self.outer, strict=True)]
        return results[0] if len(results) == 1 else tuple(results)


class Quick:
    """What a simple call needs, for a caller that makes it without a function between; see ``CompiledModel``."""

    __slots__ = (
        "_keep",
        "addresses",
        "direct",
        "function",
        "lock",
        "lower_flag",
        "size",
        "spreads",
        "strides",
        "threads",
        "words",
    )

    def __init__(self, call: _Call) -> None:
        self.threads = torch.get_num_threads()
        self.size = call.outer[0]
        self.strides = torch.empty(self.size).stride()
        self.addresses = call.addresses
        self.function, self.words, self.lock = call.run.function, call.run.words, call.plan.lock
        self.spreads, self.lower_flag, self.direct = call.spreads, call.plan.lower_flag, call.region.direct
        self._keep = call


def _sharing_pays(plan: Plan) -> bool:
    """Whether one item runs so much faster when all threads share it that it may be worth waking them.

    The fastest of several turns decides: other work on the machine lengthens turns, and those of several threads most.
    """
    # Any memory will do for tensors: one that is large enough for each.
    tensors = [torch.zeros(max(1, stride * max(1, plan.tokens))) for stride in plan.strides]
    addresses = (ctypes.c_int64 * len(tensors))(*[x.data_ptr() for x in tensors])
    runs = {}
    for plan.shares in (False, True):
        runs[plan.shares] = plan.prepare(ctypes.addressof(addresses), 1, None, plan.tokens)
    seconds = {shares: min(times) for shares, times in in_turns(runs, rounds=50, budget=0.002, limit=1.0).items()}
    return seconds[True] < min(0.95 * seconds[False], seconds[False] - LEAST_GAIN)


def _check_sequences(graph: Graph, leading: set[tuple[int, ...]], masks: list[tuple[int, ...]]) -> None:
    """Whether masks are as large as their scores, or repeated to it.

    Raises:
        Unfit: they are not, or there are no sequences.
    """
    for batch, *rest in leading:
        if len(rest) != 1:
            raise Unfit(f"rows with leading dimensions {(batch, *rest)} are no sequences")
        for mask, name in zip(masks, graph.masks, strict=True):
            heads = {node.groups for node in graph.users(name)}
            wanted = (batch, *(heads if len(heads) == 1 else {1}), rest[0], rest[0])
            if len(mask) != 4 or any(size not in (1, full) for size, full in zip(mask, wanted, strict=True)):
                raise Unfit(f"a mask has shape {mask}, which is not that of the scores, {wanted}, or 1 in places")


def _pad(rows: Tensor, count: int) -> Tensor:
    padded = rows.new_zeros(count, rows.shape[1])
    padded[: len(rows)] = rows
    return padded
