"""What a batch of inputs looks like, and how a model is given one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Forward", "copied", "feed", "held"]

#: ``forward(model, batch)``: how a model is given a batch that is no plain input.
Forward = Callable[[nn.Module, Any], Any]


def feed(model: nn.Module, batch: Any, forward: Forward | None = None) -> Any:
    """Run ``model`` on a batch and return what it returns; the batch is afterwards what it was.

    Args:
        model: any module.
        batch: an input; a tuple or list whose first element is the input, as data loaders yield; or a mapping of
            keyword arguments, as tokenizers make.
        forward: for other batches, ``forward(model, batch)``.

    Example:
        >>> import torch
        >>> feed(nn.Flatten(), (torch.zeros(2, 3, 4), torch.zeros(2))).shape
        torch.Size([2, 12])
    """
    torch.clear_autocast_cache()  # within a region of autocast it would hold weights of before they were pruned
    if forward is not None:
        return forward(model, copied(batch))
    if isinstance(batch, Mapping):
        return model(**copied(batch))
    return model(copied(batch[0] if isinstance(batch, (tuple, list)) else batch))


def copied(batch: Any) -> Any:
    """The batch with tensors of its own, since some models write into their inputs, and batches are read again.

    Tuples, lists and mappings are gone into; objects of other kinds are handed on as they are.

    Example:
        >>> import torch
        >>> batch = [torch.zeros(2), {"scale": 3}]
        >>> _ = copied(batch)[0].add_(1)
        >>> batch
        [tensor([0., 0.]), {'scale': 3}]
    """
    if isinstance(batch, Tensor):
        return batch.clone()
    if isinstance(batch, MutableMapping):
        made = copy.copy(batch)  # of a tokenizer's kind where it is of one
        for key, value in batch.items():
            made[key] = copied(value)
        return made
    if type(batch) is list or type(batch) is tuple:
        return type(batch)(copied(part) for part in batch)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(copied(part) for part in batch))
    return batch


def held(batches: Iterable[Any]) -> list[Any]:
    """The batches as a list, since they are read more than once.

    Raises:
        TypeError: one batch was given where several are meant: its iteration would yield rows, or keys.
        ValueError: there are none.

    Example:
        >>> len(held(range(3)))
        3
    """
    if isinstance(batches, (Tensor, Mapping, str, tuple)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches is a {type(batches).__name__}, not a list of batches or a data loader; of a single batch pass "
            "[batch]"
        )
    found = list(batches)
    if not found:
        raise ValueError("batches is empty; give at least one batch of inputs (some hundred examples are enough)")
    return found


def check_devices(model: nn.Module, batches: Iterable[Any]) -> None:
    """Raise a ValueError unless each tensor of the batches is on a device on which the model is."""
    homes = {str(tensor.device) for tensor in (*model.parameters(), *model.buffers())}
    for number, batch in enumerate(batches):
        for tensor in _tensors(batch):
            if str(tensor.device) not in homes:
                raise ValueError(
                    f"batch {number} is on {tensor.device}, the model on {', '.join(sorted(homes))}; move one of them, "
                    "or move each batch in forward=lambda model, batch: model(batch.to(device))"
                )


def _tensors(batch: Any) -> Iterator[Tensor]:
    """The tensors that :func:`feed` passes on without a ``forward``."""
    if isinstance(batch, Mapping):
        yield from (value for value in batch.values() if isinstance(value, Tensor))
    else:
        first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if isinstance(first, Tensor):
            yield first


def looks(batch: Any) -> str:
    """A batch in a few words, for a message.

    Example:
        >>> import torch
        >>> looks((torch.zeros(2, 3), 1))
        'a tuple of a tensor (2, 3), an int'
    """
    if isinstance(batch, Tensor):
        return f"a tensor {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return "a mapping of " + ", ".join(f"{key}: {looks(value)}" for key, value in list(batch.items())[:4])
    if isinstance(batch, (tuple, list)) and type(batch) in (tuple, list):
        return f"a {type(batch).__name__} of " + ", ".join(looks(part) for part in batch[:4])
    name = type(batch).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
