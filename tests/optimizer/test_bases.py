"""Any base optimizer, equal to itself: dense around it is the bare optimizer bit for bit, and resumes bit for bit."""

import copy

import pytest
import schedulefree
import timm.optim
import torch
from torch import nn
from torch.testing._internal.common_optimizers import optim_db

import mirrormask as mm

X = torch.randn(64, 12, generator=torch.Generator().manual_seed(1))
Y = X[:, :4].argmax(1)
STEPS, CUT = 40, 17

#: Of torch: each class under each set of options that its own tests know. What is left out, and why:
#: LBFGS evaluates the model within its step and SparseAdam wants sparse gradients, both of which mm.sparsify refuses;
#: differentiable steps are refused; capturable ones need an accelerator.
TORCH = {
    f"{info.optim_cls.__name__}: {inputs.desc}": (info.optim_cls, inputs.kwargs)
    for info in optim_db
    if info.optim_cls.__name__ not in ("LBFGS", "SparseAdam")
    for inputs in info.optim_inputs_func(device="cpu")
    if not {"differentiable", "capturable"} & {key for key, value in inputs.kwargs.items() if value}
}
SCHEDULE_FREE = {
    "SGDScheduleFree": (schedulefree.SGDScheduleFree, {"warmup_steps": 5}),
    "AdamWScheduleFree": (schedulefree.AdamWScheduleFree, {"warmup_steps": 5}),
    "RAdamScheduleFree": (schedulefree.RAdamScheduleFree, {}),
    "AdamWScheduleFreeReference": (schedulefree.AdamWScheduleFreeReference, {"warmup_steps": 5}),
}
#: kron draws random numbers that it keeps outside of its state dict, adahessian needs a graph of the gradient, and
#: fused ones need another package. A cautious variant (clion) has the state of its original.
NAMES = timm.optim.list_optimizers()
TIMM = [
    name
    for name in NAMES
    if not any(part in name for part in ("kron", "adahessian", "bnb", "fused"))
    and not (name[0] == "c" and name[1:] in NAMES)
]
#: One of each family for the methods that put latents in the weights' place.
FAMILIES = ("lamb", "lion", "adan", "adanw", "muon", "nadamw", "adafactor", "adafactorbv", "lars", "madgrad", "mars")


def net(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16, bias=bias), nn.Tanh(), nn.Linear(16, 4, bias=bias))


def train(model, optimizer, scheduler, first, last):
    for _ in range(first, last):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
        scheduler.step()


def start(make, method=None, bias=True):
    """A model with its optimizer, bare without a method, and a scheduler on it."""
    model = net(bias)
    optimizer = make(model.parameters())
    if method is not None:
        optimizer = mm.sparsify(model, optimizer, method, steps=STEPS)
    if hasattr(optimizer, "train"):
        optimizer.train()
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def resumed(make, method, run, bias=True):
    """Another run that loads ``run`` after CUT steps, and both at the end."""
    train(*run, 0, CUT)
    saved = copy.deepcopy([part.state_dict() for part in run])
    train(*run, CUT, STEPS)
    other = start(make, method, bias)
    for part, state in zip(other, saved, strict=True):
        part.load_state_dict(state)
    train(*other, CUT, STEPS)
    return other


def check_equal_and_resumed(make, bias=True):
    bare = start(make, bias=bias)
    train(*bare, 0, STEPS)
    run = start(make, mm.methods.dense(), bias)
    other = resumed(make, mm.methods.dense(), run, bias)
    assert same(bare[0], run[0]), "in the wrapper it takes other steps"
    assert same(run[0], other[0]), "it resumes elsewhere"
    if hasattr(bare[1], "eval"):
        bare[1].eval()
        run[1].eval()
        assert same(bare[0], run[0]), "eval() does not reach the weights"


def rate(kwargs):
    return kwargs if "lr" in kwargs else {**kwargs, "lr": 0.01}


@pytest.mark.parametrize("case", TORCH)
def test_an_optimizer_of_torch_is_itself_within_the_wrapper(case):
    kind, kwargs = TORCH[case]  # a tensor for a rate is written into by schedulers
    check_equal_and_resumed(lambda p: kind(p, **rate(copy.deepcopy(kwargs))), bias=kind.__name__ != "Muon")


@pytest.mark.parametrize("name", TIMM)
def test_an_optimizer_of_timm_is_itself_within_the_wrapper(name):
    check_equal_and_resumed(lambda p: timm.optim.create_optimizer_v2(list(p), opt=name, lr=0.01))


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_a_schedule_free_optimizer_is_itself_within_the_wrapper(name):
    kind, kwargs = SCHEDULE_FREE[name]
    check_equal_and_resumed(lambda p: kind(p, lr=0.01, **kwargs))


