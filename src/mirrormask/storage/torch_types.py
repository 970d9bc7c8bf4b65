"""The element types that a file can hold as torch has them, and how to see a tensor as plain bits."""

from __future__ import annotations

import torch
from torch import Tensor

from mirrormask.storage.dtypes import BITS, Bits

__all__ = ["NAMES", "TYPES", "to_bits"]

#: safetensors' name -> torch's type.
TYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
#: torch's type -> safetensors' name.
NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in TYPES.items()}


def to_bits(tensor: Tensor) -> Bits:
    """The bits of ``tensor``, flat and row-major; no copy if it is contiguous and on the CPU.

    Example:
        >>> [hex(bits) for bits in to_bits(torch.tensor([[0.0, -0.0], [1.0, 2.0]]))]
        ['0x0', '0x80000000', '0x3f800000', '0x40000000']
    """
    if tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_neg():
        return tensor.detach().numpy().reshape(-1).view(BITS[4])  # the same with fewer calls
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().view(BITS[tensor.element_size()])
