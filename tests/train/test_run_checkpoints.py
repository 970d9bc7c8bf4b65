"""Checkpoints of runs: every bit of them counts, what is damaged is named, and a run goes on from the one before."""

import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mirrormask import cli, files
from mirrormask.compare.runner import processes
from mirrormask.train import (
    Data,
    Method,
    Model,
    Observer,
    Optimizer,
    Recipe,
    RunFolder,
    Stopped,
    data,
    log,
    recipe_file,
    run,
)
from mirrormask.train.checkpoint import CheckpointError, Checkpoints
from mirrormask.train.checkpoint_file import DamagedError, read, write
from mirrormask.train.progress import ProgressObserver
from mirrormask.train.reference import dense_folder
from mirrormask.train.tree import TreeError, flatten, restore


def small(out, **changes):
    changes = {"epochs": 2, "log_every": 10, "threads": 1, "figure": False, "checkpoint_every": "20steps", **changes}
    changes = {"data": Data(crop=1, flip=True), "method": Method("pilot"), **changes}
    return Recipe(model=Model("mlp", {"hidden": [16]}), out=str(out), **changes)


class Call(Observer):
    """Calls something after a step; gathers what is said to be wrong."""

    def __init__(self, step=-1, action=None):
        self.step, self.action, self.warnings = step, action, []

    def stepped(self, step):
        if step == self.step:
            self.action()

    def warned(self, text):
        self.warnings.append(text)


def fail():
    raise RuntimeError("as a crash would")


def interrupted(folder, step=75, **changes):
    with pytest.raises(RuntimeError):
        run(small(folder, **changes), observer=Call(step, fail))
    return folder


def traces(folder):
    records = [{k: v for k, v in record.items() if k != "seconds"} for record in log.read(folder)]
    return records, *((folder / name).read_bytes() for name in ("model.safetensors", "predictions.json"))


def names(folder):
    return sorted(entry.name for entry in (folder / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(small(folder))
    return traces(folder)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return interrupted(tmp_path_factory.mktemp("parts") / "run")


@pytest.fixture
def folder(parts, tmp_path):
    shutil.copytree(parts, tmp_path / "run")
    return tmp_path / "run"


# -- what a recipe only names ------------------------------------------------------------------------------------------


def test_a_run_does_not_go_on_with_other_images(folder):
    splits = data.load(Data(crop=1, flip=True))
    y = splits.train.y.clone()
    y[7] += 1 if y[7] < 9 else -1
    other = dataclasses.replace(splits, train=dataclasses.replace(splits.train, y=y))
    with pytest.raises(CheckpointError, match="labels are not those that the run was begun with; put them back"):
        run(small(folder), resume=True, splits=other)


def test_a_run_that_goes_on_with_other_software_says_so(folder, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "9.9")
    observer = Call()
    run(small(folder), resume=True, observer=observer)
    (said,) = observer.warnings
    assert "(here 9.9): what follows need not be the uninterrupted run to the last bit" in said
    assert [r["what"] for r in log.read(folder) if r["event"] == "environment"] == [said]


# -- the tree and the file ---------------------------------------------------------------------------------------------

DTYPES = st.sampled_from([torch.bool, torch.int64, torch.bfloat16, torch.float64])
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.builds(lambda n, dtype: torch.arange(n).to(dtype), st.integers(0, 3), DTYPES),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(-2, 9), inner, max_size=3)
    ),
    max_leaves=10,
)


def equal(a, b):
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b and str(a) == str(b)  # -0.0 is not 0.0


@settings(max_examples=150, deadline=None)
@given(TREES)
def test_any_tree_comes_back_as_it_was(tmp_path_factory, tree):
    path = tmp_path_factory.getbasetemp() / "tree.safetensors"
    write(path, "f", tree)
    assert equal(read(path, "f"), tree)


def test_numbers_that_json_lacks_and_shared_tensors_come_back():
    shared = torch.ones(2)
    json_tree, tensors = flatten([float("nan"), float("inf"), -0.0, shared, shared])
    assert len(tensors) == 1
    assert str(restore(json.loads(json.dumps(json_tree)), tensors)[:3]) == "[nan, inf, -0.0]"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [object()]}, r"state\['a'\]\[0\] is a object, which no checkpoint holds"),
        ({1.5: 0}, "state has the key 1.5, a float"),
        ({"a": torch.zeros(2).to_sparse()}, r"state\['a'\] is a torch.Tensor of layout torch.sparse"),
        ([torch.empty(2, device="meta")], "on the meta device"),
        ({"a": torch.float32}, "is a torch.dtype"),
        ({"a": {1, 2}}, "is a set"),
    ],
)
def test_what_cannot_be_written_is_refused_by_name_and_place(value, message, tmp_path):
    with pytest.raises(TreeError, match=message):
        write(tmp_path / "x", "f", value)
    assert not list(tmp_path.iterdir())


