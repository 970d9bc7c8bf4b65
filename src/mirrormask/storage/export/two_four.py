"""2:4 semi-structured tensors, for the GPUs that multiply them."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from mirrormask.resharding import check_whole

__all__ = ["two_four"]

_TYPES = (torch.float16, torch.bfloat16)
#: CUTLASS's constraints for 16-bit elements: rows and columns in multiples of these.
_ROWS, _COLUMNS = 32, 64


def two_four(model: nn.Module) -> nn.Module:
    """A copy of a model whose 2:4 ``nn.Linear`` weights are semi-structured tensors (CUTLASS layout).

    Each weight becomes its kept values, half as many columns, and 2-bit positions. The multiplication exists on NVIDIA
    GPUs of compute capability 8.0 and later only; the layout is made, and can be turned back with ``to_dense()``,
    anywhere.

    Args:
        model: in float16 or bfloat16; it stays as it is, and nothing is rounded here.

    Returns:
        The copy, for inference. Linear weights that are not 2:4 along their rows, or whose rows and columns are not
        multiples of 32 and 64, stay dense.

    Raises:
        ValueError: no weight qualifies; the message says why for each.

    Example:
        >>> layer = nn.Linear(64, 32).half()
        >>> layer.weight.data *= torch.tensor([1, 0, 0, 1]).half().repeat(16)
        >>> two_four(nn.Sequential(layer))[0].weight.packed.shape
        torch.Size([32, 32])
    """
    check_whole(model, "export")
    other = copy.deepcopy(model)
    converted: dict[int, nn.Parameter] = {}
    refused = []
    for name, module in other.named_modules():
        if type(module) is not nn.Linear:
            continue
        weight = module.weight
        fault = _fault(weight)
        if fault:
            refused.append(f"{name or 'the model itself'}: {fault}")
            continue
        if id(weight) not in converted:
            converted[id(weight)] = nn.Parameter(_semi_structured(weight.detach()), requires_grad=False)
        module.weight = converted[id(weight)]
    if not converted:
        why = "; ".join(refused[:5]) or "it has no nn.Linear"
        raise ValueError(f"no weight of {type(model).__name__} can be a 2:4 tensor: {why}")
    return other


def _fault(weight: Tensor) -> str | None:
    if weight.dtype not in _TYPES:
        return f"{weight.dtype}, not float16 or bfloat16; convert the model first (model.half())"
    rows, columns = weight.shape
    if rows % _ROWS or columns % _COLUMNS:
        return f"shape [{rows}, {columns}] is not a multiple of [{_ROWS}, {_COLUMNS}]"
    most = int((weight != 0).reshape(rows, columns // 4, 4).sum(-1).max())
    return None if most <= 2 else f"a block of 4 has {most} nonzeros"


def _semi_structured(weight: Tensor) -> Tensor:
    """PyTorch's own constructor refuses CPU tensors; these are the steps that it takes on a GPU."""
    packed, meta = sparse_semi_structured_from_dense_cutlass(weight.contiguous())  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of SparseSemiStructuredTensor is in prototype stage")
        return SparseSemiStructuredTensorCUTLASS(
            weight.shape, packed=packed, meta=meta, packed_t=None, meta_t=None, compressed_swizzled_bitmask=None
        )
