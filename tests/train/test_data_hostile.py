"""Folders of images that nobody meant well."""

import contextlib
import os
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from mirrormask import cli
from mirrormask.train import Data, data, image_files


@pytest.fixture
def birds(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "birds"
    for part in ("train", "test"):
        for name in ("crow", "wren"):
            (root / part / name).mkdir(parents=True)
            Image.fromarray(np.full((6, 5, 3), 9, np.uint8)).save(root / part / name / "0.png")
    return root


def load(root, **options):
    return data.load(Data(f"folder:{root}", **options))


def png(path, width, height):
    """A PNG of zeros in a moment, however large."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = zlib.compress(b"\0" * 1000)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b""))


@pytest.mark.parametrize("size", [(8, 10_000_000), (13_000, 13_000), (100_000, 100_000), (2**31 - 1, 2**31 - 1)])
def test_a_huge_image_is_refused_by_name_before_it_is_decoded(birds, size):
    png(birds / "train" / "crow" / "huge.png", *size)
    start = time.process_time()
    with pytest.raises(ValueError, match=r"1 images cannot be read(?s:.*)huge\.png: "):
        load(birds)
    assert time.process_time() - start < 2


def test_one_that_would_be_huge_once_resized_is_refused(birds):
    png(birds / "train" / "crow" / "thin.png", 8, 1_000_000)
    with pytest.raises(ValueError, match=r"thin\.png: 8 x 1,000,000 resized to 224 x 28,000,000 is too large"):
        load(birds, size=224)


def test_more_images_than_memory_holds_are_refused(birds):
    with pytest.raises(ValueError, match=r"4 images of 1,000,000,000,000 pixels take .*; set a smaller data\.size"):
        load(birds, size=1_000_000)


def test_links_out_of_the_folder_to_nothing_and_back_are_refused_by_name(birds, tmp_path):
    (tmp_path / "secret.png").write_bytes((birds / "train" / "crow" / "0.png").read_bytes())
    crow = birds / "train" / "crow"
    (crow / "out.png").symlink_to(tmp_path / "secret.png")
    (crow / "nothing.png").symlink_to(tmp_path / "nowhere")
    (crow / "loop").symlink_to(crow)
    (crow / "up").symlink_to(birds)
    (birds / "train" / "owl").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="has links that are not followed") as caught:
        load(birds)
    text = str(caught.value)
    assert "out.png leads out of the folder" in text and "nothing.png leads to nothing" in text
    assert "loop leads back to where it lies" in text and "up leads back" in text and "owl leads back" in text
    assert len(text.splitlines()) == 6


def test_a_link_within_the_folder_is_followed_once(birds):
    crow = birds / "train" / "crow"
    (crow / "again.png").symlink_to("0.png")
    (crow / "more").mkdir()
    Image.fromarray(np.zeros((6, 5, 3), np.uint8)).save(crow / "more" / "1.png")
    assert len(load(birds).train) == 4
    (crow / "twice").symlink_to("more")
    with pytest.raises(ValueError, match="twice leads to a folder that was read already"):
        load(birds)


def test_names_that_a_terminal_would_act_on_are_escaped(birds, capsys):
    (birds / "train" / "crow" / "\x1b[2Jbad.png").write_bytes(b"x")
    out = str(birds.parent / "run")
    assert cli.main(["train", "--data", f"folder:{birds}", "--out", out, "--method", "dense"]) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said and "\\x1b[2Jbad.png" in said
    for part in ("train", "test"):
        (birds / part / "\x1b]0;owned").mkdir()
    with pytest.raises(ValueError, match=r"classes whose names are no plain text: .*owned"):
        load(birds)


def test_names_that_are_no_text_are_read_or_refused_by_name(birds):
    source = os.fsencode(birds / "train" / "crow")
    os.rename(source + b"/0.png", source + b"/\xff.png")
    assert len(load(birds).train) == 2
    (birds / "train" / "crow" / "bad.png").write_bytes(b"x")
    os.mkdir(os.fsencode(birds / "train") + b"/\xfe")
    with pytest.raises(ValueError, match=r"no plain text: .*udcfe") as caught:
        load(birds)
    str(caught.value).encode("utf-8")


def test_any_bytes_are_no_image(tmp_path):
    draw = np.random.default_rng(0)
    Image.fromarray(np.zeros((6, 5, 3), np.uint8)).save(tmp_path / "good.png")
    good = (tmp_path / "good.png").read_bytes()
    for number in range(300):
        raw = bytearray(good)
        raw[draw.integers(len(raw))] ^= 1 << draw.integers(8)
        (tmp_path / "x.png").write_bytes(raw if number % 2 else raw[: draw.integers(len(raw))])
        with contextlib.suppress(image_files.ImageError):
            assert image_files.decode(str(tmp_path / "x.png"), 4).shape == (4, 4, 3)
