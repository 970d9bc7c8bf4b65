"""finalize() vouches for what is there: whatever tools put into the model, exact zeros, an exact count, or an error."""

import copy
import itertools
import re
import warnings

import pytest
import schedulefree
import timm.optim
import torch
from torch import nn

import mirrormask as mm

X = torch.randn(64, 12, generator=torch.Generator().manual_seed(1))
Y = X[:, :4].argmax(1)
TOTAL = 12 * 16 + 16 * 4
KEPT = round(0.2 * TOTAL)
STEPS = 20
BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
}
#: One method of each geometry and each kind of mask, those whose mask comes only at the end included.
METHODS = ["mirror", "gmp", "pilot", "str", "cs", "powerprop", "sign_in", "lth", "acdc", "rigl", "magnitude", "dense"]
#: Those that prune before the first step.
PRUNE_FIRST = ["sign_in", "rigl"]
#: In which order a run may be resumed: there must be an optimizer to load into.
ORDERS = [
    order
    for order in itertools.permutations(["model", "sparsify", "optimizer"])
    if order.index("sparsify") < order.index("optimizer")
]


def build(name="mirror", base="sgd", seed=0, dtype=torch.float32, steps=STEPS, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)
    method = mm.methods.get(name)(0.0 if name == "dense" else 0.8, **options)
    return model, mm.sparsify(model, BASES[base](model.parameters()), method, steps=steps)


def train(model, optimizer, steps, scale=1.0):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X.to(model[-1].weight.dtype)).float(), Y)
        (loss * scale).backward()
        optimizer.step()


def backward(model):
    model.zero_grad()
    nn.functional.cross_entropy(model(X), Y).backward()


def nonzeros(model):
    return sum(int(p.count_nonzero()) for p in model.parameters() if p.dim() > 1)


# -- what the model holds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", [name for name in METHODS if name not in PRUNE_FIRST])
def test_mm_sparsify_leaves_every_weight_as_it_is_to_the_last_bit(name, base):
    torch.manual_seed(0)
    before = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    model, _ = build(name, base)
    for a, b in zip(before.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


class Scaled(nn.Linear):
    """Has a weight without dimensions."""

    def __init__(self) -> None:
        super().__init__(12, 4)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


@pytest.mark.parametrize("name", sorted({*METHODS, "str_ham"} - {"rigl"}))  # which grows zeros where nothing flows
def test_a_weight_may_be_a_number_and_a_layer_have_one_element(name):
    torch.manual_seed(0)
    model = nn.Sequential(Scaled(), nn.Linear(4, 1), nn.Linear(1, 4))
    method = mm.methods.get(name)(0.0 if name == "dense" else 0.5)
    optimizer = mm.sparsify(
        model, BASES["sgd"](model.parameters()), method, steps=STEPS, weights="*", on_empty="ignore"
    )
    train(model, optimizer, STEPS)
    optimizer.finalize()
    assert mm.sparsity(model, "*").nonzeros == (66 if name == "dense" else 33)


@pytest.mark.parametrize("name", PRUNE_FIRST)
def test_pruning_before_the_first_step_changes_only_what_it_prunes(name):
    torch.manual_seed(0)
    before = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    model, optimizer = build(name)
    for i, key in ((0, "0.weight"), (2, "2.weight")):
        assert torch.equal(model[i].weight, before[i].weight * optimizer.masks[key])


@pytest.mark.parametrize("loaded", ["before the masks", "an average", "after finalize"])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "dense"])
def test_weights_loaded_before_finalize_get_the_mask(name, loaded):
    model, optimizer = build(name)
    average = copy.deepcopy(model.state_dict())
    for step in range(STEPS):
        train(model, optimizer, 1)
        average = {key: 0.9 * average[key] + 0.1 * value for key, value in model.state_dict().items()}
        if step == 2:
            early = copy.deepcopy(model.state_dict())
    if loaded == "after finalize":
        optimizer.finalize()
    held = early if loaded == "before the masks" else average
    model.load_state_dict(held)
    optimizer.finalize()
    masks = optimizer.masks
    assert sum(int(mask.sum()) for mask in masks.values()) == KEPT
    for key, x in optimizer.weights.items():
        assert torch.equal(x, held[key] * masks[key])  # what was loaded, under the mask, to the last bit
    if loaded == "an average" and name not in ("lth", "rigl", "sign_in", "acdc"):  # whose average may be zero as well
        assert nonzeros(model) == KEPT
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    train(model, optimizer, 3)
    for key, x in optimizer.weights.items():
        assert not x[~masks[key]].any()
        moved = float((x - held[key] * masks[key]).detach().abs().max())
        assert 0 < moved < 0.01, "training went on from other weights"


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", METHODS)
def test_training_goes_on_from_what_is_written_into_a_weight(name, base):
    model, optimizer = build(name, base, steps=100)  # no mask changes in the first steps
    train(model, optimizer, 4)
    with torch.no_grad():
        model[0].weight.mul_(0.5).clamp_(-0.1, 0.1)
    written = model[0].weight.detach().clone()
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # and no weight decay: the step itself moves nothing
        group["weight_decay"] = 0.0
    train(model, optimizer, 1)
    torch.testing.assert_close(model[0].weight.detach(), written, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("when", ["masked", "finalized"])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "dense"])
