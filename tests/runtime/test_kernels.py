"""Every kernel a tuner may choose, with every tile and block, against eager PyTorch on each instruction set."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mirrormask as mm
from mirrormask.machine.targets import EMULATED_FP16, TARGETS, Target, available_targets, best_target
from mirrormask.runtime.graph.capture import capture
from mirrormask.runtime.kernels import shared, tables, winograd
from mirrormask.runtime.schedule.lower import lower
from mirrormask.runtime.schedule.problem import Choice, Problem
from mirrormask.runtime.schedule.vectors import VectorProblem

EVERY = available_targets()
if "avx512" in {target.name for target in EVERY}:
    EVERY = (*EVERY, EMULATED_FP16)

#: The layouts and tiles of AVX-512 on processors without it: LLVM makes two registers of each vector.
WIDE = Target("avx512-in-halves", 16, 32, TARGETS["avx2"].needs, "x86_64")
HALVED = (WIDE,) if best_target().name == "avx2" else ()

#: (outputs, inputs, kernel, stride, padding, dilation, groups), size
LAYERS = [
    ((6, 8, 3, 1, 1, 1, 1), (28, 28)),
    ((5, 8, 3, 1, 1, 1, 1), (14, 14)),
    ((7, 8, 3, 1, 1, 1, 1), (7, 7)),
    ((6, 8, 3, 2, 1, 1, 1), (28, 27)),
    ((6, 8, 1, 2, 0, 1, 1), (14, 14)),
    ((9, 8, 1, 1, 0, 1, 1), (20, 33)),
    ((8, 8, 3, 1, 1, 1, 8), (14, 14)),
    ((8, 4, 5, 1, 2, 1, 2), (16, 16)),
    ((6, 3, 7, 2, 3, 1, 1), (32, 32)),
    ((4, 3, 3, 1, 0, 2, 1), (17, 19)),
]


def single_row_kernels(target: Target) -> set[str]:
    wide = target.name.startswith("avx512")
    return {"panel", "shared" if wide else "sell"} | ({"tables"} if tables.serves(target) else set())


def choices(problem: Problem) -> list[Choice]:
    """What the tuner would measure, and the same with blocks of one and three planes."""
    found = list(dict.fromkeys(problem.candidates()))
    if isinstance(problem, VectorProblem):
        kernels = single_row_kernels(problem.target)
        missing = kernels - {choice.kernel for choice in found}
        return [*found, *(Choice(kernel, block=150) for kernel in missing)]
    sparse = [choice for choice in found if choice.kernel in ("aligned", "direct")]
    blocked = [dataclasses.replace(choice, block=n) for choice in sparse for n in (1, 3)]
    return list(dict.fromkeys(found + blocked))


def outputs(model: nn.Module, x: Tensor, target: Target) -> list[tuple[Choice, Tensor]]:
    """The output of the model's only layer with each choice."""
    with torch.no_grad():
        captured = capture(model, (x,))
    graph = captured.regions[captured.whole]
    tokens = len(x) if graph.rows else 1
    seen: list[Choice] = []

    def note(problem: Problem) -> Choice:
        seen.extend(choices(problem))
        return seen[0]

    lower(graph, target, 1, note, tokens)
    results = []
    for choice in seen:
        plan = lower(graph, target, 1, lambda _, choice=choice: choice, tokens)
        out = torch.full((len(x), *plan.outputs[0]), float("nan"))
        addresses = np.array([x.data_ptr(), out.data_ptr()], np.int64)
        for _ in range(2):  # the second run finds the first one's memory
            plan.run(addresses.ctypes.data, len(x) // tokens)
        results.append((choice, out))
    return results


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIRRORMASK_CACHE", str(tmp_path))


def check(model: nn.Module, x: Tensor, target: Target, sparsity: float) -> set[str]:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.data *= torch.rand_like(module.weight) >= sparsity
    with torch.no_grad():
        expected = model.eval()(x)
    kernels = set()
    half = 3e-3 * float(expected.abs().max())
    for choice, got in outputs(model, x, target):
        kernels.add(choice.kernel)
        atol = half if target.half else 4e-6 if choice.kernel == "winograd" else 2e-6
        torch.testing.assert_close(got, expected, rtol=0, atol=atol, msg=lambda m, choice=choice: f"{choice}: {m}")
    return kernels


@pytest.mark.parametrize("target", (*EVERY, *HALVED), ids=lambda target: target.name)
@pytest.mark.parametrize(("layer", "size"), LAYERS, ids=str)
@pytest.mark.parametrize("sparsity", [0.3, 0.9])
def test_convolutions(target, layer, size, sparsity):
    outputs_, inputs, kernel, stride, padding, dilation, groups = layer
    conv = nn.Conv2d(inputs, outputs_, kernel, stride, padding, dilation, groups)
    kernels = check(nn.Sequential(conv, nn.ReLU()), torch.randn(2, inputs, *size), target, sparsity)
    assert ("dense" in kernels) == (sparsity < 0.7 and groups == 1)
    rows_follow = kernel > 1 and dilation == 1
    assert ("winograd" in kernels) == ("dense" in kernels and rows_follow and not target.half)


@pytest.mark.parametrize(("rows", "taps"), [(2, 2), (2, 3), (4, 3), (4, 4), (5, 3), (2, 6), (7, 1), (1, 1)])
def test_minimal_filtering_is_a_correlation(rows, taps):
    a, g, b = winograd.matrices(rows, taps)
    generator = np.random.default_rng(0)
    data, taps_ = generator.standard_normal(rows + taps - 1), generator.standard_normal(taps)
    np.testing.assert_allclose(a @ ((g @ taps_) * (b @ data)), np.correlate(data, taps_), atol=1e-13)


def test_a_filter_with_too_many_points_is_refused():
    with pytest.raises(ValueError, match="8 points, and there are 7"):
        winograd.matrices(6, 3)


def test_a_layer_with_few_zeros_is_not_tried_with_sparse_kernels():
    for sparsity, sparse in [(0.0, False), (0.1, False), (0.3, True)]:
        conv = nn.Conv2d(8, 6, 3, padding=1)
        kernels = check(conv, torch.randn(1, 8, 14, 14), available_targets()[0], sparsity)
        assert ("aligned" in kernels) == sparse


@pytest.mark.parametrize("target", EVERY, ids=lambda target: target.name)
@pytest.mark.parametrize("tokens", [16, 48, 128])
def test_linear_layers_over_tokens(target, tokens):
    tokens *= 2 if target.half else 1  # whole vectors of them
    check(nn.Sequential(nn.Linear(30, 21), nn.ReLU()), torch.randn(2 * tokens, 30)[:tokens], target, 0.8)


@pytest.mark.parametrize("target", EVERY, ids=lambda target: target.name)
@pytest.mark.parametrize("features", [(1, 1), (7, 40), (33, 5), (70, 130), (300, 270), (100, 17)], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.98, 1.0])
def test_linear_layers_on_one_row(target, features, sparsity):
    model = nn.Sequential(nn.Linear(*features), nn.ReLU())
    kernels = check(model, torch.randn(1, features[0]), target, sparsity)
    assert {name for name in kernels if not name.endswith("levels")} == single_row_kernels(target)


