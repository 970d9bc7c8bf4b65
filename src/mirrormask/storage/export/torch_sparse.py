"""PyTorch's own sparse tensors: Linear layers with CSR weights."""

from __future__ import annotations

import copy
import warnings

from torch import Tensor, nn

from mirrormask.checks import check_sparsity
from mirrormask.resharding import check_whole

__all__ = ["torch_sparse"]


def torch_sparse(model: nn.Module, *, min_sparsity: float = 0.5) -> nn.Module:
    """A copy of a model whose sparse ``nn.Linear`` weights are CSR tensors; it runs where the dense one does.

    Convolutions stay dense, because PyTorch has no sparse convolution, and so do subclasses of ``nn.Linear``, whose
    owners read the weight in ways of their own (attention). A CSR weight takes ``8 + itemsize`` bytes a nonzero and
    eight a row, so below two thirds zeros in float32 it is larger than the dense one. For speed see ``mm.compile``.

    Args:
        model: stays as it is.
        min_sparsity: Linear weights with a smaller fraction of zeros stay dense.

    Returns:
        The copy, for inference: the CSR weights take no gradient.

    Raises:
        ValueError: no weight qualifies.

    Example:
        >>> import torch
        >>> layer = nn.Linear(4, 2)
        >>> layer.weight.data = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]])
        >>> torch_sparse(nn.Sequential(layer))[0].weight.values().tolist()
        [1.0, 2.0]
    """
    check_sparsity(min_sparsity, "min_sparsity")
    check_whole(model, "export")
    other = copy.deepcopy(model)
    converted: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for module in other.modules():
        if type(module) is nn.Linear:
            weight = module.weight
            zeros = int((weight == 0).sum())
            if zeros and zeros >= min_sparsity * weight.numel():
                if id(weight) not in converted:
                    converted[id(weight)] = _csr(weight)
                module.weight = converted[id(weight)]
    if not converted:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear weight with min_sparsity={min_sparsity:g} or more zeros; "
            "convolutions stay dense, because PyTorch has no sparse convolution (see mm.compile)"
        )
    return other


def _csr(weight: Tensor) -> nn.Parameter:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        return nn.Parameter(weight.detach().to_sparse_csr(), requires_grad=False)
