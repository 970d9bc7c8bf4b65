"""What pruning did to each layer."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PruneReport", "PrunedLayer"]


@dataclass(frozen=True)
class PrunedLayer:
    """One weight.

    Attributes:
        name: of the weight.
        shape: of the weight.
        numel: its number of elements.
        nonzeros: how many the mask keeps.
        removed: the share of the output's energy, ``‖(W - Ŵ)X‖² / ‖WX‖²``, that the mask alone would cost.
        error: the same of the weights that are there now; less than ``removed`` where they make up for what is gone.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    nonzeros: int
    removed: float
    error: float

    @property
    def sparsity(self) -> float:
        """The fraction of zeros in this weight."""
        return 1.0 - self.nonzeros / self.numel


@dataclass(frozen=True)
class PruneReport:
    """What :func:`mirrormask.prune` did: layer by layer in the order of the forward pass; ``str()`` gives a table.

    Errors are those of a layer given the inputs that the network pruned so far gives it.

    Attributes:
        method: which one.
        layers: the weights.
        singular: of which layers the second moment had no inverse.
    """

    method: str
    layers: tuple[PrunedLayer, ...]
    singular: tuple[str, ...] = ()

    @property
    def sparsity(self) -> float:
        """The fraction of zeros over all layers together."""
        return 1.0 - sum(layer.nonzeros for layer in self.layers) / sum(layer.numel for layer in self.layers)

    @property
    def error(self) -> float:
        """The mean of the layers' relative errors."""
        return sum(layer.error for layer in self.layers) / len(self.layers)

    def __str__(self) -> str:
        rows = [(layer.name, layer.numel, layer.sparsity, layer.removed, layer.error) for layer in self.layers]
        count = len(self.layers)
        removed = sum(layer.removed for layer in self.layers) / count
        rows.append(
            ("total, mean errors", sum(layer.numel for layer in self.layers), self.sparsity, removed, self.error)
        )
        width = max(len(row[0]) for row in rows)
        lines = [f"{self.method:<{width}}  {'elements':>12}  {'sparsity':>9}  {'by mask':>9}  {'error':>9}"]
        lines += [f"{n:<{width}}  {e:>12,}  {100 * s:>8.3f}%  {r:>9.5f}  {a:>9.5f}" for n, e, s, r, a in rows]
        return "\n".join(lines)
