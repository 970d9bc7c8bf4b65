"""One Triton kernel a step for the factors of all weights on a GPU; all else takes the path that always works."""

from mirrormask.optimizer.steps.fused_gpu.step import FusedGPU

__all__ = ["FusedGPU"]
