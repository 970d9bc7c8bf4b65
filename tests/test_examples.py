"""Each example runs, on a little data, and leaves a sparse model's file."""

import runpy
import sys
from pathlib import Path

import pytest

import mirrormask as mm

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")
def test_example(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), "1"])  # one epoch
    runpy.run_path(str(path), run_name="__main__")
    assert "nonzeros" in capsys.readouterr().out  # what print(mm.sparsity(model)) says
    tensors = mm.load(tmp_path / f"{path.stem}.safetensors")
    weights = [tensor for tensor in tensors.values() if tensor.dim() > 1]
    assert sum(int(t.count_nonzero()) for t in weights) < 0.4 * sum(t.numel() for t in weights)


def test_there_is_one_for_each_trainer_and_each_is_short():
    assert {"plain_loop", "accelerate_loop", "hf_trainer", "lightning_module", "timm_finetune"} == {
        path.stem for path in EXAMPLES
    }
    assert all(len(path.read_text().splitlines()) <= 60 for path in EXAMPLES)
