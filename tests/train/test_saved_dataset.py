"""A folder that Hugging Face's datasets has saved becomes images in memory."""

import numpy as np
import pytest

from mirrormask.train import data
from mirrormask.train.recipe import Data

datasets = pytest.importorskip("datasets")


def split(n, side=(8, 10), second=None):
    from PIL import Image

    pixels = np.random.default_rng(n).integers(0, 256, (n, *side, 3), dtype=np.uint8)
    images = [Image.fromarray(array) for array in pixels]
    if second is not None:
        images[0] = images[0].resize(second)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    return datasets.Dataset.from_dict({"image": images, "label": [i % 2 for i in range(n)]}, features), pixels


def test_pixels_and_labels_come_through_and_size_resizes(tmp_path):
    (train, pixels), (test, _) = split(6), split(4)
    datasets.DatasetDict({"train": train, "validation": test}).save_to_disk(tmp_path / "own")
    splits = data.load(Data(str(tmp_path / "own")))
    assert splits.classes == ("cat", "dog")
    assert np.array_equal(splits.train.x.permute(0, 2, 3, 1).numpy(), pixels)
    assert splits.test.y.tolist() == [0, 1, 0, 1]
    assert data.load(Data(f"datasets:{tmp_path / 'own'}", size=4)).shape == (3, 4, 4)


def test_what_does_not_fit_is_said(tmp_path):
    (train, _), (test, _) = split(4), split(3, second=(5, 5))
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": train, "spare": test}).save_to_disk(tmp_path / "spare")
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "sizes")
    plain = datasets.DatasetDict({"train": train.remove_columns("label"), "test": test})
    plain.save_to_disk(tmp_path / "plain")
    for name, message in (
        ("one", "holds one split; save a DatasetDict with 'train' and 'test'"),
        ("spare", "holds the splits train, spare; it must hold 'train' and 'test'"),
        ("sizes", "images are of 2 sizes"),
        ("plain", r"must have one column of kind ClassLabel.*it has image \(Image\)"),
    ):
        with pytest.raises(ValueError, match=message):
            data.load(Data(f"datasets:{tmp_path / name}"))
    with pytest.raises(ValueError, match="does not exist"):
        data.load(Data("datasets:/nowhere"))
