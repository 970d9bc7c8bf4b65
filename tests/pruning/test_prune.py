"""mm.prune: exact, in order, all or nothing."""

import copy
import warnings

import pytest
import torch
from torch import nn

import mirrormask as mm
from mirrormask.calibration import evaluating, layers_of, moment_of, survey
from mirrormask.masks.calibrated import MOMENT_SCORES, obs, ria, wanda
from mirrormask.pruning.solver import reconstruct

METHODS = ["magnitude", "obs", "ria", "wanda"]


def mlp():
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))


def correlated(n=2, rows=40, inputs=12):
    mix = torch.randn(inputs, inputs) * torch.logspace(-0.5, 0.5, inputs)
    return [torch.randn(rows, inputs) @ mix for _ in range(n)]


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 8, 1, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("allocation", ["uniform", "erk", "global"])
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.5, 0.9])
def test_the_sparsity_is_exact(method, allocation, sparsity):
    model = mlp()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(leaves nothing|singular)")
        report = mm.prune(model, correlated(), sparsity, method, allocation=allocation)
    found = mm.sparsity(model)
    assert found.nonzeros == round((1 - sparsity) * found.numel)
    assert [layer.nonzeros for layer in report.layers] == [layer.nonzeros for layer in found.layers]
    assert report.sparsity == pytest.approx(found.total)
    assert all(0 <= layer.error <= layer.removed * 1.0001 for layer in report.layers)


@pytest.mark.parametrize("method", METHODS)
def test_convolutions_are_pruned_and_batch_norm_sees_what_came_of_them(method):
    model, batches = convolutional(), [(torch.randn(8, 3, 6, 6) + 1, torch.zeros(8)) for _ in range(2)]
    mm.prune(model, batches, 0.5, method)
    assert mm.sparsity(model).total == 0.5
    outputs = torch.stack([model[0](x).mean((0, 2, 3)) for x, _ in batches]).mean(0)
    torch.testing.assert_close(model[1].running_mean, outputs.detach())


def test_the_statistics_of_batch_norm_can_be_left_as_they_are():
    model = convolutional()
    model[1].running_mean.fill_(3.0)
    mm.prune(model, [torch.randn(16, 3, 6, 6)], 0.5, "wanda", batch_norm=False)
    assert (model[1].running_mean == 3.0).all() and mm.sparsity(model).total == 0.5


@pytest.mark.parametrize("method", METHODS)
def test_patterns_hold_along_the_inputs(method):
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(32, 4))
    report = mm.prune(model, [torch.randn(16, 4, 6, 6) for _ in range(3)], 0.5, method, pattern="2:4")
    for layer in (model[0], model[2], model[4]):
        groups = layer.weight.detach().movedim(1, -1).reshape(-1, 4)
        assert (groups.count_nonzero(1) == 2).all()
    assert report.sparsity == 0.5


def test_ties_and_zeros_are_counted_too():
    model = nn.Linear(10, 10, bias=False)
    model.weight.data.fill_(1.0)
    mm.prune(model, [torch.ones(20, 10)], 0.37, "wanda")
    assert mm.sparsity(model).nonzeros == 63
    model.weight.data.zero_()[:, 0] = 1.0
    with pytest.warns(UserWarning, match="10 nonzeros instead of 50"):
        mm.prune(model, [torch.ones(20, 10)], 0.5, "magnitude")


