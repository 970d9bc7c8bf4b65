"""What surrounds a compiled model: bad input, batches, shapes, copies, the cache, what stays in PyTorch."""

import copy
import ctypes
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

import mirrormask as mm
from mirrormask.machine import cache as machine_cache
from mirrormask.runtime.graph import known
from mirrormask.runtime.schedule.tune import Tuner


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIRRORMASK_CACHE", str(tmp_path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A cache for tests that build one network with one setting after another: it is exported and generated once."""
    return tmp_path_factory.mktemp("cache")


def network() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, 2, 1),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    for m in model:
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            m.weight.data *= torch.rand_like(m.weight) > 0.7
    return model.eval()


def compiled(model: nn.Module, x: Tensor, **options) -> nn.Module:
    return mm.compile(model, x, tune=False, force=True, **options)


def agree(fast, model, *inputs, atol=1e-5):
    with torch.no_grad():
        torch.testing.assert_close(fast(*inputs), model(*inputs), rtol=0, atol=atol)


def test_any_batch_size_and_other_image_sizes():
    model = network()
    fast = compiled(model, torch.randn(2, 3, 16, 16))
    assert fast.report.compiled and not fast.report.left
    for shape in [(1, 3, 16, 16), (5, 3, 16, 16), (0, 3, 16, 16), (2, 3, 12, 20), (1, 3, 31, 7)]:
        agree(fast, model, torch.randn(shape))


@pytest.mark.parametrize("batch", [1, 3, 16, 130])
def test_an_mlp_over_images_takes_its_flatten_along(batch):
    model = nn.Sequential(nn.Flatten(), nn.Linear(24, 33), nn.ReLU(), nn.Linear(33, 7)).eval()
    fast = compiled(model, torch.randn(2, 1, 4, 6))
    assert not fast.report.left
    images = torch.randn(batch, 1, 4, 6)
    agree(fast, model, images)
    agree(fast, model, images.transpose(2, 3).contiguous().transpose(2, 3))  # strides of another layout
    agree(copy.deepcopy(fast), model, images)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):  # in the model's own words
        fast(torch.randn(batch, 1, 4, 5))


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 128, 200])
def test_rows_of_any_number_and_leading_shape(rows):
    model = nn.Sequential(nn.Linear(20, 33), nn.GELU(), nn.Linear(33, 7)).eval()
    fast = compiled(model, torch.randn(4, 20))
    agree(fast, model, torch.randn(rows, 20))
    agree(compiled(model, torch.randn(2, 3, 20)), model, torch.randn(3, rows, 20))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("whose", ["torch's threads", "own threads"])
@pytest.mark.cases(3)
def test_threads_share_images_and_channels(threads, batch, whose, folder, monkeypatch):
    monkeypatch.setenv("MIRRORMASK_CACHE", str(folder))
    if whose == "own threads":
        monkeypatch.setattr("mirrormask.runtime.schedule.plan.openmp", lambda: None)
    model = network()
    x = torch.randn(batch, 3, 16, 16)
    torch.set_num_threads(threads)
    fast = compiled(model, x)
    region = fast.regions[0]
    plan = region.plan_for(batch)
    for plan.shares in {False, threads > 1}:
        region.core._calls.clear()
        fast._quick.clear()
        for _ in range(20):
            agree(fast, model, x)


