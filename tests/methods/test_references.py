"""Every method equals its plain reference at every step, with its options on, under SGD and under AdamW."""

import inspect

import plain
import pytest
import torch
from plain import STEPS
from torch import nn

import mirrormask as mm


def of(kind, *mixins, **attributes):
    """A reference with some attributes changed."""
    return type("Reference", (*mixins, kind), attributes)


GRADUAL = {"start_at": 0.1, "end_at": 0.75, "every": 0.05}
HAM = {"a": 300.0, "b": 0.05, "clip": 0.05}
PILOT = {"gain": 0.8, "alpha_init": 0.2, "delta": 1.5, "K": 0.5}
REGROW = {"fraction": 0.4, "every": 0.1, "until": 0.75, "seed": 5}
DRAW = {"least": 0.5, "seed": 5}
DEEP = {"gain": 0.8, "alpha": 0.02, "coupled": True, **DRAW}
GROWN = {"grow": "random", "anneal": False, "spread": 0.5, "until": 34}
MIRROR = {
    **GRADUAL,
    "gain": 0.8,
    "shrink": 4.0,
    "decay_from": 0.05,
    "decay_until": 0.75,
    "decay_limit": None,
    "growth": None,
}
#: method, and a variant if there is one -> (its options, its reference)
CASES = {
    "dense": ({}, plain.Plain),
    "magnitude": ({}, plain.OneShot),
    "gmp": (GRADUAL, plain.Gmp),
    "gmp, floor": ({**GRADUAL, "floor": 0.9}, plain.GmpFloor),
    "acdc": ({}, plain.Acdc),
    "random": ({"seed": 5}, plain.AtStart),
    "uniform": ({"seed": 5}, of(plain.AtStart, allocation="uniform")),
    "erk": ({"seed": 5}, of(plain.AtStart, allocation="erk")),
    "rigl": (REGROW, plain.Exchange),
    "set": ({**REGROW, "until": 0.85, "spread": 0.5}, of(plain.Exchange, **GROWN)),
    "l1": ({"alpha": 0.02}, plain.L1),
    "ham": (HAM, of(plain.OneShot, plain.Ham)),
    "gmp_ham": ({**HAM, **GRADUAL}, of(plain.Gmp, plain.Ham)),
    "acdc_ham": (HAM, of(plain.Acdc, plain.Ham)),
    "rigl_ham": ({**HAM, **REGROW}, of(plain.Exchange, plain.Ham)),
    "erk_ham": ({**HAM, "seed": 5}, of(plain.AtStart, plain.Ham, allocation="erk")),
    "str_ham": ({**HAM, **GRADUAL, "init_threshold": 0.05}, of(plain.Str, plain.Ham, on="w")),
    "str": ({**GRADUAL, "init_threshold": 0.05}, plain.Str),
    "cs": ({**GRADUAL, "s_init": 0.2, "final": 50.0, "penalty": 0.01}, plain.Cs),
    "powerprop": ({"power": 3.0, "gain": 0.8}, plain.Power),
    "spred": ({"gain": 0.8, "alpha": 0.05, "coupled": True}, plain.Spred),
    "dwf": (DEEP, of(plain.Deep, options={"least": 0.5, "seed": 5})),
    "dwf, four": (
        {**DEEP, "depth": 4, "alpha": 2e-3},
        of(plain.Deep, alpha=2e-3, options={"least": 0.5, "seed": 5, "depth": 4}),
    ),
    "elsa": ({"strength": 0.5, "every": 0.1, "at": 0.85}, plain.Elsa),
    "sparseopt": (REGROW, plain.Scaled),
    "pilot_init": ({"gain": 0.8}, plain.Hadamard),
    "pilot": (PILOT, plain.Pilot),
    "mirror": (MIRROR, plain.Mirror),
    "mirror, descent": ({**MIRROR, "factors": False, "clip": 0.03}, plain.MirrorDescent),
    "mirror, growth": ({**MIRROR, "growth": 0.1}, plain.GrowingMirror),
    "mirror, descent and growth": (
        {**MIRROR, "growth": 0.1, "factors": False, "clip": 0.03},
        plain.GrowingDescent,
    ),
    "sign_in": ({"beta": "rms", "gain": 0.8, "alpha": 0.05, "every": 0.1, "until": 0.75, "seed": 5}, plain.SignIn),
    "lth": ({"prunings": 3}, plain.Rounds),
    "wr": ({"prunings": 3, "rewind_to": 0.25}, of(plain.Rounds, rewind=3)),
    "lrr": ({"prunings": 3}, of(plain.Rounds, rewind=None)),
    "pilot_lrr": ({"prunings": 3, **PILOT}, of(plain.PilotRounds, rewind=None)),
    "pilot_wr": ({"prunings": 3, "rewind_to": 0.25, **PILOT}, of(plain.PilotRounds, rewind=3)),
}


def test_every_method_has_a_reference():
    data = {"snip", "synflow", "grasp"}  # a mask before the first step: their scores have references below
    assert {name.partition(",")[0] for name in CASES} | data == set(mm.methods.names())


