"""The command line: what it prints, how fast it starts, and that mistakes become one message."""

import contextlib
import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys

import jsonargparse
import pytest
import torch

import mirrormask
from mirrormask import cli
from mirrormask.train import RunResult

FAST = ["--epochs", "2", "--model.options", '{"hidden": [16]}', "--threads", "1", "--figure", "false"]


def errors(capsys, *arguments):
    assert cli.main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in err + out
    return err


def test_help_lists_the_commands_and_does_not_import_torch():
    code = "import sys; from mirrormask.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for name in ("train", "compare", "flow", "export", "info"):
        assert f"\n  {name} " in out


def test_help_on_every_command_waits_for_nothing_heavy():
    """Seconds cannot be asserted on a busy machine; what costs them is this."""
    code = (
        "import sys\nfrom mirrormask.cli import COMMANDS, main\nfor name in COMMANDS:\n"
        "    try: main([name, '--help'])\n    except SystemExit: pass\n"
        "    print('THEN', name, *({'torch', 'numpy', 'scipy', 'rich'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert [line for line in out.splitlines() if line.startswith("THEN")] == [f"THEN {name}" for name in cli.COMMANDS]


def test_every_command_that_is_listed_can_be_imported():
    for name in cli._present():
        assert callable(cli._command(name))


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mirrormask {mirrormask.__version__}\n"


def test_the_help_of_every_command_has_an_example(capsys):
    for name in cli.COMMANDS:
        with contextlib.suppress(SystemExit):
            cli.main([name, "--help"])
        out = capsys.readouterr().out
        assert f"mirrormask {name}" in out.split("Example: " if "Example: " in out else "begin with:")[1]
        assert "``" not in out
    cli.main(["--help"])
    out = capsys.readouterr().out
    assert "  mirrormask demo\n" in out
    assert "75 stopped and saved" in out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("flow", "which experiment? One of all, bias"),
        ("flow bais", "unknown experiment 'bais'; did you mean 'bias'?"),
        ("flow bias --ot x", "unknown option --ot; did you mean --out?"),
        ("bench runs/last --round 3", "unknown option --round; did you mean --rounds?"),
        ("bench", "the following arguments are required: run"),
        ("report runs --titel x", "unknown option --titel; did you mean --title?"),
        ("serve m.mirror --max-bath 4", "unknown option --max-bath; did you mean --max-batch?"),
        ("demo --ou x", "unknown option --ou; did you mean --out?"),
    ],
)
def test_what_was_meant_is_suggested(capsys, line, message):
    assert message in errors(capsys, *line.split())


def test_an_export_s_unknown_format_lists_the_known_ones(tmp_path, capsys):
    found = errors(capsys, "export", str(tmp_path), "--to", "onx")
    assert "unknown format 'onx'; did you mean 'onnx'? Known: coreml" in found


