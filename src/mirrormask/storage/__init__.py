"""The compressed file: a safetensors container that leaves out the zeros, and exports to other formats.

Names are imported when they are first used: what reads a file without torch lies beside what makes tensors of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mirrormask.lazy import lazily

if TYPE_CHECKING:
    from mirrormask.storage.contents import Contents, Entry
    from mirrormask.storage.errors import FormatError
    from mirrormask.storage.reader import load, read_contents
    from mirrormask.storage.sizes import FileSizes, TensorSizes, file_sizes, predict_size
    from mirrormask.storage.writer import save

__all__ = [
    "Contents",
    "Entry",
    "FileSizes",
    "FormatError",
    "TensorSizes",
    "file_sizes",
    "load",
    "predict_size",
    "read_contents",
    "save",
]

__getattr__ = lazily(
    __name__,
    {
        "Contents": "mirrormask.storage.contents",
        "Entry": "mirrormask.storage.contents",
        "FileSizes": "mirrormask.storage.sizes",
        "FormatError": "mirrormask.storage.errors",
        "TensorSizes": "mirrormask.storage.sizes",
        "file_sizes": "mirrormask.storage.sizes",
        "load": "mirrormask.storage.reader",
        "predict_size": "mirrormask.storage.sizes",
        "read_contents": "mirrormask.storage.reader",
        "save": "mirrormask.storage.writer",
    },
)
