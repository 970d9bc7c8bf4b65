"""How a weight moves: one file a geometry."""

from mirrormask.geometry.base import Geometry
from mirrormask.geometry.consensus import Consensus
from mirrormask.geometry.deep import DeepProduct
from mirrormask.geometry.euclidean import Euclidean
from mirrormask.geometry.hadamard import Hadamard, factorize
from mirrormask.geometry.mirror_descent import MirrorDescent
from mirrormask.geometry.power import Power
from mirrormask.geometry.sigmoid_mask import SigmoidMask
from mirrormask.geometry.sign_in import SignIn
from mirrormask.geometry.soft_threshold import SoftThreshold

__all__ = [
    "Consensus",
    "DeepProduct",
    "Euclidean",
    "Geometry",
    "Hadamard",
    "MirrorDescent",
    "Power",
    "SigmoidMask",
    "SignIn",
    "SoftThreshold",
    "factorize",
]
