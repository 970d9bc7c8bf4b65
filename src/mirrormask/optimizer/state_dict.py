"""The state dict of a SparseOptimizer: everything, keyed by the model's parameters, in torch's own format.

All keys are there from construction on, as tools need that read a checkpoint into the state dict of a fresh optimizer
(torch.distributed.checkpoint): a mask that keeps all, the base optimizer's state as it will look after its first step.
What such a value does not mean yet, the summary says: ``masked``, ``fresh``, the ``integrals`` of rounds.
"""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mirrormask.checks import callers_level
from mirrormask.methods import Method
from mirrormask.methods.description import describe, differences, parse_repr
from mirrormask.optimizer.base_groups import Group, plain_options
from mirrormask.optimizer.base_optimizer import BaseOptimizer
from mirrormask.optimizer.diagnostics import pack_signs, unpack_signs
from mirrormask.optimizer.edits import Edits
from mirrormask.optimizer.rounds import Rounds, everything, pack, unpack
from mirrormask.optimizer.saved_numbers import not_numbers, refuse_not_numbers
from mirrormask.optimizer.saved_state import GROUP_KEY, VERSION, Entry, SavedState, summaries_of
from mirrormask.optimizer.training import Training
from mirrormask.optimizer.weights import KEPT, SparseWeights, bare_names
from mirrormask.progress import Clock

__all__ = ["StateDict"]

#: What a parameter has for which the base optimizer keeps nothing: those tools miss a parameter without an entry.
STATELESS = "stateless"
#: For who looks into a file that another optimizer has refused.
ABOUT = "the state of a mirrormask SparseOptimizer: load it into what mm.sparsify or a SparsityCallback has made"
#: The prefix of what wrappers around a SparseOptimizer keep in its state of a parameter.
FOREIGN = "foreign."


