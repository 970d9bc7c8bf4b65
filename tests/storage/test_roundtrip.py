"""What goes in comes out, bit for bit: names, types, ties, shapes, layouts, models."""

import os
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import mirrormask as mm
from mirrormask.storage import read_contents
from mirrormask.storage.torch_types import TYPES, to_bits


def sparse(*shape, sparsity=0.9, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator)
    return torch.where(torch.rand(*shape, generator=generator) < sparsity, torch.zeros(()), values).to(dtype)


def same_bits(one, two):
    return one.dtype == two.dtype and one.shape == two.shape and np.array_equal(to_bits(one), to_bits(two))


def back(state, tmp_path, **options):
    path = tmp_path / "model.safetensors"
    mm.save(state, path, **options)
    loaded = mm.load(path)
    assert list(loaded) == list(state)
    return loaded


def encodings(path):
    entries = read_contents(path).entries
    return {name: entry if isinstance(entry, str) else entry.encoding.name for name, entry in entries.items()}


@pytest.mark.parametrize("name", list(TYPES))
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.97, 1.0])
def test_every_element_type_at_every_sparsity(name, sparsity, tmp_path):
    rng = np.random.default_rng(3)
    width = TYPES[name].itemsize
    raw = rng.integers(0, 2 if name == "BOOL" else 256, (900, width), np.uint8)  # random bits: NaNs of all kinds too
    raw[rng.random(900) < sparsity] = 0
    tensor = torch.from_numpy(raw.reshape(-1)).view(TYPES[name]).reshape(30, 30)
    loaded = back({"w": tensor}, tmp_path, signed_zeros=True)["w"]
    assert same_bits(loaded, tensor)


def test_negative_zero_nan_and_denormals_survive(tmp_path):
    special = torch.tensor([-0.0, float("nan"), -float("nan"), float("inf"), 1e-45, -1e-45])
    tensor = torch.zeros(3000)
    tensor[torch.arange(6) * 400] = special
    assert same_bits(back({"w": tensor}, tmp_path, signed_zeros=True)["w"], tensor)
    assert encodings(tmp_path / "model.safetensors") == {"w": "gaps"}


def test_zeros_lose_their_sign_unless_it_is_to_be_kept(tmp_path):
    mask = torch.rand(200, 200) < 0.1
    pruned = torch.randn(200, 200) * mask  # -1 * 0 is -0.0
    mm.save(
        {"w": pruned, "half": pruned.bfloat16(), "int": torch.tensor([-(2**31)], dtype=torch.int32)}, tmp_path / "x"
    )
    loaded = mm.load(tmp_path / "x")
    assert torch.equal(loaded["w"], pruned)
    assert not loaded["w"][~mask].signbit().any() and not loaded["half"][~mask].signbit().any()
    assert same_bits(loaded["w"], pruned + 0.0)
    assert loaded["int"].item() == -(2**31)  # the same bits, and no zero
    mm.save({"w": pruned}, tmp_path / "signed", signed_zeros=True)
    assert same_bits(mm.load(tmp_path / "signed")["w"], pruned)
    mm.save({"w": pruned}, tmp_path / "plain")
    assert os.path.getsize(tmp_path / "plain") < 0.35 * os.path.getsize(tmp_path / "signed")
    assert int(mm.predict_size({"w": pruned})) == os.path.getsize(tmp_path / "plain")
    assert torch.signbit(pruned).sum() > mask.sum()  # the model's own tensor is left as it is


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (1, 1, 1, 1), (7,), (5, 3, 2, 2, 2)])
def test_scalars_empty_and_odd_shapes(shape, tmp_path):
    for tensor in (torch.zeros(shape), torch.ones(shape, dtype=torch.float64), torch.full(shape, 3)):
        assert same_bits(back({"w": tensor}, tmp_path)["w"], tensor)


def test_an_empty_state_dict(tmp_path):
    assert back({}, tmp_path) == {}


def test_non_contiguous_tensors_and_views(tmp_path):
    base = sparse(40, 60)
    kernel = sparse(16, 8, 3, 3)
    state = {
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "expanded": base[:1].expand(40, 60),
        "channels_last": kernel.to(memory_format=torch.channels_last),
        "conj": torch.complex(base, base).conj(),
    }
    loaded = back(state, tmp_path)
    for name, tensor in state.items():
        assert same_bits(loaded[name], tensor.resolve_conj().contiguous()), name
        assert loaded[name].is_contiguous()


