"""What a fused update works on: tensors cut into pieces, a row each, shared out to threads."""

from __future__ import annotations

import ctypes
import functools
import operator
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mirrormask.fused.team import openmp
from mirrormask.fused.update import Update
from mirrormask.jit import host_engine

if TYPE_CHECKING:
    from mirrormask.optimizer import SparseOptimizer

__all__ = ["Table"]

#: With fewer weights than this for each, more threads cost more than they save.
ELEMENTS_PER_THREAD = 1 << 15
#: The same for threads that are not torch's: they share cores with torch's own workers, which go on spinning for a
#: while after the backward pass.
ELEMENTS_PER_OWN_THREAD = 1 << 21


class _Function(NamedTuple):
    """A compiled loop over rows: ``run(rows, count)``, and the address of what each thread of a team calls."""

    run: Callable[[int, int], None]
    team: int


class _Kernel(NamedTuple):
    """The compiled functions of an update."""

    step: _Function
    check: _Function


@functools.cache
def _kernel(update: Update, nesterov: bool, masked: bool) -> _Kernel:
    name = f"sgd_{update.name}{'_nesterov' * nesterov}{'_masked' * masked}"
    engine = host_engine()
    engine.compile(update.ir(name, nesterov=nesterov, masked=masked))
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
    step, check = (
        _Function(kind(engine.address(function)), engine.address(f"{function}_team"))
        for function in (name, f"{name}_check")
    )
    return _Kernel(step, check)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="mirrormask-step")


class Table:
    """Parameters that one update steps.

    Attributes:
        rows: one row a piece, which is part of one parameter: addresses, counts, numbers of the step.
        groups: the parameter group of each row.
        owner: the position of each row's parameter among ``parameters``.
    """

    def __init__(self, update: Update, optimizer: SparseOptimizer, parameters: Sequence[Tensor]) -> None:
        self.update = update
        self.parameters = list(parameters)
        self.rows: Any
        self._optimizer = optimizer
        self._threads = torch.get_num_threads()
        self._places = [p.data_ptr() for p in self.parameters]
        self._cut()
        group_of = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self.groups = np.array([group_of[p] for p in self.parameters], np.int64)[self.owner]
        self._rates = np.array([optimizer.state.get(p, {}).get("rate", 1.0) for p in self.parameters])[self.owner]
        for field, column in update.tensors(optimizer, self.parameters).items():
            self.rows[field] = self._addresses(column)

    def fits(self, parameters: Sequence[Tensor]) -> bool:
        """Whether the table is of these parameters, where they are now, and of the threads that there are now."""
        places = [p.data_ptr() for p in parameters]
        same = places == self._places and all(map(operator.is_, parameters, self.parameters))
        return same and torch.get_num_threads() == self._threads

    def take_gradients(self) -> bool:
        """Look up where the gradients are; False if one is missing or laid out unlike its parameter."""
        grads = [p.grad for p in self.parameters]
        found = [grad for grad in grads if grad is not None]
        if len(found) < len(grads) or not all(
            grad.dtype == torch.float32 and grad.stride() == p.stride() and not grad.is_sparse
            for p, grad in zip(self.parameters, found, strict=True)
        ):
            return False
        self.rows["grad"] = self._addresses(found)
        return True

    def finite(self, *, nesterov: bool) -> bool:
        """Whether all gradients are finite."""
        self._run(_kernel(self.update, nesterov, False).check)
        return not self.rows["bad"].any()

    def step(self, *, nesterov: bool, masks: list[Tensor] | None) -> None:
        """One step of all parameters."""
        groups, rows = self._optimizer.param_groups, self.rows
        if masks is not None:
            rows["mask"] = self._addresses(masks)
        rows["lr"] = np.array([float(group["lr"]) for group in groups])[self.groups] * self._rates
        rows["momentum"] = np.array([float(group["momentum"]) for group in groups])[self.groups]
        self.update.fill(self, self._optimizer)
        self._run(_kernel(self.update, nesterov, masks is not None).step)

    def _cut(self) -> None:
        """Cut the parameters into pieces, so that every thread gets the same number of elements."""
        total = sum(p.numel() for p in self.parameters)
        least = ELEMENTS_PER_OWN_THREAD if openmp() is None else ELEMENTS_PER_THREAD
        threads = max(1, min(self._threads, total // least))
        share = -(-total // threads)
        pieces: list[tuple[int, int, int]] = []  # parameter, first element, count
        starts, done = [0], 0
        for index, p in enumerate(self.parameters):
            first = 0
            while first < p.numel():
                count = min(p.numel() - first, len(starts) * share - done)
                pieces.append((index, first, count))
                first, done = first + count, done + count
                if done == len(starts) * share and done < total:
                    starts.append(len(pieces))
        self._bounds = np.array([*starts, len(pieces)], np.int64)
        self.owner = np.array([piece[0] for piece in pieces], np.int64)
        self._start = np.array([piece[1] for piece in pieces], np.int64)
        self.rows = np.zeros(len(pieces), self.update.row())
        self.rows["count"] = [piece[2] for piece in pieces]

    @property
    def shares(self) -> int:
        """How many threads a step is shared out to."""
        return len(self._bounds) - 1

    def _addresses(self, tensors: list[Tensor]) -> npt.NDArray[np.int64]:
        """Where each piece of these tensors, one a parameter, begins."""
        starts = np.array([tensor.data_ptr() for tensor in tensors], np.int64)
        size = tensors[0].element_size()
        return starts[self.owner] + size * self._start  # type: ignore[no-any-return]

    def _run(self, function: _Function) -> None:
        """Each share of the rows on a thread: torch's, or where they cannot be had our own."""
        rows, team = self.rows.ctypes.data, openmp()
        if self.shares == 1:
            function.run(rows, len(self.rows))
        elif team is not None:
            task = np.array([rows, self._bounds.ctypes.data, self.shares, team.thread_num, team.num_threads], np.int64)
            # With torch's number of threads: a smaller team would make the runtime end the others.
            team.parallel(function.team, task.ctypes.data, self._threads)
        else:
            size = self.rows.dtype.itemsize
            spans = [(rows + int(a) * size, int(b - a)) for a, b in pairwise(self._bounds)]
            jobs = [_pool(self.shares).submit(function.run, *span) for span in spans[1:]]
            function.run(*spans[0])
            for job in jobs:
                job.result()