def test_every_flipped_bit_and_every_truncation_is_noticed(tmp_path):
    path = tmp_path / "x"
    write(path, "f", {"step": 3, "w": torch.arange(3.0), "last": {"loss": 0.5}})
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 3):
        raw = bytearray(whole)
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        with pytest.raises(CheckpointError):
            read(path, "f")
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedError):
            read(path, "f")
    path.write_bytes(whole + b"\0")
    with pytest.raises(DamagedError):
        read(path, "f")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_damaged_checkpoint(tmp_path_factory, raw):
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="is damaged"):
        read(path, "f")


# -- what a run does with them -----------------------------------------------------------------------------------------


def test_the_last_two_and_the_best_are_kept(folder, whole):
    assert names(folder) == ["best.safetensors", "step-000000045.safetensors", "step-000000060.safetensors"]
    run(small(folder), resume=True)
    assert traces(folder) == whole
    assert names(folder) == ["best.safetensors", "step-000000080.safetensors", "step-000000090.safetensors"]


@pytest.mark.parametrize("kind", ["flipped", "truncated", "emptied", "foreign"])
def test_a_damaged_one_is_named_set_aside_and_the_one_before_taken(folder, whole, kind):
    path = folder / "checkpoints" / "step-000000060.safetensors"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes({"flipped": raw, "truncated": raw[:999], "emptied": b"", "foreign": b"PK\x03\x04"}[kind])
    told = Call()
    run(small(folder), resume=True, observer=told)
    assert traces(folder) == whole
    assert "step-000000060.safetensors' is damaged" in told.warnings[0]
    assert "goes on from 'step-000000045.safetensors'" in told.warnings[0]
    assert "step-000000060.safetensors.damaged" in names(folder)


def test_where_both_are_damaged_the_best_is_taken(folder, whole):
    best = folder / "checkpoints" / "best.safetensors"
    raw = best.read_bytes()
    best.unlink()  # it is the file of step 45 under another name
    best.write_bytes(raw)
    for path in (folder / "checkpoints").glob("step-*"):
        path.write_bytes(b"")
    run(small(folder), resume=True, observer=Call())
    assert traces(folder) == whole


def test_a_run_without_any_checkpoint_yet_begins_again(tmp_path, whole):
    interrupted(tmp_path / "run", step=15)
    run(small(tmp_path / "run"), resume=True)
    assert traces(tmp_path / "run") == whole


def test_the_pickle_of_the_first_version_is_refused_with_the_remedy(folder):
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoint.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"checkpoint.pt' was written by mirrormask 0.1, .*to start again"):
        run(small(folder), resume=True)


def forge(folder, change):
    """The newest checkpoint with other values under right checksums."""
    recipe = small(folder)
    path = next(iter(Checkpoints(folder, recipe)))
    state = read(path, recipe.fingerprint())
    state = change(state) or state
    write(path, recipe.fingerprint(), state)


def put(*keys, value):
    def change(state):
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return change


def without(*keys):
    def change(state):
        for key in keys[:-1]:
            state = state[key]
        del state[keys[-1]]

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda state: [1],
        lambda state: "x",
        put("session", "epoch", value=-1),
        put("session", "epoch", value=5),
        put("session", "epoch", value=True),
        put("session", "epoch", value=1.0),
        put("session", "step", value=-3),
        put("session", "step", value=10**400),
        put("session", "step", value=91),
        put("session", "step", value="60"),
        put("session", value=None),
        put("session", "model", value={}),
        put("session", "model", "1.weight", value=torch.zeros(2, 2)),
        put("session", "model", "1.weight", value=torch.zeros(16, 64, dtype=torch.float64)),
        put("session", "model", "1.weight", value=3),
        put("session", "model", "1.bias", value=torch.full((16,), float("nan"))),
        put("session", "optimizer", "state", 0, "m.momentum_buffer", value=torch.full((16, 64), float("nan"))),
        put("session", "optimizer", value=[]),
        put("session", "optimizer", "state", 0, value={}),
        put("session", "optimizer", "param_groups", 0, "mirrormask", value="{" * 5000),
        put("session", "scheduler", value=7),
        put("processes", value=[]),
        put("processes", 0, "order", value=torch.zeros(3, dtype=torch.uint8)),
        put("processes", 0, "random", "torch", value=torch.zeros(5)),
        put("processes", 0, "random", "python", value=[1]),
        put("processes", 0, "random", "numpy", value={}),
        put("processes", 0, "window", value=torch.zeros(7)),
        put("log", value=[-1, ""]),
        put("log", value=None),
        put("seconds", value=float("nan")),
        put("last", value={"loss": "x"}),
        put("last", value={}),
        put("best", value=2.0),
        put("health", value={"row": -1, "first": "", "named": False}),
        without("health"),
        without("session", "step"),
        without("processes", 0, "random"),
    ],
)
def test_whatever_is_in_a_checkpoint_one_error_says_what_to_do(folder, change):
    forge(folder, change)
    with pytest.raises(CheckpointError, match=r"step-000000060.safetensors' does not fit this run .*to start again"):
        run(small(folder), resume=True)