@pytest.mark.parametrize("rows", [40, 64, 100, 200])
@pytest.mark.cases(1)
def test_threads_take_rows_of_their_own_where_that_is_worth_waking_them(rows, monkeypatch):
    torch.set_num_threads(2)
    model, x = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 8)).eval(), torch.randn(rows, 24)
    found = {}
    for work in (0.0, float("inf")):
        monkeypatch.setattr("mirrormask.runtime.schedule.runner.LEAST_WORK", work)
        fast = compiled(model, x)
        (region,) = fast.regions
        found[work] = -(-rows // region.tokens(rows))
        agree(fast, model, x)
    assert found[0.0] >= 2
    assert found[float("inf")] == -(-rows // region.core.most_tokens)


def test_a_team_that_is_smaller_than_asked_for_leaves_nothing_out(monkeypatch):
    from mirrormask.machine.openmp import openmp

    threads = openmp()
    if threads is None:
        pytest.skip("this torch's threads cannot be called")
    model, x = network(), torch.randn(4, 3, 16, 16)
    torch.set_num_threads(2)
    fast = compiled(model, x)
    one = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 1)  # what OpenMP says of a team within a team
    entries = (ctypes.c_void_p * 3).from_address(threads.entries)
    kept = list(entries)
    entries[2] = ctypes.cast(one, ctypes.c_void_p).value
    try:
        agree(fast, model, x)
        agree(fast, model, x[:1])
    finally:
        entries[:] = kept


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.long
def test_a_forked_process_has_no_team_and_needs_none():
    script = """
import os, torch, mirrormask as mm
torch.set_num_threads(2)
model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 8, 3)).eval()
x = torch.randn(4, 3, 16, 16)
fast = mm.compile(model, x, tune=False, force=True)
for region in fast.regions:
    region.plan_for(1).shares = True
expected = [fast(x), fast(x[:1]), fast(x), fast(x[:1])]
child = os.fork()
if not child:
    same = all(torch.equal(fast(given), wanted) for given, wanted in zip([x, x[:1], x, x[:1]], expected))
    again = fast(x[:3])  # a batch that the parent never had
    os._exit(0 if same and torch.equal(again, expected[0][:3]) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(fast(x), expected[0])
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120)


def test_more_shapes_and_threads_than_are_kept(monkeypatch):
    monkeypatch.setattr("mirrormask.runtime.schedule.runner.MOST_SHAPES", 2)
    monkeypatch.setattr("mirrormask.runtime.schedule.runner.MAX_THREADS", 3)
    model = network()
    fast = compiled(model, torch.randn(1, 3, 8, 8))
    torch.set_num_threads(5)
    for size in (8, 9, 10, 11, 8):
        agree(fast, model, torch.randn(4, 3, size, size))
    assert len(fast.regions[0].core._sized) == 2


def test_threads_of_the_caller_may_share_a_compiled_model():
    model, x = network(), torch.randn(4, 2, 3, 16, 16)
    fast = compiled(model, x[0])
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: fast(x[i % 4]), range(200)))
    assert all(torch.equal(result, fast(x[i % 4])) for i, result in enumerate(results))


def test_non_contiguous_and_channels_last_inputs():
    model = network()
    fast = compiled(model, torch.randn(2, 3, 16, 16))
    agree(fast, model, torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last))
    agree(fast, model, torch.randn(2, 3, 16, 32)[..., ::2])


def test_the_short_way_of_small_calls_gives_the_same_and_checks_as_much():
    model = network()
    fast = compiled(model, torch.randn(2, 3, 16, 16))
    x = torch.randn(1, 3, 16, 16)
    torch.set_num_threads(1)
    first = fast(x)
    assert x.shape in fast._quick
    again = fast(x)
    assert torch.equal(first, again) and first.data_ptr() != again.data_ptr(), "results are the caller's own"
    agree(fast, model, x.to(memory_format=torch.channels_last))
    agree(fast, model, torch.randn(1, 3, 16, 32)[..., ::2])
    for bad in (x.double(), x.to("meta"), x.clone().requires_grad_()):
        with pytest.raises((RuntimeError, ValueError)):
            fast(bad)
    for threads in (2, 1):
        torch.set_num_threads(threads)
        agree(fast, model, x)
    other = pickle.loads(pickle.dumps(fast))
    assert not other._quick and torch.equal(other(x), first) and torch.equal(other(x), first)


def test_copies_and_pickles_give_the_same_numbers():
    x = torch.randn(2, 3, 16, 16)
    fast = compiled(network(), x)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(other(x), fast(x))
        assert str(other.report) == str(fast.report)


def test_copies_of_dense_classifiers_keep_their_alignment():
    x = torch.randn(1, 64)
    fast = compiled(nn.Sequential(nn.Linear(64, 37), nn.ReLU(), nn.Linear(37, 200)).eval(), x)
    copies = [pickle.loads(pickle.dumps(fast)) for _ in range(8)]
    assert all(torch.equal(other(x), fast(x)) for other in copies)


class Attention(nn.Module):
    """Linear layers around an operation that the runtime does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k.cumsum(1), v))


