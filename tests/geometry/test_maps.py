"""What every map x = φ(θ) must satisfy, whichever it is."""

import pytest
import torch

from mirrormask.geometry import DeepProduct, Hadamard, Power, SigmoidMask, SignIn, SoftThreshold
from mirrormask.progress import Clock

MAPS = {
    "hadamard": Hadamard(beta=0.3),
    "sign_in": SignIn(),
    "three factors": DeepProduct(),
    "five factors": DeepProduct(depth=5, seed=3),
    "power": Power(power=2.5),
    "square": Power(),
    "soft_threshold": SoftThreshold(0.2),
    "sigmoid_mask": SigmoidMask(s_init=-0.4, penalty=0.0).at(Clock(20, 100)),
}
PLAIN = {
    "three factors": lambda f1, f2, f3: f1 * f2 * f3,
    "five factors": lambda f1, f2, f3, f4, f5: f1 * f2 * f3 * f4 * f5,
    "hadamard": lambda m, w: m * w,
    "sign_in": lambda m, w: m * w,
    "power": lambda theta: theta.sign() * theta.abs() ** 2.5,
    "square": lambda theta: theta * theta.abs(),
    "soft_threshold": lambda **latents: soft_threshold(**latents),
    "sigmoid_mask": lambda w, s: w * torch.sigmoid(200.0 ** (0.2 / 0.75) * s),
}


def soft_threshold(w, s):
    """STR's map; the gradient of s is divided by max(1, n g²)."""
    share = 1 / (s.exp().detach() ** 2 * (w.abs() > s.exp()).sum()).clamp(min=1.0)
    return w.sign() * torch.relu(w.abs() - (share * s + (s - share * s).detach()).exp())


def weight():
    x = torch.randn(5, 8, dtype=torch.float64)
    x[1, ::3] = 0.0
    return x


@pytest.mark.parametrize("name", MAPS)
def test_the_start_is_x(name):
    geometry, x = MAPS[name], weight()
    if name == "sigmoid_mask":
        geometry = SigmoidMask(s_init=-0.4)  # at the first step
    found = torch.empty_like(x)
    geometry.push([found], {key: [value] for key, value in geometry.init(x).items()})
    torch.testing.assert_close(found, x, rtol=1e-14, atol=1e-15)
    assert torch.equal(found == 0, x == 0)


@pytest.mark.parametrize("name", MAPS)
def test_pullback_and_push_are_those_of_autograd(name):
    geometry = MAPS[name]
    xs = [weight(), weight()]
    latents = [{key: value for key, value in geometry.init(x).items() if key in geometry.latents} for x in xs]
    for thetas in latents:
        for value in thetas.values():
            value.add_(0.05 * torch.randn_like(value)).requires_grad_()
    grads = [torch.randn_like(x) for x in xs]
    copies = [grad.clone() for grad in grads]
    maps = [PLAIN[name](**thetas) for thetas in latents]
    torch.autograd.backward(maps, grads)
    lists = {key: [thetas[key].detach() for thetas in latents] for key in geometry.latents}
    found = [torch.empty_like(x) for x in xs]
    geometry.push(found, lists)
    pulled = geometry.pullback(grads, found, lists)
    for i, thetas in enumerate(latents):
        torch.testing.assert_close(found[i], maps[i].detach())
        for key, value in thetas.items():
            torch.testing.assert_close(pulled[key][i], value.grad)
        assert torch.equal(grads[i], copies[i]), "pullback must leave the gradients alone"


@pytest.mark.parametrize("values", [None, 0.25])
@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("name", MAPS)
def test_what_comes_back_can_move_and_has_the_value_asked(name, settled, values):
    geometry, x = MAPS[name], weight()
    if name == "sigmoid_mask":
        geometry = SigmoidMask()
    alive = x.abs() > 0.5
    latents = geometry.init(x)
    if settled:
        geometry.settle(x, latents)
    geometry.prune(latents, alive)
    new = ~alive & (torch.rand(x.shape) < 0.5)
    geometry.revive(latents, alive, new, None if values is None else torch.full_like(x, values))
    lists = {key: [value] for key, value in latents.items()}
    found = torch.empty_like(x)
    geometry.push([found], lists)
    scale = float(x[alive].abs().mean())
    torch.testing.assert_close(found[alive], x[alive])
    assert (found[new] - (values or 0.0)).abs().max() < 0.02 * scale
    assert not found[~alive & ~new].any()
    pulled = geometry.pullback([torch.ones_like(x)], [found], lists)
    moves = sum(grads[0].abs() for grads in pulled.values() if grads[0].shape == x.shape)
    assert (moves[new] > 0).all()


