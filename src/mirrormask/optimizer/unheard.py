"""An option of the base optimizer that is set and has no effect on what is trained through latents."""

from __future__ import annotations

import inspect
import warnings

from mirrormask.checks import callers_level, few
from mirrormask.optimizer.sparse_optimizer import SparseOptimizer

__all__ = ["warn_of_weight_decay"]


def warn_of_weight_decay(sparse: SparseOptimizer) -> None:
    """Warn where ``weight_decay`` was set for weights on whose latents it does not act.

    Set means above 0 and not what the optimizer's class has by itself: AdamW has 0.01, which nobody has asked for.
    """
    base = sparse.parts.base
    parameter = inspect.signature(type(sparse.base).__init__).parameters.get("weight_decay")
    usual = 0.0 if parameter is None else parameter.default
    acted_on = {link.group for link in base.links if link.rate is not None and link.decayed}
    deaf = {link.group for link in base.links if link.rate is not None} - acted_on
    for index in sorted(deaf):
        value = float(sparse.param_groups[index].get("weight_decay") or 0.0)
        if value and value != usual:
            names = [name for name, x in sparse.weights.items() if base.group_of[x] == index]
            warnings.warn(
                f"weight_decay={value:g} of {type(sparse.base).__name__} does not act on {few(names)}, which "
                f"{sparse.method.name!r} trains as factors: the method's own decay takes its place there; put these "
                "weights into a group with weight_decay=0 if that is what you mean, or take a method without factors "
                "(gmp) to have it act on them",
                stacklevel=callers_level(),
            )
            return
