"""What a fused update works on: tensors cut into pieces, which are shared out to threads."""

from __future__ import annotations

import ctypes
import functools
import itertools
import operator
import struct
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mirrormask.machine.code import functions
from mirrormask.machine.openmp import openmp
from mirrormask.optimizer.base_optimizer import BaseOptimizer
from mirrormask.optimizer.steps.base import Now
from mirrormask.optimizer.steps.fused_cpu.rounding import key_halves
from mirrormask.optimizer.steps.fused_cpu.update import Rows, Update
from mirrormask.optimizer.weights import SparseWeights

__all__ = ["Table"]

#: With fewer weights than this for each, more threads cost more than they save.
ELEMENTS_PER_THREAD = 1 << 15
#: The same for threads that are not torch's: they share cores with torch's own workers, which go on spinning for a
#: while after the backward pass.
ELEMENTS_PER_OWN_THREAD = 1 << 21
#: Elements of all arrays together from which on x is written past the caches: 32 MB, what a last cache holds, so that
#: it is the step itself that would read x back only to overwrite it.
STREAMED_ELEMENTS = 1 << 23
#: Pieces of a parameter start at multiples of so many elements, a cache line.
LINE = 16


class _Function(NamedTuple):
    """A compiled loop over pieces: ``run(task, first, last)``, and the address of what each thread of a team calls."""

    run: Callable[[int, int, int], None]
    team: int


class _Kernel(NamedTuple):
    """The compiled functions of an update."""

    step: _Function
    check: _Function


@functools.cache
def _kernel(update: Update, nesterov: bool, masked: bool, momenta: bool) -> _Kernel:
    kinds = {"narrow": update.narrow, "nesterov": nesterov, "masked": masked, "still": not momenta}
    name = "_".join(["sgd", update.name, *(kind for kind, is_so in kinds.items() if is_so)])
    own, check = name, f"{name}_check"
    ir = update.ir(name, nesterov=nesterov, masked=masked, momenta=momenta)
    at = functions("sgd", ir, (own, f"{own}_team", check, f"{check}_team"))
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    return _Kernel(*(_Function(kind(at[function]), at[f"{function}_team"]) for function in (own, check)))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="mirrormask-step")


