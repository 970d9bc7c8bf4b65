"""Reading a model back, bit for bit, from a file that is not trusted."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from typing import IO, TypeVar, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mirrormask import made_sparse
from mirrormask.checks import few
from mirrormask.collector import while_uncollected
from mirrormask.matrices import check_module
from mirrormask.quantization.levels import rounded
from mirrormask.resharding import reshard
from mirrormask.storage.container import open_container
from mirrormask.storage.contents import (
    COMPILED,
    SCALES,
    Contents,
    Entry,
    contents_of,
    opened,
    small_array,
    stored_bits,
    stored_part,
)
from mirrormask.storage.encodings import Dense
from mirrormask.storage.errors import FormatError
from mirrormask.storage.tensors import ties
from mirrormask.storage.torch_types import TYPES, to_bits

__all__ = ["Contents", "Entry", "load", "read_contents", "read_state", "stored_tensors"]

Model = TypeVar("Model", bound=nn.Module)

#: With more tensors, ``load_state_dict`` is passed by where it would only copy: of n layers in one module it looks at
#: all names for each, and for 10^5 layers takes an hour.
MANY = 1000
#: A dense tensor of so many bytes or fewer is read in one piece: the calls for it take longer than that.
SMALL = 1 << 16


@overload
def load(path: str | os.PathLike[str], model: None = None) -> dict[str, Tensor]: ...
@overload
def load(path: str | os.PathLike[str], model: Model) -> Model: ...
@while_uncollected
def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> dict[str, Tensor] | nn.Module:
    """Read a file of :func:`mirrormask.save`, or any safetensors file, with its zeros back in place.

    Nothing in the file is trusted: lengths are compared with the file before anything is allocated, every position
    with the tensor, and every stored array with its checksum. Memory: the dense tensors and at most a tenth more.

    Args:
        path: the file. A plain safetensors file (no checksums) is read too.
        model: ``None`` for a state dict on the CPU; or a module whose state dict has the same names and shapes, which
            is filled in place, on its own device and in its own dtypes, after the whole file has been checked. Of a
            model that is sharded over processes each process reads the file and takes its part.

    Returns:
        The state dict, in the order in which it was saved, tied weights tied; or ``model``.

    Raises:
        FormatError: the file is damaged; names the tensor and the fault. The model is untouched.
        TypeError: ``model`` is no module.
        ValueError: the file is sound but its names or shapes are not the model's, or the model cannot hold its numbers:
            a type is too small for them, weights that it ties differ, it has no memory (meta device); or it is a
            compiled model's file, whose weights are no module's. The model is untouched.
        OSError: there is no such file, or it cannot be read.

    Example:
        >>> import tempfile
        >>> from mirrormask.storage.writer import save
        >>> path = os.path.join(tempfile.mkdtemp(), "weights.safetensors")
        >>> save({"w": torch.eye(200)}, path)
        >>> bool((load(path)["w"] == torch.eye(200)).all())
        True
    """
    if model is not None:
        check_module(model)
    with opened(path) as (file, nbytes):
        contents = contents_of(open_container(file, nbytes))
        if model is not None and COMPILED in contents.metadata:
            raise ValueError(
                f"{path} holds a compiled model, whose weights are as its kernels take them (norms in the layer "
                "before, transposed convolutions turned) and do not belong into a module; load it without one, or keep "
                "a file of mm.save for that"
            )
        state = _state(file, contents)
    if model is None:
        return state
    reshard(model)
    own = _check_fits(model, state, path)
    if any(hasattr(tensor, "placements") for tensor in own.values()):
        from torch.distributed.checkpoint import state_dict as sharded  # a second and a half, for shards alone

        sharded.set_model_state_dict(model, {**state}, options=sharded.StateDictOptions(full_state_dict=True))
    elif len(own) > MANY and _is_plain(model):
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])
    else:
        model.load_state_dict(state)
    sparse = {name for name, entry in contents.entries.items() if _leaves_out(entry)}
    if sparse:
        made_sparse.note(p for name, p in model.named_parameters() if name in sparse)
    return model


def _leaves_out(entry: Entry | str) -> bool:
    """Whether an entry is stored without its zeros."""
    return isinstance(entry, Entry) and entry.encoding.name != "dense"


def read_contents(path: str | os.PathLike[str]) -> Contents:
    """Describe a file without reading its tensors.

    Raises:
        FormatError: the header is damaged.

    Example:
        >>> import tempfile
        >>> from mirrormask.storage.writer import save
        >>> path = os.path.join(tempfile.mkdtemp(), "weights.safetensors")
        >>> save({"w": torch.eye(200)}, path, metadata={"method": "pilot"})
        >>> contents = read_contents(path)
        >>> contents.metadata["method"], contents.entries["w"].encoding.name
        ('pilot', 'coded')
    """
    with opened(path) as (file, nbytes):
        return contents_of(open_container(file, nbytes))


def read_state(file: IO[bytes], nbytes: int) -> dict[str, Tensor]:
    """The state dict in an open binary file of ``nbytes`` bytes; what :func:`load` does once the file is open."""
    return _state(file, contents_of(open_container(file, nbytes)))


def _state(file: IO[bytes], contents: Contents) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, entry in contents.entries.items():
        if isinstance(entry, Entry):
            state[name] = _loaded(file, entry, _decode(file, entry))
    return {name: state[entry if isinstance(entry, str) else name] for name, entry in contents.entries.items()}


def stored_tensors(path: str | os.PathLike[str]) -> Iterator[tuple[Entry, Tensor]]:
    """Each entry of a file with its tensor as it is stored: levels, where it is stored by levels.

    Raises:
        FormatError: the file is damaged.
    """
    with opened(path) as (file, nbytes):
        for entry in contents_of(open_container(file, nbytes)).entries.values():
            if isinstance(entry, Entry):
                yield entry, _decode(file, entry)


def _decode(file: IO[bytes], entry: Entry) -> Tensor:
    """One tensor as it is stored."""
    if type(entry.encoding) is Dense and entry.dtype != "BOOL" and 0 < entry.stored[""].nbytes <= SMALL:
        return torch.frombuffer(small_array(file, entry), dtype=TYPES[entry.dtype]).reshape(entry.shape)
    bits = stored_bits(file, entry)
    if not bits.size:  # torch gives it no strides, and then no other type
        return torch.empty(entry.shape, dtype=TYPES[entry.dtype])
    return torch.from_numpy(bits).view(TYPES[entry.dtype]).reshape(entry.shape)


def _loaded(file: IO[bytes], entry: Entry, stored: Tensor) -> Tensor:
    """What the model gets of a stored tensor."""
    if not entry.becomes:
        return stored
    try:
        if entry.axis is None:
            return stored.to(TYPES[entry.becomes])
        part = stored_part(file, entry, SCALES)
        scale = torch.from_numpy(part.take(part.left)).view(torch.bfloat16)
        part.finish()
        if not bool(((scale > 0) & scale.isfinite()).all()):
            raise FormatError("a scale that is not a positive number", tensor=entry.name)
        return rounded(stored, scale, entry.axis).to(TYPES[entry.becomes])
    except (RuntimeError, MemoryError):
        raise FormatError(f"its {stored.numel():,} elements do not fit into memory", tensor=entry.name) from None


def _is_plain(model: nn.Module) -> bool:
    """Whether ``load_state_dict`` does nothing for any module but copy, as for those of torch.nn itself."""
    names = ("_load_from_state_dict", "load_state_dict", "state_dict", "_save_to_state_dict", "set_extra_state")
    hooks = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
    norms = nn.modules.batchnorm._NormBase._load_from_state_dict  # it knows versions of files that had less
    kinds = {type(module) for module in model.modules()}
    return all(
        getattr(kind, name) in (getattr(nn.Module, name), norms) for kind in kinds for name in names
    ) and not any(getattr(module, hook) for module in model.modules() for hook in hooks)


def _check_fits(model: nn.Module, state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The model's own tensors; ``load_state_dict`` copies before it complains, this complains before anything is."""
    own = model.state_dict()
    wanted = {name: value for name, value in own.items() if isinstance(value, Tensor)}
    missing, extra = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    both = {name: value for name, value in wanted.items() if name in state}
    lazy = [name for name, value in both.items() if is_lazy(value)]
    shapes = [
        f"{name!r} is {list(state[name].shape)} in the file and {list(value.shape)} in the model"
        for name, value in both.items()
        if name not in lazy and state[name].shape != value.shape
    ]
    faults = [f"the file lacks {missing[:3]}"] if missing else []
    faults += [f"the model lacks {extra[:3]}"] if extra else []
    faults += [
        f"{name!r} of the model is a {type(own[name]).__name__}, no tensor" for name in own if name not in wanted
    ]
    faults += [f"{few(lazy)} of the model has no shape yet; call the model with a batch first"] if lazy else []
    faults += shapes[:3]
    absent = [name for name, value in both.items() if not is_lazy(value) and value.is_meta]
    if absent:
        faults.append(
            f"{few(absent)}: on the meta device, where values are lost; call model.to_empty(device='cpu') first, or "
            "model.load_state_dict(mm.load(path), assign=True)"
        )
    if not faults:
        faults = list(itertools.islice(_not_taken(both, state), 3))
    if faults:
        raise ValueError(f"{path} does not fit {type(model).__name__}: {'; '.join(faults)}; load it without a model")
    return wanted


