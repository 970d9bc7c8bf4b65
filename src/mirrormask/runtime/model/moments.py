"""A recurrent layer's loop at work: one native call for all moments of some sequences."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirrormask.runtime.model.region import Region
from mirrormask.runtime.schedule.plan import Plan
from mirrormask.runtime.schedule.runner import Runner

__all__ = ["Moments"]


class Moments(Region):
    """Runs a graph whose items are moments: ``[length, batch, gates * hidden]`` -> ``[length, batch, states]``.

    The sequences of a batch are the rows of an item. On one thread: each moment needs the one before.
    """

    def plan_for(self, items: int, length: int = 0) -> Plan:
        """The plan for a batch of so many sequences, or for a part of it."""
        return self.core.plan_for(1, min(items, self.core.most_tokens))

    def tokens(self, rows: int, length: int = 0) -> int:
        """Sequences that the plan for so many has room for."""
        return self.core.tokens(1, min(rows, self.core.most_tokens))

    def quick(self, shape: torch.Size) -> None:
        """There is no short way: the state is to be set."""

    def forward(self, *inputs: Tensor) -> Any:
        """Run all moments.

        Args:
            inputs: what the moments bring, and the state ``[batch, states]`` before the first, zeros without.

        Raises:
            TypeError: an input is not a float32 tensor on the CPU.
            ValueError: the inputs do not fit the region or each other.
        """
        for x in inputs:
            if x.dtype is not torch.float32 or not x.is_cpu or x.layout is not torch.strided:
                raise TypeError(f"a region takes dense float32 tensors on the CPU, not {x.dtype} on {x.device}")
        pre, first = inputs[0], inputs[1] if len(inputs) > 1 else None
        width, states = self.graph.shapes["pre"], self.graph.node("before").span
        if pre.dim() != 3 or pre.shape[2:] != width or (first is not None and first.shape != (pre.shape[1], *states)):
            raise ValueError(
                f"the region takes moments of {width}, and states of {states}, not {[x.shape for x in inputs]}"
            )
        most = self.core.most_tokens
        parts = []
        for low in range(0, pre.shape[1], most):
            state = None if first is None else first[low : low + most]
            parts.append(self._run(self.core, pre[:, low : low + most], state))
        if not parts:
            return pre.new_empty(*pre.shape[:2], *self.graph.shapes["after"])
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _run(self, core: Runner, pre: Tensor, first: Tensor | None) -> Tensor:
        rows, length = pre.shape[1], pre.shape[0]
        try:
            plan, tokens = core.plan_for(1, rows), core.tokens(1, rows)
        except Exception as error:
            self.failed = f"no plan could be made: {error}"
            raise
        given = pre.contiguous().resolve_neg()
        if tokens != rows:
            given = pre.new_zeros(length, tokens, pre.shape[2])
            given[:, :rows] = pre
        made = torch.empty(length, tokens, *self.graph.shapes["after"])
        addresses = np.array([given.data_ptr(), made.data_ptr()], np.int64)
        with plan.lock:
            plan.set_state(None if first is None else first.detach().resolve_neg().numpy())
            plan.prepare(addresses.ctypes.data, length)()
            again = plan.spreads and plan.lower_flag()
        if again:
            return self._run(core.direct(), pre, first)
        return made if tokens == rows else made[:, :rows]