def test_dense_weights_that_are_written_get_the_mask_at_the_next_step(name, when, gradient):
    model, optimizer = build(name)
    train(model, optimizer, STEPS - 1 if when == "masked" else STEPS)
    if when == "finalized":
        optimizer.finalize()
    masks = optimizer.masks
    with torch.no_grad():
        model[2].weight.fill_(0.5)
    model[2].requires_grad_(gradient)
    for group in optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    train(model, optimizer, 1)
    if when == "finalized":
        torch.testing.assert_close(model[2].weight.detach(), 0.5 * masks["2.weight"])
    assert not model[2].weight[~optimizer.masks["2.weight"]].any()


@pytest.mark.parametrize("name", ["mirror", "cs", "dense"])
def test_without_a_mask_what_is_written_stays(name):
    model, optimizer = build(name, steps=100)
    train(model, optimizer, 2)
    with torch.no_grad():
        model[2].weight.fill_(0.5)
    model[2].requires_grad_(False)
    train(model, optimizer, 2)
    torch.testing.assert_close(model[2].weight, torch.full_like(model[2].weight, 0.5), rtol=2e-2, atol=0.0)


@pytest.mark.parametrize("name", ["mirror", "gmp"])
@pytest.mark.parametrize("how", ["assign", "setattr", "module", "module inside", "to_empty", "half", "another device"])
def test_parameters_that_are_replaced_are_an_error_at_the_next_step(name, how):
    model, optimizer = build(name)
    train(model, optimizer, 2)
    if how == "module inside":  # the module that is replaced is not the one that owns the weight
        model = nn.Sequential(model)
        optimizer = mm.sparsify(model, BASES["sgd"](model.parameters()), optimizer.method, steps=STEPS)
        model[0] = nn.Sequential(copy.deepcopy(model[0][0]), *model[0][1:])
    elif how == "assign":
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    elif how == "setattr":
        model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    elif how == "module":
        model[0] = copy.deepcopy(model[0])
    elif how == "to_empty":
        model.to("meta").to_empty(device="cpu")
    elif how == "half":
        model.bfloat16()
    else:
        model.to("meta")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for call in (optimizer.step, optimizer.finalize):
        with pytest.raises(RuntimeError, match=r"0\.weight.*first, then build the optimizer, then call mm.sparsify"):
            call()


