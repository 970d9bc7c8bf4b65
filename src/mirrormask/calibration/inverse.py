"""The inverse of a second moment, damped, as a triangular factor."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DAMPING", "inverse_factor", "is_singular"]

#: What is added to the diagonal, as a share of its mean: SparseGPT's value.
DAMPING = 0.01


def inverse_factor(moment: Tensor, damping: float = DAMPING) -> Tensor:
    """Upper triangular ``U`` with ``UᵀU = (H + λI)⁻¹`` and ``λ = damping · mean(diag H)``.

    ``U[j, j:] U[j, j]`` is the first row of the inverse of ``H[j:, j:]``: what is left of the inverse once the columns
    before j are fixed, which is all that a solver that goes from left to right asks for.

    Args:
        moment: H, symmetric and not negative, of shape ``(groups, n, n)``; where it is zero, U is the identity.
        damping: in [0, inf); as much more as it takes, if H cannot be factored with that.

    Example:
        >>> h = torch.tensor([[[4.0, 2.0], [2.0, 2.0]]])
        >>> u = inverse_factor(h, 0.0)
        >>> torch.allclose(u.mT @ u, h.inverse())
        True
    """
    identity = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    scale = moment.diagonal(dim1=1, dim2=2).mean(1)
    scale = torch.where(scale > 0, scale, 1.0)[:, None, None]
    flat = (moment / scale).flip(1, 2)  # of any scale; reversed, its lower factor is H's upper one
    flat[(moment == 0).all(2).all(1)] = identity
    flat += damping * identity
    factor, failed = torch.linalg.cholesky_ex(flat)
    more = max(damping, 10 * torch.finfo(moment.dtype).eps)
    while bool(failed.any()):
        flat += more * identity
        factor, failed = torch.linalg.cholesky_ex(flat)
        more *= 10
    upper = factor.flip(1, 2)
    inverse: Tensor = torch.linalg.solve_triangular(upper, identity.expand_as(upper), upper=True)
    return inverse / scale.sqrt()


def is_singular(moment: Tensor, places: int) -> bool:
    """Whether H has no inverse, so that only its damping tells the weights apart.

    Args:
        moment: H, of shape ``(groups, n, n)``.
        places: how many columns it is a sum over.

    Example:
        >>> is_singular(torch.eye(2)[None], 2), is_singular(torch.ones(1, 2, 2), 2)
        (False, True)
    """
    if places < moment.shape[-1]:
        return True
    diagonal = moment.diagonal(dim1=1, dim2=2)
    if bool((diagonal <= 0).any()):
        return True
    norms = diagonal.sqrt()
    correlation = moment / norms[:, :, None] / norms[:, None, :]
    factor, failed = torch.linalg.cholesky_ex(correlation)
    if bool(failed.any()):
        return True
    pivots = factor.diagonal(dim1=1, dim2=2).square().amin()
    return bool(pivots <= 4 * moment.shape[-1] * torch.finfo(moment.dtype).eps)
