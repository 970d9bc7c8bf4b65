"""Zeros under a mask and counts of it: what torch's own masked_fill_ and sum give, whatever the tensor is."""

import math

import pytest
import torch
from torch import nn

from mirrormask.masked import count_true, keep_only

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(), (0, 3), (5,), (300, 1001)], ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns", "every other"])
def test_zeros_are_those_of_masked_fill(dtype, size, layout):
    if layout == "every other" and len(size) == 2:
        size = (size[0], 2 * size[1])
    x, mask = (10 * torch.randn(size)).to(dtype), torch.rand(size) < 0.3
    if len(size) == 2:
        x, mask = {
            "rows": (x, mask), "columns": (x.t(), mask.t().contiguous()), "every other": (x[:, ::2], mask[:, 1::2])
        }[layout]  # fmt: skip
    expected = x.clone().masked_fill_(~mask, 0)
    assert keep_only(x, mask) is x
    assert torch.equal(x, expected) and count_true(mask) == int(mask.sum())


def test_what_is_not_finite_goes_and_the_rest_keeps_its_bits():
    x = torch.tensor([math.nan, math.inf, -math.inf, math.nan, -0.0, 1e-45])
    keep_only(x, torch.tensor([False, False, False, True, True, True]))
    assert x[:3].tolist() == [0.0, 0.0, 0.0] and bool(x[3].isnan())
    assert math.copysign(1, x[4].item()) == -1 and x[5] == 1e-45


def test_only_the_view_is_written():
    whole = torch.ones(4, 6)
    keep_only(whole[1:3], torch.zeros(2, 6, dtype=torch.bool))
    assert whole.sum(1).tolist() == [6, 0, 0, 6]


def test_a_backward_pass_that_needs_what_was_there_is_refused():
    p = nn.Parameter(torch.ones(3))
    loss = (p * p).sum()
    with torch.no_grad():
        keep_only(p, torch.tensor([True, False, True]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tensors_made_for_inference():
    with torch.inference_mode():
        x = keep_only(torch.ones(3), torch.tensor([True, False, True]))
    assert x.tolist() == [1.0, 0.0, 1.0]