@pytest.mark.parametrize("name", ["soft_threshold", "sigmoid_mask"])
def test_settled_weights_are_ordinary(name):
    geometry, x = MAPS[name], weight()
    latents = geometry.init(x)
    geometry.settle(x, latents)
    latents["w"].add_(0.1)
    lists = {key: [value] for key, value in latents.items()}
    found, grad = torch.empty_like(x), torch.randn_like(x)
    geometry.push([found], lists)
    assert torch.equal(found, latents["w"])
    pulled = geometry.pullback([grad], [found], lists)
    assert torch.equal(pulled["w"][0], grad)
    assert not pulled["s"][0].any()


def test_power_one_is_the_ordinary_weight():
    x = weight()
    geometry = Power(power=1.0)
    latents = geometry.init(x)
    assert torch.equal(latents["theta"], x)
    assert geometry.rate(x, latents, adaptive=False) == 1.0


@pytest.mark.parametrize("name", ["power", "square"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_the_rate_of_a_power_makes_the_first_step_that_of_the_base(name, adaptive):
    geometry, x = MAPS[name], weight() * 0.05
    latents = geometry.init(x)
    slope = geometry.power * latents["theta"].abs() ** (geometry.power - 1)
    speed = slope if adaptive else slope**2
    assert float((geometry.rate(x, latents, adaptive=adaptive) * speed).mean()) == pytest.approx(1.0)


def test_sign_in_sets_the_imbalance_back_to_that_of_the_start_however_far_weights_grew():
    geometry, x = SignIn(), weight()
    latents = geometry.init(x)
    beta = latents["m"] ** 2 - latents["w"] ** 2
    grown = 10 * x
    latents["m"].mul_(0.1)
    latents["w"].copy_(grown / latents["m"])
    geometry.refresh(grown, latents, None)
    torch.testing.assert_close(latents["m"] * latents["w"], grown)
    torch.testing.assert_close(latents["m"] ** 2 - latents["w"] ** 2, beta)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_factors_are_drawn_within_bounds_and_none_is_balanced(depth):
    """No weight starts where it could not change its sign, and none far from the sizes of the others."""
    x = 0.05 * torch.randn(200, 50, dtype=torch.float64)
    factors = list(DeepProduct(depth=depth).init(x).values())
    sigma = float(x.square().mean().sqrt())
    sizes = torch.stack(factors[:-1])
    assert (sizes > 0).all()
    assert sizes.max() < 3 * (2 * sigma) ** (1 / depth) and sizes.min() > (0.25 * sigma) ** (1 / depth) / 4
    assert (factors[0] ** 2 - factors[-1] ** 2).abs().min() > 0
    latents = {f"f{i + 1}": [factor] for i, factor in enumerate(factors)}
    slopes = DeepProduct(depth=depth).pullback([torch.ones_like(x)], [x], latents)
    speed = sum(slope.square() for (slope,) in slopes.values())
    assert speed.mean() / 100 < speed.min() < speed.max() < 12 * speed.mean()
    again, other = (DeepProduct(depth=depth, seed=seed).init(x)["f1"] for seed in (0, 1))
    assert torch.equal(again, factors[0]) and not torch.equal(other, factors[0])


@pytest.mark.parametrize("name", [*MAPS, "ordinary"])
def test_what_is_pruned_has_no_gradient_where_the_map_says_so(name):
    """Masks are not applied at every step then: a map that is wrong here would let zeros come back."""
    geometry = Power(power=1.0) if name == "ordinary" else MAPS[name]
    x = weight()
    latents, mask = geometry.init(x), torch.rand(x.shape) < 0.4
    geometry.prune(latents, mask)
    pulled = geometry.pullback([torch.randn_like(x)], [x * mask], {key: [v] for key, v in latents.items()})
    quiet = all(not bool(grad[0][~mask].any()) for key, grad in pulled.items() if key not in geometry.shared)
    assert quiet or not geometry.keeps_zeros
