"""Whether weights that were made sparse still are: a later optimizer that knows of no zeros fills them in one step."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from mirrormask.checks import callers_level, few
from mirrormask.flats import count_each

__all__ = ["forget", "note", "warn_of_filled"]

#: A matrix with this share of zeros was made sparse; with fewer, they may be of any origin.
SPARSE = 0.3

_nonzeros = WeakTensorKeyDictionary()


def note(weights: Iterable[Tensor]) -> None:
    """These were made sparse, or have come so from a file; how many nonzeros they have is remembered while they live.

    Of DTensors and of tensors without values nothing is.
    """
    plain = [x for x in weights if isinstance(x, nn.Parameter) and not hasattr(x, "placements") and not x.is_meta]
    forget(plain)
    for x, count in zip(plain, count_each([x.detach() for x in plain]), strict=True):
        if x.dim() > 1 and count <= (1 - SPARSE) * x.numel():
            _nonzeros[x] = count


def forget(weights: Iterable[Tensor]) -> None:
    """These shall become sparse anew, and have more nonzeros in the meantime."""
    for x in weights:
        if x in _nonzeros:
            del _nonzeros[x]


def warn_of_filled(model: nn.Module) -> None:
    """Warn, once for each weight, where there are more nonzeros than were left: before a model is written or compiled.

    Example:
        >>> import torch
        >>> layer = nn.Linear(4, 1)
        >>> layer.weight.data = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
        >>> note([layer.weight])
        >>> with warnings.catch_warnings(record=True) as said:
        ...     warnings.simplefilter("always")
        ...     warn_of_filled(layer)
        ...     _ = layer.weight.data.add_(1.0)
        ...     warn_of_filled(layer)
        >>> [str(one.message)[:36] for one in said]
        ['weight had 3 zeros when it was made ']
    """
    known = [(name, x) for name, x in model.named_parameters() if x in _nonzeros and not x.is_meta]
    found = count_each([x.detach() for _, x in known])
    filled = [(name, x, now) for (name, x), now in zip(known, found, strict=True) if now > _nonzeros[x]]
    if not filled:
        return
    before = sum(x.numel() - _nonzeros[x] for _, x, _ in filled)
    after = sum(x.numel() - now for _, x, now in filled)
    were, have = ("it was", "has") if len(filled) == 1 else ("they were", "have")
    forget(x for _, x, _ in filled)
    warnings.warn(
        f"{few([name for name, _, _ in filled])} had {before:,} zeros when {were} made sparse and {have} {after:,} "
        "now: something has trained or written them without a mask; call mm.keep_zeros(model, optimizer) before "
        "training on, or mm.apply_masks(model, masks) now",
        stacklevel=callers_level(),
    )
