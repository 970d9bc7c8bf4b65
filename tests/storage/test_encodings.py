"""The five encodings: small tables by hand, then random masks against plain loops."""

import io
import itertools
import math
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirrormask.storage.container import Extent
from mirrormask.storage.encodings import HEADER_COST, LEAST_GAIN, Source, all_sizes, choose
from mirrormask.storage.encodings.base import gap_codes
from mirrormask.storage.encodings.bitmask import Bitmask
from mirrormask.storage.encodings.blocked import Blocked, code_of_word, patterns
from mirrormask.storage.encodings.coded import Coded
from mirrormask.storage.encodings.dense import Dense
from mirrormask.storage.encodings.gaps import Gaps
from mirrormask.storage.parts import Part, checksum

NAMES = {1: "U8", 2: "U16", 4: "U32", 8: "U64"}


def source(values, shape=None, dtype=np.uint32):
    bits = np.asarray(values, dtype)
    return Source(bits.reshape(-1), shape or bits.shape)


def decoded(encoding, arrays, like):
    """Through the real reader: parts that stream from a file and check their checksums."""
    parts = {}
    for name, array in arrays.items():
        raw = array.view(np.uint8).tobytes()
        extent = Extent(NAMES[array.itemsize], (array.size,), 0, len(raw))
        parts[name] = Part(io.BytesIO(raw), extent, "w", checksum(array))
    assert encoding.check_room(like.shape, {name: part.left for name, part in parts.items()}) is None
    out = np.zeros_like(like.bits)
    assert encoding.decode(parts, out, like.shape) is None
    for part in parts.values():
        part.finish()
    return out


def loop_gaps(mask):
    """The plain reference: walk along the mask and count."""
    codes, zeros = [], 0
    for alive in mask:
        if alive:
            codes.append(zeros)
            zeros = 0
        else:
            zeros += 1
            if zeros == 255:
                codes.append(255)
                zeros = 0
    return codes


def loop_blocked_size(mask, n, m, itemsize):
    blocks = len(mask) // m
    return math.ceil(blocks * math.ceil(math.log2(math.comb(m, n))) / 8) + blocks * n * itemsize


def test_bitmask_by_hand():
    like = source([0, 7, 0, 0, 9, 0, 0, 0, 0, 5])
    arrays = Bitmask().encode(like)
    assert arrays["mask"].tolist() == [0b00010010, 0b10]
    assert arrays["values"].tolist() == [7, 9, 5]
    assert Bitmask.size(like) == 2 + 3 * 4
    assert decoded(Bitmask(), arrays, like).tolist() == like.bits.tolist()


def test_gaps_by_hand():
    like = source([7, 0, 0, 9, *[0] * 296, 5, *[0] * 299])
    arrays = Gaps().encode(like)
    assert arrays["gaps"].tolist() == [0, 2, 255, 41, 255]
    assert arrays["values"].tolist() == [7, 9, 5]
    assert Gaps.size(like) == 5 + 3 * 4
    assert decoded(Gaps(), arrays, like).tolist() == like.bits.tolist()


def test_coded_by_hand():
    like = source([0, 0x3F800001, 0, 0, 0xBF000002, *[0] * 300], dtype=np.uint32)
    encoding = Coded.of(like)
    assert (encoding.count, encoding.codes) == (2, 3)
    stored = encoding.encode(like)["coded"].tobytes()
    gaps, high = stored[: encoding.gaps], stored[encoding.gaps :][: encoding.high]
    assert list(zlib.decompress(gaps, -15)) == [1, 2, 255]
    # the bits of 1.0000001 rotated: 7f000002; of -0.5000001: 7e000005
    assert list(zlib.decompress(high, -15)) == [0x7F, 0x7E]
    assert stored[encoding.gaps + encoding.high :] == bytes([2, 0, 0, 5, 0, 0])
    assert len(stored) == Coded.size(like)
    assert decoded(encoding, encoding.encode(like), like).tolist() == like.bits.tolist()


@pytest.mark.parametrize("zeros", [253, 254, 255, 256, 509, 510, 511])
def test_gaps_around_the_escape(zeros):
    for tail in (0, 1, 254, 255, 256):
        mask = np.array([False] * zeros + [True] + [False] * tail)
        assert gap_codes(mask).tolist() == loop_gaps(mask)
        like = source(mask.astype(np.uint32))
        assert decoded(Gaps(), Gaps().encode(like), like).tolist() == like.bits.tolist()


