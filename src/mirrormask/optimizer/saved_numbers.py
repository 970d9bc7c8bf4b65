"""What a state dict holds must be numbers: a NaN in a momentum would be in the weights one step after the load."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mirrormask.checks import few
from mirrormask.flats import which_not_finite
from mirrormask.optimizer.base_groups import MEMBERS

__all__ = ["not_numbers", "refuse_not_numbers"]


def not_numbers(entries: Iterable[tuple[str, torch.Size, Mapping[str, Any]]]) -> list[str]:
    """Where a state holds what no training can go on from.

    Args:
        entries: what to call a parameter, its shape, and what is saved of it. Of a tensor of its shape all numbers must
            be finite; of counters and sums, which an optimizer may begin at infinity, none may be NaN. Scores are not
            looked at: they may be -inf.

    Example:
        >>> nan = torch.tensor([0.0, math.nan])
        >>> not_numbers([("'fc.weight'", nan.shape, {"momentum_buffer": nan, "step": 3})])
        ["'momentum_buffer' of 'fc.weight'"]
    """
    found, names, tensors = list[str](), list[str](), list[Tensor]()
    for name, shape, entry in entries:
        for key, value in entry.items():
            title = f"{key!r} of {name}"
            if isinstance(value, float) and math.isnan(value):
                found.append(title)
            if not isinstance(value, Tensor) or key == "score" or value.is_meta:
                continue
            if not value.is_floating_point() and not value.is_complex():
                continue
            if value.shape == shape:
                names.append(title)
                tensors.append(value)
            elif bool(value.isnan().any()):
                found.append(title)
    bad = which_not_finite(tensors)
    return found + [name for name, is_bad in zip(names, bad, strict=True) if is_bad]


def refuse_not_numbers(found: Sequence[str], groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise where a saved state is not made of numbers.

    Args:
        found: what :func:`not_numbers` found.
        groups: the saved groups, whose options may not be NaN.

    Raises:
        ValueError: it names what is not.
    """
    options = [
        f"{key!r} of param_groups[{index}]"
        for index, group in enumerate(groups)
        for key, value in group.items()
        if key not in MEMBERS and _is_nan(value)
    ]
    bad = [*options, *found]
    if bad:
        raise ValueError(
            f"the state dict is of a training that has diverged: {few(bad)} {'is' if len(bad) == 1 else 'are'} not "
            "finite; go on from a checkpoint of before"
        )


def _is_nan(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_is_nan, value))
    if isinstance(value, Tensor):
        return value.is_floating_point() and not value.is_meta and bool(value.isnan().any())
    return isinstance(value, float) and math.isnan(value)