@pytest.mark.parametrize("base", plain.BASES)
@pytest.mark.parametrize("name", CASES)
def test_equals_its_plain_reference_at_every_step(name, base):
    options, kind = CASES[name]
    reference = kind(base)
    model = plain.network()
    make, arguments = plain.BASES[base]
    make_method = mm.methods.get(name.partition(",")[0])
    if "floor" in inspect.signature(make_method).parameters:  # "gmp, floor" has one
        options = {"floor": 0.0, **options}
    method = make_method(0.0 if name == "dense" else kind.sparsity, **options)
    optimizer = mm.sparsify(model, make(model.parameters(), **arguments), method, steps=STEPS)
    scheduler = None
    if method.mask.replays:
        assert optimizer.round_steps == reference.first
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, reference.schedule)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = plain.batch(step)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
        reference.step(step)
        if step % 5 == 4:
            score = 0.1 * ((step * 7) % 11)  # rises and falls
            optimizer.epoch_end(score=score)
            if hasattr(reference, "epoch_end"):
                reference.epoch_end(score, step + 1)
        for (key, weight), wanted in zip(optimizer.weights.items(), reference.weights(), strict=True):
            difference = float((weight.detach() - wanted).abs().max())
            assert difference < 1e-9 * (1 + float(wanted.abs().max())), f"{difference} at step {step} in {key}"
            if name != "dense":
                assert torch.equal(weight != 0, wanted != 0), f"another mask at step {step} in {key}"
    optimizer.finalize()
    assert mm.sparsity(model).nonzeros == sum(int((x != 0).sum()) for x in reference.weights())


# -- scores from data ---------------------------------------------------------------------------------------------


def masks_of(name, batches):
    model = plain.network()
    optimizer = mm.sparsify(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        mm.methods.get(name)(0.7, floor=0.0),
        steps=9,
        batches=batches,
    )
    return model, [mask.clone() for mask in optimizer.masks.values()]


def loss_of(xs, biases, batches, scale=1.0):
    total = 0.0
    for inputs, y in batches:
        h = inputs
        for i, (x, b) in enumerate(zip(xs, biases, strict=True)):
            h = h @ x.T + b
            h = torch.tanh(h) if i < 2 else h
        total = total + nn.functional.cross_entropy(h / scale, y)
    return total


def parts():
    model = plain.network()
    xs = [p.detach().clone().requires_grad_() for p in model.parameters() if p.dim() == 2]
    return xs, [p.detach() for p in model.parameters() if p.dim() == 1]


def test_snip_keeps_the_largest_product_of_weight_and_gradient():
    batches = [plain.batch(1), plain.batch(2)]
    xs, biases = parts()
    grads = torch.autograd.grad(loss_of(xs, biases, batches), xs)
    wanted = plain.top([(x * g).abs() for x, g in zip(xs, grads, strict=True)], 31)
    _, found = masks_of("snip", batches)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    _, single = masks_of("snip", batches[0])
    assert sum(int(m.sum()) for m in single) == 31


def test_grasp_multiplies_the_weight_with_the_hessian_of_the_gradient():
    batches = [plain.batch(1), plain.batch(2)]
    xs, biases = parts()
    sizes = [x.numel() for x in xs]

    def loss(flat):
        pieces = [piece.reshape(x.shape) for piece, x in zip(flat.split(sizes), xs, strict=True)]
        return loss_of(pieces, biases, batches, scale=200.0)

    flat = torch.cat([x.detach().reshape(-1) for x in xs]).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(flat), flat)
    score = (flat * (torch.autograd.functional.hessian(loss, flat) @ gradient)).detach()
    wanted = plain.top([piece.reshape(x.shape) for piece, x in zip(score.split(sizes), xs, strict=True)], 31)
    _, found = masks_of("grasp", batches)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_synflow_prunes_in_a_hundred_exponential_rounds():
    xs, biases = parts()
    masks = [torch.ones_like(x) for x in xs]
    for step in range(1, 101):
        live = [(x.detach().abs() * m).requires_grad_() for x, m in zip(xs, masks, strict=True)]
        h = torch.ones(1, 6, dtype=torch.float64)
        for i, (x, b) in enumerate(zip(live, biases, strict=True)):
            h = h @ x.T + b.abs()
            h = torch.tanh(h) if i < 2 else h
        grads = torch.autograd.grad(h.sum(), live)
        scores = [(x * g).detach().masked_fill(m == 0, -1.0) for x, g, m in zip(live, grads, masks, strict=True)]
        masks = [m.double() for m in plain.top(scores, round(0.3 ** (step / 100) * 103))]
    model, found = masks_of("synflow", [plain.batch(1)])
    assert all(torch.equal(a, b.bool()) for a, b in zip(found, masks, strict=True))
    assert model.training


def test_measuring_scores_leaves_gradients_buffers_and_modes_alone():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x, y = torch.randn(8, 6), torch.randint(0, 3, (8,))
    for name in ("snip", "synflow", "grasp"):
        optimizer = mm.sparsify(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            mm.Method(mm.geometry.Euclidean(), mm.decay.ConstantDecay(), mm.masks.Gradual(0.5, score=name)),
            steps=9,
            batches=[(x, y)],
        )
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
        assert model.training
        assert "score" in optimizer.state_dict()["state"][0]  # a schedule that prunes later ranks by it
