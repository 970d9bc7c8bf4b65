"""A trace with open sizes, which ends where nothing good can come of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["OpenTrace", "TokensOfMaps"]

#: Characters of the longest formula of a size with which a trace goes on. Those of strided convolutions and pools have
#: some fifty. Where each layer pads its input to a multiple (Swin's windows) they grow with every layer, and what torch
#: proves of them takes minutes.
LONGEST_SIZE = 64


class TokensOfMaps(Exception):
    """A linear layer works on tokens of which there are as many as a map has rows times columns, both open."""


class OpenTrace(TorchFunctionMode):
    """Ends a trace whose sizes become formulas too long to reason about, or with ``until_tokens`` where maps become
    tokens: what is done to these takes torch longer than all before, and no region takes both where sizes are open."""

    def __init__(self, until_tokens: bool) -> None:
        super().__init__()
        self.until_tokens = until_tokens

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.until_tokens and function is F.linear and args and any(map(_is_product, args[0].shape[1:-1])):
            raise TokensOfMaps
        made = function(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            sizes = [str(size) for size in made.shape if isinstance(size, torch.SymInt)]
            longest = max(sizes, key=len, default="")
            if len(longest) > LONGEST_SIZE:
                raise OverflowError(f"a size is a formula of {len(longest)} characters")
        return made


def _is_product(size: Any) -> bool:
    return isinstance(size, torch.SymInt) and len(size.node.expr.free_symbols) > 1
