"""Torch's protocol, whole: what its own tests ask of every optimizer, asked of the wrapper.

The properties are those of torch's test/test_optim.py, over ``mirror``, ``mirror(factors=False)`` and ``gmp`` around
SGD and AdamW. Where the wrapper differs from the bare base the test says so, and why.
"""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.two_tensor import TwoTensor

import mirrormask as mm

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
Y = X[:, :3].argmax(1)
METHODS = {
    "mirror": lambda: mm.methods.mirror(0.5),
    "mirror/descent": lambda: mm.methods.mirror(0.5, factors=False),
    "gmp": lambda: mm.methods.gmp(0.5),
}
BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
}
each = [pytest.mark.parametrize("name", METHODS), pytest.mark.parametrize("base", BASES)]


def over_all(function):
    for mark in each:
        function = mark(function)
    return function


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))


def start(name, base, steps=20):
    model = net()
    return model, mm.sparsify(model, BASES[base](model.parameters()), METHODS[name](), steps=steps)


def backward(model):
    loss = nn.functional.cross_entropy(model(X), Y)
    loss.backward()
    return loss


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()


def snapshot(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(before, after):
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# -- hooks ------------------------------------------------------------------------------------------------------------


@over_all
def test_step_hooks_run_once_in_order_and_may_see_the_arguments(name, base):
    model, optimizer = start(name, base)
    calls = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, args, kwargs: calls.append("global pre")),
        optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append("pre")),
        optimizer.base.register_step_pre_hook(lambda o, args, kwargs: calls.append("base pre")),
        optimizer.base.register_step_post_hook(lambda o, args, kwargs: calls.append("base post")),
        optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append("post")),
        register_optimizer_step_post_hook(lambda o, args, kwargs: calls.append("global post")),
    ]
    train(model, optimizer, 1)
    for handle in handles:
        handle.remove()
    train(model, optimizer, 1)
    # torch runs an optimizer's own hooks before the global ones after a step
    assert calls == ["global pre", "pre", "base pre", "base post", "post", "global post"]


@over_all
def test_a_step_with_hooks_on_the_base_is_the_step_without(name, base):
    results = []
    for hooked in (False, True):
        model, optimizer = start(name, base)
        if hooked:
            optimizer.base.register_step_post_hook(lambda o, args, kwargs: None)
        train(model, optimizer, 20)
        results.append(snapshot(model))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-5)


@over_all
def test_hooks_of_state_dict_and_load_state_dict_run(name, base):
    model, optimizer = start(name, base)
    train(model, optimizer, 3)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("state pre"))

    def mark(o, state):
        calls.append("state post")
        state["mark"] = 1

    optimizer.register_state_dict_post_hook(mark)

    def change(o, state):
        calls.append("load pre")
        groups = [{**group, "lr": 0.5} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(change)
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("load post"))
    state = optimizer.state_dict()
    assert state["mark"] == 1
    optimizer.load_state_dict(state)
    assert calls == ["state pre", "state post", "load pre", "load post"]
    assert [group["lr"] for group in optimizer.param_groups] == [0.5]


# -- state ------------------------------------------------------------------------------------------------------------


@over_all
def test_a_state_dict_is_a_round_trip_and_loading_does_not_share(name, base):
    # The difference from the bare base: torch keeps the tensors that it is given, here none is shared.
    model, optimizer = start(name, base)
    train(model, optimizer, 7)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    again = optimizer.state_dict()
    assert pickle.dumps(state["param_groups"]) == pickle.dumps(again["param_groups"])
    for index, entry in state["state"].items():
        assert set(entry) == set(again["state"][index])
        for key, value in entry.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, again["state"][index][key])
                assert value.data_ptr() != again["state"][index][key].data_ptr()
            else:
                assert value == again["state"][index][key]


@over_all
def test_the_state_dict_is_made_of_what_torch_load_reads_without_code(name, base, tmp_path):
    model, optimizer = start(name, base)
    train(model, optimizer, 7)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    other = start(name, base)[1]
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.step_count == 7