@pytest.mark.parametrize("name", ["mirror", "gmp"])
@pytest.mark.parametrize("how", ["all", "some", "another's", "expanded"])
def test_weights_that_come_to_lie_in_one_memory_are_an_error(name, how):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Embedding(12, 12))
    optimizer = mm.sparsify(model, BASES["sgd"](model.parameters()), mm.methods.get(name)(0.8), steps=STEPS)
    train(model[:3], optimizer, 2)
    both = torch.randn(24, 12)
    if how == "all":
        model[2].weight.data = model[0].weight.data
    elif how == "some":
        model[0].weight.data, model[2].weight.data = both[:12], both[6:18]
    elif how == "another's":  # whose memory nobody watches at every step
        model[3].weight.data = model[0].weight.data
    else:
        model[0].weight.data = torch.randn(12, 1).expand(12, 12)
    message = "'0.weight' is expanded" if how == "expanded" else r"'0\.weight' and '[23]\.weight' are two parameters in"
    for call in (
        [optimizer.finalize] if how == "another's" else [lambda: train(model[:3], optimizer, 1), optimizer.finalize]
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
    model[0].weight.data, model[2].weight.data = torch.randn(12, 12), torch.randn(12, 12)  # what the error asks for
    train(model[:3], optimizer, STEPS)
    optimizer.finalize()
    assert sum(int(model[i].weight.count_nonzero()) for i in (0, 2)) == round(0.2 * 288)


@pytest.mark.parametrize("weights", [None, ["0.weight", "2.weight"]])
def test_a_layer_that_comes_later_stays_dense_and_it_is_said_once(weights):
    model, _ = build()
    method = mm.methods.gmp(0.8)
    optimizer = mm.sparsify(model, BASES["sgd"](model.parameters()), method, steps=STEPS, weights=weights)
    train(model, optimizer, 2)
    model.append(nn.Linear(4, 4))
    optimizer.add_param_group({"params": model[3].parameters()})
    model[0] = nn.Sequential(model[0])  # which comes under another name
    train(model, optimizer, STEPS - 2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer.finalize()
        optimizer.finalize()
    wanted = [] if weights else ["3.weight came into the model after mm.sparsify and is dense"]
    assert [str(one.message).partition(":")[0] for one in said] == wanted
    assert nonzeros(model) == KEPT + 16


@pytest.mark.parametrize("name", ["mirror", "gmp"])
def test_a_tied_weight_that_is_untied_is_an_error_at_the_next_step(name):
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12))
    model[2].weight = model[0].weight
    optimizer = mm.sparsify(model, BASES["sgd"](model.parameters()), mm.methods.get(name)(0.8), steps=STEPS)
    train(model, optimizer, STEPS)
    model[2].weight = nn.Parameter(model[0].weight.detach().clone())
    for call in (lambda: train(model, optimizer, 1), optimizer.finalize):
        with pytest.raises(RuntimeError, match=r"does not hold 0\.weight any more"):
            call()


@pytest.mark.parametrize("name", ["mirror", "gmp"])
def test_a_layer_that_is_put_into_another_goes_on_being_trained_until_another_takes_its_place(name):
    model, optimizer = build(name)
    train(model, optimizer, 2)
    model[0] = nn.Sequential(model[0], nn.Identity())  # as wrappers of layers do: checkpointing, adapters
    train(model, optimizer, STEPS - 2)
    optimizer.finalize()
    assert nonzeros(model) == KEPT
    model[0][0] = copy.deepcopy(model[0][0])
    with pytest.raises(RuntimeError, match=r"does not hold 0\.weight any more.*another module"):
        train(model, optimizer, 1)


@pytest.mark.parametrize("name", ["mirror", "gmp"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: o.state.clear(), r"state of 0\.weight, 2\.weight was cleared.*optimizer\.base\.state"),
        (lambda o: o.state.pop(o.weights["2.weight"]), r"state of 2\.weight was cleared"),
        (
            lambda o: o.param_groups[0]["params"].append(nn.Parameter(torch.ones(2))),
            r"had 4 parameters and has 5.*call",
        ),
        (lambda o: o.param_groups[0]["params"].reverse(), r"or others than then.*requires_grad_\(False\)"),
        (lambda o: o.param_groups.append({"params": [], "lr": 0.1}), r"were 1 param_groups and are 2.*add_param_group"),
        (lambda o: o.param_groups.clear(), "were 1 param_groups and are 0"),
    ],
)
def test_what_the_base_would_not_hear_of_is_an_error_at_the_next_step(name, change, message):
    model, optimizer = build(name)
    train(model, optimizer, STEPS - 2)
    change(optimizer)
    for call in (optimizer.step, optimizer.state_dict):
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.parametrize("name", ["mirror", "gmp", "set", "rigl"])
def test_a_layer_that_is_frozen_on_the_way_is_pruned_and_it_is_said_once(name):
    model, optimizer = build(name)
    train(model, optimizer, 5)
    model[0].requires_grad_(False)
    before = model[0].weight.detach().clone()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(model, optimizer, STEPS - 5)
        optimizer.finalize()
    assert nonzeros(model) == KEPT
    if name in ("set", "rigl"):  # to exchange would put zeros there that nobody trains
        assert torch.equal(before, model[0].weight)
        assert not said
    else:
        (warning,) = said
        assert re.match(r"0\.weight was frozen since mm\.sparsify, and pruned now", str(warning.message))