class Table:
    """Parameters that one update steps.

    What changes between steps is written with ``struct``: between two passes over a whole network the processor has
    forgotten everything, and each further function of NumPy's or torch's takes ten times as long as it does in a loop.

    Attributes:
        update: the update.
        parameters: the model's parameters.
        groups: the parameter group of each.
        momenta: whether there is momentum, of all of them or of none.
    """

    def __init__(
        self,
        update: Update,
        weights: SparseWeights,
        base: BaseOptimizer,
        parameters: Sequence[Tensor],
        *,
        momenta: bool = True,
    ) -> None:
        self.update, self.momenta = update, momenta
        self.parameters = list(parameters)
        self.groups = [base.group_of[p] for p in self.parameters]
        self._weights, self._base = weights, base
        self._threads = torch.get_num_threads()
        self._columns = update.columns(momenta=momenta)
        self._rates = [float(weights.state(p)["rate"]) if weights.holds(p) else 1.0 for p in self.parameters]
        size, numbers = len(self.parameters), len(update.fields(momenta=momenta))
        pieces, starts = self._cut()
        self._pieces = _integers(itertools.chain.from_iterable(pieces))
        self._bounds = _integers([*starts, len(pieces)])
        self._arrays = _integers([0] * (len(self._columns) * size))
        self._numbers = (ctypes.c_float * (numbers * size))()
        self._bad = (ctypes.c_int32 * len(pieces))()
        self._column, self._row = struct.Struct(f"{size}q"), struct.Struct(f"{numbers * size}f")
        self._strides = [p.stride() for p in self.parameters]
        self._held = self._found()  # so that what the addresses are of stays there
        self._entries = self._kept()  # once more: the first momentum was made by looking
        self._places = [[tensor.data_ptr() for tensor in tensors] for tensors in self._held.values()]
        for field, tensors in self._held.items():
            self._point(field, tensors)
        team = openmp()
        self._task = _integers(
            (
                *(ctypes.addressof(array) for array in (self._arrays, self._numbers, self._pieces, self._bad)),
                *(size, ctypes.addressof(self._bounds), self.shares),
                *((0, 0) if team is None else (team.thread_num, team.num_threads)),
                self._streams(),
            )
        )
        self._address = ctypes.addressof(self._task)

    @property
    def shares(self) -> int:
        """How many threads a step is shared out to."""
        return len(self._bounds) - 1

    def fits(self, parameters: Sequence[Tensor], *, momenta: bool) -> bool:
        """Whether the table is of these parameters and of the threads that there are now, and all is where it was.

        Somebody may have put other tensors into the state of the base optimizer, or moved those that are there.
        """
        if momenta != self.momenta or torch.get_num_threads() != self._threads:
            return False
        if len(parameters) != len(self.parameters) or not all(map(operator.is_, parameters, self.parameters)):
            return False
        kept = self._kept()
        if len(kept) == len(self._entries) and all(map(operator.is_, kept, self._entries)):
            return [[tensor.data_ptr() for tensor in tensors] for tensors in self._held.values()] == self._places
        found = self._found()
        if [[tensor.data_ptr() for tensor in tensors] for tensors in found.values()] != self._places:
            return False
        self._held, self._entries = found, self._kept()
        return True

    def _kept(self) -> list[Any]:
        """All that is kept of any tensor: where it is the same, so is what :meth:`_found` finds."""
        return [*self._weights.kept(), *self._base.kept()]

    def _found(self) -> dict[str, list[Tensor]]:
        return self.update.tensors(self.parameters, self._weights, self._base, momenta=self.momenta)

    def take_gradients(self) -> bool:
        """Look up where the gradients are; False if one is missing or laid out unlike its parameter."""
        found = []
        for p, strides in zip(self.parameters, self._strides, strict=True):
            grad = p.grad
            if grad is None or grad.dtype != torch.float32 or grad.is_sparse or grad.stride() != strides:
                return False
            found.append(grad)
        self._point("grad", found)
        return True

    def finite(self, *, nesterov: bool) -> bool:
        """Whether all gradients are finite."""
        self._run(_kernel(self.update, nesterov, False, self.momenta).check)
        return not any(self._bad)

    def step(self, now: Now, *, nesterov: bool, masks: list[Tensor] | None) -> None:
        """One step of all parameters."""
        if masks is not None:
            self._point("mask", masks)
        lrs = [now.lrs[group] * rate for group, rate in zip(self.groups, self._rates, strict=True)]
        by_group = [float(self._base.options(group)["momentum"]) for group in range(len(now.lrs))]
        momenta = [by_group[group] for group in self.groups]
        rows = Rows(self.parameters, self.groups)
        keys = [key_halves(now.clock.step, k) for k in range(len(rows.parameters))] if self.update.narrow else []
        halves = zip(*keys, strict=True) if self.momenta else ()
        numbers = itertools.chain(lrs, momenta, *self.update.fill(rows, self._weights, self._base, now), *halves)
        self._row.pack_into(self._numbers, 0, *numbers)
        self._run(_kernel(self.update, nesterov, masks is not None, self.momenta).step)

    def _point(self, field: str, tensors: list[Tensor]) -> None:
        """Write where these tensors, one a parameter, are."""
        offset = self._columns.index(field) * self._column.size
        self._column.pack_into(self._arrays, offset, *[tensor.data_ptr() for tensor in tensors])

    def _streams(self) -> bool:
        """Whether x is written past the caches: where they cannot keep it anyway until the next forward pass."""
        total = sum(p.numel() for p in self.parameters)
        return self.update.streams and total * (len(self._columns) - 1) >= STREAMED_ELEMENTS

    def _cut(self) -> tuple[list[tuple[int, int, int]], list[int]]:
        """Cut the parameters into pieces (parameter, first element, count), such that every thread gets the same number
        of elements, but for the rest of a cache line; and the first piece of each thread."""  # fmt: skip
        total = sum(p.numel() for p in self.parameters)
        least = ELEMENTS_PER_OWN_THREAD if openmp() is None else ELEMENTS_PER_THREAD
        threads = max(1, min(self._threads, total // least))
        share = -(-total // threads)
        pieces: list[tuple[int, int, int]] = []
        starts, done = [0], 0
        for index, p in enumerate(self.parameters):
            first = 0
            while first < p.numel():
                due = len(starts) * share - done
                count = min(p.numel() - first, due + -due % LINE)
                pieces.append((index, first, count))
                first, done = first + count, done + count
                if done >= len(starts) * share and done < total:
                    starts.append(len(pieces))
        return pieces, starts

    def _run(self, function: _Function) -> None:
        """Each share of the pieces on a thread: torch's, or where they cannot be had our own."""
        team = openmp()
        if self.shares == 1:
            function.run(self._address, 0, len(self._bad))
        elif team is not None:
            team.run(function.team, self._address, self._threads)
        else:
            first, *others = ((self._address, a, b) for a, b in itertools.pairwise(self._bounds))
            jobs = [_pool(self.shares).submit(function.run, *span) for span in others]
            function.run(*first)
            for job in jobs:
                job.result()


def _integers(values: Iterable[int]) -> ctypes.Array[ctypes.c_int64]:
    """An array that generated code can read."""
    found = list(values)
    return (ctypes.c_int64 * len(found))(*found)