class Wrapper(nn.Module):
    """What DistributedDataParallel does to names."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


WRAPPERS = {"bare": lambda m: m, "module.": Wrapper, "_orig_mod.": lambda m: torch.compile(m, backend="eager")}


@pytest.mark.parametrize(("saved", "loaded"), [(a, b) for a in WRAPPERS for b in WRAPPERS if a != b])
@pytest.mark.parametrize("name", METHODS)
def test_what_wrappers_put_into_names_does_not_matter_to_a_load(name, saved, loaded):
    def start_as(wrapper):
        model = net()
        outer = WRAPPERS[wrapper](model)
        return model, mm.sparsify(outer, BASES["sgd"](outer.parameters()), METHODS[name](), steps=20)

    model, optimizer = start_as(saved)
    train(model, optimizer, 12)
    other, resumed = start_as(loaded)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 8)
    train(other, resumed, 8)
    assert equal(snapshot(model), snapshot(other))
    assert resumed.step_count == 20


def test_names_that_only_a_wrappers_name_tells_apart_are_told_apart():
    def build():
        within = nn.ModuleDict({"fc": nn.Linear(6, 6, bias=False)})
        model = nn.ModuleDict({"module": within, "fc": nn.Linear(6, 6, bias=False)})
        return mm.sparsify(model, sgd(model), METHODS["gmp"](), steps=5)

    optimizer = build()
    assert list(optimizer.weights) == ["module.fc.weight", "fc.weight"]
    build().load_state_dict(optimizer.state_dict())


@over_all
def test_copies_go_on_alike_and_leave_the_original_alone(name, base):
    model, optimizer = start(name, base)
    train(model, optimizer, 5)
    before = snapshot(model)
    twin_model, twin = copy.deepcopy((model, optimizer))
    train(twin_model, twin, 5)
    assert equal(before, snapshot(model))
    train(model, optimizer, 5)
    assert equal(snapshot(model), snapshot(twin_model))


@over_all
def test_nothing_outlives_the_optimizer(name, base):
    model, optimizer = start(name, base)
    train(model, optimizer, 3)
    watch = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert watch() is None


@over_all
@pytest.mark.cases(1)
def test_of_two_optimizers_over_one_weight_the_older_one_is_refused(name, base, tmp_path):
    model, older = start(name, base)
    train(model, older, 2)
    newer = mm.sparsify(model, BASES[base](model.parameters()), METHODS[name](), steps=20, weights="2.*")
    before = snapshot(model)
    for call in (older.step, older.finalize):
        with pytest.raises(RuntimeError, match=r"called again for 2\.weight.* step the newer optimizer only"):
            call()
    assert equal(before, snapshot(model))
    train(model, newer, 2)
    state = copy.deepcopy(older.state_dict())
    other, resumed = start(name, base)  # another model is another's
    resumed.load_state_dict(state)
    train(other, resumed, 2)
    twin_model, twin = copy.deepcopy((model, older))
    train(twin_model, twin, 2)
    torch.save(model, tmp_path / "model.pt")
    pickle.loads(pickle.dumps((model, older)))[1].step()
    del newer
    train(model, older, 2)


@over_all
def test_one_optimizer_after_the_other_is_one_too(name, base):
    model, optimizer = start(name, base)
    train(model, optimizer, 20)
    optimizer.finalize()
    for _ in range(2):
        optimizer = mm.sparsify(model, BASES[base](model.parameters()), METHODS[name](), steps=3)
        train(model, optimizer, 3)
    optimizer.finalize()
    assert mm.sparsity(model).nonzeros == 45


# -- gradients --------------------------------------------------------------------------------------------------------


@over_all
def test_closures_set_to_none_and_empty_gradients(name, base):
    model, optimizer = start(name, base)

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        return backward(model)

    assert optimizer.step(closure) > 0
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    before = snapshot(model)
    optimizer.step()
    assert equal(before, snapshot(model))
    optimizer.zero_grad(set_to_none=False)


@over_all
def test_a_step_with_zero_gradients_moves_as_little_as_the_base_does(name, base):
    # The difference from the bare base: latents hold x to the last bits only, and decay where the method decays them.
    model, optimizer = start(name, base)
    before = snapshot(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old, rtol=1e-2, atol=1e-6)


@over_all
def test_frozen_parameters_stay_and_complain_of_nothing(name, base):
    model = net()
    model[0].requires_grad_(False)
    frozen = snapshot(model[0])
    optimizer = mm.sparsify(model, BASES[base](model.parameters()), METHODS[name](), steps=20)
    assert list(optimizer.weights) == ["2.weight"]
    train(model, optimizer, 20)
    optimizer.finalize()
    assert equal(frozen, snapshot(model[0]))
    start_again = mm.sparsify(model, BASES[base](model.parameters()), METHODS[name](), steps=20)
    start_again.load_state_dict(optimizer.state_dict())


@over_all
def test_gradients_are_left_as_they_are(name, base):
    # The difference from some bases: none. A step reads gradients, and clipping and logging may read them after it.
    model, optimizer = start(name, base)
    backward(model)
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert equal(before, [p.grad for p in model.parameters()])


@over_all
def test_an_empty_group_and_groups_of_their_own_rates(name, base):
    model = net()
    groups = [{"params": [model[0].weight], "lr": 0.0}, {"params": []}, {"params": [*model[2].parameters()]}]
    optimizer = mm.sparsify(model, BASES[base](groups), METHODS[name](), steps=1000)
    before = model[0].weight.detach().clone()
    train(model, optimizer, 3)
    torch.testing.assert_close(model[0].weight.detach(), before, rtol=2e-2, atol=1e-6)  # it may decay
    optimizer.add_param_group({"params": [model[0].bias], "lr": 0.5})
    bias = model[0].bias.detach().clone()
    train(model, optimizer, 1)
    assert (model[0].bias - bias).abs().max() > 1e-3


@over_all
def test_the_step_within_a_compiled_function_is_the_step(name, base):
    results = []
    for compiled in (False, True):
        model, optimizer = start(name, base)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(20):
            optimizer.zero_grad()
            backward(model)
            step()
        optimizer.finalize()
        results.append(snapshot(model))
    assert equal(*results)


# -- what is refused, at construction ---------------------------------------------------------------------------------


class ZeroRedundancyOptimizer(torch.optim.SGD):
    """By its name, as the real one needs processes."""


class Within(torch.optim.Optimizer):
    """Steps through another one, as Lookahead, SAM, PostLocalSGDOptimizer and Lightning's Fabric do."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = {"first": inner}
        self.param_groups = inner.param_groups

    def step(self, closure=None):
        return self.inner["first"].step(closure)


