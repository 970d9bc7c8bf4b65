"""Which weights stay: tables that an eye can check, and the exact count for everything else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mirrormask.masks import allocate, floors, keep_count, largest, select
from mirrormask.masks.scores import balanced, lamp, magnitude, sensitivity


def table(mask):
    return mask.int().tolist()


def test_a_table_that_an_eye_can_check():
    scores = torch.tensor([[0.9, 0.1, 0.4, 0.3], [0.2, 0.8, 0.7, 0.5]])
    assert table(largest(scores, 3)) == [[1, 0, 0, 0], [0, 1, 1, 0]]
    assert table(largest(scores, 0)) == [[0, 0, 0, 0], [0, 0, 0, 0]]
    assert table(largest(scores, 8)) == [[1, 1, 1, 1], [1, 1, 1, 1]]


def test_ties_go_to_the_first():
    assert table(largest(torch.tensor([[2.0, 1.0, 1.0], [1.0, 1.0, 3.0]]), 4)) == [[1, 1, 1], [0, 0, 1]]
    assert table(largest(torch.ones(2, 3), 2)) == [[1, 1, 0], [0, 0, 0]]


def test_global_compares_layers_and_uniform_does_not():
    small, large = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert [table(m) for m in select([small, large], 0.5, "global")] == [[0, 0, 0, 0], [1, 1, 1, 1]]
    assert [table(m) for m in select([small, large], 0.5, "uniform")] == [[0, 0, 1, 1], [0, 0, 1, 1]]


def test_lamp_by_hand():
    # by size: 4, 3 (first), 3, 0; the squares of those not smaller: 16, 25, 34, 34
    found = lamp(torch.tensor([[3.0, -4.0], [-3.0, 0.0]]), torch.Generator())
    torch.testing.assert_close(found, torch.tensor([[9 / 25, 1.0], [9 / 34, 0.0]]))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_under_lamp_no_scale_of_a_layer_changes_the_masks_and_every_layer_keeps_its_largest(scale):
    layers = [torch.randn(5, 7), torch.randn(40), torch.randn(3, 3)]
    expected = select([lamp(x, torch.Generator()) for x in layers], 0.9)
    layers[1] = scale * layers[1]
    found = select([lamp(x, torch.Generator()) for x in layers], 0.9)
    assert [table(m) for m in found] == [table(m) for m in expected]
    assert all(m.reshape(-1)[x.abs().argmax()] for m, x in zip(found, layers, strict=True))


def test_lamp_of_a_layer_of_zeros_and_of_what_is_not_a_number():
    assert lamp(torch.zeros(3), torch.Generator()).tolist() == [0, 0, 0]
    found = lamp(torch.tensor([1.0, float("nan"), -2.0]), torch.Generator())
    assert found.isfinite().all() and found.argmax() == 1


def with_gradient(x, gradient):
    x.grad = gradient
    return x


def test_sensitivity_by_hand():
    # the mean squares of the rows are 25 and 4
    x = with_gradient(torch.tensor([[1.0, -2.0], [0.0, 4.0]]), torch.tensor([[1.0, 7.0], [2.0, -2.0]]))
    assert sensitivity(x, torch.Generator()).tolist() == [[5.0, 10.0], [0.0, 8.0]]


def test_balanced_is_halfway_to_sensitivity_and_all_of_it_where_weights_have_grown():
    x = with_gradient(torch.tensor([[1.0, -4.0], [0.0, 9.0]]), torch.tensor([[16.0, 16.0], [1.0, -1.0]]))
    for grown, row in ((0.0, [4.0, 16.0]), (0.5, [8.0, 32.0]), (1.0, [16.0, 64.0])):
        expected = torch.tensor([row, [0.0, 9.0]])
        torch.testing.assert_close(balanced(x, torch.Generator(), grown), expected)
    assert torch.equal(balanced(x, torch.Generator(), 1.0), sensitivity(x, torch.Generator()))
    x.grad = None
    torch.testing.assert_close(balanced(x, torch.Generator()), magnitude(x, torch.Generator()))


def test_sensitivity_is_the_same_for_a_filter_in_front_of_a_batch_norm_at_any_scale():
    """Measured on such a network: the gradients are autograd's."""
    conv, norm = torch.nn.Conv2d(3, 4, 3, bias=False).double(), torch.nn.BatchNorm2d(4, eps=1e-12).double()
    inputs = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    found = []
    for scale in (1.0, 8.0):
        with torch.no_grad():
            conv.weight[1] *= scale
        conv.zero_grad()
        norm(conv(inputs)).pow(3).mean().backward()
        found.append(sensitivity(conv.weight, torch.Generator()))
    torch.testing.assert_close(found[0], found[1])
    assert not torch.allclose(found[0], conv.weight.abs())


