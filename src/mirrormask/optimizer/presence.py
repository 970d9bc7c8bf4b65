"""Whether the model still holds the parameters that are trained: the promise is about the model, not about notes."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mirrormask.checks import callers_level, few
from mirrormask.flats import which_not_finite
from mirrormask.optimizer.shards import is_sharded, shard_of
from mirrormask.optimizer.weights import SparseWeights
from mirrormask.overlaps import check_memory
from mirrormask.resharding import reshard

__all__ = ["Presence"]

#: Those of all optimizers that there are. Weak, and of these and not of parameters: torch does not exchange a tensor
#: that somebody has a weak reference to, and pickles what is noted on a parameter with it.
_LIVING: weakref.WeakSet[Presence] = weakref.WeakSet()


def _kinds(weights: Collection[Tensor]) -> tuple[list[torch.Size], list[torch.dtype], list[torch.device]]:
    """What a weight may not change: one list each, so that all of them are compared at once."""
    return [x.shape for x in weights], [x.dtype for x in weights], [x.device for x in weights]


class Presence:
    """Looks at the model's own parameters.

    Args:
        model: the network.
        weights: those of its parameters that become sparse.
    """

    def __init__(self, model: nn.Module, weights: SparseWeights) -> None:
        self.model = model
        self._weights = {name: weights.shards.whole(x) for name, x in weights.items()}
        self._shards = weights.shards
        self._note_places()
        self._kinds = _kinds(self._weights.values())
        self._addresses: list[int] = self._lie()
        self._successors: list[tuple[weakref.ref[Presence], list[str]]] = []
        self._wrappers: list[weakref.ref[nn.Module]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy is of other weights, which nobody else trains.
        return {**self.__dict__, "_successors": [], "_wrappers": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _LIVING.add(self)

    def claim(self) -> None:
        """From now on these weights are trained here; an optimizer that trained one before must not go on."""
        own = {id(x) for x in self._weights.values()}
        for other in list(_LIVING):
            shared = [name for name, x in other._weights.items() if id(x) in own]
            if shared and other is not self:
                other._successors.append((weakref.ref(self), shared))
        _LIVING.add(self)

    def check_joined(self) -> None:
        """Raise where DistributedDataParallel's ``join`` lets processes run out of batches one after another.

        Those that have ended answer what DDP asks, and not what a change of the mask does.

        Raises:
            RuntimeError: the context is open, and does not throw at the first that ends.
        """
        if self._wrappers is None:
            kind = nn.parallel.DistributedDataParallel
            around = [found for found in gc.get_objects() if issubclass(type(found), kind)]
            own = {id(x) for x in self._weights.values()}
            self._wrappers = [weakref.ref(found) for found in around if own & {id(p) for p in found.parameters()}]
        for wrapper in self._wrappers:
            config = getattr(wrapper(), "_join_config", None)
            if config is not None and config.enable and not config.throw_on_early_termination:
                raise RuntimeError(
                    "model.join() lets processes end one after another, and one that has ended takes no part in "
                    "changes of the mask; give every process as many batches (drop_last=True, or a "
                    "DistributedSampler), or stop all with the first: model.join(throw_on_early_termination=True)"
                )

    def _check_alone(self) -> None:
        if not self._successors:
            return
        gc.collect()  # an optimizer that was deleted is a cycle, and may still be there
        self._successors = [(other, names) for other, names in self._successors if other() is not None]
        if self._successors:
            raise RuntimeError(
                f"mm.sparsify was called again for {few(self._successors[0][1])}, and what it returned trains that "
                "now: two masks on one weight undo each other; step the newer optimizer only, or delete it and go on"
            )

    def check(self) -> None:
        """Raise unless each weight is the model's own parameter, of the shape, dtype, device and memory that it had.

        Raises:
            RuntimeError: it names the parameters, and the order that works; or another optimizer has claimed one.
        """
        self._check_alone()
        gone = self._gone()
        if gone and self._shards.any:
            reshard(self.model)
            gone = self._gone()
        if gone:
            if any(is_sharded(p) for p in self.model.parameters()) and not self._shards.any:
                raise RuntimeError(
                    f"the model was sharded after mm.sparsify, and does not hold {few(gone)} any more; the order that "
                    "works: fully_shard(model) or parallelize_module(model) first, then build the optimizer over "
                    "model.parameters(), then call mm.sparsify"
                )
            raise RuntimeError(
                f"the model does not hold {few(gone)} any more: something has put other parameters in their place "
                "(another module, fully_shard, to_empty, load_state_dict(assign=True), quantization, ...), which this "
                "optimizer does not train; do that first, then build the optimizer, then call mm.sparsify"
            )
        if _kinds(self._weights.values()) != self._kinds:
            self._raise_of_kinds()
        if self._lie() != self._addresses:
            self.check_memory()
        grads = [x.grad for x in self._weights.values()]
        if True in [grad is not None and grad.layout != torch.strided for grad in grads]:
            for (name, x), grad in zip(self._weights.items(), grads, strict=True):
                if grad is not None and grad.layout != torch.strided and not is_sharded(x):
                    raise RuntimeError(
                        f"the gradient of {name!r} is sparse, and a mask needs a dense one; build its layer with "
                        "sparse=False, or leave it out with weights="
                    )

    def check_memory(self) -> None:
        """Raise where a weight lies in memory of another parameter's since, as ``b.weight.data = a.weight.data`` does.

        Raises:
            RuntimeError: it names both.
        """
        check_memory(self.model, self._weights, error=RuntimeError)
        self._addresses = self._lie()

    def _lie(self) -> list[int]:
        """Where the weights are in memory."""
        return self._shards.versions([self._shards.local(x) for x in self._weights.values()])[1]

    def _raise_of_kinds(self) -> None:
        for name, *was, is_shape, is_dtype, is_device in zip(
            self._weights, *self._kinds, *_kinds(self._weights.values()), strict=True
        ):
            shape, dtype, device = was
            if shape != is_shape or dtype != is_dtype or device != is_device:
                raise RuntimeError(
                    f"{name!r} was {tuple(shape)}, {dtype} on {device} when mm.sparsify was called and is "
                    f"{tuple(is_shape)}, {is_dtype} on {is_device} now; move and convert the model first, then build "
                    "the optimizer, then call mm.sparsify"
                )

    def _gone(self) -> list[str]:
        """The weights that the model does not hold now."""
        # Lists and not generators: this is asked of every weight at every step.
        moved = False in [module._parameters.get(leaf) is x for module, leaf, x in self._places]
        if not moved and False not in [above._modules.get(name) is module for above, name, module in self._path]:
            return []
        there = {id(p) for p in self.model.parameters()}  # a parametrization or a wrapper moves one, and keeps it
        gone = [name for name, x in self._weights.items() if id(x) not in there]
        modules = {id(module) for module in self.model.modules()}
        names = {id(x): name for name, x in self._weights.items()}
        for module, leaf, x in self._places:  # of a tied weight there are several, and one of them may be another's now
            now = module._parameters.get(leaf)
            if now is not None and now is not x and id(module) in modules and names[id(x)] not in gone:
                gone.append(names[id(x)])
        if not gone:
            self._note_places()
        return gone

    def _note_places(self) -> None:
        """Where each weight is: its module, and how one gets there from the model."""
        names = {id(x) for x in self._weights.values()}
        self._places: list[tuple[nn.Module, str, Tensor]] = []
        path: dict[tuple[int, str], tuple[nn.Module, str, nn.Module]] = {}
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for at, module in modules.items():
            own = [(leaf, p) for leaf, p in module._parameters.items()
                   if p is not None and id(p) in names]  # fmt: skip
            self._places += [(module, leaf, p) for leaf, p in own]
            while own and at:
                above, _, name = at.rpartition(".")
                path[id(modules[above]), name] = modules[above], name, modules[at]
                at = above
        self._path = list(path.values())

    def check_finite(self) -> None:
        """Raise unless all numbers in the weights are finite.

        Raises:
            RuntimeError: it names the weights.
        """
        own = [self._shards.local(x) for x in self._weights.values()]
        flags = self._shards.max(which_not_finite(own))
        bad = [name for name, flag in zip(self._weights, flags, strict=True) if flag]
        if bad:
            raise RuntimeError(
                f"{few(bad)} {'is' if len(bad) == 1 else 'are'} not finite: training has diverged; lower the "
                "learning rate or clip gradients, and go on from a checkpoint of before"
            )

    def warn_of_makers(self) -> None:
        """Warn where the model computes with something that is made of a weight and is less sparse than it.

        A parametrization that is registered after ``mm.sparsify`` keeps the parameter, and need not keep its zeros.
        """
        names = {id(x): name for name, x in self._weights.items()}
        for module in self.model.modules():
            if not parametrize.is_parametrized(module):
                continue
            for tensor, steps in module.parametrizations.items():  # type: ignore[union-attr, operator]
                for original in [p for p in steps._parameters.values() if id(p) in names]:
                    made, own = (int(shard_of(x).count_nonzero()) for x in (getattr(module, tensor), original))
                    if made > own:
                        warnings.warn(
                            f"{names[id(original)]} is sparse, with {own} nonzeros, and what the model computes with "
                            f"is not: {', '.join(type(step).__name__ for step in steps)} makes {made} nonzeros of it; "
                            "to sparsify what is made, take the parametrization away before mm.sparsify "
                            f"(torch.nn.utils.parametrize.remove_parametrizations(module, {tensor!r}))",
                            stacklevel=callers_level(),
                        )

    def names(self, parameters: Iterable[Tensor]) -> str:
        """What the model calls these parameters."""
        wanted = {id(p) for p in parameters}
        found = [name for name, p in self.model.named_parameters() if id(p) in wanted]
        return few(found) if found else f"{len(wanted)} parameters"
