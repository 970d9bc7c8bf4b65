"""A coverage-guided fuzz target for the reader of model files, with atheris (libFuzzer).

    python tests/fuzz/fuzz_load.py [--seconds N | -runs=N] [corpus folder]

Random bytes rarely get past a checksum, so the first byte of an input chooses how the rest is used:

- as the whole file;
- as changes to a sound file that holds every encoding;
- as the shape, the encoding, its parameters and the stored arrays of one tensor, put into a well-formed and rightly
  signed file, so that the decoders meet arrays which say anything.

Whatever happens, the reader must return a state dict or raise FormatError, and must never ask for more memory than 255
elements a gap, of which a coded one takes a bit or more. Where it returns, the reader printed in docs/format.md must
have read the same bits.
"""

from __future__ import annotations

import io
import re
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests" / "storage")]

if __name__ == "__main__":
    import atheris

    with atheris.instrument_imports(include=["mirrormask.storage"]):
        import mirrormask.storage

from storage_forge import one  # noqa: E402

import mirrormask as mm  # noqa: E402
from mirrormask.storage import contents, reader  # noqa: E402
from mirrormask.storage.dtypes import BYTES  # noqa: E402
from mirrormask.storage.torch_types import to_bits  # noqa: E402

DTYPES = sorted(BYTES)
ENCODINGS = {"dense": "", "bitmask": "mask", "gaps": "gaps", "blocked": "patterns", "coded": "coded"}
LARGEST = 0


