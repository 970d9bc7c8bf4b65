"""What others write into the weights between two steps: noticed, and taken over by the latents.

Whoever writes into a parameter in place moves its version, which costs nothing to look at. Whoever writes through
``p.data`` does not; for that, a sample of the bytes of weights in CPU memory is kept from one step to the next, and
before the training ends or is saved every element is compared with what its latents say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mirrormask.geometry import Geometry
from mirrormask.optimizer.shards import Versions
from mirrormask.optimizer.weights import SparseWeights
from mirrormask.progress import Clock

__all__ = ["Edits", "Sample"]

#: Where tensors lie in CPU memory, and how: addresses (None for one that cannot be looked at), shapes, strides. Lists
#: of plain values: of a tuple for each of 10^5 tensors Python's collector would look at every one.
Places = tuple[list[int | None], list[torch.Size], list[tuple[int, ...]]]


class Edits:
    """Notices what is not the training's own.

    Args:
        weights: that are watched.
    """

    def __init__(self, weights: SparseWeights) -> None:
        self._weights = weights
        self._seen: Versions = ([], [])
        self._sample = Sample()

    def note(self) -> None:
        """The weights are what their latents and masks say: whatever writes into one from now on is noticed."""
        self._seen = self._versions()
        self._sample.take(list(self._weights.values()))

    def adopt(self, clock: Clock, *, everywhere: bool = False) -> None:
        """Where somebody else has written into a weight since :meth:`note`, let its latents follow, under its mask.

        Training goes on from what the model holds, as under any torch optimizer: a checkpoint or an average that was
        loaded, a weight that is clipped after every step. A step writes only weights that have a gradient, so what the
        mask removes becomes zero here.

        Args:
            clock: when.
            everywhere: look at every element of all weights, not only where there are signs of a writer.
        """
        weights = self._weights
        written = list(weights.values()) if everywhere else self._written()
        geometry = weights.geometry.at(clock)
        for x in written if geometry.latents else ():
            changed = self._changed(x, geometry)
            if changed is not None:
                geometry.adopt(x.detach(), weights.latents_of(x), changed)
        weights.hold_zeros((x, x) for x in written)

    def adopted(self, clock: Clock) -> dict[Tensor, dict[str, Tensor]]:
        """What :meth:`adopt` would make of latents: copies, of the weights where it would make something else.

        A state that is saved goes with the weights that are saved; to save changes nothing of the training.
        """
        weights, result = self._weights, dict[Tensor, dict[str, Tensor]]()
        geometry = weights.geometry.at(clock)
        for x in weights.values() if geometry.latents else ():
            latents = weights.latents_of(x)
            if any(latent.device != x.device or latent.shape != x.shape for latent in latents.values()
                   if latent.dim() == x.dim()):  # fmt: skip
                continue  # the model was moved or exchanged, which the next step refuses
            changed = self._changed(x, geometry)
            if changed is not None:
                result[x] = {name: latent.clone() for name, latent in latents.items()}
                geometry.adopt(x.detach(), result[x], changed)
        return result

    def restore(self, clock: Clock) -> None:
        """Latents were loaded: write the weights that are not theirs anew, and leave those that are to the last bit."""
        weights = self._weights
        geometry = weights.geometry.at(clock)
        for x in weights.values() if geometry.latents else ():
            if bool(_differs(x, weights.latents_of(x), geometry).any()):
                weights.push([x], clock)
        weights.hold_zeros((x, x) for x in weights.values())
        self.note()

    def _written(self) -> list[nn.Parameter]:
        """The weights that somebody may have written into since :meth:`note`."""
        own, now = list(self._weights.values()), self._versions()
        if now == self._seen:
            return own if self._sample.has_changed(own) else []
        both = zip(own, *self._seen, *now, strict=True)
        return [x for x, version, place, version_now, place_now in both if (version, place) != (version_now, place_now)]

    def _changed(self, x: Tensor, geometry: Geometry) -> Tensor | None:
        """Where a living element of x is not what its latents say; None if nowhere."""
        changed, mask = _differs(x, self._weights.latents_of(x), geometry), self._weights.mask_of(x)
        if mask is not None:
            changed &= mask
        return changed if bool(changed.any()) else None

    def _versions(self) -> Versions:
        return self._weights.shards.versions(self._weights.values())


def _differs(x: Tensor, latents: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
    """Where x is not φ(θ), but for rounding: φ may be computed in two ways, which differ in the last bits."""
    own = torch.empty_like(x)
    geometry.push([own], {name: [latent] for name, latent in latents.items()})
    info = torch.finfo(x.dtype)
    bound = own.abs().mul_(info.eps * (2 if info.bits == 16 else geometry.rounding)).add_(info.tiny)
    return ~(own.sub_(x.detach()).abs_() <= bound)  # NaN differs


class Sample:
    """Some bytes of tensors in CPU memory: all of small ones, of others a line of 64 in each 64 KiB.

    Each time it is another line, so that who writes into the same few elements again and again is noticed
    in one of 1024 times.
    """

    LINE, PAGE = 64, 65536
    WHOLE = PAGE

    def __init__(self) -> None:
        self._turn = 0
        self._taken: list[Tensor] = []
        self._places: Places = ([], [], [])
        self._bytes: tuple[list[list[Tensor]], list[Tensor]] = ([], [])

    def __getstate__(self) -> dict[str, Any]:
        return {"_turn": self._turn, "_taken": [], "_places": ([], [], []), "_bytes": ([], [])}

    def take(self, tensors: Sequence[Tensor]) -> None:
        """Remember what they are."""
        self._turn = (self._turn + 1) % (self.PAGE // self.LINE)
        self._taken = self._read(tensors)

    def has_changed(self, tensors: Sequence[Tensor]) -> bool:
        """Whether they are not what they were."""
        return bool(self._taken) and not all(map(torch.equal, self._taken, self._read(tensors)))

    def _read(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        places = _places(tensors)
        if places != self._places:  # at every step they would cost as much as the reading
            self._places, self._bytes = places, self._views(tensors)
        small, pages = self._bytes
        line = slice(self._turn * self.LINE, (self._turn + 1) * self.LINE)
        read = [torch.cat(found).view(torch.uint8) for found in small]
        return [*read, torch.cat([held[:, line] for held in pages])] if pages else read

    def _views(self, tensors: Sequence[Tensor]) -> tuple[list[list[Tensor]], list[Tensor]]:
        """Small tensors by their dtypes, flat, and the bytes of others as pages."""
        small, pages = dict[torch.dtype, list[Tensor]](), []
        for x in tensors:
            if not _is_readable(x):  # on an accelerator, looking would mean waiting for it
                continue
            if x.nbytes <= self.WHOLE:
                flat = x.detach().view(-1) if x.is_contiguous() else torch.as_strided(x.detach(), (x.numel(),), (1,))
                small.setdefault(x.dtype, []).append(flat)
            else:
                held = torch.as_strided(x.detach(), (x.numel(),), (1,)).view(torch.uint8)
                pages.append(held[: len(held) // self.PAGE * self.PAGE].view(-1, self.PAGE))
        return list(small.values()), pages


def _places(tensors: Sequence[Tensor]) -> Places:
    addresses = [x.data_ptr() if _is_in_memory(x) else None for x in tensors]
    return addresses, [x.shape for x in tensors], [x.stride() for x in tensors]


def _is_in_memory(x: Tensor) -> bool:
    """Whether its bytes can be looked at."""
    return x.is_cpu and not isinstance(x, torch._subclasses.FakeTensor)


def _is_readable(x: Tensor) -> bool:
    """Whether it lies in CPU memory, without gaps, so that its bytes can be looked at."""
    if not _is_in_memory(x) or not x.numel():
        return False
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
