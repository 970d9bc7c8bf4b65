"""Weights that lie in memory of which another parameter is made too: two masks on one number undo each other."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

__all__ = ["check_memory", "is_expanded", "sharing"]


def check_memory(
    model: nn.Module, chosen: Mapping[str, Tensor], held: Iterable[Tensor] = (), error: type[Exception] = ValueError
) -> None:
    """Refuse a weight of which some memory is another parameter's, as ``nn.Parameter(other.weight.t())`` makes it.

    Under a torch optimizer both write there, and it trains. Latents are of one of the two, and so are masks. A weight
    that is expanded has one number in many places, and cannot be written element by element at all.

    Args:
        model: the network.
        chosen: the weights to sparsify, by name.
        held: what an optimizer holds, which may be parameters of others.
        error: what is raised.

    Raises:
        ValueError: it names both; or ``error``.
    """
    for name, p in chosen.items():
        if is_expanded(_shard_of(p)):
            raise error(
                f"{name!r} is expanded: one number in memory is many of its elements, which a mask cannot tell apart; "
                "make it a tensor of its own with .clone()"
            )
    own_parameters = dict(model.named_parameters())
    names = {id(p): name for name, p in own_parameters.items()}
    own = {id(p) for p in chosen.values()}
    for pair in sharing([*own_parameters.values(), *held], own):
        one, other = (repr(names.get(id(p), "a parameter of another model")) for p in pair)
        raise error(
            f"{one} and {other} are two parameters in one memory, which two masks would undo in each other; "
            "make them one parameter (b.weight = a.weight; transpose it in forward), clone one of them, or "
            "leave both out with weights="
        )


def sharing(parameters: Iterable[Tensor], own: Container[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of parameters that have bytes of one memory in common: where there are any, one at least.

    Args:
        parameters: any; the same one twice is no pair.
        own: the ``id`` of those of which at least one is in a pair.

    Example:
        >>> a, b = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> b.weight.data = a.weight.data
        >>> [p is a.weight or p is b.weight for pair in sharing([a.weight, b.weight], [id(a.weight)]) for p in pair]
        [True, True]
    """
    found = sorted(_spans({id(p): p for p in parameters}.values()), key=lambda span: span[:3])
    reach: tuple[str, int, int, Tensor] | None = None  # of those so far on this device, the one that ends last
    for span in found:
        if reach is not None and reach[0] == span[0] and span[1] < reach[2]:
            one, other = reach[3], span[3]
            known = id(one) in own or id(other) in own
            if known and _share(_shard_of(one.detach()), _shard_of(other.detach())):
                yield one, other
        if reach is None or reach[0] != span[0] or span[2] > reach[2]:
            reach = span


def _shard_of(p: Tensor) -> Tensor:
    """Of a DTensor what this process holds."""
    own: Tensor = getattr(p, "_local_tensor", p)
    return own


def is_expanded(tensor: Tensor) -> bool:
    """Whether a dimension repeats what is in memory once."""
    strided = tensor.layout == torch.strided
    return strided and any(n > 1 and not step for n, step in zip(tensor.shape, tensor.stride(), strict=True))


def _spans(parameters: Iterable[Tensor]) -> list[tuple[str, int, int, Tensor]]:
    """Device, first and last byte of those whose memory can be looked at, and the parameter."""
    found = []
    named: dict[torch.device, str] = {}
    for p in parameters:
        own = _shard_of(p)
        plain = own.layout == torch.strided and not isinstance(own, torch._subclasses.FakeTensor)
        if not plain or own.is_meta or not own.numel():
            continue
        try:
            start = own.data_ptr()
        except RuntimeError:  # of a subclass that is made of other tensors
            continue
        device = named.get(own.device) or named.setdefault(own.device, str(own.device))
        found.append((device, start, start + _reach(own) * own.element_size(), p))
    return found


def _reach(tensor: Tensor) -> int:
    """How many elements lie from its first to its last, those that are not its own included."""
    if tensor.is_contiguous():
        return tensor.numel()
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _share(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors whose spans cross have bytes in common: columns of one matrix cross and have none."""
    if a.element_size() != b.element_size() or a.is_contiguous() or b.is_contiguous():
        return True
    start = min(a.data_ptr(), b.data_ptr())
    places = [(t.data_ptr() - start) // t.element_size() for t in (a, b)]
    room = max(place + _reach(t) for place, t in zip(places, (a, b), strict=True))
    marks = torch.zeros(room, dtype=torch.bool, device="cpu")
    marks.as_strided(a.shape, a.stride(), places[0]).fill_(True)
    return bool(marks.as_strided(b.shape, b.stride(), places[1]).any())
