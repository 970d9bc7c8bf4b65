"""What a run was begun with and its recipe only names: images, a teacher, the software; looked at when it goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirrormask.storage.torch_types import to_bits

__all__ = ["changed_software", "check", "digest_of", "origin"]


def origin(data: str, teacher: str) -> dict[str, Any]:
    """What a checkpoint notes.

    Args:
        data: the digest of all images and labels.
        teacher: that of the teacher's weights, empty without one.
    """
    return {"data": data, "teacher": teacher, "torch": str(torch.__version__), "threads": torch.get_num_threads()}


def digest_of(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of a state dict: names, shapes and bits.

    Example:
        >>> digest_of({"w": torch.zeros(2)}) == digest_of({"w": torch.zeros(2)})
        True
        >>> digest_of({"w": torch.zeros(2)}) == digest_of({"w": torch.zeros(1, 2)})
        False
    """
    found = hashlib.sha256()
    for name, tensor in state.items():
        found.update(f"{name}\0{tensor.dtype} {tuple(tensor.shape)}\0".encode(errors="surrogatepass"))
        found.update(to_bits(tensor).view(np.uint8).data)
    return found.hexdigest()


def check(there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse to go on with other images or another teacher: half a run on each is a result of neither.

    Args:
        there: what the checkpoint notes; one of before this was noted says nothing.
        here: what there is now.

    Raises:
        ValueError: it names what has changed.
    """
    for key, what in (("data", "the images or labels"), ("teacher", "the teacher's weights")):
        if key in there and there[key] != here[key]:
            raise ValueError(f"{what} are not those that the run was begun with; put them back")


def changed_software(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What is not as it was and may change the last bits of every number; empty if nothing is."""
    names = [key for key in ("torch", "threads") if key in there and there[key] != here[key]]
    found = " and ".join(f"{key} {str(there[key])[:40]} (here {here[key]})" for key in names)
    return found and f"begun with {found}: what follows need not be the uninterrupted run to the last bit"