def test_names_of_every_kind_and_collisions_with_the_separator(tmp_path):
    names = [
        "",
        " ",
        "a.b",
        "ü",
        "重み",
        "🎭",
        'q"uote',
        "back\\slash",
        "new\nline",
        "a::values",
        "a",
        "a:::values",
        "a::gaps",
    ]
    state = {name: sparse(50, 50, seed=index) for index, name in enumerate(names)}
    state["a::values"] = torch.ones(50, 50)  # stored dense, under the very name that a's values would have
    loaded = back(state, tmp_path)
    assert all(same_bits(loaded[name], state[name]) for name in names)
    assert read_contents(tmp_path / "model.safetensors").metadata["mirrormask.separator"] == ":::"
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("a::values"), state["a::values"])


def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(50, 20)
            self.head = nn.Linear(20, 50, bias=False)
            self.head.weight = self.embedding.weight

    model = Tied()
    path = tmp_path / "tied.safetensors"
    mm.save(model, path)
    assert encodings(path) == {"embedding.weight": "dense", "head.weight": "embedding.weight"}
    assert os.path.getsize(path) < 1.5 * model.head.weight.nbytes
    state = mm.load(path)
    assert state["head.weight"] is state["embedding.weight"]
    other = mm.load(path, Tied())
    assert other.head.weight is other.embedding.weight
    assert torch.equal(other.head.weight, model.head.weight)


def test_a_slice_of_a_tensor_is_not_taken_for_a_tie(tmp_path):
    base = torch.arange(12.0)
    state = {"all": base, "head": base[:4], "same_start_other_shape": base.view(3, 4)}
    loaded = back(state, tmp_path)
    assert all(same_bits(loaded[name], state[name]) for name in state)


def test_the_same_memory_read_in_another_way_is_no_tie(tmp_path):
    z = torch.randn(300, dtype=torch.complex64)
    state = {"z": z, "conjugate": z.conj(), "imag": z.imag, "negative": z.conj().imag}
    loaded = back(state, tmp_path)
    assert all(same_bits(loaded[name], state[name].resolve_conj().resolve_neg()) for name in state)


def test_a_model_with_buffers_comes_back_into_a_model(tmp_path):
    def build():
        return nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))

    model = build()
    model(torch.randn(8, 3, 4, 4))  # running statistics that are not the initial ones
    with torch.no_grad():
        model[0].weight.copy_(sparse(32, 3, 3, 3))
        model[4].weight.copy_(sparse(10, 128, sparsity=0.98))
    path = tmp_path / "model.safetensors"
    mm.save(model, path, metadata={"method": "pilot", "run": {"seed": 1}})
    other = build()
    parameter = other[0].weight
    assert mm.load(path, other) is other
    assert other[0].weight is parameter, "filled in place, so that optimizers keep their references"
    for name, tensor in model.state_dict().items():
        assert same_bits(other.state_dict()[name], tensor)
    metadata = read_contents(path).metadata
    assert metadata["method"] == "pilot"
    assert metadata["run"] == '{"seed": 1}'
    assert metadata["mirrormask.library_version"] == mm.__version__
    assert metadata["mirrormask.format_version"] == "1"
    assert float(metadata["mirrormask.sparsity"]) == mm.sparsity(model).total


def test_a_model_that_does_not_fit_is_left_untouched(tmp_path):
    path = tmp_path / "model.safetensors"
    mm.save(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), path)
    wrong = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5))
    before = {name: tensor.clone() for name, tensor in wrong.state_dict().items()}
    with pytest.raises(ValueError, match=r"'1.weight' is \[2, 3\] in the file and \[5, 3\] in the model"):
        mm.load(path, wrong)
    assert all(torch.equal(before[name], tensor) for name, tensor in wrong.state_dict().items())
    with pytest.raises(ValueError, match=r"the model lacks \['1.bias', '1.weight'\]"):
        mm.load(path, nn.Sequential(nn.Linear(4, 3)))


class Holds(nn.Module):
    """A model of two buffers."""

    def __init__(self, values):
        super().__init__()
        self.register_buffer("first", torch.zeros(2))
        self.register_buffer("x", values)


class HoldsMore(Holds):
    def get_extra_state(self):
        return {"a": 1}


LOST = {
    "fractions": (torch.tensor([1.0, 2.5]), torch.int64),
    "NaN": (torch.tensor([1.0, float("nan")]), torch.int64),
    "large": (torch.tensor([300]), torch.int8),
    "no flags": (torch.tensor([2]), torch.bool),
    "signs": (torch.tensor([-1]), torch.uint64),
    "imaginary": (torch.tensor([1 + 2j]), torch.float32),
    "beyond half": (torch.tensor([1e6]), torch.float16),
    "beyond eight bits": (torch.tensor([1e6]), torch.float8_e4m3fn),
    "beyond float32": (torch.tensor([1e300], dtype=torch.float64), torch.float32),
}