def test_two_four_by_hand():
    like = source([[1, 2, 0, 0, 0, 3, 0, 4], [0, 0, 5, 6, 0, 0, 0, 7]])
    encoding = Blocked(2, 4, "rows")
    arrays = encoding.encode(like)
    # 12 -> 0, 24 -> 4, 34 -> 5; the last block has one element and takes its first position too: 14 -> 2
    assert patterns(2, 4).tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    assert "".join(f"{byte:08b}" for byte in arrays["patterns"]) == "0001001010100000"
    assert arrays["values"].tolist() == [1, 2, 3, 4, 5, 6, 0, 7]
    assert decoded(encoding, arrays, like).tolist() == like.bits.tolist()


def test_blocks_along_the_input_channels_of_a_convolution():
    kernel = np.zeros((2, 4, 3), np.uint32)
    kernel[0, 1], kernel[1, 2] = (1, 2, 3), (4, 0, 6)
    like = Source(kernel.reshape(-1), kernel.shape)
    found = Blocked.candidates(like, like.nbytes)
    assert Blocked(1, 4, "channels") in found
    assert not [item for item in found if item.order == "rows" and item.m == 4 and item.n == 1]
    arrays = Blocked(1, 4, "channels").encode(like)
    assert arrays["values"].tolist() == [1, 2, 3, 4, 0, 6]
    assert decoded(Blocked(1, 4, "channels"), arrays, like).tolist() == kernel.reshape(-1).tolist()


@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 4), (2, 4), (3, 4), (2, 8), (4, 8), (1, 16), (3, 16)])
def test_every_mask_of_a_block_gets_a_pattern_that_holds_it(n, m):
    table, positions = code_of_word(n, m), patterns(n, m)
    words = [word for word in range(2**m) if bin(word).count("1") <= n]
    for word in words:
        covered = sum(1 << int(bit) for bit in positions[table[word]])
        assert word & ~covered == 0
    exact = [word for word in words if bin(word).count("1") == n]
    assert sorted(table[word] for word in exact) == list(range(math.comb(m, n)))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 3000),
    st.floats(0, 1),
    st.sampled_from([np.uint8, np.uint16, np.uint32, np.uint64]),
    st.integers(0, 2**31),
)
def test_bitmask_and_gaps_agree_with_loops(size, sparsity, dtype, seed):
    rng = np.random.default_rng(seed)
    bits = rng.integers(1, np.iinfo(dtype).max, size, dtype) * (rng.random(size) >= sparsity).astype(dtype)
    like = Source(bits, (size,))
    assert gap_codes(like.mask).tolist() == loop_gaps(like.mask)
    mask = Bitmask().encode(like)["mask"]
    assert [bool(mask[k // 8] >> (k % 8) & 1) for k in range(size)] == [bool(value) for value in bits]
    for encoding in (Dense(), Bitmask(), Gaps(), Coded.of(like)):
        arrays = encoding.encode(like)
        np.testing.assert_array_equal(decoded(encoding, arrays, like), bits)
        if not isinstance(encoding, Dense):
            assert sum(array.nbytes for array in arrays.values()) == encoding.size(like)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(1, 2), (1, 4), (2, 4), (4, 8), (2, 8), (1, 16), (2, 16)]),
    st.sampled_from([(5, 16), (16, 16, 3), (3, 32, 3, 3), (1, 16, 2, 1, 3), (48,)]),
    st.sampled_from(["rows", "channels"]),
    st.integers(0, 2**31),
)
def test_blocked_agrees_with_a_loop(nm, shape, order, seed):
    n, m = nm
    rng = np.random.default_rng(seed)
    if (order == "channels" and len(shape) < 3) or (order == "rows" and math.prod(shape) % m):
        return
    ordered = np.zeros((math.prod(shape) // m, m), np.uint32)
    for block in ordered:
        block[rng.choice(m, rng.integers(0, n + 1), replace=False)] = rng.integers(1, 99)
    if order == "channels":
        moved = ordered.reshape(shape[0], *shape[2:], shape[1])
        bits = np.moveaxis(moved, -1, 1).reshape(-1)
    else:
        bits = ordered.reshape(-1)
    like = Source(np.ascontiguousarray(bits), shape)
    encoding = Blocked(n, m, order)
    arrays = encoding.encode(like)
    assert sum(array.nbytes for array in arrays.values()) == encoding.size_of(like.bits.size, 4)
    assert encoding.size_of(like.bits.size, 4) == loop_blocked_size(bits, n, m, 4)
    np.testing.assert_array_equal(decoded(encoding, arrays, like), bits)


@pytest.mark.parametrize("size", [2**18 - 1, 2**18, 2**18 + 1, 600_001])
def test_chunks_join_without_a_seam(size):
    rng = np.random.default_rng(size)
    for sparsity in (0.5, 0.999, 1.0):
        like = source((rng.random(size) >= sparsity) * rng.integers(1, 9, size))
        for encoding in (Bitmask(), Gaps(), Coded.of(like)):
            np.testing.assert_array_equal(decoded(encoding, encoding.encode(like), like), like.bits)


def test_blocked_chunks_join_without_a_seam():
    rng = np.random.default_rng(0)
    blocks = np.zeros((2**14 + 3, 4), np.uint32)
    for pair in itertools.combinations(range(4), 2):
        rows = rng.random(len(blocks)) < 0.3
        blocks[rows] = 0
        blocks[np.ix_(rows, pair)] = 7
    like = source(blocks)
    encoding = Blocked(2, 4, "rows")
    np.testing.assert_array_equal(decoded(encoding, encoding.encode(like), like), like.bits)


@pytest.mark.parametrize(
    ("sparsity", "most", "expected"),
    [
        (0.0, 2**32, "dense"),
        (0.5, 2**32, "bitmask"),  # no byte of the values is worth a code
        (0.8, 2**32, "coded"),
        (0.95, 2**32, "coded"),
        (0.5, 9, "coded"),
        (0.999, 9, "gaps"),
    ],
)
def test_the_smallest_is_chosen(sparsity, most, expected):
    rng = np.random.default_rng(1)
    like = source((rng.random(40_000) >= sparsity) * rng.integers(1, most, 40_000), (200, 200))
    encoding, size = choose(like)
    sizes = {name: value for name, value in all_sizes(like).items() if value is not None}
    assert encoding.name == expected
    assert expected == min(sizes, key=lambda name: sizes[name] + LEAST_GAIN * (name == "coded"))
    assert size == sizes[expected]


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (4, 8), (2, 16)])
def test_exact_patterns_are_stored_as_blocks(n, m):
    rng = np.random.default_rng(2)
    blocks = np.zeros((5000, m), np.uint32)
    for block in blocks:
        block[rng.choice(m, n, replace=False)] = rng.integers(1, 2**32, n)
    like = source(blocks)
    encoding, size = choose(like)
    assert encoding == Blocked(n, m, "rows")
    assert size < min(Bitmask.size(like), Gaps.size(like))


