"""The state dict of a SparseOptimizer: everything, keyed by the model's parameters, in torch's own format."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mirrormask.optimizer.base_optimizer import link
from mirrormask.optimizer.rounds import KEPT, Rounds, pack, unpack

if TYPE_CHECKING:
    from mirrormask.optimizer.sparse_optimizer import SparseOptimizer

__all__ = ["read_state", "write_state"]

#: The key in each parameter group under which the schedule's state travels: a JSON text, because tools that move
#: optimizer state around (torch.distributed.checkpoint) keep plain values in groups and drop unknown top-level keys.
GROUP_KEY = "mirrormask"
VERSION = 1


def write_state(optimizer: SparseOptimizer, torch_state_dict: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Torch's state dict of ``optimizer``, with the base optimizer's state under each parameter.

    The state of a latent ``m`` of x appears under x as ``"m.momentum_buffer"``; that of a parameter which the base
    trains itself under its own name.
    """
    own = optimizer.state
    merged: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
    for group in optimizer.param_groups:
        for p in group["params"]:
            entry = dict(own.get(p, {}))
            for prefix, held in _held(optimizer, p):
                entry.update({prefix + key: value for key, value in optimizer.base.state.get(held, {}).items()})
            if entry:
                merged[p] = entry
    optimizer.state = merged
    try:
        result = torch_state_dict()
    finally:
        optimizer.state = own
    for index, group in enumerate(result["param_groups"]):
        group[GROUP_KEY] = json.dumps(_summary(optimizer, index), sort_keys=True)
    return result


def read_state(optimizer: SparseOptimizer, state_dict: dict[str, Any]) -> None:
    """Put what :func:`write_state` gave back into ``optimizer``; nothing changes unless all of it fits."""
    groups = state_dict["param_groups"]
    if not groups or GROUP_KEY not in groups[0]:
        raise ValueError(
            "this state dict was not saved by a SparseOptimizer; load it before mm.sparsify wraps the base"
        )
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(
            f"the state dict has {len(groups)} parameter groups, this optimizer {len(optimizer.param_groups)}"
        )
    saved = [json.loads(group[GROUP_KEY]) for group in groups]
    _check_same(saved[0], _summary(optimizer, 0))
    params = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [index for group in groups for index in group["params"]]
    if len(params) != len(indices):
        raise ValueError(f"the state dict holds {len(indices)} parameters, this optimizer {len(params)}")
    entries = {p: state_dict["state"].get(index, {}) for p, index in zip(params, indices, strict=True)}
    _check_shapes(optimizer, entries)

    for group, new in zip(optimizer.param_groups, groups, strict=True):
        group.update({key: value for key, value in new.items() if key not in ("params", GROUP_KEY)})
    _read_tensors(optimizer, entries)
    first = saved[0]
    optimizer.step_count = first["step"]
    optimizer.skipped_steps = first["skipped_steps"]
    optimizer.finalized = first["finalized"]
    optimizer.decay_state = dict(first["decay_state"])
    optimizer.decay_integrals = [summary["decay_integral"] for summary in saved]
    if optimizer.rounds is not None:
        rounds = first["rounds"]
        optimizer.rounds = Rounds()
        optimizer.rounds.rates = unpack(rounds["rates"])
        optimizer.rounds.integrals = list(rounds["integrals"])
        optimizer.rounds.decay_state = dict(rounds["decay_state"])


def _summary(optimizer: SparseOptimizer, index: int) -> dict[str, Any]:
    """What a group carries beside torch's options; the first one carries what belongs to all."""
    own: dict[str, Any] = {"version": VERSION, "decay_integral": optimizer.decay_integrals[index]}
    if index:
        return own
    rounds = optimizer.rounds
    if rounds is not None:
        own["rounds"] = {
            "rates": pack(rounds.rates),
            "integrals": rounds.integrals,
            "decay_state": rounds.decay_state,
        }
    return {
        **own,
        "method": repr(optimizer.method),
        "base": type(optimizer.base).__name__,
        "steps": optimizer.steps,
        "weights": {name: list(x.shape) for name, x in optimizer.weights.items()},
        "step": optimizer.step_count,
        "skipped_steps": optimizer.skipped_steps,
        "finalized": optimizer.finalized,
        "decay_state": optimizer.decay_state,
    }


