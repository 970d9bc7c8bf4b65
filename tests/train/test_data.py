"""Data sets: splits, statistics, folders of images with their cache and their errors."""

import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from mirrormask.machine.cache import cache_folder
from mirrormask.train import Data, data, folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def birds(tmp_path):
    """Two classes of flat 6x5 images: the class and the number of an image are in its colour."""
    root = tmp_path / "birds"
    for part, count in (("train", 4), ("test", 2)):
        for label, name in enumerate(("crow", "wren")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((6, 5, 3), (100 * label, 10 * i, 7), np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


def test_digits_are_split_once_for_all_with_all_classes_alike():
    splits = data.load(Data())
    assert splits.shape == (1, 8, 8)
    assert (len(splits.train), len(splits.test)) == (1442, 355)
    assert torch.bincount(splits.test.y).tolist() == [
        n // 5 for n in torch.bincount(torch.cat([splits.train.y, splits.test.y])).tolist()
    ]
    assert torch.equal(splits.test.x, data.load(Data()).test.x)


def test_a_validation_split_comes_off_the_training_images_only():
    whole, split = data.load(Data()), data.load(Data(validation=300))
    assert (len(split.train), len(split.validation)) == (1142, 300)
    assert torch.equal(split.test.x, whole.test.x)
    rows = torch.cat([split.train.x, split.validation.x]).flatten(1)
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, whole.train.x.flatten(1).tolist()))


def test_a_validation_split_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match="validation=1442 leaves none of the 1442"):
        data.load(Data(validation=1442))


def test_statistics_equal_those_of_the_float_images():
    splits = data.load(Data())
    mean, std = splits.statistics()
    assert torch.allclose(mean.squeeze(), splits.train.x.double().mean().float())
    assert torch.allclose(std.squeeze(), splits.train.x.double().std(correction=0).float())


def test_a_constant_channel_is_not_divided_by_zero():
    images = data.Images(torch.full((3, 1, 2, 2), 9, dtype=torch.uint8), torch.zeros(3).long())
    assert data.Splits(images, images, None, ("a",)).statistics()[1].item() == 1.0


def test_grey_images_become_three_channels_on_request():
    x = data.load(Data(channels=3)).train.x
    assert x.shape[1:] == (3, 8, 8)
    assert torch.equal(x[:, 0], x[:, 2])
    assert data.load(Data(channels=1)).shape == (1, 8, 8)


def test_a_folder_gives_its_pixels_labels_and_classes(birds):
    splits = data.load(Data(f"folder:{birds}"))
    assert splits.classes == ("crow", "wren")
    assert splits.train.y.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert splits.train.x.shape == (8, 3, 6, 5)
    assert splits.train.x[:, :, 0, 0].tolist() == [[100 * label, 10 * i, 7] for label in (0, 1) for i in range(4)]
    assert len(splits.test) == 4


def test_val_stands_in_for_test(birds):
    (birds / "test").rename(birds / "val")
    assert len(data.load(Data(f"folder:{birds}")).test) == 4


def test_the_second_start_reads_the_cache_and_a_changed_folder_does_not(birds, monkeypatch):
    first = data.load(Data(f"folder:{birds}"))
    decode = folder._decode
    monkeypatch.setattr(folder, "_decode", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(data.load(Data(f"folder:{birds}")).train.x, first.train.x)
    monkeypatch.setattr(folder, "_decode", decode)
    Image.fromarray(np.full((6, 5, 3), 255, np.uint8)).save(birds / "train" / "crow" / "0.png")
    assert data.load(Data(f"folder:{birds}")).train.x[0].min() == 255


def test_a_damaged_cache_is_made_again(birds):
    first = data.load(Data(f"folder:{birds}"))
    (kept,) = cache_folder().glob("*.images")
    whole = kept.read_bytes()
    flipped = whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:]  # of a label or a pixel: another data set, still sound
    foreign = whole[:32] + save({"other": torch.zeros(3)})
    for damaged in (whole[:40], b"", flipped, foreign):
        kept.write_bytes(damaged)
        again = data.load(Data(f"folder:{birds}"))
        assert torch.equal(again.train.x, first.train.x)
        assert torch.equal(again.test.y, first.test.y)
        assert again.digest == first.digest
        assert kept.read_bytes() == whole