MAKERS = {
    **{f"timm {n}": lambda p, n=n: timm.optim.create_optimizer_v2(list(p), opt=n, lr=0.01) for n in FAMILIES},
    **{name: lambda p, kind=kind: kind(p, lr=0.01) for name, (kind, _) in SCHEDULE_FREE.items()},
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "SGD with a tensor for its rate": lambda p: torch.optim.SGD(p, lr=torch.tensor(0.01), momentum=0.9, foreach=False),
    "AdamW with a tensor for its rate": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "AdamW of named parameters": lambda p: torch.optim.AdamW([(str(i), q) for i, q in enumerate(p)], lr=0.01),
}


@pytest.mark.parametrize("base", MAKERS)
@pytest.mark.parametrize("name", ["mirror", "mirror/descent", "gmp"])
def test_each_base_ends_exactly_as_sparse_as_asked_and_resumes(name, base):
    def method():
        if name == "mirror/descent":
            return mm.methods.mirror(0.8, factors=False)
        return mm.methods.get(name)(0.8)

    run = start(MAKERS[base], method())
    other = resumed(MAKERS[base], method(), run)
    assert same(run[0], other[0])
    for model, optimizer, _ in (run, other):
        optimizer.eval()
        optimizer.finalize()
        found = mm.sparsity(model)
        assert found.nonzeros == round(0.2 * found.numel)


def test_what_a_base_counts_in_its_groups_is_kept_and_shown():
    model, optimizer, scheduler = start(lambda p: schedulefree.AdamWScheduleFree(p, lr=0.01), mm.methods.mirror(0.8))
    train(model, optimizer, scheduler, 0, 5)
    assert [group["k"] for group in optimizer.base.param_groups] == [5] * len(optimizer.base.param_groups)
    assert optimizer.param_groups[0]["k"] == 5
    other = start(lambda p: schedulefree.AdamWScheduleFree(p, lr=0.01), mm.methods.mirror(0.8))[1]
    other.eval()  # as trainers save and load it, Accelerate before the first step too
    other.load_state_dict(other.state_dict())
    other.load_state_dict(optimizer.state_dict())
    assert [group["k"] for group in other.base.param_groups] == [5] * len(other.base.param_groups)


class Noisy(torch.optim.SGD):
    """Draws a random number in each step, as those do that add noise or choose what to precondition."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.add_(torch.randn_like(p), alpha=1e-3)
        return super().step(closure)


@pytest.mark.parametrize("name", ["mirror", "dense"])
def test_making_saving_and_loading_draw_no_random_numbers(name):
    model = net()
    before = torch.get_rng_state()
    optimizer = mm.sparsify(
        model,
        Noisy(model.parameters(), lr=0.1, momentum=0.9),
        mm.methods.get(name)(0.0 if name == "dense" else 0.8),
        steps=STEPS,
    )
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", ["mirror", "gmp", "dense"])
def test_train_and_eval_of_a_base_reach_the_weights_and_keep_the_zeros(name):
    method = mm.methods.get(name)(0.0 if name == "dense" else 0.8)
    model, optimizer, scheduler = start(lambda p: schedulefree.SGDScheduleFree(p, lr=0.1), method)
    train(model, optimizer, scheduler, 0, 30)
    trained = copy.deepcopy(model)
    optimizer.eval()
    assert not same(trained, model)
    zeros = {key: ~mask for key, mask in optimizer.masks.items()}
    assert not any(x[zeros[key]].any() for key, x in optimizer.weights.items())
    optimizer.train()
    for a, b in zip(trained.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not any(x[zeros[key]].any() for key, x in optimizer.weights.items())


@pytest.mark.parametrize("name", ["dense", "mirror", "gmp", "lth"])
def test_a_lookahead_around_it_resumes_with_its_slow_weights(name):
    """It keeps them in the state of what it wraps, and saves them with that."""

    def run(cut):
        method, saved = mm.methods.get(name)(0.0 if name == "dense" else 0.8), None
        for first, last in (0, cut), (cut, STEPS):
            model = net()
            base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            own = mm.sparsify(model, base, method, steps=STEPS)
            optimizer = timm.optim.Lookahead(own, k=3)
            if saved and cut:
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
                assert all("lookahead_slow_buff" in own.state[p] for p in model.parameters())
            for _ in range(first, last):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(X), Y).backward()
                optimizer.step()
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        own.finalize()
        return list(model.parameters())

    assert all(map(torch.equal, run(0), run(CUT)))


def test_a_linear_base_is_known_as_one():
    for make, adaptive in (
        (lambda p: torch.optim.SGD(p, lr=0.1), False),
        (lambda p: torch.optim.ASGD(p, lr=0.1), False),
        (lambda p: schedulefree.SGDScheduleFree(p, lr=0.1), False),
        (lambda p: torch.optim.Adam(p, lr=0.1), True),
        (lambda p: timm.optim.create_optimizer_v2(list(p), opt="lion", lr=0.1), True),
    ):
        optimizer = start(make, mm.methods.mirror(0.8))[1]
        assert optimizer.parts.base.adaptive is adaptive
