"""One pass over memory for a whole step of SGD on sparsifiable weights, generated for the processor it runs on.

A step done with tensor operations passes over memory once an operation; the loops here read and write each array once.
They are generated with llvmlite and serve SGD without dampening on float32 weights in CPU memory, in the geometries
whose updates are in this folder; everything else takes the path that always works.
"""

from mirrormask.optimizer.steps.fused_cpu.step import FusedCPU

__all__ = ["FusedCPU"]
