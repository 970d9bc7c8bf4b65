"""What methods share: patterns, rounds, growth, data before the first step, and refusals with a remedy."""

import itertools
import warnings

import pytest
import torch
from torch import nn

import mirrormask as mm
from mirrormask.corrections import Hyperbolic, Proximal
from mirrormask.decay import ConstantDecay
from mirrormask.geometry import (
    Consensus,
    DeepProduct,
    Euclidean,
    Hadamard,
    MirrorDescent,
    Power,
    SigmoidMask,
    SignIn,
    SoftThreshold,
)
from mirrormask.masks import Alternating, AtStart, Gradual, Iterative, Regrow, floors, protect
from mirrormask.optimizer.due import gradients_for_growth
from mirrormask.progress import Clock


def mlp(*sizes):
    torch.manual_seed(1)
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def train(model, optimizer, steps, first=0, scheduler=None):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, *model_input(model), generator=generator)
        y = torch.randint(0, 4, (16,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(1)[:, :4], y).backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
        if step % 10 == 9:
            optimizer.epoch_end(score=step / 1000)


def model_input(model):
    return (model[0].in_channels, 4, 4) if isinstance(model[0], nn.Conv2d) else (model[0].in_features,)


# -- N:M patterns ---------------------------------------------------------------------------------------------------


def test_a_pattern_that_an_eye_can_check():
    scores = torch.tensor([[4.0, 1.0, 2.0, 3.0, 1.0, 1.0, 1.0, 1.0]])
    inf = float("inf")
    assert protect(scores, "2:4").tolist() == [[inf, 1.0, 2.0, inf, inf, inf, 1.0, 1.0]]
    conv = torch.arange(8.0).reshape(1, 4, 1, 2)  # channels 0, 2, 4, 6 at one place, 1, 3, 5, 7 at the other
    assert protect(conv, "1:4").isinf().flatten().tolist() == [False] * 6 + [True] * 2


MAGNITUDE_SCORED = [
    name
    for name in mm.methods.names()
    if name
    not in ("dense", "erk", "erk_ham", "rigl", "rigl_ham", "set", "sign_in", "sparseopt", "str", "str_ham", "cs")
]


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
@pytest.mark.parametrize("name", MAGNITUDE_SCORED)
def test_every_method_that_scores_weights_ends_in_the_pattern(name, pattern):
    n, m = map(int, pattern.split(":"))
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(256, 8, bias=False))
    method = mm.methods.get(name)(1 - n / m, pattern=pattern)
    data = {"batches": [(torch.randn(4, 8, 4, 4), torch.randint(0, 8, (4,)))]} if method.reads_data else {}
    optimizer = mm.sparsify(model, sgd(model), method, steps=30, **data)
    train(model, optimizer, 30)
    optimizer.finalize()
    for x in optimizer.weights.values():
        groups = x.detach().movedim(1, -1).reshape(-1, m)
        assert ((groups != 0).sum(1) == n).all()


def test_a_gradual_pattern_prunes_only_what_the_pattern_can_spare():
    model = mlp(16, 16, 4)
    optimizer = mm.sparsify(model, sgd(model), mm.methods.gmp(0.5, pattern="2:4", every=0.1), steps=40)
    for step in range(40):
        train(model, optimizer, 1, step)
        for x in optimizer.weights.values():
            assert ((x.reshape(-1, 4) != 0).sum(1) >= 2).all()


@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(8, 8, 3), nn.Bilinear(8, 8, 8)])
def test_a_pattern_is_refused_where_it_would_not_run_along_the_input(layer):
    with pytest.raises(ValueError, match=r"dimension 1, which is not the input of 'weight'.*leave it out"):
        mm.sparsify(layer, sgd(layer), mm.methods.gmp(0.5, pattern="2:4"), steps=10)
    mm.sparsify(layer, sgd(layer), mm.methods.gmp(0.5), steps=10)


# -- rounds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "first"),
    [("lth", {}, 20), ("lrr", {}, 20), ("wr", {"rewind_to": 0.2}, 25)],
)
@pytest.mark.parametrize("kind", ["cosine", "step", "lambda"])
def test_learning_rates_of_the_first_round_come_again_in_each(name, options, first, kind):
    model = mlp(8, 8, 4)
    method = mm.methods.get(name)(0.8, prunings=3 if name != "wr" else 4, **options)
    steps = 80 if name != "wr" else 105
    optimizer = mm.sparsify(model, sgd(model), method, steps=steps)
    assert optimizer.round_steps == first
    scheduler = {
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, first),
        "step": lambda: torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.5),
        "lambda": lambda: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: max(1 - t / first, 0)),
    }[kind]()
    seen = []
    for step in range(steps):
        train(model, optimizer, 1, step)  # the step has the rate of this moment
        seen.append(optimizer.base.param_groups[0]["lr"])
        scheduler.step()
    keep = method.mask.keep_at(steps) or 0
    later = seen[keep:first]
    assert seen == pytest.approx(seen[:first] + later * round((steps - first) / len(later)))
    assert max(seen[:first]) > 2 * min(seen[:first])


