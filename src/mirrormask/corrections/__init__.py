"""What follows the optimizer's step: one file each."""

from mirrormask.corrections.base import Correction
from mirrormask.corrections.hyperbolic import Hyperbolic
from mirrormask.corrections.proximal import Proximal

__all__ = ["Correction", "Hyperbolic", "Proximal"]
