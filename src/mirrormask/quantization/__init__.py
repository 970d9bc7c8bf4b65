"""Weights in 8 bits: levels and scales, and the rounding that keeps what layers compute.

The folder is not named after its function, ``mm.quantize``: a module of that name would take its place once imported.
"""

from mirrormask.quantization.quantize import QuantizedLayer, QuantizeReport, quantize

__all__ = ["QuantizeReport", "QuantizedLayer", "quantize"]
