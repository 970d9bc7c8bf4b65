"""PyTorch's encoder, which leaves padding out where its mask lets it, as a program for any mask.

In evaluation ``nn.TransformerEncoder`` looks at the numbers of ``src_key_padding_mask``: where all padding lies at the
ends of sequences, it runs on what is left, and gives zeros for the padding (before its last norm). A trace has the
other way alone, on which padding gives what it gives. While a model is traced, its encoders compute

    out * (valid | not aligned)            valid: no padding; aligned: nowhere does a token follow on padding
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["zeros_for_padding"]


@contextlib.contextmanager
def zeros_for_padding(model: nn.Module) -> Iterator[None]:
    """Let the encoders in ``model`` be traced as this file's head says, for a while."""
    found = [
        module
        for module in model.modules()
        if type(module).forward is nn.TransformerEncoder.forward
        and getattr(module, "use_nested_tensor", False)
        and torch.backends.mha.get_fastpath_enabled()
        and "forward" not in vars(module)
    ]
    for module in found:
        module.forward = types.MethodType(_encoder, module)
    try:
        yield
    finally:
        for module in found:
            del module.forward


def _encoder(
    self: Any,
    src: Tensor,
    mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
) -> Any:
    if src_key_padding_mask is None or mask is not None or src.dim() != 3:
        return nn.TransformerEncoder.forward(self, src, mask, src_key_padding_mask, is_causal)
    padding = F._canonical_mask(src_key_padding_mask, "src_key_padding_mask", None, "mask", src.dtype)
    assert padding is not None
    output = src
    for layer in self.layers:
        output = layer(output, src_mask=None, is_causal=bool(is_causal), src_key_padding_mask=padding)
    valid = padding.logical_not()
    kept = valid | (valid[:, 1:] & ~valid[:, :-1]).any()
    output = output * kept.unsqueeze(-1).to(output.dtype)
    return output if self.norm is None else self.norm(output)