def _not_taken(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Iterator[str]:
    """What a copy into the model's own tensors would drop without a word."""
    for name, tensor in own.items():
        if tensor.dtype != state[name].dtype and not _holds(tensor.dtype, state[name]):
            stored = str(state[name].dtype).removeprefix("torch.")
            yield f"{name!r} holds {stored} numbers that {str(tensor.dtype).removeprefix('torch.')} of the model cannot"
    whole = {name: tensor for name, tensor in own.items() if not hasattr(tensor, "placements")}
    for name, first in ties(whole).items():
        one, other = state[first], state[name]
        if one is not other and not (one.dtype == other.dtype and np.array_equal(to_bits(one), to_bits(other))):
            yield f"{first!r} and {name!r} are one tensor of the model, and differ in the file"


def _holds(dtype: torch.dtype, stored: Tensor) -> bool:
    """Whether a type holds these numbers, rounded if it is a floating one.

    Example:
        >>> _holds(torch.int8, torch.tensor([127.0])), _holds(torch.int8, torch.tensor([0.5]))
        (True, False)
    """
    if stored.is_complex():
        return dtype.is_complex or (not bool(stored.imag.any()) and _holds(dtype, stored.real))
    made, wide = stored.to(dtype), stored.double()
    if dtype.is_complex:
        return True
    if dtype.is_floating_point:
        finite, most = wide.isfinite(), torch.finfo(dtype)
        largest = float(wide[finite].abs().max()) if bool(finite.any()) else 0.0
        # What rounds to the largest number is held; some types of 8 bits take it for all that is larger, too.
        return torch.equal(made.double().isfinite(), finite) and largest <= most.max * (1 + most.eps / 4)
    return bool((made.double() == wide).all())
