"""The solver of obs against a plain one, and its laws."""

import pytest
import torch

from mirrormask.calibration.inverse import inverse_factor, is_singular
from mirrormask.masks import allocate
from mirrormask.pruning.choice import choose
from mirrormask.pruning.solver import reconstruct, relative_error


def plain(x, h, k, *, damping, block, pattern=None):
    """OBS by its definition, one row and column at a time: the inverse of what is left of H is computed anew."""
    x, (rows, n) = x.clone(), x.shape
    h = h + damping * h.diagonal().mean() * torch.eye(n, dtype=h.dtype)
    mask = torch.ones(rows, n, dtype=torch.bool)
    step = int(pattern[2:]) if pattern else block
    starts = range(0, n, step)
    counts = allocate("uniform", [(rows * min(step, n - s),) for s in starts], 1 - k / (rows * n))
    for start, count in zip(starts, counts, strict=True):
        columns = range(start, min(start + step, n))
        left = torch.tensor([h[j:, j:].inverse()[0, 0] for j in columns], dtype=h.dtype)
        mask[:, columns] = choose(x[:, columns].square() / left, count, pattern=pattern)
        for i in range(rows):
            for j in columns:
                if not mask[i, j]:
                    inverse = h[j:, j:].inverse()
                    x[i, j:] -= x[i, j] / inverse[0, 0] * inverse[0]
                    x[i, j] = 0.0
    return x, mask


def problem(rows, n, places=60, groups=1, dtype=torch.float64):
    """Weights, and the second moment of correlated inputs of different sizes."""
    mix = torch.randn(groups, n, n, dtype=dtype) * torch.logspace(-1, 1, n, dtype=dtype)
    inputs = torch.randn(groups, places, n, dtype=dtype) @ mix
    return torch.randn(groups, rows, n, dtype=dtype), inputs.mT @ inputs


@pytest.mark.parametrize("block", [1, 3, 4, 12, 100])
@pytest.mark.parametrize("damping", [0.0, 0.01, 0.3])
def test_equal_to_the_plain_solver(block, damping):
    x, h = problem(5, 12)
    for k in (1, 17, 30, 59, 60):
        made, mask = reconstruct(x, h, k, damping=damping, block=block)
        expected, expected_mask = plain(x[0], h[0], k, damping=damping, block=block)
        assert torch.equal(mask[0], expected_mask)
        torch.testing.assert_close(made[0], expected)
        assert int(mask.sum()) == k == int(made.count_nonzero())


@pytest.mark.parametrize("block", [3, 4, 8, 12, 100])
def test_equal_to_the_plain_solver_under_a_pattern(block):
    x, h = problem(5, 12)
    made, mask = reconstruct(x, h, 30, pattern="2:4", damping=0.01, block=block)
    expected, expected_mask = plain(x[0], h[0], 30, damping=0.01, block=block, pattern="2:4")
    assert torch.equal(mask[0], expected_mask)
    torch.testing.assert_close(made[0], expected)
    assert (mask.view(-1, 4).sum(1) == 2).all()


def test_groups_are_problems_of_their_own_that_share_a_count():
    x, h = problem(2, 6, groups=3)
    made, mask = reconstruct(x, h, 20, block=2)
    assert int(mask.sum()) == 20
    for group in range(3):
        # With the same masks each group is solved as if it were alone: weights that are certain to go have score 0.
        factor = inverse_factor(h[group : group + 1])
        torch.testing.assert_close(factor, inverse_factor(h)[group : group + 1])
    kept = x.clone()
    for group, row in torch.cartesian_prod(torch.arange(3), torch.arange(2)).tolist():
        for j in range(6):
            if not mask[group, row, j]:
                damped = h[group] + 0.01 * h[group].diagonal().mean() * torch.eye(6, dtype=h.dtype)
                inverse = damped[j:, j:].inverse()
                kept[group, row, j:] -= kept[group, row, j] / inverse[0, 0] * inverse[0]
                kept[group, row, j] = 0.0
    torch.testing.assert_close(made, kept)


