"""What is written into weights between steps counts, however it is written; and what is never said is said."""

import copy
import io
import pickle
import re
import warnings

import pytest
import torch
from safetensors import safe_open
from torch import nn

import mirrormask as mm
from mirrormask.optimizer.edits import Sample

X = torch.randn(32, 12, generator=torch.Generator().manual_seed(1))
Y = X[:, :4].argmax(1)
METHODS = ["mirror", "pilot", "powerprop", "gmp", "str", "sign_in"]
WRITERS = {
    "in place": lambda p: p.mul_(0.5),
    "data": lambda p: p.data.mul_(0.5),
    "data of some": lambda p: p.data.clamp_(-0.1, 0.1),
    "detached": lambda p: p.detach().mul_(0.5),
    "numpy": lambda p: p.detach().numpy().__imul__(0.5),
}


def build(name="mirror", steps=20, model=None, sparsity=0.8, **options):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, mm.sparsify(model, base, mm.methods.get(name)(sparsity), steps=steps, **options)


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()


def still(model, optimizer, steps=1):
    """Steps that move nothing by themselves."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", METHODS)
def test_a_step_goes_on_from_what_was_written(name, writer):
    model, optimizer = build(name, steps=1000)
    train(model, optimizer, 3)
    with torch.no_grad():
        WRITERS[writer](model[0].weight)
    written = model[0].weight.detach().clone()
    still(model, optimizer)
    torch.testing.assert_close(model[0].weight.detach(), written, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", METHODS)
def test_what_was_written_after_the_last_step_is_saved(name, writer):
    model, optimizer = build(name)
    train(model, optimizer, 3)
    before = {key: value.clone() for key, value in model.named_parameters()}
    with torch.no_grad():
        WRITERS[writer](model[0].weight)
    written = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    assert not torch.equal(before["0.weight"], written["0.weight"])
    other, resumed = build(name)
    other.load_state_dict(written)
    resumed.load_state_dict(state)
    torch.testing.assert_close(other[0].weight.detach(), written["0.weight"], rtol=1e-5, atol=1e-7)


def test_one_element_written_through_data_is_seen_by_finalize():
    model = nn.Linear(512, 300, bias=False)
    optimizer = mm.sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), mm.methods.mirror(0.5), steps=4)
    for _ in range(4):
        model(torch.randn(2, 512)).square().mean().backward()
        optimizer.step()
    living = optimizer.masks["weight"].nonzero()[77]
    model.weight.data[tuple(living)] = 7.0
    optimizer.finalize()
    assert model.weight[tuple(living)] == 7.0
    still(model, optimizer)
    torch.testing.assert_close(model.weight[tuple(living)].item(), 7.0)


@pytest.mark.parametrize("name", ["gmp", "mirror"])
def test_a_decay_by_hand_of_some_units_in_the_last_place_adds_up(name):
    model, optimizer = build(name, steps=100_000)
    train(model, optimizer, 1)
    before, factor = model[0].weight.norm().item(), 1 - 16 * 2**-24
    for _ in range(100):
        with torch.no_grad():
            model[0].weight.mul_(factor)
        still(model, optimizer)
    lost = (1 - model[0].weight.norm().item() / before) / (100 * (1 - factor))
    assert 0.95 < lost < 1.05


def test_a_sample_sees_small_tensors_whole_and_of_large_ones_every_byte_in_turn():
    small, large = torch.zeros(100), torch.zeros(3, 1 << 16).t()
    sample = Sample()
    for at in (0, 99):
        sample.take([small, large])
        assert not sample.has_changed([small, large])
        small[at] += 1
        assert sample.has_changed([small, large])
    seen = 0
    for _ in range(Sample.PAGE // Sample.LINE):
        sample.take([small, large])
        large[54321, 1] += 1
        seen += sample.has_changed([small, large])
    assert seen == 1
    assert not Sample().has_changed([small])


# -- what is said ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mirror", "gmp"])
@pytest.mark.parametrize("copied", [lambda pair: pair, copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_the_base_is_not_stepped_by_itself(name, copied):
    model, optimizer = build(name)
    train(model, optimizer, 2)
    model, optimizer = copied((model, optimizer))
    before = copy.deepcopy(model.state_dict())
    nn.functional.cross_entropy(model(X), Y).backward()
    with pytest.raises(RuntimeError, match="step what mm"):
        optimizer.base.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="zero_grad"):  # the weights' gradients would add up
        optimizer.base.zero_grad()
    train(model, optimizer, 2)  # and the right one goes on


def test_a_scheduler_on_the_base_is_refused_at_the_next_step():
    model, optimizer = build()
    train(model, optimizer, 1)
    torch.optim.lr_scheduler.StepLR(optimizer.base, 1)
    with pytest.raises(RuntimeError, match="a scheduler is built on the SGD that was given"):
        train(model, optimizer, 1)


@pytest.mark.parametrize("change", ["rate", "decay", "group"])
@pytest.mark.parametrize("name", ["mirror", "gmp"])
def test_groups_of_the_base_are_not_changed_by_hand(name, change):
    model, optimizer = build(name)
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.base.param_groups)
    if change == "group":
        optimizer.base.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    else:
        optimizer.base.param_groups[0][{"rate": "lr", "decay": "weight_decay"}[change]] = 0.03
    with pytest.raises(RuntimeError, match=r"param_groups\[0\]|groups and has"):
        train(model, optimizer, 1)
    if change != "group":  # and where it is what it was, training goes on
        optimizer.base.param_groups[0].update({k: v for k, v in before[0].items() if k != "params"})
        train(model, optimizer, 2)


def test_a_checkpoint_in_between_hides_no_hand_in_the_groups():
    model, optimizer = build()
    train(model, optimizer, 2)
    optimizer.state_dict()
    optimizer.base.param_groups[0]["weight_decay"] = 0.03
    with pytest.raises(RuntimeError, match="weight_decay"):
        optimizer.state_dict()
    with pytest.raises(RuntimeError, match="weight_decay"):
        train(model, optimizer, 1)


def test_a_cycled_momentum_in_rounds_resumes_bit_for_bit():
    def run(stop):
        model, optimizer = build("lth", steps=24)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=40, cycle_momentum=True)
        for step in range(24):
            if step == stop:
                parts = model, optimizer, scheduler
                states = copy.deepcopy([part.state_dict() for part in parts])
                model, optimizer = build("lth", steps=24)
                scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=40, cycle_momentum=True)
                for part, state in zip((model, optimizer, scheduler), states, strict=True):
                    part.load_state_dict(state)
            train(model, optimizer, 1)
            scheduler.step()
        return model[0].weight

    assert torch.equal(run(None), run(13))


@pytest.mark.parametrize("name", ["mirror", "gmp", "rigl", "str"])
def test_finalize_before_the_schedule_has_come_there_says_so(name):
    said = {0: r"finalize\(\) after no step", 7: r"training ended at step 7 of 20, when .*removes the rest of the 80%"}
    for steps in (0, 7, 19):
        model, optimizer = build(name)
        train(model, optimizer, steps)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            optimizer.finalize()
            optimizer.finalize()
        wanted = said.get(steps) if name != "rigl" or not steps else None  # its mask has been that sparse throughout
        assert bool(found) == bool(wanted)
        assert not found or re.match(wanted, str(found[0].message))


def test_steps_that_find_no_gradient_are_remarked_on_once_and_those_of_frozen_layers_are_not():
    model, optimizer = build()
    for count in (25, 0):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            for _ in range(12):
                nn.functional.cross_entropy(model(X), Y).backward()
                optimizer.zero_grad()  # too soon
                optimizer.step()
        assert [str(w.message)[:46] for w in found] == ["10 steps in a row found no gradient in any wei"] * bool(count)
    model, optimizer = build("dense", sparsity=0.0)
    for p in optimizer.weights.values():
        p.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 12)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm_keeps_something_to_divide_by_or_is_refused(dim):
    norm = torch.nn.utils.parametrizations.weight_norm
    model = nn.Sequential(norm(nn.Linear(12, 64), dim=dim), nn.Tanh(), nn.Linear(64, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, optimizer = build("gmp", model=model, sparsity=0.97, on_empty="ignore")
        if dim is None:
            train(model, optimizer, 20)
            optimizer.finalize()
            assert model(X).isfinite().all()
            return
        with pytest.raises(RuntimeError, match="which weight norm divides"):
            train(model, optimizer, 20)
    assert model(X).isfinite().all()


def test_a_file_tells_the_sparsity_of_the_weights_that_were_chosen(tmp_path):
    model = nn.Sequential(nn.Embedding(50, 12), nn.Linear(12, 4))
    with torch.no_grad():
        model[0].weight[5:] = 0.0
    for weights, expected in (("0.weight", 0.9), (None, 0.0)):
        mm.save(model, tmp_path / "m.safetensors", weights=weights)
        with safe_open(tmp_path / "m.safetensors", "pt") as file:
            assert float(file.metadata()["mirrormask.sparsity"]) == expected
    with pytest.raises(TypeError, match="a state dict has none"):
        mm.save(model.state_dict(), tmp_path / "m.safetensors", weights="0.weight")


def test_copies_and_pickles_watch_their_own_weights():
    model, optimizer = build(steps=1000)
    train(model, optimizer, 3)
    together = copy.deepcopy((model, optimizer))
    file = io.BytesIO()
    torch.save((model, optimizer), file)
    file.seek(0)
    for other, own in (together, torch.load(file, weights_only=False)):
        other[0].weight.data.mul_(0.5)
        written = other[0].weight.detach().clone()
        still(other, own)
        torch.testing.assert_close(other[0].weight.detach(), written, rtol=1e-4, atol=1e-6)


class Doubled(torch.optim.SGD):
    """A user's optimizer, whose step calls that of the class that it extends."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(2)
        return super().step(closure)


@pytest.mark.parametrize("method", [mm.methods.mirror(0.5), mm.methods.gmp(0.5), mm.methods.mirror(0.5, factors=False)])
def test_a_base_whose_step_calls_its_parent_s_is_stepped(method):
    model = torch.nn.Linear(12, 8)
    start = model.bias.detach().clone()
    optimizer = mm.sparsify(model, Doubled(model.parameters(), lr=0.05), method, steps=5)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.ones(2, 12)).square().mean().backward()
        optimizer.step()
    optimizer.finalize()
    assert mm.sparsity(model).nonzeros == 48
    assert (model.bias != start).all()
    with pytest.raises(RuntimeError, match=r"was given to mm\.sparsify"):
        optimizer.base.step()
