"""What will be written: the tensors of a model, each in the encoding that takes the fewest bytes, and the header."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors

from mirrormask.flats import count_each, is_small
from mirrormask.matrices import default_weights
from mirrormask.selection import Weights, select_weights
from mirrormask.storage.container import build_header
from mirrormask.storage.contents import FORMAT_VERSIONS, PREFIX, SCALES, stored_name
from mirrormask.storage.dtypes import BYTES, Bits
from mirrormask.storage.encodings import Coded, Encoding, Source, all_sizes, choose
from mirrormask.storage.narrow import Narrow, Values, narrow
from mirrormask.storage.parts import DIGITS, checksum
from mirrormask.storage.tensors import Storable, named_tensors, ties
from mirrormask.storage.torch_types import NAMES, to_bits

__all__ = ["Form", "Plan", "Planned", "make_plan", "source_of"]


#: Of a weight with fewer elements, calls take longer than counting.
SMALL = 2**12
#: How many small tensors are looked at together.
AT_ONCE = 256
#: Whose zeros torch counts as this file does: ``-0.0`` is one, and NaN is none.
COUNTED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Form:
    """How values are written.

    Attributes:
        values: ``"int8"``, ``"float16"`` or ``None``: what weights are rounded to in the file.
        signed_zeros: whether ``-0.0`` is kept, which costs as much as a value.
    """

    values: Values = None
    signed_zeros: bool = False


@dataclass(frozen=True)
class Planned:
    """One tensor and the arrays that it will be stored as."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    encoding: Encoding
    #: part -> (element type, shape)
    stored: dict[str, tuple[str, tuple[int, ...]]]
    #: part -> its bits; empty when only the sizes were asked for
    arrays: dict[str, Bits] = field(repr=False)
    #: what is loaded: the element type, and the dimension that its scales go with, if there are any
    becomes: str = ""
    axis: int | None = None
    #: nonzero elements and the bytes of each encoding; empty when the arrays were asked for
    nonzeros: int = 0
    others: dict[str, int | None] = field(default_factory=dict, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes that its stored arrays take."""
        return sum(math.prod(shape) * BYTES[dtype] for dtype, shape in self.stored.values())

    def index(self) -> dict[str, Any]:
        """The tensor's entry in the file's index."""
        digests = {part: checksum(array) for part, array in self.arrays.items()}
        loaded: dict[str, Any] = {"becomes": self.becomes} if self.becomes else {}
        return {
            "encoding": self.encoding.name,
            **self.encoding.index(),
            "dtype": self.dtype,
            "shape": list(self.shape),
            **loaded,
            **({} if self.axis is None else {"axis": self.axis}),
            "sha256": digests or dict.fromkeys(self.stored, "0" * DIGITS),
        }

    @property
    def is_new(self) -> bool:
        """Whether readers of the first version could not read it."""
        return bool(self.becomes) or isinstance(self.encoding, Coded)


@dataclass(frozen=True)
class Plan:
    """All that a file will hold: its header's bytes and the tensors."""

    header: bytes
    tensors: tuple[Planned, ...]
    tied: dict[str, str]

    def arrays(self) -> Iterator[Bits]:
        """The stored arrays in the order of the file."""
        for planned, part in _file_order(self.tensors):
            yield planned.arrays[part]

    @property
    def nbytes(self) -> int:
        """The size of the file."""
        return len(self.header) + sum(planned.nbytes for planned in self.tensors)


def make_plan(
    model: Storable,
    metadata: Mapping[str, Any] | None,
    dtype: torch.dtype | None,
    form: Form,
    *,
    sizes_only: bool = False,
    weights: Weights | None = None,
    more: Mapping[str, str] | None = None,
) -> Plan:
    """Choose an encoding for every tensor and encode it.

    Args:
        sizes_only: keep the sizes and drop the arrays.
        weights: whose sparsity the file tells, as in :func:`mirrormask.sparsity`.
        more: texts beside the library's own, under its prefix.
    """
    notes = texts(metadata)
    if form.values is not None and dtype is not None:
        raise ValueError(f"values={form.values!r} and dtype={dtype} both say how to store a weight; pass one of them")
    state = named_tensors(model, dtype)
    if isinstance(model, nn.Module) and not state:
        kind = type(model).__name__
        hint = "; a compiled model is written by its own save()" if kind == "CompiledModel" else ""
        raise ValueError(f"the {kind} holds no tensors, so there is nothing to write{hint}")
    tied = ties(state)
    narrowed = narrow(model, {name: tensor for name, tensor in state.items() if name not in tied}, form.values)
    sources = _sources([stored.tensor for stored in narrowed.values()], form)
    both = zip(narrowed.items(), sources, strict=True)
    tensors = tuple(_planned(name, stored, source, sizes_only) for (name, stored), source in both)
    entries = {planned.name: planned.index() for planned in tensors}
    entries |= {name: {"encoding": "tied", "to": first} for name, first in tied.items()}
    separator = _separator(tensors)
    own = {
        "format_version": FORMAT_VERSIONS[any(planned.is_new for planned in tensors)],
        "library_version": _version(),
        "sparsity": repr(_sparsity(model, state, tied, weights)),
        "separator": separator,
        "index": json.dumps({name: entries[name] for name in state}, ensure_ascii=False, separators=(",", ":")),
        **(more or {}),
    }
    listed = [
        (stored_name(planned.name, part, separator), *planned.stored[part]) for planned, part in _file_order(tensors)
    ]
    header = build_header(listed, {**{PREFIX + key: value for key, value in own.items()}, **notes})
    return Plan(header, tensors, tied)


def source_of(tensor: Tensor, form: Form) -> Source:
    """What is encoded of a tensor: its bits, without the sign of zeros unless it is to be kept."""
    bits = to_bits(tensor)
    has_sign = tensor.is_floating_point() and not NAMES[tensor.dtype].endswith("FNUZ")  # their -0.0 is NaN
    if has_sign and not form.signed_zeros:
        zeros = bits == bits.dtype.type(1 << (8 * bits.itemsize - 1))
        if zeros.any():
            bits = bits.copy()
            bits[zeros] = 0
    return Source(bits, tuple(tensor.shape))


def _sources(tensors: Sequence[Tensor], form: Form) -> Iterator[Source]:
    """:func:`source_of` each tensor; small ones of a kind are copied end to end, and looked at together."""
    together: list[Tensor] = []
    for tensor in tensors:
        if tensor.dtype == torch.float32 and is_small(tensor):
            together.append(tensor)
            if len(together) < AT_ONCE:
                continue
            yield from _sources_of_small(together, form)
            together = []
        else:
            yield from _sources_of_small(together, form)
            together = []
            yield source_of(tensor, form)
    yield from _sources_of_small(together, form)


def _sources_of_small(tensors: Sequence[Tensor], form: Form) -> Iterator[Source]:
    if len(tensors) < 2:
        yield from (source_of(tensor, form) for tensor in tensors)
        return
    flat, end = source_of(_flatten_dense_tensors(tensors), form).bits, 0  # type: ignore[no-untyped-call]
    for tensor in tensors:
        start, end = end, end + tensor.numel()
        yield Source(flat[start:end], tuple(tensor.shape))


def _planned(name: str, values: Narrow, source: Source, sizes_only: bool) -> Planned:
    tensor, shape = values.tensor, tuple(values.tensor.shape)
    dtype = NAMES[tensor.dtype]
    encoding, _ = choose(source)
    arrays = encoding.encode(source)
    stored = {
        part: (dtype, shape) if part == "" else (dtype if part == "values" else "U8", (array.size,))
        for part, array in arrays.items()
    }
    if values.scales is not None:
        arrays = {**arrays, SCALES: to_bits(values.scales)}
        stored[SCALES] = ("BF16", tuple(values.scales.shape))
    becomes = "" if values.becomes is None else NAMES[values.becomes]
    if not sizes_only:
        return Planned(name, dtype, shape, encoding, stored, arrays, becomes, values.axis)
    return Planned(name, dtype, shape, encoding, stored, {}, becomes, values.axis, source.nonzeros, all_sizes(source))


def _file_order(tensors: Sequence[Planned]) -> list[tuple[Planned, str]]:
    """Wide elements first: every array then starts at a multiple of its element's width, as readers like it."""
    pairs = [(planned, part) for planned in tensors for part in planned.stored]
    return sorted(pairs, key=lambda pair: -BYTES[pair[0].stored[pair[1]][0]])


def _separator(tensors: Sequence[Planned]) -> str:
    """``"::"``, or longer where the model's own names would collide with it."""
    separator = "::"
    while True:
        names = [stored_name(planned.name, part, separator) for planned in tensors for part in planned.stored]
        if len(set(names)) == len(names):
            return separator
        separator += ":"


def _sparsity(model: Storable, state: Mapping[str, Tensor], tied: Mapping[str, str], chosen: Weights | None) -> float:
    """The sparsity of a model by the library's definition; of a state dict, that of its matrices and kernels.

    ``mm.sparsity`` would do, but for ``torch.count_nonzero``, which takes longer than all of the encoding. A state
    dict does not tell layers from embeddings, so there they count.
    """
    if isinstance(model, nn.Module):
        named_weights = default_weights(model, frozen=True) if chosen is None else select_weights(model, chosen)
        weights: list[Tensor] = list(named_weights.values())
    elif chosen is not None:
        raise TypeError("weights= chooses layers of a model, and a state dict has none; save the model")
    else:
        named = ((name, tensor) for name, tensor in state.items() if name not in tied)
        weights = [tensor for _, tensor in named if tensor.ndim >= 2 and tensor.is_floating_point()]
    total = sum(tensor.numel() for tensor in weights)
    small = [tensor for tensor in weights if tensor.numel() <= SMALL and tensor.dtype in COUNTED]
    large = [tensor for tensor in weights if tensor.numel() > SMALL or tensor.dtype not in COUNTED]
    zeros = sum(tensor.numel() for tensor in small) - sum(count_each(small)) + sum(map(_zeros, large))
    return zeros / total if total else 0.0


def _zeros(tensor: Tensor) -> int:
    """Elements equal to zero, ``-0.0`` included; float8's FNUZ types use those bits for NaN."""
    source = Source(to_bits(tensor), tuple(tensor.shape))
    signed = 0 if NAMES[tensor.dtype].endswith("FNUZ") else source.negative_zeros
    return tensor.numel() - source.nonzeros + signed


def texts(metadata: Mapping[str, Any] | None) -> dict[str, str]:
    """The caller's metadata as files hold it: texts stay, everything else becomes JSON.

    Raises:
        TypeError, ValueError: it is no table, or something in it cannot be written.
    """
    found: dict[str, str] = {}
    if metadata is None:
        return found
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata is a {type(metadata).__name__}, not a table of names and values")
    for key, value in metadata.items():
        if not isinstance(key, str) or key.startswith(PREFIX):
            raise ValueError(f"metadata key {key!r} is not a text, or begins with {PREFIX!r}; choose another name")
        try:
            found[key] = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
            found[key].encode(), key.encode()
        except (TypeError, ValueError) as error:
            raise ValueError(f"metadata {key!r} cannot be written as JSON ({error}); pass text or numbers") from None
    return found


def _version() -> str:
    from mirrormask import __version__  # the package imports this module, so not at the top

    return __version__
