"""A state dict of a SparseOptimizer: its mark; and opened, whose each entry is, and what the groups say of all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mirrormask.optimizer.base_groups import Group
from mirrormask.optimizer.shards import Shards

__all__ = ["GROUP_KEY", "VERSION", "Entry", "SavedState", "marked", "summaries_of"]

#: The key in each parameter group under which the schedule's state travels: a JSON text, because tools that move
#: optimizer state around (torch.distributed.checkpoint) keep plain values in groups and drop unknown top-level keys.
GROUP_KEY = "mirrormask"
#: Version 1 (0.1.0) had the method as its repr, and keys only once there was something under them; 2 had no mark.
VERSION = 3

Entry = dict[str, Any]


@dataclass(frozen=True)
class SavedState:
    """A state dict, opened.

    Attributes:
        summaries: what :data:`GROUP_KEY` holds of each group.
        entries: what it has of each parameter of this model.
        fresh: (parameter, prefix) of what the base optimizer had not stepped yet.
        masked: whether there were masks.
    """

    summaries: list[Entry]
    entries: dict[Tensor, Entry]
    fresh: set[tuple[Tensor, str]] = field(default_factory=set)
    masked: bool = False

    @classmethod
    def open(
        cls, state_dict: dict[str, Any], groups: Sequence[Group], summaries: list[Entry], shards: Shards
    ) -> SavedState:
        """Find out whose each entry is, and take of it what belongs here."""
        pairs = zip(state_dict["param_groups"], groups, strict=True)
        params = [shards.local(p) for group in groups for p in group["params"]]
        indices = [index for saved, own in pairs for index in _unmarked(saved["params"], len(own["params"]))]
        if len(params) != len(indices):
            raise ValueError(f"the state dict holds {len(indices)} parameters, this optimizer {len(params)}")
        entries = {
            p: {key: shards.unwrap(p, value) for key, value in state_dict["state"].get(index, {}).items()}
            for p, index in zip(params, indices, strict=True)
        }
        fresh = {
            (shards.local(group["params"][position]), prefix)
            for group, summary in zip(groups, summaries, strict=True)
            for position, prefix in summary.get("fresh", [])
        }
        held = any("mask" in entry for entry in entries.values())  # version 1 had masks only once there were any
        return cls(summaries, entries, fresh, summaries[0].get("masked", held))

    @property
    def first(self) -> Entry:
        """The summary that has what belongs to all."""
        return self.summaries[0]

    def is_fresh(self, p: Tensor, prefix: str) -> bool:
        """Whether the base optimizer had not stepped this yet."""
        return (p, prefix) in self.fresh


def marked(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict whose groups name their first parameter once more, at their end.

    No other optimizer takes it then, wherever it is read, with or without mirrormask: torch refuses groups of another
    size. Without this one of the same parameters took it, and went on without masks. torch.distributed.checkpoint needs
    known names there, and no new keys, and tells no difference.
    """
    groups = [{**group, "params": [*group["params"], *group["params"][:1]]} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


def _unmarked(indices: list[Any], count: int) -> list[Any]:
    """What :func:`marked` was given of a group that has ``count`` here; distributed checkpoints leave the mark out."""
    has_mark = len(indices) == count + 1 and indices[0] == indices[count]
    return indices[:count] if has_mark else indices


def _check_form(state_dict: Any) -> None:
    """Refuse what is no optimizer's state dict, and say where in it one is."""
    if _is_state(state_dict):
        return
    inside = [key for key, value in state_dict.items() if _is_state(value)] if isinstance(state_dict, Mapping) else []
    remedy = f"it holds one under {inside[0]!r}: pass that" if inside else "pass what optimizer.state_dict() returned"
    raise ValueError(
        f"this {type(state_dict).__name__} is no optimizer's state dict, with 'state' and 'param_groups'; {remedy}"
    )


def _is_state(value: Any) -> bool:
    if not isinstance(value, Mapping) or not isinstance(value.get("state"), Mapping):
        return False
    groups = value.get("param_groups")
    return isinstance(groups, (list, tuple)) and all(isinstance(g, Mapping) and "params" in g for g in groups)


def summaries_of(state_dict: dict[str, Any], groups: Sequence[Group]) -> list[Entry]:
    """What :data:`GROUP_KEY` holds of each group; a ValueError where this is no state dict of ours."""
    _check_form(state_dict)
    saved = state_dict["param_groups"]
    if not saved or GROUP_KEY not in saved[0]:
        raise ValueError(
            "this state dict was not saved by a SparseOptimizer: load it before mm.sparsify wraps the base; or some of "
            "it has been left out on the way, as flatten_optimizer_state_dict=True does: save without that option"
        )
    if len(saved) != len(groups):
        raise ValueError(f"the state dict has {len(saved)} parameter groups, this optimizer {len(groups)}")
    try:
        summaries: list[Entry] = [json.loads(group[GROUP_KEY]) for group in saved]
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"what the state dict has under {GROUP_KEY!r} of each of its groups was changed, or is missing: it is "
            "not whole"
        ) from None
    if summaries[0]["version"] not in range(1, VERSION + 1):
        raise ValueError(
            f"the state dict was saved with format {summaries[0]['version']}, this version of mirrormask reads up to "
            f"{VERSION}; go on with the one that saved it"
        )
    return summaries
