"""What follows the optimizer's step, or changes the gradient before it: one file each."""

from mirrormask.corrections.base import Correction
from mirrormask.corrections.hyperbolic import Hyperbolic
from mirrormask.corrections.neuron_scale import NeuronScale
from mirrormask.corrections.proximal import Proximal

__all__ = ["Correction", "Hyperbolic", "NeuronScale", "Proximal"]
