"""Reading trusts nothing: every kind of damage and every kind of lie is a FormatError that names the fault."""

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from storage_forge import forge, one, raw

import mirrormask as mm
from mirrormask.storage import read_contents
from mirrormask.storage.reader import read_state


def f32(*values):
    return struct.pack(f"<{len(values)}f", *values)


def load(data):
    return read_state(io.BytesIO(data), len(data))


def deflated(data):
    stream = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return stream.compress(data) + stream.flush()


def coded(first, second, low, shape=(4,), **fields):
    """A file with one coded tensor of float32."""
    fields = {"count": 0, "codes": 0, "gaps": len(first), "high": len(second), **fields}
    return one("coded", "F32", list(shape), {"coded": ("U8", first + second + low)}, **fields)


@pytest.fixture
def small(tmp_path):
    """A file with every encoding, as bytes."""
    torch.manual_seed(0)
    keep = torch.rand(60, 4, 4).argsort(-1) < 2
    state = {
        "gaps": torch.randn(25, 25) * (torch.rand(25, 25) < 0.03) + 0.0,
        "bits": torch.randn(20, 8) * (torch.rand(20, 8) < 0.5) + 0.0,
        "blocks": torch.randint(1, 2**15, (60, 16), dtype=torch.int16) * keep.reshape(60, 16),
        "coded": (torch.randint(1, 3, (60, 60)) * (torch.rand(60, 60) < 0.3)).to(torch.int8),
        "bias": torch.randn(3),
    }
    state["tied"] = state["bias"]
    mm.save(state, tmp_path / "small.safetensors", metadata={"method": "pilot"})
    entries = read_contents(tmp_path / "small.safetensors").entries
    assert [getattr(entry, "encoding", None) and entry.encoding.name for entry in list(entries.values())[:5]] == [
        "gaps", "bitmask", "blocked", "coded", "dense",
    ]  # fmt: skip
    return (tmp_path / "small.safetensors").read_bytes()


@pytest.mark.early
def test_every_single_flipped_bit_is_found(small):
    damaged = bytearray(small)
    for position in range(len(damaged)):
        for bit in range(8):
            damaged[position] ^= 1 << bit
            with pytest.raises(mm.FormatError):
                load(damaged)
            damaged[position] ^= 1 << bit
    assert set(load(damaged)) == {"gaps", "bits", "blocks", "coded", "bias", "tied"}


def test_every_truncation_and_every_longer_file_is_found(small):
    for length in range(len(small)):
        with pytest.raises(mm.FormatError):
            load(small[:length])
    for extra in (b"\0", b"\0" * 4096, small):
        with pytest.raises(mm.FormatError):
            load(small + extra)