def test_lth_goes_back_to_the_start_and_lrr_does_not():
    for name, same in (("lth", True), ("lrr", False)):
        model = mlp(8, 8, 4)
        start = [p.detach().clone() for p in model.parameters()]
        optimizer = mm.sparsify(model, sgd(model), mm.methods.get(name)(0.75, prunings=2), steps=30)
        train(model, optimizer, 10)
        masks = [optimizer.masks.get(key, torch.ones(())) for key, _ in model.named_parameters()]
        assert sum(int(m.sum()) for m in optimizer.masks.values()) == 48
        back = all(torch.equal(p.detach(), s * m) for p, s, m in zip(model.parameters(), start, masks, strict=True))
        assert back is same
        assert not optimizer.base.state


def test_pilot_with_weight_rewinding_takes_its_decay_back_too():
    model = mlp(8, 8, 4)
    method = mm.methods.pilot_wr(0.8, alpha_init=0.1, prunings=2, rewind_to=0.5)
    optimizer = mm.sparsify(model, sgd(model), method, steps=40)
    train(model, optimizer, 10)
    early = optimizer.diagnostics()["decay_integral"], optimizer.state[model[0].weight]["m"].clone()
    train(model, optimizer, 9, 10)
    assert optimizer.diagnostics()["decay_integral"] > early[0]
    train(model, optimizer, 1, 19)  # step 20 prunes and goes back to step 10
    mask = optimizer.masks["0.weight"]
    assert optimizer.diagnostics()["decay_integral"] == early[0]
    assert torch.equal(optimizer.state[model[0].weight]["m"], early[1] * mask)


# -- reviving and growing -------------------------------------------------------------------------------------------


GEOMETRIES = [
    Euclidean(),
    Hadamard(),
    Consensus(),
    DeepProduct(),
    MirrorDescent(),
    Power(),
    SoftThreshold(),
    SigmoidMask(),
    SignIn(),
]


@pytest.mark.parametrize("correction", [None, Hyperbolic(), Proximal(1e-3, until=0.5)])
@pytest.mark.parametrize(
    "mask",
    [
        Alternating(0.7, phase=0.1),
        Regrow(0.7, every=0.1),
        Regrow(0.7, "random", 0.3, False, 0.1, 0.75, 0.5),
        Gradual(0.7, score="random"),
        AtStart(0.7, allocation="uniform"),
        Iterative(0.7, 2, 0.25),
    ],
    ids=lambda mask: type(mask).__name__ + getattr(mask, "grow", ""),
)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda geometry: type(geometry).__name__)
def test_each_combination_works(geometry, mask, correction):
    model = mlp(8, 12, 4)
    decay = ConstantDecay(1e-3 if geometry.latents else 0.0)
    optimizer = mm.sparsify(model, sgd(model, 0.05), mm.Method(geometry, decay, mask, correction=correction), steps=40)
    train(model, optimizer, 40)
    optimizer.finalize()
    assert sum(int(m.sum()) for m in optimizer.masks.values()) == round(0.3 * 144)
    assert mm.sparsity(model).nonzeros <= round(0.3 * 144)
    assert mm.sparsity(model).nonzeros >= round(0.3 * 144) - 2  # a weight may be zero of its own accord
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["gmp", "mirror", "pilot", "spred", "str", "cs", "acdc", "lth"])
def test_no_layer_is_emptied_while_its_floor_is_possible(name):
    """The second of three layers starts a thousand times smaller, and a global mask would leave nothing of it."""
    model = mlp(20, 24, 24, 4)
    with torch.no_grad():
        model[2].weight.mul_(1e-3)
    method = mm.methods.get(name)(0.95, floor=0.2)
    optimizer = mm.sparsify(model, sgd(model, 0.01), method, steps=40, on_empty="error")
    train(model, optimizer, 40)
    optimizer.finalize()
    living = [int(mask.sum()) for mask in optimizer.masks.values()]
    assert sum(living) == round(0.05 * (480 + 576 + 96))
    assert all(n >= least for n, least in zip(living, floors([(24, 20), (24, 24), (4, 24)], 0.95, 0.2), strict=True))