def test_a_layer_that_is_set_free_on_the_way_stays_dense_and_it_is_said_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    model[0].requires_grad_(False)
    optimizer = mm.sparsify(model, BASES["sgd"](model.parameters()), mm.methods.gmp(0.8), steps=STEPS)
    train(model, optimizer, 5)
    model[0].requires_grad_(True)
    with pytest.warns(UserWarning, match=r"0\.weight was frozen when mm\.sparsify.*stays dense.*weights=") as said:
        train(model, optimizer, STEPS - 5)
    assert len(said) == 1
    optimizer.finalize()
    assert model[0].weight.count_nonzero() == 12 * 16


@pytest.mark.parametrize("name", ["mirror", "gmp", "str", "rigl", "pilot"])
def test_a_default_device_and_inference_mode_are_for_the_user_s_own_code(name):
    results = []
    for apart in (False, True):
        model, optimizer = build(name)
        if apart:
            torch.set_default_device("meta")
        try:
            for half in (False, True):
                for _ in range(STEPS // 2):
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(model(X), Y).backward()
                    with torch.inference_mode(mode=apart):
                        optimizer.step()
                if not half:
                    optimizer.load_state_dict(optimizer.state_dict())
            optimizer.epoch_end(score=0.5)
            optimizer.finalize()
            optimizer.diagnostics()
        finally:
            torch.set_default_device(None)
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *results))


def test_a_parametrization_registered_later_moves_the_parameter_and_keeps_it():
    model, optimizer = build()
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
    train(model, optimizer, STEPS)
    optimizer.finalize()
    assert nonzeros(model) == KEPT


