"""Whole runs on the digits: what they leave behind, and that an interruption changes nothing."""

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import mirrormask as mm
from mirrormask.train import (
    Data,
    Method,
    Model,
    Observer,
    Optimizer,
    Recipe,
    RunFolder,
    RunResult,
    Schedule,
    data,
    dense_run,
    load,
    load_model,
    log,
    recipe_file,
    run,
)
from mirrormask.train.session import Session


def small(out, method="mirror", **changes):
    changes = {"epochs": 4, "log_every": 20, "threads": 1, "figure": False, **changes}
    return Recipe(
        model=changes.pop("model", Model("mlp", {"hidden": [32]})), method=Method(method), out=str(out), **changes
    )


class Stop(Exception):
    pass


class StopAt(Observer):
    """Ends a run as a crash would: after a step or a record of the log, without warning."""

    def __init__(self, step):
        self.step = step

    def stepped(self, step):
        if step == self.step:
            raise Stop

    def logged(self, record):
        if record["event"] == self.step:
            raise Stop


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One finished run, for the tests that only look."""
    return run(small(tmp_path_factory.mktemp("done") / "run", figure=True))


def timeless(folder):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in log.read(folder)]


def test_a_run_leaves_everything_behind_and_hits_its_target_exactly(done):
    result, folder = done, Path(done.folder)
    assert {entry.name for entry in folder.iterdir()} == {*RunFolder.NAMES, ".lock"} - {"bench.json", "checkpoint.pt"}
    assert result.numel == 64 * 32 + 32 * 10
    assert result.nonzeros == result.nonzeros_asked == round(0.05 * result.numel)
    assert result.test_accuracy > 0.6
    assert result.steps == 4 * (1442 // 32)
    assert RunResult.read(folder) == result
    assert (folder / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert "</svg>" in (folder / "figure.svg").read_text()


def test_the_saved_model_is_the_one_that_was_measured(done):
    splits = data.load(Data())
    model = load_model(done.folder)
    assert mm.sparsity(model).nonzeros == done.nonzeros
    mean, std = splits.statistics()
    assert not any((p.signbit() & (p == 0)).any() for p in model.parameters())  # a file would have to store -0.0
    assert done.file_bytes == (Path(done.folder) / "model.safetensors").stat().st_size < 4 * done.numel / 2
    hits = model((splits.test.x - mean) / std).argmax(1) == splits.test.y
    assert hits.double().mean().item() == pytest.approx(done.test_accuracy, abs=1e-9)


def test_the_log_has_a_line_every_n_steps_and_every_epoch_and_one_at_the_end(done):
    records = log.read(done.folder)
    assert [r["step"] for r in records if r["event"] == "step"] == list(range(20, 181, 20))
    assert [(r["epoch"], r["step"]) for r in records if r["event"] == "epoch"] == [(k, 45 * k) for k in (1, 2, 3, 4)]
    assert [r["event"] for r in records][-1] == "final"
    keys = {"loss", "train_accuracy", "lr", "alpha", "decay_integral", "median_a", "l1_norm", "sparsity"}
    keys |= {"below_threshold", "sign_flips", "seconds"}
    assert all(keys <= set(r) for r in records)
    assert records[-1]["sparsity"] == pytest.approx(0.95, abs=1e-3)
    integrals = [r["decay_integral"] for r in records]
    assert integrals == sorted(integrals)
    # mirror's limit, in its window of steps, as far as the weights had outgrown their start
    assert 0.5 * (135 - 9) * 0.004 / 4 < integrals[-1] <= (135 - 9) * 0.004 / 4 * (1 + 1e-6)


def test_tensorboard_holds_the_same_scalars(done):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path(done.folder) / "tensorboard"))
    events.Reload()
    expected = [r["test_accuracy"] for r in log.read(done.folder) if r["event"] == "epoch"]
    assert [e.value for e in events.Scalars("epoch/test_accuracy")] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("method", "step", "changes"),
    [
        ("mirror", 90, {}),  # just before the checkpoint of epoch 2
        ("mirror", 107, {"precision": "fp16"}),
        ("mirror", "final", {}),  # all epochs are there, the result is not
        ("pilot", 107, {"optimizer": Optimizer("adamw"), "data": Data(crop=1, flip=True)}),
        ("gmp", 107, {"optimizer": Optimizer(nesterov=True, weight_decay=1e-3), "schedule": Schedule("linear", 0.3)}),
        ("dense", 20, {"data": Data(validation=100)}),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, method, step, changes):
    whole = run(small(tmp_path / "whole", method, **changes))
    with pytest.raises(Stop):
        run(small(tmp_path / "parts", method, **changes), observer=StopAt(step))
    assert not RunFolder(tmp_path / "parts").finished
    parts = run(small(tmp_path / "parts", method, **changes), resume=True)
    a, b = (mm.load(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "parts")
    assert whole.test_accuracy == parts.test_accuracy


@pytest.mark.parametrize("method", sorted(set(mm.methods.names()) - {"dense"}))
def test_every_method_trains_to_its_target(tmp_path, method):
    result = run(small(tmp_path / "run", method, sparsity=0.8, epochs=3))
    assert result.nonzeros == result.nonzeros_asked == round(0.2 * result.numel)
    assert not list((tmp_path / "run").glob("figure.*"))  # this recipe asks for none


def test_the_rates_of_a_round_are_played_again(tmp_path):
    run(small(tmp_path / "run", "lrr", sparsity=0.8, log_every=1))
    rates = [r["lr"] for r in log.read(tmp_path / "run") if r["event"] == "step"]
    assert rates.count(max(rates)) > 1
    assert sum(b > 5 * a for a, b in pairwise(rates)) >= 1  # from a round's end to the next


def test_the_resolved_recipe_reproduces_the_run(tmp_path):
    run(small(tmp_path / "a"))
    run(load(tmp_path / "a" / "recipe.yaml", {"out": str(tmp_path / "b")}))
    a, b = (mm.load(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_seed_changes_the_run(tmp_path):
    run(small(tmp_path / "a", epochs=1))
    run(small(tmp_path / "b", epochs=1, seed=1))
    a, b = (mm.load(tmp_path / name / "model.safetensors") for name in "ab")
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_random_state_and_threads_alone(tmp_path):
    state = torch.get_rng_state()
    torch.set_num_threads(2)
    run(small(tmp_path / "run", epochs=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == 2


def test_with_a_validation_split_the_test_images_are_looked_at_once(tmp_path):
    result = run(small(tmp_path / "run", data=Data(validation=200)))
    epochs = [r for r in log.read(tmp_path / "run") if r["event"] == "epoch"]
    assert all("validation_accuracy" in r and "test_accuracy" not in r for r in epochs)
    assert result.validation_accuracy is not None
    assert result.unpruned_accuracy == epochs[-1]["validation_accuracy"]
    assert log.read(tmp_path / "run")[-1]["test_accuracy"] == result.test_accuracy


def test_batch_norm_is_estimated_anew_on_the_pruned_and_on_the_dense_network(tmp_path, monkeypatch):
    """Fine-tuned for 15 steps, a dense network lost 30 points to its sparse self by its running averages alone."""
    seen = []
    monkeypatch.setattr(mm, "recalibrate", lambda model, batches: seen.append(sum(len(x) for x in batches)))
    recipe = small(
        tmp_path / "a", model=Model("resnet20", {"width": 4, "stem_stride": 2}), epochs=1, batch_size=128, sparsity=0.5
    )
    run(recipe)
    run(dataclasses.replace(recipe, method=Method("dense"), sparsity=0.0, out=str(tmp_path / "b")))
    assert seen == [1442 // 128 * 128] * 2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_does_not_reach_the_next_run(tmp_path, precision):
    assert run(small(tmp_path / "run", precision=precision)).test_accuracy > 0.6
    dtypes = set()
    hook = torch.nn.modules.module.register_module_forward_hook(lambda _, __, out: dtypes.add(out.dtype))
    try:
        run(small(tmp_path / "next", epochs=1))
    finally:
        hook.remove()
    assert dtypes == {torch.float32}


# -- folders -----------------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_run_again_on_resume(tmp_path):
    first = run(small(tmp_path / "run", epochs=1))
    assert run(small(tmp_path / "run", epochs=1), resume=True, observer=StopAt(1)) == first


def test_a_folder_with_another_run_is_refused_by_name_and_nothing_in_it_changes(tmp_path):
    run(small(tmp_path / "run", epochs=1))
    before = {entry: entry.stat().st_mtime_ns for entry in (tmp_path / "run").iterdir()}
    for resume in (False, True):
        with pytest.raises(
            ValueError, match=r"run' already holds a finished run of method 'mirror'.*seed: 0 there, 3 now"
        ):
            run(small(tmp_path / "run", epochs=1, seed=3), resume=resume)
    with pytest.raises(ValueError, match=r"of this recipe; go on with --resume true, or pass --overwrite true"):
        run(small(tmp_path / "run", epochs=1))
    assert {entry: entry.stat().st_mtime_ns for entry in (tmp_path / "run").iterdir()} == before


def test_overwrite_removes_the_run_and_nothing_else(tmp_path):
    run(small(tmp_path / "run", epochs=1))
    (tmp_path / "run" / "notes.txt").write_text("mine")
    result = run(small(tmp_path / "run", epochs=2, seed=3), overwrite=True)
    assert (result.seed, RunResult.read(tmp_path / "run").epochs) == (3, 2)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert [r["epoch"] for r in log.read(tmp_path / "run") if r["event"] == "epoch"] == [1, 2]


def test_a_recipe_that_does_not_fit_leaves_the_old_run_as_it_was(tmp_path):
    first = run(small(tmp_path / "run", epochs=1))
    with pytest.raises(TypeError, match=r"method 'mirror' does not take the option 'K'; its options: shrink"):
        run(dataclasses.replace(small(tmp_path / "run"), method=Method("mirror", {"K": 1})), overwrite=True)
    assert RunResult.read(tmp_path / "run") == first


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": Method("pruner")}, ValueError, "unknown method 'pruner'.*Known: .*mirror"),
        ({"model": Model("mlpp")}, ValueError, "unknown model 'mlpp'"),
        ({"batch_size": 2000}, ValueError, "batch_size=2000 is larger than the 1442 training images"),
        ({"optimizer": Optimizer(options={"speed": 3})}, TypeError, "optimizer.options=.* do not fit 'sgd'"),
        ({"data": Data("folder:/no/such")}, ValueError, "'/no/such' does not exist"),
    ],
)
def test_what_does_not_fit_writes_nothing(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        run(dataclasses.replace(small(tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()


def test_resume_and_overwrite_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="exclude each other"):
        run(small(tmp_path / "run"), resume=True, overwrite=True)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="run' is a file"):
        run(small(tmp_path / "run"))


def test_files_of_a_run_without_a_recipe_are_not_touched(tmp_path):
    (tmp_path / "log.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"holds files of a run but no recipe\.yaml"):
        run(small(tmp_path))
    assert (tmp_path / "log.jsonl").read_text() == "{}\n"


def test_two_runs_cannot_share_a_folder(tmp_path):
    with RunFolder(tmp_path / "run").locked(), pytest.raises(ValueError, match="another process is training in"):
        run(small(tmp_path / "run"))


def test_a_damaged_checkpoint_is_named(tmp_path):
    with pytest.raises(Stop):
        run(small(tmp_path / "run"), observer=StopAt(60))
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"to start again:\n.*step-000000045.*' is damaged: "):
        run(small(tmp_path / "run"), resume=True)


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        with pytest.raises(Stop):
            run(small(tmp_path / name, seed=seed), observer=StopAt(60))
    name = "step-000000045.safetensors"
    (tmp_path / "a" / "checkpoints" / name).replace(tmp_path / "b" / "checkpoints" / name)
    with pytest.raises(ValueError, match="belongs to another recipe"):
        run(small(tmp_path / "b", seed=1), resume=True)


def test_a_damaged_result_is_named(tmp_path):
    (tmp_path / "result.json").write_text('{"folder": 1}')
    with pytest.raises(ValueError, match=r"result.json' is damaged.*--resume true"):
        RunResult.read(tmp_path)
    with pytest.raises(ValueError, match="holds no finished run"):
        RunResult.read(tmp_path / "nowhere")


def test_a_run_that_diverges_says_so_and_is_not_finished(tmp_path):
    with pytest.raises(FloatingPointError, match=r"'weight' of '1.weight' has reached .*; lower optimizer.lr"):
        run(small(tmp_path / "run", "gmp", optimizer=Optimizer(lr=1e30, momentum=0.0)))
    assert not RunFolder(tmp_path / "run").finished


def test_the_dense_run_is_trained_once_per_recipe_and_seed(tmp_path):
    recipe = small(tmp_path / "x" / "mirror", epochs=1)
    first = dense_run(recipe, tmp_path)
    again = dense_run(small(tmp_path / "y", "pilot", sparsity=0.5, epochs=1), tmp_path, observer=StopAt(1))
    assert again == first
    assert (first.method, first.nonzeros, first.sparsity_asked) == ("dense", first.numel, 0.0)
    assert dense_run(dataclasses.replace(recipe, seed=1), tmp_path).folder != first.folder
    assert len(list((tmp_path / ".dense").glob("*/result.json"))) == 2


def test_json_stays_json_when_a_scalar_is_not_finite(tmp_path):
    writer = log.Log(tmp_path)
    writer.write({"event": "step", "step": 1, "loss": float("nan")})
    writer.close()
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"event": "step", "step": 1, "loss": None}


def test_a_log_line_that_a_crash_cut_off_is_passed_over(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"event": "step", "step": 1}\n{"event": "st')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert log.read(tmp_path) == [{"event": "step", "step": 1}]


@pytest.mark.parametrize("damage", ["\0", "\ufeff", '{"event": "st\n', "x" * 2**21])
def test_what_a_damaged_line_hides_of_a_log_is_said(tmp_path, damage):
    (tmp_path / "log.jsonl").write_text('{"event": "step", "step": 1}\n' + damage + '{"event": "step", "step": 2}\n')
    with pytest.warns(UserWarning, match=r"log\.jsonl: line 2 is damaged, and what comes after it is not read"):
        assert log.read(tmp_path) == [{"event": "step", "step": 1}]


def test_a_session_in_one_process_sees_all_test_images(tmp_path):
    session = Session(small(tmp_path))
    assert sum(len(y) for _, y in session.test.in_order()) == 355


@pytest.mark.long
def test_two_processes_give_the_run_of_one(tmp_path):
    recipe = small(tmp_path / "one", epochs=2)
    one = run(recipe)
    (tmp_path / "r.yaml").write_text(recipe_file.dump(dataclasses.replace(recipe, out=str(tmp_path / "two"))))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, "-m", "mirrormask.cli", "train", str(tmp_path / "r.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    two = RunResult.read(tmp_path / "two" / "mirror")
    assert two.nonzeros == one.nonzeros
    assert two.test_accuracy == pytest.approx(one.test_accuracy, abs=0.02)
    first = [
        next(r for r in log.read(f) if r["event"] == "step") for f in (tmp_path / "one", tmp_path / "two" / "mirror")
    ]
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-4)


def test_label_smoothing_is_in_the_loss_that_is_learned_from_and_not_in_that_of_the_test(tmp_path):
    sharp, smooth = (Session(small(tmp_path / "r", label_smoothing=e)) for e in (0.0, 0.3))
    x, y = next(iter(sharp.test.in_order()))
    scores = sharp.model(x)
    log_p = scores.log_softmax(1)
    by_hand = -(0.7 * log_p[torch.arange(len(y)), y] + 0.3 * log_p.mean(1)).mean()
    torch.testing.assert_close(smooth._loss(scores, x, y), by_hand)
    assert smooth.evaluate(smooth.test) == sharp.evaluate(sharp.test)