def test_later_layers_see_what_the_pruned_ones_before_put_out():
    model, batches = mlp().double(), [x.double() for x in correlated()]
    plain = copy.deepcopy(model)
    mm.prune(model, batches, 0.5, "obs")
    x = torch.cat(batches)
    for module in plain:
        if isinstance(module, nn.Linear):
            weight = module.weight.detach()[None]
            module.weight.data = reconstruct(weight, (x.mT @ x)[None], weight.numel() // 2)[0][0]
        x = module(x).detach()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_obs_loses_less_than_wanda_and_that_less_than_magnitude():
    model, batches = mlp(), correlated(8)
    reports = {method: mm.prune(copy.deepcopy(model), batches, 0.5, method) for method in METHODS}
    first = {method: report.layers[0].error for method, report in reports.items()}
    assert first["magnitude"] > first["wanda"] > 1.5 * first["obs"]
    assert reports["magnitude"].error > reports["wanda"].error > reports["obs"].error
    for method in ("magnitude", "ria", "wanda"):
        assert all(layer.error == layer.removed for layer in reports[method].layers)


def test_the_error_is_that_of_the_layers_output():
    model, batches = nn.Linear(12, 6).double(), [x.double() for x in correlated()]
    dense = copy.deepcopy(model)
    report = mm.prune(model, batches, 0.5)
    x = torch.cat(batches)
    with torch.no_grad():
        lost = (model(x) - dense(x)).square().sum() / (dense(x) - dense.bias).square().sum()
    assert report.layers[0].error == pytest.approx(float(lost))
    assert "0.5" in str(float(report.sparsity)) and "weight" in str(report) and "50.000%" in str(report)


@pytest.mark.parametrize("compare", ["row", "layer"])
@pytest.mark.parametrize("method", METHODS)
def test_rows_or_the_layer_compete(method, compare):
    model = nn.Linear(12, 6, bias=False)
    model.weight.data *= torch.logspace(-1, 1, 6)[:, None]
    mm.prune(model, correlated(), 0.5, method, compare=compare)
    rows = model.weight.count_nonzero(1)
    assert (rows == 6).all() if compare == "row" else int(rows.max()) > 6


def test_scores_by_their_formulas():
    x = torch.randn(1, 4, 6, dtype=torch.float64)
    model, inputs = nn.Linear(6, 4).double(), torch.randn(50, 6, dtype=torch.float64)
    with evaluating(model):
        moment = moment_of(model, survey(model, layers_of(model), [inputs])[0], [inputs])
    norms = inputs.norm(dim=0)
    a = x[0].abs()
    torch.testing.assert_close(wanda(x, moment)[0], a * norms)
    torch.testing.assert_close(ria(x, moment)[0], (a / a.sum(0) + a / a.sum(1, keepdim=True)) * norms**0.5)
    h = inputs.mT @ inputs
    h = h + 0.01 * h.diagonal().mean() * torch.eye(6)
    torch.testing.assert_close(obs(x, moment)[0], x[0] ** 2 / h.inverse().diagonal())
    # What the score says is what is lost: the other weights of the row, solved for anew, leave no less.
    rest = [0, 1, 2, 4, 5]
    change = torch.linalg.solve(h[rest][:, rest], h[rest][:, 3]) * x[0, 0, 3]
    delta = torch.zeros(6, dtype=torch.float64)
    delta[rest], delta[3] = change, -x[0, 0, 3]
    torch.testing.assert_close(obs(x, moment)[0, 0, 3], delta @ h @ delta)


@pytest.mark.parametrize("score", ["obs", "ria", "wanda"])
def test_they_are_scores_of_any_schedule(score):
    model, batches = mlp(), [(x, torch.randint(0, 4, (len(x),))) for x in correlated()]
    dense = copy.deepcopy(model)
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = mm.sparsify(model, base, mm.methods.gmp(0.5, score=score, floor=0.0), steps=20, batches=batches)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for _ in range(20):
        nn.functional.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.finalize()
    assert mm.sparsity(model).total == 0.5
    x = batches[0][0], batches[1][0]
    with evaluating(dense):
        scores = []
        for stage in survey(dense, layers_of(dense), x):
            moment = moment_of(dense, stage, x)
            scores += [MOMENT_SCORES[score](layer.matrix(), moment)[0] for layer in stage.layers]
    for mask, expected in zip(optimizer.masks.values(), mm.masks.select(scores, 0.5), strict=True):
        assert torch.equal(mask, expected)


def test_a_schedule_refuses_a_weight_whose_inputs_are_not_seen():
    model = nn.LSTM(4, 4)
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.raises(ValueError, match="weight_ih_l0, weight_hh_l0 are not the weight of a Linear"):
        mm.sparsify(model, base, mm.methods.gmp(0.5, score="wanda"), steps=5, batches=[(torch.zeros(2, 3, 4), 0)])


def test_zeros_stay_in_later_training():
    model, batches = mlp(), correlated()
    mm.prune(model, batches, 0.7)
    zeros = [p == 0 for p in mm.select_weights(model).values()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    mm.keep_zeros(model, optimizer)
    for _ in range(3):
        model(batches[0]).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(p == 0, zero) for p, zero in zip(mm.select_weights(model).values(), zeros, strict=True))

    method = mm.Method(mm.geometry.Hadamard(), mm.decay.ConstantDecay(), mm.masks.AtStart(0.7))
    sparse = mm.sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), method, steps=3)
    for _ in range(3):
        model(batches[0]).square().mean().backward()
        sparse.step()
    sparse.finalize()
    assert all(torch.equal(p == 0, zero) for p, zero in zip(mm.select_weights(model).values(), zeros, strict=True))