def test_acdc_frees_every_weight_in_its_dense_phases():
    model = mlp(8, 12, 4)
    optimizer = mm.sparsify(model, sgd(model), mm.methods.acdc(0.75, start_at=0.2, end_at=0.8, phase=0.2), steps=20)
    course = []
    for step in range(20):
        train(model, optimizer, 1, step)
        course.append(sum(int(mask.sum()) for mask in optimizer.masks.values()))
        if step == 14:
            assert all(x.all() for x in optimizer.weights.values())
    assert course == [144] * 3 + [36] * 4 + [144] * 8 + [36] * 5


def test_rigl_grows_where_the_gradient_is_largest_and_keeps_the_count_of_each_layer():
    model = nn.Linear(6, 1, bias=False)
    method = mm.methods.rigl(0.5, fraction=0.68, every=0.5, until=1.0)
    optimizer = mm.sparsify(model, torch.optim.SGD(model.parameters(), lr=1e-6), method, steps=2)
    alive = optimizer.masks["weight"].clone()
    weakest = int(model.weight.detach().abs().masked_fill(~alive, 9.0).argmin())
    grad = torch.linspace(2.0, 1.0, 6).reshape(1, 6)
    kept = alive.clone()
    kept[0, weakest] = False
    strongest = int(grad.masked_fill(kept, 0.0).argmax())  # the one that was dropped may come back, as in the paper
    model.weight.grad = grad
    optimizer.step()
    kept[0, strongest] = True
    assert torch.equal(optimizer.masks["weight"], kept)


def test_the_papers_a_is_stable_at_a_large_learning_rate_with_the_clip_and_not_without():
    sizes = {}
    for clip in (0.1, None):
        model = mlp(8, 32, 32, 4)
        optimizer = mm.sparsify(
            model, sgd(model, 0.1), mm.methods.gmp_ham(0.9, a=200.0, clip=clip), steps=200, on_empty="ignore"
        )
        train(model, optimizer, 200)
        sizes[clip] = max(float(p.detach().abs().max()) for p in model.parameters())
    assert sizes[0.1] < 5
    assert sizes[None] > 1e3


def test_str_and_cs_follow_the_course_of_sparsity_before_their_mask_is_fixed():
    for name in ("str", "cs"):
        model = mlp(20, 30, 4)
        optimizer = mm.sparsify(model, sgd(model), mm.methods.get(name)(0.9, every=0.1), steps=100)
        train(model, optimizer, 60)
        state = optimizer.state[model[0].weight]
        assert "mask" not in state
        alive = sum(
            int((optimizer.method.geometry.importance(optimizer.weights.latents_of(x)) > 0).sum())
            for x in optimizer.weights.values()
        )
        assert alive == round((1 - 0.9 * (1 - (1 - 50 / 65) ** 3)) * 720)
        train(model, optimizer, 20, 60)
        assert sum(int(m.sum()) for m in optimizer.masks.values()) == 72


@pytest.mark.parametrize("name", ["sign_in", "pilot_wr", "pilot_lrr", "pilot_init"])
def test_the_fused_step_follows_refreshed_factors_and_new_rounds(name):
    models = [mlp(8, 12, 4) for _ in range(2)]
    pair = [
        mm.sparsify(model, sgd(model, 0.02), mm.methods.get(name)(0.7), steps=40, fused=fused)
        for model, fused in zip(models, (True, False), strict=True)
    ]
    for step in range(40):
        for model, optimizer in zip(models, pair, strict=True):
            train(model, optimizer, 1, step)
        assert not pair[0]._steps or pair[0]._steps[0]._possible
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_the_ordinary_weight_pays_for_nothing_it_does_not_use():
    model = mlp(8, 12, 4)
    optimizer = mm.sparsify(model, sgd(model), mm.methods.gmp(0.5), steps=1000)
    train(model, optimizer, 3)
    assert optimizer.parts.training.rounds is None
    assert gradients_for_growth(optimizer.parts) is None
    states = [optimizer.state[x] for x in optimizer.weights.values()]
    assert all(set(state) == {"rate", "signs"} for state in states)
    assert all(set(state) <= {"momentum_buffer"} for state in optimizer.base.state.values())


# -- refusals -------------------------------------------------------------------------------------------------------


def wrap(method, model=None, **options):
    model = model or mlp(12, 16, 4)
    return mm.sparsify(model, sgd(model), method, steps=10, **options)


