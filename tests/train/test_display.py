"""What a person sees: the live line, the plain lines, the tables and the figure."""

import dataclasses
import io
import json

import pytest
from rich.console import Console

from mirrormask.selection import LayerSparsity
from mirrormask.train import Method, Recipe, RunResult, figure
from mirrormask.train.progress import ProgressObserver
from mirrormask.train.table import print_tables


def record(event, epoch, **values):
    base = {"loss": 0.5, "train_accuracy": 0.9, "lr": 0.1, "alpha": 0.002, "decay_integral": 0.1 * epoch}
    base |= {"median_a": 0.01, "l1_norm": 3.0, "sparsity": 0.5, "below_threshold": 0.6, "sign_flips": 4}
    return {"event": event, "step": 10 * epoch, "epoch": epoch, "epoch_progress": float(epoch), **base, **values}


def result(method="mirror", accuracy=0.9, layers=2, asked=0.9, seconds=12.0):
    kept = 100 if not asked else 10
    parts = tuple(LayerSparsity(f"{i}.weight", (10, 10), 100, kept) for i in range(layers))
    return RunResult(
        folder="runs/x",
        method=method,
        seed=3,
        sparsity_asked=asked,
        nonzeros_asked=kept * layers,
        nonzeros=kept * layers,
        numel=100 * layers,
        test_accuracy=accuracy,
        validation_accuracy=None,
        unpruned_accuracy=accuracy,
        train_accuracy=0.95,
        train_loss=0.1,
        epochs=4,
        steps=40,
        seconds=seconds,
        skipped_steps=0,
        file_bytes=12_345,
        input_shape=(1, 8, 8),
        classes=10,
        layers=parts,
        recipe=dataclasses.asdict(Recipe()),
        environment={},
    )


def watch(terminal, epochs=4):
    text = io.StringIO()
    observer = ProgressObserver(Console(file=text, force_terminal=terminal, width=200, highlight=False))
    observer.started(Recipe(method=Method("mirror"), epochs=epochs), steps=10 * epochs, step=0)
    for epoch in range(1, epochs + 1):
        observer.stepped(10 * epoch)
        observer.logged(record("step", epoch))
        observer.logged(record("epoch", epoch, test_accuracy=0.8))
    live = observer.progress is not None
    observer.finished(result())
    assert observer.progress is None
    return text.getvalue(), live


def test_a_terminal_gets_a_live_line_that_names_everything():
    text, live = watch(True)
    assert live
    for part in (
        "mirror 95%",
        "images/s",
        "epoch 4",
        "loss 0.5000",
        "test 80.00%",
        "sparsity 50.00%",
        "alpha 2.00e-03",
    ):
        assert part in text


@pytest.mark.parametrize(("epochs", "lines"), [(4, 5), (100, 11)])
def test_elsewhere_about_ten_plain_lines_a_run(epochs, lines):
    text, live = watch(False, epochs)
    assert not live
    assert "\x1b" not in text
    assert len(text.splitlines()) == lines
    assert text.splitlines()[-2].startswith(f"mirror 95%: epoch {epochs}/{epochs} step {10 * epochs} ")
    assert text.splitlines()[-1] == "mirror 95%: test accuracy 90.00%, 20 of 200 weights, 12.0 s, in runs/x"


def test_the_table_has_a_row_a_run_and_the_difference_in_points():
    text = io.StringIO()
    runs = [result("dense", 0.92, asked=0.0), result("pilot", 0.91), result("mirror", 0.925)]
    print_tables(Console(file=text, width=160), runs, reused=True)
    rows = {line.split()[1]: line for line in text.getvalue().splitlines() if line.startswith("│")}
    assert "92.00%" in rows["dense"]
    assert "(reused)" in rows["dense"]
    assert "-1.00" in rows["pilot"]
    assert "+0.50" in rows["mirror"]
    assert "90.000%" in rows["mirror"]
    assert "12.3 kB" in rows["mirror"]
    assert rows["0.weight"].count("90.00%") == 2


@pytest.mark.parametrize(("method", "layers", "asked"), [("dense", 2, 0.0), ("gmp", 2, 0.9), ("mirror", 60, 0.9)])
@pytest.mark.cases(1)
def test_every_kind_of_run_can_be_drawn(tmp_path, method, layers, asked):
    decay = 0.0 if method == "gmp" else 0.1
    lines = [record("epoch", k, test_accuracy=0.8, decay_integral=decay * k, median_a=None) for k in range(1, 5)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figure.draw(tmp_path, result(method, layers=layers, asked=asked))
    first = (tmp_path / "figure.svg").read_text()
    figure.draw(tmp_path, result(method, layers=layers, asked=asked))
    assert (tmp_path / "figure.svg").read_text() == first  # the same run gives the same file
    assert (tmp_path / "figure.png").stat().st_size > 10_000