def test_a_small_saving_does_not_leave_the_dense_form():
    like = source([0] * (HEADER_COST // 4))
    assert choose(like) == (Dense(), HEADER_COST)
    assert choose(source([0] * HEADER_COST))[0] == Gaps()


@settings(max_examples=100, deadline=None)
@given(
    st.floats(0, 1),
    st.sampled_from([np.uint8, np.uint32]),
    st.sampled_from([(40, 16), (16, 16, 3), (4000,)]),
    st.sampled_from([None, (1, 2), (2, 4), (15, 16)]),
    st.integers(0, 2**31),
)
def test_what_is_chosen_is_never_larger_than_any_other(sparsity, dtype, shape, nm, seed):
    rng = np.random.default_rng(seed)
    mask = rng.random(math.prod(shape)) >= sparsity
    if nm:
        mask = (rng.random((mask.size // nm[1], nm[1])).argsort(1) < nm[0]).reshape(-1)
    like = Source(rng.integers(1, 99, mask.size, dtype) * mask.astype(dtype), shape)
    encoding, size = choose(like)
    assert sum(array.nbytes for array in encoding.encode(like).values()) == size
    sizes = all_sizes(like)
    dense, coded = sizes.pop("dense"), sizes.pop("coded")
    best = min(value for value in sizes.values() if value is not None)
    best = best if best < dense - HEADER_COST else dense
    zeros_pay = like.nonzeros * like.itemsize < dense - HEADER_COST  # else it stays where any reader finds it
    if zeros_pay and coded < min(best, dense - HEADER_COST) - LEAST_GAIN:
        assert size == coded or size < 1.02 * coded  # an estimate decides whether it is made at all
    else:
        assert size == best
