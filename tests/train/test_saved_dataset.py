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


def test_splits_say_by_name_what_their_labels_are(tmp_path):
    """The test split may list its classes in another order, and call its columns otherwise."""
    (train, _), (test, pixels) = split(4), split(6)
    swapped = test.cast_column("label", datasets.ClassLabel(names=["dog", "cat"]))
    swapped = swapped.rename_columns({"image": "img", "label": "animal"})
    datasets.DatasetDict({"train": train, "test": swapped}).save_to_disk(tmp_path / "own")
    splits = data.load(Data(f"datasets:{tmp_path / 'own'}"))
    assert splits.train.y.tolist() == [0, 1, 0, 1]
    assert splits.test.y.tolist() == [1, 0, 1, 0, 1, 0]
    assert np.array_equal(splits.test.x.permute(0, 2, 3, 1).numpy(), pixels)


@pytest.mark.parametrize("kept", ["torch", "numpy", "undecoded", "label alone"])
def test_images_come_as_they_are_however_they_were_saved_to_be_read(tmp_path, kept):
    (train, pixels), (test, _) = split(4), split(2)
    if kept == "undecoded":
        train = train.cast_column("image", datasets.Image(decode=False))
    else:
        train = train.with_format(**({"columns": ["label"]} if kept == "label alone" else {"type": kept}))
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "own")
    x = data.load(Data(f"datasets:{tmp_path / 'own'}")).train.x
    assert np.array_equal(x.permute(0, 2, 3, 1).numpy(), pixels)


def test_what_does_not_fit_is_said(tmp_path):
    (train, _), (test, _) = split(4), split(3, second=(5, 5))
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": train, "spare": test}).save_to_disk(tmp_path / "spare")
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "sizes")
    plain = datasets.DatasetDict({"train": train.remove_columns("label"), "test": test})
    plain.save_to_disk(tmp_path / "plain")
    few, _ = split(2)
    without = datasets.DatasetDict({"train": train, "test": few.map(lambda _: {"label": -1})})
    without.save_to_disk(tmp_path / "without labels")
    lacking = few.map(lambda row, i: {"image": None if i else row["image"]}, with_indices=True)
    datasets.DatasetDict({"train": train, "test": lacking}).save_to_disk(tmp_path / "without an image")
    other = few.cast_column("label", datasets.ClassLabel(names=["cat", "bird"]))
    datasets.DatasetDict({"train": train, "test": other}).save_to_disk(tmp_path / "other classes")
    for name, message in (
        ("one", "holds one split; save a DatasetDict with 'train' and 'test'"),
        ("spare", "holds the splits train, spare; it must hold 'train' and 'test'"),
        ("sizes", "images are of 2 sizes"),
        ("without labels", r"'test' has no class in 'label' at 0, 1 \(of 2\).*validation is tested on"),
        ("without an image", "'test' has no image in 'image' at 1"),
        ("other classes", r"do not have the same classes; only in one of them: \['bird', 'dog'\]"),
        ("plain", r"must have one column of kind ClassLabel.*it has image \(Image\)"),
    ):
        with pytest.raises(ValueError, match=message):
            data.load(Data(f"datasets:{tmp_path / name}"))
    with pytest.raises(ValueError, match="does not exist"):
        data.load(Data("datasets:/nowhere"))
