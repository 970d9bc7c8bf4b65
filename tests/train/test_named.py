"""Networks and data of the user's own, and the permission that they need."""

import pytest
import torch
from torch import nn

from mirrormask.train import data, load, models, named
from mirrormask.train.recipe import Data, Model, Recipe

FILE = """
import torch
from torch import nn

def small(shape, num_classes, width=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], width), nn.Linear(width, num_classes))

def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def wrong():
    return 3

ready = plain()
number = 3

def images():
    x = torch.arange(40 * 64, dtype=torch.int64).remainder(256).to(torch.uint8).view(40, 1, 8, 8)
    return (x[:30], torch.arange(30) % 10), (x[30:], torch.arange(10))

def unseen():
    (x, y), (other, labels) = images()
    return (x, y), (other, labels + 3)

def scores():
    class Scores(nn.Flatten):
        def forward(self, x):
            return {"logits": super().forward(x)[:, :10]}
    return Scores()

def floats():
    return (torch.rand(4, 1, 8, 8), torch.zeros(4)), (torch.rand(4, 1, 8, 8), torch.zeros(4))
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(FILE)
    return "own.py"


def test_a_function_is_given_what_it_takes_and_a_module_is_copied(file):
    assert models.build(f"{file}:small", (1, 8, 8), 7, width=5)[1].out_features == 5
    assert models.build(f"{file}:plain", (1, 8, 8), 10)[1].out_features == 10
    one, two = (models.build(f"{file}:ready", (1, 8, 8), 10) for _ in range(2))
    assert one[1].weight is not two[1].weight
    assert torch.equal(one[1].weight, two[1].weight)
    assert isinstance(named.fetch("torch.nn:ReLU")(), nn.ReLU)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("own.py:smal", {}, ValueError, "unknown name in own.py: 'smal'; did you mean 'small'"),
        ("other.py:small", {}, ValueError, "there is no file 'other.py'"),
        ("no_such_package.nets:small", {}, ValueError, "there is no module 'no_such_package'.*FILE.py:NAME"),
        ("own.py:small", {"depth": 3}, TypeError, "'depth'; it takes: shape, num_classes, width"),
        ("own.py:wrong", {}, TypeError, "returned a int, not a torch.nn.Module"),
        ("own.py:scores", {}, ValueError, r"of two it makes a dict, not a tensor \(2, 10\).*a function that wraps it"),
        ("own.py:number", {}, TypeError, "is a int, neither a module nor a function"),
        ("own.py:ready", {"width": 3}, TypeError, "is a module, which takes no options"),
        ("timm:efficientnet_lite", {}, ValueError, "unknown timm model.*did you mean efficientnet_lite0"),
        ("timm:test_vit", {"nonsense": 1}, TypeError, "timm:test_vit does not take these options"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_said(file, name, options, error, message):
    with pytest.raises(error, match=message):
        models.build(name, (3, 8, 8) if name.startswith("timm") else (1, 8, 8), 10, **options)


def test_timm_models_get_classes_and_channels():
    assert models.build("timm:test_efficientnet", (1, 32, 32), 5)(torch.rand(2, 1, 32, 32)).shape == (2, 5)


def test_a_function_of_the_user_s_gives_the_data(file):
    splits = data.load(Data(f"{file}:images"))
    assert (len(splits.train), len(splits.test), splits.classes) == (30, 10, tuple("0123456789"))
    with pytest.raises(TypeError, match=r"returned x of torch.float32.*with x uint8 of \(n, channels"):
        data.load(Data(f"{file}:floats"))
    with pytest.raises(ValueError, match=r"of classes that none to train on is of: \[10, 11, 12\]"):
        data.load(Data(f"{file}:unseen"))
    with pytest.raises(TypeError, match="returned a Sequential"):
        data.load(Data(f"{file}:plain"))


def test_a_file_alone_imports_nothing(file, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: own.py:small\ndata: own.py:images\n")
    with pytest.raises(ValueError, match=r"'own.py:small' is code that would be imported.*--allow-code true"):
        load(path)
    assert load(path, allow_code=True).model.name == "own.py:small"
    with pytest.raises(ValueError, match=r"'own[.]py:images' is code"):
        load(path, {"model": "own.py:small"})
    assert load(path, {"model": "own.py:small", "data": "own.py:images"}).data.name == "own.py:images"


def test_a_folder_is_data_and_names_folders_of_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "birds").mkdir()
    assert Data("birds").name == "folder:birds"
    (tmp_path / "birds" / "dataset_dict.json").write_text("{}")
    assert Data(str(tmp_path / "birds")).name == f"datasets:{tmp_path / 'birds'}"
    with pytest.raises(ValueError, match=r"the data folder './bird' does not exist"):
        Data("./bird")
    with pytest.raises(ValueError, match="unknown data set 'digit'; did you mean 'digits'"):
        Data("digit")
    out = Recipe(data=Data("folder:a/birds"), model=Model("nets/own.py:small"), sparsity=0.5).out
    assert out == "runs/birds-own.py-small-0.5-seed0"