PAIR = (torch.zeros(2, 12), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mm.methods.gmp(0.9, beta=1.0), TypeError, "'gmp' does not read beta; its options: .*start_at"),
        (lambda: mm.methods.rigl(0.9, at=0.5), TypeError, "'rigl' does not read at; .*fraction, every"),
        (lambda: mm.methods.str(0.9, alpha=1.0), TypeError, "'str' does not read alpha"),
        (lambda: mm.methods.get("rigel"), ValueError, "unknown method 'rigel'; did you mean 'rigl'"),
        (lambda: mm.methods.erk(1.0), ValueError, r"sparsity=1.0 is outside \[0, 1\)"),
        (lambda: mm.methods.gmp(0.5, pattern="2-4"), ValueError, "pattern='2-4' is not 'N:M' with 0 < N < M"),
        (lambda: mm.methods.gmp(0.5, pattern="4:4"), ValueError, "pattern='4:4' is not"),
        (lambda: mm.methods.gmp(0.9, pattern="2:4"), ValueError, r"leaves 2 of 4: use sparsity=0\.5"),
        (lambda: mm.methods.gmp(0.5, allocation="erk", pattern="2:4"), ValueError, "'erk' does not fit pattern"),
        (lambda: Regrow(0.5, pattern="2:4"), ValueError, "keeps no N:M pattern; use gmp or acdc"),
        (lambda: mm.methods.acdc(0.9, start_at=0.9, end_at=0.5), ValueError, "start=0.9 is not before end=0.5"),
        (lambda: mm.methods.gmp(0.9, start_at=0.75), ValueError, "start=0.75 is not before end=0.75"),
        (lambda: mm.methods.acdc(0.9, end_at=1.2), ValueError, r"end=1.2 is outside \[0, 1\]"),
        (lambda: mm.methods.rigl(0.9, until=1.5), ValueError, r"until=1.5 is outside \(0, 1\]"),
        (lambda: mm.methods.l1(0.9, at=2.0), ValueError, r"at=2.0 is outside \(0, 1\]"),
        (lambda: mm.methods.rigl(0.9, fraction=1.0), ValueError, r"fraction=1.0 is outside \(0, 1\)"),
        (lambda: Regrow(0.9, grow="up"), ValueError, "unknown grow 'up'.*Known: gradient, random"),
        (lambda: mm.methods.lth(0.9, prunings=0), ValueError, "prunings=0 is below 1"),
        (lambda: mm.methods.wr(0.9, rewind_to=1.0), ValueError, r"rewind_to=1.0 is outside \[0, 1\)"),
        (lambda: mm.methods.ham(0.9, a=-1.0), ValueError, r"a=-1.0 is outside \[0, inf\)"),
        (lambda: mm.methods.ham(0.9, clip=0.0), ValueError, r"clip=0.0 is outside \(0, inf\)"),
        (lambda: mm.methods.powerprop(0.9, power=0.5), ValueError, r"power=0.5 is outside \[1, inf\)"),
        (lambda: mm.methods.cs(0.9, final=0.5), ValueError, r"final=0.5 is outside \[1, inf\)"),
        (lambda: mm.methods.str(0.9, init_threshold=0.0), ValueError, r"init_threshold=0.0 is outside \(0, 1\]"),
        (lambda: mm.methods.random(0.9, seed=-1), ValueError, "seed=-1 is below 0"),
        (lambda: wrap(mm.methods.snip(0.9)), ValueError, r"'snip' needs data .*pass batches=\[\(input, target\)"),
        (lambda: wrap(mm.methods.grasp(0.9), batches=[]), ValueError, "batches is empty; .*at least one pair"),
        (lambda: wrap(mm.methods.snip(0.9), batches=[PAIR[0]]), ValueError, "holds a Tensor; it must hold pairs"),
        (
            lambda: wrap(mm.methods.synflow(0.9), batches=[(PAIR[1], PAIR[1])]),
            ValueError,
            "the input must be one floating tensor",
        ),
        (lambda: wrap(mm.methods.gmp(0.9), batches=[PAIR]), ValueError, "'gmp' reads no data; leave out batches="),
        (
            lambda: wrap(mm.methods.gmp(0.9), on_empty="stop"),
            ValueError,
            "unknown on_empty 'stop'.*error, ignore, warn",
        ),
        (lambda: wrap(mm.methods.gmp(0.999)), ValueError, "leaves none of 256 weights; the highest possible is 0.99"),
        (
            lambda: wrap(mm.methods.gmp(0.5, pattern="2:4"), mlp(10, 16, 4)),
            ValueError,
            r"input dimension .*not so in 0.weight \(16, 10\); leave them out with weights=",
        ),
        (
            lambda: wrap(mm.methods.gmp(0.9, allocation="uniform"), mlp(12, 16, 1, 4), on_empty="error"),
            ValueError,
            r"leaves nothing of 4\.weight; leave the layer out",
        ),
        (lambda: mm.Method(Euclidean(), ConstantDecay(), Gradual(0.5), correction=1), TypeError, "not a Correction"),
    ],
)
def test_refusals_come_before_the_first_step_and_name_the_remedy(call, error, message):
    with pytest.raises(error, match=message):
        call()


