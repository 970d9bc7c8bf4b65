"""The fused step of a SparseOptimizer: which update, which kernel, which pieces on which thread."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from mirrormask.fused.dual import Dual
from mirrormask.fused.product import Product
from mirrormask.fused.update import Update
from mirrormask.jit import host_engine
from mirrormask.linking import step_plain_parameters

if TYPE_CHECKING:
    from mirrormask.optimizer import SparseOptimizer

__all__ = ["FusedStep"]

#: The updates that there are.
UPDATES: tuple[Update, ...] = (Product(), Dual())

#: Below this many weights a second thread costs more than it saves: it shares a core with torch's own worker, which
#: goes on spinning for a while after the backward pass.
ELEMENTS_PER_THREAD = 1 << 21


@functools.cache
def _kernel(update: Update, nesterov: bool, masked: bool) -> Callable[[int, int], None]:
    name = f"sgd_{update.name}{'_nesterov' * nesterov}{'_masked' * masked}"
    engine = host_engine()
    engine.compile(update.ir(name, nesterov=nesterov, masked=masked))
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(engine.address(name))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="mirrormask-step")


class FusedStep:
    """The fused step of one SparseOptimizer; :meth:`step` says whether it could serve."""

    def __init__(self, optimizer: SparseOptimizer) -> None:
        self._optimizer = optimizer
        self._weights = list(optimizer.weights.values())
        self._update = next((update for update in UPDATES if update.serves(optimizer.method.geometry)), UPDATES[0])
        self._possible = self._can_serve()
        self._threads = 0
        self._rows: Any = np.zeros(0, self._update.row())  # one a piece; a piece is part of one weight
        self._owner = np.zeros(0, np.int64)  # the weight of each piece
        self._start = np.zeros(0, np.int64)  # where in the weight it starts, in elements
        self._groups = np.zeros(0, np.int64)  # the parameter group of each piece
        self._rates = np.zeros(0)  # the factor on that group's learning rate
        self._shares: list[slice] = []  # the pieces of each thread

    def _can_serve(self) -> bool:
        """What cannot change between steps: the kinds of base and geometry, devices, dtypes and layouts."""
        optimizer = self._optimizer
        if type(optimizer.base) is not torch.optim.SGD or not self._update.serves(optimizer.method.geometry):
            return False
        if optimizer.method.after is not None:
            return False
        if importlib.util.find_spec("llvmlite") is None:
            return False
        return all(
            _is_plain(tensor) and tensor.stride() == x.stride()
            for x in self._weights
            for tensor in (x, *(optimizer.state[x][name] for name in self._update.latents))
        )

    def step(self) -> bool:
        """Do one whole step if the options and gradients allow it; False if nothing was done."""
        optimizer = self._optimizer
        if not self._possible:
            return False
        groups = optimizer.param_groups
        nesterov = bool(groups[0]["nesterov"])
        if any(
            group["dampening"] or group["maximize"] or group["differentiable"] or bool(group["nesterov"]) != nesterov
            for group in groups
        ):
            return False
        grads = [x.grad for x in self._weights]
        if not all(
            grad is not None and grad.dtype == torch.float32 and grad.stride() == x.stride() and not grad.is_sparse
            for x, grad in zip(self._weights, grads, strict=True)
        ):
            return False
        masks = self._update.masks(optimizer)
        if masks is not None and [mask.stride() for mask in masks] != [x.stride() for x in self._weights]:
            return False
        if torch.get_num_threads() != self._threads:
            self._cut()
        self._rows["grad"] = self._addresses([grad for grad in grads if grad is not None])
        if masks is not None:
            self._rows["mask"] = self._addresses(masks)
        self._fill()
        kernel = _kernel(self._update, nesterov, masks is not None)
        address, size = self._rows.ctypes.data, self._rows.dtype.itemsize
        jobs = [
            _pool(self._threads).submit(kernel, address + share.start * size, share.stop - share.start)
            for share in self._shares[1:]
        ]
        kernel(address, self._shares[0].stop)
        for job in jobs:
            job.result()
        step_plain_parameters(optimizer)
        return True

    def _cut(self) -> None:
        """Cut the weights into pieces, so that every thread gets the same number of elements."""
        optimizer = self._optimizer
        self._threads = torch.get_num_threads()
        total = sum(x.numel() for x in self._weights)
        threads = max(1, min(self._threads, total // ELEMENTS_PER_THREAD))
        share = -(-total // threads)
        pieces: list[tuple[int, int, int]] = []  # weight, first element, count
        starts, done = [0], 0
        for index, x in enumerate(self._weights):
            first = 0
            while first < x.numel():
                count = min(x.numel() - first, len(starts) * share - done)
                pieces.append((index, first, count))
                first, done = first + count, done + count
                if done == len(starts) * share and done < total:
                    starts.append(len(pieces))
        self._shares = [slice(a, b) for a, b in zip(starts, [*starts[1:], len(pieces)], strict=True)]
        self._owner = np.array([piece[0] for piece in pieces], np.int64)
        self._start = np.array([piece[1] for piece in pieces], np.int64)
        group_of = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self._groups = np.array([group_of[x] for x in self._weights], np.int64)[self._owner]
        self._rates = np.array([optimizer.state[x]["rate"] for x in self._weights])[self._owner]
        self._rows = np.zeros(len(pieces), self._update.row())
        self._rows["count"] = [piece[2] for piece in pieces]
        for field, column in self._update.tensors(optimizer).items():
            self._rows[field] = self._addresses(column)

    def _addresses(self, tensors: list[Tensor]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Where each piece of these tensors, one a weight, begins."""
        starts = np.array([tensor.data_ptr() for tensor in tensors], np.int64)
        return cast(
            "np.ndarray[Any, np.dtype[np.int64]]", starts[self._owner] + tensors[0].element_size() * self._start
        )

    def _fill(self) -> None:
        """Put the numbers of this step into the table."""
        groups = self._optimizer.param_groups
        self._rows["lr"] = np.array([float(group["lr"]) for group in groups])[self._groups] * self._rates
        self._rows["momentum"] = np.array([float(group["momentum"]) for group in groups])[self._groups]
        self._update.fill(self._rows, self._optimizer, self._groups, self._owner)


def _is_plain(tensor: Tensor) -> bool:
    """A float32 tensor in CPU memory without holes, in either of torch's two layouts, and of no special kind."""
    kind = type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == torch.float32 and tensor.device.type == "cpu"
    dense = tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
    return kind and dense