class Rateless(torch.optim.Optimizer):
    """Makes its own rate, as Hugging Face's Adafactor."""

    def __init__(self, params):
        super().__init__(params, {"lr": None})


class Asking(torch.optim.SGD):
    def step(self, closure):
        return super().step(closure)


def shared(how):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Embedding(4, 4))
    if how == "transposed":
        model[2].weight = nn.Parameter(model[0].weight.detach().t())
    elif how == "an embedding's":
        model[2].weight = nn.Parameter(model[3].weight.detach())
    else:
        both = torch.randn(4, 8)
        first = both[:, 2:6] if how == "some columns" else both[:, :4]
        model[0].weight, model[2].weight = nn.Parameter(first), nn.Parameter(both[:, 4:])
    return model


def of_two():
    model = net()
    weight = model[0].weight.detach()
    model[0].weight = nn.Parameter(TwoTensor(weight.clone(), weight.clone()))
    return model


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.complex64))


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def wrap(model, base=None, weights=None):
    return mm.sparsify(model, base or sgd(model), METHODS["mirror"](), steps=5, weights=weights)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: (m := net()) and wrap(m, sgd(m, differentiable=True)), "differentiable=True.*leave it out"),
        (
            lambda: mm.sparsify(m := net(), sgd(m, maximize=True), mm.methods.gmp_ham(0.5), steps=5),
            "negate the loss instead",
        ),
        (lambda: (m := net()) and wrap(m, ZeroRedundancyOptimizer(m.parameters(), lr=0.1)), "pass the optimizer that"),
        (lambda: (m := net()) and wrap(m, Within(sgd(m))), "steps through the SGD that it holds.*wrap what it returns"),
        (lambda: (m := net()) and wrap(m, Asking(m.parameters(), lr=0.1)), "needs a closure.*use SGD or Adam"),
        (lambda: (m := net()) and wrap(m, Rateless(m.parameters())), "lr=None is no number.*relative_step=False"),
        (
            lambda: wrap(m := shared("transposed"), sgd(m)),
            r"'0\.weight' and '2\.weight' are two parameters in one memo",
        ),
        (
            lambda: wrap(m := shared("an embedding's"), sgd(m)),
            r"'2\.weight' and '3\.weight'|'3\.weight' and '2\.weight'",
        ),
        (lambda: wrap(m := shared("some columns"), sgd(m)), "make them one parameter"),
        (lambda: wrap(m := of_two(), sgd(m)), r"0\.weight is a TwoTensor.*sparsify the model first"),
        (
            lambda: wrap(m := nn.Linear(4, 3).to(torch.float8_e5m2), sgd(m), ["weight"]),
            "floating-point parameters of 16",
        ),
        (lambda: (m := net()) and wrap(m, torch.optim.SparseAdam(m.parameters())), "use Adam"),
        (lambda: wrap(m := net().to("meta"), sgd(m)), "meta device"),
        (lambda: wrap(m := torch.inference_mode()(net)(), sgd(m)), "made in inference mode.* build the model outside"),
        (lambda: wrap(m := nn.Sequential(nn.LazyLinear(3)), sgd(m)), "lazy"),
        (lambda: wrap(m := Complex(), sgd(m), ["weight"]), "complex"),
        (lambda: wrap(m := nn.Embedding(5, 3, sparse=True), sgd(m), ["weight"]), "sparse=False"),
        (lambda: wrap(m := net(), sgd(m)).add_param_group({"params": [], "differentiable": True}), "differentiable"),
    ],
)
def test_what_cannot_be_right_is_refused_at_construction_with_a_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": None}, "lr=None is no number"),
        ({"lr": "0.1"}, "lr='0.1' is no number"),
        ({"differentiable": True}, "differentiable=True.*leave it out"),
        ({"maximize": True}, "negate the loss instead"),
    ],
)
def test_what_is_refused_at_construction_is_refused_later_too(options, message):
    model = net()
    optimizer = mm.sparsify(model, sgd(model), mm.methods.gmp_ham(0.5), steps=5)
    before, good = snapshot(model), dict(optimizer.param_groups[0])
    optimizer.param_groups[0].update(options)
    for _ in range(2):
        backward(model)
        for call in (optimizer.step, optimizer.state_dict):
            with pytest.raises(ValueError, match=message):
                call()
    assert equal(before, snapshot(model))
    optimizer.param_groups[0].update(good)
    optimizer.step()
    del optimizer.param_groups[0]["lr"]
    with pytest.raises(ValueError, match="lr=None is no number"):
        optimizer.step()


