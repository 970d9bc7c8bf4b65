"""The base optimizer: which of its groups steps which tensors at which rate, its state of a tensor, its step."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mirrormask.optimizer import base_trials as trials
from mirrormask.optimizer.base_groups import MEMBERS, Group, GroupWatch, check_group, options_of, same_option
from mirrormask.optimizer.shards import Shards
from mirrormask.optimizer.weights import SparseWeights

__all__ = ["ELEMENTWISE", "BaseOptimizer", "Link"]

#: Optimizers whose step is zero for an element that is zero, has a zero gradient and a zero state: under them pruned
#: factors stay zero by themselves. Under any other (one that mixes elements, say) the mask is applied at every step.
ELEMENTWISE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
)
#: Under which names they keep the mean square of a gradient.
SECOND_MOMENTS = ("exp_avg_sq", "square_avg")
#: The least ``eps`` under which that holds: a smaller one is zero in float32.
LEAST_EPS = 2.0**-126
#: Optimizers whose step is linear in the gradient, by the name of their class: other packages are not imported.
LINEAR = ("SGD", "ASGD", "SGDW", "SGDScheduleFree", "SGDScheduleFreeReference")


@dataclass(frozen=True)
class Link:
    """One group of the base optimizer.

    Attributes:
        group: which of the SparseOptimizer's groups it belongs to.
        rate: the factor on that group's learning rate; None for parameters that the base trains as they are.
        decayed: whether the base's own weight decay acts on it.
        stepped: what a method's correction acts on.
    """

    group: int
    rate: float | None
    decayed: bool
    stepped: tuple[Tensor, ...] = ()


def _refuse(optimizer: Optimizer, verb: str) -> None:
    raise RuntimeError(
        f"this {type(optimizer).__name__} was given to mm.sparsify and holds latents, not the model's weights; {verb} "
        "what mm.sparsify returned"
    )


class _Guard:
    """A hook of the base's that lets it step from within a SparseOptimizer's step only."""

    def __init__(self) -> None:
        self.open = False

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Let it step; one whose ``step`` calls that of its parent class comes here again in between."""
        self.open = True
        try:
            yield
        finally:
            self.open = False

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self.open:
            _refuse(optimizer, "step")


