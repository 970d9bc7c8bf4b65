"""Which tensors of a model go into a file, checked and converted before anything is encoded."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mirrormask.storage.torch_types import NAMES

__all__ = ["Storable", "converted", "named_tensors", "ties"]

#: What can be saved: a module, or a state dict.
Storable = nn.Module | Mapping[str, Tensor]

_SURROGATE = re.compile("[\ud800-\udfff]")
_SMALL_TYPES = (torch.bfloat16, torch.float16)


def named_tensors(model: Storable, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors of a model's state dict by name, each one that a file can hold.

    Args:
        model: a module or a state dict.
        dtype: bfloat16 or float16: the type of every floating tensor of two or more dimensions that is now wider.
            Vectors (biases, norms, running statistics) keep theirs: they weigh nothing and suffer most.

    Raises:
        TypeError: an entry is no tensor, or a kind of tensor that has no plain bytes (meta, DTensor, sparse, ...).
        ValueError: a name cannot be written, or a weight is too large for float16.
    """
    if dtype is not None and dtype not in _SMALL_TYPES:
        raise ValueError(
            f"dtype={dtype} is not torch.bfloat16 or torch.float16; leave it out to keep each tensor's own"
        )
    state = model.state_dict() if isinstance(model, nn.Module) else model
    if not isinstance(state, Mapping):
        raise TypeError(f"cannot save a {type(model).__name__}; pass a torch.nn.Module or a state dict")
    return {name: converted(name, _checked(name, tensor), dtype) for name, tensor in state.items()}


def ties(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Later name -> first name, for tensors that are one and the same memory."""
    first: dict[object, str] = {}
    tied = {}
    for name, tensor in state.items():
        if tensor.numel():
            lazy = tensor.is_conj(), tensor.is_neg()  # of the same memory other numbers
            key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), *lazy)
            if first.setdefault(key, name) != name:
                tied[name] = first[key]
    return tied


def _checked(name: object, tensor: object) -> Tensor:
    if not isinstance(name, str):
        raise TypeError(f"the name {name!r} is a {type(name).__name__}; names are text")
    if name == "__metadata__" or _SURROGATE.search(name):
        raise ValueError(f"safetensors cannot hold a tensor named {name!r}; rename the module")
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{name!r} is a {type(tensor).__name__}, not a tensor; a safetensors file holds tensors only: "
            "pass {name: tensor} without it, or keep it in metadata="
        )
    if is_lazy(tensor):
        raise ValueError(f"{name!r} has no values yet, as its module is lazy; call the model with a batch first")
    problem = _problem(tensor)
    if problem:
        raise TypeError(f"{name!r} {problem}")
    return tensor.detach()


def _problem(tensor: Tensor) -> str | None:
    """Why a tensor has no bytes to write, and what to do about it."""
    if hasattr(tensor, "full_tensor"):
        return (
            "is a DTensor, one rank's share; gather it first: torch.distributed.checkpoint.state_dict."
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)), "
            "then save that from rank 0"
        )
    if tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor):
        return "is on the meta device and has no values; materialise it (model.to_empty, then load the weights)"
    if tensor.is_nested:
        return "is a nested tensor; save its parts (tensor.unbind()), or a padded one (tensor.to_padded_tensor(0.0))"
    if tensor.layout != torch.strided:
        return f"has layout {tensor.layout}; save tensor.to_dense(), the file leaves out the zeros by itself"
    if tensor.is_quantized:
        return "is quantized; save tensor.dequantize(), or tensor.int_repr() with its scale and zero point"
    if is_traceable_wrapper_subclass(tensor):
        return f"is a {type(tensor).__name__}, which wraps other tensors; save the plain tensors it is made of"
    if tensor.dtype not in NAMES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in NAMES)
        return f"has dtype {tensor.dtype}, which safetensors cannot hold; convert it to one of: {known}"
    return None


def converted(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A weight in a type of 16 bits, if it is a wider one; biases and other vectors as they are.

    Raises:
        ValueError: it is too large for float16.
    """
    if dtype is None or not tensor.is_floating_point() or tensor.ndim < 2 or tensor.element_size() <= dtype.itemsize:
        return tensor
    small = tensor.to(dtype)
    if bool((small.isinf() & tensor.isfinite()).any()):
        largest = float(tensor[tensor.isfinite()].abs().max())
        remedy = "use bfloat16" if dtype is torch.float16 else "keep its own type"
        raise ValueError(f"{name!r} reaches {largest:g}, beyond {dtype}'s {torch.finfo(dtype).max:g}; {remedy}")
    return small