def no_numbers(state, key):
    state["state"][0][key] = state["state"][0][key].numpy()
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: None, "this NoneType is no optimizer's state dict"),
        (lambda state: {}, r"this dict is no .* pass what optimizer.state_dict\(\) returned"),
        (lambda state: {"model": {}, "optimizer": state}, "it holds one under 'optimizer': pass that"),
        (lambda state: {**state, "param_groups": [3]}, "is no optimizer's state dict"),
        (
            lambda state: {**state, "param_groups": [{**state["param_groups"][0], "mirrormask": "{"}]},
            "was changed, or is missing: it is not whole",
        ),
        (lambda state: no_numbers(state, "m"), "'m' of '.*weight' is no tensor of numbers"),
        (lambda state: no_numbers(state, "mask"), "'mask' of '.*weight' is no tensor of numbers"),
        (lambda state: no_numbers(state, "m.momentum_buffer"), r"'m.momentum_buffer' of .* is no tensor of numbers"),
    ],
)
def test_what_is_no_state_is_refused_and_changes_nothing(change, message):
    model = net()
    optimizer = mm.sparsify(model, sgd(model, momentum=0.9), METHODS["mirror"](), steps=5)
    for _ in range(4):
        backward(model)
        optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(change(copy.deepcopy(before)))
    assert repr(optimizer.state_dict()) == repr(before)


