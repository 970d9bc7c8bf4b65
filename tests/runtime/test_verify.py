"""A plan with a wrong index is refused when it is built, whichever array is wrong."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from mirrormask.machine.targets import available_targets, best_target
from mirrormask.runtime.graph.capture import capture
from mirrormask.runtime.kernels.base import Op
from mirrormask.runtime.schedule.lower import lower
from mirrormask.runtime.schedule.plan import Plan
from mirrormask.runtime.schedule.tune import default_choice


def plan(model: nn.Module, x: torch.Tensor) -> Plan:
    captured = capture(model.eval(), (x,))
    return lower(captured.regions[captured.whole], best_target(), 1, default_choice, 1)


def spoiled(op: Op, **changes) -> Op:
    return dataclasses.replace(op, args={**op.args, **changes})


def refuses(whole: Plan, op: Op) -> None:
    with pytest.raises(IndexError, match=op.node):
        Plan([op], whole.floats, whole.strides, whole.outputs, 1, whole.dtype)


def test_sparse_convolution():
    layer = nn.Conv2d(4, 6, 3, padding=1)
    layer.weight.data *= torch.rand_like(layer.weight) > 0.8
    with torch.no_grad():
        whole = plan(layer, torch.randn(1, 4, 14, 14))
    (op,) = (op for op in whole.ops if op.kind == "sparse")
    Plan([op], whole.floats, whole.strides, whole.outputs, 1, whole.dtype)
    offsets, starts, order = (op.args[name] for name in ("offsets", "starts", "order"))
    refuses(whole, spoiled(op, offsets=np.where(np.arange(offsets.size) == 3, 65535, offsets).astype(np.uint16)))
    refuses(whole, spoiled(op, offsets=offsets[:-1]))
    refuses(whole, spoiled(op, starts=starts + 1))
    refuses(whole, spoiled(op, starts=starts[::-1].copy()))
    refuses(whole, spoiled(op, starts=starts[:-1]))
    refuses(whole, spoiled(op, order=np.zeros_like(order)))
    refuses(whole, spoiled(op, x=-5))
    refuses(whole, spoiled(op, x=whole.floats))
    refuses(whole, spoiled(op, out=whole.floats - 10))
    refuses(whole, spoiled(op, bias=op.args["bias"][:2]))
    refuses(whole, dataclasses.replace(op, bounds=(0, 5)))


def test_filtered_convolution():
    with torch.no_grad():
        whole = plan(nn.Conv2d(3, 6, 7, 2, 3), torch.randn(1, 3, 56, 56))
    transform, op = (op for op in whole.ops if op.kind in ("transform", "winograd"))
    Plan([transform, op], whole.floats, whole.strides, whole.outputs, 1, whole.dtype)
    offsets, starts = (op.args[name] for name in ("offsets", "starts"))
    refuses(whole, spoiled(op, offsets=changed(offsets, 3, whole.floats)))
    refuses(whole, spoiled(op, offsets=offsets[:-1]))
    refuses(whole, spoiled(op, starts=starts[:-1]))
    refuses(whole, spoiled(op, starts=starts[::-1].copy()))
    refuses(whole, spoiled(op, weights=op.args["weights"][:0]))
    refuses(whole, spoiled(op, bias=op.args["bias"][:2]))
    for name in ("x", "out"):
        for wrong in (-5, whole.floats - 10):
            refuses(whole, spoiled(op, **{name: wrong}))
            refuses(whole, spoiled(transform, **{name: wrong}))
    refuses(whole, dataclasses.replace(transform, units=4))


def vector_op(name: str, sparsity: float) -> tuple[Plan, Op]:
    layer = nn.Linear(80, 40).eval()
    layer.weight.data *= torch.rand_like(layer.weight) >= sparsity
    captured = capture(layer, (torch.randn(1, 80),))
    whole = lower(captured.regions[captured.whole], best_target(name), 1, default_choice, 1)
    (op,) = (op for op in whole.ops if op.kind.startswith("vector"))
    Plan([op], whole.floats, whole.strides, whole.outputs, 1, whole.dtype)
    return whole, op


def changed(values: np.ndarray, index: int, value: int) -> np.ndarray:
    copy = values.copy()
    copy.reshape(-1)[index] = value
    return copy


@pytest.mark.skipif(best_target().name != "avx512", reason="this processor has no AVX-512")
def test_shared_windows():
    whole, op = vector_op("avx512", 0.8)
    assert op.kind == "vector_shared" and op.args["rest_starts"][-1] > 0, "all that can be wrong is there"
    for name in ("positions", "starts", "rest_rows", "rest_columns", "rest_starts"):
        wrong = 65535 if op.args[name].dtype == np.uint16 else whole.floats
        refuses(whole, spoiled(op, **{name: changed(op.args[name], -1, wrong)}))
        refuses(whole, spoiled(op, **{name: op.args[name][:-1]}))
    refuses(whole, spoiled(op, positions=changed(op.args["positions"], 0, -1)))
    for name in ("indices", "weights", "bias"):
        refuses(whole, spoiled(op, **{name: op.args[name][: op.args[name].size // 4]}))
    refuses(whole, spoiled(op, x=whole.floats - 40))
    refuses(whole, spoiled(op, out=whole.floats - 40))
    refuses(whole, spoiled(op, terms=2 * whole.floats))


@pytest.mark.skipif("avx2" not in {target.name for target in available_targets()}, reason="needs AVX2")
def test_tables():
    whole, op = vector_op("avx2", 0.8)
    assert op.kind == "vector_tables"
    refuses(whole, spoiled(op, windows=changed(op.args["windows"], 0, 65535)))
    refuses(whole, spoiled(op, rows=op.args["rows"] + np.int32(whole.floats)))
    for name in ("windows", "places", "weights", "rows", "bias"):
        refuses(whole, spoiled(op, **{name: op.args[name][: op.args[name].size // 4]}))
    refuses(whole, spoiled(op, starts=op.args["starts"] - 1))
    refuses(whole, spoiled(op, weights=op.args["weights"].astype(np.int8)))
    refuses(whole, spoiled(op, terms=2 * whole.floats))
    refuses(whole, spoiled(op, x=whole.floats))


def test_sell():
    whole, op = vector_op("scalar", 0.8)
    assert op.kind == "vector_sparse"
    refuses(whole, spoiled(op, indices=changed(op.args["indices"], 0, 65535)))
    refuses(whole, spoiled(op, rows=op.args["rows"] + np.int32(whole.floats)))
    refuses(whole, spoiled(op, rows=op.args["rows"][:-1]))
    refuses(whole, spoiled(op, starts=op.args["starts"] - 1))
    refuses(whole, spoiled(op, x=whole.floats))


def test_dense_panels():
    whole, op = vector_op("scalar", 0.0)
    assert op.kind == "vector_dense"
    refuses(whole, spoiled(op, terms=op.args["terms"] + 1))
    refuses(whole, spoiled(op, bias=op.args["bias"][:3]))
    refuses(whole, spoiled(op, out=whole.floats - 3))
    refuses(whole, spoiled(op, x=whole.floats - 3))


def test_combined_and_picked_planes():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(x)
            y = torch.channel_shuffle(y * y.mean((2, 3), keepdim=True), 2)
            y = nn.functional.interpolate(nn.functional.pad(y, (1, 1)), scale_factor=2, mode="bilinear")
            return nn.functional.adaptive_max_pool2d(y, 5)

    with torch.no_grad():
        whole = plan(Net(), torch.randn(1, 3, 9, 9))
    ops = {op.kind if op.kind != "resample" else f"resample {op.spec.linear}": op for op in whole.ops}
    Plan(list(ops.values()), whole.floats, whole.strides, whole.outputs, 1, whole.dtype)
    for kind, changes in {
        "planes": {"x": -5, "out": whole.floats - 10, "other": whole.floats},
        "gather": {"x": whole.floats, "out": -5, "order": np.full(8, 800, np.int32)},
        "windows": {"x": -5, "out": whole.floats, "row_high": np.full(5, 80, np.int32), "column_low": np.zeros(2)},
        "resample True": {"x": -5, "rows": np.full(14, 7, np.int32), "columns_next": np.full(18, -1, np.int32)},
        "resample False": {"out": whole.floats, "rows": np.full(7, 9, np.int32), "columns": np.zeros(3, np.int32)},
    }.items():
        for name, value in changes.items():
            refuses(whole, spoiled(ops[kind], **{name: value}))
