"""Checkpoints that older versions wrote go on: none of them is ever made again."""

import json

import pytest
import torch
from frozen import BASES, CUT, FOLDER, STEPS, build, train
from torch import nn

import mirrormask as mm

FILES = sorted(FOLDER.glob("*.pt"))


def test_there_are_frozen_checkpoints_of_the_first_version():
    assert len([file for file in FILES if file.name.startswith("0.1.0-")]) == 10


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_frozen_checkpoint_goes_on(file):
    _, name, base = file.stem.split("-")
    saved = torch.load(file, weights_only=True)
    model, optimizer = build(name, base)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.step_count == CUT
    for key, p in model.named_parameters():
        assert torch.equal(p, saved["model"][key])
    train(model, optimizer, CUT, STEPS)
    optimizer.finalize()
    assert mm.sparsity(model).nonzeros == round(0.25 * 90)
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), saved["final"][key], rtol=1e-4, atol=1e-6)


def test_an_option_that_a_method_has_gained_counts_as_its_default():
    saved = torch.load(FOLDER / "0.1.0-mirror-sgd.pt", weights_only=True)["optimizer"]
    summary = json.loads(saved["param_groups"][0]["mirrormask"])
    assert "limit=0.004" in summary["method"]
    for text, fits in ((", limit=0.004", False), (", pattern=None", True), (", seed=0", True)):
        older = {**summary, "method": summary["method"].replace(text, "")}
        saved["param_groups"][0]["mirrormask"] = json.dumps(older)
        _, optimizer = build("mirror", "sgd")
        if fits:
            optimizer.load_state_dict(saved)
        else:  # mirror's own limit is not the default of ShrinkDecay
            with pytest.raises(ValueError, match=r"decay\.limit: None there, 0\.004 here"):
                optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    ("base", "told"),
    [("sgd", r"decay\.growth: None there, 0\.5 here"), ("adamw", r"growth: None.*mask\.score: 'sensitivity' there")],
)
def test_a_checkpoint_made_with_other_defaults_is_refused_by_their_names(base, told):
    saved = torch.load(FOLDER / f"0.1.0-mirror-{base}.pt", weights_only=True)["optimizer"]
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
    optimizer = mm.sparsify(model, BASES[base](model.parameters()), mm.methods.mirror(0.75), steps=STEPS)
    with pytest.raises(ValueError, match=told):
        optimizer.load_state_dict(saved)
