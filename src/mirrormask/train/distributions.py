"""``distributions.json``: how the weights and the imbalance of the factors of a run are spread, layer by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirrormask import files
from mirrormask.optimizer import SparseOptimizer

__all__ = ["BINS", "FILE", "Distributions", "histogram"]

FILE = "distributions.json"
#: Odd, so that a bin is centred on zero.
BINS = 61


def histogram(values: Tensor, bins: int = BINS) -> dict[str, Any]:
    """How often values fall into ``bins`` equal bins over ``[-max|v|, max|v|]``; zeros are counted apart.

    Args:
        values: any shape; what is not finite is left out.
        bins: how many.

    Returns:
        ``low``, ``high`` (the range), ``counts`` (a list of ``bins``, empty if nothing but zeros is there), ``zeros``.

    Example:
        >>> histogram(torch.tensor([-1.0, 0.0, 0.9, 1.0]), bins=3)
        {'low': -1.0, 'high': 1.0, 'counts': [1, 0, 2], 'zeros': 1}
    """
    values = values.detach().reshape(-1).float()
    values = values[values.isfinite()]
    moved = values[values != 0]
    bound = float(moved.abs().max()) if moved.numel() else 0.0
    return _counted(moved, -bound, bound, bins, zeros=values.numel() - moved.numel())


class Distributions:
    """Collects the histograms of one run, at its start and at its end, and writes them.

    A run that goes on after an interruption makes its start again from the seed, so the file is the same. Where weights
    are sharded over processes, each calls all but :meth:`write`.

    Args:
        optimizer: of the run, before its first step.
    """

    @torch.no_grad()
    def __init__(self, optimizer: SparseOptimizer) -> None:
        self.optimizer = optimizer
        self.layers: dict[str, dict[str, Any]] = {}
        for name, x in optimizer.weights.items():
            imbalance = self._imbalance(x)
            start = None if imbalance is None else float(f"{float(imbalance.median()):.6g}")
            self.layers[name] = {"start": histogram(self._all_of(x, x)), "imbalance_start": start}

    @torch.no_grad()
    def trained(self) -> None:
        """Call when training is over, before ``finalize``, which settles the latents."""
        for name, x in self.optimizer.weights.items():
            imbalance = self._imbalance(x)
            mask = self.optimizer.weights.mask_of(x)
            mask = None if mask is None else self._all_of(x, mask)
            alive = imbalance if imbalance is None or mask is None else imbalance[mask]
            self.layers[name] |= {
                "trained": histogram(self._all_of(x, x)),
                "imbalance": None if alive is None else _logarithms(alive),
            }

    @torch.no_grad()
    def final(self) -> None:
        """Call when the weights are final, before :meth:`write`."""
        for name, x in self.optimizer.weights.items():
            self.layers[name]["final"] = histogram(self._all_of(x, x))

    def write(self, folder: Path) -> None:
        """Write ``distributions.json``, atomically; one process is enough for this."""
        layers = [{"name": name, **layer} for name, layer in self.layers.items()]
        files.write_text(folder / FILE, json.dumps({"version": 1, "layers": layers}, separators=(",", ":")) + "\n")

    def _imbalance(self, x: Tensor) -> Tensor | None:
        """``m² - w²`` of one weight tensor; None where the geometry is not that of two factors."""
        latents = self.optimizer.weights.latents_of(x)
        if set(latents) != {"m", "w"}:
            # Mirror descent takes the same flow without the factors: there it is 2a.
            scale = self.optimizer.method.geometry.scale(latents)
            return None if scale is None else 2 * self._all_of(x, scale)
        # (m - w)(m + w) keeps the digits that m² - w² loses where the factors are nearly balanced.
        return self._all_of(x, (latents["m"] - latents["w"]) * (latents["m"] + latents["w"]))

    def _all_of(self, x: Tensor, value: Tensor) -> Tensor:
        """What all processes hold of something that lies as x does; each of them must ask."""
        return self.optimizer.weights.shards.gathered(x, value)


def _logarithms(imbalance: Tensor) -> dict[str, Any]:
    """A histogram of ``log10 |m² - w²|``, which spans many decades; ``negative`` counts where ``|w| > |m|``."""
    values = imbalance.reshape(-1).double()
    values = values[values.isfinite()]
    moved = values[values != 0]
    logs = moved.abs().log10()
    low, high = (float(logs.min()), float(logs.max())) if logs.numel() else (0.0, 0.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    counted = _counted(logs.float(), low, high, BINS, zeros=values.numel() - moved.numel())
    return {**counted, "negative": int((values < 0).sum())}


def _counted(values: Tensor, low: float, high: float, bins: int, *, zeros: int) -> dict[str, Any]:
    low, high = float(f"{low:.6g}"), float(f"{high:.6g}")
    counts: list[int] = []
    if values.numel():
        # Not histc: rounding the range may have put the outermost values just outside.
        place = ((values.double() - low) / (high - low) * bins).long().clamp_(0, bins - 1)
        counts = torch.bincount(place, minlength=bins).tolist()
    return {"low": low, "high": high, "counts": counts, "zeros": zeros}
