"""Whether a model still has the weights that it was compiled with."""

from __future__ import annotations

import contextlib
import weakref
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mirrormask.runtime.graph.tensors import held_tensors, tensors_of

__all__ = ["Snapshot", "unchanged"]


class Snapshot:
    """What a model's tensors were, as far as telling a change needs it.

    Attributes:
        sums: name -> checksum of each tensor's bytes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._held = held_tensors(model)
        self._versions = _versions(model)
        self._written: set[str] = set()
        self.sums = {name: _checksum(tensor) for name, tensor in (self._held | tensors_of(model)).items()}
        self._model = weakref.ref(model)

    def settle(self) -> None:
        """After calls of the model: what these change is a result, and not what it is made of.

        That is what they put into its attributes anew, and what they write into its parameters, as an embedding with a
        largest norm does.
        """
        model = self.model
        versions = {} if model is None else _versions(model)
        self._written |= {name for name, version in self._versions.items() if versions.get(name, version) != version}
        for name in self._written:
            self.sums.pop(name, None)
        self._versions = {}
        now = {} if model is None else held_tensors(model)
        for name, tensor in self._held.items():
            if now.get(name) is not tensor:
                self.sums.pop(name, None)
        self._held = {}

    @property
    def model(self) -> nn.Module | None:
        """The model, as long as its owner keeps it."""
        return self._model()

    def changed(self) -> list[str]:
        """The tensors that are no longer what they were; all of them, if the model is gone."""
        model = self.model
        if model is None:
            return list(self.sums)
        own = tensors_of(model)
        now = held_tensors(model) | own
        # What it holds besides comes and goes.
        found = [name for name in own if name not in self.sums and name not in self._written]
        for name, total in self.sums.items():
            tensor = now.get(name)
            if tensor is None or _checksum(tensor) != total:
                found.append(name)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"sums": self.sums}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._held, self._versions, self._written = {}, {}, set()
        self._model = _gone  # type: ignore[assignment]


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Inside, calls may write the model's buffers, as some models do; afterwards these are what they were."""
    kept = [
        (owner, name, buffer, buffer._version, buffer.detach().clone())
        for owner in model.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None and not buffer.is_inference()
    ]
    try:
        yield
    finally:
        for owner, name, buffer, version, value in kept:
            if buffer._version != version:
                buffer.detach().copy_(value)
            owner._buffers[name] = buffer


def _versions(model: nn.Module) -> dict[str, int]:
    """How often each parameter was written into."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: 0 if one.is_inference() else one._version for name, one in named}


def _gone() -> None:
    return None


def _checksum(tensor: Tensor) -> int:
    data = tensor.detach().cpu()
    data = (data if data.layout is torch.strided else data.to_dense()).contiguous()
    return zlib.crc32(data.view(-1).view(torch.uint8).numpy().data) if data.numel() else 0
