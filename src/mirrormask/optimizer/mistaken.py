"""Any other optimizer that is given the state of a SparseOptimizer says so, and what to do.

That it refuses such a state is in the state itself (:func:`mirrormask.optimizer.saved_state.marked`), and holds without
mirrormask too. torch's words for it are of the size of groups; where this is imported, they are those below. They also
hold for a state that torch.distributed.checkpoint has made fit the other optimizer.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from mirrormask.optimizer.saved_state import GROUP_KEY

__all__ = ["is_of_ours", "refuse_by_name"]


def is_of_ours(state_dict: Any) -> bool:
    """Whether a SparseOptimizer has saved this."""
    groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
    return isinstance(groups, list) and any(isinstance(group, Mapping) and GROUP_KEY in group for group in groups)


def refuse_by_name() -> None:
    """Teach torch's ``Optimizer.load_state_dict`` whose state it was given; a second time changes nothing."""
    plain = Optimizer.load_state_dict
    if hasattr(plain, "_mirrormask"):
        return

    @functools.wraps(plain)
    def load_state_dict(self: Optimizer, state_dict: Any) -> None:
        if is_of_ours(state_dict):
            raise ValueError(
                f"this is the state of a mirrormask SparseOptimizer, and {type(self).__name__} would train on densely; "
                "give the trainer its SparsityCallback again, or load it into what mm.sparsify returns, with the "
                "method and steps of then; to go on without a mask, load the model alone"
            )
        plain(self, state_dict)

    load_state_dict._mirrormask = True  # type: ignore[attr-defined]
    setattr(Optimizer, "load_state_dict", load_state_dict)  # noqa: B010
