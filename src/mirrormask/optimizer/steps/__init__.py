"""The ways to take a step, one file each; the first that is ready takes it, and each equals the last."""

from mirrormask.optimizer.steps.any_base import AnyBase
from mirrormask.optimizer.steps.base import Now, Step
from mirrormask.optimizer.steps.fused_cpu import FusedCPU
from mirrormask.optimizer.steps.fused_gpu import FusedGPU
from mirrormask.optimizer.steps.momentum_sgd import MomentumSGD

__all__ = ["FUSED", "STEPS", "AnyBase", "FusedCPU", "FusedGPU", "MomentumSGD", "Now", "Step"]

#: In the order in which they are asked.
STEPS: tuple[type[Step], ...] = (FusedCPU, FusedGPU, MomentumSGD, AnyBase)
#: Those of generated code, which ``fused=False`` leaves out.
FUSED = (FusedCPU, FusedGPU)
