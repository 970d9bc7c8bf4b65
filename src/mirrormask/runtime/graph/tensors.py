"""The tensors of a model by name: its parameters and buffers, and those that its attributes hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["INTERNAL", "held_tensors", "tensors_of"]

#: Attributes of ``nn.Module`` itself.
INTERNAL = frozenset(vars(nn.Module()))


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a model, under each of their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def held_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Tensors that are neither, in attributes of modules or in lists and dicts there: ``layer.table``, ``layer.of.0``.

    PyTorch neither moves nor saves them, but a model computes with them.
    """
    own = tensors_of(model)
    known = {id(tensor) for tensor in own.values()}
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for key, value in vars(module).items():
            if key not in INTERNAL:
                name = f"{prefix}.{key}" if prefix else key
                found |= {path: one for path, one in _in(name, value) if id(one) not in known and path not in own}
    return found


def _in(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors that an attribute is, or holds directly."""
    if isinstance(value, Tensor):
        yield name, value
    elif type(value) in (list, tuple, dict):
        items = value.items() if type(value) is dict else enumerate(value)
        yield from ((f"{name}.{key}", one) for key, one in items if isinstance(one, Tensor))