def test_a_score_that_is_no_number_is_refused():
    model = net()
    optimizer = mm.sparsify(model, sgd(model), mm.methods.pilot(0.5), steps=5)
    for score in (0.5, torch.tensor(0.5), torch.tensor(0.5).numpy()[()]):
        optimizer.epoch_end(score)
    with pytest.raises(ValueError, match="score=nan is outside"):
        optimizer.epoch_end(float("nan"))
    with pytest.raises(TypeError, match=r"score='0\.5' is a str, not a number"):
        optimizer.epoch_end("0.5")


def test_columns_of_one_matrix_are_weights_of_their_own():
    model = shared("other columns")
    assert list(wrap(model).weights) == ["0.weight", "2.weight"]


def test_a_layer_may_have_an_attribute_of_any_name():
    class Flagged(nn.Linear):
        sparse = True

    assert list(wrap(Flagged(4, 3)).weights) == ["weight"]


def test_a_sparse_gradient_of_a_weight_is_an_error_of_its_name():
    model, optimizer = start("mirror", "sgd")
    backward(model)
    model[0].weight.grad = model[0].weight.grad.to_sparse()
    with pytest.raises(RuntimeError, match=r"gradient of '0\.weight' is sparse"):
        optimizer.step()


# -- Accelerate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["sparsify, then prepare", "prepare, then sparsify"])
@over_all
def test_accelerate_steps_saves_and_loads_the_sparse_optimizer(name, base, order, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)

    def build():
        accelerator = accelerate.Accelerator(cpu=True)
        model = net()
        inner = BASES[base](model.parameters())
        if order == "sparsify, then prepare":
            optimizer = mm.sparsify(model, inner, METHODS[name](), steps=20)
            model, stepped = accelerator.prepare(model, optimizer)
        else:
            model, stepped = accelerator.prepare(model, inner)
            optimizer = mm.sparsify(model, stepped, METHODS[name](), steps=20)
        assert optimizer.base is inner
        return accelerator, model, optimizer, stepped

    accelerator, model, optimizer, stepped = build()
    train(model, stepped, 12)
    accelerator.save_state(str(tmp_path))
    train(model, stepped, 8)
    assert optimizer.step_count == 20
    optimizer.finalize()
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, other_model, other, other_stepped = build()
    accelerator.load_state(str(tmp_path))
    assert other.step_count == 12
    train(other_model, other_stepped, 8)
    other.finalize()
    assert equal(snapshot(model), snapshot(other_model))
    assert mm.sparsity(other_model).nonzeros == 45


def test_zeros_are_kept_by_an_optimizer_that_accelerate_has_prepared():
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True)
    model = net()
    with torch.no_grad():
        model[0].weight[:, ::2] = 0.0
    model, stepped = accelerator.prepare(model, sgd(model))
    mm.keep_zeros(model, stepped)
    train(model, stepped, 3)
    assert mm.sparsity(model[0]).nonzeros == 30
    wrapped = mm.sparsify(other := net(), accelerator.prepare(sgd(other)), METHODS["gmp"](), steps=3)
    with pytest.raises(ValueError, match="keeps its zeros itself"):
        mm.keep_zeros(other, accelerator.prepare(wrapped))
    with pytest.raises(TypeError, match=r"is a AcceleratedOptimizer, not masks by name; pass optimizer\.masks"):
        mm.apply_masks(other, stepped)
