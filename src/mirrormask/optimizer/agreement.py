"""Whether the processes that train one model are of one mind: eight bytes are compared, and words if they differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mirrormask.checks import few
from mirrormask.optimizer.processes import Processes

__all__ = ["agree", "fingerprint"]

#: An odd number whose multiples modulo 2**64 look random: the golden ratio's.
SPREAD = -7046029254386353131


def fingerprint(tensor: Tensor) -> int:
    """Eight bytes of a tensor's bits and their order; of equal tensors the same on every process.

    Example:
        >>> a, b = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
        >>> fingerprint(a) == fingerprint(a.clone()), fingerprint(a) == fingerprint(b)
        (True, False)
    """
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    start = 0
    for part in torch.split(tensor.detach().contiguous().view(-1), 1 << 18):
        bits = part.view(kind).long()
        places = torch.arange(start, start + len(bits), device=bits.device)
        mixed = (bits + places * SPREAD + 1) * SPREAD  # a product of 64 bits, which wraps
        total += ((mixed ^ (mixed >> 29)) * SPREAD).sum()
        start += len(bits)
    return int(total)


def agree(said: Mapping[str, Any], processes: Processes, remedy: str) -> None:
    """Raise on every process unless all say the same.

    Args:
        said: by what it is about; plain values.
        processes: they all call this together.
        remedy: the end of the message.

    Raises:
        RuntimeError: it names what differs, and on which ranks.
    """
    if processes.count == 1:
        return
    digest = hashlib.blake2b(json.dumps(said, default=repr).encode(), digest_size=8).digest()
    own = int.from_bytes(digest, "little", signed=True)
    most, least = processes.max(torch.tensor([own, ~own])).tolist()
    if most == ~least:
        return
    all_said = processes.said(dict(said))
    differing = []
    flat = [dict(_flat(words)) for words in all_said]
    for key in dict.fromkeys(key for words in flat for key in words):
        there = [words.get(key) for words in flat]
        ranks = [rank for rank, value in enumerate(there) if value != there[0]]
        if ranks:
            differing.append(f"{key} {_shown(there[0], there[ranks[0]])} on {_of(ranks)}")
    raise RuntimeError(f"the processes that train this model do not agree: {few(differing)}; {remedy}")


def _of(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks[:8]))}"


def _shown(first: Any, other: Any) -> str:
    """Values if they can be read, and only that they differ if they are fingerprints."""
    if any(isinstance(value, int) and abs(value) > 2**40 for value in (first, other)):
        return "is not that of rank 0"
    return f"is {first!r} on rank 0 and {other!r}"


def _flat(said: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in said.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield path + key, value
