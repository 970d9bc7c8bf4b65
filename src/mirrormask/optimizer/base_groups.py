"""The groups of an optimizer: their options, those that JSON keeps, and who changes them."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Group", "GroupWatch", "check_group", "options_of", "plain_options", "same_option"]

Group = dict[str, Any]

#: What a group is a group of.
MEMBERS = frozenset(("params", "param_names"))


class GroupWatch:
    """Notices who writes into the groups of the base optimizer between two steps."""

    def __init__(self) -> None:
        self._noted: list[Group] | None = None

    @property
    def knows(self) -> bool:
        """Whether they are still what they were when last noted: no step has begun since."""
        return self._noted is not None

    def note(self, groups: Sequence[Group]) -> None:
        """These are as they shall be until the next step."""
        self._noted = [group.copy() for group in groups]

    def forget(self) -> None:
        """A step is on its way; one that fails in the middle leaves them unknown."""
        self._noted = None

    def check(self, optimizer: Optimizer) -> None:
        """Raise where somebody has written into its groups, which hold latents at rates of their own."""
        if self._noted is None:
            return
        kind, now = type(optimizer).__name__, optimizer.param_groups
        if len(now) != len(self._noted):
            raise RuntimeError(
                f"the {kind} that was given to mm.sparsify had {len(self._noted)} groups and has {len(now)}; add "
                "parameters to what mm.sparsify returned"
            )
        for index, (own, noted) in enumerate(zip(now, self._noted, strict=True)):
            if list(own) == list(noted) and all(map(operator.is_, own.values(), noted.values())):
                continue
            for key in (own.keys() | noted.keys()) - MEMBERS:
                if own.get(key, own) is not noted.get(key, noted) and not same_option(own.get(key), noted.get(key)):
                    raise RuntimeError(
                        f"param_groups[{index}][{key!r}] of the {kind} that was given to mm.sparsify was "
                        f"{noted.get(key)!r} and is {own.get(key)!r}: it holds latents, not the model's weights; "
                        "change the param_groups of what mm.sparsify returned"
                    )


def check_group(group: Group, *, turns: str = "") -> None:
    """Refuse options under which a step cannot be what it says.

    Args:
        group: of parameters.
        turns: the name of a method whose pull ``maximize`` would turn around; empty where it would not.
    """
    if group.get("differentiable"):
        raise ValueError(
            "differentiable=True: the step is taken on latents and writes the weights in place, which no gradient can "
            "pass through; leave it out"
        )
    lr = group.get("lr")
    if isinstance(lr, bool) or not isinstance(lr, (numbers.Real, Tensor)):
        raise ValueError(
            f"lr={lr!r} is no number: latents train at a multiple of the learning rate, and the decay goes by it; "
            "give the optimizer a rate (of an Adafactor: lr=1e-3, relative_step=False)"
        )
    if turns and group.get("maximize"):
        raise ValueError(f"maximize=True would turn the pull of {turns!r} around as well; negate the loss instead")


def options_of(group: Group) -> Group:
    """A group without what it is a group of."""
    return {key: value for key, value in group.items() if key not in MEMBERS}


def same_option(a: Any, b: Any) -> bool:
    """Whether an option is what it was; a tensor may have been written into."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    return a is b or (type(a) is type(b) and bool(a == b))


def plain_options(group: Group) -> Group:
    """The options of a group that JSON keeps: a base's counters and rates are among them."""
    return {key: _listed(value) for key, value in group.items() if key not in MEMBERS and _fits(value)}


def _fits(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_fits, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, (list, tuple)) else value
