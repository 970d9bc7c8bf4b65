"""What the selection of weights says: warnings of what is left out, and errors with their remedies."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Sequence

from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mirrormask.matrices import FLOATS, Candidate, made_from

__all__ = ["matches", "of_no_match", "of_nothing", "on_default", "on_frozen", "on_ties", "problem"]

#: How many tensors, or groups of them, a message names, the largest first.
NAMED = 5


def matches(candidate: Candidate, pattern: str) -> bool:
    """Whether one of a parameter's names fits a glob pattern."""
    return any(fnmatch.fnmatchcase(name, pattern) for name in candidate.names)


def problem(candidate: Candidate) -> str:
    """Why this tensor cannot be sparsified at all, with the remedy; empty if it can."""
    name, parameter = _title(candidate), candidate.parameter
    if is_lazy(parameter):
        return f"{name} has no shape yet: its layer is lazy; run one batch through the model first"
    if parameter.dtype.is_complex:
        return (
            f"{name} is complex ({parameter.dtype}): its real and imaginary part would have to become zero together, "
            "which no method here does; store the two as real parameters of their own (torch.view_as_real in the "
            "constructor, torch.view_as_complex in forward), or leave it out with weights="
        )
    if parameter.dtype not in FLOATS:
        return f"{name} has dtype {parameter.dtype}; choose floating-point parameters of 16 bits or more with weights="
    if is_traceable_wrapper_subclass(parameter) and not any(k.__name__ == "DTensor" for k in type(parameter).__mro__):
        return (
            f"{name} is a {type(parameter).__name__}, which is made of other tensors, and what it would be with zeros "
            "is for that class to say; sparsify the model first, or leave it out with weights="
        )
    if parameter.is_meta:
        return (
            f"{name} is on the meta device and has no values; materialise the model first "
            "(model.to_empty(device='cpu'), then load or initialise the weights)"
        )
    return ""


def _title(candidate: Candidate) -> str:
    """A parameter's name for a message, with those it is tied to."""
    ties = candidate.names[1:4] + (("...",) if len(candidate.names) > 4 else ())
    return candidate.name + (f" (tied to {', '.join(ties)})" if ties else "")


def of_no_match(model: nn.Module, listed: list[Candidate], pattern: str) -> str:
    """What to say of a pattern that matches no parameter: perhaps a buffer, or a tensor that is made of parameters."""
    buffers = [name for name, _ in model.named_buffers(remove_duplicate=False) if fnmatch.fnmatchcase(name, pattern)]
    made = [(name, parts) for name, parts in made_from(model).items() if fnmatch.fnmatchcase(name, pattern)]
    if made:
        name, parts = made[0]
        instead = [c for c in listed if c.name in parts and not c.is_scale]
        barred = next((c.barred for c in instead if c.barred), "")
        remedy = barred or f"choose {' or '.join(repr(c.name) for c in instead)} instead"
        return (
            f"the pattern {pattern!r} matches {name}, which is no parameter but made from {', '.join(parts)} in every "
            f"forward pass; {remedy}"
        )
    if buffers:
        return (
            f"the pattern {pattern!r} matches no parameter of the model, only {', '.join(buffers[:3])}"
            f"{', ...' if len(buffers) > 3 else ''}, a buffer, which no optimizer trains; make it an nn.Parameter "
            "if it shall become sparse"
        )
    known = ", ".join(_title(c) for c in listed[:12]) + (", ..." if len(listed) > 12 else "")
    return f"the pattern {pattern!r} matches no parameter of the model; it has: {known}"


def of_nothing(listed: list[Candidate]) -> str:
    """What to do where the default finds nothing."""
    frozen = [c for c in listed if c.is_default]
    if frozen:
        return f"{_title(frozen[0])} and what else would be are frozen; call requires_grad_(True) on them"
    reasons = [f"{_title(c)} is not chosen: {c.barred}" for c in listed if c.is_matrix and c.barred]
    missing = _groups(_left_out(listed, []), listed)[:NAMED]
    remedy = "pass weights= with patterns or a predicate to choose other parameters"
    if missing:
        remedy += f", such as weights={[pattern for pattern, _ in missing]!r}"
    return "; ".join([*reasons[:NAMED], remedy])


def _counted(listed: list[Candidate]) -> list[Candidate]:
    """What the default is measured by: the trainable parameters of two or more dimensions, embeddings aside."""
    return [
        c
        for c in listed
        if c.parameter.requires_grad and c.numel and c.parameter.dim() >= 2 and not c.is_embedding and not c.is_scale
    ]


def _left_out(listed: list[Candidate], chosen: list[Candidate]) -> list[Candidate]:
    """What of it a user could choose beside ``chosen``, the largest first."""
    names = {c.name for c in chosen}
    rest = [c for c in _counted(listed) if c.name not in names and not c.barred and c.parameter.dtype.is_floating_point]
    return sorted(rest, key=lambda c: -c.numel)


