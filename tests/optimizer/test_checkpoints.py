"""PyTorch's own pattern of checkpoints: get_state_dict, dcp.save, dcp.load, set_state_dict, in one process."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import mirrormask as mm

X = torch.randn(64, 12, generator=torch.Generator().manual_seed(1))
Y = X[:, :4].argmax(1)
STEPS = 20
BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "without momentum": lambda p: torch.optim.SGD(p, lr=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}
OPTIONS = {"": None, "full": StateDictOptions(full_state_dict=True, cpu_offload=True)}


def build(name, base, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    method = mm.methods.get(name)(0.0 if name == "dense" else 0.8)
    data = {"batches": [(X, Y)]} if method.reads_data else {}
    return model, mm.sparsify(model, BASES[base](model.parameters()), method, steps=STEPS, **data)


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
        if optimizer.step_count % 2:  # what a controller remembers of an epoch must be read back as well
            optimizer.epoch_end(score=0.1 * (7 * optimizer.step_count % 11))


# A cut in each part of a training, in rotation; strict loading throughout.
CASES = [
    (name, base, (0, 3, 15)[(i + j) % 3], list(OPTIONS)[(i + j) % 2])
    for i, name in enumerate(mm.methods.names())
    for j, base in enumerate(BASES)
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "base", "cut", "options"), CASES)
def test_a_run_goes_on_from_a_distributed_checkpoint_bit_for_bit(name, base, cut, options, tmp_path):
    options = OPTIONS[options]
    model, optimizer = build(name, base, seed=0)
    train(model, optimizer, cut)
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
    memory = dict(optimizer.parts.training.decay.state)
    train(model, optimizer, STEPS - cut)
    other, resumed = build(name, base, seed=3)
    weights, state = get_state_dict(other, resumed, options=options)
    loaded = {"model": weights, "optimizer": state}
    dcp.load(loaded, checkpoint_id=tmp_path)
    set_state_dict(
        other, resumed, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"], options=options
    )
    assert resumed.step_count == cut
    assert resumed.parts.training.decay.state == memory
    train(other, resumed, STEPS - cut)
    optimizer.finalize()
    resumed.finalize()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_a_flattened_state_leaves_out_is_named():
    model, optimizer = build("mirror", "sgd", seed=0)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    weights, state = get_state_dict(model, optimizer, options=options)
    with pytest.raises(ValueError, match="flatten_optimizer_state_dict=True does"):
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=options)