def test_the_printed_configuration_is_that_of_the_recipe(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("optimizer: {lr: 0.25}\nepochs: 3\n")
    with pytest.raises(SystemExit):
        cli.main(["train", str(tmp_path / "r.yaml"), "--epochs", "4", "--print_config"])
    out = capsys.readouterr().out
    assert "lr: 0.25" in out
    assert "epochs: 4" in out


@pytest.mark.skipif(os.name == "nt", reason="a pipe that is closed is noticed where there is poll")
def test_a_reader_that_has_had_enough_is_no_error():
    code = "import sys, time; from mirrormask.cli import main; time.sleep(1); sys.exit(main(['info', 'methods']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() in (0, 141)


def test_the_demo_leaves_a_page_and_says_what_to_type_next(tmp_path, capsys, monkeypatch):
    from mirrormask import demo

    monkeypatch.setattr(demo, "RECIPE", (*demo.RECIPE[:4], "--epochs", "1", "--figure", "false"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo"]) == 0
    assert cli.main(["demo"]) == 0, "a second one takes the place of the first"
    out = capsys.readouterr().out
    assert "mirrormask bench runs/demo/mirror" in out
    assert (tmp_path / "runs" / "demo" / "report.html").stat().st_size > 100_000


def test_an_unknown_command_lists_the_known_ones(capsys):
    assert "mirrormask: error: unknown command 'trian'; did you mean 'train'" in errors(capsys, "trian")


def test_train_help_names_every_part_of_a_recipe(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", "--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    for option in (
        "--data.root",
        "--model.options",
        "--method.name",
        "--sparsity",
        "--resume",
        "--overwrite",
        "--seed",
        "--figure",
    ):
        assert option in out


def test_train_makes_a_folder_a_method_reuses_the_dense_run_and_prints_the_table(tmp_path, capsys):
    out = tmp_path / "runs" / "demo"
    arguments = ["train", "--method", "pilot,gmp", "--sparsity", "0.9", "--out", str(out), *FAST]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    for name in ("pilot", "gmp"):
        result = RunResult.read(out / name)
        assert result.nonzeros == result.nonzeros_asked == round(0.1 * (64 * 16 + 160))
        assert f"{100 * result.test_accuracy:.2f}%" in text
    assert "dense: epoch 2/2" in text
    assert "1.weight" in text
    assert "sparsity per layer" in text
    assert (out.parent / "last").resolve() == out / "gmp"
    dense = json.loads(next((out.parent / ".dense").glob("*/result.json")).read_text())
    assert dense["method"] == "dense"

    assert cli.main([*arguments, "--overwrite", "true", "--method", "mirror"]) == 0
    text = capsys.readouterr().out
    assert "dense: epoch" not in text
    assert "(reused)" in text


def test_dense_on_request_lies_with_the_others(tmp_path, capsys):
    assert cli.main(["train", "--method", "dense", "--out", str(tmp_path / "a"), *FAST]) == 0
    assert RunResult.read(tmp_path / "a" / "dense").sparsity == 0.0
    assert "sparsity per layer" not in capsys.readouterr().out


def test_a_recipe_file_and_overrides(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "model: {name: mlp, options: {hidden: [8]}}\nmethod: magnitude\nepochs: 1\nfigure: false\n"
        f"out: {tmp_path / 'a'}\n"
    )
    assert cli.main(["train", str(tmp_path / "r.yaml"), "--sparsity", "0.5", "--seed=7"]) == 0
    result = RunResult.read(tmp_path / "a" / "magnitude")
    assert (result.seed, result.sparsity_asked, result.numel) == (7, 0.5, 64 * 8 + 80)


def test_resume_after_an_interruption(tmp_path, capsys, monkeypatch):
    from mirrormask.train import progress

    def interrupt(self, step):
        if step == 60 and self.recipe.method.name == "gmp":
            raise KeyboardInterrupt

    arguments = ["train", "--method", "gmp", "--out", str(tmp_path / "a"), *FAST]
    with monkeypatch.context() as patch:
        patch.setattr(progress.ProgressObserver, "stepped", interrupt)
        assert cli.main(arguments) == 130
    assert "interrupted; go on with --resume true" in capsys.readouterr().err
    assert "already holds an unfinished run of method 'gmp'" in errors(capsys, *arguments)
    assert cli.main([*arguments, "--resume", "true"]) == 0
    assert "goes on at step 45 of 90" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "1.5"], "sparsity=1.5 is outside [0, 1)"),
        (["--sparsity", "high"], "\"sparsity\": Expected a <class 'float'>. Got value: high"),
        (["--epoch", "3"], "unknown option --epoch; did you mean --epochs?"),
        (["--shrinks", "3"], "unknown option --shrinks. --help lists them all"),
        (
            ["--sparsity", "95"],
            "sparsity=95.0 is outside [0, 1); sparsity is the fraction of zeros; did you mean 0.95?",
        ),
        (["--device", "cuda"], "device='cuda' is not on this machine, which has cpu"),
        (["--init", "no.pt"], "model.init='no.pt' is not a file"),
        (["--data", "./nowhere"], "the data folder './nowhere' does not exist"),
        (["--method", "pruner"], "unknown method 'pruner'. Known: "),
        (["--method", "pilot,pilot"], "must name each method once"),
        (["--method", "pilot,"], "must name each method once"),
        (["--method", "gmp", "--method.options.beta", "1"], "method 'gmp' does not take the option 'beta'"),
        (["--method", "gmp", "--method.options.end_at", "2"], "end=2"),
        (["--model", "lenet"], "unknown model 'lenet'"),
        (["--data", "mnist"], "unknown data set 'mnist'. Known: FILE.py:NAME, cifar10"),
        (["--data", "folder:/nowhere"], "'/nowhere' does not exist"),
        (["--data", "cifar10", "--data.root", "/nowhere"], "is not in data.root='/nowhere'"),
        (["nowhere.yaml"], "cannot read the recipe 'nowhere.yaml'"),
        (["--resume", "true", "--overwrite", "true"], "exclude each other"),
    ],
)
def test_a_mistake_becomes_one_message_and_writes_nothing(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    err = errors(capsys, "train", "--out", "runs/a", *arguments)
    assert err.startswith("mirrormask train: error: ")
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_in_the_second_method_is_found_before_the_first_trains(tmp_path, capsys):
    assert "unknown method 'mirrr'" in errors(capsys, "train", "--method", "pilot,mirrr", "--out", str(tmp_path / "a"))
    assert not (tmp_path / "a").exists()


def test_the_traceback_is_there_for_those_who_ask(monkeypatch):
    monkeypatch.setenv("MIRRORMASK_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown command"):
        cli.main(["trian"])


def test_info_names_versions_processor_and_extras(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for word in ("mirrormask", "torch", "processor", "instruction sets", "[train]", "[runtime]"):
        assert word in out


def test_info_methods_lists_every_method(capsys):
    assert cli.main(["info", "methods"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == list(mirrormask.methods.names())


def test_info_of_something_unknown(capsys):
    assert "mirrormask info: error: 'method' is neither 'methods' nor a run's folder" in errors(
        capsys, "info", "method"
    )


def test_a_function_s_signature_becomes_its_options(tmp_path, capsys):
    assert cli.main(["flow", "signs", "--out", str(tmp_path)]) == 0
    assert {"signs.csv", "signs.png", "signs.svg", "signs.txt"} <= {entry.name for entry in tmp_path.iterdir()}
    assert "mirrormask flow: error: " in errors(capsys, "flow", "recovery", "--seeds", "many")
    assert "mirrormask flow: error: " in errors(capsys, "flow", "tides")


def test_short_names_a_start_from_a_file_and_code_that_a_recipe_names(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "import torch\ndef net(classes):\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.Linear(8, classes))\n"
    )
    torch.manual_seed(0)
    from mirrormask.train import named

    torch.save(named.fetch("own.py:net")(7).state_dict(), "net.pt")
    (tmp_path / "r.yaml").write_text("model: own.py:net\nepochs: 1\nfigure: false\nthreads: 1\n")
    arguments = [
        "--init=net.pt",
        "--batch-size",
        "64",
        "--lr",
        "0.01",
        "--weight-decay=1e-4",
        "--out",
        "a",
        "--sparsity=0.8",
    ]
    assert "'own.py:net' is code that would be imported" in errors(capsys, "train", "r.yaml", *arguments)
    assert cli.main(["train", "r.yaml", "--allow-code", "true", *arguments]) == 0
    assert "own.py:net starts from net.pt: 2 tensors; 2.weight, 2.bias keep their first" in capsys.readouterr().out
    recipe = RunResult.read("a/mirror").recipe
    assert (recipe["batch_size"], recipe["optimizer"]["lr"], recipe["optimizer"]["weight_decay"]) == (64, 0.01, 1e-4)
    assert cli.main(["train", "--model", "own.py:net", "r.yaml", *arguments, "--resume=true"]) == 0
    assert "is code that would be imported" in errors(capsys, "bench", "a/mirror")
    assert "is code that would be imported" in errors(capsys, "export", "a/mirror")
    assert cli.main(["export", "a/mirror", "--to", "torch_sparse", "--allow_code", "true"]) == 0
    assert "a state dict with torch_sparse weights" in capsys.readouterr().out
    assert (tmp_path / "a" / "mirror" / "model.torch_sparse.pt").is_file()


def test_info_and_export_take_the_file_of_a_run(tmp_path, capsys):
    assert cli.main(["train", "--method", "gmp", "--out", str(tmp_path / "a"), *FAST]) == 0
    folder = str(tmp_path / "a" / "gmp")
    assert cli.main(["info", folder]) == 0
    out = capsys.readouterr().out
    assert "mlp on digits with gmp, seed 0" in out
    assert "1.weight" in out
    assert cli.main(["export", folder, "--to", "safetensors"]) == 0
    assert (tmp_path / "a" / "gmp" / "model.dense.safetensors").is_file()
    assert "leave out --model" in errors(capsys, "export", folder, "--model", "torch.nn.Linear")
    assert "say where to write" in errors(capsys, "export", str(tmp_path / "a" / "gmp" / "model.safetensors"))
    model = str(tmp_path / "a" / "gmp" / "model.safetensors")
    assert cli.main(["info", model]) == 0
    assert "1.weight" in capsys.readouterr().out
    assert cli.main(["export", model, str(tmp_path / "dense.safetensors"), "--to", "safetensors"]) == 0
    assert (tmp_path / "dense.safetensors").stat().st_size > 4 * (64 * 16 + 160)
    assert "mirrormask export: error: " in errors(capsys, "export", model, str(tmp_path / "x"), "--to", "gif")


TINY = ["--epochs", "1", "--model.options", '{"hidden": [8]}', "--threads", "1", "--figure", "false"]
#: A command -> arguments that it does with the runs of the folder, and others that are a mistake.
LINES = {
    "demo": (["demo"], ["demo", "--ou", "x"]),
    "train": (["train", "--method", "gmp", "--out", "runs/b", *TINY], ["train", "--sparsity", "2"]),
    "compare": (["compare", "--import", "runs/a", "--out", "c"], ["compare"]),
    "report": (["report", "runs/a"], ["report"]),
    "bench": (["bench", "runs/a/gmp", "--rounds", "1", "--threads", "1"], ["bench", "nowhere"]),
    "flow": (["flow", "signs", "--out", "f"], ["flow", "sings"]),
    "export": (["export", "runs/a/gmp", "--to", "safetensors"], ["export", "runs/a/gmp", "--to", "gif"]),
    "serve": (None, ["serve", "nowhere.mirror"]),
    "info": (["info", "runs/a/gmp"], ["info", "nowhere"]),
    "completion": (None, ["completion", "tcsh"]),
}
DONE = {name: done for name, (done, _) in LINES.items() if done}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    assert cli.main(["train", "--method", "gmp", "--out", str(folder / "runs" / "a"), *TINY]) == 0
    return folder


@pytest.fixture
def runs(finished, tmp_path, monkeypatch):
    """A folder of one run, and a demo, a measurement and an experiment that are over soon."""
    from mirrormask import demo, runtime
    from mirrormask.flow import signs

    monkeypatch.setattr(signs, "signs_experiment", functools.cache(signs.signs_experiment))
    measure = runtime.bench
    monkeypatch.setattr(demo, "RECIPE", ("--method", "gmp,mirror", *TINY))
    monkeypatch.setattr(runtime, "bench", lambda *given, **named: measure(*given, **named, engines=("eager",)))
    shutil.copytree(finished / "runs", tmp_path / "runs", symlinks=True)
    monkeypatch.chdir(tmp_path)


def object_of(capsys, *arguments):
    """The status, the one object on standard output, and what is on standard error."""
    status = cli.main([*arguments, "--json"])
    out, err = capsys.readouterr()
    tree = json.loads(out)
    assert (tree["command"], tree["status"]) == (arguments[0], status)
    assert len(out.splitlines()) == 1
    return tree, err


@pytest.mark.cases(len(DONE))
@pytest.mark.parametrize("name", DONE)
def test_json_is_one_object_and_quiet_is_silent(name, runs, capsys):
    tree, err = object_of(capsys, *DONE[name])
    assert tree["result"] and "error" not in tree
    assert err, "what a person would read is still there"
    again = [*DONE[name], *(["--overwrite", "true"] if name == "train" else [])]
    loud, err = object_of(capsys, again[0], "--quiet", *again[1:])
    assert set(loud["result"]) == set(tree["result"])
    assert err == ""
    assert cli.main([again[0], "--quiet", *again[1:]]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.cases(len(LINES))
@pytest.mark.parametrize("name", LINES)
def test_a_mistake_is_an_object_too_and_is_said_even_quietly(name, runs, capsys):
    tree, err = object_of(capsys, *LINES[name][1])
    assert tree["status"] == 2
    assert set(tree) == {"command", "status", "error"}
    assert err == f"mirrormask {name}: error: {tree['error']}\n"
    assert cli.main([*LINES[name][1], "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"mirrormask {name}: error: ")


def test_every_command_has_its_lines():
    assert set(LINES) == set(cli.COMMANDS)


def test_a_trained_run_becomes_one_file_that_takes_pixels_and_names_its_classes(runs, capsys):
    import numpy as np

    from mirrormask import runtime
    from mirrormask.train import load_model
    from mirrormask.train.data import load
    from mirrormask.train.recipe import Data

    images, run = load(Data("digits")).test.x.float(), RunResult.read("runs/a/gmp")
    normalised = (images - torch.tensor(run.pixel_mean)) / torch.tensor(run.pixel_std)
    with torch.no_grad():
        expected = load_model("runs/a/gmp")(normalised)
        torch.testing.assert_close(load_model("runs/a/gmp", pixels=True)(images), expected)
    right = expected.argmax(1) == load(Data("digits")).test.y
    assert right.float().mean().item() == pytest.approx(run.test_accuracy), "normalised as it was in training"

    assert cli.main(["export", "runs/a/gmp", "--to", "mirror", "--pixels", "true"]) == 0
    out, err = capsys.readouterr()
    assert "run it: mirrormask serve runs/a/gmp/model.mirror" in out
    assert err == "export: compiling\n"
    ready = runtime.load("runs/a/gmp/model.mirror")
    np.testing.assert_allclose(ready(images.numpy()), expected, rtol=1e-4, atol=1e-5)
    assert json.loads(ready.metadata["classes"]) == [str(digit) for digit in range(10)] == list(run.class_names)
    assert ready.metadata["input"] == "pixel values as they are in the images"

    # As in training, the numbers are said; weights of 8 bits are another file.
    assert cli.main(["export", "runs/a/gmp", "small.mirror", "--to", "mirror", "--weights", "int8"]) == 0
    small = runtime.load("small.mirror")
    assert tuple(json.loads(small.metadata["pixel_mean"])) == run.pixel_mean
    np.testing.assert_allclose(small(normalised.numpy()), expected, atol=0.1)


def test_what_an_export_cannot_do_is_said_first(runs, capsys, tmp_path):
    file = "runs/a/gmp/model.safetensors"
    assert "for --to mirror" in errors(capsys, "export", "runs/a/gmp", "--weights", "int8")
    assert "leave out --pixels" in errors(capsys, "export", "runs/a/gmp", "--to", "two_four", "--pixels", "true")
    assert "leave out --pixels" in errors(capsys, "export", file, "x.onnx", "--pixels", "true")
    assert "needs --model" in errors(capsys, "export", file, "x.mirror", "--to", "mirror")
    tree = json.loads((tmp_path / "runs/a/gmp/result.json").read_text())
    for name in ("class_names", "pixel_mean", "pixel_std"):
        del tree[name]
    (tmp_path / "runs/a/gmp/result.json").write_text(json.dumps(tree))
    assert "an older version trained it" in errors(capsys, "export", "runs/a/gmp", "--to", "mirror", "--pixels", "true")


def test_a_measurement_says_what_it_is_at(runs, capsys):
    assert cli.main(DONE["bench"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said == ["bench: compiling", "bench: preparing", "bench: timing"]


def test_stages_are_one_line_on_a_terminal(monkeypatch):
    from mirrormask import waiting

    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with waiting.stages("bench") as at:
        at("timing", "round 1 of 2")
        at("timing", "round 2 of 2")
        assert "bench: timing, round 2 of 2" in terminal.getvalue()
        assert "\n" not in terminal.getvalue()


def test_serve_has_no_result(capsys):
    assert object_of(capsys, "serve", "m.mirror")[0]["error"] == "serve prints no result: leave out --json"


def test_the_results_are_those_of_the_files(runs, capsys):
    result = object_of(capsys, *DONE["train"])[0]["result"]
    assert result["folder"] == "runs/b"
    assert [run["method"] for run in result["runs"]] == ["dense", "gmp"]
    with open("runs/b/gmp/result.json") as file:
        assert result["runs"][1] == json.load(file)
    result = object_of(capsys, *DONE["compare"])[0]["result"]
    with open("c/comparison.json") as file:
        assert result == {"folder": "c", **json.load(file)}
    result = object_of(capsys, *DONE["bench"])[0]["result"]
    with open(result.pop("path")) as file:
        assert result == json.load(file)
    for path in object_of(capsys, *DONE["flow"])[0]["result"]["files"]:
        assert os.path.isfile(path)
    assert object_of(capsys, *DONE["export"])[0]["result"] == {"files": ["runs/a/gmp/model.dense.safetensors"]}
    assert object_of(capsys, *DONE["report"])[0]["result"]["page"] == "report.html"
    result = object_of(capsys, *DONE["info"])[0]["result"]
    assert result["run"]["method"] == "gmp"
    assert result["file"]["bytes"] == os.path.getsize("runs/a/gmp/model.safetensors")
    assert [row["name"] for row in object_of(capsys, "info", "methods")[0]["result"]] == list(
        mirrormask.methods.names()
    )
    assert object_of(capsys, "info")[0]["result"]["mirrormask"] == mirrormask.__version__


def test_what_is_not_finite_is_null():
    from mirrormask import outcome

    assert outcome.plain([float("nan"), {"a": (float("-inf"), 1.5)}]) == [None, {"a": [None, 1.5]}]


def test_help_and_a_stop_are_objects_too(tmp_path, capsys, monkeypatch):
    from mirrormask.train import progress

    tree, err = object_of(capsys, "train", "--help")
    assert tree == {"command": "train", "status": 0, "result": None}
    assert "--sparsity" in err

    def interrupt(self, step):
        raise KeyboardInterrupt

    monkeypatch.setattr(progress.ProgressObserver, "stepped", interrupt)
    tree, _ = object_of(capsys, "train", "--out", str(tmp_path / "a"), *TINY)
    assert (tree["status"], tree["error"]) == (130, "interrupted; go on with --resume true")


def test_a_warning_of_a_run_is_said_even_quietly(capsys):
    from rich.console import Console

    from mirrormask import outcome
    from mirrormask.train.progress import ProgressObserver

    with outcome.apart(quiet=True, aside=False):
        ProgressObserver(Console()).warned("the log is damaged")
    assert capsys.readouterr() == ("", "train: the log is damaged\n")


def test_the_cells_that_fail_are_named_even_quietly(tmp_path, capfd):
    grid = ["--methods", "gmp", "--sparsity", "0.9", "--seeds", "1", "--workers", "1", "--out", str(tmp_path / "c")]
    assert cli.main(["compare", *grid, *TINY, "--lr", "1e30", "--quiet"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "gmp 90% seed 0 failed: FloatingPointError: 'weight' of '1.weight' has reached" in err
    assert err.endswith("mirrormask compare: error: there is no finished run to compare\n")


def test_what_other_programs_print_is_not_on_standard_output_either():
    code = (
        "import os, sys\nfrom mirrormask import cli, info\n"
        "info.methods = lambda: (os.system('echo loud'), [dict(name='a', line='b', reference='c')])[1]\n"
        "sys.exit(cli.main(['info', 'methods', *sys.argv[1:]]))"
    )
    done = subprocess.run([sys.executable, "-c", code, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["result"] == [{"name": "a", "line": "b", "reference": "c"}]
    assert done.stderr.splitlines() == ["loud", "a  b  c"]
    done = subprocess.run([sys.executable, "-c", code, "--quiet"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_of_several_processes_the_first_prints_the_object(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["info", "methods", "--json"]) == 0
    assert capsys.readouterr().out == ""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "mirrormask.bash"
    with open(path, "w") as file, contextlib.redirect_stdout(file):
        assert cli.main(["completion", "bash"]) == 0
    return path


def completed(script, *line, folder="."):
    """What bash offers for the last word of a line."""
    code = (
        'eval "$(cat "$1")"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _mirrormask 2>&1; '
        "printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    command = ["bash", "--norc", "-c", code, "bash", str(script), "mirrormask", *line]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_commands_options_and_words(script, tmp_path):
    assert completed(script, "") == list(cli.COMMANDS)
    assert completed(script, "fl") == ["flow"]
    for name in cli.COMMANDS:
        assert "--quiet" in completed(script, name, "--")
        assert ("--json" in completed(script, name, "--")) == (name not in cli.RESULTLESS)
    assert completed(script, "train", "--spars") == ["--sparsity"]
    assert completed(script, "flow", "recovery", "--see") == ["--seeds"]
    assert completed(script, "info", "me") == ["methods"]
    assert completed(script, "flow", "si") == ["signs"]
    (tmp_path / "my run").mkdir()
    assert completed(script, "info", "m", folder=tmp_path) == ["methods", "my", "run"]
    assert completed(script, "train", "reci") == [], "then it is files, by the option default"
    assert "complete -o default -F _mirrormask mirrormask" in script.read_text()


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_offers_every_option_of_train(script):
    from mirrormask.train import recipe_file
    from mirrormask.train.arguments import SHORT

    parser = jsonargparse.ArgumentParser()
    recipe_file.add_recipe_arguments(parser)
    wanted = {option for option in parser._option_string_actions if option.startswith("--") and option[-1] != "+"}
    wanted |= {f"--{short}" for short in SHORT} | {"--resume", "--overwrite", "--allow_code"}
    assert wanted - set(completed(script, "train", "--")) == set()


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_every_command_and_option_too(shell, capsys):
    from mirrormask import completion

    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for name, options in completion.table().items():
        lines = [line for line in script.splitlines() if re.search(rf" {name}\)|_from {name}'", line)]
        for option in options:
            assert any(re.search(rf"[ (]{option}[ )]|-l {option[2:]}$", line) for line in lines), option
    if shutil.which(shell):
        subprocess.run([shell, "-n", "-c", script], check=True)