def test_without_a_gradient_that_is_a_number_sensitivity_is_the_magnitude():
    x = torch.randn(2, 7)
    for gradient in (None, torch.full((2, 7), float("inf")), torch.full((2, 7), float("nan"))):
        found = sensitivity(with_gradient(x.clone(), gradient), torch.Generator())
        assert torch.equal(found, magnitude(x, torch.Generator()))


def test_erk_by_hand():
    # raw shares: (2+8)/16 = 0.625, (4+4)/16 = 0.5; 16 of 32 stay: scale = 16 / (0.625*16 + 0.5*16) = 8/9
    assert allocate("erk", [(2, 8), (4, 4)], 0.5) == [9, 7]


def test_erk_keeps_a_saturated_layer_whole_and_shares_the_rest_again():
    # alone, (2, 2) would keep 4 * scale = 4 * 25 / (4 + 40) > 4 only if scale > 1: at sparsity 0.5 it is 212/44
    counts = allocate("erk", [(2, 2), (20, 20)], 0.5)
    assert counts == [4, 198]
    assert sum(counts) == keep_count(404, 0.5)


@settings(max_examples=150, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=4), min_size=1, max_size=6),
    sparsity=st.floats(0, 1, exclude_max=True),
    allocation=st.sampled_from(["global", "uniform", "erk"]),
    levels=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_asked_is_obtained_with_ties_tiny_layers_and_any_sparsity(shapes, sparsity, allocation, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randint(0, levels, shape, generator=generator).float() for shape in shapes]
    masks = select(scores, sparsity, allocation)
    asked = round((1 - sparsity) * sum(score.numel() for score in scores))
    assert sum(int(mask.sum()) for mask in masks) == asked
    assert [mask.shape for mask in masks] == [score.shape for score in scores]
    for score, mask in zip(scores, masks, strict=True):
        if mask.any() and not mask.all():
            assert score[mask].min() >= score[~mask].max()


@pytest.mark.parametrize("allocation", ["global", "uniform", "erk"])
def test_sparsity_zero_keeps_everything(allocation):
    assert all(mask.all() for mask in select([torch.rand(3, 4), torch.rand(2)], 0.0, allocation))


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.sampled_from([(4, 3, 3, 3), (16, 4, 3, 3), (10, 16), (40,), (64, 64)]), min_size=1, max_size=5),
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 0.98, 0.995, 0.9995]),
    share=st.sampled_from([0.05, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 9),
)
def test_a_floor_keeps_every_layer_alive_as_long_as_there_is_one_weight_for_each(shapes, sparsity, share, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = [10.0 ** (-3 * i) * torch.rand(shape, generator=generator) for i, shape in enumerate(shapes)]
    keep, least = keep_count(sum(s.numel() for s in scores), sparsity), floors(shapes, sparsity, share)
    masks = select(scores, sparsity, floor=share)
    assert sum(int(mask.sum()) for mask in masks) == keep, "the exact count holds"
    assert sum(least) <= keep
    if keep >= len(shapes):
        assert all(mask.any() for mask in masks)
        assert all(int(mask.sum()) >= k >= 1 for mask, k in zip(masks, least, strict=True))
    for score, mask in zip(scores, masks, strict=True):  # within a layer the largest stay
        assert table(mask) == table(largest(score, int(mask.sum())))


def test_without_a_floor_the_scores_alone_decide_and_where_none_binds_it_changes_nothing():
    small, large = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert [table(m) for m in select([small, large], 0.5, floor=0.0)] == [[0, 0, 0, 0], [1, 1, 1, 1]]
    assert [table(m) for m in select([small, large], 0.5, floor=0.1)] == [[0, 0, 0, 1], [0, 1, 1, 1]]
    assert [table(m) for m in select([small, large], 0.5, floor=1.0)] == [[0, 0, 1, 1], [0, 0, 1, 1]]
    alike = [torch.rand(5, 7), torch.rand(20, 3)]
    assert [table(m) for m in select(alike, 0.5, floor=0.1)] == [table(m) for m in select(alike, 0.5)]


def test_a_floor_brings_nothing_back_that_is_dead():
    dead = torch.tensor([float("-inf")] * 3 + [0.1])
    masks = select([dead, torch.tensor([3.0, 2.0, 1.0, 0.5])], 0.5, floor=1.0)
    assert [table(m) for m in masks] == [[0, 0, 0, 1], [1, 1, 1, 0]]