def test_a_log_that_is_not_the_runs_own_is_refused(folder):
    path = folder / "log.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"step": 10', b'"step": 11', 1))
    with pytest.raises(ValueError, match=r"log.jsonl' is not what this run had written"):
        run(small(folder), resume=True)


def test_what_a_killed_writer_left_goes_when_the_folder_is_opened_next(folder):
    left = [folder / ".figure.png.abc.part", folder / "checkpoints" / ".step-000000080.safetensors.x_1.part"]
    mine = [folder / ".mine.part", folder / ".bench.json.abc.part", folder / "notes.part"]
    for path in (*left, *mine):
        path.write_bytes(b"x")
    run(small(folder), resume=True)
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in mine)


# -- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_finishes_the_step_saves_and_the_run_goes_on(tmp_path, whole, name):
    before = signal.getsignal(getattr(signal, name))
    with pytest.raises(Stopped, match=f"stopped by {name} at step 33 of 90, saved"):
        run(small(tmp_path / "run"), observer=Call(33, lambda: signal.raise_signal(getattr(signal, name))))
    assert signal.getsignal(getattr(signal, name)) is before
    assert "step-000000033.safetensors" in names(tmp_path / "run")
    run(small(tmp_path / "run"), resume=True)
    assert traces(tmp_path / "run") == whole


def test_a_second_interrupt_does_not_wait(tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(small(tmp_path / "run"), observer=Call(3, twice))


def test_the_command_ends_with_75_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def stepped(self, step):
        if step == 33:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(ProgressObserver, "stepped", stepped)
    options = ["train", "--out", str(tmp_path / "run"), "--epochs", "2", "--threads", "1", "--figure", "false"]
    assert cli.main(options) == 75
    said = capsys.readouterr().err
    assert said == "mirrormask train: stopped by SIGTERM at step 33 of 90, saved; go on with --resume true\n"
    assert not list(tmp_path.rglob("result.json"))
    monkeypatch.undo()
    assert cli.main([*options, "--resume", "true"]) == 0
    assert (tmp_path / "run" / "mirror" / "result.json").exists()


def test_a_signal_at_the_end_of_one_run_does_not_let_the_next_begin(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ProgressObserver, "finished", lambda *_: signal.raise_signal(signal.SIGTERM))
    options = ["--epochs", "1", "--threads", "1", "--figure", "false", "--out", str(tmp_path / "run")]
    assert cli.main(["train", "--method", "dense,gmp", *options]) == 75
    assert [path.parent.name for path in tmp_path.rglob("result.json")] == ["dense"]


# -- disks -----------------------------------------------------------------------------------------------------------


def forked(work, *arguments):
    """A process that runs ``work(*arguments)``, forked from one that has computed nothing.

    Not from this one: once a test has run backward in a thread, torch refuses to train in its forks.
    """
    process = processes().Process(target=work, args=arguments)
    process.start()
    return process


def limited(folder, size):
    """Run with a limit on the size of files, in a process of its own; what it raised."""
    ours, theirs = processes().Pipe()
    process = forked(under_limit, theirs, folder, size)
    theirs.close()
    said = ours.recv()
    process.join()
    return said


def under_limit(connection, folder, size):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    said = "finished"
    try:
        run(small(folder), resume=True)
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    connection.send(said)


def test_a_full_disk_gives_one_message_with_path_and_bytes_and_the_run_goes_on(folder, whole):
    before = {path: path.read_bytes() for path in (folder / "checkpoints").iterdir()}
    said = limited(folder, max(map(len, before.values())) - 100)
    assert said.startswith("OSError: [Errno 27] File too large: writing ")
    assert " bytes, " in said and " free; " in said
    assert "step-000000080.safetensors'" in said and "go on with --resume true" in said
    assert "the last good checkpoint is" in said and "step-000000060.safetensors" in said
    assert {path: path.read_bytes() for path in before} == before
    run(small(folder), resume=True)
    assert traces(folder) == whole


WRITTEN = ("recipe.yaml", "model.safetensors", "distributions.json", "predictions.json", "figure.png", "figure.svg",
           "result.json")  # fmt: skip


def command_on_full_disk(folder, name, said):
    """``mirrormask train`` whose disk has no room for the file of this name, in a fork; its exit status."""
    child = os.fork()
    if not child:
        own = files._opened_beside

        def opened_beside(path, permissions):
            if path.name == name:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))
            return own(path, permissions)

        files._opened_beside = opened_beside
        status = 70
        try:
            os.dup2(os.open(said, os.O_RDWR | os.O_CREAT | os.O_APPEND), 2)
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115 - pytest has another one
            status = cli.main(["train", str(folder.parent / "r.yaml"), "--resume", "true"])
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.early
def test_every_file_that_a_run_writes_may_find_no_room(folder, tmp_path):
    last = small(folder.parent / "out", figure=True)
    run(dataclasses.replace(last, out=str(tmp_path / "whole")))
    (folder.parent / "r.yaml").write_text(recipe_file.dump(last))
    target = folder.parent / "out" / "pilot"
    shutil.copytree(folder, target)
    dense = dense_folder(dataclasses.replace(last, out=str(target)), folder.parent)
    run(last.dense(str(dense.path)))
    for name in WRITTEN:
        reader, writer = os.pipe()
        status = command_on_full_disk(folder, name, f"/dev/fd/{writer}")
        os.close(writer)
        with open(reader, encoding="utf-8") as file:
            text = " ".join(file.read().split())
        assert status == 2, (name, text)
        assert "Traceback" not in text and text.count("error:") == 1, (name, text)
        assert f"/{name}'" in text and " bytes" in text and " free" in text, (name, text)
        assert not (target / "result.json").exists()
    run(dataclasses.replace(last, out=str(target)), resume=True)
    assert traces(target) == traces(tmp_path / "whole")