def test_what_is_not_a_weight_stays():
    model, batches = convolutional().double(), [torch.randn(4, 3, 6, 6, dtype=torch.float64)]
    model[1].eval()
    model[3].weight.requires_grad_(False)
    model(batches[0]).sum().backward()
    called = []
    model[4].register_forward_hook(lambda *args: called.append(1))
    kept = {name: value.clone() for name, value in model.named_parameters() if value.dim() == 1}
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    objects = [id(p) for p in model.parameters()]
    rng = torch.random.get_rng_state()
    with pytest.warns(UserWarning, match=r"singular"):
        mm.prune(model, batches, 0.5)
    assert [id(p) for p in model.parameters()] == objects
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in kept.items())
    assert all(torch.equal(grad, model.get_parameter(name).grad) for name, grad in grads.items())
    assert [m.training for m in model.modules()] == [not isinstance(m, nn.BatchNorm2d) for m in model.modules()]
    assert not model[3].weight.requires_grad and model[0].weight.requires_grad
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert [len(m._forward_hooks) for m in model] == [0, 0, 0, 0, 1, 0, 0, 0]
    assert torch.equal(rng, torch.random.get_rng_state())
    assert float(mm.sparsity(model)) == 0.5  # the frozen weight too


def test_half_precision_weights_stay_so():
    model = mlp().bfloat16()
    mm.prune(model, [x.bfloat16() for x in correlated()], 0.5)
    assert mm.sparsity(model).total == 0.5
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_keyword_batches_and_a_forward_of_ones_own():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(12, 4)

        def forward(self, *, values, labels=None):
            return {"logits": self.a(values)}

    models = [Keywords() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    batches = correlated()
    mm.prune(models[0], [{"values": x} for x in batches], 0.5)
    mm.prune(models[1], batches, 0.5, forward=lambda model, x: model(values=x))
    assert torch.equal(models[0].a.weight, models[1].a.weight)
    mm.prune(mlp(), iter(batches), 0.5)  # read once
    mm.prune(mlp(), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(batches[0]), batch_size=20), 0.5)


class WritesIntoItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return self.net(x.sub_(1.0).mul_(2.0))


@pytest.mark.parametrize("change", [lambda *a, **k: mm.prune(*a, 0.5, **k), mm.quantize])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, None), lambda x: {"x": x}, lambda x: {"deep": [(x,)]}])
def test_a_model_that_writes_into_its_input_sees_each_batch_as_it_was(wrap, change):
    model, plain, inputs = WritesIntoItsInput(), mlp(), correlated()
    plain.load_state_dict(model.net.state_dict())
    batches = [wrap(x.clone()) for x in inputs]
    deep = isinstance(batches[0], dict) and "deep" in batches[0]
    change(model, batches, forward=(lambda model, batch: model(batch["deep"][0][0])) if deep else None)
    change(plain, [(x - 1.0) * 2.0 for x in inputs])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert repr(batches) == repr([wrap(x) for x in inputs])


