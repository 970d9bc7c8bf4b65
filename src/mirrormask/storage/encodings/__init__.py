"""The five ways to store a tensor, and the choice between them: whichever takes the fewest bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mirrormask.storage.encodings.base import Encoding, Source
from mirrormask.storage.encodings.bitmask import Bitmask
from mirrormask.storage.encodings.blocked import Blocked
from mirrormask.storage.encodings.coded import LEAST_GAIN, Coded
from mirrormask.storage.encodings.dense import Dense
from mirrormask.storage.encodings.gaps import Gaps
from mirrormask.storage.errors import FormatError

__all__ = [
    "HEADER_COST",
    "KNOWN",
    "LEAST_GAIN",
    "Coded",
    "Dense",
    "Encoding",
    "Source",
    "all_sizes",
    "choose",
    "from_index",
]

KNOWN = ("dense", "bitmask", "gaps", "blocked", "coded")
#: What a second stored array adds to the header, roughly. A tensor must save more than that to leave its dense form,
#: so biases and norms stay where every safetensors reader finds them.
HEADER_COST = 256


def choose(source: Source) -> tuple[Encoding, int]:
    """The smallest encoding of a tensor and its bytes, ties to the simpler one.

    Bounds come first, so that a dense tensor costs one pass that counts its zeros; and one that has no zeros worth
    leaving out stays dense, though a code of its exponents would take less, so that every safetensors reader finds it.
    """
    best: Encoding = Dense()
    size = source.nbytes - HEADER_COST
    if size <= 0 or source.nonzeros * source.itemsize >= size:  # every encoding stores the nonzeros at least
        return best, source.nbytes
    if Bitmask.size(source) < size:
        best, size = Bitmask(), Bitmask.size(source)
    if Gaps.least(source) < size and Gaps.size(source) < size:
        best, size = Gaps(), Gaps.size(source)
    for blocked in Blocked.candidates(source, size):
        best, size = blocked, blocked.size_of(source.bits.size, source.itemsize)
    if source.nonzeros * (source.itemsize - 1) < size - LEAST_GAIN and Coded.about(source) < size - LEAST_GAIN:
        coded = Coded.size(source)
        if coded < size - LEAST_GAIN:
            best, size = Coded.of(source), coded
    return best, source.nbytes if isinstance(best, Dense) else size


def all_sizes(source: Source) -> dict[str, int | None]:
    """What each encoding would take, in bytes; ``None`` for blocks where the tensor has no N:M pattern."""
    blocked = [item.size_of(source.bits.size, source.itemsize) for item in Blocked.candidates(source, source.nbytes)]
    return {
        "dense": source.nbytes,
        "bitmask": Bitmask.size(source),
        "gaps": Gaps.size(source),
        "blocked": min(blocked, default=None),
        "coded": Coded.size(source),
    }


def from_index(entry: Mapping[str, Any], tensor: str) -> Encoding:
    """The encoding that a file's index states, its parameters checked."""
    simple: dict[str, Encoding] = {"dense": Dense(), "bitmask": Bitmask(), "gaps": Gaps()}
    name = entry.get("encoding")
    if isinstance(name, str) and name in simple:
        return simple[name]
    if name == "coded":
        numbers = [entry.get(key) for key in ("count", "codes", "gaps", "high")]
        whole = [number for number in numbers if type(number) is int]
        if len(whole) < len(numbers):
            raise FormatError("the encoding 'coded' needs integers count, codes, gaps and high", tensor=tensor)
        return Coded(*whole)
    if name != "blocked":
        raise FormatError(f"unknown encoding {str(name)[:40]!r}; known: {', '.join(KNOWN)}", tensor=tensor)
    n, m, order = entry.get("n"), entry.get("m"), entry.get("order")
    if type(n) is not int or type(m) is not int or not isinstance(order, str):
        raise FormatError("the encoding 'blocked' needs integers n and m and a text order", tensor=tensor)
    try:
        return Blocked(n, m, order)
    except FormatError as error:
        raise FormatError(error.fault, tensor=tensor) from None