def test_unknown_operations_stay_in_pytorch_and_the_report_says_why():
    model = Attention().eval()
    fast = compiled(model, torch.randn(2, 5, 16))
    assert {row.layer for row in fast.report.layers} >= {"qkv", "out"}
    assert any("cumsum" in name for name, _ in fast.report.left)
    assert "stays in PyTorch" in str(fast.report)
    for shape in [(2, 5, 16), (3, 5, 16), (1, 9, 16)]:
        agree(fast, model, torch.randn(shape))
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        agree(other, model, torch.randn(2, 5, 16))


class Two(nn.Module):
    """A model of two inputs that is one region."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(x + self.conv(y))


def test_two_inputs_must_fit_each_other():
    model = Two().eval()
    fast = mm.compile(model, (torch.randn(2, 4, 9, 9), torch.randn(2, 3, 9, 9)), tune=False, force=True)
    assert len(fast.regions) == 1
    for batch, size in [(2, 9), (1, 9), (3, 20)]:
        agree(fast, model, torch.randn(batch, 4, size, size), torch.randn(batch, 3, size, size))
    agree(fast, model, torch.randn(2, 4, 9, 9), torch.randn(1, 3, 9, 9))  # broadcast, as the model does
    for x, y in [((2, 4, 9, 9), (2, 3, 8, 9)), ((2, 4, 9, 9), (2, 4, 9, 9))]:
        with pytest.raises(RuntimeError, match=r"must match|channels"):
            fast(torch.randn(x), torch.randn(y))


def test_inputs_without_a_batch_dimension():
    linear = nn.Linear(40, 3).eval()
    fast = compiled(linear, torch.randn(40))
    agree(fast, linear, torch.randn(40))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        fast(torch.randn(7))
    for model in (nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1))):
        fast = mm.compile(model.eval(), torch.randn(3, 9, 9), force=True, tune=False)
        agree(fast, model, torch.randn(3, 9, 9))


class Named(nn.Module):
    """A model that gives a dictionary of two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu(self.a(x))
        return {"hidden": hidden, "out": self.b(hidden)}


def test_outputs_keep_their_structure():
    model = Named().eval()
    fast = compiled(model, torch.randn(3, 5))
    agree(fast, model, torch.randn(3, 5))
    agree(fast, model, torch.randn(7, 5))
    single = compiled(nn.Sequential(model.a, Wrapped(model.b)).eval(), torch.randn(3, 5))
    assert list(single(torch.randn(3, 5))) == ["out"]


