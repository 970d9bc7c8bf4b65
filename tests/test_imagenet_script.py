"""benchmarks/imagenet.py from end to end, on a stand-in folder of images: alone, resumed, and by torchrun."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mirrormask as mm
from mirrormask.masks import keep_count

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "imagenet.py"
SMALL = [
    "--network",
    "squeezenet1_1",
    "--size",
    "64",
    "--batch",
    "4",
    "--workers",
    "0",
    "--warmup",
    "1",
    "--lr",
    "0.01",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes, dark and bright, of twelve images each, of different sizes."""
    from PIL import Image

    root, generator = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 4)):
        for label, low in (("n01", 0), ("n02", 128)):
            (root / part / label).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(low, low + 128, (70 + i, 80, 3), np.uint8)
                Image.fromarray(pixels).save(root / part / label / f"{i}.JPEG")
    return root


def run(folder, out, *options, launcher=()):
    command = [sys.executable, *launcher, str(SCRIPT), str(folder), "--out", str(out), *SMALL, *options]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def run_here(monkeypatch, folder, out, *options):
    """In this process, which has imported torch already."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(folder), "--out", str(out), *SMALL, *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_it_trains_prunes_saves_and_goes_on(folder, tmp_path, monkeypatch, capsys):
    done = run(folder, tmp_path, "--epochs", "2")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["nonzeros"] == keep_count(result["numel"], 0.9)
    held = mm.load(tmp_path / "model.safetensors")
    assert sum(int(t.count_nonzero()) for t in held.values() if t.dim() > 1) == result["nonzeros"]
    run_here(monkeypatch, folder, tmp_path, "--epochs", "2")  # every epoch is in the checkpoint
    assert "epoch" not in capsys.readouterr().out.splitlines()[0].split(":")[0]
    assert json.loads((tmp_path / "result.json").read_text())["nonzeros"] == result["nonzeros"]


def test_what_does_not_fit_is_said_before_training(folder, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="--batch 100 is not one of 16 images"):
        run_here(monkeypatch, folder, tmp_path, "--batch", "100")


@pytest.mark.long
def test_two_processes_train_one_network(folder, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run(folder, tmp_path, "--epochs", "1", "--method", "acdc_ham", launcher=launcher)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["nonzeros"] == keep_count(result["numel"], 0.9)
