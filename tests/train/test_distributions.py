"""What a run leaves for its report: histograms that count every weight, and predictions that give its accuracy."""

import base64
import json
from pathlib import Path

import pytest
import torch

import mirrormask as mm
from mirrormask.train import Data, Method, Model, Observer, Recipe, RunFolder, data, run
from mirrormask.train import predictions as predictions_file
from mirrormask.train.distributions import histogram
from mirrormask.train.session import Session
from mirrormask.train.trained import load_model

LAYERS = {"1.weight": 64 * 32, "3.weight": 320}


def small(out, method="mirror", **changes):
    settings = {
        "epochs": 3,
        "threads": 1,
        "figure": False,
        "sparsity": 0.9,
        "model": Model("mlp", {"hidden": [32]}),
        **changes,
    }
    return Recipe(method=Method(method), out=str(out), **settings)


def read(folder, name):
    return json.loads((Path(folder) / name).read_text())


class StopAfter(Observer):
    def logged(self, record):
        if record["event"] == "epoch" and record["epoch"] == 2:
            raise KeyboardInterrupt


def test_a_histogram_an_eye_can_check():
    values = torch.tensor([[-1.0, -0.9, 0.0], [0.1, 1.0, float("nan")]])
    assert histogram(values, bins=3) == {"low": -1.0, "high": 1.0, "counts": [2, 1, 1], "zeros": 1}
    assert histogram(torch.zeros(4), bins=3) == {"low": -0.0, "high": 0.0, "counts": [], "zeros": 4}


@pytest.mark.parametrize("method", ["mirror", "gmp", "str", "dense"])
def test_every_weight_is_counted_once_at_each_moment(tmp_path, method):
    result = run(small(tmp_path / "run", method))
    layers = read(result.folder, "distributions.json")["layers"]
    assert {layer["name"] for layer in layers} == set(LAYERS)
    for layer, counted in zip(layers, result.layers, strict=True):
        for moment in ("start", "trained", "final"):
            assert sum(layer[moment]["counts"]) + layer[moment]["zeros"] == LAYERS[layer["name"]]
        assert sum(layer["final"]["counts"]) == counted.nonzeros
        assert (layer["imbalance"] is not None) == (method == "mirror")
    if method == "mirror":
        alive = sum(sum(layer["imbalance"]["counts"]) + layer["imbalance"]["zeros"] for layer in layers)
        assert alive == result.nonzeros  # mirror has its mask before the end
        assert all(layer["imbalance_start"] > 0 for layer in layers)


def test_the_predictions_are_those_of_the_saved_model_and_give_its_accuracy(tmp_path):
    result = run(small(tmp_path / "run"))
    tree, splits = read(result.folder, "predictions.json"), data.load(Data())
    assert tree["classes"] == [str(k) for k in range(10)]
    assert tree["truth"] == splits.test.y.tolist()
    mean, std = splits.statistics()
    assert tree["predicted"] == load_model(result.folder)((splits.test.x - mean) / std).argmax(1).tolist()
    wrong = [i for i, (a, b) in enumerate(zip(tree["truth"], tree["predicted"], strict=True)) if a != b]
    assert 1 - len(wrong) / len(tree["truth"]) == pytest.approx(result.test_accuracy, abs=1e-9)
    assert list(map(int, tree["images"])) == wrong[: predictions_file.MAX_IMAGES]
    assert all(base64.b64decode(png)[:4] == b"\x89PNG" for png in tree["images"].values())


@pytest.mark.parametrize(("shape", "size"), [((1, 8, 8), (8, 8)), ((3, 32, 32), (32, 32)), ((3, 200, 100), (24, 48))])
def test_pictures_are_small_and_keep_their_shape(shape, size):
    import io

    from PIL import Image

    x = torch.randint(0, 255, shape, dtype=torch.uint8)
    image = Image.open(io.BytesIO(base64.b64decode(predictions_file._png(x))))
    assert image.size == size
    assert image.mode == ("L" if shape[0] == 1 else "RGB")


def test_a_resumed_run_leaves_the_same_files(tmp_path):
    run(small(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        run(small(tmp_path / "parts"), observer=StopAfter())
    run(small(tmp_path / "parts"), resume=True)
    for name in ("distributions.json", "predictions.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_measuring_changes_nothing_in_the_run(tmp_path, monkeypatch):
    run(small(tmp_path / "with"))
    from mirrormask.train import loop

    monkeypatch.setattr(loop, "Distributions", lambda _: _Nothing())
    monkeypatch.setattr(loop.predictions, "write", lambda *_: None)
    run(small(tmp_path / "without"))
    a, b = (mm.load(tmp_path / name / "model.safetensors") for name in ("with", "without"))
    assert all(torch.equal(a[name], b[name]) for name in a)


class _Nothing:
    def trained(self):
        """In the place of Distributions."""

    def final(self):
        """Likewise."""

    def write(self, folder):
        """Likewise."""


def test_overwriting_a_run_removes_the_timing_of_the_old_model(tmp_path):
    run(small(tmp_path / "run", epochs=1))
    (tmp_path / "run" / "bench.json").write_text("{}")
    run(small(tmp_path / "run", epochs=1, seed=1), overwrite=True)
    assert not (tmp_path / "run" / "bench.json").exists()
    assert "bench.json" in RunFolder.NAMES


def test_an_image_that_is_shown_in_colour_keeps_its_values(tmp_path):
    session = Session(small(tmp_path / "run", data=Data(channels=3)))
    assert len(predictions_file.predict(session, session.model)) == 355
