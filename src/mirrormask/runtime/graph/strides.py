"""Models whose code asks how its inputs lie in memory: what a trace answers holds for the example's inputs alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from mirrormask.runtime.graph.lengths import OTHERS

__all__ = ["StridesAsked", "StridesOfInputs"]

#: What tells tensors of one shape apart.
ASKS = {Tensor.is_contiguous, Tensor.stride, Tensor.storage_offset, Tensor.data_ptr}


def _asks_for_itself(caller: FrameType | None) -> bool:
    """Whether it is the model's own code, rather than PyTorch's; modes of its trace hand the question on."""
    while caller is not None and caller.f_code.co_name == "__torch_function__":
        caller = caller.f_back
    return caller is not None and str(caller.f_globals.get("__name__")).partition(".")[0] not in OTHERS


class StridesAsked(Exception):
    """A question that guards about sizes do not cover."""


class StridesOfInputs(TorchFunctionMode):
    """Ends a trace in which the model's own code asks for the strides of an argument."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.inputs: list[Tensor] = []

    def __enter__(self) -> StridesOfInputs:
        self._hook = self.model.register_forward_pre_hook(self._given, with_kwargs=True)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hook.remove()

    def _given(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self.inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]

    def __torch_function__(
        self, function: Callable[..., Any], types: Iterable[Any], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function in ASKS and any(args[0] is one for one in self.inputs) and _asks_for_itself(sys._getframe(1)):
            raise StridesAsked(f"its code asks for the {function.__name__} of an input")
        return function(*args, **(kwargs or {}))