def test_a_log_that_may_not_grow_is_named(folder, whole):
    said = limited(folder, (folder / "log.jsonl").stat().st_size + 10)
    assert "File too large: appending" in said and ("log.jsonl" in said or "tfevents" in said)
    run(small(folder), resume=True)
    assert traces(folder) == whole


def test_a_folder_that_is_deleted_beneath_the_run_is_named(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match=rf"the run's folder is gone.*{folder}"):
        run(small(folder), observer=Call(33, lambda: shutil.rmtree(folder)))
    assert not folder.exists()


# -- numbers ---------------------------------------------------------------------------------------------------------


def test_steps_in_a_row_without_a_finite_gradient_stop_the_run_by_name(tmp_path):
    told = Call()
    recipe = small(tmp_path / "run", method=Method("gmp"), optimizer=Optimizer(lr=1e25, momentum=0.0), stop_after=7)
    with pytest.raises(FloatingPointError, match=r"7 steps in a row .*is not finite in '.*first at step \d+"):
        run(recipe, observer=told)
    assert len(told.warnings) == 1 and "not finite in '1.weight'" in told.warnings[0]
    faults = [record for record in log.read(tmp_path / "run") if record["event"] == "fault"]
    assert len(faults) == 1 and "not finite in '1.weight'" in faults[0]["what"]


def test_a_network_whose_layer_died_stops_the_run_unless_asked_not_to(tmp_path, monkeypatch):
    from mirrormask.train.session import Session

    original = Session.evaluate

    def killing(self, *arguments):
        with torch.no_grad():
            self.model[3].weight.zero_()
        return original(self, *arguments)

    monkeypatch.setattr(Session, "evaluate", killing)
    recipe = small(tmp_path / "run", method=Method("gmp"), sparsity=0.5)
    with pytest.raises(FloatingPointError, match=r"the network is dead: all weights of '3\.weight' are zero"):
        run(recipe)


def test_deterministic_runs_give_the_same_bits_twice_and_leave_torch_as_it_was(tmp_path):
    for name in "ab":
        run(small(tmp_path / name, deterministic=True))
    assert traces(tmp_path / "a") == traces(tmp_path / "b")
    assert not torch.are_deterministic_algorithms_enabled()
    assert small("x").fingerprint() != small("x", deterministic=True).fingerprint()


# -- the command of faults -------------------------------------------------------------------------------------------


@pytest.mark.early
def test_killed_damaged_and_starved_runs_are_the_uninterrupted_one(tmp_path):
    script = Path(__file__).parents[1] / "faults" / "faults.py"
    options = ["--kills", "12", "--damages", "4", "--limits", "3", "--seed", str(random.randrange(10**6))]
    done = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "19 of 19 runs are the uninterrupted one, bit for bit" in done.stdout
    assert not RunFolder(tmp_path).finished


def test_a_signal_is_heeded_while_another_process_is_waited_for(tmp_path):
    recipe = small(tmp_path / "run")
    with (
        RunFolder(tmp_path / "run").locked(),
        pytest.raises(Stopped, match="by SIGTERM while another process trains"),
    ):
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        run(recipe, wait=True)