@pytest.mark.parametrize("kind", LOST)
@pytest.mark.cases(len(LOST))
def test_numbers_that_the_model_cannot_hold_are_refused(kind, tmp_path):
    values, dtype = LOST[kind]
    mm.save({"first": torch.ones(2), "x": values}, tmp_path / "x")
    model = Holds(torch.zeros(values.shape, dtype=dtype))
    with pytest.raises(ValueError, match=rf"'x' holds .* numbers that {str(dtype)[6:]} of the model cannot"):
        mm.load(tmp_path / "x", model)
    assert float(model.first.sum()) == 0


def test_numbers_that_the_model_can_hold_are_converted(tmp_path):
    kinds = (torch.float64, torch.bfloat16, torch.float8_e5m2, torch.int8, torch.uint32, torch.uint64, torch.complex64)
    for dtype in (*kinds, torch.bool):
        values = torch.tensor([0.0, 1.0] if dtype is torch.bool else [0.0, 96.0])
        mm.save({"first": torch.ones(2), "x": values}, tmp_path / "x")
        loaded = mm.load(tmp_path / "x", Holds(torch.zeros(2, dtype=dtype))).x
        assert loaded.dtype == dtype and loaded.to(torch.complex64).tolist() == values.tolist()
    mm.save({"first": torch.ones(2), "x": torch.tensor([float("inf"), 1 / 3])}, tmp_path / "x")
    assert mm.load(tmp_path / "x", Holds(torch.zeros(2).half())).x.tolist() == [float("inf"), 0.333251953125]


def test_models_that_take_no_values_are_refused(tmp_path):
    mm.save({"first": torch.ones(2), "x": torch.ones(3)}, tmp_path / "x")
    with torch.device("meta"):
        empty = Holds(torch.zeros(3))
    model = HoldsMore(torch.zeros(3))
    for one, words in ((empty, r"on the meta device.*to_empty"), (model, "'_extra_state' of the model is a dict")):
        with pytest.raises(ValueError, match=words):
            mm.load(tmp_path / "x", one)
    assert float(model.first.sum()) == 0
    mm.save(nn.Linear(3, 2), tmp_path / "x")
    with pytest.raises(ValueError, match=r"weight, bias of the model has no shape yet; call the model with a batch"):
        mm.load(tmp_path / "x", nn.LazyLinear(2))
    with pytest.raises(TypeError, match=r"is a dict, not an nn\.Module"):
        mm.load(tmp_path / "x", {})


