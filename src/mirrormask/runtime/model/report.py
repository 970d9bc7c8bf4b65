"""What :func:`mirrormask.compile` chose, and by how much."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["LayerReport", "Report"]


@dataclass(frozen=True)
class LayerReport:
    """One layer, or one step between layers.

    Attributes:
        layer: the module's name, or the operation's.
        shape: of the weight; empty for steps without one.
        sparsity: of the weight.
        kernel: what runs it.
        seconds: for the example, on one thread.
        dense_seconds: PyTorch's own dense layer on the same example; 0 when there is no weight.
        share: of the sum of all steps.
    """

    layer: str
    shape: tuple[int, ...]
    sparsity: float
    kernel: str
    seconds: float
    dense_seconds: float
    share: float


@dataclass(frozen=True)
class Report:
    """The whole build.

    Attributes:
        compiled: whether the plan is used; else the model runs as it was.
        reason: why not, or what else there is to say.
        layers: the steps of the plan.
        wide: (layer, how large its sums may become) of what stays in fp32 in a plan in half precision.
        left: (operations and where they are, why) of what stays in PyTorch.
        regions: how many parts of the model run natively, each by one call.
        eager_seconds, seconds: one call on the example before and after, with the threads of the build.
        error: the largest difference from eager PyTorch over the largest output.
        nbytes: memory of the plan: constants, activations (at their peak), the table of calls, and the weights that
            the graph keeps for other input shapes; machine code, which plans share, is not counted.
        build_seconds: how long the build took.
        cached: whether its choices came from the disk.
        instruction_set, threads, processor: what it was built for.
        unsure: how many layers' kernels were chosen while others had the processor; the next build measures them again.
    """

    compiled: bool
    reason: str
    layers: tuple[LayerReport, ...]
    wide: tuple[tuple[str, float], ...]
    left: tuple[tuple[str, str], ...]
    regions: int
    eager_seconds: float
    seconds: float
    error: float
    nbytes: int
    build_seconds: float
    cached: bool
    instruction_set: str
    precision: str
    threads: int
    processor: str
    unsure: int = 0

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = []
        if self.layers:
            width = max(len("layer"), *(len(row.layer) for row in self.layers))
            lines.append(
                f"{'layer':<{width}}  {'shape':>16}  {'sparsity':>8}  {'kernel':<18}  "
                f"{'us':>9}  {'dense us':>9}  {'share':>6}"
            )
            for row in self.layers:
                shape = "x".join(str(n) for n in row.shape)
                sparsity = f"{100 * row.sparsity:.2f}%" if row.shape else ""
                dense = f"{1e6 * row.dense_seconds:.1f}" if row.dense_seconds else ""
                lines.append(
                    f"{row.layer:<{width}}  {shape:>16}  {sparsity:>8}  {row.kernel:<18}  {1e6 * row.seconds:>9.1f}  "
                    f"{dense:>9}  {100 * row.share:>5.1f}%"
                )
        lines += [f"stays in fp32: {name}: its sums reach {most:.3g}, past 65,504" for name, most in self.wide]
        lines += [f"stays in PyTorch: {name}: {why}" for name, why in self.left]
        if self.unsure:
            some = "1 kernel was" if self.unsure == 1 else f"{self.unsure} kernels were"
            lines.append(f"the machine was busy while {some} chosen; the next build on this machine chooses again")
        state = "compiled" if self.compiled else "not compiled, the model runs as it was"
        lines.append(f"{state}{': ' if self.reason else ''}{self.reason}")
        ratio = self.eager_seconds / self.seconds if self.seconds else 1.0
        lines.append(
            f"eager {1e3 * self.eager_seconds:.3f} ms, now {1e3 * self.seconds:.3f} ms: {ratio:.2f} times; "
            f"error against fp32 {self.error:.1e}; {self.nbytes / 1e6:.1f} MB; "
            f"{self.instruction_set}, {self.precision}, "
            f"{self.threads} thread{'s' if self.threads > 1 else ''}, {self.processor}; "
            f"built in {self.build_seconds:.2f} s{' from the cache' if self.cached else ''}"
        )
        return "\n".join(lines)
