"""What the files of a run hold, checked once on reading: whoever uses a value later need not ask what it is.

JSON carries any type, any depth and integers of any length, and folders of runs come from elsewhere. Here a file is
decoded into one of the types below, or a ValueError says what in it is not what a run writes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

__all__ = [
    "Bench",
    "Distributions",
    "Predictions",
    "convert",
    "decode",
    "plain",
    "read",
    "record_decoder",
]

T = TypeVar("T")

MAX_BYTES, MAX_DEPTH = 256_000_000, 40
#: Beyond this a count is none, and float64 would not hold it.
MAX_COUNT = 2**53

Count = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
Whole = Annotated[int, Meta(ge=-MAX_COUNT, le=MAX_COUNT)]
Number = Whole | float
Text = Annotated[str, Meta(max_length=100_000)]
#: Values of a line of the log.
Scalar = Whole | float | bool | Text | None


class Histogram(msgspec.Struct):
    """So many values in each of the bins between two ends, and so many zeros."""

    low: Number
    high: Number
    zeros: Count
    counts: Annotated[list[Count], Meta(max_length=1000)]


class Layer(msgspec.Struct):
    """How the weights of one layer are spread at three moments, and the imbalance of its factors."""

    name: Text
    start: Histogram | None
    trained: Histogram | None
    final: Histogram | None
    imbalance: Histogram | None
    imbalance_start: Number | None


class Distributions(msgspec.Struct):
    """``distributions.json``."""

    layers: Annotated[list[Layer], Meta(max_length=2000)]


class Predictions(msgspec.Struct):
    """``predictions.json``."""

    classes: list[Text]
    truth: list[Count]
    predicted: list[Count]
    images: dict[str, Any]


class Bench(msgspec.Struct):
    """``bench.json``, as far as a report and a comparison read it."""

    seconds: dict[str, Any]
    threads: Count
    shape: list[Count]
    processor: Text
    report: Any = None


def read(path: Path, kind: type[T]) -> T:
    """What a file holds, as a ``kind``.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, or holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(2, "no such file", str(path))
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"it has {path.stat().st_size:,} bytes; a run writes less than {MAX_BYTES:,}")
    return decode(path.read_bytes(), kind)


def decode(raw: bytes, kind: type[T]) -> T:
    """JSON text as a ``kind``, a type that msgspec knows; see :func:`read`."""
    try:
        value = msgspec.json.decode(raw, type=kind)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except msgspec.DecodeError as error:
        raise ValueError(str(error)) from error
    _check_bounds(value)
    return value


def convert(tree: Any, kind: type[T]) -> T:
    """A value of plain types as a ``kind``; ValueError where it is none."""
    try:
        return msgspec.convert(tree, kind)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from error


def plain(value: msgspec.Struct) -> dict[str, Any]:
    """A value as a dictionary of its fields."""
    return msgspec.structs.asdict(value)


def record_decoder() -> Any:
    """A decoder of lines of a log: objects of numbers, texts and null."""
    return msgspec.json.Decoder(type=dict[str, Scalar])


def _check_bounds(value: Any) -> None:
    """Refuse depth and integers that the parts of no particular type may have."""
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, int):
                if abs(item) >= 2**63:
                    raise ValueError(f"it has an integer of {item.bit_length()} bits")
            elif isinstance(item, dict):
                below += item.values()
            elif isinstance(item, (list, tuple)):
                below += item
            elif dataclasses.is_dataclass(item):
                below += vars(item).values()
            elif isinstance(item, msgspec.Struct):
                # What has a type has bounds.
                below += [getattr(item, name) for name in FREE.get(type(item), ())]
        if not below:
            return
        level = below
    raise ValueError(f"it is nested more than {MAX_DEPTH} deep")


#: The fields of no particular type.
FREE: dict[type, tuple[str, ...]] = {Bench: ("seconds", "report"), Predictions: ("images",)}
