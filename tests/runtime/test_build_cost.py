"""What a build takes: code whose length does not grow with the maps, and memory that does not with the candidates."""

import tracemalloc

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mirrormask.machine.targets import FP16, TARGETS, Target, available_targets
from mirrormask.runtime.graph.capture import capture
from mirrormask.runtime.graph.ir import Node, Weight
from mirrormask.runtime.kernels import pool, relayout, shared
from mirrormask.runtime.kernels.layout import Layout, map_layout
from mirrormask.runtime.kernels.pool import PoolSpec
from mirrormask.runtime.kernels.relayout import RelayoutSpec, plain_layout
from mirrormask.runtime.schedule import filtering, nonzeros, pack
from mirrormask.runtime.schedule.lower import lower
from mirrormask.runtime.schedule.problem import MOST_TRIED, Choice, Fused, sampled
from mirrormask.runtime.schedule.taps import Taps
from mirrormask.runtime.schedule.tune import Tuner, default_choice
from mirrormask.runtime.schedule.vectors import VectorProblem

EVERY = available_targets()
per_target = pytest.mark.parametrize("target", EVERY, ids=lambda target: target.name)
#: Characters of IR by which the digits of larger numbers may lengthen it.
DIGITS = 1500
#: (kernel, stride, padding) of a row.
WINDOWS = [(2, 2, 0), (3, 1, 1), (3, 2, 1), (5, 3, 2), (40, 1, 20), (600, 600, 0), (3500, 700, 800)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIRRORMASK_CACHE", str(tmp_path))


def difference(model: nn.Module, x: Tensor, target: Target, tokens: int = 1) -> float:
    """Between the first guess of a plan and eager PyTorch, relative to the largest output."""
    with torch.no_grad():
        captured, expected = capture(model.eval(), (x,)), model(x)
    plan = lower(captured.regions[captured.whole], target, 1, default_choice, tokens)
    result = torch.full((len(x), *plan.outputs[0]), float("nan"))
    addresses = np.array([x.data_ptr(), result.data_ptr()], np.int64)
    for _ in range(2):  # the second run finds the first one's memory
        plan.run(addresses.ctypes.data, len(x) // tokens)
    return float((result.reshape(expected.shape) - expected).abs().max() / expected.abs().max())


def flat(width: int) -> Layout:
    return plain_layout(1, 1, width)


def planes(width: int, target: Target) -> Layout:
    return map_layout(1, 1, width, target.lanes, halo=0)


def copies(width: int, target: Target) -> list[RelayoutSpec]:
    """In and out of the arena, into phases, and to and from the columns of rows."""
    outer, inner = flat(width), planes(width, target)
    half, third = planes(-(-width // 2), target), planes(-(-width // 3), target)
    wide = planes(width // 64 * 64, target)
    return [
        RelayoutSpec(target, outer, outer, True, False),
        RelayoutSpec(target, outer, inner, True, False),
        RelayoutSpec(target, inner, outer, False, True),
        RelayoutSpec(target, outer, half, True, False, (1, 2), ((0, 0), (0, 1))),
        RelayoutSpec(target, inner, third, False, False, (1, 3), ((0, 0), (0, 1), (0, 2))),
        RelayoutSpec(target, outer, wide, True, False, transposed=30),
        RelayoutSpec(target, wide, outer, False, True, transposed=30),
    ]


def pools(width: int, target: Target) -> list[PoolSpec]:
    found = []
    for kernel, stride, padding in WINDOWS:
        out = planes((width + 2 * padding - kernel) // stride + 1, target)
        settings = (planes(width, target), out, (1, kernel), (1, stride), (0, padding))
        found += [PoolSpec(target, *settings, mean, counted) for mean, counted in ((False, True), (True, False))]
    return found


@per_target
@pytest.mark.parametrize(("specs", "emit"), [(copies, relayout.emit), (pools, pool.emit)], ids=["copies", "pools"])
def test_code_does_not_grow_with_a_row(target, specs, emit):
    # As many vectors are left over from whole rounds in both.
    for narrow, wide in zip(specs(8_003, target), specs(104_003, target), strict=True):
        short, long = len(emit(narrow, "k")), len(emit(wide, "k"))
        assert abs(long - short) <= DIGITS, wide
        assert long < 200_000, wide


@per_target
def test_a_pools_stack_does_not_grow_with_a_row(target):
    for spec in pools(100_003, target):
        sizes = [int(part.split(" x ")[0]) for part in pool.emit(spec, "k").split("alloca [")[1:]]
        assert sum(sizes) <= 2 * pool.MOST_SCRATCH, spec


@per_target
@pytest.mark.parametrize("width", [8_000, 8_003, 100_000])
def test_a_wide_row_is_read_and_written(target, width):
    assert difference(nn.Linear(width, 3), torch.randn(2, width), target) < 1e-5
    assert difference(nn.Linear(3, width), torch.randn(2, 3), target) < 1e-5


@per_target
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (5, 3, 0), (4, 4, 2)])
def test_a_long_signal(target, kernel, stride, padding):
    model = nn.Sequential(nn.Conv1d(3, 4, kernel, stride, padding), nn.ReLU(), nn.Conv1d(4, 2, 3, padding=1))
    assert difference(model, torch.randn(2, 3, 8_000), target) < 1e-5


@per_target
@pytest.mark.parametrize(
    ("kernel", "stride", "size"), [(16, 16, (64, 96)), (5, 4, (33, 30)), ((4, 7), (4, 5), (17, 28))]
)
def test_many_phases_are_a_loop(target, kernel, stride, size):
    """Patches of an image: their code is as long as that of four times as many phases."""
    assert difference(nn.Conv2d(2, 4, kernel, stride), torch.randn(2, 2, *size), target) < 1e-5

    def length(step: int) -> int:
        source, out = (
            map_layout(1, 14 * step, 14 * step, target.lanes, halo=0),
            map_layout(1, 14, 14, target.lanes, halo=0),
        )
        phases = tuple((a, b) for a in range(step) for b in range(step))
        return len(relayout.emit(RelayoutSpec(target, source, out, False, False, (step, step), phases), "k"))

    assert abs(length(16) - length(8)) <= DIGITS


@per_target
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.cases(1)
def test_pools_of_long_signals(target, window):
    kernel, stride, padding = window
    kinds = [
        nn.MaxPool1d(kernel, stride, padding),
        nn.AvgPool1d(kernel, stride, padding),
        nn.AvgPool1d(kernel, stride, padding, count_include_pad=False),
    ]
    for width in (40, 8_003):
        for kind in kinds if width + 2 * padding >= kernel else ():
            model = nn.Sequential(nn.Conv1d(2, 2, 1), kind)
            assert difference(model, torch.randn(2, 2, width), target) < 1e-5, (kind, width)


@per_target
@pytest.mark.parametrize("width", [5, 9, 33, 300])
@pytest.mark.cases(1)
def test_pools_of_maps(target, width):
    kinds = [
        nn.MaxPool2d(3, 2, 1),
        nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        nn.AvgPool2d((2, 5), (1, 3), (1, 2)),
    ]
    for kind in kinds:
        model = nn.Sequential(nn.Conv2d(2, 2, 1), kind)
        assert difference(model, torch.randn(2, 2, 9, width), target) < 1e-5, (kind, width)


#: (outputs, inputs, kernel, stride, padding, dilation, groups) on a map of 20 x 20
LAYERS = [
    (6, 8, 3, 1, 1, 1, 1),
    (8, 8, 3, 1, 1, 1, 8),
    (8, 8, 5, 1, 2, 1, 2),
    (6, 3, 7, 2, 3, 1, 1),
    (4, 3, 3, 1, 0, 2, 1),
]


def weight_of(shape: tuple[int, ...], sparsity: float) -> Weight:
    generator = np.random.default_rng(0)
    dense = generator.standard_normal(shape).astype(np.float32)
    return Weight.of(dense * (generator.random(shape) >= sparsity))


def taps_of(layer: tuple[int, ...], size: int = 20) -> Taps:
    outputs, inputs, k, s, p, d, _ = layer
    out = (size + 2 * p - d * (k - 1) - 1) // s + 1
    return Taps((k, k), (s, s), (p, p), (d, d), (inputs, size, size), (outputs, out, out))


def plain_pack(taps: Taps, weight: Weight, groups: int, x: Layout, aligned: bool, planes: int, threads: int) -> dict:
    """A stream with all nonzeros in memory at once, and sorted as a whole."""
    dense = weight.dense()
    outputs = len(dense)
    oc, ic, kh, kw = np.nonzero(dense)
    ic = ic + oc // (outputs // groups) * dense.shape[1]
    (row_phase, row), (column_phase, column) = taps.places
    number = {phase: i for i, phase in enumerate(taps.phases)}
    phase = [number[int(row_phase[a]), int(column_phase[b])] for a, b in zip(kh, kw, strict=True)]
    plane = ic * len(taps.phases) + np.array(phase, np.int64)
    offset = plane % planes * x.plane + (row[kh] - taps.top) * x.pitch
    columns = np.unique(column[kw]) if aligned and len(oc) else np.zeros(1, np.int64)
    group = np.searchsorted(columns, column[kw]) if aligned else np.zeros_like(oc)
    offset = offset // x.lanes if aligned else offset + column[kw] - taps.left
    blocks, block, size = -(-x.channels // planes), plane // planes, len(columns)
    counts = np.zeros((blocks, outputs, size), np.int64)
    np.add.at(counts, (block, oc, group), 1)
    part, _ = pack.share_out(counts.sum((0, 2)), threads)
    order = np.stack([pack._similar_neighbours(c, part) for c in counts])
    key = (block * outputs + np.argsort(order, axis=1)[block, oc]) * size + group
    sequence = np.lexsort((offset, key))
    starts = np.cumsum([0, *np.bincount(key, minlength=blocks * outputs * size)])
    values = dense[dense != 0]
    return {"weights": values[sequence], "offsets": offset[sequence], "starts": starts, "order": order.reshape(-1)}


@pytest.mark.parametrize("part", [100, 1 << 16])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_stream_packed_in_parts_is_the_plain_one(monkeypatch, layer, sparsity, part):
    monkeypatch.setattr(nonzeros, "PART", part)
    if part == 100:  # sorted, and gone through twice
        monkeypatch.setattr(pack, "MOST_LOOKED_AT", 0)
        monkeypatch.setattr(pack, "MOST_KEPT", 0)
    outputs, inputs, kernel, *_, groups = layer
    weight, taps = weight_of((outputs, inputs // groups, kernel, kernel), sparsity), taps_of(layer)
    for aligned, planes_, threads in ((True, 1, 1), (True, 3, 2), (False, 5, 1), (False, 100, 3)):
        x = taps.aligned_layout(8) if aligned else taps.direct_layout(8)
        got = pack.pack(taps, weight, groups, x, aligned=aligned, block_planes=planes_, threads=threads)
        for name, expected in plain_pack(taps, weight, groups, x, aligned, planes_, threads).items():
            np.testing.assert_array_equal(getattr(got, name), expected, err_msg=name)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(40, 90), (300, 27), (5, 700), (1, 1)], ids=str)
def test_parts_of_a_weight_are_the_weight(monkeypatch, shape, sparsity):
    weight, dense = weight_of(shape, sparsity), weight_of(shape, sparsity).dense()
    panels = np.zeros((-(-shape[0] // 8), shape[1], 8), np.float32)
    nonzeros.panels(weight, 8, panels)
    for part in (100, 1 << 16):
        monkeypatch.setattr(nonzeros, "PART", part)
        for kept in (weight, Weight(shape, None, panels.reshape(-1), 8)):
            found = list(nonzeros.row_parts(kept, 3))
            assert all(low % 3 == 0 for low, _ in found)
            np.testing.assert_array_equal(np.concatenate([rows for _, rows in found]), dense)
            parts = list(nonzeros.nonzeros(kept))
            rows = [set((position // shape[1]).tolist()) for position, _ in parts]
            assert sum(map(len, rows)) == len(set().union(*rows)), "no row is in two parts"
            position = np.concatenate([np.zeros(0, np.int64), *(position for position, _ in parts)])
            np.testing.assert_array_equal(position, np.flatnonzero(dense))
            np.testing.assert_array_equal(nonzeros.row_counts(kept), np.count_nonzero(dense, axis=1))
            chosen, some = nonzeros.some_rows(kept, min(3, shape[0]))
            np.testing.assert_array_equal(some.dense(), dense[chosen])


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
def test_kernels_constants_do_not_depend_on_the_parts(monkeypatch, sparsity):
    """Those of single rows, of AVX-512 too wherever this runs, and of filtered rows."""

    def made(part: int) -> list[np.ndarray]:
        monkeypatch.setattr(nonzeros, "PART", part)
        found = []
        for shape in ((300, 270), (1000, 33), (7, 5)):
            node = Node("linear", "y", ["x"], shape[:1], weight=weight_of(shape, sparsity))
            for target in (TARGETS["avx512"], FP16, TARGETS["avx2"], TARGETS["scalar"]):
                for choice in (Choice("panel"), Choice("sell"), Choice("tables"), Choice("shared", block=150)):
                    if choice.kernel != "shared" or target.name.startswith("avx512"):
                        op = VectorProblem(node, Fused("y"), target).op(choice, 64, 1024)
                        found += [value for value in op.args.values() if isinstance(value, np.ndarray)]
        for layer in LAYERS[:1] + LAYERS[3:4]:
            taps = taps_of(layer)
            x, target = taps.direct_layout(8), TARGETS["avx2"]
            spec = filtering.transform_spec(taps, x, target, filtering.tile_rows(taps))
            outputs, inputs, kernel, *_ = layer
            found += filtering.pack(taps, weight_of((outputs, inputs, kernel, kernel), sparsity), spec, 4).values()
        return found

    for a, b in zip(made(100), made(1 << 30), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_windows_of_parts_are_those_of_the_whole():
    weight = weight_of((700, 90), 0.8)
    dense, height = weight.dense(), 4 * 16
    whole = shared.pack(dense, 16, 4, 1.5)
    parts = (shared.pack(dense[low : low + 2 * height], 16, 4, 1.5) for low in range(0, 700, 2 * height))
    sizes = shared.slices_of(np.count_nonzero(dense, axis=1), height, 1.5)
    joined = shared.joined(parts, sizes, height, lambda size: np.zeros(size, np.float32))
    for name, value in whole.items():
        np.testing.assert_array_equal(joined[name], value.reshape(-1), err_msg=name)


def test_a_large_layer_is_measured_by_some_outputs():
    weight = weight_of((30_000, 300), 0.9)
    node = Node("linear", "y", ["x"], (30_000,), weight=weight, bias=np.arange(30_000, dtype=np.float32))
    some = sampled(node)
    assert some.shape == (len(some.bias),) and some.weight.shape == (len(some.bias), 300)
    assert 0.9 * MOST_TRIED <= np.prod(some.weight.shape) <= MOST_TRIED
    np.testing.assert_array_equal(some.weight.dense(), weight.dense()[some.bias.astype(int)])
    assert abs(some.weight.sparsity - weight.sparsity) < 0.01
    small = Node("linear", "y", ["x"], (40,), weight=weight_of((40, 30), 0.9))
    assert sampled(small) is small


@per_target
@pytest.mark.parametrize("tokens", [1, 32])
def test_a_wide_heads_plan_takes_less_memory_than_its_dense_weights(target, tokens):
    """Tuned, beside what the graph holds: at most the weight's own dense size while it is made."""
    model = nn.Linear(512, 20_000).eval()
    model.weight.data *= torch.rand_like(model.weight) >= 0.9
    with torch.no_grad():
        captured = capture(model, (torch.randn(tokens, 512),))
    graph = captured.regions[captured.whole]
    tracemalloc.start()
    try:
        plan = lower(graph, target, 1, Tuner("", around=1 << 22), tokens)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    held = sum(node.weight.nbytes for node in graph.layers())
    assert peak + held < 4 * model.weight.numel()
    assert plan.nbytes < 0.3 * 4 * model.weight.numel()