def _groups(wanted: list[Candidate], listed: list[Candidate], also: Sequence[Candidate] = ()) -> list[tuple[str, int]]:
    """Patterns for ``wanted`` and the elements of each, the largest first; none matches anything but it and ``also``.

    Names that differ in numbers only (the layers of a stack) go under one pattern where no other parameter fits it.
    """
    alike: dict[str, list[Candidate]] = {}
    for candidate in wanted:
        parts = [_escape(part) for part in candidate.name.split(".")]
        alike.setdefault(".".join("*" if part.isdecimal() else part for part in parts), []).append(candidate)
    sizes: list[tuple[str, int]] = []
    for pattern, members in alike.items():
        allowed = {c.name for c in (*members, *also)}
        if len(members) > 1 and not any(c.name not in allowed and matches(c, pattern) for c in listed):
            sizes.append((pattern, sum(c.numel for c in members)))
        else:
            sizes += [(_escape(c.name), c.numel) for c in members]
    return sorted(sizes, key=lambda group: -group[1])


def _escape(part: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", part)


def on_default(model: nn.Module, listed: list[Candidate], chosen: list[Candidate]) -> list[str]:
    """What the user should know of the default's choice; see :func:`~mirrormask.selection.select_weights`."""
    notes = []
    counted, taken = sum(c.numel for c in _counted(listed)), sum(c.numel for c in chosen)
    if 2 * taken < counted:
        note = (
            f"by default {taken:,} of the {counted:,} elements ({100 * taken / counted:.1f}%) of the trainable "
            f"parameters of {type(model).__name__} with two or more dimensions become sparse (embeddings aside)"
        )
        left = _left_out(listed, chosen)
        missing = _groups(left, listed, chosen)[:NAMED]
        if missing:
            named = [c for c in left if any(matches(c, pattern) for pattern, _ in missing)]
            patterns = [pattern for pattern, _ in _groups(chosen, listed, named)] + [pattern for pattern, _ in missing]
            largest = ", ".join(f"{pattern} ({numel:,})" for pattern, numel in missing)
            note += f"; the largest left out: {largest}; to take them in, pass weights={patterns!r}"
        notes.append(note)
    barred = [c for c in _counted(listed) if c.is_matrix and c.barred]
    if barred:
        reasons = "; ".join(f"{_title(c)}: {c.barred}" for c in sorted(barred, key=lambda c: -c.numel)[:NAMED])
        more = f"; and {len(barred) - NAMED} more" if len(barred) > NAMED else ""
        notes.append(f"by default these matrices stay dense: {reasons}{more}")
    normed = [c.name for c in chosen if c.is_normed]
    if normed:
        notes.append(
            f"weight norm divides each row of {', '.join(normed[:NAMED])}{', ...' if len(normed) > NAMED else ''} by "
            "its norm, so a row that loses its last element turns the output into nan, as rows do at high sparsity; "
            "take weight norm away first (torch.nn.utils.parametrize.remove_parametrizations(module, 'weight'), or "
            "torch.nn.utils.remove_weight_norm(module))"
        )
    return notes


def on_frozen(listed: list[Candidate], chosen: Collection[str]) -> str:
    """What to say where more of a model's layers is frozen than becomes sparse; empty otherwise.

    A backbone that is frozen for its first epochs, or for good under adapters, is what its owner wanted sparse.
    """
    frozen = [c for c in listed if c.is_default and not c.parameter.requires_grad]
    left, taken = sum(c.numel for c in frozen), sum(c.numel for c in listed if c.name in chosen)
    if left <= taken:
        return ""
    largest = ", ".join(f"{pattern} ({numel:,})" for pattern, numel in _groups(frozen, listed)[:NAMED])
    return (
        f"{taken:,} weights become sparse, and {left:,} of frozen layers stay as they are, now and after they are "
        f"unfrozen: {largest}; call requires_grad_(True) on these before mm.sparsify, and give them to the optimizer "
        f"(at lr=0 while they shall rest), or say with weights= which are meant"
    )


def on_ties(listed: list[Candidate], patterns: Sequence[str]) -> list[str]:
    """A note for each pattern that chooses tensors by a later name only: whoever wrote it may not know of the first."""
    notes = []
    for pattern in patterns:
        matched = [c for c in listed if matches(c, pattern)]
        if not any(fnmatch.fnmatchcase(c.name, pattern) for c in matched):
            tied = ", ".join(_title(c) for c in matched[:NAMED])
            notes.append(f"the pattern {pattern!r} chooses {tied}: one tensor, whose zeros are zeros under each name")
    return notes
