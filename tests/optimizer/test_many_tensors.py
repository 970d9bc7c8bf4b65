"""A model of n times as many tensors takes n times as much: counted in calls, which nobody else's work changes."""

import gc
import sys

import pytest
import torch
from torch import nn

import mirrormask as mm
from mirrormask.flats import ROOM, all_finite, count_each, flats, keep_only_each, which_not_finite
from mirrormask.masks import allocate, floors, largest, select
from mirrormask.masks.allocations import erk, uniform
from mirrormask.storage import reader


def calls(work):
    """What a function returns, and how many functions, of Python and of C, were called for it."""
    count = 0

    def note(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        found = work()
    finally:
        sys.setprofile(None)
    return found, count


def life(tensors, method, folder):
    """Everything that is done with a model of so many weights -> the calls that it took."""
    model = nn.Sequential(*(nn.Linear(4, 3, bias=False) for _ in range(tensors)))
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    steps, found = 8, {}

    def do(what, work):
        result, found[what] = calls(work)
        return result

    optimizer = do("sparsify", lambda: mm.sparsify(model, base, mm.methods.get(method)(0.5), steps=steps))
    for step in range(steps):
        for index, p in enumerate(model.parameters()):
            p.grad = torch.full_like(p, 0.01 * (index % 5 - 2))
        do(f"step {step}", optimizer.step)
    state = do("state_dict", optimizer.state_dict)
    do("load_state_dict", lambda: optimizer.load_state_dict(state))
    do("diagnostics", optimizer.diagnostics)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    do("finalize, after edits", optimizer.finalize)
    do("sparsity", lambda: str(mm.sparsity(model)))
    do("save", lambda: mm.save(model, folder / "model.safetensors"))
    do("load", lambda: mm.load(folder / "model.safetensors", model))
    return found


@pytest.mark.cases(1)
@pytest.mark.parametrize("method", ["gmp", "mirror", "pilot", "rigl", "set", "str", "lrr", "erk", "gmp_ham"])
def test_calls_grow_as_the_number_of_tensors(method, tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MANY", 10)
    life(10, method, tmp_path)  # what is made once is made here
    few, many = life(16, method, tmp_path), life(64, method, tmp_path)
    grown = {what: round(count / few[what], 2) for what, count in many.items() if count > 4.4 * few[what]}
    assert not grown


def lines(work):
    """How many lines of Python were run for a function: each round of a loop counts."""
    count = 0

    def note(frame, event, arg):
        nonlocal count
        count += event == "line"
        return note

    before = sys.gettrace()
    sys.settrace(note)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("share", [uniform, erk, lambda shapes, sparsity: floors(shapes, sparsity, 0.9)])
def test_counts_of_many_layers_take_as_long_as_there_are_layers(share):
    few, many = ([(3 + i % 7, 2 + i % 5) for i in range(layers)] for layers in (700, 2800))
    assert lines(lambda: share(many, 0.93)) < 6 * lines(lambda: share(few, 0.93))  # linear is 4, quadratic 16


def test_the_largest_give_way_where_floors_of_one_are_too_many():
    shapes = [(1, 3)] * 6 + [(40, 40)]
    assert floors(shapes, 1 - 8 / 1618, share=1.0) == [1] * 6 + [2]
    assert sum(floors([(2, 2)] * 50 + [(90, 90)], 0.99, share=1.0)) <= round(0.01 * 8300)


# -- many as a few ---------------------------------------------------------------------------------------------------

MIXED = [
    torch.tensor([[1.0, 0.0], [-0.0, 2.0]]),
    torch.zeros(0),
    torch.tensor(3.0),
    torch.tensor([True, False]),
    torch.arange(6).view(2, 3).t(),
    torch.ones(ROOM + 1),
    torch.tensor([0.0, 5.0], dtype=torch.bfloat16),
    torch.eye(3)[:, 1],
]


def test_flats_are_the_elements_in_order():
    found = list(flats(MIXED))
    assert [i for of, _ in found for i in of] == list(range(len(MIXED)))
    for of, flat in found:
        assert torch.equal(flat, torch.cat([MIXED[i].reshape(-1) for i in of]))
        assert len(of) == 1 or flat.numel() <= ROOM
    assert not list(flats([]))


def test_what_is_asked_of_each_is_what_one_by_one_gives():
    assert count_each(MIXED) == [int(torch.count_nonzero(x)) for x in MIXED]
    parameters = [nn.Parameter(torch.tensor(values)) for values in ([1.0], [float("inf"), 1.0], [0.0], [float("nan")])]
    assert which_not_finite(parameters) == [False, True, False, True]
    assert not all_finite(parameters)
    assert all_finite(MIXED)
    assert all_finite([torch.full((3,), 3e38)])  # whose sum overflows


@pytest.mark.parametrize("number", [1, 2, len(MIXED)])
def test_masks_of_each_are_those_of_one_by_one_and_stay_as_they_are(number):
    tensors = [x.clone() for x in MIXED[:number]]
    for x in tensors:
        if x.is_floating_point() and x.numel() > 1:
            x.view(-1)[:2] = torch.tensor([float("nan"), -0.0]) if x.is_contiguous() else x.reshape(-1)[:2]
    masks = [torch.arange(x.numel()).reshape(x.shape) % 2 == number % 2 for x in tensors]
    wanted = [torch.where(mask, x, torch.zeros_like(x)) for x, mask in zip(tensors, masks, strict=True)]
    before = [mask.clone() for mask in masks]
    keep_only_each(tensors, masks)
    for x, want, mask, was in zip(tensors, wanted, masks, before, strict=True):
        assert torch.equal(mask, was)
        assert x.numpy(force=True).tobytes() == want.numpy(force=True).tobytes() if x.dtype != torch.bfloat16 else True


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_masks_of_many_small_layers_are_those_of_one_long_one(sparsity, floor):
    generator = torch.Generator().manual_seed(1)
    # Few values, so that many are equal and the index decides.
    scores = [torch.randint(0, 5, (1 + i % 4, 3), generator=generator).float() for i in range(60)]
    masks = select(scores, sparsity, floor=floor)
    assert [mask.shape for mask in masks] == [score.shape for score in scores]
    assert sum(map(int, map(torch.count_nonzero, masks))) == round((1 - sparsity) * sum(s.numel() for s in scores))
    assert all(mask.untyped_storage().nbytes() == mask.numel() for mask in masks)
    if not floor:
        flat = torch.cat([score.reshape(-1) for score in scores])
        order = sorted(range(len(flat)), key=lambda i: (-float(flat[i]), i))
        keep = set(order[: round((1 - sparsity) * len(flat))])
        assert torch.cat([mask.reshape(-1) for mask in masks]).tolist() == [i in keep for i in range(len(flat))]


@pytest.mark.parametrize("allocation", ["uniform", "erk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_largest_of_each_small_layer_are_those_of_each_alone(allocation, dtype):
    generator = torch.Generator().manual_seed(2)
    shapes = [(1 + i % 4, 3 + i % 2) for i in range(40)] + [(0, 3), (5,)]
    scores = [torch.randint(-3, 4, shape, generator=generator).to(dtype) for shape in shapes]
    scores[3][0, 0], scores[4][0, 0], scores[5][0, 1] = -float("inf"), float("inf"), -0.0
    counts = allocate(allocation, shapes, 0.6)
    for score, mask, count in zip(scores, select(scores, 0.6, allocation), counts, strict=True):
        assert torch.equal(mask, largest(score, count))


# -- mm.load of many -------------------------------------------------------------------------------------------------


def test_a_model_that_does_more_than_copy_is_asked_whatever_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MANY", 3)

    class Own(nn.Linear):
        def _load_from_state_dict(self, *arguments):
            super()._load_from_state_dict(*arguments)
            self.loaded = True

    plain = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    mm.save(plain, tmp_path / "plain")
    own = nn.Sequential(Own(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    hooked = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    seen = []
    hooked[2].register_load_state_dict_post_hook(lambda module, keys: seen.append(module))
    for model in (own, hooked, nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))):
        mm.load(tmp_path / "plain", model)
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True)
        )
    assert own[0].loaded
    assert seen == [hooked[2]]


# -- the collector rests ---------------------------------------------------------------------------------------------


def test_the_collector_rests_and_warnings_still_name_the_users_own_line(tmp_path):
    model = nn.Linear(4, 3, bias=False)
    optimizer = mm.sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), mm.methods.get("gmp")(0.5), steps=2)
    seen = []
    optimizer.base.register_step_pre_hook(lambda *_: seen.append(gc.isenabled()))
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    with torch.no_grad():
        model.weight.zero_()
    with pytest.warns(UserWarning, match="nonzeros instead of") as found:
        optimizer.finalize()
    mm.save(model, tmp_path / "model.safetensors")
    assert seen == [False]
    assert gc.isenabled()
    assert {warning.filename for warning in found} == {__file__}