def _check_same(saved: dict[str, Any], own: dict[str, Any]) -> None:
    for key, what in (("version", "format"), ("method", "method"), ("base", "base optimizer"), ("steps", "steps")):
        if saved[key] != own[key]:
            raise ValueError(f"the state dict was saved with {what} {saved[key]}, this optimizer has {own[key]}")
    for name in {**saved["weights"], **own["weights"]}:
        before, now = saved["weights"].get(name), own["weights"].get(name)
        if before != now:
            raise ValueError(
                f"the state dict is of another model: {name!r} was {before or 'not sparsified'} there "
                f"and is {now or 'not sparsified'} here"
            )


def _check_shapes(optimizer: SparseOptimizer, entries: dict[Tensor, dict[str, Any]]) -> None:
    for name, x in optimizer.weights.items():
        own_names = optimizer.latents_of(x)
        for key in (*own_names, "rate", "negative_start"):
            if key not in entries[x]:
                raise ValueError(f"the state dict has no {key!r} for {name!r}: it is not whole")
        for key in own_names:
            shape, own = tuple(entries[x][key].shape), tuple(optimizer.state[x][key].shape)
            if shape != own:
                raise ValueError(f"{key!r} of {name!r} has shape {shape} in the state dict and {own} here")


def _read_tensors(optimizer: SparseOptimizer, entries: dict[Tensor, dict[str, Any]]) -> None:
    geometry = optimizer.method.geometry
    own_keys = {*geometry.latents, *geometry.constants, "rate", "negative_start", "mask", "score"}
    for p, entry in entries.items():
        kept = {key: value for key, value in entry.items() if key.startswith(KEPT)}
        if kept:
            optimizer.state[p].update({key: value.to(p.device, copy=True) for key, value in kept.items()})
        if optimizer.is_sparsified(p):
            state = optimizer.state[p]
            for key in optimizer.latents_of(p):
                state[key].copy_(entry[key])
            state["rate"] = float(entry["rate"])
            for key in ("negative_start", "mask"):
                state.pop(key, None)
                if key in entry:
                    state[key] = entry[key].to(device=p.device, dtype=torch.bool, copy=True)
            state.pop("score", None)
            if "score" in entry:
                state["score"] = entry["score"].to(device=p.device, copy=True)
    link(optimizer)  # the rates of the saved run, not of this model's fresh weights
    held_now = [held for group in optimizer.base.param_groups for held in group["params"]]
    position = {id(held): index for index, held in enumerate(held_now)}
    base_state: dict[int, dict[str, Any]] = {}
    for p, entry in entries.items():
        own = own_keys if optimizer.is_sparsified(p) else set()
        foreign = {key: value for key, value in entry.items() if key not in own and not key.startswith(KEPT)}
        for prefix, held in _held(optimizer, p):
            inner = {key[len(prefix) :]: value for key, value in foreign.items() if key.startswith(prefix)}
            if inner:
                base_state[position[id(held)]] = inner
    groups = optimizer.base.state_dict()["param_groups"]
    optimizer.base.load_state_dict({"state": base_state, "param_groups": groups})


def _held(optimizer: SparseOptimizer, p: Tensor) -> list[tuple[str, Tensor]]:
    """What the base optimizer holds for the model's parameter ``p``: its latents, each with a prefix, or itself."""
    names = optimizer.method.geometry.latents if optimizer.is_sparsified(p) else ()
    return [(f"{name}.", optimizer.state[p][name]) for name in names] or [("", p)]
