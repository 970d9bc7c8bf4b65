"""Methods that prune before the first step."""

from __future__ import annotations

from dataclasses import dataclass

from mirrormask.decay import ConstantDecay
from mirrormask.geometry import Euclidean
from mirrormask.masks import AtStart
from mirrormask.methods.base import Method, named
from mirrormask.methods.groups import Layers, Pattern, Seed
from mirrormask.methods.options import reads

__all__ = ["erk", "grasp", "random", "snip", "synflow", "uniform"]


@dataclass(frozen=True, kw_only=True)
class _Drawn(Seed, Pattern):
    """The options of :func:`random` and :func:`uniform`."""


@named("Liu et al. 2022, arXiv 2202.02643")
@reads(_Drawn)
def random(options: _Drawn) -> Method:
    """Random pruning at initialisation, every weight of the network with the same chance.

    Example:
        >>> random(0.9).mask.score
        'random'

    Source: Liu et al. 2022, arXiv 2202.02643.
    """
    mask = options.part(AtStart, score="random", floor=0.0)  # the same chance for every weight, whatever its layer
    return Method(Euclidean(), ConstantDecay(), mask, "random")


@named("Liu et al. 2022, arXiv 2202.02643")
@reads(_Drawn)
def uniform(options: _Drawn) -> Method:
    """Random pruning at initialisation, the same sparsity in every layer.

    Example:
        >>> uniform(0.9).mask.allocation
        'uniform'

    Source: Liu et al. 2022, arXiv 2202.02643.
    """
    mask = options.part(AtStart, score="random", allocation="uniform")
    return Method(Euclidean(), ConstantDecay(), mask, "uniform")


@named("Mocanu et al. 2018, arXiv 1707.04780; Evci et al. 2020, arXiv 1911.11134")
@reads(Seed)
def erk(options: Seed) -> Method:
    """Random pruning at initialisation, layers shared by Erdős-Rényi-Kernel.

    A layer of size n keeps a share in proportion to ``(sum of its dimensions) / n``; one whose share would exceed 1
    is kept whole and the rest is shared again.

    Example:
        >>> erk(0.9).mask.allocation
        'erk'

    Source: Mocanu et al. 2018, arXiv 1707.04780; Evci et al. 2020, arXiv 1911.11134, section 3 (1).
    """
    mask = options.part(AtStart, score="random", allocation="erk")
    return Method(Euclidean(), ConstantDecay(), mask, "erk")


@named("Lee, Ajanthan and Torr 2019, arXiv 1810.02340")
@reads(Layers)
def snip(options: Layers) -> Method:
    """SNIP: pruning at initialisation by ``|x ⊙ ∇f(x)|``; needs ``mm.sparsify(..., batches=)``.

    Example:
        >>> snip(0.9).reads_data
        True

    Source: Lee, Ajanthan and Torr 2019, arXiv 1810.02340, equation (6) and Algorithm 1.
    """
    return Method(Euclidean(), ConstantDecay(), options.part(AtStart, score="snip"), "snip")


@named("Tanaka et al. 2020, arXiv 2006.05467")
@reads(Layers)
def synflow(options: Layers) -> Method:
    """SynFlow: pruning at initialisation by synaptic flow, in 100 exponential rounds; needs one input's shape.

    ``R = 1ᵀ f_|x|(1)``, score ``|x| ⊙ ∂R/∂|x|``; ``mm.sparsify(..., batches=)`` gives the shape.

    Example:
        >>> synflow(0.9).mask.score
        'synflow'

    Source: Tanaka et al. 2020, arXiv 2006.05467, Algorithm 1.
    """
    return Method(Euclidean(), ConstantDecay(), options.part(AtStart, score="synflow"), "synflow")


@named("Wang, Zhang and Grosse 2020, arXiv 2002.07376")
@reads(Layers)
def grasp(options: Layers) -> Method:
    """GraSP: pruning at initialisation that preserves gradient flow; needs ``mm.sparsify(..., batches=)``.

    Keeps the largest ``x ⊙ H∇f(x)``, at a temperature of 200.

    Example:
        >>> grasp(0.9).mask.score
        'grasp'

    Source: Wang, Zhang and Grosse 2020, arXiv 2002.07376, equation (8) and Algorithm 2.

    Differs from the paper: the Hessian's product is with the gradient over all batches together.
    """
    return Method(Euclidean(), ConstantDecay(), options.part(AtStart, score="grasp"), "grasp")