class Wrapped(nn.Module):
    """Gives its one tensor in a dictionary."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.inner(x)}


def test_a_model_without_layers_comes_back_as_it_was():
    model = nn.Sequential(nn.Sigmoid()).eval()
    fast = mm.compile(model, torch.randn(3, 4))
    assert not fast.report.compiled and "no layer" in fast.report.reason
    agree(fast, model, torch.randn(3, 4))


def test_the_model_is_left_as_it_was():
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compiled(model, torch.randn(2, 3, 16, 16))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [type(m) for m in model] == [type(m) for m in network()]
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.long
def test_a_second_build_comes_from_the_cache_and_damage_is_noticed(tmp_path):
    model, x = network(), torch.randn(2, 3, 16, 16)
    first = mm.compile(model, x, force=True)
    assert not first.report.cached
    assert mm.compile(model, x, force=True).report.cached
    plans = {path: path.read_bytes() for path in tmp_path.glob("*.json")}
    assert len(plans) == 3, "the model's structure, what was measured for its layers, and the report"
    for plan, whole in plans.items():
        for damaged in (b"", whole[:-20], whole.replace(b"0", b"1"), b"[]", b'{"key": 1}', b"\xff\xfe"):
            plan.write_bytes(damaged)
            fast = mm.compile(model, x, force=True)
            assert fast.report.cached == (b'"layers"' not in whole)
            agree(fast, model, x)
            assert known.load(plan.stem) is not None, "it was made again"
    for file in tmp_path.glob("*.o"):
        data = file.read_bytes()
        assert machine_cache.load_bytes(file.stem) == data[32:]
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert machine_cache.load_bytes(file.stem) is None


def test_a_changed_mask_is_another_cache_entry():
    model, x = network(), torch.randn(2, 3, 16, 16)
    mm.compile(model, x, force=True)
    model[4].weight.data[0] = 0
    fast = mm.compile(model, x, force=True)
    assert not fast.report.cached
    agree(fast, model, x)


def test_what_is_not_a_number_goes_where_weights_lead():
    layer = nn.Linear(4, 3, bias=False).eval()
    layer.weight.data = torch.tensor([[1.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 0, 0]])
    fast = compiled(layer, torch.randn(2, 4))
    bad = torch.tensor([[float("nan"), float("inf"), 1.0, 1.0], [1.0, 2.0, float("nan"), 0.0]])
    got = fast(bad)
    assert torch.isnan(got[0, 0]) and torch.isposinf(got[0, 1])
    # Where only zeros meet them, they stay out; dense PyTorch would have made NaN of 0 * NaN.
    assert got[0, 2] == 0 and torch.equal(got[1], torch.tensor([1.0, 4.0, 0.0]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_a_number_through_convolution_relu_and_pooling(value):
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)).eval()
    x = torch.randn(1, 2, 14, 14)
    x[0, 0, 5, 6] = value
    fast = compiled(model, torch.randn(1, 2, 14, 14))
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("batch", [1, 3])
def test_kernels_that_filter_rows_do_not_spread_what_is_not_a_number(monkeypatch, value, batch):
    monkeypatch.setattr(Tuner, "__call__", lambda _, problem: filtering_choice(problem))
    model = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)).eval()
    x = torch.randn(batch, 3, 56, 56)
    fast = compiled(model, x)
    assert [row.kernel.split()[0] for row in fast.report.layers].count("winograd") == 2
    agree(fast, model, x)
    spoiled = x.clone()
    spoiled[-1, 1, 30, 6] = value
    with torch.no_grad():
        expected = model(spoiled)
    # A contiguous tensor goes the short way, another one does not.
    for given in (spoiled, spoiled.mT.contiguous().mT):
        got = fast(given)
        assert torch.equal(got.isfinite(), expected.isfinite())
        torch.testing.assert_close(got[..., :12, :], expected[..., :12, :], rtol=1e-5, atol=1e-5)
        agree(fast, model, x)


def filtering_choice(problem):
    found = list(problem.candidates())
    return next((choice for choice in found if choice.kernel == "winograd"), found[0])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda m, x: (m.train(), x), ValueError, "eval"),
        (lambda m, x: (m.double(), x), ValueError, "float32"),
        (lambda m, x: (m.to("meta"), x), ValueError, "meta"),
        (lambda m, x: (m, x.requires_grad_()), ValueError, "detach"),
        (lambda m, x: (m, x.to("meta")), ValueError, "cpu"),
        (lambda m, x: (m, [x]), ValueError, "cannot run the example"),
        (lambda m, x: (m, (x, x)), TypeError, "does not take the example"),
        (lambda m, x: (m, (3,)), TypeError, "no tensor"),
        (lambda m, x: (m, x[:, :2]), ValueError, "to have 3 channels"),
        (lambda m, x: (m, x.double()), ValueError, "cannot run the example"),
        (lambda m, x: ("model", x), TypeError, "Module"),
    ],
)
def test_bad_models_and_examples(change, error, words):
    with pytest.raises(error, match=words):
        mm.compile(*change(network(), torch.randn(2, 3, 16, 16)))


def test_bad_options():
    with pytest.raises(ValueError, match="precision 'int8'"):
        mm.compile(network(), torch.randn(2, 3, 16, 16), precision="int8")
    with pytest.raises(ValueError, match="instruction set"):
        mm.compile(network(), torch.randn(2, 3, 16, 16), instruction_set="mmx")


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda x: x.double(), RuntimeError, "double"),
        (lambda x: x.to("meta"), ValueError, "cpu"),
        (lambda x: x.requires_grad_(), ValueError, "detach"),
        (lambda x: x[:, :2], RuntimeError, "channels"),
        (lambda x: x.numpy(), TypeError, "ndarray"),
    ],
)
def test_bad_calls(make, error, words):
    model = network()
    fast = compiled(model, torch.randn(2, 3, 16, 16))
    with pytest.raises(error, match=words):
        fast(make(torch.randn(2, 3, 16, 16)))
    with pytest.raises(TypeError, match="too many positional"):
        fast(torch.randn(2, 3, 16, 16), torch.randn(1))
    del model
    with pytest.raises(ValueError, match=r"float32 \(2, 4, 16, 16\) does not fit .* is gone"):
        fast(torch.randn(2, 4, 16, 16))
