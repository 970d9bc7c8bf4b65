"""The old file or the new one, whatever happens to the process or to the disk."""

import os
import stat
import subprocess
import sys
import textwrap

import pytest
import torch

import mirrormask as mm
from mirrormask.files import atomic_write

#: Saves two models to the same path in turns, and is killed 100 times; forked, so that torch is imported once.
KILLER = """
import os, random, signal, sys, time
import torch, mirrormask as mm

path = sys.argv[1]
torch.set_num_threads(1)
models = [{"w": torch.full((400, 400), value), "kind": torch.tensor(index)} for index, value in enumerate((1.0, 2.0))]
mm.save(models[0], path)
rng = random.Random(0)
start = time.perf_counter()
for index in range(10):
    mm.save(models[index % 2], path)
span = (time.perf_counter() - start) / 10
seen, partial = [0, 0], 0
for trial in range(100):
    begun, begins = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(begins, b"!")
        while True:
            for model in models:
                mm.save(model, path)
    os.read(begun, 1)  # on a busy machine a fork takes longer than the first write
    time.sleep(rng.uniform(0, 3 * span))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(begun)
    os.close(begins)
    state = mm.load(path)
    kind = int(state["kind"])
    assert torch.equal(state["w"], models[kind]["w"]), trial
    seen[kind] += 1
    left = [name for name in os.listdir(os.path.dirname(path)) if name.endswith(".part")]
    partial += len(left)
    for name in left:
        os.unlink(os.path.join(os.path.dirname(path), name))
print(*seen, partial)
"""


def run(program, *arguments, **options):
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to kill processes cheaply")
@pytest.mark.early
def test_a_process_killed_at_100_random_moments_leaves_the_old_file_or_the_new_one(tmp_path):
    done = run(KILLER, tmp_path / "model.safetensors")
    assert done.returncode == 0, done.stderr
    first, second, partial = map(int, done.stdout.split())
    assert first + second == 100
    assert min(first, second) > 0, "both models must have been found, or the kills were not at random moments"
    assert partial > 0, "some kills must have come in the middle of a write"


FILLS_UP = """
import errno, os, resource, signal, sys
import torch, mirrormask as mm

path = sys.argv[1]
mm.save({"w": torch.ones(100)}, path)
if len(sys.argv) > 2:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
try:
    mm.save({"w": torch.ones(1000, 1000)}, path)
except OSError as error:
    assert error.errno in (errno.ENOSPC, errno.EFBIG), error
    assert "the old file is untouched" in str(error) and "writing 4,000," in str(error), error
else:
    raise SystemExit("the disk was not full")
assert torch.equal(mm.load(path)["w"], torch.ones(100))
assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]
print("untouched")
"""


def test_a_file_that_may_not_grow_is_an_error_with_the_old_file_untouched(tmp_path):
    done = run(FILLS_UP, tmp_path / "model.safetensors", "limit")
    assert done.stdout.strip() == "untouched", done.stderr


def test_a_full_disk_is_an_error_with_the_old_file_untouched(tmp_path):
    """A disk of one megabyte, mounted where only this process sees it."""
    inside = 'mount -t tmpfs -o size=1m none "$1" && exec "$2" -c "$3" "$1/model.safetensors"'
    probe = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", 'mount -t tmpfs none "$0"', str(tmp_path)]
    try:
        possible = subprocess.run(probe, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("no unshare(1) here, so no disk of one megabyte can be mounted")
    if possible.returncode:
        pytest.skip(f"this system lets no user mount a small disk: {possible.stderr.strip()}")
    arguments = ["sh", str(tmp_path), sys.executable, textwrap.dedent(FILLS_UP)]
    done = subprocess.run([*probe[:5], "-c", inside, *arguments], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "untouched", done.stderr


def test_an_error_before_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    mm.save({"w": torch.ones(3)}, path)
    with pytest.raises(TypeError):
        mm.save({"w": torch.ones(3), "x": torch.empty(3, device="meta")}, path)
    assert torch.equal(mm.load(path)["w"], torch.ones(3))
    assert os.listdir(tmp_path) == ["model.safetensors"]


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_link_stays_and_the_file_that_it_leads_to_is_written(tmp_path):
    (tmp_path / "large").mkdir()
    real, link, chain = tmp_path / "large" / "model", tmp_path / "model", tmp_path / "last"
    link.symlink_to(real)
    chain.symlink_to("model")
    for value, path in ((1.0, link), (2.0, chain)):  # the first time it leads to nothing yet
        mm.save({"w": torch.full((3,), value)}, path)
        assert link.is_symlink() and chain.is_symlink() and not real.is_symlink()
        assert float(mm.load(real)["w"][0]) == float(mm.load(chain)["w"][0]) == value
    assert sorted(os.listdir(tmp_path)) == ["large", "last", "model"] and os.listdir(tmp_path / "large") == ["model"]


def test_a_private_file_stays_private_and_a_new_one_follows_the_umask(tmp_path):
    path, seen = tmp_path / "model", []
    mm.save({"w": torch.ones(3)}, path)
    (tmp_path / "plain").touch()
    assert mode_of(path) == mode_of(tmp_path / "plain")
    path.chmod(0o600)
    with atomic_write(path) as file:  # while it is written too
        seen += [mode_of(part) for part in tmp_path.glob(".model.*")]
        file.write(b"secret")
    assert seen == [0o600] and mode_of(path) == 0o600
    path.chmod(0o664)
    mm.save({"w": torch.ones(3)}, path)
    assert mode_of(path) == 0o664


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_not_replaced(kind, tmp_path):
    path = tmp_path / "model"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/null")
    before = os.stat(path).st_mode
    with pytest.raises(OSError, match="directory" if kind == "folder" else "not an ordinary file"):
        mm.save({"w": torch.ones(3)}, path)
    assert os.stat(path).st_mode == before and os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("letter", ["n", "é", "漢"])
def test_a_name_as_long_as_a_file_may_have(letter, tmp_path):
    path = tmp_path / (letter * (255 // len(letter.encode())))
    for value in (1.0, 2.0):
        mm.save({"w": torch.full((3,), value)}, path)
    assert float(mm.load(path)["w"][0]) == 2.0 and os.listdir(tmp_path) == [path.name]
    with pytest.raises(OSError, match="too long"):
        mm.save({"w": torch.ones(3)}, tmp_path / (letter * 256))