def plain_reader():
    """The reader of docs/format.md, as a function of a path."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "format.md").read_text(encoding="utf-8"), re.DOTALL)
    scope: dict = {}
    exec(compile(block, "docs/format.md", "exec"), scope)
    return scope["read"]


def sound_file() -> bytes:
    torch.manual_seed(0)
    keep = torch.rand(40, 4, 4).argsort(-1) < 2
    state = {
        "gaps": torch.randn(25, 25) * (torch.rand(25, 25) < 0.03) + 0.0,
        "bits": torch.randn(20, 8) * (torch.rand(20, 8) < 0.5) + 0.0,
        "blocks": torch.randn(40, 16) * keep.reshape(40, 16) + 0.0,
        "bias": torch.randn(3),
    }
    state["tied"] = state["bias"]
    with tempfile.TemporaryDirectory() as folder:
        mm.save(state, Path(folder) / "file")
        return (Path(folder) / "file").read_bytes()


SOUND = sound_file()
PLAIN = plain_reader()


class _Measured:
    """NumPy as the reader has it, which is where all tensors come from."""

    def __getattr__(self, name):
        return getattr(np, name)

    def empty(self, size, dtype):
        return self._counted(np.empty(size, dtype))

    def zeros(self, size, dtype):
        return self._counted(np.zeros(size, dtype))

    def _counted(self, made):
        global LARGEST
        LARGEST += made.nbytes
        return made


def forged(data: bytes) -> bytes:
    """A signed file with one tensor, everything about it taken from ``data``."""
    if len(data) < 8:
        data = data.ljust(8, b"\0")
    encoding = list(ENCODINGS)[data[0] % 5]
    dtype = DTYPES[data[1] % len(DTYPES)]
    shape = [size + (size > 200) * 10**6 for size in data[3 : 3 + data[2] % 4]]
    fields = {}
    if encoding == "blocked":
        order = ("rows", "channels", "x")[data[7] // 5 % 3]
        fields = {"n": data[6] % 17, "m": (2, 4, 8, 16, 3)[data[7] % 5], "order": order}
    rest = data[8:]
    if encoding == "coded":
        cut, gap = data[6] % (len(rest) + 1), data[7] % (len(rest) + 1)
        fields = {"count": data[4], "codes": data[5], "gaps": min(cut, gap), "high": max(cut, gap) - min(cut, gap)}
        if data[1] & 128:
            rest = _streams(rest, fields)
        return one("coded", dtype, shape, {"coded": ("U8", rest)}, **fields)
    if encoding == "dense":
        width = BYTES[dtype]
        return one("dense", dtype, [len(rest) // width], {"": (dtype, rest[: len(rest) // width * width])})
    cut = min(len(rest), data[6] if encoding != "blocked" else data[5])
    values = rest[cut:]
    values = values[: len(values) // BYTES[dtype] * BYTES[dtype]]
    return one(encoding, dtype, shape, {ENCODINGS[encoding]: ("U8", rest[:cut]), "values": (dtype, values)}, **fields)


def _streams(rest: bytes, fields: dict[str, int]) -> bytes:
    """The pieces with the first two as deflate streams, so that what lies behind them is reached."""
    pieces = [rest[: fields["gaps"]], rest[fields["gaps"] :][: fields["high"]], rest[fields["gaps"] + fields["high"] :]]
    for index, key in enumerate(("gaps", "high")):
        stream = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
        pieces[index] = stream.compress(pieces[index]) + stream.flush()
        fields[key] = len(pieces[index])
    return b"".join(pieces)


def changed(data: bytes) -> bytes:
    """The sound file with bytes replaced at the places that ``data`` names."""
    file = bytearray(SOUND)
    for index in range(0, len(data) - 2, 3):
        file[int.from_bytes(data[index : index + 2], "little") % len(file)] = data[index + 2]
    return bytes(file)


def check(data: bytes) -> str:
    """Feed one input to the reader; returns ``"read"`` or ``"refused"``, and fails on anything else."""
    global LARGEST
    kind, rest = (data[0] % 4, data[1:]) if data else (0, b"")
    file = rest if kind == 0 else changed(rest) if kind == 1 else forged(rest)
    LARGEST = 0
    contents.np = _Measured()
    try:
        state = reader.read_state(io.BytesIO(file), len(file))
    except mm.FormatError as error:
        str(error)
        outcome = "refused"
    else:
        outcome = "read"
        if kind != 0:
            _compare(file, state)
    finally:
        contents.np = np
    assert 8 * 255 * (8 * len(file) + 1) >= LARGEST, f"{LARGEST} bytes for a file of {len(file)}"
    return outcome


def _compare(file: bytes, state: dict[str, torch.Tensor]) -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as handle:
        handle.write(file)
        handle.flush()
        plain = PLAIN(handle.name)
    assert list(plain) == list(state)
    for name, (_, shape, raw) in plain.items():
        assert list(state[name].shape) == shape
        assert np.array_equal(np.frombuffer(raw, np.uint8), to_bits(state[name]).view(np.uint8)), name


def seeds() -> list[bytes]:
    """Inputs to start from: the sound file, changes to it, and one tensor in each encoding."""
    ones = np.ones(64, np.float32).tobytes()
    dtype = DTYPES.index("F32")
    return [
        b"\0" + SOUND,
        b"\1\0\1\2",
        bytes([2, 0, dtype, 1, 64, 0, 0, 0, 0]) + ones,
        bytes([2, 1, dtype, 2, 8, 8, 0, 8, 0]) + b"\xff" * 8 + ones,
        bytes([2, 2, dtype, 2, 8, 8, 0, 64, 0]) + bytes(64) + ones,
        bytes([2, 3, dtype, 3, 4, 4, 12, 1, 1]) + bytes(12) + ones[:192],
        bytes([2, 4, 8 * len(DTYPES) + dtype, 1, 10, 3, 3, 6, 3]) + bytes(3) + ones[:12],
    ]


def main() -> None:
    arguments = list(sys.argv)
    if "--seconds" in arguments:
        index = arguments.index("--seconds")
        arguments[index : index + 2] = [f"-max_total_time={int(arguments[index + 1])}"]
    with tempfile.TemporaryDirectory() as corpus:
        if not any(Path(argument).is_dir() for argument in arguments[1:]):
            for index, seed in enumerate(seeds()):
                (Path(corpus) / str(index)).write_bytes(seed)
            arguments += [corpus, "-max_len=4096"]
        atheris.Setup(arguments, lambda data: (check(data), None)[1])
        atheris.Fuzz()


if __name__ == "__main__":
    main()