def test_a_table_to_check_by_eye():
    # Two inputs that are always alike: either weight can do the work of both.
    x, h = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[1.0, 1.0], [1.0, 1.0]]])
    made, mask = reconstruct(x, h, 1, damping=1e-6)
    assert mask.tolist() == [[[False, True]]]
    torch.testing.assert_close(made, torch.tensor([[[0.0, 3.0]]]), atol=1e-4, rtol=0)
    # Inputs that have nothing in common: the one that matters less goes, and nothing makes up for it.
    made, mask = reconstruct(torch.tensor([[[2.0, 1.0]]]), torch.diag(torch.tensor([1.0, 9.0]))[None], 1, damping=0.0)
    assert made.tolist() == [[[0.0, 1.0]]]


def test_it_keeps_everything_or_nothing():
    x, h = problem(3, 5)
    made, mask = reconstruct(x, h, 15)
    assert torch.equal(made, x) and mask.all()
    made, mask = reconstruct(x, h, 0)
    assert not made.any() and not mask.any()


@pytest.mark.parametrize("seed", range(3))
def test_the_error_falls_from_magnitude_over_wanda_to_obs(seed):
    torch.manual_seed(seed)
    x, h = problem(32, 48, places=200)
    errors = []
    for scores in (x.abs(), x.abs() * h.diagonal(dim1=1, dim2=2).sqrt()):
        mask = choose(scores[0], 768, by_row=len(errors) == 1)
        errors.append(relative_error(x, x * mask, h))
    errors.append(relative_error(x, reconstruct(x, h, 768)[0], h))
    assert errors[0] > 1.2 * errors[1] > 1.2 * 1.2 * errors[2]


def test_the_factor_is_that_of_the_inverse():
    for h in (problem(1, 7)[1], torch.zeros(1, 3, 3), torch.ones(2, 4, 4)):
        factor = inverse_factor(h, 0.5)
        scale = h.diagonal(dim1=1, dim2=2).mean()
        damped = h + 0.5 * scale * torch.eye(h.shape[-1], dtype=h.dtype) if scale else torch.eye(3)[None] * 1.5
        assert torch.equal(factor, factor.triu())
        torch.testing.assert_close(factor.mT @ factor, damped.inverse())


def test_a_moment_without_an_inverse_is_damped_until_it_has_one():
    h = torch.ones(1, 5, 5)
    assert is_singular(h, 100)
    assert inverse_factor(h, 0.0).isfinite().all()
    made, mask = reconstruct(torch.randn(1, 4, 5), h, 10, damping=0.0)
    assert made.isfinite().all() and int(mask.sum()) == 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_singular(dtype):
    h = problem(1, 20, places=400, dtype=dtype)[1]
    assert not is_singular(h, 400)
    assert not is_singular(h * 1e-9, 400)  # of any scale
    assert is_singular(h, 19)
    still = h.clone()
    still[:, 3], still[:, :, 3] = 0.0, 0.0
    assert is_singular(still, 400)
    alike = h.clone()
    alike[:, 3], alike[:, :, 3] = alike[:, 4], alike[:, :, 4]
    alike[:, 3, 3] = h[:, 4, 4]
    assert is_singular(alike, 400)


def test_choosing_is_exact_and_breaks_ties_by_index():
    ties = torch.ones(3, 4)
    assert choose(ties, 5).int().tolist() == [[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert choose(ties, 5, by_row=True).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
    assert choose(ties, 6, pattern="1:2").int().tolist() == [[1, 0, 1, 0]] * 3
    for k in range(13):
        for by_row in (False, True):
            mask = choose(torch.randint(0, 3, (3, 4)).float(), k, by_row=by_row)
            assert int(mask.sum()) == k
            if by_row:
                assert set(mask.sum(1).tolist()) <= {k // 3, k // 3 + 1}