class BaseOptimizer:
    """A torch optimizer that steps latents in the place of the weights to sparsify, and all else as ever.

    Attributes:
        torch: the optimizer itself.
        links: what each of its groups is, in order.
        watch: of its groups, between two steps.
        group_of: which of the SparseOptimizer's groups each parameter of the model is in (of a DTensor: its part).
        state_dtype: of its state of latents, where that is not their own.
        turns: the name of the method, if ``maximize`` would turn its pull around.
    """

    def __init__(self, optimizer: Optimizer, state_dtype: torch.dtype | None = None, turns: str = "") -> None:
        self.torch = optimizer
        self.state_dtype = state_dtype
        self.turns = turns
        self.links: list[Link] = []
        self.group_of: dict[Tensor, int] = {}
        self._carried: list[Group] = []
        self._members: list[list[Tensor]] = []
        self.watch = GroupWatch()
        self._guard = _Guard()

    @property
    def adaptive(self) -> bool:
        """Whether its step does not grow with the gradient (Adam and its kin)."""
        return not any(kind.__name__ in LINEAR for kind in type(self.torch).__mro__)

    @property
    def zeros_stay(self) -> bool:
        """Whether an element at zero, with a zero gradient and a zero state, stays there.

        Where nothing is added to a root of a mean square that is zero, it is divided by zero.
        """
        if type(self.torch) not in ELEMENTWISE:
            return False
        return all(float(group.get("eps", 1.0)) >= LEAST_EPS for group in self.torch.param_groups)

    @property
    def splits(self) -> bool:
        """Whether it steps a part of a tensor as it steps the whole one, so that processes may each have a part.

        One that is not known is tried: two steps on random numbers, on a matrix and on its quarters.
        """
        known = type(self.torch) in (*ELEMENTWISE, torch.optim.ASGD, torch.optim.Rprop)
        return known or trials.splits(self.torch)

    @property
    def has_hooks(self) -> bool:
        """Whether somebody wants to be told of this optimizer's own steps."""
        own = self.torch
        return bool(self._pre_hooks or own._optimizer_step_post_hooks or "step" in own.__dict__)

    @property
    def _pre_hooks(self) -> list[Any]:
        return [hook for hook in self.torch._optimizer_step_pre_hooks.values() if hook is not self._guard]

    # -- groups --------------------------------------------------------------------------------------------------

    def link(self, groups: Sequence[Group], weights: SparseWeights) -> None:
        """Build the base's groups: per group of ours one for plain parameters and one for each rate."""
        geometry = weights.geometry
        stepped = geometry.latents if geometry.stepped is None else geometry.stepped
        inner: list[Group] = []
        self.links, self._carried = [], [options_of(group) for group in groups]
        self._members = [list(group["params"]) for group in groups]
        local = weights.shards.local
        self.group_of = {local(p): index for index, group in enumerate(groups) for p in group["params"]}
        for index, group in enumerate(groups):
            plain: list[Tensor] = []
            by_rate: defaultdict[tuple[float, bool], list[tuple[str, Tensor]]] = defaultdict(list)
            for p in map(self._adopt(weights.shards), group["params"]):
                if geometry.latents and weights.holds(p):
                    for name, latent in weights.trained(p):
                        by_rate[weights.state(p)["rate"], name in geometry.weight_decayed].append((name, latent))
                else:
                    plain.append(p)
            inner.append({**options_of(group), "params": plain})
            self.links.append(Link(index, None, True, tuple(p for p in plain if weights.holds(p))))
            for (rate, decayed), members in by_rate.items():
                inner.append({**options_of(group), "params": [latent for _, latent in members]})
                acted_on = tuple(latent for name, latent in members if name in stepped)
                self.links.append(Link(index, rate, decayed, acted_on))
        self.torch.param_groups = inner
        self._close()
        for link, own in zip(self.links, inner, strict=True):
            _carry(link, own, self._carried[link.group])
        self.watch.note(self.torch.param_groups)

    def _close(self) -> None:
        """From now on the base steps from within a SparseOptimizer's step only."""
        if self._guard not in self.torch._optimizer_step_pre_hooks.values():
            self.torch.register_step_pre_hook(self._guard)
            # Gradients of the weights would stay, and add up.
            self.torch.zero_grad = lambda set_to_none=True: _refuse(self.torch, "call zero_grad() of")  # type: ignore[method-assign]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.links:
            self._close()  # torch copies and pickles no hooks

    def _adopt(self, shards: Shards) -> Callable[[Tensor], Tensor]:
        """What stands for a parameter, with the state that the parameter had."""

        def adopt(p: Tensor) -> Tensor:
            local = shards.local(p)
            if local is not p and p in self.torch.state:
                self.torch.state[local] = {k: shards.unwrap(local, v) for k, v in self.torch.state.pop(p).items()}
            return local

        return adopt

    def add_group(self, group: Group, weights: SparseWeights) -> None:
        """Train the parameters of one more group as they are."""
        own = [weights.shards.local(p) for p in group["params"]]
        self.torch.add_param_group({**options_of(group), "params": own})
        index = len(self._carried)
        self.links.append(Link(index, None, True))
        self.group_of |= dict.fromkeys(own, index)
        self._carried.append(options_of(group))
        self._members.append(list(group["params"]))
        self.watch.note(self.torch.param_groups)

    def check_untouched(self) -> None:
        """Raise where somebody sets the base's rates: those that count are those of the SparseOptimizer."""
        if getattr(self.torch.__dict__.get("step"), "_wrapped_by_lr_sched", False):
            raise RuntimeError(
                f"a scheduler is built on the {type(self.torch).__name__} that was given to mm.sparsify, where it sets "
                "the rates of latents; build it on what mm.sparsify returned"
            )
        self.watch.check(self.torch)

    def check_members(self, groups: Sequence[Group]) -> None:
        """Raise where somebody has put parameters into our groups, or taken some out: the base would not hear of it."""
        remedy = (
            "; to train more parameters call add_param_group(), to train fewer requires_grad_(False) on them, and to "
            "choose what becomes sparse call mm.sparsify anew"
        )
        if len(groups) != len(self._members):
            raise RuntimeError(f"there were {len(self._members)} param_groups and are {len(groups)}{remedy}")
        for index, (group, held) in enumerate(zip(groups, self._members, strict=True)):
            now = group["params"]
            if len(now) != len(held) or not all(map(operator.is_, now, held)):
                raise RuntimeError(
                    f"param_groups[{index}]['params'] had {len(held)} parameters and has {len(now)}, or others than "
                    f"then{remedy}"
                )

    def sync(self, groups: Sequence[Group]) -> None:
        """Carry what has changed in our groups (a scheduler may have done so) to the base's; the rest is its own.

        Raises:
            ValueError: an option is what it may not be at construction; nothing has changed then.
        """
        changes = [
            {k: v for k, v in group.items() if k not in MEMBERS and not same_option(v, seen.get(k, seen))}
            for group, seen in zip(groups, self._carried, strict=True)
        ]
        for group, changed in zip(groups, changes, strict=True):
            if changed or "lr" not in group:
                check_group(group, turns=self.turns)
        if self.watch.knows and not any(changes):
            return
        for link, own in zip(self.links, self.torch.param_groups, strict=True):
            _carry(link, own, changes[link.group])
        for seen, changed in zip(self._carried, changes, strict=True):
            seen.update(changed)
        self.watch.note(self.torch.param_groups)

    def reflect(self, groups: Sequence[Group]) -> None:
        """Show in our groups what the base has changed in its own: counters of steps, learning rates of its making."""
        if self.watch.knows:  # it has not been asked to do anything
            return
        for link, own in zip(self.links, self.torch.param_groups, strict=True):
            if link.rate is None:
                seen = self._carried[link.group]
                for key, value in own.items():
                    before = seen.get(key, seen)
                    if value is not before and key not in MEMBERS and not same_option(value, before):
                        seen[key] = groups[link.group][key] = value
        self.watch.note(self.torch.param_groups)

    def options(self, group: int) -> Group:
        """The base's options for the plain parameters of one of our groups."""
        for link, own in zip(self.links, self.torch.param_groups, strict=True):
            if link.group == group:
                return own
        raise IndexError(f"there is no group {group}")

    @property
    def plain(self) -> list[Tensor]:
        """The parameters of the model that the base trains as they are."""
        return [p for link, own in self.groups if link.rate is None for p in own["params"]]

    @property
    def groups(self) -> list[tuple[Link, Group]]:
        """Each of the base's groups with what it is."""
        return list(zip(self.links, self.torch.param_groups, strict=True))

    @property
    def group_holding(self) -> dict[Tensor, Group]:
        """The base's group of each tensor that it steps."""
        return {held: group for _, group in self.groups for held in group["params"]}

    # -- state ---------------------------------------------------------------------------------------------------

    def state(self, held: Tensor) -> dict[str, Any]:
        """The base's state of one tensor, empty before its first step."""
        found: dict[str, Any] = self.torch.state.get(held, {})
        return found

    def kept(self) -> list[Any]:
        """Its state of all tensors, in one list, to see whether it is the same as before."""
        return [value for state in self.torch.state.values() for value in state.values()]

    def elementwise(self, held: Tensor) -> list[Tensor]:
        """Its state of one tensor, as far as it has a value for each element."""
        return [v for v in self.state(held).values() if isinstance(v, Tensor) and v.shape == held.shape]

    def second_moment(self, held: Tensor) -> Tensor | None:
        """The mean square of the gradients that it keeps of a tensor (Adam, RMSprop); None where it keeps none."""
        state = self.state(held)
        found = (state.get(name) for name in SECOND_MOMENTS)
        return next((value for value in found if isinstance(value, Tensor) and value.shape == held.shape), None)

    def momentum(self, held: Tensor) -> Tensor:
        """The momentum that SGD keeps for a tensor; zeros give the first step that torch takes."""
        state = self.torch.state[held]
        buffer: Tensor | None = state.get("momentum_buffer")
        if buffer is None:
            buffer = state["momentum_buffer"] = torch.zeros_like(held, dtype=self._dtype_of(held))
        return buffer

    def _dtype_of(self, held: Tensor) -> torch.dtype:
        """Of what its state of a tensor is: plain parameters are the model's own, and have their own."""
        return held.dtype if self.state_dtype is None or held in self.group_of else self.state_dtype

    def _narrowed(self, held: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """A state of a tensor as it is kept: torch makes and loads it in the dtype of the tensor."""
        if self.state_dtype is None:
            return state
        dtype = self._dtype_of(held)
        return {k: v.to(dtype) if isinstance(v, Tensor) and v.shape == held.shape else v for k, v in state.items()}

    def forget(self, held: Tensor | None = None) -> None:
        """Start anew, without momentum and counts of steps: of one tensor, or altogether."""
        if held is None:
            self.torch.state.clear()
        else:
            self.torch.state.pop(held, None)

    def first_state(self, held: Tensor, group: Group) -> dict[str, Any]:
        """What the state of a tensor looks like after a first step, on zeros: its keys and shapes are what counts."""
        return self._narrowed(held, trials.first_state(self.torch, held, group))

    def load(self, state: dict[int, dict[str, Any]]) -> None:
        """Put in the state of tensors, by their number in the order of groups."""
        self.torch.load_state_dict({"state": state, "param_groups": self.torch.state_dict()["param_groups"]})
        for held, own in self.torch.state.items():
            own.update(self._narrowed(held, own))

    # -- the step ------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One step of the base, its own hooks included; those that torch calls for every optimizer have been called."""
        own = self.torch
        self.watch.forget()
        if "step" in own.__dict__:  # somebody has put a function of theirs in its place
            with self._guard.opened():
                own.step()
            return
        for hook in self._pre_hooks:
            hook(own, (), {})
        with self._guard.opened():
            trials.bare_step(type(own))(own)
        for hook in list(own._optimizer_step_post_hooks.values()):
            hook(own, (), {})

    def step_plain(self) -> None:
        """Step what the base trains as it is; groups of latents cost time even where they have no gradient."""
        with self._only(lambda link, group: link.rate is None and bool(group["params"])) as any_left:
            if any_left:
                self.step()

    def set_mode(self, mode: str) -> bool:
        """Call the base's ``train()`` or ``eval()``, where schedule-free ones swap weights; False if it has none."""
        function = getattr(self.torch, mode, None)
        if function is None:
            return False
        self.watch.forget()
        function()
        return True

    @contextmanager
    def _only(self, wanted: Callable[[Link, Group], bool]) -> Iterator[bool]:
        groups = self.torch.param_groups
        self.torch.param_groups = [own for link, own in self.groups if wanted(link, own)]
        try:
            yield bool(self.torch.param_groups)
        finally:
            self.torch.param_groups = groups


def _carry(link: Link, own: Group, changed: Group) -> None:
    """Write options of one of our groups into a group of the base's, as they are meant there."""
    own.update(changed)
    if link.rate is not None and "lr" in changed:
        own["lr"] = changed["lr"] * link.rate
    if not link.decayed and "weight_decay" in own:
        own["weight_decay"] = 0.0