@dataclass(frozen=True)
class StateDict:
    """Writes and reads the state of these.

    Args:
        method: of the training.
        weights: the sparsifiable weights.
        base: the base optimizer.
        training: how far it has come.
        edits: what others have written into the weights.
    """

    method: Method
    weights: SparseWeights
    base: BaseOptimizer
    training: Training
    edits: Edits

    # -- writing -------------------------------------------------------------------------------------------------

    def write(self, groups: Sequence[Group]) -> tuple[dict[Tensor, Entry], list[Group]]:
        """State and parameter groups for torch to pack; the state of a latent m of x is under x, as ``"m.exp_avg"``."""
        self.base.check_untouched()
        self.weights.check_kept()
        self.base.check_members(groups)
        self.base.sync(groups)  # a scheduler may have stepped since
        state: defaultdict[Tensor, Entry] = defaultdict(dict)
        fresh: list[list[list[Any]]] = [[] for _ in groups]
        options = self.base.group_holding
        starts, adopted = self._starts(), self.edits.adopted(self.training.clock)
        for index, group in enumerate(groups):
            for position, whole in enumerate(group["params"]):
                p = self.weights.shards.local(whole)
                entry = {**self._own_entry(p), **adopted.get(p, {}), **starts.get(p, {})}
                entry = {key: self._wrapped(p, key, value) for key, value in entry.items()}
                for prefix, held in self._held(p):
                    inner = self.base.state(held)
                    if all(value is None for value in inner.values()):  # SGD notes that it has no momentum
                        fresh[index].append([position, prefix])
                        inner = self.base.first_state(held, options[held]) if p.requires_grad else {}
                    entry.update({prefix + key: self._wrapped(p, prefix, value) for key, value in inner.items()})
                entry.update({FOREIGN + key: value for key, value in self.weights.foreign(p).items()})
                state[whole] = entry or {STATELESS: True}
        written = [
            {**group, GROUP_KEY: json.dumps(self._summary(index, group, fresh[index]), sort_keys=True)}
            for index, group in enumerate(groups)
        ]
        return state, written

    def _wrapped(self, p: Tensor, key: str, value: Any) -> Any:
        """What lies as p does as a DTensor, if the parameter is one; of latents, those that are a tensor of numbers."""
        geometry = self.weights.geometry
        shared = (*geometry.shared, *(() if geometry.aims else geometry.constants))
        return value if key.rstrip(".") in shared else self.weights.shards.wrap(p, value)

    def _own_entry(self, p: Tensor) -> Entry:
        """What is ours of a parameter."""
        if not self.weights.holds(p):
            return {}
        kept = self.weights.state(p)
        mask = kept.get("mask")
        own = self.weights.own_keys() - {"signs", "mask"}
        entry = {key: value for key, value in kept.items() if key in own}
        entry["negative_start"] = unpack_signs(kept["signs"], p.shape)
        entry["mask"] = torch.ones_like(p, dtype=torch.bool) if mask is None else mask
        return entry

    def _starts(self) -> dict[Tensor, Entry]:
        """The weights that later rounds go back to; as they are now, where they are not kept yet."""
        rounds, result = self.training.rounds, defaultdict[Tensor, Entry](dict)
        if rounds is not None and self.method.mask.keep_at(self.training.steps) is not None:
            for p, name, held in everything(self.weights, self.base):
                key = KEPT + name
                kept = self.weights.state(p).get(key)
                result[p][key] = held.detach().clone() if kept is None else kept
        return result

    def _summary(self, index: int, group: Group, fresh: list[list[Any]]) -> Entry:
        """What a group carries beside torch's options; the first one carries what belongs to all."""
        training, decay = self.training, self.training.decay
        own: Entry = {
            "version": VERSION,
            "decay_integral": decay.integrals[index],
            "decay_increment": decay.increments[index],
            "inner": [plain_options(own) for link, own in self.base.groups if link.group == index],
            "fresh": fresh,
            "names": self._names(group["params"]),
        }
        if index:
            return own
        if training.rounds is not None:
            own["rounds"] = {
                "rates": pack(training.rounds.rates),
                "integrals": training.rounds.integrals,
                "decay_state": _pairs(training.rounds.decay_state),
            }
        return {
            **own,
            "about": ABOUT,
            "method": describe(self.method),
            "base": type(self.base.torch).__name__,
            "steps": training.steps,
            "weights": {name: list(self.weights.shards.shape(x)) for name, x in self.weights.items()},
            "step": training.step,
            "skipped_steps": training.settle_count(),
            "finalized": training.finalized,
            "decay_state": _pairs(decay.state),
            "masked": self.weights.masked,
            **({} if self.base.state_dtype is None else {"state_dtype": str(self.base.state_dtype)}),
        }

    def _names(self, params: Sequence[Tensor]) -> list[str | None]:
        """Which of a group's parameters are which of the weights: their order is all that torch keeps."""
        names: dict[Tensor, str] = {x: name for name, x in self.weights.items()}
        return [names.get(self.weights.shards.local(p)) for p in params]

    # -- reading -------------------------------------------------------------------------------------------------

    def read(self, state_dict: dict[str, Any], groups: Sequence[Group]) -> None:
        """Put what :meth:`write` gave back; nothing changes unless all of it fits.

        Raises:
            ValueError: it is of something else, or not whole.
        """
        summaries = summaries_of(state_dict, groups)
        self._check_same(summaries[0])
        here, there = bare_names(self.weights), bare_names(summaries[0]["weights"])
        for index, (group, summary) in enumerate(zip(groups, summaries, strict=True)):
            names = self._names(group["params"])
            before = summary.get("names")  # version 1 had none
            if before is not None and [n and there.get(n) for n in before] != [n and here[n] for n in names]:
                raise ValueError(
                    f"group {index} of the state dict has its weights in another order: {before} there, "
                    f"{names} here; build the optimizer over the parameters in the order of then"
                )
        saved = SavedState.open(state_dict, groups, summaries, self.weights.shards)
        self._check_whole(saved)
        self._check_numbers(saved, state_dict["param_groups"])
        for group, new in zip(groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in new.items() if key not in ("params", GROUP_KEY)})
        for x in self.weights.values():
            self._read_weight(x, saved.entries[x], masked=saved.masked)
        self._read_training(saved)
        for p, entry in saved.entries.items():
            others = {key[len(FOREIGN) :]: _own(v, p) for key, v in entry.items() if key.startswith(FOREIGN)}
            self.weights.put_foreign(p, others)
            for key in [key for key in self.weights.state(p) if key.startswith(KEPT)]:
                del self.weights.state(p)[key]
            if self.training.rounds is not None and self.training.rounds.integrals:
                kept = {key: value for key, value in entry.items() if key.startswith(KEPT)}
                self.weights.state(p).update({key: v.to(p.device, copy=True) for key, v in kept.items()})
        self.base.link(groups, self.weights)  # at the rates of the saved run, not of this model's fresh weights
        self._read_base(saved)

    def _check_same(self, saved: Entry) -> None:
        method = parse_repr(saved["method"]) if isinstance(saved["method"], str) else saved["method"]
        found = differences(method, self.method)
        if found:
            raise ValueError(f"the state dict was saved with another method: {'; '.join(found)}")
        own = {"base": type(self.base.torch).__name__, "steps": self.training.steps}
        for key, what in (("base", "base optimizer"), ("steps", "steps")):
            if saved[key] != own[key]:
                raise ValueError(f"the state dict was saved with {what} {saved[key]}, this optimizer has {own[key]}")
        here, there = bare_names(self.weights), bare_names(saved["weights"])
        shapes = {here[name]: list(self.weights.shards.shape(x)) for name, x in self.weights.items()}
        saved_shapes = {there[name]: shape for name, shape in saved["weights"].items()}
        for name in {**saved_shapes, **shapes}:
            before, now = saved_shapes.get(name), shapes.get(name)
            if before != now:
                raise ValueError(
                    f"the state dict is of another model: {name!r} was {before or 'not sparsified'} there "
                    f"and is {now or 'not sparsified'} here"
                )

    def _check_whole(self, saved: SavedState) -> None:
        """Refuse a state from which something was lost on its way."""
        needed = ["rate", "negative_start"]
        if saved.masked or self._must_be_masked(saved.first):
            needed.append("mask")
        for name, x in self.weights.items():
            own, entry = self.weights.latents_of(x), saved.entries[x]
            for key in (*own, *needed):
                if key not in entry:
                    raise ValueError(f"the state dict has no {key!r} for {name!r}: it is not whole")
                if key != "rate" and not _has_numbers(entry[key]):
                    raise ValueError(f"{key!r} of {name!r} is no tensor of numbers in the state dict: it is not whole")
            for key, latent in own.items():
                shape, here = tuple(entry[key].shape), tuple(latent.shape)
                if shape != here:
                    raise ValueError(f"{key!r} of {name!r} has shape {shape} in the state dict and {here} here")
        options = self.base.group_holding
        for p, entry in saved.entries.items():
            for prefix, held in self._held(p):
                if saved.is_fresh(p, prefix):
                    continue
                inner, own_state = self._base_entry(p, prefix, entry), self.base.first_state(held, options[held])
                # SGD without momentum needs none; version 1 did not say what was fresh.
                if own_state and not inner and saved.first["version"] > 1:
                    raise ValueError(
                        f"the state dict has no state of the base optimizer for a parameter of shape {tuple(p.shape)}: "
                        "it is not whole"
                    )
                for key, value in own_state.items():
                    there = inner.get(key)
                    is_of_elements = isinstance(value, Tensor) and value.dim() and value.shape == held.shape
                    if inner and is_of_elements and not _has_numbers(there):
                        raise ValueError(
                            f"{prefix + key!r} of a parameter of shape {tuple(p.shape)} is no tensor of numbers in the "
                            "state dict: it is not whole"
                        )
                    if isinstance(value, Tensor) and isinstance(there, Tensor) and value.shape != there.shape:
                        raise ValueError(
                            f"{prefix + key!r} of a parameter of shape {tuple(p.shape)} has shape {tuple(there.shape)} "
                            f"in the state dict and {tuple(value.shape)} here"
                        )

    def _check_numbers(self, saved: SavedState, groups: Sequence[Group]) -> None:
        """Refuse a state of a training that has diverged."""
        names: dict[Tensor, str] = {x: repr(name) for name, x in self.weights.items()}
        found = not_numbers(
            (names.get(p, f"a parameter of shape {tuple(p.shape)}"), p.shape, entry)
            for p, entry in saved.entries.items()
        )
        everywhere = self.weights.shards.all(not found)
        refuse_not_numbers(found, groups)
        if not everywhere:
            raise ValueError("another process was given the state of a training that has diverged, and says where")

    def _must_be_masked(self, saved: Entry) -> bool:
        """Whether a training that has come this far has masks, whatever the state dict says."""
        if saved["finalized"]:
            return self.method.sparsity > 0
        clocks = (Clock(step, saved["steps"]) for step in range(saved["step"] + 1))
        return not self.weights.geometry.sparsifies and any(
            self.method.mask.sparsity_at(clock) is not None for clock in clocks
        )

    def _read_weight(self, x: Tensor, entry: Entry, *, masked: bool) -> None:
        state = self.weights.state(x)
        for key, latent in self.weights.latents_of(x).items():
            latent.copy_(entry[key])
        state["rate"] = float(entry["rate"])
        state["signs"] = pack_signs(-entry["negative_start"].to(device=x.device, dtype=torch.float32))
        for key in ("mask", "score"):
            state.pop(key, None)
        if masked:
            state["mask"] = entry["mask"].to(device=x.device, dtype=torch.bool, copy=True)
        if "score" in entry:
            state["score"] = entry["score"].to(device=x.device, copy=True)

    def _read_training(self, saved: SavedState) -> None:
        training, first = self.training, saved.first
        training.step, training.finalized = first["step"], first["finalized"]
        training.skipped, training.skipped_in_a_row, training.on_device = first["skipped_steps"], 0, None
        training.decay.state = dict(first["decay_state"])
        training.decay.integrals = [summary["decay_integral"] for summary in saved.summaries]
        training.decay.increments = [summary.get("decay_increment", 0.0) for summary in saved.summaries]
        if training.rounds is not None:
            rounds = first["rounds"]
            training.rounds = Rounds(unpack(rounds["rates"]), list(rounds["integrals"]), dict(rounds["decay_state"]))

    def _read_base(self, saved: SavedState) -> None:
        position = {held: index for index, held in enumerate(h for _, g in self.base.groups for h in g["params"])}
        state: dict[int, Entry] = {}
        for p, entry in saved.entries.items():
            for prefix, held in self._held(p):
                inner = self._base_entry(p, prefix, entry)
                if inner and not saved.is_fresh(p, prefix):
                    state[position[held]] = {key: _own(value, held) for key, value in inner.items()}
        self.base.load(state)
        for index, summary in enumerate(saved.summaries):
            own = [group for link, group in self.base.groups if link.group == index]
            for group, options in zip(own, summary.get("inner", []), strict=False):
                now = plain_options(group)
                for key, value in options.items():
                    if key not in now or now[key] != value:
                        group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
        self.base.watch.note(self.base.torch.param_groups)
        before, dtype = saved.first.get("state_dtype"), self.base.state_dtype
        if state and before != (dtype and str(dtype)):
            warnings.warn(
                f"momenta were saved with state_dtype={before} and are kept with state_dtype={dtype} from here on: "
                "this training is not the one that was saved, to the last bit",
                stacklevel=callers_level(),
            )

    def _base_entry(self, p: Tensor, prefix: str, entry: Entry) -> Entry:
        """What a parameter's entry has of the base optimizer, for the latent of that prefix or for itself."""
        geometry = self.weights.geometry
        own = {*geometry.latents, *geometry.constants, "rate", "negative_start", "mask", "score"}
        if not self.weights.holds(p):
            own = {STATELESS}
        theirs = {key: v for key, v in entry.items() if key not in own and not key.startswith((KEPT, FOREIGN))}
        return {key[len(prefix) :]: value for key, value in theirs.items() if key.startswith(prefix)}

    def _held(self, p: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What the base optimizer holds for the model's parameter: its latents, each with a prefix, or itself."""
        for name, held in self.weights.trained(p):
            yield f"{name}." if name else "", held


def _has_numbers(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_meta


def _own(value: Any, held: Tensor) -> Any:
    """A copy, laid out in memory as what it belongs to: torch would keep the very tensor that it is given."""
    if not isinstance(value, Tensor):
        return value
    if value.shape != held.shape:
        return value.clone()
    return torch.empty_like(held, dtype=value.dtype, device=value.device).copy_(value)


def _pairs(memory: Mapping[str, float]) -> list[list[Any]]:
    """A decay's memory as a list: of a dict, torch's distributed checkpoints read the keys that a fresh one has."""
    return [[key, value] for key, value in memory.items()]
