"""The library's recommendation."""

from __future__ import annotations

from dataclasses import dataclass

from mirrormask.checks import check_known
from mirrormask.decay import ShrinkDecay
from mirrormask.decay.growth import GROWTH
from mirrormask.geometry import Geometry, Hadamard, MirrorDescent
from mirrormask.masks import Gradual
from mirrormask.methods.base import Method, named
from mirrormask.methods.groups import Factors, Layers, Window
from mirrormask.methods.options import reads

__all__ = ["mirror"]

#: The bound on a step of u without factors under Adam and its kin. With 0.05, LeNet-300-100 at 99.5% collapsed at
#: twice the learning rate that suits it (docs/studies.md).
ADAPTIVE_CLIP = 0.01
#: How it ranks weights there. Adam moves the weights of all layers alike, however much the loss depends on them, so
#: that their sizes say little across layers: by magnitude, ResNet-20 kept 24 of 432 weights of its first layer. The
#: gradient says it; but where SGD has trained the network before, the sizes say it too, and it would count twice: the
#: first score counts it by halves until the weights have outgrown their start. It has to be watched for that.
ADAPTIVE_SCORE = "balanced"
UNWATCHED_SCORE = "sensitivity"


@dataclass(frozen=True, kw_only=True)
class _Mirror(Window, Factors, Layers):
    """The options of :func:`mirror`.

    Args:
        shrink, decay_from, decay_until, decay_limit: ``a`` falls to ``a₀ exp(-shrink)`` in this window of training, and
            ``log a`` by at most ``decay_limit`` in a step; see :class:`mirrormask.decay.ShrinkDecay`.
        growth: the decay waits until the large weights have grown by ``exp(growth)``, as they do within a few per cent
            of a training from random weights and not in fine-tuning; ``None`` to decay wherever training starts from.
        clip: as in :class:`mirrormask.geometry.MirrorDescent`, without factors; ``"auto"`` for its default under SGD
            and 0.01 under Adam and its kin, whose steps do not become smaller with the gradient.
        factors: True to train the factors ``m`` and ``w``; False for mirror descent without them, which needs half of
            their memory and is a little less accurate (docs/results.md, docs/studies.md).
        score: how weights are ranked, as in :class:`mirrormask.masks.Mask`; ``"auto"`` for ``"magnitude"`` under SGD
            and ``"balanced"`` under Adam and its kin (``"sensitivity"`` with ``growth=None``).
    """

    shrink: float = ShrinkDecay.shrink
    decay_from: float = ShrinkDecay.start_at
    decay_until: float = ShrinkDecay.end_at
    decay_limit: float | None = 0.004
    growth: float | None = GROWTH
    clip: float | str | None = "auto"
    factors: bool = True
    score: str = "auto"


@named("this library, after arXiv 2408.09966")
@reads(_Mirror)
def mirror(options: _Mirror) -> Method:
    """The library's recommendation: the mirror flow of ``m ⊙ w``, a scheduled decay and a gradual mask.

    Raises:
        ValueError: an option is outside its range, or ``clip`` is given but factors, which do not read it, are trained.

    Example:
        >>> mirror(0.99).decay.shrink
        4.0
    """
    clip, score = options.clip, options.score
    if options.factors and clip != "auto":
        raise ValueError(f"clip={clip!r} bounds the step of mirror descent; leave it out, or give factors=False")
    if isinstance(clip, str):
        check_known("clip", clip, ("auto",))
        clips: tuple[float | None, ...] = (MirrorDescent.clip, ADAPTIVE_CLIP)
    else:
        clips = (clip, clip)
    adaptive_score = UNWATCHED_SCORE if options.growth is None else ADAPTIVE_SCORE
    scores = ("magnitude", adaptive_score) if score == "auto" else (score, score)
    decay = ShrinkDecay(options.shrink, options.decay_from, options.decay_until, options.decay_limit, options.growth)

    def method(adaptive: bool, other: Method | None = None) -> Method:
        mask = options.part(Gradual, score=scores[adaptive])
        geometry: Geometry = options.part(Hadamard)
        if not options.factors:
            geometry = options.part(MirrorDescent, clip=clips[adaptive])
        return Method(geometry, decay, mask, "mirror", adaptive=other)

    return method(False, method(True))