class Shifted(nn.Module):
    """Makes a dense weight of a sparse one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1.0


def test_finalize_looks_at_what_the_model_computes_with():
    model, optimizer = build("gmp")
    nn.utils.parametrize.register_parametrization(model[0], "weight", Shifted())
    nn.utils.parametrizations.spectral_norm(model[2])
    train(model, optimizer, STEPS)
    with pytest.warns(UserWarning, match=r"^0\.weight is sparse, with .* Shifted makes 192 nonzeros of it") as said:
        optimizer.finalize()
    assert len(said) == 1


# -- numbers that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", METHODS)
def test_weights_that_are_not_finite_at_the_start_are_refused_by_name(name, value):
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    with torch.no_grad():
        model[2].weight[1, 3] = value
    method = mm.methods.get(name)(0.0 if name == "dense" else 0.8)
    with pytest.raises(ValueError, match=r"^2\.weight is not finite.* before mm\.sparsify"):
        mm.sparsify(model, BASES["sgd"](model.parameters()), method, steps=STEPS)
    left = mm.sparsify(model, BASES["sgd"](model.parameters()), method, steps=STEPS, weights="0.*")
    assert list(left.weights) == ["0.weight", "0.bias"]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ["mirror", "gmp", "lth"])
def test_a_state_that_has_diverged_is_refused_by_name_and_changes_nothing(name, base, value):
    model, optimizer = build(name, base)
    train(model, optimizer, 5)
    state, before = optimizer.state_dict(), copy.deepcopy(optimizer.state_dict())
    held = [(0, "'0.weight'"), (1, "a parameter of shape \\(16,\\)")]
    places = [(i, key, title) for i, title in held for key, v in state["state"][i].items()
              if isinstance(v, torch.Tensor) and v.is_floating_point() and v.numel() > 1]  # fmt: skip
    assert len(places) >= 2
    for index, key, title in places:
        broken = copy.deepcopy(before)
        broken["state"][index][key].view(-1)[3] = value
        with pytest.raises(ValueError, match=rf"diverged: '{re.escape(key)}' of {title} is not finite"):
            optimizer.load_state_dict(broken)
    broken = copy.deepcopy(before)
    broken["param_groups"][0]["lr"] = float("nan")
    with pytest.raises(ValueError, match=r"'lr' of param_groups\[0\] is not finite"):
        optimizer.load_state_dict(broken)
    after = optimizer.state_dict()
    for index, entry in before["state"].items():
        for key, v in entry.items():
            assert torch.equal(torch.as_tensor(v), torch.as_tensor(after["state"][index][key]))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("factors", [True, False])
def test_a_step_to_nan_is_not_taken_for_one_to_zero(factors, fused):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    method = mm.methods.mirror(0.8, factors=factors)
    optimizer = mm.sparsify(model, BASES["sgd"](model.parameters()), method, steps=STEPS, fused=fused)
    train(model, optimizer, 2)
    optimizer.param_groups[0]["lr"] = float("nan")
    train(model, optimizer, 1)
    assert not model[0].weight.isfinite().any()
    with pytest.raises(RuntimeError, match=r"0\.weight, 2\.weight are not finite"):
        optimizer.finalize()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", METHODS)
def test_finalize_refuses_weights_that_are_not_finite_by_name(name, value):
    model, optimizer = build(name)
    train(model, optimizer, 5)
    with torch.no_grad():
        model[2].weight.view(-1)[optimizer.masks["2.weight"].view(-1).nonzero()[0]] = value
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"^2\.weight is not finite"):
        optimizer.finalize()
    assert not optimizer.finalized
    for a, b in zip(before, model.parameters(), strict=True):
        assert torch.equal(a, b.detach()) or not a.isfinite().all()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.NAdam])
def test_what_is_pruned_is_zero_under_a_base_that_divides_by_zero(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    base = kind(model.parameters(), lr=1e-3, eps=0.0)
    optimizer = mm.sparsify(model, base, mm.methods.mirror(0.8), steps=STEPS)
    train(model, optimizer, STEPS)
    optimizer.finalize()
    assert nonzeros(model) == KEPT
    assert not optimizer.skipped_steps


def test_complex_parameters_beside_the_weights_train_and_are_looked_at():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.turn, self.layer = nn.Parameter(torch.ones(12, dtype=torch.complex64)), nn.Linear(12, 4)

        def forward(self, x):
            return self.layer((x * self.turn).real)

    model = Turned()
    optimizer = mm.sparsify(model, BASES["sgd"](model.parameters()), mm.methods.mirror(0.5), steps=4)
    for step in range(4):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        if step == 2:
            model.turn.grad[0] = complex(0.0, float("nan"))
        optimizer.step()
    assert optimizer.skipped_steps == 1
    assert bool((model.turn != 1).any())


def test_masked_entries_are_zeros_whatever_the_base_makes_of_them():
    # fp16 Adam: eps is 0 there, and 0 / 0 is not a number that a product with zero would mend.
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)).half()
    base = torch.optim.Adam(model.parameters(), lr=1e-3)
    optimizer = mm.sparsify(model, base, mm.methods.erk(0.8), steps=STEPS)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for key, x in optimizer.weights.items():
        assert torch.equal(x[~optimizer.masks[key]], torch.zeros_like(x[~optimizer.masks[key]]))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ["mirror", "gmp", "dense"])
def test_a_training_whose_steps_were_skipped_is_no_training(name, base):
    model, optimizer = build(name, base)
    with pytest.warns(UserWarning, match=r"10 steps in a row were skipped: .*not finite in 0\.weight, 0\.bias"):
        train(model, optimizer, STEPS, scale=float("nan"))
    with pytest.raises(RuntimeError, match="20 steps were skipped and 0 taken"):
        optimizer.finalize()
    model, optimizer = build(name, base)
    train(model, optimizer, 3, scale=float("nan"))
    train(model, optimizer, STEPS - 3)
    optimizer.finalize()
    assert optimizer.skipped_steps == 3


def test_the_warning_of_skipped_steps_names_the_culprits_once_a_row():
    model, optimizer = build()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for step in range(25):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X), Y).backward()
            if step != 12:
                model[2].bias.grad[0] = float("nan")
            optimizer.step()
    assert [str(w.message).split("not finite in ")[1].split(";")[0] for w in seen] == ["2.bias", "2.bias"]


# -- resume, in any order ---------------------------------------------------------------------------------------------


def load(name, order, weights, state, dtype=torch.float32):
    """Another model with its optimizer, made and loaded in this order."""
    torch.manual_seed(9)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)
    for what in order:
        if what == "model":
            model.load_state_dict(weights)
        elif what == "sparsify":
            method = mm.methods.get(name)(0.0 if name == "dense" else 0.8)
            optimizer = mm.sparsify(model, BASES["sgd"](model.parameters()), method, steps=STEPS)
        else:
            optimizer.load_state_dict(state)
    return model, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", METHODS)
def test_a_run_resumes_bit_for_bit_in_whatever_order_things_are_loaded(name, order, dtype):
    straight_model, straight = build(name, dtype=dtype)
    train(straight_model, straight, 7)
    weights, state = copy.deepcopy(straight_model.state_dict()), copy.deepcopy(straight.state_dict())
    before = straight.diagnostics()
    train(straight_model, straight, STEPS - 7)
    model, optimizer = load(name, order, weights, state, dtype)
    for key, value in weights.items():
        assert torch.equal(model.state_dict()[key], value)
    assert optimizer.diagnostics() == pytest.approx(before, rel=0, abs=0, nan_ok=True)
    train(model, optimizer, STEPS - 7)
    for a, b in zip(straight_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", METHODS)
def test_a_weight_that_was_written_into_and_saved_is_not_undone_by_a_load(name, order):
    straight_model, straight = build(name)
    train(straight_model, straight, 12)
    with torch.no_grad():
        straight_model[0].weight.mul_(0.5)
    held = copy.deepcopy(straight.state)
    weights, state = copy.deepcopy(straight_model.state_dict()), copy.deepcopy(straight.state_dict())
    for before, after in zip(held.values(), straight.state.values(), strict=True):  # to save is not to train
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after[key])), key
    model, optimizer = load(name, order, weights, state)
    assert torch.equal(model[0].weight, weights["0.weight"])
    train(straight_model, straight, STEPS - 12)
    train(model, optimizer, STEPS - 12)
    for a, b in zip(straight_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_weight_without_a_gradient_follows_a_map_that_changes():
    # Continuous sparsification hardens its gates with time, whoever trains; no mask changes in these steps.
    model, optimizer = build("cs", steps=1000)
    train(model, optimizer, 70)
    model[2].requires_grad_(False)
    before = model[2].weight.detach().clone()
    train(model, optimizer, 25)
    state, temperature = optimizer.state[model[2].weight], 200.0 ** (0.095 / 0.75)
    torch.testing.assert_close(model[2].weight, state["w"] * torch.sigmoid(temperature * state["s"]))
    assert not torch.equal(model[2].weight, before)
    held = copy.deepcopy(model.state_dict())
    other_model, other = build("cs", seed=4, steps=1000)
    other_model.load_state_dict(held)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(other_model[2].weight, held["2.weight"])


def test_what_a_log_says_after_a_resume_is_what_it_said_before():
    model, optimizer = build(growth=None)
    train(model, optimizer, 5)
    before = optimizer.diagnostics()
    assert before["alpha"] > 0
    _, other = build(growth=None)
    other.load_state_dict(optimizer.state_dict())
    assert other.diagnostics() == before


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", mm.methods.names())
def test_the_state_has_all_its_keys_from_construction_on(name, base):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    method = mm.methods.get(name)(0.0 if name == "dense" else 0.8)
    data = {"batches": [(X, Y)]} if method.reads_data else {}
    optimizer = mm.sparsify(model, BASES[base](model.parameters()), method, steps=STEPS, **data)
    first = {index: set(entry) for index, entry in optimizer.state_dict()["state"].items()}
    train(model, optimizer, STEPS)
    last = {index: set(entry) for index, entry in optimizer.state_dict()["state"].items()}
    assert first == last
    assert len(first) == 4


@pytest.mark.parametrize("key", ["mask", "m.momentum_buffer", "w", "rate"])
def test_a_state_that_has_lost_something_is_refused(key):
    model, optimizer = build()
    train(model, optimizer, 15)
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry.pop(key, None)
    _, other = build()
    with pytest.raises(ValueError, match="it is not whole"):
        other.load_state_dict(state)


@pytest.mark.parametrize("name", ["mirror", "gmp", "spred"])
def test_a_state_of_wrong_shape_or_order_is_refused(name):
    model, optimizer = build(name)
    train(model, optimizer, 5)
    state = copy.deepcopy(optimizer.state_dict())
    key = next(key for key in state["state"][0] if key.endswith("momentum_buffer"))
    state["state"][0][key] = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=r"momentum_buffer' of a parameter of shape \(16, 12\) has shape \(1, 1\)"):
        build(name)[1].load_state_dict(state)
    twins = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    orders = [list(twins.parameters()), list(twins.parameters())[::-1]]
    pair = [mm.sparsify(twins, torch.optim.SGD(p, lr=0.1), mm.methods.get(name)(0.5), steps=9) for p in orders]
    with pytest.raises(ValueError, match="its weights in another order"):
        pair[1].load_state_dict(pair[0].state_dict())


@pytest.mark.parametrize("when", ["between steps", "before a resume"])
@pytest.mark.parametrize("name", ["mirror", "spred", "sign_in", "gmp"])
def test_a_model_in_another_memory_layout_trains_alike(name, when):
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
        method = mm.methods.get(name)(0.5)
        optimizer = mm.sparsify(model, BASES["sgd"](model.parameters()), method, steps=12, fused=fused)
        images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        for step in range(12):
            if step == 5:
                model.to(memory_format=torch.channels_last)
                if when == "before a resume":
                    state = copy.deepcopy(optimizer.state_dict())
                    optimizer = mm.sparsify(model, BASES["sgd"](model.parameters()), method, steps=12, fused=fused)
                    optimizer.load_state_dict(state)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), Y[:16]).backward()
            optimizer.step()
        optimizer.finalize()
        assert mm.sparsity(model).nonzeros == round(0.5 * (216 + 1152))
        results.append([p.detach() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_masks_may_be_written_into():
    model, optimizer = build("gmp")
    train(model, optimizer, STEPS)
    for mask in optimizer.masks.values():
        mask.fill_(True)
    optimizer.finalize()
    assert nonzeros(model) == KEPT


# -- zeros that outlive the optimizer ---------------------------------------------------------------------------------


def test_an_average_gets_the_last_mask():
    model, optimizer = build()
    average = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(STEPS):
        train(model, optimizer, 1)
        average.update_parameters(model)
    optimizer.finalize()
    assert nonzeros(average) > KEPT
    mm.apply_masks(average, optimizer.masks)
    assert nonzeros(average) == KEPT


def test_names_that_a_wrapper_changes_and_names_that_only_look_like_it():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.submodule = nn.Linear(3, 2)
            self.sub = nn.Linear(3, 2)

    net = Net()
    masks = {"submodule.weight": torch.zeros(2, 3, dtype=torch.bool)}
    mm.apply_masks(nn.ModuleDict({"module": net})["module"], masks)
    assert not net.submodule.weight.any()
    assert net.sub.weight.all()
    mm.apply_masks(torch.compile(nn.Sequential(net)), {"0.sub.weight": ~masks["submodule.weight"]})
    assert net.sub.weight.all()


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ({"9.weight": torch.ones(16, 12, dtype=torch.bool)}, ValueError, "no parameter '9.weight'"),
        ({"0.weight": torch.ones(3, 3, dtype=torch.bool)}, ValueError, r"has shape \(3, 3\), the parameter \(16, 12\)"),
        ({"0.weight": torch.ones(16, 12)}, TypeError, "is a torch.float32, not a bool tensor"),
        ({}, TypeError, "model is a dict, not an nn.Module; load the state dict into its model"),
    ],
)
def test_masks_that_do_not_fit_change_nothing(masks, error, message):
    model, _ = build()
    before = model[0].weight.detach().clone()
    with pytest.raises(error, match=message):
        mm.apply_masks(model if masks else {}, {"0.weight": torch.zeros(16, 12, dtype=torch.bool), **masks})
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("how", ["prune", "parametrization"])
def test_a_mask_of_what_is_made_in_the_forward_pass_says_of_what(how):
    model, optimizer = build()
    if how == "prune":
        torch.nn.utils.prune.identity(model[0], "weight")
    else:
        torch.nn.utils.parametrizations.spectral_norm(model[0])
    with pytest.raises(
        ValueError, match=r"'0\.weight' is made from '0\..*orig(inal)?' in every .*take that away first"
    ):
        mm.apply_masks(model, optimizer.masks)


@pytest.mark.parametrize("base", ["schedule-free", "slow weights", "slow weights around"])
def test_what_an_optimizer_swaps_in_later_has_the_zeros_too(base):
    model, optimizer = build()
    train(model, optimizer, STEPS)
    optimizer.finalize()
    if base == "schedule-free":
        plain = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.05)
        mm.keep_zeros(model, plain)
        plain.train()
    else:
        plain = inner = BASES["sgd"](model.parameters())
        if base == "slow weights around":
            plain = timm.optim.Lookahead(inner)
            mm.keep_zeros(model, plain)
        else:
            mm.keep_zeros(model, inner)
            plain = timm.optim.Lookahead(inner)
    train(model, plain, 9)
    before = model[0].weight.detach().clone()
    plain.eval() if base == "schedule-free" else plain.sync_lookahead()
    assert not torch.equal(before, model[0].weight)
    assert nonzeros(model) == KEPT


@pytest.mark.parametrize("name", ["mirror", "gmp", "rigl"])
def test_slow_weights_around_it_have_the_mask(name):
    model, optimizer = build(name)
    around = timm.optim.Lookahead(optimizer, k=4)
    train(model, around, STEPS - 1)
    optimizer.finalize()
    train(model, around, 2)
    around.sync_lookahead()
    assert nonzeros(model) == KEPT


def test_zeros_that_are_kept_are_those_of_all_that_trains():
    model, optimizer = build()
    train(model, optimizer, STEPS)
    optimizer.finalize()
    model[2].requires_grad_(False)
    first, second = BASES["sgd"](model[0].parameters()), BASES["sgd"](model[2].parameters())
    mm.keep_zeros(model, first)
    model[2].requires_grad_(True)  # frozen when the zeros were looked at
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, first, 2)
    backward(model)
    second.step()
    with pytest.warns(UserWarning, match=r"than this SGD has written over the zeros of 2\.weight.*for each optimizer"):
        first.step()
    mm.keep_zeros(model, second)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            backward(model)
            first.step()
            second.step()
    assert nonzeros(model) == KEPT
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"hold 0\.weight, 2\.weight any more.*call mm\.keep_zeros again"):
        first.step()


@pytest.mark.parametrize("write", ["load_state_dict", "another optimizer", "in place"])
def test_weights_that_are_loaded_over_kept_zeros_are_not_lost_without_a_word(write):
    model, optimizer = build()
    train(model, optimizer, STEPS)
    optimizer.finalize()
    plain = BASES["sgd"](model.parameters())
    handle = mm.keep_zeros(model, plain)
    train(model, plain, 2)
    model.load_state_dict(copy.deepcopy(model.state_dict()))  # of the same zeros
    train(model, plain, 2)
    if write == "load_state_dict":
        model.load_state_dict(build()[0].state_dict())
    elif write == "another optimizer":
        train(model, BASES["sgd"](model.parameters()), 1)
    else:  # as torch.distributed.checkpoint.load does
        with torch.no_grad():
            model[0].weight.detach().copy_(torch.ones_like(model[0].weight))
    before = copy.deepcopy(model.state_dict())
    backward(model)
    with pytest.raises(RuntimeError, match=r"0\.weight holds \d+ nonzeros where its zeros are kept.*after loading"):
        plain.step()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    handle.remove()
    assert not plain._optimizer_step_pre_hooks and not plain._optimizer_step_post_hooks
    plain.step()
    mm.apply_masks(model, optimizer.masks)
    mm.keep_zeros(model, plain)
    train(model, plain, 2)
    assert nonzeros(model) == KEPT


@pytest.mark.parametrize("base", BASES)
def test_a_new_optimizer_after_finalize_keeps_the_zeros(base):
    model, optimizer = build()
    train(model, optimizer, STEPS)
    optimizer.finalize()
    zeros = {name: p == 0 for name, p in model.named_parameters() if p.dim() > 1}
    plain = BASES[base](model.parameters())
    handle = mm.keep_zeros(model, plain)
    train(model, plain, 5)
    for name, p in model.named_parameters():
        if name in zeros:
            assert torch.equal(p == 0, zeros[name])
    handle.remove()
    with pytest.warns(UserWarning, match=r"^0\.weight is sparse already and not among the weights chosen"):
        mm.sparsify(model, BASES[base](model.parameters()), mm.methods.gmp(0.5), steps=3, weights="2.weight")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mm.sparsify(model, BASES[base](model[2].parameters()), mm.methods.gmp(0.5), steps=3, weights="2.weight")
    train(model, plain, 1)
    assert nonzeros(model) > KEPT
    with pytest.raises(ValueError, match="no zeros to keep"):
        mm.keep_zeros(dense := nn.Linear(3, 3), BASES[base](dense.parameters()))
    with pytest.raises(ValueError, match=r"holds no parameter of the model.* over model.parameters\(\)"):
        mm.keep_zeros(copy.deepcopy(model), plain)
    with pytest.raises(TypeError, match=r"is a SparseOptimizer, not masks by name; pass optimizer\.masks"):
        mm.apply_masks(model, optimizer)
    with pytest.raises(ValueError, match="keeps its zeros itself"):
        mm.keep_zeros(model, optimizer)
    with pytest.raises(TypeError, match="not a torch optimizer"):
        mm.keep_zeros(model, "sgd")