def test_two_weights_do_not_become_the_one_of_a_model_that_ties_them(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    mm.save(model, tmp_path / "x")
    tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    tied[1].weight = tied[0].weight
    before = tied[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"'0.weight' and '1.weight' are one tensor of the model, and differ"):
        mm.load(tmp_path / "x", tied)
    assert torch.equal(tied[0].weight, before)
    model[1].weight.data.copy_(model[0].weight)  # written twice, as other tools do
    mm.save(model, tmp_path / "x")
    assert torch.equal(mm.load(tmp_path / "x", tied)[1].weight, model[0].weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_in_a_smaller_type_if_asked(dtype, tmp_path):
    weight, bias = sparse(100, 100, sparsity=0.95), torch.randn(100)
    loaded = back({"weight": weight, "bias": bias}, tmp_path, dtype=dtype)
    assert same_bits(loaded["weight"], weight.to(dtype))
    assert same_bits(loaded["bias"], bias), "vectors keep their type"
    layer = mm.load(tmp_path / "model.safetensors", nn.Linear(100, 100))
    assert torch.equal(layer.weight, weight.to(dtype).float())


def test_float16_overflow_names_the_tensor(tmp_path):
    with pytest.raises(ValueError, match=r"'w' reaches 1e\+06, beyond torch.float16's 65504; use bfloat16"):
        mm.save({"w": torch.full((2, 2), 1e6)}, tmp_path / "x", dtype=torch.float16)
    with pytest.raises(ValueError, match=r"dtype=torch.int8 is not torch.bfloat16 or torch.float16"):
        mm.save({"w": torch.ones(2)}, tmp_path / "x", dtype=torch.int8)


def test_a_plain_safetensors_file_is_read(tmp_path):
    state = {"w": sparse(20, 20), "b": torch.arange(3), "half": torch.randn(5).bfloat16(), "s": torch.tensor(2.0)}
    save_file(state, tmp_path / "plain.safetensors", metadata={"format": "pt"})
    loaded = mm.load(tmp_path / "plain.safetensors")
    assert set(loaded) == set(state)
    assert all(same_bits(loaded[name], state[name]) for name in state)
    assert not read_contents(tmp_path / "plain.safetensors").compressed


def test_the_safetensors_package_opens_what_is_written(tmp_path):
    path = tmp_path / "model.safetensors"
    state = {
        "w": sparse(60, 60),
        "f8": sparse(60, 60, dtype=torch.float8_e4m3fn),
        "b": torch.randn(7),
        "i": torch.tensor(3),
    }
    mm.save(state, path)
    raw = load_file(path)
    assert set(raw) == {"w::coded", "f8::gaps", "f8::values", "b", "i"}
    assert torch.equal(raw["b"], state["b"])
    assert torch.equal(raw["f8::values"].float(), state["f8"][state["f8"].float() != 0].float())


@pytest.mark.long
def test_a_hundred_thousand_tensors(tmp_path):
    state = {f"layer.{index}": torch.full((2,), float(index)) for index in range(100_000)}
    loaded = back(state, tmp_path)
    assert all(torch.equal(loaded[name], state[name]) for name in list(state)[::997])


def test_memory_while_loading_is_the_dense_tensors_and_a_tenth(tmp_path):
    for sparsity in (0.0, 0.5, 0.9, 0.98):
        path = tmp_path / "big.safetensors"
        mm.save({"w": sparse(2000, 2000, sparsity=sparsity)}, path)
        tracemalloc.start()  # sees NumPy's and Python's memory, and the dense tensor is NumPy's
        mm.load(path)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most < 1.1 * 2000 * 2000 * 4, (sparsity, most)


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:torch.quantize_per_tensor")
def test_what_cannot_be_saved_says_what_to_do(tmp_path):
    cases = {
        "full_state_dict=True": _FakeDTensor(),
        "meta device": torch.empty(3, device="meta"),
        r"to_dense\(\)": torch.eye(3).to_sparse(),
        "sparse_csr": torch.eye(3).to_sparse_csr(),
        "complex128": torch.zeros(2, dtype=torch.complex128),
        "is a dict, not a tensor": {"extra": 1},
        r"to_padded_tensor\(0\.0\)": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "dequantize": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    }
    for remedy, value in cases.items():
        with pytest.raises(TypeError, match=f"'w'.*{remedy}"):
            mm.save({"w": value}, tmp_path / "x")
    with pytest.raises(TypeError, match="cannot save a int"):
        mm.save(3, tmp_path / "x")
    with pytest.raises(ValueError, match="cannot hold a tensor named"):
        mm.save({"__metadata__": torch.ones(1)}, tmp_path / "x")
    with pytest.raises(ValueError, match="cannot hold a tensor named"):
        mm.save({"\ud800": torch.ones(1)}, tmp_path / "x")
    with pytest.raises(ValueError, match="'weight' has no values yet, as its module is lazy"):
        mm.save(nn.LazyLinear(3), tmp_path / "x")
    with pytest.raises(TypeError, match="metadata is a list"):
        mm.save({"w": torch.ones(1)}, tmp_path / "x", metadata=[("a", 1)])
    for metadata in ({"mirrormask.index": "x"}, {"run": object()}, {"x": float("nan")}, {3: "x"}):
        with pytest.raises(ValueError, match="metadata"):
            mm.save({"w": torch.ones(1)}, tmp_path / "x", metadata=metadata)
    assert not (tmp_path / "x").exists()


class _FakeDTensor(torch.Tensor):
    """Has what tells a DTensor apart, without a process group."""

    def full_tensor(self):
        return self


def test_a_real_dtensor_says_what_to_do(tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        tensor = DTensor.from_local(torch.ones(4), mesh, [Replicate()])
        with pytest.raises(TypeError, match="'w' is a DTensor"):
            mm.save({"w": tensor}, tmp_path / "x")
    finally:
        dist.destroy_process_group()


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError):
        mm.load(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError):
        mm.save({"w": torch.ones(1)}, tmp_path / "no" / "x")
    with pytest.raises(OSError):
        mm.load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(mm.FormatError, match="not an ordinary file"):
        mm.load(tmp_path / "pipe")


def test_a_model_without_memory_for_values_is_refused(tmp_path):
    path = tmp_path / "layer.safetensors"
    mm.save(nn.Linear(3, 2), path)
    with pytest.raises(ValueError, match=r"weight, bias: on the meta device, where values are lost; call .*to_empty"):
        mm.load(path, nn.Linear(3, 2, device="meta"))
    with pytest.raises(TypeError, match=r"model is a class, Linear, not an nn.Module; pass an instance of it"):
        mm.load(path, nn.Linear)