@pytest.mark.parametrize("change", [lambda *a, **k: mm.prune(*a, 0.5, **k), mm.quantize])
def test_within_autocast_a_model_is_seen_as_it_is_by_then(change):
    """Autocast keeps what it has rounded weights to, and is not told when they change."""

    def forward(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch)

    one, two, batches = mlp(), mlp(), correlated()
    two.load_state_dict(one.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        one(batches[0])
        first, output = change(one, batches), one(batches[0])
    second = change(two, batches, forward=forward)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert torch.equal(output, forward(two, batches[0]))
    assert str(first) == str(second)


def test_nothing_is_half_pruned():
    model = convolutional()
    state = copy.deepcopy(model.state_dict())
    batches = [torch.randn(4, 3, 6, 6) for _ in range(2)]
    runs = []

    def breaks(model, batch):
        runs.append(1)
        if len(runs) > 7:  # when two of four layers are pruned
            raise KeyboardInterrupt
        return model(batch)

    with pytest.raises(KeyboardInterrupt):
        mm.prune(model, batches, 0.5, forward=breaks)
    runs.clear()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def pools(model, batch):
        runs.append(1)
        if len(runs) > 10:  # in the recalibration of batch norm
            raise KeyboardInterrupt
        return model(batch)

    with pytest.raises(KeyboardInterrupt):
        mm.prune(model, batches, 0.5, forward=pools)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(12, 4), nn.Linear(12, 4)

    def forward(self, x):
        return self.used(x)


class Empty(Unused):
    def forward(self, x):  # as an expert to which no token is sent
        return self.used(x) + self.unused(x[:0]).sum()


class Routed(Unused):
    def forward(self, x):
        whole = ((self.used(x) - self.used.bias) != 0).all(1)
        return self.unused(x[whole])


class Padded(nn.Conv2d):
    """As those of networks converted from TensorFlow."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


class Scaled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class Late(Unused):
    """The second layer comes with the second batch only."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(12, 4), Scaled(12, 4)

    def forward(self, x, again=False):
        return self.unused(x) if again else self.used(x)


def large():
    """Two inputs that are always alike: one weight does the work of two, and passes what float16 holds."""
    model = nn.Linear(2, 1, bias=False, dtype=torch.float16)
    model.weight.data.fill_(60000.0)
    return model


def infinite():
    model = mlp()
    model[2].weight.data[0, 0] = torch.inf
    return model


def explodes():
    model = mlp()
    model[0].bias.data[0] = torch.nan
    return model


def shared():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, stride=2))
    model[1].weight = model[0].weight
    return model


def in_one_memory():
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    model[1].weight.data = model[0].weight.data
    return model


def expanded():
    model = mlp()
    model[0].weight = nn.Parameter(torch.randn(model[0].weight.shape[0], 1).expand(model[0].weight.shape))
    return model


