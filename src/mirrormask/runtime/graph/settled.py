"""Whether the sizes that an export leaves open are still open after its program was rewritten.

Its guards say what was decided of them while it was traced. A pass that runs PyTorch on open sizes may decide more, of
which no guard knows: that there are as many items as the example has, for one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["OpenSizes", "Settled"]


class Settled(Exception):
    """Rewriting a program decided something about a size that its guards leave open."""


class OpenSizes:
    """What is decided of a program's sizes."""

    def __init__(self, module: fx.GraphModule) -> None:
        values = [node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"]
        sizes: list[Any] = [size for value in values if isinstance(value, Tensor) for size in value.shape]
        envs: list[Any] = [size.node.shape_env for size in sizes if isinstance(size, torch.SymInt)]
        self._env = envs[0] if envs else None
        self._decided = self._count()

    def _count(self) -> int:
        return 0 if self._env is None else len(self._env.guards) + len(self._env.replacements)

    def check(self) -> None:
        """Look whether more is decided now.

        Raises:
            Settled: it is.
        """
        if self._count() != self._decided:
            raise Settled("a size that is open was settled")
