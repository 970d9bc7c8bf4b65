"""What a general compressor makes of the same model: the honest rival of this format."""

from __future__ import annotations

import importlib.util
import os

from mirrormask.storage.container import build_header
from mirrormask.storage.reader import load
from mirrormask.storage.torch_types import NAMES, to_bits

__all__ = ["LEVEL", "MOST", "zstd_size"]

#: The level that ``zstd -19`` names, the highest of its ordinary ones.
LEVEL = 19
#: Bytes of the dense tensors above which it would take minutes.
MOST = 1 << 28


def zstd_size(path: str | os.PathLike[str]) -> int | None:
    """Bytes of ``zstd -19`` of the dense safetensors file; None without the package ``zstandard``, or for a large one.

    Raises:
        FormatError: the file is damaged.
    """
    if importlib.util.find_spec("zstandard") is None:
        return None
    import zstandard

    state = load(path)
    if sum(tensor.nbytes for tensor in state.values()) > MOST:
        return None
    compressor = zstandard.ZstdCompressor(level=LEVEL).compressobj()
    header = build_header([(name, NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in state.items()], {})
    size = len(compressor.compress(header))
    size += sum(len(compressor.compress(to_bits(tensor).tobytes())) for tensor in state.values())
    return size + len(compressor.flush())