def test_a_file_of_the_same_size_and_time_is_another_one(birds):
    first, path = data.load(Data(f"folder:{birds}")), birds / "train" / "crow" / "0.png"
    before = path.stat()
    other = next(p for p in sorted((birds / "train").rglob("*.png")) if p != path)
    raw = path.read_bytes()
    path.write_bytes(other.read_bytes()[: len(raw)].ljust(len(raw), b"\0"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as cp -p and rsync -t do
    assert not torch.equal(data.load(Data(f"folder:{birds}")).train.x, first.train.x)


def test_images_of_several_sizes_are_named_and_can_be_resized(birds):
    Image.fromarray(np.zeros((12, 8, 3), np.uint8)).save(birds / "train" / "wren" / "big.png")
    with pytest.raises(ValueError, match=r"1 images are not 5x6 .*set data.size.*\n.*big.png: 8x12"):
        data.load(Data(f"folder:{birds}"))
    assert data.load(Data(f"folder:{birds}", size=4)).train.x.shape == (9, 3, 4, 4)


def test_images_look_as_viewers_show_them(birds):
    """Upright; 16 bits of grey as 8 and not cut off at 255; what is transparent on white, whatever lies below it."""
    crow, ramp = birds / "train" / "crow", np.arange(30).reshape(6, 5)
    for path in crow.iterdir():
        path.unlink()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    Image.fromarray(np.rot90(ramp).astype(np.uint8)).save(crow / "0.png", exif=exif)
    Image.fromarray((ramp * 2000).astype(np.uint16)).save(crow / "1.png")
    Image.fromarray((ramp * 2000).astype(np.uint16)).save(crow / "2.tif")
    (crow / "3.pgm").write_bytes(b"P5 5 6 65535 " + (ramp * 2000).astype(">u2").tobytes())
    clear = np.stack([ramp * 0, ramp * 0, ramp * 0, np.where(ramp < 15, 0, 255)], 2).astype(np.uint8)
    Image.fromarray(clear).save(crow / "4.png")
    Image.fromarray(clear).quantize(4).save(crow / "5.png")  # a palette with a transparent colour
    x = data.load(Data(f"folder:{birds}")).train.x[:6]
    assert torch.equal(x, x[:, :1].expand_as(x))
    assert x[0, 0].tolist() == ramp.tolist()
    for index in (1, 2, 3):
        assert x[index, 0].tolist() == (ramp * 2000 // 256).tolist()
    for index in (4, 5):
        assert x[index, 0].tolist() == np.where(ramp < 15, 255, 0).tolist()
    Image.fromarray((ramp / 30).astype(np.float32)).save(crow / "6.tif")
    Image.fromarray(ramp.astype(np.int32)).save(crow / "7.tif")
    with pytest.raises(ValueError, match=r"6.tif: it holds real numbers(?s:.*)7.tif: it holds integers of 32 bits"):
        data.load(Data(f"folder:{birds}"))


def test_what_editors_and_file_managers_leave_is_no_class_and_no_image(birds):
    first = data.load(Data(f"folder:{birds}"))
    (birds / "train" / ".ipynb_checkpoints").mkdir()
    shutil.copy(birds / "train" / "crow" / "0.png", birds / "train" / ".ipynb_checkpoints" / "0.png")
    (birds / "train" / "crow" / "._0.png").write_bytes(b"resource fork")
    assert data.load(Data(f"folder:{birds}")).digest == first.digest


@pytest.mark.parametrize(
    ("part", "error", "message"),
    [
        ((torch.zeros(3, 1, 2, 2), torch.zeros(3).long()), TypeError, "test holds x of torch.float32"),
        ((torch.zeros(3, 2, 2).byte(), torch.zeros(3).long()), TypeError, r"\(3, 2, 2\) and y"),
        ((torch.zeros(3, 1, 2, 2).byte(), torch.zeros(3)), TypeError, "y of torch.float32"),
        ((torch.zeros(3, 1, 2, 2).byte(), torch.zeros(2).long()), ValueError, r"\(2,\) labels; there must be one"),
        ((torch.zeros(0, 1, 2, 2).byte(), torch.zeros(0).long()), ValueError, "at least one"),
        ((torch.zeros(3, 1, 2, 3).byte(), torch.zeros(3).long()), ValueError, r"all images of \(1, 2, 2\)"),
        ((torch.zeros(3, 1, 2, 2).byte(), torch.tensor([0, 1, 2])), ValueError, "label 2, and there are 2 classes"),
        ((torch.zeros(3, 1, 2, 2).byte(), torch.tensor([0, -1, 1])), ValueError, "label -1, and there are 2 classes"),
    ],
)
def test_splits_that_are_none_are_refused_whoever_makes_them(part, error, message):
    sound = data.Images(torch.zeros(3, 1, 2, 2).byte(), torch.tensor([0, 1, 1]))
    with pytest.raises(error, match=message):
        data.Splits(sound, data.Images(*part), None, ("a", "b"))


def test_every_unreadable_image_is_named_in_one_error(birds):
    (birds / "train" / "crow" / "bad.png").write_bytes(b"no image")
    whole = (birds / "test" / "wren" / "0.png").read_bytes()
    (birds / "test" / "wren" / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ValueError, match=r"2 images cannot be read; remove or replace them:\n(?s:.*)bad.png(?s:.*)cut.png"
    ):
        data.load(Data(f"folder:{birds}"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: shutil.rmtree(root), "does not exist; give folder:PATH"),
        (lambda root: shutil.rmtree(root / "test"), r"must hold train/ and test/ \(or val/\).*it holds train"),
        (lambda root: [shutil.rmtree(root / "train" / n) for n in ("crow", "wren")], "train' has no classes"),
        (lambda root: [p.unlink() for p in (root / "train" / "wren").iterdir()], "train' cannot be used.*wren"),
        (
            lambda root: (root / "test" / "wren").rename(root / "test" / "owl"),
            r"only in one of them: \['owl', 'wren'\]",
        ),
    ],
)
def test_a_folder_that_is_no_data_set_is_refused(birds, spoil, message):
    spoil(birds)
    with pytest.raises(ValueError, match=message):
        data.load(Data(f"folder:{birds}"))


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "cifar100"])
def test_data_that_is_not_there_names_the_folder_and_the_remedy(name, tmp_path):
    with pytest.raises(ValueError, match=rf"'{name}' is not in data.root='{tmp_path}'.*--data.download true"):
        data.load(Data(name, root=str(tmp_path)))
