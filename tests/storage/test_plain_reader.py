"""The reader printed in docs/format.md, run as it stands there, agrees with the library bit for bit."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import mirrormask as mm
from mirrormask.storage.torch_types import NAMES, to_bits

FORMAT = Path(__file__).parents[2] / "docs" / "format.md"


def plain_reader():
    (block,) = re.findall(r"```python\n(.*?)```", FORMAT.read_text(encoding="utf-8"), re.DOTALL)
    scope: dict = {}
    exec(compile(block, str(FORMAT), "exec"), scope)
    return scope["read"]


def two_four(*shape):
    keep = torch.rand(*shape[:-1], shape[-1] // 4, 4).argsort(-1) < 2
    return any_bits(*shape) * keep.reshape(shape)


def any_bits(*shape):
    """Numbers that no code shortens."""
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)


def test_the_reader_of_the_document_agrees_bit_for_bit(tmp_path):
    shared = torch.randn(30, 30)
    state = {
        "dense": torch.randn(40, 40),
        "bitmask": any_bits(90, 40) * (torch.rand(90, 40) < 0.5),
        "gaps": torch.randn(90, 90) * (torch.rand(90, 90) < 0.002) + 0.0,
        "rows": two_four(60, 40),
        "channels": two_four(16, 3, 3, 32).permute(0, 3, 1, 2),
        "half": (torch.randn(90, 90) * (torch.rand(90, 90) < 0.05) + 0.0).bfloat16(),
        "double": (torch.randn(30, 90) * (torch.rand(30, 90) < 0.05) + 0.0).double(),
        "eighth": (torch.randn(90, 90) * (torch.rand(90, 90) < 0.05) + 0.0).to(torch.float8_e5m2),
        "coded": torch.randn(90, 900) * (torch.rand(90, 900) < 0.1) + 0.0,
        "coded half": (torch.randn(90, 900) * (torch.rand(90, 900) < 0.1) + 0.0).half(),
        "coded bytes": torch.randint(-4, 5, (90, 900), dtype=torch.int8) * (torch.rand(90, 900) < 0.1),
        "coded double": (torch.randn(90, 900) * (torch.rand(90, 900) < 0.01) + 0.0).double(),
        "bool": torch.rand(90, 90) < 0.05,
        "one": shared,
        "two": shared,
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 4),
    }
    path = tmp_path / "model.safetensors"
    mm.save(state, path)
    entries = mm.storage.read_contents(path).entries
    used = {getattr(getattr(entry, "encoding", None), "name", "tied") for entry in entries.values()}
    assert used == {"dense", "bitmask", "gaps", "blocked", "coded", "tied"}
    assert entries["channels"].encoding.order == "channels"
    loaded, plain = mm.load(path), plain_reader()(path)
    assert list(plain) == list(loaded) == list(state)
    for name, (dtype, shape, raw) in plain.items():
        assert dtype == NAMES[state[name].dtype]
        assert shape == list(state[name].shape)
        for tensor in (state[name], loaded[name]):
            assert np.frombuffer(raw, np.uint8).tobytes() == to_bits(tensor).tobytes(), name


@pytest.mark.parametrize("values", ["int8", "float16"])
def test_the_reader_of_the_document_reads_rounded_weights(values, tmp_path):
    state = {"w": torch.randn(40, 90, 3) * (torch.rand(40, 90, 3) < 0.1), "b": torch.randn(40)}
    path = tmp_path / "model.safetensors"
    mm.save(state, path, values=values)
    loaded, plain = mm.load(path), plain_reader()(path)
    for name, (dtype, _, raw) in plain.items():
        assert dtype == "F32"
        assert np.frombuffer(raw, np.uint8).tobytes() == to_bits(loaded[name]).tobytes(), name


def test_the_reader_of_the_document_checks_the_checksums(tmp_path):
    path = tmp_path / "model.safetensors"
    mm.save({"w": torch.randn(10)}, path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(AssertionError, match="w"):
        plain_reader()(path)


def test_the_header_checksum_is_as_documented_and_every_array_is_aligned(tmp_path):
    path = tmp_path / "model.safetensors"
    sparse = torch.zeros(40, 41)
    sparse[0, :3] = 1.0
    state = {"a": torch.ones(3, dtype=torch.bool), "b": sparse.double(), "c": sparse.half(), "d": torch.ones(5)}
    mm.save(state, path, metadata={"note": "0" * 64})
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    stated = header["__metadata__"]["mirrormask.header_sha256"]
    blank = data[8 : 8 + length].replace(stated.encode(), b"0" * 64)
    assert hashlib.sha256(blank).hexdigest() == stated
    widths = {"F64": 8, "F32": 4, "F16": 2, "U8": 1, "BOOL": 1}
    for name, entry in header.items():
        if name != "__metadata__":
            assert (8 + length + entry["data_offsets"][0]) % widths[entry["dtype"]] == 0, name