def starved():
    model = mlp(12, 16, 4)
    with torch.no_grad():
        model[2].weight.mul_(1e-6)
    return model


def test_an_emptied_layer_is_an_error_a_warning_or_nothing_as_asked():
    method = mm.methods.magnitude(0.9, at=0.1, floor=0.0)
    with pytest.raises(ValueError, match=r"leaves nothing of 2\.weight; leave the layer out"):
        model = starved()
        train(model, wrap(method, model, on_empty="error"), 10)
    with pytest.warns(UserWarning, match=r"leaves nothing of 2\.weight") as caught:
        model = starved()
        train(model, wrap(method, model), 10)
    assert caught[0].filename == __file__, "the warning points at the caller's line"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = starved()
        train(model, wrap(method, model, on_empty="ignore"), 10)


def test_a_schedule_is_over_before_training_is():
    for name in mm.methods.names():
        mask = mm.methods.get(name)(0.0 if name == "dense" else 0.9).mask
        final = [s for step in range(1001) if (s := mask.sparsity_at(Clock(step, 1000))) is not None]
        assert not final or final[-1] == 0.9


def test_the_table_names_each_method_once_with_its_reference():
    rows = mm.methods.table()
    assert [row.name for row in rows] == sorted(mm.methods.names())
    assert all(row.reference for row in rows)
    with pytest.raises(ValueError, match="'gmp' exists already"):
        mm.methods.named("nobody", name="gmp")(mm.methods.magnitude)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize(("factors", "kind"), [(True, Hadamard), (False, MirrorDescent)])
def test_mirror_trains_factors_or_does_without_them_whatever_the_base(make, factors, kind):
    model = mlp(8, 12, 4)
    method = mm.methods.mirror(0.5, factors=factors)
    optimizer = mm.sparsify(model, make(model.parameters(), lr=0.01), method, steps=9)
    assert type(optimizer.method.geometry) is kind


def test_without_factors_the_bound_on_a_step_is_tighter_where_the_base_rescales_gradients():
    assert mm.methods.mirror(0.5, factors=False).under(adaptive=False).geometry.clip == MirrorDescent.clip
    assert mm.methods.mirror(0.5, factors=False).under(adaptive=True).geometry.clip == 0.01
    assert mm.methods.mirror(0.5, factors=False, clip=0.2).under(adaptive=True).geometry.clip == 0.2


@pytest.mark.parametrize(
    ("options", "scores"),
    [
        ({}, ("magnitude", "balanced")),
        ({"growth": None}, ("magnitude", "sensitivity")),
        ({"score": "magnitude"}, ("magnitude", "magnitude")),
        ({"score": "lamp"}, ("lamp", "lamp")),
    ],
)
def test_mirror_counts_the_gradient_where_the_base_rescales_gradients(options, scores):
    method = mm.methods.mirror(0.5, **options)
    found = [method.under(adaptive=adaptive) for adaptive in (False, True)]
    assert tuple(m.mask.score for m in found) == scores
    assert [m.name for m in found] == ["mirror", "mirror"]


def test_a_method_has_one_sparsity_whatever_the_base():
    parts = mm.geometry.Euclidean(), mm.decay.ConstantDecay()
    other = mm.Method(*parts, mm.masks.OneShot(0.8))
    with pytest.raises(ValueError, match=r"adaptive= asks for sparsity 0\.8 where the method itself asks for 0\.9"):
        mm.Method(*parts, mm.masks.OneShot(0.9), adaptive=other)


def test_mirror_refuses_a_bound_that_factors_do_not_read():
    with pytest.raises(
        ValueError, match=r"clip=0\.2 bounds the step of mirror descent; leave it out, or give factors=False"
    ):
        mm.methods.mirror(0.5, clip=0.2)
    with pytest.raises(ValueError, match="clip"):
        mm.methods.mirror(0.5, clip="none", factors=False)
    assert mm.methods.mirror(0.5, clip=0.2, factors=False).geometry.clip == 0.2
    assert mm.methods.mirror(0.5, clip=None, factors=False).geometry.clip is None
    assert mm.methods.mirror(0.5, factors=False).geometry.clip == MirrorDescent.clip
