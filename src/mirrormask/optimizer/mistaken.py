"""Any other optimizer that is given the state of a SparseOptimizer says so, and what to do.

That it refuses such a state is in the state itself (:func:`mirrormask.optimizer.saved_state.marked`), and holds without
mirrormask too. torch's words for it are of the size of groups; where this is imported, they are those below. They also
hold for a state that torch.distributed.checkpoint has made fit the other optimizer, or reads into it key by key.
"""

from __future__ import annotations

import functools
import sys
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
    _watch_checkpoints()
    plain = Optimizer.load_state_dict
    if hasattr(plain, "_mirrormask"):
        return

    @functools.wraps(plain)
    def load_state_dict(self: Optimizer, state_dict: Any) -> None:
        if is_of_ours(state_dict):
            raise ValueError(_words(type(self).__name__))
        plain(self, state_dict)

    load_state_dict._mirrormask = True  # type: ignore[attr-defined]
    setattr(Optimizer, "load_state_dict", load_state_dict)  # noqa: B010


def _words(other: str) -> str:
    return (
        f"this is the state of a mirrormask SparseOptimizer, and {other} would train on densely; give the trainer its "
        "SparsityCallback again, or load it into what mm.sparsify returns, with the method and steps of then; to go on "
        "without a mask, load the model alone"
    )


def _watch_checkpoints() -> None:
    """The same for what ``torch.distributed.checkpoint.load`` is asked for: it takes what is there under known names.

    Where that was imported before, as it takes seconds; :func:`refuse_by_name` is called again when it may have been.
    """
    module: Any = sys.modules.get("torch.distributed.checkpoint.default_planner")
    plain = getattr(getattr(module, "DefaultLoadPlanner", None), "set_up_planner", None)
    if plain is None or hasattr(plain, "_mirrormask"):
        return

    @functools.wraps(plain)
    def set_up_planner(self: Any, state_dict: Any, metadata: Any = None, *args: Any, **kwargs: Any) -> Any:
        saved = getattr(metadata, "state_dict_metadata", None) or {}
        # "optimizer.param_groups.0.mirrormask", under whatever name the optimizer was saved
        ours = {key.partition("param_groups.")[0] for key in map(str, saved) if key.endswith(f".{GROUP_KEY}")}
        asked = list(module.flatten_state_dict(state_dict)[0]) if ours else []
        for place in ours:
            own = [key for key in asked if key.startswith((f"{place}param_groups.", f"{place}state."))]
            if own and not any(key.endswith(f".{GROUP_KEY}") for key in own):
                raise ValueError(_words("a plain optimizer"))
        return plain(self, state_dict, metadata, *args, **kwargs)

    set_up_planner._mirrormask = True  # type: ignore[attr-defined]
    module.DefaultLoadPlanner.set_up_planner = set_up_planner
