"""benchmarks/gpu.py runs from end to end before a minute of a GPU is spent on it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


#: What a machine with a GPU may not have.
ABSENT = ("msgspec", "jsonargparse", "accelerate", "scipy", "sklearn", "plotly", "tensorboard", "torchvision", "rich")


@pytest.mark.early
def test_all_parts_run_on_a_cpu_with_nothing_but_what_a_gpu_s_machine_has(tmp_path):
    kept = tmp_path / "gpu.jsonl"
    for name in ABSENT:
        (tmp_path / f"{name}.py").write_text("raise ImportError(f'{__name__} is not there')")
    known = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--tiny", "--json", str(kept)]
    first = subprocess.run(command, capture_output=True, text=True, env=known)
    assert first.returncode == 0, first.stderr
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert {row["part"] for row in rows} == {"tests", "step", "accuracy"}
    assert rows[0]["returncode"] == 0, rows[0]["last"]
    assert {(row["network"], row["contender"]) for row in rows if row["part"] == "step"} >= {("gpt2", "mirror")}
    sparse = next(row for row in rows if row["part"] == "accuracy" and row["method"] == "mirror")
    assert sparse["nonzeros"] == round(0.02 * sparse["numel"])
    assert all("not a measurement" in row["card"] for row in rows)
    assert "| mirror |" in first.stdout


def test_packed_images_are_the_folders(tmp_path):
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import gpu_data
    finally:
        sys.path.remove(str(BENCHMARKS))
    from PIL import Image

    generator = np.random.default_rng(0)
    for part in ("train", "test"):
        for label in ("cat", "dog"):
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(3):
                Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)).save(
                    tmp_path / part / label / f"{i}.jpg"
                )
    gpu_data.pack(tmp_path, tmp_path / "packed.npz")
    x, y, train = gpu_data.load(tmp_path / "packed.npz")
    assert (tuple(x.shape), y.tolist(), train.sum()) == ((12, 32, 32, 3), [0] * 3 + [1] * 3 + [0] * 3 + [1] * 3, 6)
    assert np.array_equal(x[4], np.asarray(Image.open(tmp_path / "train" / "dog" / "1.jpg")))
    gpu_data.unpack(tmp_path / "packed.npz", tmp_path / "raw.npz")
    assert all(torch.equal(a, b) for a, b in zip(gpu_data.load(tmp_path / "raw.npz"), (x, y, train), strict=True))
    images = gpu_data.ready(x, y, train, torch.device("cpu"))
    assert images.train_x.mean().abs() < 1e-5
    moved = gpu_data.augmented(images.train_x)
    assert moved.shape == images.train_x.shape
    assert moved.is_contiguous(memory_format=torch.channels_last)