@pytest.mark.parametrize("target", EVERY, ids=lambda target: target.name)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_on_one_row_too_what_is_not_a_number_goes_where_weights_lead(target, value):
    layer = nn.Linear(90, 150)
    layer.weight.data *= torch.rand_like(layer.weight) >= 0.9
    layer.weight.data[0, 40] = 1.0
    x = torch.randn(1, 90)
    x[0, 40] = value
    clean = torch.where(x.isfinite(), x, 0.0)
    with torch.no_grad():
        expected = layer.eval()(clean)
        expected += torch.where(layer.weight[:, 40] == 0, 0.0, layer.weight[:, 40] * value)
    for choice, got in outputs(layer, x, target):
        if choice.kernel != "panel":  # which multiplies zeros, as PyTorch does
            torch.testing.assert_close(got, expected, rtol=0, atol=5e-3 if target.half else 2e-6, equal_nan=True)


def layer_of(made: dict[str, np.ndarray], outputs: int, terms: int) -> np.ndarray:
    """What the constants of :func:`tables.pack` multiply with, slot by slot."""
    again = np.zeros((-(-outputs // 8) * 8, terms + 4))
    weights, windows = made["weights"].reshape(-1, 4, 8), made["windows"].reshape(-1, 4, 2)
    for group, first in enumerate(made["starts"][:-1]):
        for number in range(first, made["starts"][group + 1]):
            for s in range(4):
                for lane in range(8):
                    place = made["places"].reshape(-1, 8)[number, lane] >> 4 * s & 15
                    column = windows[number, s, place // 4] + place % 4
                    again[made["rows"][8 * group + lane], column] += weights[number, s, lane]
    return again


def test_tables_that_an_eye_can_check():
    """Two rows in two slices: the windows that serve both rows come first, and the second window the row left over."""
    row, column = np.array([0, 0, 1, 1]), np.array([1, 9, 8, 14])
    value = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    made = tables.pack(np.array([2, 2]), lambda: [(row, column, value)], 16, lambda size: np.zeros(size, np.float32))
    assert made["starts"].tolist() == [0, 1] and made["windows"].tolist()[:4] == [6, 0, 0, 11]
    assert made["weights"].reshape(4, 8)[:, :2].tolist() == [[2, 3], [1, 4], [0, 0], [0, 0]]
    assert made["places"].tolist()[:2] == [3 | 1 << 4, 2 | 7 << 4]  # 9 is place 3 from 6 on, 14 place 4 + 3 from 11 on


def test_tables_hold_each_nonzero_once(monkeypatch):
    generator = np.random.default_rng(0)
    for outputs_, terms, sparsity in [(40, 90, 0.8), (130, 20, 0.5), (64, 33, 0.98), (9, 3, 0), (5, 1, 0), (8, 64, 1)]:
        dense = generator.standard_normal((outputs_, terms)).astype(np.float32)
        dense *= generator.random(dense.shape) >= sparsity
        row, column = np.nonzero(dense)
        half = np.searchsorted(row, outputs_ // 2)
        cut = [(row[p], column[p], dense[row[p], column[p]]) for p in (slice(None, half), slice(half, None))]
        counts, zeros = np.count_nonzero(dense, axis=1), lambda size: np.zeros(size, np.float32)
        made = tables.pack(counts, lambda cut=cut: cut, terms, zeros)
        again = layer_of(made, outputs_, terms)
        assert np.array_equal(again[:outputs_, :terms], dense) and not again[outputs_:].any()
        assert np.count_nonzero(made["weights"]) == len(row)
        for name, value in (("_rows_in", tables._ROWS.take), ("PART", 1)):  # an older NumPy; a group at a time
            monkeypatch.setattr(tables, name, value)
            other = tables.pack(counts, lambda cut=cut: cut, terms, zeros)
            assert all(np.array_equal(made[name], other[name]) for name in made)
        monkeypatch.undo()


def test_few_slots_of_tables_are_empty():
    """What the kernel's time follows from; it is a little more than its docstring says, for the layer is smaller."""
    generator = np.random.default_rng(0)
    for sparsity, most in ((0.8, 1.4), (0.9, 1.7), (0.95, 2.2)):
        row, column = np.nonzero(generator.random((256, 1024)) >= sparsity)
        counts = np.bincount(row, minlength=256)
        parts = [(row, column, np.ones(len(row), np.float32))]
        made = tables.pack(counts, lambda parts=parts: parts, 1024, lambda size: np.zeros(size, np.float32))
        assert made["weights"].size < most * len(row)


@pytest.mark.skipif(not tables.serves(best_target()), reason="needs AVX2's permutation")
@pytest.mark.parametrize("stored", ["int8", "fp16"])
@pytest.mark.parametrize("kernel", ["tables ", ""])
def test_narrow_weights_give_what_the_rounded_layer_gives(kernel, stored):
    torch.manual_seed(0)
    layer = nn.Linear(70, 45).eval()
    layer.weight.data *= torch.rand_like(layer.weight) >= 0.8
    layer.weight.data[7] = 0
    mm.quantize(layer) if stored == "int8" else layer.half().float()
    name = kernel + {"int8": "levels", "fp16": "halves"}[stored]
    for x in (torch.randn(1, 70), torch.full((1, 70), float("inf"))):
        with torch.no_grad():
            used = layer.weight != 0
            expected = torch.where(used, layer.weight * x, torch.zeros(())).sum(1) + layer.bias
        found = {choice.kernel: got for choice, got in outputs(layer, x, best_target())}
        torch.testing.assert_close(found[name][0], expected, rtol=0, atol=2e-6, equal_nan=True)


@pytest.mark.skipif(not tables.serves(best_target()), reason="needs AVX2's permutation")
def test_tables_give_the_same_bits_on_any_number_of_threads():
    layer = nn.Linear(300, 1000).eval()
    layer.weight.data *= torch.rand_like(layer.weight) >= 0.9
    x = torch.randn(1, 300)
    with torch.no_grad():
        captured = capture(layer, (x,))
    graph, results = captured.regions[captured.whole], []
    for threads in (1, 2, 3):
        plan = lower(graph, best_target(), threads, lambda _: Choice("tables"), 1)
        out = torch.empty(1, 1000)
        addresses = np.array([x.data_ptr(), out.data_ptr()], np.int64)
        plan.run(addresses.ctypes.data, 1)
        results.append(out)
    assert all(torch.equal(results[0], out) for out in results[1:])


def test_shared_windows_hold_each_nonzero_once():
    """A layer's slots and rest, put back together, are the layer."""
    generator = np.random.default_rng(0)
    for outputs_, terms, sparsity, slices in [(40, 90, 0.8, 1.2), (130, 20, 0.5, 2), (64, 33, 0.98, 1), (16, 64, 1, 3)]:
        dense = generator.standard_normal((outputs_, terms)).astype(np.float32)
        dense *= generator.random(dense.shape) >= sparsity
        for lanes, groups in ((16, 8), (16, 4), (32, 2)):
            made = shared.pack(dense, lanes, groups, slices)
            again = np.zeros((-(-outputs_ // (groups * lanes)) * groups * lanes, terms + 2 * lanes), np.float32)
            share = 4 if lanes == 16 else 2
            places = made["indices"].view(np.uint8).reshape(-1, groups // share, lanes, share).transpose(0, 1, 3, 2)
            for block in range(len(made["starts"]) - 1):
                for s in range(made["starts"][block], made["starts"][block + 1]):
                    rows = block * groups * lanes + np.arange(groups * lanes)
                    columns = made["positions"][s] + places[s].reshape(-1)
                    assert columns.max() < max(terms, 2 * lanes)
                    again[rows, columns] += made["weights"][s].reshape(-1)
                for k in range(made["rest_starts"][block], made["rest_starts"][block + 1]):
                    row = block * groups * lanes + made["rest_rows"][k]
                    again[row, made["rest_columns"][k]] += made["rest_weights"][k]
            assert np.array_equal(again[:outputs_, :terms], dense) and not again[outputs_:].any()
            assert np.count_nonzero(made["weights"]) + len(made["rest_rows"]) == np.count_nonzero(dense)
