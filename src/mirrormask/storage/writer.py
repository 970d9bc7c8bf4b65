"""Writing a model: small, exact, and all or nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from mirrormask.collector import while_uncollected
from mirrormask.files import atomic_write
from mirrormask.made_sparse import warn_of_filled
from mirrormask.selection import Weights
from mirrormask.storage.narrow import Values
from mirrormask.storage.plan import Form, Plan, make_plan
from mirrormask.storage.tensors import Storable

__all__ = ["save", "write"]


@while_uncollected
def save(
    model: Storable,
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    values: Values = None,
    signed_zeros: bool = False,
    weights: Weights | None = None,
) -> None:
    """Write a model to one safetensors file that leaves out the zeros.

    Every tensor of the state dict is stored in whichever of five forms takes the fewest bytes (``docs/format.md``):
    dense; a bitmask and the nonzero values; 8-bit gaps and the nonzero values; the same with gaps and exponents under a
    Huffman code; or, for N:M patterns, block patterns and values. :func:`mirrormask.load` gives every tensor back bit
    for bit, but for the sign of zeros. Whoever reads ``path`` finds the old file or the new one, also when this process
    is killed or the disk is full.

    Args:
        model: a module or a state dict, on any device. Tied weights are stored once.
        path: where to write; its folder must exist.
        metadata: notes such as the method and the run; texts are stored as they are, other values as JSON. The
            library adds its version, the format's version and the sparsity.
        dtype: ``torch.bfloat16`` or ``torch.float16`` to store wider weights (floating tensors of two or more
            dimensions) in that type; they are loaded in it too. By default each tensor keeps its own.
        values: ``"int8"`` to round each weight to one of 255 levels, with a scale for each output of its layer
            (:func:`mirrormask.quantize` does the same to the model, and can look at data); ``"float16"`` to round to
            half precision. What is loaded has its own type again. Of a module the layers' matrices and embeddings are
            rounded, of a state dict all floating tensors of two or more dimensions.
        signed_zeros: keep ``-0.0``. By default it is written as ``0.0``, its equal in every comparison: a weight times
            its mask holds one wherever it was negative, and each would take as many bytes as a value.
        weights: of which weights the file shall tell the sparsity: what :func:`mirrormask.sparsify` was given, as in
            :func:`mirrormask.sparsity`. It changes nothing of what is stored.

    Raises:
        TypeError: an entry of the state dict is no plain tensor; the message says what to do with it. ``weights`` were
            given with a state dict, which has no layers to choose.
        ValueError: a name, a dtype or the metadata cannot be stored, or ``values`` cannot hold a weight.
        OSError: the file cannot be written, for one because the disk is full; the old file is untouched.

    Warns:
        UserWarning: weights have fewer zeros than they were left with (by ``finalize()``, :func:`mirrormask.prune` or
            :func:`mirrormask.load`): something has trained them on without a mask.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> layer = nn.Linear(400, 100)
        >>> layer.weight.data = layer.weight.data * (torch.rand(100, 400) < 0.05)
        >>> path = os.path.join(tempfile.mkdtemp(), "layer.safetensors")
        >>> save(layer, path, metadata={"method": "pilot"})
        >>> os.path.getsize(path) < 0.1 * layer.weight.nbytes
        True
    """
    if isinstance(model, nn.Module):
        warn_of_filled(model)
    write(make_plan(model, metadata, dtype, Form(values, signed_zeros), weights=weights), path)


def write(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write what was planned: the whole file, or nothing.

    Raises:
        OSError: the file cannot be written; the old file is untouched.
    """
    with atomic_write(path, expected=plan.nbytes) as file:
        file.write(plan.header)
        for array in plan.arrays():
            file.write(array.view(np.uint8).data)
