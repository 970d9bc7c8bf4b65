"""The product geometry: its initialisation, its pullback and its scale."""

import pytest
import torch

from mirrormask.geometry import Euclidean, Hadamard, factorize


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_factors_multiply_to_x_within_one_ulp_and_have_the_imbalance_asked(dtype):
    x = torch.cat([torch.randn(2000, dtype=dtype) * scale for scale in (1e-6, 1e-2, 1.0, 1e4)])
    x[::97] = 0.0
    for beta in (1e-3, 1.0, 50.0):
        m, w = factorize(x, beta)
        product = m * w
        ulp = torch.nextafter(x.abs(), torch.full_like(x, float("inf"))) - x.abs()
        assert ((product - x).abs() <= ulp).all()
        assert (m > 0).all()
        assert torch.equal(product == 0, x == 0)
    m, w = factorize(x[:2000], 1.0)
    torch.testing.assert_close(m**2 - w**2, torch.ones(2000, dtype=dtype))


def test_pullback_is_the_gradient_of_the_product():
    geometry = Hadamard(beta=0.5)
    x = torch.randn(3, 4, dtype=torch.float64)
    latents = {name: tensor.requires_grad_() for name, tensor in geometry.init(x).items()}
    grad = torch.randn(3, 4, dtype=torch.float64)
    (latents["m"] * latents["w"]).backward(grad)
    lists = {name: [tensor.detach()] for name, tensor in latents.items()}
    pulled = geometry.pullback([grad], [x], lists)
    assert torch.equal(pulled["m"][0], latents["m"].grad)
    assert torch.equal(pulled["w"][0], latents["w"].grad)


def test_the_rate_makes_the_first_step_move_x_as_the_base_would():
    x = torch.randn(200, 300) * 0.05
    for adaptive in (False, True):
        geometry = Hadamard(gain=1.0)
        latents = geometry.init(x)
        rate = geometry.rate(x, latents, adaptive=adaptive)
        m, w = latents["m"], latents["w"]
        speed = m.abs() + w.abs() if adaptive else m**2 + w**2
        assert float((rate * speed).mean()) == pytest.approx(1.0, rel=1e-5)
    assert Hadamard(gain=None).rate(x, latents, adaptive=False) == 1.0


def test_rms_sets_beta_per_tensor_and_copes_with_zeros():
    geometry = Hadamard()
    x = torch.randn(100)
    m, w = geometry.init(x).values()
    torch.testing.assert_close(m**2 - w**2, (2 * x.square().mean().sqrt()).expand(100), rtol=1e-4, atol=1e-5)
    m, w = geometry.init(torch.zeros(4)).values()
    assert m.tolist() == [1.0] * 4
    assert w.tolist() == [0.0] * 4


def test_a_tensor_that_starts_tiny_has_the_beta_of_a_usual_one():
    usual = 1 / (3 * 16) ** 0.5  # torch's own initialisation, 16 inputs an output
    for scale, expected in ((1.0, 1.0), (0.8, 0.8), (0.5, 0.7), (1e-4, 0.7)):
        x = torch.full((5, 4, 2, 2), usual * scale)
        m, w = Hadamard().init(x).values()
        torch.testing.assert_close(m**2 - w**2, torch.full_like(x, 2 * usual * expected), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(m * w, x)


def test_pruned_weights_come_back_at_zero_and_able_to_move():
    geometry = Hadamard(beta=0.25)
    latents = geometry.init(torch.tensor([1.0, -2.0, 0.5, 3.0]))
    alive = torch.tensor([True, True, False, False])
    geometry.prune(latents, alive)
    assert (latents["m"] * latents["w"]).tolist() == pytest.approx([1.0, -2.0, 0.0, 0.0])
    geometry.revive(latents, alive, torch.tensor([False, False, True, False]))
    assert latents["w"].tolist()[2] == 0.0
    assert latents["m"].tolist()[2] == pytest.approx(0.5)
    assert latents["m"].tolist()[3] == 0.0


def test_euclidean_has_no_latents_and_no_scale():
    assert Euclidean().init(torch.ones(3)) == {}
    assert Euclidean().scale({}) is None
    assert Hadamard(beta=2.0).scale(Hadamard(beta=2.0).init(torch.ones(3))).tolist() == pytest.approx([1.0] * 3)


def test_the_potential_is_that_of_the_theory():
    from mirrormask.geometry import hypentropy

    x0 = torch.randn(6, dtype=torch.float64)
    geometry, c0 = Hadamard(beta=0.4), hypentropy.initial_offset(x0.numpy(), 0.4)
    latents = geometry.init(x0)
    assert abs(geometry.mirror_map(x0, latents, c0)).max() < 1e-12
    assert geometry.potential(x0, latents, c0) == pytest.approx(hypentropy.potential(x0.numpy(), 0.2, c0))
    assert geometry.potential(x0, latents, c0) < geometry.potential(x0 + 0.1, latents, c0)
