"""The reader against inputs that nobody thought of: hypothesis here, atheris in a process of its own."""

import importlib.util
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mirrormask as mm
from mirrormask.storage.torch_types import TYPES, to_bits

TARGET = Path(__file__).parents[1] / "fuzz" / "fuzz_load.py"


def load_target():
    spec = importlib.util.spec_from_file_location("fuzz_load", TARGET)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_load"] = module
    spec.loader.exec_module(module)
    return module


target = load_target()

#: What the target understands: its first byte chooses between a whole file, changes to a sound one, and forged arrays.
inputs = st.one_of(
    st.binary(max_size=300).map(lambda data: b"\0" + data),
    st.lists(st.tuples(st.integers(0, 65535), st.integers(0, 255)), max_size=4).map(
        lambda changes: b"\1" + b"".join(place.to_bytes(2, "little") + bytes([value]) for place, value in changes)
    ),
    st.tuples(st.binary(min_size=8, max_size=8), st.binary(max_size=300)).map(lambda pair: b"\2" + pair[0] + pair[1]),
)


@settings(max_examples=1500, deadline=None)
@given(inputs)
def test_any_input_is_read_or_refused(data):
    assert target.check(data) in ("read", "refused")


def test_the_target_reaches_every_decoder():
    """Its seeds must be read, all but the changed file, or the fuzzing would stop at the checksums."""
    assert [target.check(seed) for seed in target.seeds()] == ["read", "refused", *5 * ["read"]]


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(sorted(TYPES)))
    shape = draw(st.lists(st.integers(0, 12), max_size=4))
    sparsity = draw(st.sampled_from([0.0, 0.3, 0.6, 0.9, 0.99, 1.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count, width = int(np.prod(shape)), TYPES[dtype].itemsize
    raw = rng.integers(0, 2 if dtype == "BOOL" else 256, (count, width), np.uint8)
    raw[rng.random(count) < sparsity] = 0
    if draw(st.booleans()) and shape and shape[-1] % 4 == 0:
        raw.reshape(-1, 4, width)[:, draw(st.permutations(range(4)))[:2]] = 0
    return torch.from_numpy(raw.reshape(-1)).view(TYPES[dtype]).reshape(shape)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(max_size=8).filter(lambda name: name != "__metadata__"), tensors(), max_size=5))
def test_any_state_dict_comes_back_bit_for_bit(tmp_path, state):
    if any(0xD800 <= ord(letter) < 0xE000 for name in state for letter in name):
        return
    mm.save(state, tmp_path / "file", signed_zeros=True)
    loaded = mm.load(tmp_path / "file")
    assert list(loaded) == list(state)
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        np.testing.assert_array_equal(to_bits(loaded[name]), to_bits(tensor))


@pytest.mark.long
def test_a_short_coverage_guided_run(tmp_path):
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed (it has wheels for Linux on x86-64 only); hypothesis ran above")
    # The fuzzer takes the peak that this process had before the fork for its own, so its limit must lie above that.
    limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024 + 2048
    options = ["-runs=20000", "-seed=1", f"-rss_limit_mb={limit}", f"-artifact_prefix={tmp_path}/"]
    command = [sys.executable, str(TARGET), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(re.search(r"Done (\d+) runs", done.stderr)[1]) >= 20_000