BAD = {
    "one memory": (in_one_memory, {}, ValueError, "'0.weight' and '1.weight' are two parameters in one memory"),
    "expanded": (expanded, {}, ValueError, "'0.weight' is expanded: one number in memory is many"),
    "no module": (lambda: 3, {}, TypeError, "not an nn.Module"),
    "percent": (mlp, {"sparsity": 95}, ValueError, "did you mean 0.95"),
    "one": (mlp, {"sparsity": 1.0}, ValueError, r"outside \[0, 1\)"),
    "nothing left": (lambda: nn.Linear(12, 1), {"sparsity": 0.99}, ValueError, "leaves none of 12 weights"),
    "method": (mlp, {"method": "wnda"}, ValueError, "did you mean 'wanda'"),
    "allocation": (mlp, {"allocation": "erc"}, ValueError, "did you mean 'erk'"),
    "compare": (mlp, {"compare": "rows"}, ValueError, "did you mean 'row'"),
    "damping": (mlp, {"damping": -1.0}, ValueError, "damping=-1.0"),
    "forward": (mlp, {"forward": 3}, TypeError, "forward=3"),
    "pattern": (mlp, {"pattern": "2:4", "sparsity": 0.6}, ValueError, "use sparsity=0.5"),
    "pattern of a layer": (lambda: nn.Linear(10, 4), {"pattern": "2:4"}, ValueError, r"weight \(4, 10\)"),
    "empty": (mlp, {"batches": []}, ValueError, "batches is empty"),
    "one batch": (mlp, {"batches": torch.zeros(3, 12)}, TypeError, r"pass \[batch\]"),
    "other shape": (
        mlp,
        {"batches": [torch.zeros(3, 12), torch.zeros(3, 5)]},
        ValueError,
        r"batch 1, a tensor \(3, 5\)",
    ),
    "other device": (mlp, {"batches": [torch.zeros(3, 12, device="meta")]}, ValueError, "batch 0 is on meta"),
    "other keys": (mlp, {"batches": [{"y": torch.zeros(3, 12)}]}, ValueError, "batch 0, a mapping of y"),
    "not finite": (mlp, {"batches": [torch.full((3, 12), torch.nan)]}, ValueError, "input of '0.weight' in batch 0"),
    "not finite inside": (explodes, {}, ValueError, "input of '2.weight' in batch 0 is not finite"),
    "weights not finite": (infinite, {}, ValueError, "2.weight is not finite"),
    "unreached": (Unused, {}, ValueError, "no batch reaches unused.weight"),
    "without examples": (Empty, {}, ValueError, "no batch reaches unused.weight"),
    "empty batches": (mlp, {"batches": [torch.zeros(0, 12)]}, ValueError, "no batch reaches 0.weight, 2.weight"),
    "emptied by pruning": (Routed, {"sparsity": 0.95}, ValueError, "no example reaches 'unused.weight' any more"),
    "kind": (lambda: nn.LSTM(12, 4), {}, ValueError, "weight_ih_l0, weight_hh_l0 are not"),
    "own forward": (
        lambda: nn.Sequential(Padded(3, 4, 2)),
        {"batches": [torch.randn(2, 3, 5, 5)]},
        ValueError,
        "is of a Padded, whose output is not",
    ),
    "own forward, reached late": (
        Late,
        {"batches": [{"x": torch.randn(20, 12)}, {"x": torch.randn(20, 12), "again": True}]},
        ValueError,
        "'unused.weight' is of a Scaled, whose output is not",
    ),
    "too large afterwards": (
        large,
        {"batches": [torch.full((20, 2), 1e-3, dtype=torch.float16)]},
        ValueError,
        "'weight' would not be finite after its reconstruction",
    ),
    "attention": (
        lambda: nn.TransformerEncoderLayer(12, 2, 16, batch_first=True),
        {"batches": [torch.randn(2, 5, 12)], "weights": ["self_attn.out_proj.weight", "linear1.weight"]},
        ValueError,
        "reaches self_attn.out_proj.weight; nn.MultiheadAttention",
    ),
    "shared by different layers": (shared, {"batches": [torch.randn(2, 4, 4, 4)]}, ValueError, "different kinds share"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_nothing_changes(case):
    make, options, error, match = BAD[case]
    model = make()
    state = copy.deepcopy(model.state_dict()) if isinstance(model, nn.Module) else {}
    options = {"batches": correlated(), "sparsity": 0.5, **options}
    with pytest.raises(error, match=match):
        mm.prune(model, **options)
    for name, value in state.items():
        assert torch.equal(value.nan_to_num(), model.state_dict()[name].nan_to_num())
    assert model == 3 or (model.training and not any(m._forward_hooks for m in model.modules()))


def test_the_fast_path_of_a_transformer_does_not_hide_its_layers():
    model = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True)
    mm.prune(model, [torch.randn(2, 15, 12)], 0.5, weights=["linear*.weight"])
    assert mm.sparsity(model, ["linear*.weight"]).total == 0.5
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_compiled_model_is_pruned_as_it_is_when_it_is_not():
    model, batches = mlp(), correlated()
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(batches[0])
    mm.prune(compiled, batches, 0.5)
    mm.prune(plain, batches, 0.5)
    assert torch.equal(model[2].weight, plain[2].weight)
    torch.testing.assert_close(compiled(batches[0]), plain(batches[0]))


def test_too_few_places_are_said():
    with pytest.warns(UserWarning, match=r"inputs of 0.weight is singular, and was damped"):
        mm.prune(nn.Sequential(nn.Linear(12, 4)), [torch.randn(5, 12)], 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mm.prune(nn.Sequential(nn.Linear(12, 4)), [torch.randn(5, 12)], 0.5, "wanda")
    with pytest.warns(UserWarning, match=r"leaves nothing of 2.weight"):
        model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))
        model[2].weight.data *= 1e-6
        mm.prune(model, correlated(), 0.5, "magnitude", allocation="global")