def test_swapped_arrays_of_the_same_shape_are_found(tmp_path):
    mm.save({"a": torch.zeros(4), "b": torch.ones(4)}, tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    with pytest.raises(mm.FormatError, match=r"tensor 'a': its bytes do not match their checksum"):
        load(data[:-32] + data[-16:] + data[-32:-16])


HEADERS = {
    "0 bytes; a safetensors file has at least 8": b"",
    "5 bytes; a safetensors file has at least 8": b"\1\2\3\4\5",
    "the header claims 9,223,372,036,854,775,807 bytes": struct.pack("<Q", 2**63 - 1) + b"{}",
    "the header claims 18,446,744,073,709,551,615 bytes": struct.pack("<Q", 2**64 - 1) + b"{}",
    "the header claims 3 bytes": struct.pack("<Q", 3) + b"{}",
    "the header is not valid JSON": raw(b"{"),
    "the header is not valid JSON: 'utf-8'": raw(b'{"\xff":1}'),
    "the header is not valid JSON: maximum recursion|the header is a JSON list": raw(b"[" * 100_000 + b"]" * 100_000),
    "the header is a JSON list": raw(b"[]"),
    "the header is not valid JSON: .* surrogates not allowed": raw(b'{"__metadata__":{"a":"\\ud800"}}'),
    "a key occurs twice": raw(b'{"a":{},"a":{}}'),
    "the number NaN": raw(b'{"a":NaN}'),
    "the number 1e5": raw(b'{"a":1e5}'),
    "a number of 5000 digits": raw(b'{"a":' + b"9" * 5000 + b"}"),
    "__metadata__ is not a table of strings": raw({"__metadata__": {"a": 1}}),
    "tensor 'w': its header entry is not": raw({"w": {"dtype": "F32", "shape": []}}),
    "tensor 'w': unknown element type 'F31'": raw({"w": {"dtype": "F31", "shape": [], "data_offsets": [0, 4]}}),
    "tensor 'w': shape -1": raw({"w": {"dtype": "F32", "shape": -1, "data_offsets": [0, 4]}}),
    r"tensor 'w': shape \[-1\]": raw({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}),
    r"tensor 'w': shape \[True\]": raw({"w": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}),
    r"tensor 'w': shape \[1, 1, .* at most 64": raw({"w": {"dtype": "F32", "shape": [1] * 65, "data_offsets": [0, 4]}}),
    r"tensor 'w': shape \[4294967296, 4294967296\] has more bytes": raw(
        {"w": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 2**66]}}
    ),
    r"tensor 'w': shape \[0, 9223372036854775807\] has more bytes": raw(
        {"w": {"dtype": "F32", "shape": [0, 2**63 - 1], "data_offsets": [0, 0]}}
    ),
    "tensor 'w': data_offsets is not two integers": raw({"w": {"dtype": "F32", "shape": [], "data_offsets": [0]}}),
    r"tensor 'w': offsets 0..4 do not fit shape \[2\]": raw(
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"
    ),
    r"tensor 'w': offsets -4..0 do not fit": raw(
        {"w": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, b"1234"
    ),
    "tensor 'w': its bytes end at .* but the file has": raw(
        {"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, b"1234"
    ),
    "tensor 'w': its bytes start at": raw({"w": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}, b"12"),
    "tensor 'v': its bytes start at": raw(
        {name: {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]} for name in ("w", "v")[::-1]}, b"12"
    )
    .replace(b'"v"', b'"x"')
    .replace(b'"w"', b'"v"'),
    "the tensors end at byte": raw({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"12"),
    "tensor 'w': a bool that is neither 0 nor 1": raw(
        {"w": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}, b"\1\2"
    ),
}


@pytest.mark.parametrize("fault", HEADERS)
def test_lies_of_the_container(fault):
    with pytest.raises(mm.FormatError, match=fault):
        load(HEADERS[fault])


GAPS = {"dtype": "F32", "shape": [4], "encoding": "gaps"}
DENSE = {"dtype": "F32", "shape": [1], "encoding": "dense"}
ARRAY = {"w": ("F32", [1], f32(1.0))}
INDEXES = {
    "format version '3'; this library reads '1' and '2'; update it": forge({"w": DENSE}, ARRAY, format_version="3"),
    "format version 'None'": forge({"w": DENSE}, ARRAY, format_version=None),
    "the index is not valid JSON": forge({}, ARRAY, index="{"),
    "the index is a JSON list": forge({}, ARRAY, index="[]"),
    "the separator ':' is too short": forge({"w": DENSE}, ARRAY, separator=":"),
    "tensor 'w': its index entry is not an object": forge({"w": 3}, ARRAY),
    "tensor 'w': unknown encoding 'zip'; known: dense": forge({"w": {**DENSE, "encoding": "zip"}}, ARRAY),
    "tensor 'w': unknown encoding 'None'": forge({"w": {"dtype": "F32", "shape": [1]}}, ARRAY),
    "tensor 'w': unknown element type 'F33'": forge({"w": {**DENSE, "dtype": "F33"}}, ARRAY),
    "tensor 'w': shape 'x' is not a list|tensor 'w': shape x": forge({"w": {**DENSE, "shape": "x"}}, ARRAY),
    r"tensor 'w': its index entry needs a checksum for each of \[''\]": forge({"w": {**DENSE, "sha256": {}}}, ARRAY),
    "tensor 'w': its index entry needs a checksum for": forge({"w": {**DENSE, "sha256": {"": "12"}}}, ARRAY),
    "tensor 'w': its bytes do not match their checksum": forge({"w": {**DENSE, "sha256": {"": "0" * 32}}}, ARRAY),
    "tensor 'w': its stored array 'w' is not F32 of the right shape": forge({"w": {**DENSE, "shape": [1, 1]}}, ARRAY),
    "tensor 'w': its stored array 'w' is not F64": forge({"w": {**DENSE, "dtype": "F64"}}, ARRAY),
    "tensor 'v': it is stored, but the index does not list it": forge({"w": DENSE}, {**ARRAY, "v": ("U8", [0], b"")}),
    "tensor 'w': its stored array 'w' is missing": forge({"w": {**DENSE, "sha256": {"": "0" * 32}}}, {}),
    "tensor 'v': it is tied to 'x', which is not stored": forge({"v": {"encoding": "tied", "to": "x"}}, {}),
    "tensor 'v': it is tied to 'v', which is not stored": forge({"v": {"encoding": "tied", "to": "v"}}, {}),
    "tensor 'v': it is tied to something that is not a name": forge({"v": {"encoding": "tied", "to": [1]}}, {}),
    # arrays that lie about positions
    "tensor 'w': a gap leads to element 4 of 4": one(
        "gaps", "F32", [4], {"gaps": ("U8", b"\1\2"), "values": ("F32", f32(1, 2))}
    ),
    "tensor 'w': a gap leads to element 254 of 4": one(
        "gaps", "F32", [4], {"gaps": ("U8", b"\xff"), "values": ("F32", b"")}
    ),
    "tensor 'w': the gaps end 300 elements before the tensor does": one(
        "gaps", "F32", [301], {"gaps": ("U8", b"\0"), "values": ("F32", f32(1))}
    ),
    "tensor 'w': 3 values, but only 2 gaps": one(
        "gaps", "F32", [9], {"gaps": ("U8", b"\0\1"), "values": ("F32", f32(1, 2, 3))}
    ),
    "tensor 'w': 1 stored elements are missing": one(
        "gaps", "F32", [9], {"gaps": ("U8", b"\0\1"), "values": ("F32", f32(1))}
    ),
    "tensor 'w': 1 stored elements are left over": one(
        "gaps", "F32", [300], {"gaps": ("U8", b"\xff\1"), "values": ("F32", f32(1, 2))}
    ),
    "tensor 'w': 2 gaps cannot cover the 1,099,511,627,776 elements": one(
        "gaps", "F32", [2**40], {"gaps": ("U8", b"\xff\1"), "values": ("F32", f32(1))}
    ),
    r"tensor 'w': shape \[1099511627776, 1099511627776\] has more bytes than memory can address": one(
        "gaps", "F32", [2**40, 2**40], {"gaps": ("U8", b"\0"), "values": ("F32", f32(1))}
    ),
    "tensor 'w': its stored array 'w::gaps' is not U8": one(
        "gaps", "F32", [4], {"gaps": ("I8", b"\0"), "values": ("F32", f32(1))}
    ),
    "tensor 'w': its stored array 'w::values' is not F32": one(
        "gaps", "F32", [4], {"gaps": ("U8", b"\0"), "values": ("F16", b"\0\1")}
    ),
    "tensor 'w': a mask of 1 bytes for 9 elements": one(
        "bitmask", "F32", [9], {"mask": ("U8", b"\1"), "values": ("F32", f32(1))}
    ),
    "tensor 'w': a mask of 1 bytes for 1,152,921,504,606,846,976 elements": one(
        "bitmask", "F32", [2**60], {"mask": ("U8", b"\1"), "values": ("F32", f32(1))}
    ),
    "tensor 'w': 3 values for 2 elements": one(
        "bitmask", "F32", [2], {"mask": ("U8", b"\3"), "values": ("F32", f32(1, 2, 3))}
    ),
    "tensor 'w': the mask has bits beyond the last element": one(
        "bitmask", "F32", [3], {"mask": ("U8", b"\x09"), "values": ("F32", f32(1, 2))}
    ),
    "tensor 'w': 1 stored elements are missing$": one(
        "bitmask", "F32", [3], {"mask": ("U8", b"\3"), "values": ("F32", f32(1))}
    ),
    "tensor 'w': 1 stored elements are left over$": one(
        "bitmask", "F32", [3], {"mask": ("U8", b"\1"), "values": ("F32", f32(1, 2))}
    ),
    "tensor 'w': block pattern 6 of 6": one(
        "blocked", "F32", [4], {"patterns": ("U8", b"\xc0"), "values": ("F32", f32(1, 2))}, n=2, m=4, order="rows"
    ),
    "tensor 'w': the patterns have bits beyond the last block": one(
        "blocked", "F32", [4], {"patterns": ("U8", b"\x01"), "values": ("F32", f32(1, 2))}, n=2, m=4, order="rows"
    ),
    "tensor 'w': 1 stored values instead of 2": one(
        "blocked", "F32", [4], {"patterns": ("U8", b"\0"), "values": ("F32", f32(1))}, n=2, m=4, order="rows"
    ),
    r"tensor 'w': blocks of 4 do not divide shape \[6\]": one(
        "blocked", "F32", [6], {"patterns": ("U8", b"\0"), "values": ("F32", f32(1, 2))}, n=2, m=4, order="rows"
    ),
    r"tensor 'w': blocks of 4 do not divide shape \[4, 2\] in order 'channels'": one(
        "blocked", "F32", [4, 2], {"patterns": ("U8", b"\0"), "values": ("F32", f32(1))}, n=2, m=4, order="channels"
    ),
    "tensor 'w': 4:4 blocks; known": one(
        "blocked", "F32", [4], {"patterns": ("U8", b""), "values": ("F32", f32(1, 2, 3, 4))}, n=4, m=4, order="rows"
    ),
    "tensor 'w': 2:1099511627776 blocks; known": one(
        "blocked", "F32", [4], {"patterns": ("U8", b""), "values": ("F32", f32(1))}, n=2, m=2**40, order="rows"
    ),
    "tensor 'w': unknown order of blocks 'up'": one(
        "blocked", "F32", [4], {"patterns": ("U8", b"\0"), "values": ("F32", f32(1, 2))}, n=2, m=4, order="up"
    ),
    "tensor 'w': the encoding 'blocked' needs integers": one(
        "blocked", "F32", [4], {"patterns": ("U8", b"\0"), "values": ("F32", f32(1, 2))}, n="2", m=4, order="rows"
    ),
    "tensor 'w': the encoding 'coded' needs integers": one(
        "coded", "F32", [4], {"coded": ("U8", b"")}, count=1, codes="1"
    ),
    "tensor 'w': 5 values and 5 gaps for 4 elements": coded(b"", b"", b"", count=5, codes=5),
    "tensor 'w': 0 and 0 bytes cannot hold 1 gaps": coded(b"", b"", b"", count=0, codes=1),
    "tensor 'w': 3 bytes, of which the streams are 5": coded(b"abc", b"", b"", high=2),
    "tensor 'w': 2 gaps cannot cover the 1,000 elements": coded(
        deflated(b"\0\0"), deflated(b"ab"), bytes(6), count=2, codes=2, shape=[1000]
    ),
    r"tensor 'w': \d+ bytes instead of \d+": coded(deflated(b"\0"), deflated(b"a"), b"", count=1, codes=1),
    "tensor 'w': a gap leads to element 9 of 4": coded(deflated(b"\x09"), deflated(b"a"), bytes(3), count=1, codes=1),
    "tensor 'w': the gaps are no such stream, or too few": coded(b"abc", deflated(b"a"), bytes(3), count=1, codes=1),
    "tensor 'w': the high bytes are no such stream": coded(deflated(b"\0"), b"abc", bytes(3), count=1, codes=1),
    "tensor 'w': 1 of 1 values, or more in a stream": coded(
        deflated(b"\0\0"), deflated(b"a"), bytes(3), count=1, codes=1
    ),
    "tensor 'w': 0 of 1 values, or more in a stream": coded(
        deflated(b"\xff"), deflated(b"a"), bytes(3), count=1, codes=1, shape=[300]
    ),
    "tensor 'w': gaps for more than the 1 values": coded(deflated(b"\0\0"), deflated(b"a"), bytes(3), count=1, codes=2),
    "tensor 'w': the gaps end 299 elements before": coded(
        deflated(b"\0\0"), deflated(b"ab"), bytes(6), count=2, codes=2, shape=[301]
    ),
    "tensor 'w': F32 cannot become 'F64'": one("dense", "F32", [1], {"": ("F32", f32(1))}, becomes="F64"),
    "tensor 'w': I8 cannot become 'F32'": one("dense", "I8", [1], {"": ("I8", b"a")}, becomes="F32"),
    "tensor 'w': I8 cannot become 'BOOL'": one("dense", "I8", [1], {"": ("I8", b"a")}, becomes="BOOL", axis=0),
    r"tensor 'w': scales along dimension 1 of shape \[1\]": one(
        "dense", "I8", [1], {"": ("I8", b"a")}, becomes="F32", axis=1
    ),
    "tensor 'w': its index entry needs a checksum for each of": one(
        "dense", "I8", [1], {"": ("I8", b"a")}, becomes="F32", axis=0
    ),
    "tensor 'w': its stored array 'w::scales' is not BF16": one(
        "dense", "I8", [1], {"": ("I8", b"a"), "scales": ("BF16", bytes(4))}, becomes="F32", axis=0
    ),
    "tensor 'w': a scale that is not a positive number": one(
        "dense", "I8", [1], {"": ("I8", b"a"), "scales": ("BF16", bytes(2))}, becomes="F32", axis=0
    ),
    "tensor 'w': a bool that is neither 0 nor 1": one(
        "gaps", "BOOL", [4], {"gaps": ("U8", b"\0"), "values": ("BOOL", b"\2")}
    ),
}


@pytest.mark.parametrize("fault", INDEXES)
def test_lies_of_the_index_and_the_arrays(fault):
    with pytest.raises(mm.FormatError, match=fault):
        load(INDEXES[fault])


def test_the_forge_makes_sound_files_too():
    state = load(one("gaps", "F32", [4], {"gaps": ("U8", b"\1\1"), "values": ("F32", f32(5, 6))}))
    assert state["w"].tolist() == [0, 5, 0, 6]


def test_no_lie_about_a_shape_makes_the_reader_allocate(monkeypatch):
    asked = []

    class Counting:
        def __getattr__(self, name):
            make = getattr(np, name)
            return (lambda size, *of: asked.append(size) or make(size, *of)) if name in ("empty", "zeros") else make

    monkeypatch.setattr("mirrormask.storage.contents.np", Counting())
    for data in [*HEADERS.values(), *INDEXES.values()]:
        asked.clear()
        with pytest.raises(mm.FormatError):
            load(data)
        # 255 elements a gap, and fewer than 255 after the last, of at most 8 bytes each; 8 gaps a byte if coded
        assert sum(asked) <= 8 * 255 * (8 * len(data) + 1)


def test_a_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "x"
    mm.save({"w": torch.randn(100, 100)}, path)
    from mirrormask.storage import reader

    original = reader.contents_of

    def cut_afterwards(container):
        with path.open("r+b") as other:
            other.truncate(path.stat().st_size - 1000)
        return original(container)

    monkeypatch.setattr(reader, "contents_of", cut_afterwards)
    with pytest.raises(mm.FormatError, match=r"tensor 'w': the file ends after"):
        mm.load(path)


def test_a_damaged_file_leaves_the_model_untouched(tmp_path):
    model = torch.nn.Linear(30, 30)
    path = tmp_path / "x"
    mm.save({name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}, path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 128
    path.write_bytes(data)
    before = model.weight.clone()
    with pytest.raises(mm.FormatError):
        mm.load(path, model)
    assert torch.equal(before, model.weight)


def test_damage_to_a_plain_safetensors_file_never_crashes(tmp_path):
    save_file({"w": torch.randn(3, 4), "b": torch.ones(2, dtype=torch.int64)}, tmp_path / "plain")
    data = (tmp_path / "plain").read_bytes()
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(3000):
        damaged = bytearray(data)
        damaged[rng.integers(len(data))] ^= 1 << rng.integers(8)
        try:
            load(damaged)
            outcomes.add("loaded")  # a plain file has no checksums, so a changed value cannot be noticed
        except mm.FormatError:
            outcomes.add("refused")
    assert outcomes == {"loaded", "refused"}


def test_the_error_names_path_tensor_and_fault_and_survives_a_process_boundary(tmp_path, small):
    path = tmp_path / "file.safetensors"
    path.write_bytes(small[:-1] + bytes([small[-1] ^ 1]))
    with pytest.raises(mm.FormatError) as caught:
        mm.load(path)
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.path, error.tensor) == (str(path), caught.value.tensor)
    assert str(error) == f"{path}: tensor {error.tensor!r}: {error.fault}"
    path.write_bytes(small[:-9])
    for reading in (mm.load, read_contents):
        with pytest.raises(mm.FormatError, match=r"file.safetensors: tensor '[a-z:]+': its bytes end at"):
            reading(path)
