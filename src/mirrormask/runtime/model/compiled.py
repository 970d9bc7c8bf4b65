"""A compiled model: checks its inputs, and hands them to what was made for their shapes."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, empty_strided, float32, get_num_threads, nn
from torch._C import _is_tracing as is_tracing
from torch.utils import _pytree as pytree

from mirrormask.runtime.graph.export import Arguments
from mirrormask.runtime.model.piece import Piece, pieces_of
from mirrormask.runtime.model.region import Quick, Region
from mirrormask.runtime.model.report import Report
from mirrormask.runtime.model.save import save
from mirrormask.runtime.model.snapshot import Snapshot

__all__ = ["CompiledModel"]

#: Input shapes whose short way a compiled model keeps; the oldest goes.
MOST_SHAPES = 32


class CompiledModel(nn.Module):
    """A model compiled by :func:`compile`; call it as the model was called.

    It keeps the weights that the model had when it was compiled: see :meth:`stale`. Any number of threads may call it.

    Attributes:
        report: what was chosen for each layer, and the times. ``print(fast.report)``.
    """

    report: Report
    _body: nn.Module
    _signature: inspect.Signature | None
    _snapshot: Snapshot
    _quick: dict[torch.Size, Quick]

    def __init__(
        self, body: nn.Module, signature: inspect.Signature | None, snapshot: Snapshot, report: Report
    ) -> None:
        super().__init__()
        self.training = False
        self.report = report
        # Kept out of the submodules: what is in them is not this module's to train or to move.
        self.__dict__["_body"] = body
        self._signature, self._snapshot = signature, snapshot
        self.__dict__["_quick"] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model without recording gradients.

        Under autocast too it computes in the precision that it was compiled for.

        Raises:
            TypeError: the model does not take such arguments.
            ValueError: a tensor is not on the CPU, or requires grad; or the call needs a new capture, and the model is
                gone.
            RuntimeError: the call needs a new capture, and the model has other weights by now; or it is traced.
            Exception: what the model itself says of a call that it does not take.
        """
        x = args[0] if args else None
        if type(x) is Tensor and len(args) == 1 and not kwargs and not x.is_nested:
            # Small models take microseconds: one look-up, and the call without another layer between.
            quick = self._quick.get(x.shape)
            if (
                quick is not None
                and quick.threads == get_num_threads()
                and x.dtype is float32
                and x.is_cpu
                and not x.requires_grad
                and x.is_contiguous()
                and not x.is_neg()
                and not is_tracing()
            ):
                result = empty_strided(quick.size, quick.strides)
                with quick.lock:
                    quick.addresses[0], quick.addresses[1] = x.data_ptr(), result.data_ptr()
                    quick.function(quick.words)
                    spread = quick.spreads and quick.lower_flag()
                return quick.directly(x) if spread else result
        if is_tracing():
            raise RuntimeError(
                "a compiled model cannot be traced: native calls are no operations; trace the model itself"
            )
        try:
            arguments = Arguments.of(self._signature, args, kwargs)
        except TypeError as error:
            raise TypeError(f"the compiled model is called as its model was, {self._signature}: {error}") from None
        for tensor in arguments.tensors:
            _check(tensor)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            if not isinstance(self._body, Piece):
                return self._body(*arguments.args, **arguments.kwargs)
            result = self._body.run(arguments)
            if len(args) == 1 and not kwargs and type(x) is Tensor:
                self._remember(x, self._body.region_of(arguments))
        return _strided_as(arguments, result)

    def _remember(self, x: Tensor, region: Region | None) -> None:
        """Let calls of this shape take the short way from now on, if there is one."""
        quick = None if region is None else region.quick(x.shape)
        if quick is not None and x.shape not in self._quick:
            known = {**self._quick, x.shape: quick}  # others may be looking into the old one
            while len(known) > MOST_SHAPES:
                known.pop(next(iter(known)))
            self.__dict__["_quick"] = known

    @property
    def regions(self) -> list[Region]:
        """The parts that run natively."""
        pieces = pieces_of(self._body)
        found = [c.region for piece in pieces for c in piece.captures if c.region is not None]
        inner = [c.module for piece in pieces for c in piece.captures if c.module is not None]
        return found + [m for module in inner for m in module.modules() if isinstance(m, Region)]

    def stale(self) -> list[str]:
        """The tensors of the model that changed since it was compiled; all, if the model is gone.

        These are its parameters and buffers, and other tensors in attributes of its modules, or in lists and dicts
        there (``table``, ``tables.0``), but for those that a call of the model puts there.

        The compiled model keeps the weights that it was made of. To follow the model, compile it again.

        Example:
            >>> import torch, mirrormask as mm
            >>> model = torch.nn.Linear(8, 4).eval()
            >>> fast = mm.compile(model, torch.randn(2, 8))
            >>> fast.stale()
            []
            >>> _ = model.weight.data.mul_(2)
            >>> fast.stale()
            ['weight']
        """
        return self._snapshot.changed()

    def save(self, path: str | os.PathLike[str], *, metadata: Mapping[str, Any] | None = None) -> None:
        """Write the compiled model to one file that runs without torch, see :func:`mirrormask.runtime.load`.

        The file holds the graph, what was chosen for this processor, and the weights: no code, nothing that is executed
        when it is read. It is a file of :func:`mirrormask.save` too, from which :func:`mirrormask.load` reads the
        weights. Whoever reads ``path`` finds the old file or the new one.

        Args:
            path: where to write; its folder must exist.
            metadata: notes; texts are stored as they are, other values as JSON.

        Raises:
            ValueError: part of the model stays in PyTorch, or was called in a way that a file cannot hold; the message
                names it.
            OSError: the file cannot be written; the old file is untouched.

        Example:
            >>> import tempfile, torch, mirrormask as mm
            >>> fast = mm.compile(torch.nn.Linear(8, 4).eval(), torch.randn(2, 8), force=True)
            >>> path = os.path.join(tempfile.mkdtemp(), "model.mirror")
            >>> fast.save(path, metadata={"name": "small"})
            >>> mm.runtime.load(path).metadata
            {'name': 'small'}
        """
        save(self._body, self.report, path, metadata)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_quick": {}}

    def train(self, mode: bool = True) -> CompiledModel:
        """A compiled model stays in evaluation: a parent's ``train()`` leaves it as it is, with a warning."""
        if mode:
            warnings.warn(
                "a compiled model stays in evaluation; train the original, and compile it again", stacklevel=2
            )
        return self

    def _no_hooks(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError(
            "hooks on a compiled model, or on a part of it, would not run; register them on a module that holds it"
        )

    register_forward_hook = register_forward_pre_hook = _no_hooks
    register_full_backward_hook = register_full_backward_pre_hook = register_backward_hook = _no_hooks


def _check(x: Tensor) -> None:
    if not x.is_cpu:
        raise ValueError(f"an input is on {x.device}, and the compiled model runs on the CPU; pass x.cpu()")
    if x.requires_grad:
        raise ValueError("an input requires grad, and a compiled model computes none; pass x.detach()")


def _strided_as(arguments: Arguments, result: Any) -> Any:
    """Images come out in the order of memory in which they came in, as from PyTorch's convolutions."""
    last = torch.channels_last
    images = [x for x in arguments.tensors if x.dim() == 4 and not x.is_contiguous()]
    if not any(x.is_contiguous(memory_format=last) for x in images):
        return result
    return pytree.tree_map_only(
        Tensor, lambda x: x.contiguous(memory_format=last) if x.dim() == 4 and x.is_contiguous() else x, result
    )
